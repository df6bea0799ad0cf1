//! Tables of nftables: each is for one purpose, and comes and goes as a whole.

use std::net::IpAddr;

use crate::error::Result;
use crate::program::run;

/// The family of the tables for packets with such an address, and its word in a rule.
pub(crate) fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// The type of such an address in a set.
pub(crate) fn address_type(address: IpAddr) -> &'static str {
    if address.is_ipv4() {
        "ipv4_addr"
    } else {
        "ipv6_addr"
    }
}

/// The family and name of a guest's table: guests' names that differ give tables that differ.
pub(crate) fn table(family: &str, purpose: &str, guest: &str) -> String {
    let mut table = format!("{family} vmshadow_{purpose}_");
    for byte in guest.bytes() {
        if byte.is_ascii_alphanumeric() {
            table.push(char::from(byte));
        } else {
            table.push_str(&format!("_{byte:02x}"));
        }
    }
    table
}

/// A table's removal, whether it is there or not, as `nft -f` reads it.
pub(crate) fn removal(table: &str) -> String {
    format!("add table {table}\ndelete table {table}\n")
}

/// A table as a whole, in place of one of its name.
pub(crate) fn replacement(table: &str, contents: &str) -> String {
    format!("{}table {table} {{\n{contents}}}\n", removal(table))
}

/// Gives all this to the kernel, in one transaction.
pub(crate) fn load(text: &str) -> Result<()> {
    run("nft", &["-f", "-"], text).map(drop)
}

/// What the kernel has of a table, or of one of its sets: `kind` is the word for that.
pub(crate) fn list(kind: &str, name: &str) -> Result<String> {
    let mut arguments = vec!["list", kind];
    arguments.extend(name.split(' '));
    run("nft", &arguments, "")
}
