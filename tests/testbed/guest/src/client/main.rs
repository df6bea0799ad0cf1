//! Talks to a test guest from a site.
//!
//! ```text
//! testbed-client watch ADDRESS          watch until stdin ends, then print a report in JSON
//! testbed-client ask ADDRESS COMMAND    send a command to the control port, print the answer
//! ```
//! `watch` prints a line `watching` as soon as all its parts work.

mod watch;

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;
use testbed_guest::CONTROL_PORT;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match *words {
        ["watch", address] => address
            .parse()
            .map_err(|_| format!("Not an address: {address}"))
            .and_then(watch::run),
        ["ask", address, ref command @ ..] if !command.is_empty() => address
            .parse()
            .map_err(|_| format!("Not an address: {address}"))
            .and_then(|address| ask(address, &command.join(" "))),
        _ => {
            eprintln!("Usage: testbed-client watch ADDRESS | ask ADDRESS COMMAND...");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("testbed-client: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Sends one command and prints the answer.
fn ask(address: Ipv4Addr, command: &str) -> Result<(), String> {
    let target = SocketAddr::from((address, CONTROL_PORT));
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(10))
        .map_err(|error| format!("Can't connect to {target}: {error}"))?;
    let mut answer = String::new();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .and_then(|()| stream.write_all(format!("{command}\n").as_bytes()))
        .and_then(|()| BufReader::new(stream).read_line(&mut answer))
        .map_err(|error| format!("{command}: {error}"))?;
    if answer.is_empty() {
        return Err(format!("{command}: No answer"));
    }
    print!("{answer}");
    Ok(())
}
