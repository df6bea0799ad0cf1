//! Two real Xen sites in QEMU, for the end-to-end tests.
