//! A TCP splicing proxy that re-targets live connections.
#![warn(unreachable_pub)]

mod error;
pub mod repair;
mod sys;

pub use error::{Error, Result};
