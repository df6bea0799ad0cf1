//! The command `vmshadow`.

fn main() {}
