//! What a guest does over time.

use std::collections::VecDeque;
use std::time::Duration;

use super::memory::Write;

/// Some things that a guest does together.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// When, from the begin of the history.
    pub at: Duration,
    /// What, in order.
    pub writes: Vec<Write>,
}

/// What a guest does, step after step; then it is idle.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// The steps, by time.
    pub steps: VecDeque<Step>,
    /// What it does once it is asked to suspend.
    pub at_suspend: Vec<Write>,
}

/// How a guest's time goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// A step each time that something is read or asked of it: the same in every run.
    Calls,
    /// Each step at its time, from when the guest began to run.
    Time,
}
