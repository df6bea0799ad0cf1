//! A TCP splicing proxy that re-targets live connections.
#![warn(unreachable_pub)]

pub mod config;
mod error;
pub mod proxy_protocol;
pub mod repair;
mod splice;
mod sys;

pub use error::{Error, Result};
