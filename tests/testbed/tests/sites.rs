//! The testbed itself, on real sites: `cargo test -p testbed --features sites`.

use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use testbed::{Error, Guest, Hypervisor, Link, Options, RunDirectory, SiteName, Testbed};

/// One testbed at a time: two need four CPUs to be quick.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn names() -> Vec<String> {
    let runs = RunDirectory::list().unwrap();
    runs.iter().map(|run| run.name().to_owned()).collect()
}

#[test]
fn stock_tools_move_a_guest_where_there_is_shadow_paging() {
    let _alone = alone();
    let testbed = Testbed::up(&Options::default()).unwrap();
    let info = testbed.site(SiteName::A).run("xl info").unwrap();
    assert!(info.contains("shadow"), "{info}");

    let guest = Guest {
        run: vec!["rewrite 4 4".into(), "random 8".into(), "text 8".into()],
        disk_mib: 16,
        ..Guest::new("g1", 101)
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let before = testbed.status(SiteName::A, &guest).unwrap();
    let watch = testbed.watch(SiteName::A, &guest).unwrap();
    testbed
        .site(SiteName::A)
        .run("xl migrate g1 10.77.0.12")
        .unwrap();
    assert_eq!(testbed.where_is("g1").unwrap(), [SiteName::B]);
    // Some life after the move, for the watch to see.
    std::thread::sleep(Duration::from_secs(2));
    let seen = watch.finish().unwrap();
    seen.intact().unwrap();
    assert!(seen.ping.received > 0);
    let after = testbed.status(SiteName::B, &guest).unwrap();
    assert_eq!(after.boot_id, before.boot_id);
    assert!(after.counter > before.counter);
    assert!(after.errors.none(), "{after:?}");
    let verified = testbed.ask(SiteName::B, &guest, "verify").unwrap();
    assert_eq!(verified["bad"], 0);
    assert_eq!(verified["checked"], 16 * 256);

    // A link that is cut is silent, and mends.
    let ping = format!("ping -c 1 -W 2 {}", SiteName::B.address());
    testbed
        .set_link(&Link {
            rtt_ms: 40.0,
            mbit: Some(50.0),
            loss_percent: 0.0,
        })
        .unwrap();
    testbed.cut_link().unwrap();
    assert!(
        !testbed
            .site(SiteName::A)
            .output(&ping)
            .unwrap()
            .status
            .success()
    );
    testbed.mend_link().unwrap();
    testbed.site(SiteName::A).run(&ping).unwrap();
    let shape = testbed
        .site(SiteName::B)
        .run("tc qdisc show dev eth1")
        .unwrap();
    assert!(
        shape.contains("delay 20ms") && shape.contains("rate 50Mbit"),
        "{shape}"
    );

    // The guest comes up again from where it is now.
    testbed.ask(SiteName::B, &guest, "poweroff").unwrap();
    testbed.stop_guest("g1").unwrap();
    assert_eq!(testbed.where_is("g1").unwrap(), []);

    let name = testbed.name().to_owned();
    drop(testbed);
    assert!(!names().contains(&name));
    assert!(matches!(Testbed::attach(&name), Err(Error::NotUp(_))));
}

#[test]
fn stock_tools_fail_where_there_is_none() {
    let _alone = alone();
    let options = Options {
        hypervisor: Hypervisor::Security,
        ..Options::default()
    };
    let testbed = Testbed::up(&options).unwrap();
    let info = testbed.site(SiteName::A).run("xl info").unwrap();
    assert!(!info.contains("shadow"), "{info}");

    let guest = Guest {
        run: vec!["rewrite 4 4".into()],
        ..Guest::new("g1", 101)
    };
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let watch = testbed.watch(SiteName::B, &guest).unwrap();
    let moved = testbed
        .site(SiteName::A)
        .output("xl migrate g1 10.77.0.12")
        .unwrap();
    assert!(!moved.status.success());
    assert_eq!(testbed.where_is("g1").unwrap(), [SiteName::A]);
    watch.finish().unwrap().intact().unwrap();

    // A site that lost its power comes back without its guest.
    testbed.power_cycle(SiteName::A).unwrap();
    assert_eq!(testbed.where_is("g1").unwrap(), []);
    testbed.start_guest(SiteName::A, &guest).unwrap();
    testbed.down().unwrap();
}

/// What a killed process leaves: the supervisor ends the sites.
#[test]
fn a_killed_owner_leaves_nothing() {
    const CHILD: &str = "TESTBED_KILLED_OWNER";
    if let Ok(name) = std::env::var(CHILD) {
        let _testbed = Testbed::up(&Options {
            name,
            ..Options::default()
        })
        .unwrap();
        println!("up");
        std::thread::sleep(Duration::from_secs(600));
        return;
    }
    let _alone = alone();
    let name = format!("killed-{}", std::process::id());
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_owner_leaves_nothing", "--nocapture"])
        .env(CHILD, &name)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = std::io::BufReader::new(owner.stdout.take().unwrap());
    let mut line = String::new();
    while line.trim() != "up" {
        line.clear();
        assert!(
            std::io::BufRead::read_line(&mut output, &mut line).unwrap() > 0,
            "never up"
        );
    }
    let testbed = Testbed::attach(&name).unwrap();
    testbed.site(SiteName::A).run("true").unwrap();
    let run = RunDirectory::list()
        .unwrap()
        .into_iter()
        .find(|run| run.name() == name)
        .unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    // The supervisor notices by itself.
    for _ in 0..300 {
        if !run.path().exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!run.path().exists());
    assert!(
        testbed
            .site(SiteName::A)
            .output("true")
            .is_ok_and(|output| !output.status.success())
    );
}
