//! A client of xenstore: one request at a time.
//!
//! ```text
//!   message = type, request id, transaction id, length (u32 each), payload
//! ```
//! Replies come in order; in between may come events of watches, which are only noted: who waits
//! for them reads the node again.

use crate::hypercall::{notify, poll};
use crate::machine::Machine;
use crate::ring::StorePage;

const READ: u32 = 2;
const WATCH: u32 = 4;
const WRITE: u32 = 11;
const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;

/// What there is to wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A watched node has changed.
    Changed,
    /// Something that nobody asked for.
    Other,
}

/// The connection to xenstore.
pub struct Store {
    page: &'static StorePage,
    port: u32,
    changed: bool,
}

impl Store {
    /// The connection by this page.
    pub fn new(page: &'static StorePage, port: u32) -> Self {
        Self {
            page,
            port,
            changed: false,
        }
    }

    /// Starts anew with the daemon of a new domain, which knows of no watch, and nothing of what
    /// the last one had begun to say.
    pub fn attach(&mut self, port: u32) {
        self.port = port;
        self.page.responses().discard();
        self.changed = false;
    }

    /// Waits for something to happen.
    pub fn next_event(&mut self, machine: &Machine) -> Event {
        if core::mem::take(&mut self.changed) {
            return Event::Changed;
        }
        match self.receive(machine, &mut []) {
            (WATCH_EVENT, _) => Event::Changed,
            _ => Event::Other,
        }
    }

    /// Reads a node, as much as fits. Nothing if it is not there.
    pub fn read<'a>(&mut self, machine: &Machine, path: &str, into: &'a mut [u8]) -> &'a [u8] {
        let length = self.ask(machine, READ, &[path.as_bytes(), b"\0"], into);
        into.get(..length.unwrap_or(0)).unwrap_or_default()
    }

    /// Writes a node. What the daemon refuses is not written.
    pub fn write(&mut self, machine: &Machine, path: &str, value: &[u8]) {
        self.ask(machine, WRITE, &[path.as_bytes(), b"\0", value], &mut []);
    }

    /// Writes a number.
    pub fn write_number(&mut self, machine: &Machine, path: &str, value: u32) {
        let mut digits = [0; 10];
        self.write(machine, path, decimal(value, &mut digits));
    }

    /// Watches a node. The first event comes at once.
    pub fn watch(&mut self, machine: &Machine, path: &str) {
        self.ask(
            machine,
            WATCH,
            &[path.as_bytes(), b"\0", b"watch\0"],
            &mut [],
        );
    }

    /// Sends a request and waits for its reply: the payload's length, or nothing for an error.
    fn ask(
        &mut self,
        machine: &Machine,
        kind: u32,
        payload: &[&[u8]],
        reply: &mut [u8],
    ) -> Option<usize> {
        let length: usize = payload.iter().map(|part| part.len()).sum();
        for word in [kind, 0, 0, length as u32] {
            self.send(machine, &word.to_le_bytes());
        }
        for part in payload {
            self.send(machine, part);
        }
        notify(self.port);
        loop {
            match self.receive(machine, reply) {
                (WATCH_EVENT, _) => self.changed = true,
                (ERROR, _) => return None,
                (_, length) => return Some(length),
            }
        }
    }

    fn send(&mut self, machine: &Machine, mut data: &[u8]) {
        loop {
            let sent = self.page.requests().put(data);
            data = data.get(sent..).unwrap_or_default();
            if data.is_empty() {
                return;
            }
            notify(self.port);
            self.wait(machine);
        }
    }

    /// Receives a message: its type, and how much of its payload is in `into`.
    fn receive(&mut self, machine: &Machine, into: &mut [u8]) -> (u32, usize) {
        let mut header = [[0; 4]; 4];
        self.fill(machine, header.as_flattened_mut());
        let [kind, _, _, length] = header.map(u32::from_le_bytes);
        let length = length as usize;
        let kept = length.min(into.len());
        if let Some(place) = into.get_mut(..kept) {
            self.fill(machine, place);
        }
        let (mut rest, mut unwanted) = (length - kept, [0; 64]);
        while rest > 0 {
            let part = rest.min(unwanted.len());
            if let Some(place) = unwanted.get_mut(..part) {
                self.fill(machine, place);
            }
            rest -= part;
        }
        (kind, kept)
    }

    fn fill(&mut self, machine: &Machine, mut place: &mut [u8]) {
        while !place.is_empty() {
            let taken = self.page.responses().take(place);
            place = place.get_mut(taken..).unwrap_or_default();
            if taken == 0 {
                self.wait(machine);
            } else {
                // There may be room now for what did not fit.
                notify(self.port);
            }
        }
    }

    /// Waits for the daemon. A wait may end early: whoever waits looks again.
    fn wait(&self, machine: &Machine) {
        poll(self.port);
        machine.clear(self.port);
    }
}

/// The number's digits.
fn decimal(mut value: u32, digits: &mut [u8; 10]) -> &[u8] {
    let mut first = digits.len();
    for (at, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + (value % 10).to_le_bytes()[0];
        value /= 10;
        first = at;
        if value == 0 {
            break;
        }
    }
    digits.get(first..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_digits() {
        for value in [0, 7, 10, 4711, u32::MAX] {
            assert_eq!(decimal(value, &mut [0; 10]), value.to_string().as_bytes());
        }
    }
}
