//! Who owns the guest, whatever breaks.
//!
//! ```text
//! source                                            destination
//! suspend, last delta, final digest      ------->   feed the last delta, compare digests
//!                                                   restore is complete, [verify]
//!                                                   journal: ready
//!                                        <-------   ready
//! journal: committed   (no way back by itself)
//! commit                                 ------->
//!                                                   journal: owner   (the guest is ours)
//!                                                   unpause, rename, keeper
//!                                        <-------   running
//! destroy, journal: end                             journal: end
//! ```
//!
//! Up to "committed" every failure ends with the guest at the source. A destination that never
//! heard the commit gives up, and says so for ever after. What a lost link leaves open between
//! "committed" and "running" is settled by asking the destination ([`recovery`]).

pub(crate) mod going_on;
pub mod guardian;
pub mod journal;
pub mod lock;
pub mod recovery;
