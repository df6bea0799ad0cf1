//! Xenstore: the small tree of text in which domains and their devices are written down.
//!
//! Paths are absolute (`/local/domain/3/name`) or relative to the control domain's own
//! (`/local/domain/0`). A value is bytes, nearly always text.
//!
//! What is below `/local/domain/N` was written by a guest in part: it is input from outside.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::{Error, Result, raw};

/// So often is a transaction begun again when others got in its way.
const TRANSACTION_ATTEMPTS: u32 = 64;

/// A connection to xenstored.
///
/// `Send` but not `Sync`: each thread opens its own. A connection with a [`Watch`] has a thread
/// of libxenstore's behind it.
pub struct Store {
    handle: NonNull<raw::xs_handle>,
    not_sync: PhantomData<Cell<()>>,
}

// SAFETY: the connection is not tied to a thread.
unsafe impl Send for Store {}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// What a watch reports: something at or below its path has changed, or the watch was just set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The path that changed.
    pub path: String,
    /// The token of the watch.
    pub token: String,
}

impl Store {
    /// Connects.
    ///
    /// # Errors
    ///
    /// xenstored does not run, or this process may not reach it.
    pub fn open() -> Result<Store> {
        // SAFETY: takes only flags.
        let handle = unsafe { raw::xs_open(0) };
        let source = io::Error::last_os_error();
        match NonNull::new(handle) {
            Some(handle) => Ok(Store {
                handle,
                not_sync: PhantomData,
            }),
            None => Err(Error::Open {
                interface: "xenstore",
                source,
            }),
        }
    }

    /// The value at a path; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Not allowed, or the connection is lost.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.read_in(raw::XBT_NULL, path)
    }

    /// The text at a path; `None` if there is none, or it is no UTF-8.
    ///
    /// # Errors
    ///
    /// As [`read`](Store::read).
    pub fn read_text(&self, path: &str) -> Result<Option<String>> {
        Ok(self
            .read(path)?
            .and_then(|value| String::from_utf8(value).ok()))
    }

    /// Sets the value at a path, which is made if need be.
    ///
    /// # Errors
    ///
    /// Not allowed, too long (4 KiB), or the connection is lost.
    pub fn write(&self, path: &str, value: impl AsRef<[u8]>) -> Result<()> {
        self.write_in(raw::XBT_NULL, path, value.as_ref())
    }

    /// Removes a path and all below it; it need not exist.
    ///
    /// # Errors
    ///
    /// Not allowed, or the connection is lost.
    pub fn remove(&self, path: &str) -> Result<()> {
        self.remove_in(raw::XBT_NULL, path)
    }

    /// The names right below a path; none if it does not exist.
    ///
    /// # Errors
    ///
    /// Not allowed, or the connection is lost.
    pub fn list(&self, path: &str) -> Result<Vec<String>> {
        self.list_in(raw::XBT_NULL, path)
    }

    /// Does several things at once: others see all of them or none. The closure runs again when
    /// somebody else changed what it used, and must have no effect but through its argument.
    ///
    /// # Errors
    ///
    /// What the closure fails with (nothing is done then); others never let it through; or the
    /// connection is lost.
    pub fn transaction<T>(&self, mut body: impl FnMut(&Transaction<'_>) -> Result<T>) -> Result<T> {
        const OPERATION: &str = "change xenstore in one transaction";
        for _ in 0..TRANSACTION_ATTEMPTS {
            // SAFETY: the connection is open.
            let id = unsafe { raw::xs_transaction_start(self.handle.as_ptr()) };
            if id == raw::XBT_NULL {
                return Err(Error::os(OPERATION, None, io::Error::last_os_error()));
            }
            let transaction = Transaction { store: self, id };
            let result = body(&transaction);
            let abort = result.is_err();
            // SAFETY: the connection is open, and the transaction not ended yet.
            let ended = unsafe { raw::xs_transaction_end(self.handle.as_ptr(), id, abort) };
            let source = io::Error::last_os_error();
            match (result, ended) {
                (Ok(value), true) => return Ok(value),
                (Err(error), _) => return Err(error),
                (Ok(_), false) if source.raw_os_error() == Some(libc::EAGAIN) => {}
                (Ok(_), false) => return Err(Error::os(OPERATION, None, source)),
            }
        }
        Err(Error::os(
            OPERATION,
            None,
            io::Error::from_raw_os_error(libc::EAGAIN),
        ))
    }

    /// Watches a path and all below it. The connection is the watch's until it is dropped: one
    /// connection, one consumer of events.
    ///
    /// # Errors
    ///
    /// Not allowed, or the connection is lost.
    pub fn watch(self, path: &str, token: &str) -> Result<Watch> {
        let mut watch = Watch {
            store: self,
            watched: Vec::new(),
        };
        watch.add(path, token)?;
        Ok(watch)
    }

    fn read_in(&self, transaction: raw::xs_transaction_t, path: &str) -> Result<Option<Vec<u8>>> {
        let path = c_string(path, "xenstore path")?;
        let mut length: c_uint = 0;
        // SAFETY: the connection is open, the path a C string.
        let value = unsafe {
            raw::xs_read(
                self.handle.as_ptr(),
                transaction,
                path.as_ptr(),
                &mut length,
            )
        };
        let source = io::Error::last_os_error();
        match Malloced::new(value) {
            // SAFETY: the answer has that many bytes.
            Some(value) => Ok(Some(unsafe { value.bytes(length as usize) }.to_vec())),
            None if source.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            None => Err(Error::os("read from xenstore", None, source)),
        }
    }

    fn write_in(&self, transaction: raw::xs_transaction_t, path: &str, value: &[u8]) -> Result<()> {
        let path = c_string(path, "xenstore path")?;
        let length = c_uint::try_from(value.len())
            .map_err(|_| Error::argument("xenstore value: too long"))?;
        // SAFETY: the connection is open, the path a C string, the value as long as said.
        let done = unsafe {
            raw::xs_write(
                self.handle.as_ptr(),
                transaction,
                path.as_ptr(),
                value.as_ptr().cast(),
                length,
            )
        };
        check(done, "write to xenstore")
    }

    fn remove_in(&self, transaction: raw::xs_transaction_t, path: &str) -> Result<()> {
        let path = c_string(path, "xenstore path")?;
        // SAFETY: the connection is open, the path a C string.
        let done = unsafe { raw::xs_rm(self.handle.as_ptr(), transaction, path.as_ptr()) };
        match check(done, "remove from xenstore") {
            Err(error) if error.errno() == Some(libc::ENOENT) => Ok(()),
            result => result,
        }
    }

    fn list_in(&self, transaction: raw::xs_transaction_t, path: &str) -> Result<Vec<String>> {
        let path = c_string(path, "xenstore path")?;
        let mut count: c_uint = 0;
        // SAFETY: the connection is open, the path a C string.
        let names = unsafe {
            raw::xs_directory(self.handle.as_ptr(), transaction, path.as_ptr(), &mut count)
        };
        let source = io::Error::last_os_error();
        match Malloced::new(names.cast()) {
            Some(names) => {
                // SAFETY: the answer is an array of that many C strings, in one allocation.
                Ok(unsafe { names.strings(count as usize) })
            }
            None if source.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
            None => Err(Error::os("list xenstore", None, source)),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: it is open, and nobody else has it. This also ends its watches and its thread.
        unsafe { raw::xs_close(self.handle.as_ptr()) };
    }
}

/// Several reads and writes that happen at once: see [`Store::transaction`].
#[derive(Debug)]
pub struct Transaction<'store> {
    store: &'store Store,
    id: raw::xs_transaction_t,
}

impl Transaction<'_> {
    /// As [`Store::read`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.store.read_in(self.id, path)
    }

    /// As [`Store::write`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn write(&self, path: &str, value: impl AsRef<[u8]>) -> Result<()> {
        self.store.write_in(self.id, path, value.as_ref())
    }

    /// As [`Store::remove`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn remove(&self, path: &str) -> Result<()> {
        self.store.remove_in(self.id, path)
    }

    /// As [`Store::list`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn list(&self, path: &str) -> Result<Vec<String>> {
        self.store.list_in(self.id, path)
    }
}

/// A connection whose events are waited for.
#[derive(Debug)]
pub struct Watch {
    store: Store,
    watched: Vec<(CString, CString)>,
}

impl Watch {
    /// Watches one more path. It reports at once that it was set.
    ///
    /// # Errors
    ///
    /// Not allowed, or the connection is lost.
    pub fn add(&mut self, path: &str, token: &str) -> Result<()> {
        let path = c_string(path, "xenstore path")?;
        let token = c_string(token, "xenstore token")?;
        // SAFETY: the connection is open, both are C strings.
        let done =
            unsafe { raw::xs_watch(self.store.handle.as_ptr(), path.as_ptr(), token.as_ptr()) };
        check(done, "watch xenstore")?;
        self.watched.push((path, token));
        Ok(())
    }

    /// For reads and writes on the same connection.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The next event; `None` if none comes in time. Without a time, waits for as long as it
    /// takes.
    ///
    /// # Errors
    ///
    /// The connection is lost.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<Option<Event>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            // Asked for before the events, or one could come in between and not wake us.
            let descriptor = self.descriptor()?;
            if let Some(event) = self.next()? {
                return Ok(Some(event));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            readable(descriptor, left)?;
        }
    }

    /// An event that has already come.
    fn next(&self) -> Result<Option<Event>> {
        // SAFETY: the connection is open.
        let event = unsafe { raw::xs_check_watch(self.store.handle.as_ptr()) };
        let source = io::Error::last_os_error();
        let Some(event) = Malloced::new(event.cast()) else {
            return match source.raw_os_error() {
                Some(libc::EAGAIN) => Ok(None),
                _ => Err(Error::os("wait for a change in xenstore", None, source)),
            };
        };
        // SAFETY: the answer is an array of at least two C strings, path and token.
        let strings = unsafe { event.strings(2) };
        match <[String; 2]>::try_from(strings) {
            Ok([path, token]) => Ok(Some(Event { path, token })),
            Err(_) => Ok(None),
        }
    }

    fn descriptor(&self) -> Result<BorrowedFd<'_>> {
        // SAFETY: the connection is open.
        let descriptor: RawFd = unsafe { raw::xs_fileno(self.store.handle.as_ptr()) };
        if descriptor < 0 {
            let source = io::Error::last_os_error();
            return Err(Error::os("wait for a change in xenstore", None, source));
        }
        // SAFETY: it stays open as long as the connection, which we have borrowed.
        Ok(unsafe { BorrowedFd::borrow_raw(descriptor) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for (path, token) in &self.watched {
            // SAFETY: the connection is open, both are C strings. A failure is of no matter: the
            // connection is closed next.
            unsafe { raw::xs_unwatch(self.store.handle.as_ptr(), path.as_ptr(), token.as_ptr()) };
        }
    }
}

/// Waits until the descriptor is readable, or the time is up, or a signal comes.
fn readable(descriptor: BorrowedFd<'_>, timeout: Option<Duration>) -> Result<()> {
    use std::os::fd::AsRawFd;

    // Rounded up: rounded down, the last millisecond would be spent in a busy loop.
    let milliseconds = timeout.map_or(-1, |timeout| {
        i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    });
    let mut poll = libc::pollfd {
        fd: descriptor.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, as said.
    let result = unsafe { libc::poll(&mut poll, 1, milliseconds) };
    if result < 0 {
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(Error::os("wait for a change in xenstore", None, source));
        }
    }
    Ok(())
}

fn check(done: bool, operation: &'static str) -> Result<()> {
    let source = io::Error::last_os_error();
    if done {
        Ok(())
    } else {
        Err(Error::os(operation, None, source))
    }
}

fn c_string(text: &str, what: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::argument(format!("{what}: it contains a zero byte")))
}

/// An answer that the library has allocated and we free.
struct Malloced(NonNull<c_void>);

impl Malloced {
    fn new(address: *mut c_void) -> Option<Malloced> {
        NonNull::new(address).map(Malloced)
    }

    /// # Safety
    ///
    /// It has that many bytes.
    unsafe fn bytes(&self, length: usize) -> &[u8] {
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), length) }
    }

    /// # Safety
    ///
    /// It is an array of at least that many C strings.
    unsafe fn strings(&self, count: usize) -> Vec<String> {
        let array = self.0.as_ptr().cast::<*const c_char>();
        (0..count)
            .map(|index| {
                // SAFETY: as the caller says.
                let string = unsafe { CStr::from_ptr(*array.add(index)) };
                string.to_string_lossy().into_owned()
            })
            .collect()
    }
}

impl Drop for Malloced {
    fn drop(&mut self) {
        // SAFETY: it came from malloc, and is freed once.
        unsafe { libc::free(self.0.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_byte_in_a_path_is_refused() {
        let error = c_string("/a\0b", "xenstore path").unwrap_err();
        assert!(error.to_string().contains("xenstore path"), "{error}");
    }

    #[test]
    fn waiting_ends_by_data_or_by_time() {
        use std::io::Write;
        use std::os::fd::AsFd;

        let (reader, mut writer) = io::pipe().unwrap();
        readable(reader.as_fd(), Some(Duration::ZERO)).unwrap();
        readable(reader.as_fd(), Some(Duration::from_micros(10))).unwrap();
        writer.write_all(b"x").unwrap();
        readable(reader.as_fd(), None).unwrap();
    }
}
