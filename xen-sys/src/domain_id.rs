//! The number of a domain.

use std::fmt;
use std::str::FromStr;

use crate::raw;

/// `DOMID_FIRST_RESERVED`, a macro that bindgen can't read.
pub(crate) const FIRST_RESERVED: u32 = 0x7ff0;

/// The number that a hypervisor gave to a domain: 0 for the control domain, from 1 on for guests.
///
/// Always below `DOMID_FIRST_RESERVED` (0x7ff0): the reserved numbers name no domain but roles
/// ("myself", "Xen"), and are never meant by a user. Numbers are used again after 32,751 more
/// domains, so a domain is identified over time by its UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(u16);

/// A number that is no domain's.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not the number of a domain")]
pub struct InvalidDomId(String);

impl DomId {
    /// The control domain.
    pub const DOM0: DomId = DomId(0);

    /// The domain of this number; `None` for a reserved one.
    pub fn new(number: u32) -> Option<DomId> {
        let number = u16::try_from(number).ok()?;
        (u32::from(number) < FIRST_RESERVED).then_some(DomId(number))
    }

    /// The number.
    pub fn get(self) -> u32 {
        u32::from(self.0)
    }

    /// The number as the hypervisor's own structures have it.
    pub(crate) fn as_raw(self) -> raw::domid_t {
        self.0
    }
}

impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TryFrom<u32> for DomId {
    type Error = InvalidDomId;

    fn try_from(number: u32) -> Result<DomId, InvalidDomId> {
        DomId::new(number).ok_or_else(|| InvalidDomId(number.to_string()))
    }
}

impl From<DomId> for u32 {
    fn from(domain: DomId) -> u32 {
        domain.get()
    }
}

impl FromStr for DomId {
    type Err = InvalidDomId;

    fn from_str(text: &str) -> Result<DomId, InvalidDomId> {
        text.parse()
            .ok()
            .and_then(DomId::new)
            .ok_or_else(|| InvalidDomId(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_numbers_are_no_domains() {
        assert_eq!(DomId::new(0), Some(DomId::DOM0));
        assert_eq!(DomId::new(0x7fef).map(DomId::get), Some(0x7fef));
        for number in [0x7ff0, 0x7ff4, 0xffff, 0x1_0000, u32::MAX] {
            assert_eq!(DomId::new(number), None, "{number:#x}");
            assert!(DomId::try_from(number).is_err(), "{number:#x}");
        }
    }

    #[test]
    fn text_is_a_decimal_number() {
        assert_eq!("17".parse::<DomId>().unwrap().to_string(), "17");
        for text in ["", "-1", "0x1", "guest", "32752", " 1"] {
            let error = text.parse::<DomId>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
