//! Stopping at a chosen point, for tests that break a move there.
//!
//! With `VMSHADOW_HOLD=POINT:FILE` in its environment a worker that comes to that point makes the
//! file and waits until it is removed; the first time only. Tests kill processes and cut links
//! meanwhile. Without the variable nothing happens.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The variable that names the point and the file.
pub const VARIABLE: &str = "VMSHADOW_HOLD";

/// Waits here if the environment asks for it.
pub fn hold(point: &str) {
    static WANTED: OnceLock<Option<(String, String)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let value = std::env::var(VARIABLE).ok()?;
        let (point, file) = value.split_once(':')?;
        Some((point.to_owned(), file.to_owned()))
    });
    let Some((_, file)) = wanted.as_ref().filter(|(wanted, _)| wanted == point) else {
        return;
    };
    static HELD: AtomicBool = AtomicBool::new(false);
    if HELD.swap(true, Ordering::Relaxed) {
        return;
    }
    if let Err(error) = std::fs::write(file, std::process::id().to_string()) {
        log::error!("Can't hold at {point}: {error}");
        return;
    }
    while Path::new(file).exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
}
