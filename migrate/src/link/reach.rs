//! By what a source reaches the destination, for an engine that only sees links.

use super::Link;
use super::direct::PublicKey;
use crate::error::Result;
use crate::wire::DirectDoor;

/// The connections of one attempt to move a guest.
pub trait Reach {
    /// Called once the other site has answered, and again when more connections have: does what can
    /// be done for them, and says which congestion control they go by, if that is known.
    ///
    /// # Errors
    /// Where they can't go by the one that was asked for.
    fn reached(&mut self) -> Result<Option<String>>;

    /// Called each second or so while pages are sent: sees to the connections, and says which
    /// congestion control they go by from now on, if that has changed.
    fn tend(&mut self) -> Option<String>;

    /// Opens one more connection to the destination's worker, by the way that the first one came.
    ///
    /// # Errors
    /// Where it can't be made.
    fn open(&mut self) -> Result<Link>;

    /// What the destination has to know this site by where connections are to come directly; none
    /// where they are not to.
    fn key(&mut self) -> Option<PublicKey>;

    /// Opens `count` direct connections, with so many bytes on their way at the most.
    ///
    /// # Errors
    /// Of each.
    fn open_directly(&mut self, door: &DirectDoor, count: usize, window: u32) -> Vec<Result<Link>>;
}
