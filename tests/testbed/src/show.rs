//! `testbed demo`, which shows a move, and `testbed bench-xl`, which measures it beside `xl`.

use anyhow::{Context, Result, bail, ensure};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};
use testbed::{Edge, Guest, Hypervisor, Kind, Link, Options, SiteName, Testbed};

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
    println!(
        "A link of 50 Mbit/s and 40 ms joins them, and each has a network of its own for its \
         guests.\nA guest of 128 MiB starts at site a. Clients reach it by the edge, at 10.77.0.101."
    );
    let guest = Guest {
        run: vec!["rewrite 4 2".into(), "random 8".into(), "text 8".into()],
        behind_edge: true,
        ..Guest::new("g1", 101)
    };
    Edge::set_up(&testbed, &[&guest])?;
    testbed.start_guest(SiteName::A, &guest)?;
    let before = testbed.status(SiteName::A, &guest)?;
    let watch = testbed.watch(SiteName::A, &guest)?;
    println!("A client has a TCP connection open to it.");
    println!("site a# vmshadow proxy list\n{}", list(&testbed)?);
    println!("site a# vmshadow migrate g1 10.77.0.12");
    let said = testbed
        .site(SiteName::A)
        .run("vmshadow migrate g1 10.77.0.12 --verify 2>&1")?;
    println!("{said}");
    thread::sleep(Duration::from_secs(3));
    let seen = watch.finish()?;
    let after = testbed.status(SiteName::A, &guest)?;
    println!(
        "The guest is at site b, behind another address: {}\n{}",
        testbed.site(SiteName::B).run("xl list g1")?,
        list(&testbed)?
    );
    println!(
        "The client's connection is {}: {} bytes sent, {} came back, each in its place.",
        if seen.echo.alive { "alive" } else { "dead" },
        seen.echo.sent,
        seen.echo.received
    );
    println!(
        "Its longest wait was {:.2} s. The guest's counter went from {} to {} and never back.",
        seen.echo.longest_gap, before.counter, after.counter
    );
    ensure!(seen.intact().is_ok(), "The client saw something break");
    ensure!(
        before.boot_id == after.boot_id && after.counter > before.counter,
        "The guest is not the same"
    );
    testbed.down()?;
    Ok(())
}

/// What the edge says.
fn list(testbed: &Testbed) -> Result<String> {
    let list = testbed.site(SiteName::A).run("vmshadow proxy list")?;
    Ok(list.trim_end().to_owned())
}

/// What a move took.
#[derive(Clone, Copy)]
struct Figures {
    seconds: f64,
    /// What left the source's card.
    megabytes: f64,
    /// The longest silence of the pings; of an empty guest, from when it was asked to suspend to its
    /// first act at the destination.
    silence: f64,
    /// How busy dom0's CPU was at the source and at the destination, in percent: near 100 where the
    /// emulated processor bounds the move rather than the link.
    busy: [f64; 2],
}

/// Ticks that dom0's CPUs were busy and idle since the boot.
fn ticks(testbed: &Testbed, site: SiteName) -> Result<(f64, f64)> {
    let line = testbed.site(site).run("head -1 /proc/stat")?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal: what others took of the processor counts.
    let idle: f64 = ticks.iter().skip(3).take(2).sum();
    Ok((ticks.iter().take(8).sum::<f64>() - idle, idle))
}

/// Measures one move.
fn measure(testbed: &Testbed, guest: &Guest, from: SiteName, command: &str) -> Result<Figures> {
    let bytes = |site: SiteName| -> Result<f64> {
        let text = testbed
            .site(site)
            .run("cat /sys/class/net/eth1/statistics/tx_bytes")?;
        Ok(text.trim().parse()?)
    };
    let run = || -> Result<(f64, f64, [f64; 2])> {
        let looks = || -> Result<_> { Ok([ticks(testbed, from)?, ticks(testbed, from.other())?]) };
        let (before, sent, start) = (looks()?, bytes(from)?, Instant::now());
        testbed.site(from).run(command)?;
        let (took, sent, after) = (start.elapsed(), bytes(from)? - sent, looks()?);
        let busy = [0, 1].map(|side| {
            let busy = after[side].0 - before[side].0;
            100.0 * busy / (busy + after[side].1 - before[side].1).max(1.0)
        });
        Ok((took.as_secs_f64(), sent, busy))
    };
    let (took, silence) = if guest.kind == Kind::Empty {
        let pause = testbed.watch_pause(from, guest)?;
        (run()?, pause.finish()?.as_secs_f64())
    } else {
        // A client at the destination: what it asks crosses the WAN before the move, not after.
        let watch = testbed.watch(from.other(), guest)?;
        thread::sleep(Duration::from_secs(2));
        let took = run()?;
        thread::sleep(Duration::from_secs(3));
        let seen = watch.finish()?;
        if !seen.echo.alive {
            bail!("{command}: the client's connection died");
        }
        (took, seen.ping.longest_silence)
    };
    let (seconds, sent, busy) = took;
    Ok(Figures {
        seconds,
        megabytes: sent / 1e6,
        silence,
        busy,
    })
}

/// What is measured beside one another.
const COMMANDS: [&str; 3] = ["xl migrate", "xl migrate -s 'ssh -C'", "vmshadow migrate"];

/// A guest's moves, one by each command. Each time it is started anew: Linux loses a megabyte with
/// every resume, which a small and busy guest has not to spare.
fn measure_all(testbed: &Testbed, guest: &Guest) -> Result<[Figures; COMMANDS.len()]> {
    let mut all = [Figures {
        seconds: 0.0,
        megabytes: 0.0,
        silence: 0.0,
        busy: [0.0; 2],
    }; COMMANDS.len()];
    for (command, figures) in COMMANDS.iter().zip(&mut all) {
        testbed.start_guest(SiteName::A, guest)?;
        thread::sleep(Duration::from_secs(5));
        let line = format!("{command} {} {} 2>&1", guest.name, SiteName::B.address());
        *figures = measure(testbed, guest, SiteName::A, &line)?;
        testbed.stop_guest(&guest.name)?;
    }
    Ok(all)
}

/// Prints a guest's rows; with the floor, what is above it in brackets.
fn print_rows(label: &str, all: &[Figures], floor: Option<&[Figures]>) {
    for (at, (command, figures)) in COMMANDS.iter().zip(all).enumerate() {
        let cell = |value: f64, floor: Option<f64>, digits: usize| match floor {
            Some(floor) => format!("{value:.digits$} ({:.digits$})", value - floor),
            None => format!("{value:.digits$}"),
        };
        let own = floor.and_then(|floor| floor.get(at));
        // A command that sends zeros as they are has no floor of its own in bytes.
        let least = floor.and_then(|floor| {
            let bytes = floor.iter().map(|figures| figures.megabytes);
            bytes.min_by(f64::total_cmp)
        });
        println!(
            "| {label} | {command} | {} | {} | {} | {:.0}, {:.0} |",
            cell(figures.seconds, own.map(|own| own.seconds), 1),
            cell(figures.megabytes, least, 1),
            cell(figures.silence, own.map(|own| own.silence), 2),
            figures.busy[0],
            figures.busy[1],
        );
    }
}

/// Stock `xl migrate`, with and without compression by ssh, and ours, in one run.
pub fn bench_xl() -> Result<()> {
    let testbed = sites(Hypervisor::Release)?;
    println!("50 Mbit/s, 40 ms RTT, PV guests, emulated Xen 4.17.5, one run each");
    println!(
        "In brackets: above the floor, the move of an empty guest without a limit of the rate"
    );
    println!("| guest | command | seconds | MB on the wire | silence, s | dom0s busy, % |");
    println!("|---|---|---|---|---|---|");
    let busy = vec!["rewrite 8".to_owned(), "random 40".to_owned()];
    for memory_mib in [128, 512] {
        let guest = Guest {
            memory_mib,
            ..Guest::new("g1", 101)
        };
        let empty = Guest {
            kind: Kind::Empty,
            ..guest.clone()
        };
        // What no encoding of pages changes: even zeros are free.
        testbed.set_link(&Link { mbit: None, ..WAN })?;
        let floor = measure_all(&testbed, &empty)?;
        print_rows(&format!("{memory_mib} MB empty, no limit"), &floor, None);
        testbed.set_link(&WAN)?;
        let all = measure_all(&testbed, &empty)?;
        print_rows(&format!("{memory_mib} MB empty"), &all, Some(&floor));
        for (load, run) in [("idle", Vec::new()), ("busy", busy.clone())] {
            let guest = Guest {
                run,
                ..guest.clone()
            };
            let all = measure_all(&testbed, &guest)?;
            print_rows(&format!("{memory_mib} MB {load}"), &all, Some(&floor));
        }
    }
    testbed.down()?;
    Ok(())
}
