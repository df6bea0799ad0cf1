//! The engine beside others, over guests that are replayed.
//!
//! `cargo bench -p migrate --bench engine [-- SECTION ...]`: bytes, cpu, unchanged, memory,
//! wire, tcp, ssh. Without a section: all. Recordings are taken from the cache, where `make record`
//! puts them; a guest that is generated comes besides. Where QEMU or an sshd is not installed their
//! rows are left out.
//!
//! All figures of a table are of one run. Give the machine nothing else to do.
#![allow(missing_docs)]

mod bytes;
mod cpu;
mod memory;
mod others;
mod processes;
mod qemu;
mod ssh;
mod subject;
mod tcp;
mod unchanged;
mod wire;

use std::io;

/// What goes wrong in a benchmark, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    // `cargo bench` adds an option of its own.
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    arguments.retain(|argument| argument != "--bench");
    if arguments.first().is_some_and(|first| first == "end") {
        return processes::end(&arguments[1..]);
    }
    if arguments.first().is_some_and(|first| first == "passing") {
        return ssh::pass(&arguments[1..]);
    }
    type Section = (&'static str, fn() -> Result<()>);
    const SECTIONS: [Section; 7] = [
        ("bytes", bytes::run),
        ("cpu", cpu::run),
        ("unchanged", unchanged::run),
        ("memory", memory::run),
        ("wire", wire::run),
        ("tcp", tcp::run),
        ("ssh", ssh::run),
    ];
    if let Some(unknown) = arguments
        .iter()
        .find(|argument| SECTIONS.iter().all(|(name, _)| name != argument))
    {
        return Err(io::Error::other(format!("No section {unknown}")).into());
    }
    for (name, section) in SECTIONS {
        if arguments.is_empty() || arguments.iter().any(|argument| argument == name) {
            section()?;
        }
    }
    Ok(())
}
