//! A TCP splicing proxy that re-targets live connections.
