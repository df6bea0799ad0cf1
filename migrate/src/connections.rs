//! What keeps a guest's connections while the address behind which it is reached changes.
//!
//! The engine does not know how; it says when:
//!
//! ```text
//!   source       offer ─ accepted ─ rounds ─ prepare ─ suspend ─ suspended ─ ... ─ runs ─ moved
//!                                                                   any failure ─ stayed
//!   destination        └ expected                    outgoing ─ led
//! ```

use std::thread::JoinHandle;

use serde::Serialize;

use crate::error::Result;

/// What became of the connections of a guest that has moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Kept {
    /// They went on at the other site.
    pub kept: u64,
    /// They could not, and were closed.
    pub closed: u64,
}

/// The connections of a guest that leaves.
///
/// Up to [`Connections::prepare`] a failure ends the move, with the guest running here. From the
/// suspend on a failure costs connections, never the guest, and nothing may be waited for.
pub trait Connections {
    /// The destination takes the guest; at the edge it calls itself `site`.
    ///
    /// # Errors
    /// Where the connections could not follow.
    fn accepted(&mut self, site: Option<&str>) -> Result<()>;

    /// The guest is about to be suspended.
    ///
    /// # Errors
    /// Where the connections could not follow.
    fn prepare(&mut self) -> Result<()>;

    /// The guest is suspended. Returns at once.
    fn suspended(&mut self);

    /// What the destination has to know of connections that the guest has begun itself, to lead
    /// them through this site. Asked once the guest is suspended; nothing may be waited for. None
    /// where nothing is done about them.
    fn outgoing(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// The guest runs at the destination. None where it has no connections to keep; otherwise
    /// what became of them, or why that is not known.
    fn moved(&mut self) -> Option<Result<Kept>>;

    /// The guest stays here, and runs.
    fn stayed(&mut self);
}

/// For guests that are reached under the same address everywhere, as on one network.
#[derive(Debug, Clone, Copy, Default)]
pub struct Untouched;

impl Connections for Untouched {
    fn accepted(&mut self, _site: Option<&str>) -> Result<()> {
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    fn suspended(&mut self) {}

    fn moved(&mut self) -> Option<Result<Kept>> {
        None
    }

    fn stayed(&mut self) {}
}

/// A guest that a destination is about to take.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its UUID, as text.
    pub uuid: &'a str,
    /// What it will be here, as libxl's JSON: only what this site allows is in it.
    pub configuration: &'a serde_json::Value,
}

/// What a destination has arranged for a guest's connections.
#[derive(Default)]
pub struct Arranged {
    /// What this site is called at the edge that keeps them, if there is one.
    pub site: Option<String>,
    /// Takes what [`Connections::outgoing`] gave at the source, from whoever that is.
    pub outgoing: Option<Lead>,
}

/// Begins to lead a guest's own connections through the site that it comes from. The guest does
/// not run before the thread has ended.
pub type Lead = Box<dyn FnMut(Vec<u8>) -> JoinHandle<()>>;

/// Makes a guest reachable at a destination before it arrives.
///
/// # Errors
/// Where that can't be: the guest is refused.
pub type Expect<'a> = dyn FnMut(Expected<'_>) -> Result<Arranged> + 'a;

/// What [`Arranged::site`] would be if the guest of that name came; nothing is made.
pub type Foresee<'a> = dyn FnMut(&str) -> Result<Option<String>> + 'a;
