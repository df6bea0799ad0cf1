//! The handle to libxl.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::log_bridge::LogBridge;
use crate::{DomId, Error, LibxlCode, Result, raw};

/// libxl installs a handler for SIGCHLD, and waits for its own children only: ours (ssh) are
/// ours to wait for. Its own are out of the terminal's reach. All contexts of a process have to be
/// set so.
static CHILD_PROCESSES: ChildProcesses = ChildProcesses(raw::libxl_childproc_hooks {
    chldowner: raw::libxl_sigchld_owner_libxl_always_selective_reap,
    fork_replacement: Some(fork_out_of_reach),
    reaped_callback: None,
});

/// libxl's fork. A Ctrl-C in the terminal is for this process, which ends in good order, and not for
/// a hotplug script in the middle of its work: there the child gets a process group of its own. Not
/// elsewhere, as in a keeper: whoever leads a group can't lead a session, which a boot loader does.
unsafe extern "C" fn fork_out_of_reach(_user: *mut c_void) -> libc::pid_t {
    // SAFETY: libxl calls it where it would fork itself.
    unsafe { fork(in_foreground()) }
}

/// Whether what is typed at the terminal ends this process.
fn in_foreground() -> bool {
    // SAFETY: it takes nothing.
    let group = unsafe { libc::getpgrp() };
    File::open("/dev/tty").is_ok_and(|terminal| {
        // SAFETY: the file is open.
        unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) == group }
    })
}

/// # Safety
///
/// As fork: the child may do what is async-signal-safe, and nothing else.
unsafe fn fork(apart: bool) -> libc::pid_t {
    // SAFETY: as the caller says; setpgid is async-signal-safe. For a child that is new it can't
    // fail, and else all would be as it was.
    unsafe {
        let child = libc::fork();
        if child == 0 && apart {
            libc::setpgid(0, 0);
        }
        child
    }
}

struct ChildProcesses(raw::libxl_childproc_hooks);

// SAFETY: it is constant, and holds no pointer but to a function, which any thread may call.
unsafe impl Sync for ChildProcesses {}

/// Without this, libxl ends the process when it can't go on reporting events.
static EVENTS: raw::libxl_event_hooks = raw::libxl_event_hooks {
    event_occurs_mask: 0,
    event_occurs: None,
    disaster: Some(disaster),
};

/// A handle to libxl.
///
/// `Send` but not `Sync`: each thread opens its own.
pub struct Toolstack {
    pub(super) context: Arc<Context>,
    not_sync: PhantomData<Cell<()>>,
}

impl fmt::Debug for Toolstack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Toolstack").finish_non_exhaustive()
    }
}

/// libxl's own context.
pub(super) struct Context {
    context: NonNull<raw::libxl_ctx>,
    /// Set when libxl can't report events any more. Boxed: libxl has its address.
    broken: Box<AtomicBool>,
    log: LogBridge,
}

// SAFETY: libxl's contexts are not tied to a thread.
unsafe impl Send for Context {}
// SAFETY: libxl.h says that a context is thread-safe: it has a lock of its own.
unsafe impl Sync for Context {}

impl Toolstack {
    /// Opens libxl.
    ///
    /// # Errors
    ///
    /// This is no Xen host, no control domain, xenstored does not run, or this process may not:
    /// [`crate::host::probe`] tells which.
    pub fn open() -> Result<Toolstack> {
        let log = LogBridge::new();
        let mut context = ptr::null_mut();
        // SAFETY: the logger outlives the context.
        let result = unsafe {
            raw::libxl_ctx_alloc(&mut context, raw::LIBXL_VERSION as c_int, 0, log.as_ptr())
        };
        let Some(context) = NonNull::new(context).filter(|_| result == 0) else {
            return Err(Error::Libxl {
                operation: "open libxl",
                domain: None,
                code: LibxlCode(result),
                detail: log.take(),
            });
        };
        let context = Context {
            context,
            broken: Box::new(AtomicBool::new(false)),
            log,
        };
        let broken = ptr::from_ref::<AtomicBool>(&context.broken)
            .cast_mut()
            .cast::<c_void>();
        // SAFETY: the context is new: it has no children and no events yet. The hooks are
        // constants; what they are given lives as long as the context.
        unsafe {
            raw::libxl_childproc_setmode(context.as_ptr(), &CHILD_PROCESSES.0, ptr::null_mut());
            raw::libxl_event_register_callbacks(context.as_ptr(), &EVENTS, broken);
        }
        Ok(Toolstack {
            context: Arc::new(context),
            not_sync: PhantomData,
        })
    }

    /// For ending what this handle is at from another thread.
    pub fn aborter(&self) -> Aborter {
        Aborter {
            context: Arc::clone(&self.context),
        }
    }

    /// Runs one function of libxl that answers a code.
    pub(super) fn call(
        &self,
        operation: &'static str,
        domain: impl Into<Option<DomId>>,
        function: impl FnOnce(*mut raw::libxl_ctx) -> c_int,
    ) -> Result<()> {
        self.context.call(operation, domain.into(), function)
    }

    /// For functions that can't fail, or that do not tell why.
    pub(super) fn as_ptr(&self) -> *mut raw::libxl_ctx {
        self.context.as_ptr()
    }
}

impl Context {
    pub(super) fn call(
        &self,
        operation: &'static str,
        domain: Option<DomId>,
        function: impl FnOnce(*mut raw::libxl_ctx) -> c_int,
    ) -> Result<()> {
        self.log.begin();
        let code = function(self.as_ptr());
        if code == 0 {
            return Ok(());
        }
        let detail = self.log.take();
        Err(Error::Libxl {
            operation,
            domain,
            code: LibxlCode(code),
            detail,
        })
    }

    pub(super) fn as_ptr(&self) -> *mut raw::libxl_ctx {
        self.context.as_ptr()
    }

    /// libxl can't report events any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it is open, nobody else has it, and its operations are over, as each has
        // borrowed it.
        unsafe { raw::libxl_ctx_free(self.as_ptr()) };
    }
}

/// libxl gives up reporting events. It has logged why.
unsafe extern "C" fn disaster(
    user: *mut c_void,
    _type: raw::libxl_event_type,
    _message: *const c_char,
    _errno: c_int,
) {
    // SAFETY: it was registered with the address of the flag, which outlives the context.
    let broken = unsafe { &*user.cast::<AtomicBool>() };
    broken.store(true, Ordering::Relaxed);
}

/// Ends the operation that a [`Toolstack`] on another thread is at.
#[derive(Clone)]
pub struct Aborter {
    context: Arc<Context>,
}

impl fmt::Debug for Aborter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aborter").finish_non_exhaustive()
    }
}

impl Aborter {
    /// Asks the operation to end; it fails then with [`LibxlCode::ABORTED`], some time later,
    /// and may have done a part of its work: a restore that is ended late can leave its domain.
    ///
    /// False if the toolstack is at nothing, or has been asked already.
    ///
    /// # Errors
    ///
    /// libxl refused: the operation can't be ended.
    pub fn abort(&self) -> Result<bool> {
        // Not through `Context::call`: it would mix its messages with those of the operation.
        // SAFETY: the context is open, and this function is made to be called from another
        // thread. Null means the operation that some thread waits for: there is at most one, as
        // a `Toolstack` is not `Sync`.
        let code = unsafe { raw::libxl_ao_abort(self.context.as_ptr(), ptr::null()) };
        match LibxlCode(code) {
            LibxlCode(0) => Ok(true),
            LibxlCode::NOT_FOUND | LibxlCode::ABORTED => Ok(false),
            code => Err(Error::Libxl {
                operation: "end an operation",
                domain: None,
                code,
                detail: String::new(),
            }),
        }
    }
}

/// A string that libxl has allocated and we free.
pub(super) struct Text(NonNull<c_char>);

impl Text {
    /// # Safety
    ///
    /// `text` is null or a C string from malloc that nobody else frees.
    pub(super) unsafe fn new(text: *mut c_char) -> Option<Text> {
        NonNull::new(text).map(Text)
    }

    pub(super) fn to_owned(&self) -> String {
        // SAFETY: it is a C string.
        unsafe { CStr::from_ptr(self.0.as_ptr()) }
            .to_string_lossy()
            .into_owned()
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        // SAFETY: it came from malloc, and is freed once.
        unsafe { libc::free(self.0.as_ptr().cast()) };
    }
}

/// A copy of a string in one of libxl's structures.
///
/// # Safety
///
/// `text` is null or a C string.
pub(super) unsafe fn text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: as the caller says.
    Some(
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned(),
    )
}

pub(super) fn c_string(text: &str, what: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::argument(format!("{what}: it contains a zero byte")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_in_a_process_group_of_its_own_where_it_is_to_be() {
        for apart in [true, false] {
            // SAFETY: the child calls nothing but what is async-signal-safe, and ends.
            let status = unsafe {
                let child = fork(apart);
                if child == 0 {
                    libc::_exit(i32::from(libc::getpgrp() == libc::getpid()));
                }
                assert!(child > 0);
                let mut status = -1;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                status
            };
            assert_eq!(libc::WEXITSTATUS(status), i32::from(apart));
        }
    }
}
