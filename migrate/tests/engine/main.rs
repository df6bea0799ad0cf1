//! The whole engine, both ends, over guests that are replayed: the codec, the protocol, the
//! journals, the image on disk. Only the guest and the wire are in this process.

#![allow(clippy::unwrap_used)]

mod broken;
mod foretold;
mod lying;
mod out_of_time;
mod random;
mod scene;
mod shared;
mod slowed;
mod taken;
mod whole;
