//! The memory that all connections share for what their sinks do not take yet.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What all connections together hold in bytes.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    held: AtomicUsize,
    limit: AtomicUsize,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            held: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit),
        }
    }

    pub(crate) fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn room(&self) -> usize {
        self.limit
            .load(Ordering::Relaxed)
            .saturating_sub(self.held())
    }

    pub(super) fn take(&self, bytes: usize) {
        self.held.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn release(&self, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }
}
