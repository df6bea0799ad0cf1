//! `testbed demo`: shows a move.

use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use testbed::{Edge, Guest, Hypervisor, Link, Options, SiteName, Testbed};

/// What a site takes of the other's guests.
pub const POLICY: &str = "[site]\nkernel_directories = [\"/\"]\ndisk_directories = [\"/\"]\n\
                      default_bridge = \"xenbr0\"\n";

/// The WAN of the demonstration and the benchmark.
pub const WAN: Link = Link {
    rtt_ms: 40.0,
    mbit: Some(50.0),
    loss_percent: 0.0,
};

/// Two sites with the package installed, the WAN between them.
pub fn sites(hypervisor: Hypervisor) -> Result<Testbed> {
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
