//! Moving a running guest: what changed, how it is encoded, how it crosses, how it is handed over.
