//! The proxy in network namespaces: connections that outlive the move of their guest.
//!
//! These tests need root, and fail without it.
#![allow(missing_docs, clippy::unwrap_used)]

mod callers;
mod detours;
mod edge;
mod program;
mod soak;
mod steps;
mod streams;
mod traffic;
mod vanishing;
mod world;
