//! Bytes as hexadecimal digits.

use serde::{Deserialize, Deserializer, Serializer, de::Error};
use std::fmt::Write;

/// Text that is not the expected number of hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Expected {0} hexadecimal digits")]
pub struct NotHexadecimal(pub(crate) usize);

pub(crate) fn format(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

pub(crate) fn parse<const N: usize>(text: &str) -> Result<[u8; N], NotHexadecimal> {
    let mut bytes = [0; N];
    parse_into(text, &mut bytes).ok_or(NotHexadecimal(N * 2))?;
    Ok(bytes)
}

pub(crate) fn parse_into(text: &str, bytes: &mut [u8]) -> Option<()> {
    if text.len() != bytes.len() * 2 {
        return None;
    }
    let digit = |c: u8| {
        char::from(c)
            .to_digit(16)
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let (pairs, _) = text.as_bytes().as_chunks::<2>();
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(())
}

/// For `#[serde(with)]`.
pub(crate) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format(bytes))
}

/// For `#[serde(with)]`.
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    let mut bytes = vec![0; text.len() / 2];
    match parse_into(&text, &mut bytes) {
        Some(()) => Ok(bytes),
        None => Err(D::Error::custom("Expected pairs of hexadecimal digits")),
    }
}
