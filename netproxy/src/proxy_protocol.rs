//! The header by which a proxy tells the server whom it speaks for: PROXY protocol, version 2
//! (haproxy.org, doc/proxy-protocol.txt, section 2.2).
//!
//! ```text
//! 12 bytes  1 byte          1 byte               2 bytes   12 or 36 bytes
//! signature version+command family+transport     length    source, destination, both ports
//! ```

use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = [
    0x0D, 0x0A, 0x0D, 0x0A, 0x00, 0x0D, 0x0A, 0x51, 0x55, 0x49, 0x54, 0x0A,
];
const PROXY: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;

/// The header for a connection of `client` to `destination`, the address that the client
/// connected to.
#[must_use]
pub fn header(client: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut header = Vec::with_capacity(52);
    header.extend_from_slice(&SIGNATURE);
    header.push(PROXY);
    match (client.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            header.extend_from_slice(&[TCP4, 0, 12]);
            header.extend_from_slice(&from.octets());
            header.extend_from_slice(&to.octets());
        }
        (from, to) => {
            let wide = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                IpAddr::V6(ip) => ip.octets(),
            };
            header.extend_from_slice(&[TCP6, 0, 36]);
            header.extend_from_slice(&wide(from));
            header.extend_from_slice(&wide(to));
        }
    }
    header.extend_from_slice(&client.port().to_be_bytes());
    header.extend_from_slice(&destination.port().to_be_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_four() {
        let header = header(
            "192.0.2.9:258".parse().unwrap(),
            "198.51.100.1:80".parse().unwrap(),
        );
        assert_eq!(&header[..12], b"\r\n\r\n\0\r\nQUIT\n");
        assert_eq!(
            header[12..],
            [
                0x21, 0x11, 0, 12, 192, 0, 2, 9, 198, 51, 100, 1, 1, 2, 0, 80
            ]
        );
    }

    #[test]
    fn version_six() {
        let header = header(
            "[2001:db8::9]:1".parse().unwrap(),
            "[2001:db8::1]:2".parse().unwrap(),
        );
        assert_eq!(header.len(), 52);
        assert_eq!(header[12..18], [0x21, 0x21, 0, 36, 0x20, 0x01]);
        assert_eq!(header[48..], [0, 1, 0, 2]);
    }
}
