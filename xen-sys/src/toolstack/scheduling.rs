//! How much processor time a domain may use.

use crate::toolstack::Toolstack;
use crate::{DomId, Error, Result, raw};

/// Operations on a domain's share of the processors.
impl Toolstack {
    /// The most processor time that a domain may use, in percent of one CPU; zero: as much as
    /// there is. `None` where its scheduler knows no such bound.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused.
    pub fn cpu_cap(&self, domain: DomId) -> Result<Option<u32>> {
        const OPERATION: &str = "read the domain's share of the processors";
        let mut params = raw::libxl_domain_sched_params::default();
        // SAFETY: the structure is whole, and has nothing allocated.
        unsafe { raw::libxl_domain_sched_params_init(&mut params) };
        let result = self.call(OPERATION, domain, |context| {
            // SAFETY: the context is open, and the structure initialised.
            unsafe { raw::libxl_domain_sched_params_get(context, domain.get(), &mut params) }
        });
        let (scheduler, cap) = (params.sched, params.cap);
        // SAFETY: it was initialised, and is disposed of once.
        unsafe { raw::libxl_domain_sched_params_dispose(&mut params) };
        result?;
        match scheduler {
            raw::LIBXL_SCHEDULER_CREDIT | raw::LIBXL_SCHEDULER_CREDIT2 => {
                u32::try_from(cap).map(Some).map_err(|_| Error::Unexpected {
                    operation: OPERATION,
                    domain: Some(domain),
                    what: format!("a cap of {cap}"),
                })
            }
            _ => Ok(None),
        }
    }

    /// Bounds the processor time that a domain may use, in percent of one CPU; zero lifts the
    /// bound. All else of its scheduling stays.
    ///
    /// # Errors
    ///
    /// There is no such domain, its scheduler knows no such bound, or it is more than the domain
    /// has vCPUs for.
    pub fn set_cpu_cap(&self, domain: DomId, percent: u32) -> Result<()> {
        let mut params = raw::libxl_domain_sched_params::default();
        // SAFETY: the structure is whole, and has nothing allocated. What it is initialised to
        // leaves everything as it is.
        unsafe { raw::libxl_domain_sched_params_init(&mut params) };
        params.cap = i32::try_from(percent).unwrap_or(i32::MAX);
        let result = self.call("bound the domain's processor time", domain, |context| {
            // SAFETY: the context is open, and the structure initialised.
            unsafe { raw::libxl_domain_sched_params_set(context, domain.get(), &params) }
        });
        // SAFETY: it was initialised, and is disposed of once.
        unsafe { raw::libxl_domain_sched_params_dispose(&mut params) };
        result
    }
}
