//! Lines for `xl console`. What does not fit is lost: nobody may be reading.

use crate::hypercall::notify;
use crate::ring::ConsolePage;
use core::fmt;

/// The console.
pub struct Console {
    page: &'static ConsolePage,
    port: u32,
}

impl Console {
    /// The console at this page.
    pub fn new(page: &'static ConsolePage, port: u32) -> Self {
        Self { page, port }
    }

    /// Another event channel, that of a new domain.
    pub fn attach(&mut self, port: u32) {
        self.port = port;
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            let ring = self.page.output();
            match line.strip_suffix('\n') {
                Some(line) => {
                    ring.put(line.as_bytes());
                    ring.put(b"\r\n");
                }
                None => {
                    ring.put(line.as_bytes());
                }
            }
        }
        notify(self.port);
        Ok(())
    }
}
