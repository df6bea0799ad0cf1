//! Two sites with the package installed, and what the tests do there.

use std::ops::Deref;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::{Guest, Hypervisor, Kind, Link, Options, SiteName, Testbed};

/// What both sites take of each other's guests.
const POLICY: &str = "[site]\nkernel_directories = [\"/\"]\ndisk_directories = [\"/\"]\n\
                      default_bridge = \"xenbr0\"\n";

/// How long what a broken move left behind may take to be cleared away.
const CLEARED: Duration = Duration::from_secs(300);

/// How many testbeds stay up for the tests to come: a machine of 24 GiB has memory for one more.
const WAITING: usize = 2;

/// How many tests one small guest serves: Linux loses a megabyte with every resume.
const SERVES: u32 = 4;

/// A testbed that a test has finished with.
struct Waiting {
    testbed: Testbed,
    /// How many tests its small guest, which is still there, has served.
    served: Option<u32>,
}

impl Waiting {
    /// Whether few tests have such sites.
    fn is_other(&self) -> bool {
        !alike(&self.testbed, &with(Hypervisor::Release))
    }
}

/// Whether a testbed has these options.
fn alike(testbed: &Testbed, options: &Options) -> bool {
    let unnamed = Options {
        name: String::new(),
        ..testbed.options().clone()
    };
    unnamed == *options
}

/// Testbeds that wait for a test, the longest there first. They end with this process.
static READY: Mutex<Vec<Waiting>> = Mutex::new(Vec::new());

/// Two sites that are a test's alone. The next test with the same options has them after it, if it
/// passed and left nothing there: what one move leaves behind shows in the next.
pub struct Sites {
    testbed: Option<Testbed>,
    /// How many tests the small guest has served, which is left to the next test: this one
    /// counted.
    served: Option<u32>,
}

impl Deref for Sites {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        self.testbed.as_ref().expect("only dropping takes it")
    }
}

impl Drop for Sites {
    fn drop(&mut self) {
        // Dropped while it panics, a testbed keeps its logs.
        let Some(testbed) = self.testbed.take().filter(|_| !thread::panicking()) else {
            return;
        };
        let served = self.served.filter(|served| *served < SERVES);
        match tidy(&testbed, served.is_some()) {
            Ok((left, guest)) if left.is_empty() => {
                let served = served.filter(|_| guest);
                let mut ready = READY.lock().unwrap_or_else(PoisonError::into_inner);
                if ready.len() == WAITING {
                    // Most tests use those of the release's hypervisor: they stay.
                    let other = ready.iter().position(Waiting::is_other);
                    ready.remove(other.unwrap_or(0));
                }
                ready.push(Waiting { testbed, served });
            }
            Ok((left, _)) => eprintln!("These sites are not used again: {left:?}"),
            Err(error) => eprintln!("These sites are not used again: {error}"),
        }
    }
}

/// Ends the guests of a test, but for g1 where that is to stay, and mends the link. What is left
/// even so, and whether g1 is there.
fn tidy(testbed: &Testbed, keep: bool) -> testbed::Result<(Vec<String>, bool)> {
    testbed.set_link(&Link::default())?;
    for guest in testbed.guests()? {
        if !keep || guest.name != "g1" {
            testbed.stop_guest(&guest.name)?;
        }
    }
    for site in testbed.sites() {
        site.run("rm -rf /tmp/*")?;
    }
    let seen = look(testbed)?;
    let guests = seen.iter().filter(|seen| seen.guest).count();
    let left = seen.into_iter().flat_map(|seen| seen.lines).collect();
    Ok((left, guests == 1))
}

/// Two sites with the package installed: new ones, or those of a test before. No guest is there.
pub fn sites(options: Options) -> Sites {
    Sites {
        testbed: Some(sites_to_change(options)),
        served: None,
    }
}

/// The same, for a test that does not leave them as they were: no test has them after it.
pub fn sites_to_change(options: Options) -> Testbed {
    let (testbed, served) = taken(options);
    if served.is_some() {
        testbed.stop_guest("g1").unwrap();
    }
    testbed
}

/// Two sites of the release's hypervisor with the small guest at a: that of a test before, which
/// may have shadows at both, or a new one.
pub fn sites_with_small_guest() -> (Sites, Guest) {
    let guest = small_guest();
    let (testbed, served) = taken(with(Hypervisor::Release));
    let sites = Sites {
        testbed: Some(testbed),
        served: Some(served.unwrap_or(0) + 1),
    };
    match served.map(|_| sites.where_is("g1").unwrap()) {
        None => sites.start_guest(SiteName::A, &guest).unwrap(),
        Some(places) if places == [SiteName::A] => {}
        Some(_) => {
            move_guest(&sites, SiteName::B, "");
            assert_eq!(settled(&sites, &guest, "back for a test"), SiteName::A);
        }
    }
    (sites, guest)
}

/// A testbed with these options, and how many tests its small guest has served, if that is there.
fn taken(options: Options) -> (Testbed, Option<u32>) {
    let mut ready = READY.lock().unwrap_or_else(PoisonError::into_inner);
    let place = ready.iter().position(|it| alike(&it.testbed, &options));
    if let Some(place) = place {
        let Waiting { testbed, served } = ready.remove(place);
        return (testbed, served);
    }
    drop(ready);
    (new_sites(options), None)
}

/// Brings two sites up with the package installed, which no other test has.
pub fn new_sites(options: Options) -> Testbed {
    let package = PathBuf::from(
        std::env::var_os("VMSHADOW_DEB").expect("VMSHADOW_DEB names the package: see `make test`"),
    );
    let testbed = Testbed::up(&options).unwrap();
    thread::scope(|scope| {
        for site in testbed.sites() {
            let package = &package;
            scope.spawn(move || {
                site.install(package).unwrap();
                site.write("/etc/vmshadow/vmshadow.toml", POLICY.as_bytes())
                    .unwrap();
            });
        }
    });
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

/// The report of such a move, which options are added to.
pub fn report_of(testbed: &Testbed, from: SiteName, more: &str) -> Value {
    let text = move_guest(testbed, from, &format!("--json {more}"));
    // Warnings come before it.
    serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap()
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

/// What is at a site.
struct Seen {
    /// Whether there is a domain g1.
    guest: bool,
    /// What a move must not leave behind.
    lines: Vec<String>,
}

/// Looks for g1, and for what a move must not leave behind, at both sites at once.
fn look(testbed: &Testbed) -> testbed::Result<Vec<Seen>> {
    // Comm names of our own processes are exact: a keeper may stay. Waits a while for what goes by
    // itself, by what costs an emulated site little; what is there then is told.
    const SCRIPT: &str = "exec 3<> <(:); \
        busy() { for c in /proc/[0-9]*/comm; do read -r n 2>/dev/null < $c || continue; \
            case $n in vmshadow|vmshadow-guard|libxl-save-help*) return 0;; esac; done 2>/dev/null; \
            for f in /var/lib/vmshadow/incoming/*; do [ ! -e $f ] || return 0; done; return 1; }; \
        for i in {1..30}; do busy || break; read -rt 0.5 -u 3; done; \
        xl list | awk 'NR > 2 { print \"domain \" $1 }'; \
        ls /var/lib/vmshadow/incoming 2>/dev/null | sed 's/^/file /'; \
        for j in /var/lib/vmshadow/moves/*.journal; do [ ! -e $j ] || grep -q '\"end\"' $j || echo open $j; done; \
        grep -xE 'vmshadow|vmshadow-guard|libxl-save-help.*' /proc/[0-9]*/comm 2>/dev/null || true";
    thread::scope(|scope| {
        let asked = testbed
            .sites()
            .each_ref()
            .map(|site| scope.spawn(|| site.run(SCRIPT)));
        let mut seen = Vec::new();
        for answer in asked {
            let text = answer.join().expect("it does not panic")?;
            let (guest, lines) = text
                .lines()
                .partition::<Vec<_>, _>(|line| *line == "domain g1");
            seen.push(Seen {
                guest: !guest.is_empty(),
                lines: lines.into_iter().map(str::to_owned).collect(),
            });
        }
        Ok(seen)
    })
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
        let seen = look(testbed).unwrap();
        let mut places = SiteName::BOTH.to_vec();
        let mut there = seen.iter().map(|seen| seen.guest);
        places.retain(|_| there.next() == Some(true));
        let left: Vec<_> = seen.iter().flat_map(|seen| &seen.lines).collect();
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
/// its process id, and lets it go on. What the command said, and how it ended. It does not try again
/// after a lost link.
pub fn hold_at(
    testbed: &Testbed,
    from: SiteName,
    side: SiteName,
    point: &str,
    then: impl FnOnce(&str),
) -> (bool, String) {
    hold_with(testbed, from, side, point, "--retry 0", then)
}

/// The same, by a command with these options too.
pub fn hold_with(
    testbed: &Testbed,
    from: SiteName,
    side: SiteName,
    point: &str,
    options: &str,
    then: impl FnOnce(&str),
) -> (bool, String) {
    let hold = format!("VMSHADOW_HOLD={point}:{HELD}");
    // Without a downtime to reach, a guest that does something is copied in several rounds.
    let more = if point == "recopying" {
        format!("--downtime 0 {options}")
    } else {
        options.to_owned()
    };
    let command = if side == from {
        format!("env {hold} {}", migrate(from, &more))
    } else {
        migrate(
            from,
            &format!("{options} --remote-command 'env {hold} vmshadow'"),
        )
    };
    let site = testbed.site(from);
    let mut child = site
        .command(&format!("{command} > /tmp/vmshadow-out 2>&1"))
        .spawn()
        .unwrap();
    let said = || site.run("cat /tmp/vmshadow-out").unwrap_or_default();
    // The site looks for itself: to be asked costs it more than the move that it works at.
    let looking = format!(
        "exec 3<> <(:); for i in {{1..1500}}; do [ ! -s {HELD} ] || break; read -rt 0.2 -u 3; done; \
         cat {HELD}"
    );
    let mut look = testbed.site(side).command(&looking);
    let mut look = look.stdout(Stdio::piped()).spawn().unwrap();
    while look.try_wait().unwrap().is_none() {
        if child.try_wait().unwrap().is_some() {
            look.kill().unwrap();
            panic!("Ended before {point}: {}", said());
        }
        thread::sleep(Duration::from_millis(50));
    }
    let found = look.wait_with_output().unwrap();
    let worker = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    assert!(!worker.is_empty(), "Never came to {point}: {}", said());
    then(&worker);
    // A move that is tried again has a new process at the destination, which stops there too: it
    // is let go on.
    let mut asked = Instant::now();
    go_on(testbed, side);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if asked.elapsed() > Duration::from_secs(3) {
            go_on(testbed, side);
            asked = Instant::now();
        }
        thread::sleep(Duration::from_millis(50));
    };
    (status.success(), said())
}

/// Lets a held worker go on.
pub fn go_on(testbed: &Testbed, side: SiteName) {
    testbed.site(side).run(&format!("rm -f {HELD}")).unwrap();
}
