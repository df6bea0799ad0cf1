//! The only process of a test guest.

fn main() {}
