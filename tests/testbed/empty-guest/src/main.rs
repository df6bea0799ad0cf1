//! A 64-bit PV kernel that leaves its memory zero. Moving it costs what any move costs at least:
//! connections, the toolstack, hotplug, the new domain. That is the floor of a benchmark.
//!
//! ```text
//!   0x100000  this image, its stack, the p2m's lists        1 MiB up
//!             p2m, start_info, xenstore ring, console ring, page tables, boot stack
//!             all else: zero, never touched
//! ```
//! It lives on one CPU with events masked, and waits by polling in the hypervisor for the xenstore
//! ring's event: so it needs no event handler, no interrupts and no timer, and its CPU is idle.
//!
//! ```text
//!   start --> wait for control/shutdown --> poweroff, halt, reboot
//!                   ^            |
//!                   |            v
//!                   +------- suspend
//! ```
//! After each resume it writes how often it was resumed to `data/resumed`, where tests wait for it.
//! It describes its p2m by the tree form alone, which Linux gave up: so moves of it test that, too.
//! The interface is that of Xen's public headers: xen.h, arch-x86/xen.h, elfnote.h, io/xs_wire.h.
//!
//! Only a build with `panic=abort` is the kernel; the testbed makes it, with `guest.ld`. Any other
//! build, as for lints and unit tests, is a program that says so.

#![cfg_attr(panic = "abort", no_std, no_main)]

mod console;
mod hypercall;
mod machine;
mod ring;
#[cfg(panic = "abort")]
mod start;
mod store;

use crate::console::Console;
use crate::hypercall::{Reason, shutdown, suspend};
use crate::machine::{Machine, StartInfo};
use crate::store::{Event, Store};
use core::fmt::Write;

/// What the toolstack writes to ask something of a guest.
const REQUEST: &str = "control/shutdown";
/// What is offered: the toolstack may look before it asks.
const FEATURES: [&str; 3] = [
    "control/feature-suspend",
    "control/feature-poweroff",
    "control/feature-reboot",
];
/// Where tests see that the guest runs, and how often it was resumed.
const RESUMED: &str = "data/resumed";

/// The kernel, from its first instruction in Rust.
///
/// # Safety
/// `start_info` is what the domain builder gave, and this is called once.
pub unsafe extern "C" fn run(start_info: *mut StartInfo) -> ! {
    // SAFETY: as the caller promises.
    let machine = unsafe { Machine::new(start_info) };
    let mut console = Console::new(machine.console_page(), machine.console_port());
    let mut store = Store::new(machine.store_page(), machine.store_port());
    let _ = writeln!(console, "Empty guest, {} pages", machine.pages());
    let mut resumed: u32 = 0;
    announce(&machine, &mut store, resumed);
    loop {
        if store.next_event(&machine) != Event::Changed {
            continue;
        }
        let mut request = [0; 16];
        match store.read(&machine, REQUEST, &mut request) {
            b"suspend" => {
                store.write(&machine, REQUEST, b"");
                machine.before_suspend();
                let cancelled = suspend(machine.start_info_mfn());
                machine.after_suspend(cancelled);
                resumed += 1;
                let how = if cancelled {
                    store.write_number(&machine, RESUMED, resumed);
                    " after a cancelled suspend"
                } else {
                    console.attach(machine.console_port());
                    store.attach(machine.store_port());
                    announce(&machine, &mut store, resumed);
                    ""
                };
                let _ = writeln!(console, "Resumed{how}, {resumed} times by now");
            }
            b"poweroff" | b"halt" => {
                store.write(&machine, REQUEST, b"");
                shutdown(Reason::Poweroff);
            }
            b"reboot" => {
                store.write(&machine, REQUEST, b"");
                shutdown(Reason::Reboot);
            }
            b"" => (),
            other => {
                let other = core::str::from_utf8(other).unwrap_or("?");
                let _ = writeln!(console, "Not understood: {other}");
            }
        }
    }
}

/// Tells a domain's xenstore what this guest can do: nodes and watches are a new domain's own.
fn announce(machine: &Machine, store: &mut Store, resumed: u32) {
    for feature in FEATURES {
        store.write(machine, feature, b"1");
    }
    store.watch(machine, REQUEST);
    store.write_number(machine, RESUMED, resumed);
}

#[cfg(not(panic = "abort"))]
fn main() {
    // Refers to the kernel, so that it is compiled here too.
    let kernel: unsafe extern "C" fn(*mut StartInfo) -> ! = run;
    eprintln!("This is a Xen guest's kernel ({kernel:p}), and runs nowhere else");
    std::process::exit(1);
}
