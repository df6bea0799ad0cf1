//! What can go wrong when Xen is asked for something.

use std::ffi::CStr;
use std::fmt;
use std::io;

use crate::{DomId, raw};

/// The result of a call into Xen.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call into Xen failed.
///
/// The message names the operation and the domain; the cause is the source, or for libxl the
/// code with what libxl reported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// One of Xen's interfaces could not be opened.
    #[error("Can't open {interface}")]
    Open {
        /// What was to be opened, as a user would know it.
        interface: &'static str,
        /// Why not.
        source: io::Error,
    },

    /// The hypervisor, the kernel or xenstored refused.
    #[error("Failed to {operation}{}{}", of(.domain), in_brackets(.detail))]
    Call {
        /// What was tried, as the rest of "failed to ...".
        operation: &'static str,
        /// The domain it was tried on.
        domain: Option<DomId>,
        /// What Xen's libraries reported beyond the error number; may be empty.
        detail: String,
        /// The error number.
        source: io::Error,
    },

    /// libxl refused.
    #[error("Failed to {operation}{}: {code}{}", of(.domain), in_brackets(.detail))]
    Libxl {
        /// What was tried, as the rest of "failed to ...".
        operation: &'static str,
        /// The domain it was tried on.
        domain: Option<DomId>,
        /// libxl's own code.
        code: LibxlCode,
        /// The errors that libxl logged while it tried; may be empty.
        detail: String,
    },

    /// Xen answered something that can't be.
    #[error("Failed to {operation}{}: {what}", of(.domain))]
    Unexpected {
        /// What was tried, as the rest of "failed to ...".
        operation: &'static str,
        /// The domain it was tried on.
        domain: Option<DomId>,
        /// What was wrong with the answer.
        what: String,
    },

    /// A value that the caller gave can't be handed to Xen.
    #[error("Invalid {what}")]
    Argument {
        /// Which value, and what is wrong with it.
        what: String,
    },
}

fn of(domain: &Option<DomId>) -> String {
    domain
        .map(|domain| format!(" (domain {domain})"))
        .unwrap_or_default()
}

fn in_brackets(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(" ({detail})")
    }
}

impl Error {
    pub(crate) fn os(operation: &'static str, domain: Option<DomId>, source: io::Error) -> Error {
        Error::Call {
            operation,
            domain,
            detail: String::new(),
            source,
        }
    }

    pub(crate) fn argument(what: impl Into<String>) -> Error {
        Error::Argument { what: what.into() }
    }

    /// The error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Open { source, .. } | Error::Call { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// libxl's code, where it was libxl that failed.
    pub fn libxl_code(&self) -> Option<LibxlCode> {
        match self {
            Error::Libxl { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// The hypervisor can't do this at all: for log-dirty of a PV guest, it was built without
    /// shadow paging.
    pub fn is_not_supported(&self) -> bool {
        matches!(self.errno(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
            || self.libxl_code() == Some(LibxlCode::NOT_IMPLEMENTED)
    }

    /// There is no such domain (any more), or no such xenstore path.
    pub fn is_not_found(&self) -> bool {
        matches!(self.errno(), Some(libc::ESRCH | libc::ENOENT))
            || matches!(
                self.libxl_code(),
                Some(LibxlCode::DOMAIN_NOT_FOUND | LibxlCode::NOT_FOUND)
            )
    }

    /// The hypervisor lacks the memory for it: for log-dirty, it could not allocate, and dirty
    /// pages may have been missed.
    pub fn is_out_of_memory(&self) -> bool {
        self.errno() == Some(libc::ENOMEM) || self.libxl_code() == Some(LibxlCode::NO_MEMORY)
    }

    /// Somebody else is at the same thing: for log-dirty, another paging operation is under way.
    pub fn is_busy(&self) -> bool {
        self.errno() == Some(libc::EBUSY)
    }
}

/// An error code of libxl (`ERROR_FAIL` and so on).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LibxlCode(pub raw::libxl_error);

impl LibxlCode {
    /// `ERROR_FAIL`: something failed, and the detail says what.
    pub const FAIL: LibxlCode = LibxlCode(raw::ERROR_FAIL);
    /// `ERROR_NI`: not implemented.
    pub const NOT_IMPLEMENTED: LibxlCode = LibxlCode(raw::ERROR_NI);
    /// `ERROR_NOMEM`: no memory.
    pub const NO_MEMORY: LibxlCode = LibxlCode(raw::ERROR_NOMEM);
    /// `ERROR_INVAL`: an invalid argument.
    pub const INVALID: LibxlCode = LibxlCode(raw::ERROR_INVAL);
    /// `ERROR_NOPARAVIRT`: the guest has no paravirtual drivers to ask.
    pub const NO_PARAVIRT: LibxlCode = LibxlCode(raw::ERROR_NOPARAVIRT);
    /// `ERROR_NOT_READY`: nothing yet.
    pub const NOT_READY: LibxlCode = LibxlCode(raw::ERROR_NOT_READY);
    /// `ERROR_LOCK_FAIL`: the domain's lock could not be taken, as it is gone.
    pub const LOCK_FAIL: LibxlCode = LibxlCode(raw::ERROR_LOCK_FAIL);
    /// `ERROR_JSON_CONFIG_EMPTY`: libxl keeps no configuration of this domain.
    pub const NO_CONFIGURATION: LibxlCode = LibxlCode(raw::ERROR_JSON_CONFIG_EMPTY);
    /// `ERROR_DOMAIN_NOTFOUND`: no such domain.
    pub const DOMAIN_NOT_FOUND: LibxlCode = LibxlCode(raw::ERROR_DOMAIN_NOTFOUND);
    /// `ERROR_ABORTED`: ended on request.
    pub const ABORTED: LibxlCode = LibxlCode(raw::ERROR_ABORTED);
    /// `ERROR_NOTFOUND`: no such thing.
    pub const NOT_FOUND: LibxlCode = LibxlCode(raw::ERROR_NOTFOUND);
    /// `ERROR_DOMAIN_DESTROYED`: the domain went away meanwhile.
    pub const DOMAIN_DESTROYED: LibxlCode = LibxlCode(raw::ERROR_DOMAIN_DESTROYED);
}

impl fmt::Display for LibxlCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // SAFETY: the function looks the code up in a constant table, and answers any number.
        let name = unsafe { raw::libxl_error_to_string(self.0) };
        if name.is_null() {
            return write!(f, "libxl error {}", self.0);
        }
        // SAFETY: a string that is not null is one of libxl's constants.
        let name = unsafe { CStr::from_ptr(name) };
        write!(f, "libxl error {} ({})", self.0, name.to_string_lossy())
    }
}

impl fmt::Debug for LibxlCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn messages_name_operation_domain_and_detail() {
        let error = Error::os(
            "enable log-dirty",
            DomId::new(3),
            io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        );
        assert_eq!(error.to_string(), "Failed to enable log-dirty (domain 3)");
        assert!(error.source().is_some());
        assert!(error.is_not_supported());

        let error = Error::Libxl {
            operation: "restore a domain",
            domain: None,
            code: LibxlCode::FAIL,
            detail: "xc: no memory".to_owned(),
        };
        assert_eq!(
            error.to_string(),
            "Failed to restore a domain: libxl error -3 (fail) (xc: no memory)"
        );
        assert_eq!(error.errno(), None);
        assert!(!error.is_not_supported());
    }

    #[test]
    fn unknown_codes_of_libxl_are_shown_as_numbers() {
        assert_eq!(LibxlCode(-4242).to_string(), "libxl error -4242");
    }
}
