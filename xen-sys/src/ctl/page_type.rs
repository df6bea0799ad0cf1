//! What the hypervisor uses each page of a domain for.

use super::Ctl;
use crate::{DomId, Result, raw};

/// The hypervisor answers for at most so many pages in one call.
pub(super) const BATCH: usize = 1024;

/// Operations on page types.
impl Ctl {
    /// Replaces each frame number (PV: machine frame; else guest frame) by its type: one of
    /// [`raw`]'s `XEN_DOMCTL_PFINFO_*`, in bits 31-28.
    ///
    /// A type is as of the moment: a running guest makes page tables of its pages and back.
    ///
    /// # Errors
    ///
    /// There is no such domain, or the hypervisor refused; the frames are partly replaced then.
    pub fn page_types(&self, domain: DomId, frames: &mut [u64]) -> Result<()> {
        let mut buffer = self.page_types.borrow_mut();
        for batch in frames.chunks_mut(BATCH) {
            for (word, &frame) in buffer.words_mut().iter_mut().zip(batch.iter()) {
                *word = frame;
            }
            let array = raw::__guest_handle_xen_pfn_t {
                p: buffer.as_mut_ptr(),
            };
            let count = batch.len() as u64;
            self.domctl(
                "ask for page types",
                domain,
                raw::XEN_DOMCTL_getpageframeinfo3,
                |domctl| {
                    domctl.u.getpageframeinfo3 =
                        raw::xen_domctl_getpageframeinfo3 { num: count, array };
                },
            )?;
            for (frame, &word) in batch.iter_mut().zip(buffer.words()) {
                *frame = word;
            }
        }
        Ok(())
    }
}
