//! Commands of this machine, and the processes of /proc.

use crate::{Error, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a command to its end and gives its standard output. Its standard input
/// is left as the caller set it.
pub fn run(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failure(&describe(command), &output))
}

/// Runs a command to its end.
pub fn output(command: &mut Command) -> Result<Output> {
    command.output().map_err(|source| Error::Start {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    })
}

/// The error for a command that failed.
pub fn failure(command: &str, output: &Output) -> Error {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    Error::Command {
        command: command.to_owned(),
        status: output.status,
        output: last_lines(&String::from_utf8_lossy(&both), 40),
    }
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The last lines of a text.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

/// The last lines of a file; empty if there is none.
pub fn tail(path: &Path, count: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    last_lines(&String::from_utf8_lossy(&bytes), count)
}

/// When a process started, in clock ticks since boot: with the pid, this names
/// it for good. None if there is no such process, or it is a zombie.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let start = fields.nth(18)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(start)
}

/// The QEMUs with this text in their command line. Only QEMUs: a shell or an
/// editor that happens to name the same path is nobody's to end.
pub fn qemus_mentioning(text: &str) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let file = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            file("comm").starts_with(b"qemu-system")
                && String::from_utf8_lossy(&file("cmdline")).contains(text)
        })
        .collect()
}

/// Sends SIGKILL to a process. One that has ended is no error.
pub fn end(pid: i32) {
    if pid > 1 {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// A word for a shell.
pub fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_start_time_is_known_and_no_process_has_none() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(own).is_some());
        assert_eq!(start_time(own), start_time(own));
        assert_eq!(start_time(i32::MAX), None);
    }

    #[test]
    fn quoted_words_reach_the_shell_unchanged() {
        let word = "it's $HOME; \"x\" \\";
        let line = format!("printf %s {}", quote(word));
        assert_eq!(run(Command::new("sh").arg("-c").arg(line)).unwrap(), word);
    }

    #[test]
    fn a_failing_command_shows_its_output() {
        let error = run(Command::new("sh").arg("-c").arg("echo why >&2; exit 3")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("why") && text.contains('3'), "{text}");
    }

    #[test]
    fn the_last_lines_are_the_last() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
    }
}
