//! Writes an initial RAM disk: the "newc" form of cpio, as in the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`.
//!
//! ```text
//! entry = header (110 bytes of ASCII), name, NUL, to 4 bytes, data, to 4 bytes
//! archive = entries, entry "TRAILER!!!"
//! ```
//! The kernel unpacks several archives that follow one another, so an archive
//! made here may be put after another one.

/// An entry of an archive.
#[derive(Clone, Debug)]
pub enum Entry<'a> {
    /// A directory.
    Directory,
    /// A program.
    Program(&'a [u8]),
    /// A symbolic link to this path.
    Link(&'a str),
}

/// An archive of entries with their paths, without leading slash, parents first.
#[must_use]
pub fn archive(entries: &[(&str, Entry<'_>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (inode, (path, entry)) in (1..).zip(entries) {
        let (mode, data) = match entry {
            Entry::Directory => (0o040_755, &[][..]),
            Entry::Program(content) => (0o100_755, *content),
            Entry::Link(target) => (0o120_777, target.as_bytes()),
        };
        append(&mut bytes, inode, mode, path, data);
    }
    append(&mut bytes, 0, 0, "TRAILER!!!", &[]);
    bytes
}

fn append(bytes: &mut Vec<u8>, inode: u32, mode: u32, path: &str, data: &[u8]) {
    let links = 1;
    let fields = [
        inode as usize,
        mode as usize,
        0, // user
        0, // group
        links,
        0, // time of change
        data.len(),
        0, // device, major and minor
        0,
        0, // device of a device node, major and minor
        0,
        path.len() + 1,
        0, // checksum, of another form
    ];
    bytes.extend_from_slice(b"070701");
    for field in fields {
        bytes.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    bytes.extend_from_slice(path.as_bytes());
    bytes.push(0);
    pad(bytes);
    bytes.extend_from_slice(data);
    pad(bytes);
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_what_we_write() {
        let entries = [
            ("sbin", Entry::Directory),
            ("init", Entry::Program(b"#!/bin/sh\n")),
            ("sbin/reboot", Entry::Link("/init")),
        ];
        let listing = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .and_then(|mut child| {
                child.stdin.take().unwrap().write_all(&archive(&entries))?;
                child.wait_with_output()
            })
            .unwrap();
        assert!(listing.status.success());
        let text = String::from_utf8(listing.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with("sbin"),
            "{text}"
        );
        assert!(
            lines[1].starts_with("-rwxr-xr-x") && lines[1].contains(" 10 "),
            "{text}"
        );
        assert!(lines[2].ends_with("sbin/reboot -> /init"), "{text}");
    }
}
