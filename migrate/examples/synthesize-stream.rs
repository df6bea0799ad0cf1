//! Writes a small migration stream of a PV or PVH guest that never was, for checkers of the format:
//!
//! ```text
//! synthesize-stream libxl pvh FILE && verify-stream-v2 -f libxl -v -i FILE
//! ```

#[path = "../tests/synthesized/mod.rs"]
mod synthesized;

use migrate::guest::xen::stream::{Framing, StreamError};
use std::fs::File;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    let framing = match arguments.get(1).map(String::as_str) {
        Some("libxl") => Framing::Libxl,
        Some("libxc") => Framing::Libxc,
        _ => return usage(),
    };
    let (Some(kind), Some(path)) = (arguments.get(2), arguments.get(3)) else {
        return usage();
    };
    let written = File::create(path)
        .map_err(StreamError::from)
        .and_then(|file| match kind.as_str() {
            "pvh" => synthesized::write_pvh(file, framing, 2999),
            _ => synthesized::write(file, framing, 2999),
        });
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{path}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("Usage: synthesize-stream libxl|libxc pv|pvh FILE");
    ExitCode::from(2)
}
