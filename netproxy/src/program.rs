//! Running the system's own programs: `ip` and `nft`.

use std::io::Write;
use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::error::{Error, Result};

fn failed(program: &str, message: impl std::fmt::Display) -> Error {
    Error::Program {
        program: program.to_owned(),
        message: message.to_string(),
    }
}

/// Where the system's programs are, also if the caller's path lacks the directories of root.
///
/// The program is looked up here, and not by the child: else this process would be forked as a whole,
/// and then each page that an event loop writes to, in the middle of a move, would be copied.
fn command(program: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin");
    let found = path
        .split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| PathBuf::from(directory).join(program))
        .find(|file| file.is_file());
    let mut command = Command::new(found.unwrap_or_else(|| program.into()));
    command.env("PATH", path);
    command
}

/// Runs a program with text on its standard input, and gives what it prints.
pub(crate) fn run(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let mut child = command(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A Ctrl-C in the terminal is for this process, which ends in good order.
        .process_group(0)
        .spawn()
        .map_err(|error| failed(program, error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // It may end without reading; what it says of that is below.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(program, error))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(failed(program, message.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `ip` with the words of a line, and gives what it prints.
pub(crate) fn ip(line: &str) -> Result<String> {
    run("ip", &line.split_whitespace().collect::<Vec<_>>(), "")
}

/// The option by which `ip` knows an address's family.
pub(crate) fn ip_option(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "-4" } else { "-6" }
}

/// A child that lives as long as this process and not longer: it reads a pipe that the kernel
/// closes when this process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Tethered {
    child: Child,
}

impl Tethered {
    /// A shell that runs `script` when the tether is dropped, or this process dies.
    pub(crate) fn finally(script: &str) -> Result<Self> {
        let child = command("/bin/sh")
            .args(["-c", &format!("cat >/dev/null; {script}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C in the terminal is for this process: the child sees its end.
            .process_group(0)
            .spawn()
            .map_err(|error| failed("/bin/sh", error))?;
        Ok(Self { child })
    }

    /// An `nft` that was given `rules`, and holds its netlink socket open: tables with
    /// `flags owner` vanish with it.
    pub(crate) fn nft(rules: &str) -> Result<Self> {
        let mut child = command("nft")
            .arg("-i")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C in the terminal is for this process: the child sees its end.
            .process_group(0)
            .spawn()
            .map_err(|error| failed("nft", error))?;
        if let Some(stdin) = child.stdin.as_mut() {
            stdin
                .write_all(rules.as_bytes())
                .and_then(|()| stdin.flush())
                .map_err(|error| failed("nft", error))?;
        }
        Ok(Self { child })
    }
}

impl Drop for Tethered {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_out_of_the_terminals_group() {
        let printed = run("/bin/sh", &["-c", "cut -d ' ' -f 1,5 /proc/$$/stat"], "").unwrap();
        let (id, group) = printed.trim().split_once(' ').unwrap();
        assert_eq!(id, group);
    }
}
