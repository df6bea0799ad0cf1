//! Calls into the hypervisor: number in rax, arguments in rdi, rsi, rdx, r10, result in rax.

use core::arch::asm;
use core::sync::atomic::{Ordering, fence};

const UPDATE_VA_MAPPING: u64 = 14;
const SCHED_OP: u64 = 29;
const EVENT_CHANNEL_OP: u64 = 32;

const SCHEDOP_SHUTDOWN: u64 = 2;
const SCHEDOP_POLL: u64 = 3;
const EVTCHNOP_SEND: u64 = 4;
/// Flush this one address.
const UVMF_INVLPG: u64 = 2;

/// Why a domain ends, by the numbers of Xen's public/sched.h.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Reason {
    /// It is done.
    Poweroff = 0,
    /// It wants to be started again.
    Reboot = 1,
    /// It can't go on.
    Crash = 3,
}
const SUSPEND: u32 = 2;

/// # Safety
/// The call must not break what Rust's memory model promises.
unsafe fn call(number: u64, one: u64, two: u64, three: u64) -> i64 {
    let result: i64;
    // SAFETY: as the caller promises; `syscall` itself changes rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            inlateout("rdi") one => _,
            inlateout("rsi") two => _,
            inlateout("rdx") three => _,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// Ends the domain.
pub fn shutdown(reason: Reason) -> ! {
    let reason = reason as u32;
    loop {
        // SAFETY: reads `reason`, and does not come back.
        unsafe { call(SCHED_OP, SCHEDOP_SHUTDOWN, (&raw const reason) as u64, 0) };
    }
}

/// Suspends the domain. In rdx, where the toolstack looks for it, is the mfn of start_info.
///
/// Whether the suspend was cancelled: else this is a new domain.
pub fn suspend(start_info_mfn: u64) -> bool {
    let reason = SUSPEND;
    fence(Ordering::SeqCst);
    // SAFETY: reads `reason`. What the toolstack changes meanwhile is in atomics.
    let result = unsafe {
        call(
            SCHED_OP,
            SCHEDOP_SHUTDOWN,
            (&raw const reason) as u64,
            start_info_mfn,
        )
    };
    fence(Ordering::SeqCst);
    result != 0
}

/// Waits until the port is pending. Events stay masked.
pub fn poll(port: u32) {
    #[repr(C)]
    struct Poll {
        ports: *const u32,
        count: u32,
        timeout: u64,
    }
    let poll = Poll {
        ports: &raw const port,
        count: 1,
        timeout: 0,
    };
    // SAFETY: reads `poll` and `port`.
    unsafe { call(SCHED_OP, SCHEDOP_POLL, (&raw const poll) as u64, 0) };
}

/// Sends an event to the other end of the port.
pub fn notify(port: u32) {
    // SAFETY: reads `port`.
    unsafe { call(EVENT_CHANNEL_OP, EVTCHNOP_SEND, (&raw const port) as u64, 0) };
}

/// Maps what the entry says at the address. Whether the hypervisor agreed.
///
/// # Safety
/// Nothing may use what was mapped there before.
pub unsafe fn map(address: u64, entry: u64) -> bool {
    // SAFETY: as the caller promises.
    unsafe { call(UPDATE_VA_MAPPING, address, entry, UVMF_INVLPG) == 0 }
}
