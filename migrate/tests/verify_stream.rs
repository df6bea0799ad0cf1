//! Xen's own checker of migration streams accepts ours.
//!
//! It needs `verify-stream-v2` of Debian's xen-utils and Python, and looks for it where that package
//! puts it; `VERIFY_STREAM` names another place, as `make unit` does. Without it the test says so and
//! checks nothing.

mod synthesized;

use migrate::guest::xen::stream::Framing;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn checker() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("VERIFY_STREAM") {
        return Some(path.into());
    }
    std::fs::read_dir("/usr/lib")
        .ok()?
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("xen-"))
        .map(|entry| entry.path().join("bin/verify-stream-v2"))
        .find(|path| path.exists())
}

fn check(checker: &Path, framing: Framing, stream: &[u8]) -> Output {
    let format = if framing == Framing::Libxl {
        "libxl"
    } else {
        "libxc"
    };
    let root = checker
        .parent()
        .and_then(Path::parent)
        .expect("It is in Xen's bin");
    // It does not put the parts together that a pipe would give it, so it gets a file.
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("synthesized.{format}"));
    std::fs::write(&file, stream).expect("The stream is written");
    let output = Command::new("python3")
        .arg(checker)
        .args(["-f", format, "-v", "-i"])
        .arg(&file)
        .env("PYTHONPATH", root.join("lib/python"))
        .output()
        .expect("Python runs");
    std::fs::remove_file(&file).expect("The stream is removed");
    output
}

#[test]
fn verify_stream_accepts_what_is_synthesized() {
    let Some(checker) = checker() else {
        eprintln!("verify-stream-v2 is not installed: nothing was checked");
        return;
    };
    for framing in [Framing::Libxl, Framing::Libxc] {
        let mut pv = Vec::new();
        synthesized::write(&mut pv, framing, 2999).unwrap();
        let mut pvh = Vec::new();
        synthesized::write_pvh(&mut pvh, framing, 2999).unwrap();
        for (kind, stream) in [("pv", pv), ("pvh", pvh)] {
            // The checker notices what is wrong, so its silence means something.
            let cut = &stream[..stream.len() / 2];
            assert!(!check(&checker, framing, cut).status.success());
            let output = check(&checker, framing, &stream);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{kind}, {framing:?}: {said}");
        }
    }
}
