//! `testbed demo`, which shows a move, and `testbed bench-xl`, which measures it beside `xl`.

use anyhow::{Context, Result, bail, ensure};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};
use testbed::{Guest, Hypervisor, Link, Options, SiteName, Testbed};

/// What a site takes of the other's guests.
const POLICY: &str = "[site]\nkernel_directories = [\"/\"]\ndisk_directories = [\"/\"]\n\
                      default_bridge = \"xenbr0\"\n";

/// The WAN of the demonstration and the benchmark.
const WAN: Link = Link {
    rtt_ms: 40.0,
    mbit: Some(50.0),
    loss_percent: 0.0,
};

fn sites(hypervisor: Hypervisor) -> Result<Testbed> {
    let package: PathBuf = std::env::var_os("VMSHADOW_DEB")
        .context("VMSHADOW_DEB names no package: run this by make")?
        .into();
    let testbed = Testbed::up(&Options {
        hypervisor,
        link: WAN,
        ..Options::default()
    })?;
    for site in testbed.sites() {
        site.install(&package)?;
        site.write("/etc/vmshadow/vmshadow.toml", POLICY.as_bytes())?;
    }
    Ok(testbed)
}

/// Two sites, a guest with a client connected to it, a move, and what the client saw of it.
pub fn demo() -> Result<()> {
    println!(
        "Two Xen sites come up, without shadow paging: stock tools can't move a PV guest there."
    );
    let testbed = sites(Hypervisor::Security)?;
    println!("A link of 50 Mbit/s and 40 ms joins them. A guest of 128 MiB starts at site a.");
    let guest = Guest {
        run: vec!["rewrite 4 2".into(), "random 8".into(), "text 8".into()],
        ..Guest::new("g1", 101)
    };
    testbed.start_guest(SiteName::A, &guest)?;
    let before = testbed.status(SiteName::A, &guest)?;
    let watch = testbed.watch(SiteName::A, &guest)?;
    println!("A client has a TCP connection open to it. site a# vmshadow migrate g1 10.77.0.12");
    let said = testbed
        .site(SiteName::A)
        .run("vmshadow migrate g1 10.77.0.12 --verify 2>&1")?;
    println!("{said}");
    thread::sleep(Duration::from_secs(3));
    let seen = watch.finish()?;
    let after = testbed.status(SiteName::A, &guest)?;
    println!(
        "The guest is at site b: {}",
        testbed.site(SiteName::B).run("xl list g1")?
    );
    println!(
        "The client's connection is {}: {} bytes sent, {} came back, each in its place.",
        if seen.echo.alive { "alive" } else { "dead" },
        seen.echo.sent,
        seen.echo.received
    );
    println!(
        "Longest silence, by pings: {:.2} s. The guest's counter went from {} to {} and never back.",
        seen.ping.longest_silence, before.counter, after.counter
    );
    ensure!(seen.intact().is_ok(), "The client saw something break");
    ensure!(
        before.boot_id == after.boot_id && after.counter > before.counter,
        "The guest is not the same"
    );
    testbed.down()?;
    Ok(())
}

/// One measured move: seconds, bytes that left the source's card, longest silence of the pings.
fn measure(testbed: &Testbed, guest: &Guest, from: SiteName, command: &str) -> Result<[f64; 3]> {
    let bytes = |site: SiteName| -> Result<f64> {
        let text = testbed
            .site(site)
            .run("cat /sys/class/net/eth1/statistics/tx_bytes")?;
        Ok(text.trim().parse()?)
    };
    // A client at the destination: what it asks crosses the WAN before the move, not after.
    let watch = testbed.watch(from.other(), guest)?;
    thread::sleep(Duration::from_secs(2));
    let (sent, start) = (bytes(from)?, Instant::now());
    testbed.site(from).run(command)?;
    let (took, sent) = (start.elapsed().as_secs_f64(), bytes(from)? - sent);
    thread::sleep(Duration::from_secs(3));
    let seen = watch.finish()?;
    if !seen.echo.alive {
        bail!("{command}: the client's connection died");
    }
    Ok([took, sent / 1e6, seen.ping.longest_silence])
}

/// Stock `xl migrate`, with and without compression by ssh, and ours, in one run.
pub fn bench_xl() -> Result<()> {
    let testbed = sites(Hypervisor::Release)?;
    println!("50 Mbit/s, 40 ms RTT, PV guests, emulated Xen 4.17.5, one run each");
    println!("| guest | command | seconds | MB on the wire | silence, s |");
    println!("|---|---|---|---|---|");
    let busy = vec!["rewrite 8".to_owned(), "random 40".to_owned()];
    for (label, memory_mib, run) in [
        ("128 MB idle", 128, Vec::new()),
        ("128 MB busy", 128, busy.clone()),
        ("512 MB idle", 512, Vec::new()),
        ("512 MB busy", 512, busy),
    ] {
        let guest = Guest {
            memory_mib,
            run,
            ..Guest::new("g1", 101)
        };
        testbed.start_guest(SiteName::A, &guest)?;
        thread::sleep(Duration::from_secs(5));
        let mut at = SiteName::A;
        for command in ["xl migrate", "xl migrate -s 'ssh -C'", "vmshadow migrate"] {
            let line = format!("{command} g1 {} 2>&1", at.other().address());
            let [seconds, megabytes, silence] = measure(&testbed, &guest, at, &line)?;
            println!("| {label} | {command} | {seconds:.1} | {megabytes:.1} | {silence:.2} |");
            at = at.other();
        }
        testbed.stop_guest("g1")?;
    }
    testbed.down()?;
    Ok(())
}
