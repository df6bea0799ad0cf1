//! Xen's libraries log through a table of C functions (xentoollog.h); here it leads to `log`.
//!
//! Each handle has a bridge of its own, which also keeps the errors that were logged since the
//! last call began: libxl's return codes say little, its messages much.

use std::ffi::{CStr, c_char, c_int, c_ulong};
use std::io;
use std::mem;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use log::Level;

use crate::raw;

/// As many errors of one call are kept; the first ones tell the cause.
const KEPT_ERRORS: usize = 4;

/// The longest message that is kept or passed on, in bytes.
const MESSAGE_BYTES: usize = 1024;

/// A logger that Xen's libraries can be given.
///
/// Lives at a fixed address until dropped, which has to be after the handle that was opened with
/// it is closed.
pub(crate) struct LogBridge {
    logger: *mut Logger,
}

/// What C sees is the table at the start.
#[repr(C)]
struct Logger {
    vtable: raw::xentoollog_logger,
    errors: Mutex<Vec<String>>,
}

// SAFETY: the table is constant, the errors are behind a mutex, and `log` takes messages from
// any thread.
unsafe impl Send for LogBridge {}
// SAFETY: as above.
unsafe impl Sync for LogBridge {}

impl LogBridge {
    pub(crate) fn new() -> LogBridge {
        let logger = Logger {
            vtable: raw::xentoollog_logger {
                vmessage: Some(message),
                progress: Some(progress),
                destroy: Some(destroy),
            },
            errors: Mutex::new(Vec::new()),
        };
        LogBridge {
            logger: Box::into_raw(Box::new(logger)),
        }
    }

    /// For the functions that open a handle.
    pub(crate) fn as_ptr(&self) -> *mut raw::xentoollog_logger {
        self.logger.cast()
    }

    /// Forgets the errors of earlier calls.
    pub(crate) fn begin(&self) {
        self.errors().clear();
    }

    /// The errors that were logged since [`begin`](LogBridge::begin), joined.
    pub(crate) fn take(&self) -> String {
        mem::take(&mut *self.errors()).join("; ")
    }

    fn errors(&self) -> std::sync::MutexGuard<'_, Vec<String>> {
        // SAFETY: the logger is valid from `new` to `drop`.
        let logger = unsafe { &*self.logger };
        logger.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LogBridge {
    fn drop(&mut self) {
        // SAFETY: it came from `Box::into_raw`, and whoever was given the pointer is closed.
        drop(unsafe { Box::from_raw(self.logger) });
    }
}

/// Xen's levels are one step too loud for us: what it calls an error is often expected, and if
/// not, it comes back as an [`Error`](crate::Error) all the same.
fn level_of(level: raw::xentoollog_level) -> Level {
    match level {
        raw::XTL_CRITICAL => Level::Error,
        raw::XTL_ERROR => Level::Warn,
        raw::XTL_WARN => Level::Info,
        raw::XTL_NOTICE | raw::XTL_INFO => Level::Debug,
        _ => Level::Trace,
    }
}

unsafe extern "C" fn message(
    logger: *mut raw::xentoollog_logger,
    level: raw::xentoollog_level,
    errno: c_int,
    context: *const c_char,
    format: *const c_char,
    arguments: *mut raw::__va_list_tag,
) {
    let is_error = level >= raw::XTL_ERROR;
    let level = level_of(level);
    if !is_error && !log::log_enabled!(target: "xen", level) {
        return;
    }
    let mut buffer = [0u8; MESSAGE_BYTES];
    // SAFETY: the buffer is as long as said, and format and arguments belong together, as the
    // caller, one of Xen's libraries, vouches for.
    let written = unsafe {
        raw::vsnprintf(
            buffer.as_mut_ptr().cast(),
            buffer.len() as _,
            format,
            arguments,
        )
    };
    if written < 0 {
        return;
    }
    let mut text = c_text(CStr::from_bytes_until_nul(&buffer).unwrap_or_default());
    if errno > 0 {
        text = format!("{text}: {}", io::Error::from_raw_os_error(errno));
    }
    // SAFETY: the context is null or a string that outlives the call.
    let context = unsafe { context_of(context) };
    log::log!(target: "xen", level, "{context}{text}");

    if is_error {
        // SAFETY: Xen's libraries pass on the pointer that they were given, which is that of a
        // `Logger` that outlives the handle.
        let logger = unsafe { &*logger.cast::<Logger>() };
        let mut errors = logger.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if errors.len() < KEPT_ERRORS {
            errors.push(text);
        }
    }
}

unsafe extern "C" fn progress(
    _logger: *mut raw::xentoollog_logger,
    context: *const c_char,
    doing_what: *const c_char,
    percent: c_int,
    _done: c_ulong,
    _total: c_ulong,
) {
    if !log::log_enabled!(target: "xen", Level::Trace) || doing_what.is_null() {
        return;
    }
    // SAFETY: both are strings that outlive the call; the first may be null.
    let (context, doing_what) = unsafe { (context_of(context), CStr::from_ptr(doing_what)) };
    log::trace!(target: "xen", "{context}{}: {percent}%", c_text(doing_what));
}

/// The bridge's owner destroys it, not the library.
unsafe extern "C" fn destroy(_logger: *mut raw::xentoollog_logger) {}

/// # Safety
///
/// `context` is null or a C string.
unsafe fn context_of(context: *const c_char) -> String {
    if ptr::eq(context, ptr::null()) {
        return String::new();
    }
    // SAFETY: as the caller says.
    let context = unsafe { CStr::from_ptr(context) };
    format!("{}: ", c_text(context))
}

/// One line of a library's text.
fn c_text(text: &CStr) -> String {
    text.to_string_lossy().trim().replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" {
        fn xtl_log(
            logger: *mut raw::xentoollog_logger,
            level: raw::xentoollog_level,
            errno: c_int,
            context: *const c_char,
            format: *const c_char,
            ...
        );
    }

    fn log(bridge: &LogBridge, level: raw::xentoollog_level, errno: i32, number: i32) {
        // SAFETY: the bridge lives, and the one argument is what the format asks for.
        unsafe {
            xtl_log(
                bridge.as_ptr(),
                level,
                errno,
                c"xc".as_ptr(),
                c"leaf %#x".as_ptr(),
                number,
            );
        }
    }

    #[test]
    fn errors_of_a_library_are_kept_for_the_call() {
        let bridge = LogBridge::new();
        log(&bridge, raw::XTL_ERROR, -1, 1);
        bridge.begin();
        log(&bridge, raw::XTL_WARN, -1, 2);
        log(&bridge, raw::XTL_ERROR, -1, 0x80);
        log(&bridge, raw::XTL_ERROR, libc::EPERM, 3);
        assert_eq!(
            bridge.take(),
            "leaf 0x80; leaf 0x3: Operation not permitted (os error 1)"
        );
        assert_eq!(bridge.take(), "");
    }

    #[test]
    fn a_flood_of_errors_is_bounded() {
        let bridge = LogBridge::new();
        for number in 0..1000 {
            log(&bridge, raw::XTL_ERROR, -1, number);
        }
        assert_eq!(bridge.take().split("; ").count(), KEPT_ERRORS);
    }
}
