//! Names, lists, what is kept beside a domain, and memory.

use std::ffi::c_int;
use std::ptr;

use super::config::array;
use super::context::{Text, c_string};
use super::{DomainConfig, DomainKind, Toolstack};
use crate::{DomId, Error, LibxlCode, Result, raw};

/// What a list of domains shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainSummary {
    /// The domain.
    pub domain: DomId,
    /// Its name; `None` if xenstore has none, as for one that is nearly gone.
    pub name: Option<String>,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its kind; `None` if libxl can't tell, as for the control domain. For a PVH domain this is
    /// HVM: see [`DomainConfig::kind`].
    pub kind: Option<DomainKind>,
    /// The memory that it has, in KiB.
    pub memory: u64,
    /// It is being destroyed.
    pub dying: bool,
}

/// Operations on names and lists, on what is kept beside a domain, and on memory.
impl Toolstack {
    /// All domains.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn list(&self) -> Result<Vec<DomainSummary>> {
        let mut count: c_int = 0;
        // SAFETY: the context is open.
        let list = unsafe { raw::libxl_list_domain(self.as_ptr(), &mut count) };
        if list.is_null() {
            return Err(Error::Unexpected {
                operation: "list domains",
                domain: None,
                what: "libxl returned nothing".to_owned(),
            });
        }
        // SAFETY: an array of that many, which is freed after it was read.
        let domains = unsafe {
            let domains = array(list, count)
                .filter_map(|info| self.summary_of(info))
                .collect();
            raw::libxl_dominfo_list_free(list, count);
            domains
        };
        Ok(domains)
    }

    /// One domain; `None` if there is no such domain.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn summary(&self, domain: DomId) -> Result<Option<DomainSummary>> {
        let mut info = raw::libxl_dominfo::default();
        // SAFETY: the structure is whole, and has nothing allocated yet.
        unsafe { raw::libxl_dominfo_init(&mut info) };
        let result = self.call("ask for the domain's state", domain, |context| {
            // SAFETY: the context is open, and the structure initialised.
            unsafe { raw::libxl_domain_info(context, &mut info, domain.get()) }
        });
        let summary = if result.is_ok() {
            self.summary_of(&info)
        } else {
            None
        };
        // SAFETY: it was initialised, and is disposed of once.
        unsafe { raw::libxl_dominfo_dispose(&mut info) };
        match result {
            Ok(()) => Ok(summary),
            Err(error) if error.libxl_code() == Some(LibxlCode::DOMAIN_NOT_FOUND) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn summary_of(&self, info: &raw::libxl_dominfo) -> Option<DomainSummary> {
        let domain = DomId::new(info.domid)?;
        Some(DomainSummary {
            domain,
            name: self.name(domain),
            uuid: info.uuid.uuid,
            kind: DomainKind::from_raw(info.domain_type),
            memory: info.current_memkb,
            dying: info.dying,
        })
    }

    /// The domain of that name; `None` if there is none.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn domain_by_name(&self, name: &str) -> Result<Option<DomId>> {
        let name = c_string(name, "domain name")?;
        let mut number = 0;
        let result = self.call("look for a domain's name", None, |context| {
            // SAFETY: the context is open, the name a C string.
            unsafe { raw::libxl_name_to_domid(context, name.as_ptr(), &mut number) }
        });
        match result {
            Ok(()) => Ok(DomId::new(number)),
            // What libxl answers when it has looked at all of them.
            Err(error) if error.libxl_code() == Some(LibxlCode::INVALID) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A domain's name; `None` if there is no such domain, or xenstore has no name for it.
    pub fn name(&self, domain: DomId) -> Option<String> {
        // SAFETY: the context is open. The answer is null or a C string from malloc.
        let name = unsafe { Text::new(raw::libxl_domid_to_name(self.as_ptr(), domain.get())) };
        name.map(|name| name.to_owned())
    }

    /// Renames a domain, but only if it still has the old name.
    ///
    /// # Errors
    ///
    /// It has another name, there is one of the new name already, or there is no such domain.
    pub fn rename(&self, domain: DomId, old: &str, new: &str) -> Result<()> {
        let (old, new) = (c_string(old, "domain name")?, c_string(new, "domain name")?);
        self.call("rename", domain, |context| {
            // SAFETY: the context is open, both names are C strings.
            unsafe { raw::libxl_domain_rename(context, domain.get(), old.as_ptr(), new.as_ptr()) }
        })
    }

    /// Keeps data beside the domain, in a file that goes when the domain goes. `xl` keeps its own
    /// configuration so, as "xl"; an empty value removes it.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the file could not be written.
    pub fn store_user_data(&self, domain: DomId, id: &str, data: &[u8]) -> Result<()> {
        let id = c_string(id, "name of user data")?;
        let length =
            c_int::try_from(data.len()).map_err(|_| Error::argument("user data: too long"))?;
        self.call("keep data beside the domain", domain, |context| {
            // SAFETY: the context is open, the name a C string, the data as long as said.
            unsafe {
                raw::libxl_userdata_store(context, domain.get(), id.as_ptr(), data.as_ptr(), length)
            }
        })
    }

    /// The data that was kept beside the domain; `None` if there is none.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the file could not be read.
    pub fn user_data(&self, domain: DomId, id: &str) -> Result<Option<Vec<u8>>> {
        let id = c_string(id, "name of user data")?;
        let mut data = ptr::null_mut();
        let mut length: c_int = 0;
        self.call("fetch the data kept beside the domain", domain, |context| {
            // SAFETY: the context is open, the name a C string.
            unsafe {
                raw::libxl_userdata_retrieve(
                    context,
                    domain.get(),
                    id.as_ptr(),
                    &mut data,
                    &mut length,
                )
            }
        })?;
        if data.is_null() {
            return Ok(None);
        }
        // SAFETY: from malloc, as long as said, and freed once.
        let copy = unsafe {
            let copy = array(data, length).copied().collect();
            libc::free(data.cast());
            copy
        };
        Ok(Some(copy))
    }

    /// The memory that a domain of this configuration needs in all, in KiB. Fills in defaults.
    ///
    /// # Errors
    ///
    /// The configuration is not a possible one.
    pub fn needed_memory(&self, config: &mut DomainConfig) -> Result<u64> {
        let mut kib = 0;
        self.call("compute a domain's memory", None, |context| {
            // SAFETY: the context is open, the configuration whole. All ones: no domain to name
            // in messages.
            unsafe {
                raw::libxl_domain_need_memory(context, config.as_mut_ptr(), u32::MAX, &mut kib)
            }
        })?;
        Ok(kib)
    }

    /// The host's free memory, in KiB: also what has yet to be scrubbed, and what is claimed.
    ///
    /// # Errors
    ///
    /// The hypervisor refused.
    pub fn free_memory(&self) -> Result<u64> {
        let mut kib = 0;
        self.call("ask for free memory", None, |context| {
            // SAFETY: the context is open.
            unsafe { raw::libxl_get_free_memory(context, &mut kib) }
        })?;
        Ok(kib)
    }
}
