//! Two sites with the package installed, and what the tests do there.

use std::path::PathBuf;
use std::process::Output;
use std::thread;
use std::time::{Duration, Instant};

use testbed::{Guest, Hypervisor, Kind, Options, SiteName, Testbed};

/// What both sites take of each other's guests.
const POLICY: &str = "[site]\nkernel_directories = [\"/\"]\ndisk_directories = [\"/\"]\n\
                      default_bridge = \"xenbr0\"\n";

/// How long what a broken move left behind may take to be cleared away.
const CLEARED: Duration = Duration::from_secs(120);

/// Brings two sites up with the package installed.
pub fn sites(options: Options) -> Testbed {
    let package = PathBuf::from(
        std::env::var_os("VMSHADOW_DEB").expect("VMSHADOW_DEB names the package: see `make test`"),
    );
    let testbed = Testbed::up(&options).unwrap();
    for site in testbed.sites() {
        site.install(&package).unwrap();
        site.write("/etc/vmshadow/vmshadow.toml", POLICY.as_bytes())
            .unwrap();
    }
    testbed
}

/// Two sites with that hypervisor.
pub fn with(hypervisor: Hypervisor) -> Options {
    Options {
        hypervisor,
        ..Options::default()
    }
}

/// A small guest that rewrites memory and holds some.
pub fn small_guest() -> Guest {
    Guest {
        memory_mib: 96,
        run: vec!["rewrite 2 2".into(), "random 4".into()],
        ..Guest::new("g1", 101)
    }
}

/// The command that moves `g1` from `from`.
pub fn migrate(from: SiteName, more: &str) -> String {
    format!(
        "vmshadow migrate g1 {} --verify {more}",
        from.other().address()
    )
}

/// Moves `g1` from `from`, and panics with what it said where it fails.
pub fn move_guest(testbed: &Testbed, from: SiteName, more: &str) -> String {
    testbed
        .site(from)
        .run(&format!("{} 2>&1", migrate(from, more)))
        .unwrap()
}

/// Both streams of a command's output, for messages.
pub fn said(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

/// What a move must not leave behind at one site; empty when it is clean.
fn left_behind(testbed: &Testbed, site: SiteName) -> String {
    // Comm names of our own processes are exact: a keeper may stay.
    let script = "xl list | awk 'NR > 2 && $1 != \"g1\" { print \"domain \" $1 }'; \
        ls /var/lib/vmshadow/incoming 2>/dev/null | sed 's/^/file /'; \
        for j in /var/lib/vmshadow/moves/*.journal; do [ ! -e $j ] || grep -q '\"end\"' $j || echo open $j; done; \
        for p in /proc/[0-9]*; do c=$(cat $p/comm 2>/dev/null); case $c in \
        vmshadow|vmshadow-guard|libxl-save-help*) echo process $c ${p#/proc/};; esac; done";
    testbed.site(site).run(script).unwrap()
}

/// Waits until exactly one guest runs, intact, and nothing else is left at either site. Where it is.
pub fn settled(testbed: &Testbed, guest: &Guest, after: &str) -> SiteName {
    let places = cleared(testbed, after, |places| places.len() == 1);
    alive(testbed, guest, after);
    places[0]
}

/// Waits until the guest is at neither site, and nothing else is left there.
pub fn nothing_left(testbed: &Testbed, after: &str) {
    cleared(testbed, after, <[_]>::is_empty);
}

/// Waits until nothing of a move is left, and the guest where it should be.
fn cleared(testbed: &Testbed, after: &str, right: impl Fn(&[SiteName]) -> bool) -> Vec<SiteName> {
    let deadline = Instant::now() + CLEARED;
    loop {
        let left: Vec<String> = SiteName::BOTH
            .into_iter()
            .map(|site| left_behind(testbed, site))
            .filter(|left| !left.trim().is_empty())
            .collect();
        let places = testbed.where_is("g1").unwrap();
        if left.is_empty() && right(&places) {
            return places;
        }
        assert!(
            Instant::now() < deadline,
            "{after}: g1 is at {places:?}; left: {left:?}"
        );
        thread::sleep(Duration::from_millis(500));
    }
}

/// Waits until it is so.
pub fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + CLEARED;
    while !so() {
        assert!(Instant::now() < deadline, "Not in time: {what}");
        thread::sleep(Duration::from_millis(500));
    }
}

/// Checks that the guest goes on and all its memory is right. An empty one only goes on: what is
/// right of its memory, the verify mode proves.
pub fn alive(testbed: &Testbed, guest: &Guest, after: &str) {
    testbed.wait_for_guest(SiteName::A, guest).unwrap();
    if guest.kind == Kind::Empty {
        return;
    }
    let first = testbed.status(SiteName::A, guest).unwrap();
    let checked = testbed.ask(SiteName::A, guest, "verify").unwrap();
    assert_eq!(checked["bad"], 0, "{after}: {checked}");
    let second = testbed.status(SiteName::A, guest).unwrap();
    assert_eq!(first.boot_id, second.boot_id, "{after}");
    assert!(
        second.counter > first.counter,
        "{after}: the counter stands"
    );
    assert!(second.errors.none(), "{after}: {second:?}");
}

/// The file that shows that a worker is held.
const HELD: &str = "/tmp/vmshadow-held";

/// Starts a move of g1 from `from` whose worker at `side` stops at `point`; runs `then` there with
/// its process id, and lets it go on. What the command said, and how it ended.
pub fn hold_at(
    testbed: &Testbed,
    from: SiteName,
    side: SiteName,
    point: &str,
    then: impl FnOnce(&str),
) -> (bool, String) {
    let hold = format!("VMSHADOW_HOLD={point}:{HELD}");
    // Without a downtime to reach, a guest that does something is copied in several rounds.
    let more = if point == "recopying" {
        "--downtime 0"
    } else {
        ""
    };
    let command = if side == from {
        format!("env {hold} {}", migrate(from, more))
    } else {
        migrate(from, &format!("--remote-command 'env {hold} vmshadow'"))
    };
    let site = testbed.site(from);
    let mut child = site
        .command(&format!("{command} > /tmp/vmshadow-out 2>&1"))
        .spawn()
        .unwrap();
    let said = || site.run("cat /tmp/vmshadow-out").unwrap_or_default();
    let deadline = Instant::now() + Duration::from_secs(120);
    let worker = loop {
        let worker = testbed
            .site(side)
            .run(&format!("cat {HELD} 2>/dev/null || true"))
            .unwrap();
        if !worker.trim().is_empty() {
            break worker.trim().to_owned();
        }
        assert!(
            Instant::now() < deadline,
            "Never came to {point}: {}",
            said()
        );
        assert!(
            child.try_wait().unwrap().is_none(),
            "Ended before {point}: {}",
            said()
        );
        thread::sleep(Duration::from_millis(200));
    };
    then(&worker);
    go_on(testbed, side);
    let status = child.wait().unwrap();
    (status.success(), said())
}

/// Lets a held worker go on.
pub fn go_on(testbed: &Testbed, side: SiteName) {
    testbed.site(side).run(&format!("rm -f {HELD}")).unwrap();
}
