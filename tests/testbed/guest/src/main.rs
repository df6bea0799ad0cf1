//! Process 1 of a test guest: a counter, echo servers, and workloads that notice
//! every lost, stale or doubled byte of the guest's memory.
//!
//! The kernel's command line says what to do at boot:
//!
//! ```text
//! testbed.name=g1 testbed.address=10.77.0.101/24 testbed.run=rewrite,8;random,40
//! ```
//! `testbed.run` holds commands of the control port, `;` between them and `,`
//! for spaces. `testbed.gateway` may name a gateway.
//!
//! The same program is /sbin/poweroff and /sbin/reboot, for the kernel runs
//! these when the toolstack asks.

mod calls;
mod control;
mod counter;
mod disk;
mod faults;
mod memory;
mod system;
mod work;

use std::sync::Arc;
use std::{env, process, thread};

/// All that the servers share.
struct Guest {
    name: String,
    boot_id: String,
    faults: faults::Faults,
    counter: counter::Counter,
    memory: memory::Memory,
    disk: disk::Disk,
    calls: calls::Calls,
}

fn main() {
    let called = env::args().next().unwrap_or_default();
    if called.ends_with("poweroff") || called.ends_with("halt") {
        system::power_off();
    }
    if called.ends_with("reboot") {
        system::reboot();
    }
    if process::id() != 1 {
        eprintln!("testbed-guest: this is process 1 of a test guest, and runs nowhere else");
        process::exit(2);
    }
    if let Err(error) = run() {
        println!("testbed: {error}");
    }
    // Process 1 must not end. What is left of the guest can still be looked at.
    loop {
        thread::park();
    }
}

fn run() -> Result<(), String> {
    system::mount_all()?;
    let settings = system::Settings::read()?;
    system::load_modules();
    system::configure_network(&settings)?;
    let guest = Arc::new(Guest {
        name: settings.name.clone(),
        boot_id: system::read_line("/proc/sys/kernel/random/boot_id")?,
        faults: faults::Faults::default(),
        counter: counter::Counter::default(),
        memory: memory::Memory::default(),
        disk: disk::Disk::default(),
        calls: calls::Calls::default(),
    });
    let counting = Arc::clone(&guest);
    spawn("counter", move || counter::run(&counting))?;
    let printing = Arc::clone(&guest);
    spawn("console", move || counter::print(&printing))?;
    control::serve_echo()?;
    control::serve(&guest)?;
    for command in &settings.run {
        println!("testbed: {command}: {}", control::answer(&guest, command));
    }
    println!("testbed: guest {} is ready", guest.name);
    Ok(())
}

/// Starts a thread of this name.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), String> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(|error| format!("Can't start thread {name}: {error}"))
}
