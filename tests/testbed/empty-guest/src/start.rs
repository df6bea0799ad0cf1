//! What only the kernel has: its notes for the domain builder, its first instructions, and what
//! the compiler and the core library expect of a system.

use crate::hypercall::{Reason, shutdown};
use core::arch::{asm, global_asm};
use core::panic::PanicInfo;

// The notes of Xen's public/elfnote.h: name "Xen", the value's type and length.
global_asm!(
    ".pushsection .note.Xen, \"a\", @note",
    ".macro note_start type",
    ".balign 4",
    ".long 4, 91f - 90f, \\type",
    ".asciz \"Xen\"",
    "90:",
    ".endm",
    ".macro note_end",
    "91:",
    ".balign 4",
    ".endm",
    ".macro text type, value",
    "note_start \\type",
    ".asciz \"\\value\"",
    "note_end",
    ".endm",
    ".macro number type, value",
    "note_start \\type",
    ".quad \\value",
    "note_end",
    ".endm",
    "number 1, _start",         // ENTRY
    "number 3, 0",              // VIRT_BASE
    "number 4, 0",              // PADDR_OFFSET
    "text 5, xen-3.0",          // XEN_VERSION
    "text 6, vmshadow-empty",   // GUEST_OS
    "text 8, generic",          // LOADER
    "text 9, yes",              // PAE_MODE
    "note_start 13",            // L1_MFN_VALID: mask and value of a present entry
    ".quad 1, 1",
    "note_end",
    "note_start 14",            // SUSPEND_CANCEL
    ".long 1",
    "note_end",
    ".popsection",
    // The builder passes start_info in rsi; the stack that it gives is of one page.
    ".pushsection .bss",
    ".balign 16",
    "boot_stack:",
    ".skip 16384",
    "boot_stack_end:",
    ".popsection",
    ".pushsection .text._start, \"ax\", @progbits",
    ".globl _start",
    "_start:",
    "cld",
    "lea rsp, [rip + boot_stack_end]",
    "xor ebp, ebp",
    "mov rdi, rsi",
    "call {run}",
    "ud2",
    ".popsection",
    run = sym crate::run,
);

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    shutdown(Reason::Crash)
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's ranges; the direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's range; the direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") value.to_le_bytes()[0],
            inout("rcx") count => _, options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    for at in 0..count {
        // SAFETY: within the caller's ranges.
        let (one, other) = unsafe { (one.add(at).read_volatile(), other.add(at).read_volatile()) };
        if one != other {
            return i32::from(one) - i32::from(other);
        }
    }
    0
}

/// # Safety
/// As C's.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(one: *const u8, other: *const u8, count: usize) -> i32 {
    // SAFETY: as the caller promises.
    unsafe { memcmp(one, other, count) }
}
