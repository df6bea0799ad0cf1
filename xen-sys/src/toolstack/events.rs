//! Waiting for a domain's end.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Toolstack;
use crate::ctl::ShutdownReason;
use crate::{DomId, Error, LibxlCode, Result, raw};

const OPERATION: &str = "wait for the domain's end";

/// What happened to a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifeEvent {
    /// It has shut down, or suspended, and is still there.
    Shutdown(ShutdownReason),
    /// It is destroyed, or about to be.
    Death,
}

/// Reports a domain's shutdown and its death.
///
/// ```text
///            rearm (after a resume)
///          ┌───────────────────────┐
///          ▼                       │
///  watching ──► Shutdown(reason) ──┴──► Death
///     └──────────────────────────────────▲
/// ```
///
/// Holds a [`Toolstack`] of its own, which can be used meanwhile.
pub struct LifeWatch {
    toolstack: Toolstack,
    domain: DomId,
    /// `None` only after a failure to register again.
    registration: Option<NonNull<raw::libxl_evgen_domain_death>>,
    dead: bool,
}

// SAFETY: the registration belongs to libxl's context, which is not tied to a thread.
unsafe impl Send for LifeWatch {}

impl fmt::Debug for LifeWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LifeWatch")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}

impl LifeWatch {
    /// Watches a domain. What has happened to it already is reported at once: that it has shut
    /// down, or that there is no such domain (any more).
    ///
    /// # Errors
    ///
    /// xenstore refused.
    pub fn new(toolstack: Toolstack, domain: DomId) -> Result<LifeWatch> {
        let registration = Some(register(&toolstack, domain)?);
        Ok(LifeWatch {
            toolstack,
            domain,
            registration,
            dead: false,
        })
    }

    /// The domain that is watched.
    pub fn domain(&self) -> DomId {
        self.domain
    }

    /// For other operations meanwhile.
    pub fn toolstack(&self) -> &Toolstack {
        &self.toolstack
    }

    /// Reports a shutdown once more: each is reported once, and after it only the death.
    ///
    /// To be called when the domain has been resumed. While it is still shut down, the same
    /// shutdown is reported again, at once.
    ///
    /// # Errors
    ///
    /// xenstore refused.
    pub fn rearm(&mut self) -> Result<()> {
        // In this order: only the first registration of a context makes it look at the domain
        // at once, and so finds what has happened since the resume.
        self.unregister();
        self.registration = Some(register(&self.toolstack, self.domain)?);
        Ok(())
    }

    fn unregister(&mut self) {
        if let Some(registration) = self.registration.take() {
            // SAFETY: the context is open, and the registration is of it.
            unsafe {
                raw::libxl_evdisable_domain_death(self.toolstack.as_ptr(), registration.as_ptr());
            }
        }
    }

    /// The next event; `None` if none comes in time. Without a time, waits for as long as it
    /// takes. After a death, it is reported again and again.
    ///
    /// # Errors
    ///
    /// libxl can't report events any more, as when xenstored is gone.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Option<LifeEvent>> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            if self.dead {
                return Ok(Some(LifeEvent::Death));
            }
            while let Some(event) = self.check()? {
                if let Some(event) = event {
                    self.dead = event == LifeEvent::Death;
                    return Ok(Some(event));
                }
            }
            if self.toolstack.context.is_broken() {
                return Err(Error::Unexpected {
                    operation: OPERATION,
                    domain: Some(self.domain),
                    what: "libxl can't report events any more".to_owned(),
                });
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
            self.poll(left)?;
        }
    }

    /// An event that libxl has queued; the inner `None` is one of no interest.
    fn check(&self) -> Result<Option<Option<LifeEvent>>> {
        let mut event = ptr::null_mut();
        let result = self.toolstack.call(OPERATION, self.domain, |context| {
            // SAFETY: the context is open; all types of events, no predicate.
            unsafe { raw::libxl_event_check(context, &mut event, u64::MAX, None, ptr::null_mut()) }
        });
        match result {
            Err(error) if error.libxl_code() == Some(LibxlCode::NOT_READY) => return Ok(None),
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        let Some(event) = NonNull::new(event) else {
            return Ok(None);
        };
        // SAFETY: libxl has handed us a whole event.
        let meaning = unsafe { self.meaning_of(event.as_ref()) };
        // SAFETY: it is of this context, and freed once.
        unsafe { raw::libxl_event_free(self.toolstack.as_ptr(), event.as_ptr()) };
        Ok(Some(meaning))
    }

    fn meaning_of(&self, event: &raw::libxl_event) -> Option<LifeEvent> {
        if event.domid != self.domain.get() {
            return None;
        }
        match event.type_ {
            raw::LIBXL_EVENT_TYPE_DOMAIN_DEATH => Some(LifeEvent::Death),
            raw::LIBXL_EVENT_TYPE_DOMAIN_SHUTDOWN => {
                // SAFETY: for this type, this is the member in use.
                let reason = unsafe { event.u.domain_shutdown.shutdown_reason };
                Some(LifeEvent::Shutdown(ShutdownReason::from_code(u32::from(
                    reason,
                ))))
            }
            _ => None,
        }
    }

    /// Lets libxl wait for something, and work on it.
    fn poll(&self, timeout: Option<Duration>) -> Result<()> {
        // Rounded up: rounded down, the last millisecond would be spent in a busy loop.
        let timeout = timeout.map_or(-1, |timeout| {
            c_int::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
        });
        let mut descriptors: Vec<raw::pollfd> = Vec::new();
        let (count, mut milliseconds) = loop {
            let mut count = c_int::try_from(descriptors.len()).unwrap_or(c_int::MAX);
            let mut milliseconds = timeout;
            let result = self.toolstack.call(OPERATION, self.domain, |context| {
                // SAFETY: the context is open, and there is room for as many as said.
                unsafe {
                    raw::libxl_osevent_beforepoll(
                        context,
                        &mut count,
                        descriptors.as_mut_ptr(),
                        &mut milliseconds,
                        now(),
                    )
                }
            });
            match result {
                Ok(()) => break (count, milliseconds),
                Err(error) if error.libxl_code() == Some(LibxlCode(raw::ERROR_BUFFERFULL)) => {
                    let needed = usize::try_from(count).unwrap_or(0);
                    descriptors.resize(needed.max(descriptors.len() + 1), Default::default());
                }
                Err(error) => return Err(error),
            }
        };
        descriptors.truncate(usize::try_from(count).unwrap_or(0));
        if milliseconds < 0 && descriptors.is_empty() {
            // Nothing would ever wake us; libxl always has something to wait for, in fact.
            milliseconds = 1000;
        }
        // SAFETY: as many structures as said; the two types of them are one in C.
        let result = unsafe {
            libc::poll(
                descriptors.as_mut_ptr().cast(),
                descriptors.len() as libc::nfds_t,
                milliseconds,
            )
        };
        if result < 0 {
            let source = io::Error::last_os_error();
            if source.kind() == io::ErrorKind::Interrupted {
                return Ok(());
            }
            return Err(Error::os(OPERATION, Some(self.domain), source));
        }
        // SAFETY: the context is open, and these are the descriptors that it gave us.
        unsafe {
            raw::libxl_osevent_afterpoll(
                self.toolstack.as_ptr(),
                count,
                descriptors.as_ptr(),
                now(),
            );
        }
        Ok(())
    }
}

impl Drop for LifeWatch {
    fn drop(&mut self) {
        self.unregister();
    }
}

fn register(
    toolstack: &Toolstack,
    domain: DomId,
) -> Result<NonNull<raw::libxl_evgen_domain_death>> {
    let mut registration = ptr::null_mut();
    toolstack.call("watch the domain", domain, |context| {
        // SAFETY: the context is open; the number of ours that comes back is not used.
        unsafe { raw::libxl_evenable_domain_death(context, domain.get(), 0, &mut registration) }
    })?;
    NonNull::new(registration).ok_or_else(|| Error::Unexpected {
        operation: "watch the domain",
        domain: Some(domain),
        what: "libxl returned nothing".to_owned(),
    })
}

/// The time of day, as libxl wants it.
fn now() -> raw::timeval {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    raw::timeval {
        tv_sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        tv_usec: i64::from(now.subsec_micros()),
    }
}

// `poll` is given libxl's structure under the name of the other.
const _: () = assert!(
    size_of::<raw::pollfd>() == size_of::<libc::pollfd>()
        && align_of::<raw::pollfd>() == align_of::<libc::pollfd>()
);
