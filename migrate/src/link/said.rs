//! What programs at the other end print, made fit to be shown and kept.
//!
//! The other site decides what comes: a banner, a shell's complaint, a terminal's control
//! sequences, or lines without end. All is read to its end, so that nobody waits for us; of it a
//! bounded part is kept, as printable text.

use std::collections::VecDeque;
use std::io::{self, Read};

use crate::wire::{Text, printable};

/// The most bytes kept of a line; the rest of it is read and dropped.
const LONGEST_LINE: usize = 400;

/// Cuts what comes into lines, each printable and of bounded length.
#[derive(Debug, Default)]
pub(super) struct Lines {
    line: Vec<u8>,
    cut: bool,
}

impl Lines {
    /// Takes what came, and gives out the lines that it ends.
    pub(super) fn push(&mut self, bytes: &[u8], mut take: impl FnMut(String)) {
        for byte in bytes {
            match byte {
                b'\n' => self.end(&mut take),
                byte if self.line.len() < LONGEST_LINE => self.line.push(*byte),
                _ => self.cut = true,
            }
        }
    }

    /// Gives out what came after the last end of a line.
    pub(super) fn finish(mut self, mut take: impl FnMut(String)) {
        if !self.line.is_empty() {
            self.end(&mut take);
        }
    }

    fn end(&mut self, take: &mut impl FnMut(String)) {
        let text = Text::from_bytes(self.line.trim_ascii());
        let cut = if self.cut { " ..." } else { "" };
        take(format!("{}{cut}", text.as_str()));
        self.line.clear();
        self.cut = false;
    }
}

/// Reads `from` to its end and gives each line to `take`.
///
/// # Errors
/// Fails when reading does.
pub(super) fn read_lines(mut from: impl Read, mut take: impl FnMut(String)) -> io::Result<()> {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => lines.push(buffer.get(..count).unwrap_or_default(), &mut take),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                lines.finish(take);
                return Err(error);
            }
        }
    }
    lines.finish(take);
    Ok(())
}

/// Reads `from` to its end, for whoever takes it apart: lines of any length, printable. The caller
/// bounds it.
///
/// # Errors
/// Fails when reading does.
pub(super) fn read_whole(mut from: impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes)?;
    let shown = |line: &[u8]| -> String {
        let line = String::from_utf8_lossy(line.trim_ascii_end());
        line.chars().map(printable).collect()
    };
    let lines: Vec<_> = bytes
        .trim_ascii_end()
        .split(|byte| *byte == b'\n')
        .map(shown)
        .collect();
    Ok(lines.join("\n"))
}

/// The last lines of what was said: what ended a program is said last.
#[derive(Debug, Clone, Default)]
pub(super) struct LastLines(VecDeque<String>);

impl LastLines {
    /// How many are kept.
    const KEPT: usize = 20;

    /// Adds a line, at the cost of the oldest one. Empty ones say nothing.
    pub(super) fn push(&mut self, line: String) {
        if line.is_empty() {
            return;
        }
        if self.0.len() == Self::KEPT {
            self.0.pop_front();
        }
        self.0.push_back(line);
    }

    /// The very last one.
    pub(super) fn last(&self) -> Option<&str> {
        self.0.back().map(String::as_str)
    }

    /// All, oldest first.
    pub(super) fn all(&self) -> Vec<String> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        read_lines(bytes, |line| lines.push(line)).unwrap();
        lines
    }

    #[test]
    fn a_terminal_is_not_at_the_other_sites_mercy() {
        let lines = lines(b"\x1b]0;title\x07\x1b[2Jfine\r\nnot \xff UTF-8\n");
        assert!(
            lines
                .iter()
                .all(|line| !line.contains(|c: char| c.is_control())),
            "{lines:?}"
        );
        assert_eq!(lines.len(), 2);
        assert!(lines[0].ends_with("fine"), "{lines:?}");
        assert_eq!(lines[1], "not \u{fffd} UTF-8");
    }

    #[test]
    fn a_line_without_end_is_cut_and_the_next_is_whole() {
        let mut text = vec![b'x'; 1 << 20];
        text.extend(b"\nlast");
        let lines = lines(&text);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].len(), LONGEST_LINE + 4);
        assert!(lines[0].ends_with(" ..."));
        assert_eq!(lines[1], "last");
    }

    #[test]
    fn what_is_read_whole_is_not_cut() {
        let long = "x".repeat(2 * LONGEST_LINE);
        let text = format!("  {long}\x1b[2J\r\nlast\n\n");
        assert_eq!(
            read_whole(text.as_bytes()).unwrap(),
            format!("  {long}\u{fffd}[2J\nlast")
        );
    }

    #[test]
    fn the_last_lines_are_kept() {
        let mut kept = LastLines::default();
        for number in 0..1000 {
            kept.push(number.to_string());
            kept.push(String::new());
        }
        assert_eq!(kept.all().len(), LastLines::KEPT);
        assert_eq!(kept.last(), Some("999"));
    }
}
