//! Moving bytes from one socket to another.
//!
//! ```text
//!             read            write                 small messages: one buffer a thread
//!  source ──────────▶ scratch ──────────▶ sink
//!             splice          splice                bulk: a pipe, leased while it holds bytes
//!  source ──────────▶ pipe ─────────────▶ sink
//!             read             write                sink slow or held: bounded bytes
//!  source ──────────▶ bytes ────────────▶ sink
//! ```

mod budget;
mod flow;
mod pipe;

pub(crate) use budget::Budget;
pub(crate) use flow::{End, Endpoint, Failure, Flow, Turn, Workspace};
pub(crate) use pipe::PipePool;
