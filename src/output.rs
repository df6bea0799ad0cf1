//! What the command prints.
//!
//! A reader that is gone (`vmshadow list | head`, a closed terminal) is no reason to fail, least of
//! all in the middle of a move; `println!` would panic. A disk that is full is one, for commands
//! whose work is what they print.

use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write, stderr, stdout};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

/// So many log lines are kept for a terminal that stands still.
const KEPT: usize = 1024;

/// How long the end waits for log lines that are to be shown still.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The log lines of this process, where they are for a terminal.
static LOG: OnceLock<Lines> = OnceLock::new();

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

/// Log lines for a terminal, by a thread of its own: see [`progress`](crate::progress).
#[derive(Clone)]
pub struct Lines(SyncSender<Line>);

enum Line {
    Text(Vec<u8>),
    /// All before it were written.
    Mark(SyncSender<()>),
}

/// Where log lines go, if standard error is a terminal.
pub fn log_lines() -> Option<Lines> {
    stderr()
        .is_terminal()
        .then(|| LOG.get_or_init(Lines::new).clone())
}

/// Waits until what was logged is written, unless the terminal stands still: it comes before the last
/// word.
pub fn finish_log() {
    if let Some(lines) = LOG.get() {
        lines.finish();
    }
}

impl Lines {
    fn new() -> Self {
        let (lines, coming) = sync_channel(KEPT);
        thread::spawn(move || {
            for line in coming {
                match line {
                    // There is nowhere else to tell it.
                    Line::Text(text) => drop(stderr().write_all(&text)),
                    Line::Mark(mark) => drop(mark),
                }
            }
        });
        Lines(lines)
    }

    fn finish(&self) {
        let (mark, written) = sync_channel(0);
        if self.0.try_send(Line::Mark(mark)).is_ok() {
            let _ = written.recv_timeout(LAST_LINES);
        }
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Nobody sees what a terminal that stands still does not show.
        let _ = self.0.try_send(Line::Text(bytes.to_vec()));
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
}
