//! The command on a machine that is no Xen host, such as the one that builds: it says what is
//! missing, and what needs no Xen works. Skipped, aloud, where Xen runs.
//!
//! It runs in a mount namespace of its own, where `/var/lib`, `/var/log` and `/run` are empty
//! directories of the test: this machine's stay as they are.

use std::fs;
use std::io::pipe;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use migrate::digest::DigestKey;
use migrate::directories::Directories;
use migrate::handover::journal::{Begin, Journal, Phase, Role};
use migrate::wire::{
    CpuPolicy, Direction, FrameReader, FrameWriter, GuestKind, Hello, MoveId, Offer, Purpose,
    Role as WireRole, Text, ToDestination, ToSource, TscOffer, XenVersion,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// What says that there is no hypervisor, and what to install.
const NO_XEN: &str = "This machine does not run under Xen: install xen-system-amd64 and boot it";

/// A machine of the test's own, as far as vmshadow writes to it.
struct Machine {
    root: TempDir,
}

impl Machine {
    /// Nothing, aloud, where this can't be tested.
    fn new() -> Option<Machine> {
        let hypervisor = fs::read_to_string("/sys/hypervisor/type").unwrap_or_default();
        if hypervisor.trim() == "xen" {
            eprintln!("This machine runs under Xen: nothing to see here");
            return None;
        }
        let namespace = Command::new("unshare").args(["--mount", "true"]).output();
        if !namespace.is_ok_and(|output| output.status.success()) {
            eprintln!("No mount namespace can be made here: this needs root");
            return None;
        }
        let root = tempfile::tempdir().expect("A directory is made");
        for directory in ["lib", "log", "run"] {
            fs::create_dir(root.path().join(directory)).expect("A directory is made");
        }
        Some(Machine { root })
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn vmshadow(&self, arguments: &[&str]) -> Command {
        self.vmshadow_with(&[], arguments)
    }

    /// With these directories of the root as well in place of the machine's.
    fn vmshadow_with(&self, others: &[&str], arguments: &[&str]) -> Command {
        let others: String = others
            .iter()
            .map(|name| format!("mount --bind \"$0/{name}\" /{name}; "))
            .collect();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-ec"])
            .arg(format!(
                "mount --bind \"$0/lib\" /var/lib; mount --bind \"$0/log\" /var/log; \
                 mount --bind \"$0/run\" /run; {others}exec \"$@\"",
            ))
            .arg(self.root.path())
            .arg(env!("CARGO_BIN_EXE_vmshadow"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs it, and expects that status and those words.
    fn says(&self, arguments: &[&str], status: i32, words: &[&str]) -> Output {
        let output = self.vmshadow(arguments).output().expect("It starts");
        let said = said(&output);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments:?}, {word}: {said}");
        }
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
        assert!(!said.contains('\u{1b}'), "{arguments:?}: {said:?}");
        output
    }

    /// The journal of a move from here that was open when this machine last went down.
    fn open_move(&self, number: u8, name: &str, phase: Phase, answer: &str) -> PathBuf {
        let directories = Directories {
            state: self.path("lib/vmshadow"),
            runtime: self.path("run/vmshadow"),
            log: self.path("log/vmshadow"),
        };
        directories.create().expect("Directories are made");
        let uuid = format!("00000000-0000-4000-8000-0000000000{number:02x}");
        let mut journal = Journal::create(
            &directories,
            Begin {
                domid: Some(1),
                // What stands for ssh gets the question as its arguments.
                remote: ["sh", "-c", answer].map(str::to_owned).to_vec(),
                directory: Some(self.root.path().display().to_string()),
                boot_id: "another boot".into(),
                ..Begin::new(
                    Role::Source,
                    &format!("{number:032x}"),
                    name,
                    &uuid,
                    "other",
                )
                .expect("There is a boot id")
            },
        )
        .expect("A journal is begun");
        journal.reach(phase).expect("A journal is written");
        journal.entry().path.clone()
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", printed(output), told(output))
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn check_says_what_is_missing() {
    let Some(machine) = Machine::new() else {
        return;
    };
    machine.says(
        &["check"],
        1,
        &["FAIL Xen", NO_XEN, "This host can't move guests"],
    );
    let output = machine.says(&["check", "--json"], 1, &[]);
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let xen = findings
        .as_array()
        .and_then(|all| all.iter().find(|finding| finding["what"] == "Xen"));
    assert_eq!(xen.unwrap()["ok"], false, "{findings}");
    assert_eq!(xen.unwrap()["found"], NO_XEN, "{findings}");
}

#[test]
fn check_says_that_another_host_can_not_be_reached() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let script = machine.path("ssh");
    fs::write(&script, "printf 'No route \\033[2J\\n' >&2; exit 255").unwrap();
    let ssh = format!("sh {}", script.display());
    let words = ["FAIL other host", "Lost the link to b: No route"];
    machine.says(&["check", "b", "-s", &ssh], 1, &words);
}

#[test]
fn check_says_what_another_host_lacks() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let script = machine.path("ssh");
    let check = |answer: &str, words: &[&str]| {
        fs::write(&script, format!("cat <<'END'\n{answer}\nEND\nexit 1\n")).unwrap();
        let ssh = format!("sh {}", script.display());
        said(&machine.says(&["check", "b", "-s", &ssh], 1, words))
    };
    let found = "x".repeat(500);
    let answer = serde_json::json!([
        { "what": "privileges", "ok": true, "found": "root" },
        { "what": "Xen", "ok": false, "found": format!("none \u{1b}[2J {found}") },
    ]);
    let answer = serde_json::to_string_pretty(&answer).unwrap();
    let words = [
        "FAIL other host",
        "b can't move guests yet",
        "ok   b: privileges",
        "FAIL b: Xen",
        &found,
    ];
    let said = check(&answer, &words);
    assert!(!said.contains("Lost the link"), "{said}");
    let words = ["FAIL other host", "can be read: This account", "run there"];
    check("This account is not available", &words);
}

#[test]
fn nothing_else_works_and_each_says_why() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let report = machine.path("report");
    let report_path = report.display().to_string();
    for arguments in [
        &["list"][..],
        &["list", "--json"],
        &["migrate", "g1", "nowhere.invalid"],
        &["migrate", "g1", "nowhere.invalid", "--report", &report_path],
        &["migrate", "g1", "nowhere.invalid", "--dry-run"],
        &["resolve", "g1"],
        &["resolve", "--all"],
        &["receive"],
    ] {
        let output = machine.says(arguments, 1, &[&format!("vmshadow: {NO_XEN}")]);
        assert!(!said(&output).contains("runs here"), "{output:?}");
    }
    assert!(!report.exists());
    machine.says(&["status"], 0, &["No move is at work"]);
    machine.says(&["cancel", "g1"], 1, &["No move of g1"]);
    machine.says(&["set", "g1", "downtime=50"], 1, &["No move of g1"]);
    let unknown = ["receive", "--ask", "00000000-0000-4000-8000-000000000000"];
    machine.says(&unknown, 0, &["unknown"]);
    machine.says(&["receive", "--ask", "../../etc/passwd"], 1, &["no id"]);
}

/// A host that went down for good and came back without Xen still knows what became of its guests.
#[test]
fn each_open_move_is_settled_whatever_becomes_of_the_others() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let unreachable = "printf 'No route \\033[2J\\n' >&2; exit 255";
    let lost = machine.open_move(1, "g1", Phase::Committed, unreachable);
    let here = machine.open_move(2, "g2", Phase::Suspending, "exit 1");
    let owned = r#"echo '{"version":1,"owner":"destination"}'"#;
    let there = machine.open_move(3, "g3", Phase::Committed, owned);
    let nonsense = "printf 'Welcome\\033[2J\\n'";
    let unreadable = machine.open_move(4, "g4", Phase::Committed, nonsense);

    let output = machine.says(&["resolve", "--all"], 1, &[]);
    let (printed, told) = (printed(&output), told(&output));
    assert!(printed.contains("g2: "), "{printed}");
    assert!(printed.contains("g3: The destination owns"), "{printed}");
    assert!(told.contains("g1 ended here"), "{told}");
    assert!(told.contains("may run at other"), "{told}");
    assert!(told.contains("No route"), "{told}");
    let words = "g4 ended here with the reboot and may run at other: don't start it here yet";
    assert!(told.contains(words), "{told}");
    assert!(told.contains("breaks the protocol"), "{told}");
    assert!(lost.exists() && unreadable.exists());
    assert!(!here.exists() && !there.exists());

    let output = machine.says(&["resolve", "g1", "--json"], 1, &["g1 ended here"]);
    assert_eq!(printed_json(&output), serde_json::json!([]));
    // By its UUID as well.
    let uuid = "00000000-0000-4000-8000-000000000004";
    machine.says(&["resolve", uuid], 1, &["g4 ended here"]);
}

fn printed_json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).expect("It prints JSON")
}

/// Starts the receiving end and takes its hello.
fn receive(machine: &Machine) -> (Child, ChildStdin, ChildStdout) {
    receive_by(&mut machine.vmshadow(&["receive"]))
}

fn receive_by(command: &mut Command) -> (Child, ChildStdin, ChildStdout) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("It starts");
    let stdin = child.stdin.take().expect("A pipe");
    let mut stdout = child.stdout.take().expect("A pipe");
    let hello = Hello::read(&mut stdout).expect("It greets");
    assert_eq!(hello.role, WireRole::Destination);
    (child, stdin, stdout)
}

/// The source is told, as with every other reason to refuse.
#[test]
fn a_source_is_told_why_it_is_refused() {
    let Some(machine) = Machine::new() else {
        return;
    };
    refuses(&machine, receive(&machine), NO_XEN);
}

/// Its operator is the one who can do nothing about it, and should not look for a broken link.
#[test]
fn a_source_is_told_of_a_mistake_in_the_configuration() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let directory = machine.path("etc/vmshadow");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("vmshadow.toml"), "[site]\nbridge = 1\n").unwrap();
    let mut command = machine.vmshadow_with(&["etc"], &["receive"]);
    let why = "Bad /etc/vmshadow/vmshadow.toml, line 2: unknown field `bridge`";
    refuses(&machine, receive_by(&mut command), why);
}

/// Offers a guest, and expects that it is refused for that.
fn refuses(machine: &Machine, receiving: (Child, ChildStdin, ChildStdout), why: &str) {
    let (child, mut stdin, stdout) = receiving;
    Hello::new(WireRole::Source)
        .write(&mut stdin)
        .expect("It is greeted");
    let mut to = FrameWriter::new(stdin);
    let mut from = FrameReader::new(stdout, Direction::ToSource);
    // The answer says how far the other end is: nothing slow comes before it.
    to.send(&ToDestination::Ping(1)).expect("It listens");
    let mut next = || loop {
        let frame = from.read().expect("It answers").expect("It goes on");
        match ToSource::decode(frame).expect("It makes sense") {
            // A sign of life.
            ToSource::Pong(0) => {}
            message => break message,
        }
    };
    assert_eq!(next(), ToSource::Pong(1));
    to.send(&ToDestination::Offer(Box::new(offer())))
        .expect("It listens");
    match next() {
        ToSource::Refuse(refusal) => {
            let reason = refusal.reason.to_string();
            assert!(reason.starts_with(why), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let output = child.wait_with_output().expect("It ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains(why), "{output:?}");
    assert!(is_empty(&machine.path("lib/vmshadow/moves")));
    assert!(is_empty(&machine.path("lib/vmshadow/incoming")));
}

fn offer() -> Offer {
    Offer {
        purpose: Purpose::Move,
        connections: 2,
        direct: None,
        move_id: MoveId::from_random([1; 16]),
        name: "g1".to_owned(),
        uuid: "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f".to_owned(),
        kind: GuestKind::Pv,
        pages: 65_536,
        populated_pages: 40_000,
        vcpus: 1,
        configuration: serde_json::json!({}),
        cpu_policy: CpuPolicy::default(),
        tsc: TscOffer { mode: 0, khz: 1 },
        xen: XenVersion {
            major: 4,
            minor: 17,
            extra: Text::default(),
        },
        digest_key: DigestKey::new([2; 32]),
        verify: false,
    }
}

/// Each is answered in good order, not by the kernel's ending the process.
#[test]
fn signals_that_ask_to_end_are_answered() {
    let Some(machine) = Machine::new() else {
        return;
    };
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let (child, _stdin, _stdout) = receive(&machine);
        let id = i32::try_from(child.id()).unwrap();
        kill(Pid::from_raw(id), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{signal}: {output:?}");
    }
}

#[test]
fn bad_usage_is_told_before_anything_happens() {
    let Some(machine) = Machine::new() else {
        return;
    };
    for arguments in [
        &["migrate", "g1"][..],
        &["migrate", "g1", "b", "--bandwidth", "fast"],
        &["migrate", "g1", "b", "--bandwidth", "9k"],
        &["migrate", "g1", "b", "--downtime", "-1"],
        &["migrate", "g1", "b", "--timeout", "0"],
        &["migrate", "g1", "b", "--on-timeout", "handover"],
        &["migrate", "g1", "b", "--nonsense"],
        &["resolve"],
        &["resolve", "--all", "g1"],
        &["cancel"],
        &["set", "g1"],
        &["set", "g1", "bandwidth=9k"],
        &["set", "g1", "downtime=long"],
        &["nonsense"],
    ] {
        machine.says(arguments, 2, &["--help"]);
    }
    machine.says(&["migrate", "g1", "-oProxyCommand=x"], 2, &[]);
    // Before Xen is looked for, and so before anything is done.
    for bad in ["/nonexistent/report", "/"] {
        let arguments = ["migrate", "g1", "b", "--report", bad];
        let output = machine.says(&arguments, 1, &[&format!("Can't write {bad}")]);
        assert!(!said(&output).contains(NO_XEN), "{output:?}");
    }
    assert!(is_empty(&machine.path("lib")));
}

fn is_empty(directory: &Path) -> bool {
    let mut entries = fs::read_dir(directory).expect("A directory is read");
    entries.next().is_none()
}

#[test]
fn version_and_help_need_nothing() {
    let Some(machine) = Machine::new() else {
        return;
    };
    machine.says(&["--version"], 0, &[env!("CARGO_PKG_VERSION")]);
    machine.says(&["help", "migrate"], 0, &["--downtime", "--bandwidth"]);
    for subcommand in [
        "check", "list", "migrate", "status", "cancel", "set", "resolve",
    ] {
        machine.says(&["--help"], 0, &[subcommand]);
        machine.says(&[subcommand, "--help"], 0, &["Usage: vmshadow"]);
    }
    assert!(is_empty(&machine.path("lib")));
}

/// Whoever reads the output may go away in the middle.
#[test]
fn a_closed_output_is_no_crash() {
    let Some(machine) = Machine::new() else {
        return;
    };
    for arguments in [
        &["check"][..],
        &["check", "--json"],
        &["list"],
        &["migrate", "g1", "b"],
        &["resolve", "--all"],
        &["--help"],
        &["nonsense"],
    ] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let output = machine
            .vmshadow(arguments)
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .output()
            .unwrap();
        // A panic has 101.
        assert!(
            matches!(output.status.code(), Some(0..=2)),
            "{arguments:?}: {output:?}"
        );
    }
}

#[test]
fn an_output_that_is_lost_is_told() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = machine
        .vmshadow(&["check"])
        .stdout(full)
        .output()
        .expect("It starts");
    assert_eq!(output.status.code(), Some(1));
    assert!(told(&output).contains("Can't print"), "{output:?}");
}
