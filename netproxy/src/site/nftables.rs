//! Tables of nftables: each is of one guest and for one purpose, and comes and goes as a whole.

use std::net::IpAddr;

use crate::error::Result;
use crate::program::run;

/// The family of the tables for packets with such an address, and its word in a rule.
pub(super) fn family(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

/// The type of such an address in a set.
pub(super) fn address_type(address: IpAddr) -> &'static str {
    if address.is_ipv4() {
        "ipv4_addr"
    } else {
        "ipv6_addr"
    }
}

/// The family and name of a guest's table: guests' names that differ give tables that differ.
pub(super) fn table(family: &str, purpose: &str, guest: &str) -> String {
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
pub(super) fn removal(table: &str) -> String {
    format!("add table {table}\ndelete table {table}\n")
}

/// A table as a whole, in place of one of its name.
pub(super) fn replacement(table: &str, contents: &str) -> String {
    format!("{}table {table} {{\n{contents}}}\n", removal(table))
}

/// Gives all this to the kernel, in one transaction.
pub(super) fn load(text: &str) -> Result<()> {
    run("nft", &["-f", "-"], text).map(drop)
}
