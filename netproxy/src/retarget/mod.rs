//! Moving all connections of a guest: the order of the steps.
//!
//! ```text
//!  Settled ──prepare──▶ Prepared ──hold──▶ Held ──retarget──▶ Retargeted ──release──▶ Settled
//!     ▲                    │                │                     │            (at the new site)
//!     └──────cancel────────┴────────────────┴─────────────────────┘
//! ```
//!
//! | step     | when                                   | what happens                        |
//! |----------|----------------------------------------|-------------------------------------|
//! | prepare  | before the last rounds                 | the path to the new site is warmed  |
//! | hold     | after the suspend                      | sockets frozen, new clients wait    |
//! | retarget | during the downtime                    | each socket made anew               |
//! | release  | the guest can be reached               | what is pending is sent             |
//! | cancel   | any time before the release            | all goes on at the old site         |
//!
//! A hold is [lent](lease): when its time is over, or its caller dies, it is cancelled.

pub(crate) mod block;
pub(crate) mod late;
pub mod lease;
pub mod path;
pub mod phase;
