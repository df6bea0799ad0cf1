//! Finding out which of many pages are as they were, on all cores that are given.
//!
//! ```text
//!   pages of a batch   |-----------|-----------|-----------|     each core takes parts
//!                          |           |           |
//!   in order           [ same, same, other, same, ...      ]
//! ```
//!
//! It is what a scan does to all memory in each round, and in the guest's silence once more. Each
//! page is looked at in place; what is not as it was is copied, and digested again from the copy,
//! by whoever asked.

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::{ThreadPool, ThreadPoolBuilder};

/// A core takes no fewer pages at once: below that, handing them out costs more than they do.
const LEAST: usize = 32;

/// Compares pages.
#[derive(Debug)]
pub(super) struct Comparer {
    /// None where the one who asks does it alone.
    pool: Option<ThreadPool>,
}

impl Comparer {
    /// On so many cores.
    pub fn new(cores: usize) -> Comparer {
        let pool = (cores > 1).then(|| {
            ThreadPoolBuilder::new()
                .num_threads(cores)
                .thread_name(|number| format!("compare-{number}"))
                .build()
        });
        Comparer {
            pool: pool.and_then(|pool| {
                pool.inspect_err(|error| log::warn!("Pages are compared on one core: {error}"))
                    .ok()
            }),
        }
    }

    /// Which of `count` pages are as they were, as `same` says of each of which it is known how it
    /// was.
    pub fn same(
        &self,
        count: usize,
        known: impl Fn(usize) -> bool + Sync,
        same: impl Fn(usize) -> bool + Sync,
    ) -> Vec<bool> {
        // A first round most often. Waking the others for nothing costs more than to look.
        if !(0..count).any(&known) {
            return vec![false; count];
        }
        let same = |at| known(at) && same(at);
        match &self.pool {
            Some(pool) if count > LEAST => pool.install(|| {
                (0..count)
                    .into_par_iter()
                    .with_min_len(LEAST)
                    .map(same)
                    .collect()
            }),
            _ => (0..count).map(same).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_that_of_the_pages() {
        for cores in [1, 2, 3, 16] {
            let comparer = Comparer::new(cores);
            assert_eq!(comparer.pool.is_some(), cores > 1);
            for count in [0, 1, LEAST, LEAST + 1, 1000] {
                let third: Vec<bool> = (0..count).map(|at| at % 3 == 0).collect();
                assert_eq!(comparer.same(count, |_| true, |at| at % 3 == 0), third);
                let known = comparer.same(count, |at| at % 3 == 0, |_| true);
                assert_eq!(known, third);
                let unknown = comparer.same(count, |_| false, |_| true);
                assert_eq!(unknown, vec![false; count]);
            }
        }
    }
}
