//! What the command prints.
//!
//! A reader that is gone (`vmshadow list | head`, a closed terminal) is no reason to fail, least of
//! all in the middle of a move; `println!` would panic. A disk that is full is one, for commands
//! whose work is what they print.

use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write, stderr, stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::beside::Beside;

/// Log lines on their way to a terminal.
static LOG: Mutex<Option<Beside<Vec<u8>>>> = Mutex::new(None);

static INCOMPLETE: AtomicBool = AtomicBool::new(false);

/// Prints a line; use `say!`.
pub fn say(text: Arguments<'_>) {
    if let Err(error) = print(&mut stdout().lock(), text)
        && !INCOMPLETE.swap(true, Ordering::Relaxed)
    {
        tell(format_args!("vmshadow: Can't print: {error}"));
    }
}

/// Prints a line to standard error, for whoever may read it; use `tell!`.
pub fn tell(text: Arguments<'_>) {
    // There is nowhere else to tell it.
    let _ = writeln!(stderr(), "{text}");
}

/// Tells of failures as they come, but of the last one: that is for the caller to tell.
pub fn tell_all_but_last(failures: impl IntoIterator<Item = anyhow::Error>) -> anyhow::Result<()> {
    let mut last = None;
    for failure in failures {
        if let Some(before) = last.replace(failure) {
            tell(format_args!("vmshadow: {before:#}"));
        }
    }
    last.map_or(Ok(()), Err)
}

/// Where log lines go.
pub struct Log;

/// From now on log lines for a terminal hold nobody up.
pub fn begin_log() {
    if stderr().is_terminal() {
        // There is nowhere else to tell what can't be written.
        let lines = Beside::new(|line: Vec<u8>| drop(stderr().write_all(&line)));
        *log_lines() = Some(lines);
    }
}

/// Waits until what was logged is written, unless the terminal stands still: it comes before the last
/// word. What is logged after it waits for the terminal.
pub fn finish_log() {
    let lines = log_lines().take();
    drop(lines);
}

/// Whoever had it in hand and failed has left it whole.
fn log_lines() -> MutexGuard<'static, Option<Beside<Vec<u8>>>> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &*log_lines() {
            Some(lines) => lines.show(bytes.to_vec()),
            None => return stderr().write(bytes),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether something that was printed did not come to where it was to go.
pub fn incomplete() -> bool {
    INCOMPLETE.load(Ordering::Relaxed)
}

fn print(to: &mut impl Write, text: Arguments<'_>) -> io::Result<()> {
    match writeln!(to, "{text}").and_then(|()| to.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_is_gone_is_no_failure_and_a_full_disk_is() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        print(&mut writer, format_args!("unheard")).unwrap();
        let mut full = std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let error = print(&mut full, format_args!("too much")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn the_last_failure_is_the_callers() {
        assert!(tell_all_but_last([]).is_ok());
        let failures = ["first", "last"].map(anyhow::Error::msg);
        let error = tell_all_but_last(failures).unwrap_err();
        assert_eq!(error.to_string(), "last");
    }
}
