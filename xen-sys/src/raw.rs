//! The generated bindings: Xen's own names, nothing checked.
//!
//! Everything that can be done through the safe modules should be; this module is public for
//! Xen's constants (`XEN_DOMCTL_PFINFO_*`, `HVM_PARAM_*`, ...), which are named here as in the
//! headers they come from.

#![allow(
    missing_docs,
    unsafe_op_in_unsafe_fn,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    improper_ctypes,
    unnecessary_transmutes,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks
)]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
