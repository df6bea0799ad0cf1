//! The command on a machine that is no Xen host, such as the one that builds: it says so.
//! Skipped, aloud, where Xen runs.

use std::fs;
use std::process::{Command, Output, Stdio};

fn under_xen() -> bool {
    let under_xen = fs::read_to_string("/sys/hypervisor/type").is_ok_and(|it| it.trim() == "xen");
    if under_xen {
        eprintln!("This machine runs under Xen: nothing to see here");
    }
    under_xen
}

fn vmshadow(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmshadow"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs it, and expects that status and those words.
fn says(arguments: &[&str], status: i32, words: &[&str]) -> String {
    let output = vmshadow(arguments).output().expect("It starts");
    let said = said(&output);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?}: {said}");
    }
    assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    said
}

#[test]
fn check_says_what_is_missing() {
    if under_xen() {
        return;
    }
    says(
        &["check"],
        1,
        &["FAIL Xen", "Xen", "This host can't move guests"],
    );
    let json = says(&["check", "--json"], 1, &[]);
    let findings: serde_json::Value = serde_json::from_str(&json).unwrap();
    let xen = findings
        .as_array()
        .and_then(|all| all.iter().find(|finding| finding["what"] == "Xen"));
    assert_eq!(xen.unwrap()["ok"], false, "{json}");
}

#[test]
fn nothing_else_works_and_each_says_why() {
    if under_xen() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report").display().to_string();
    for arguments in [
        &["list"][..],
        &["migrate", "g1", "nowhere.invalid"],
        &["migrate", "g1", "nowhere.invalid", "--report", &report],
    ] {
        let said = says(arguments, 1, &["vmshadow: Can't reach the hypervisor"]);
        assert!(!said.contains("runs here"), "{said}");
    }
    says(&["resolve", "g1"], 0, &["No move of g1 is open here"]);
    says(&["resolve", "--all"], 0, &["No move of any guest"]);
    says(&["receive"], 1, &[]);
    let unknown = ["receive", "--ask", "00000000-0000-4000-8000-000000000000"];
    says(&unknown, 0, &["unknown"]);
    says(&["receive", "--ask", "../../etc/passwd"], 1, &["no id"]);
}

#[test]
fn bad_usage_is_told_before_anything_happens() {
    for arguments in [
        &["migrate", "g1"][..],
        &["migrate", "g1", "b", "--bandwidth", "fast"],
        &["migrate", "g1", "b", "--downtime", "-1"],
        &["resolve"],
        &["resolve", "--all", "g1"],
        &["nonsense"],
    ] {
        says(arguments, 2, &["--help"]);
    }
    says(&["migrate", "g1", "-oProxyCommand=x"], 2, &[]);
    let bad = "/nonexistent/report";
    says(&["migrate", "g1", "b", "--report", bad], 1, &[bad]);
    says(&["--version"], 0, &[env!("CARGO_PKG_VERSION")]);
    says(&["help", "migrate"], 0, &["--downtime", "--bandwidth"]);
}

/// Whoever reads the output may go away in the middle.
#[test]
fn a_closed_output_is_no_crash() {
    for arguments in [&["check"][..], &["check", "--json"], &["list"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = vmshadow(arguments)
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .output()
            .unwrap();
        assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    }
}
