//! Taking numbers and slices off the front of bytes that may end too early, and writing several
//! slices at once.

use std::io::{self, IoSlice, Write};

/// The bytes ended where more were needed, or a number was not written in its shortest form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Bytes from outside, read from front to back. Every number is little-endian.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) const fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(crate) const fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number in groups of seven bits, the lowest first, bit 7 set in all bytes but the last.
    /// Only its shortest form is taken.
    pub(crate) fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let group = u64::from(byte & 0x7f);
            if (group << shift) >> shift != group || (byte == 0 && shift > 0) {
                return Err(Malformed);
            }
            value |= group << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    /// A signed number as a varint, the sign in its lowest bit.
    pub(crate) fn signed(&mut self) -> Result<i64, Malformed> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }
}

/// Appends a number as [`Bytes::signed`] reads it.
pub(crate) fn push_signed(to: &mut Vec<u8>, value: i64) {
    push_varint(to, ((value << 1) ^ (value >> 63)) as u64);
}

/// Appends a number as [`Bytes::varint`] reads it.
pub(crate) fn push_varint(to: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        to.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// Writes all bytes of all slices, in as few calls as the writer allows.
pub(crate) fn write_all_vectored(
    to: &mut impl Write,
    mut slices: &mut [IoSlice<'_>],
) -> io::Result<()> {
    // Skips what is empty: a writer that writes nothing of it has not ended.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match to.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_shortest_form_is_a_number() {
        assert_eq!(Bytes::new(&[0x80, 0x00]).varint(), Err(Malformed));
        assert_eq!(Bytes::new(&[0x80]).varint(), Err(Malformed));
        assert_eq!(Bytes::new(&[0xff; 10]).varint(), Err(Malformed));
        let mut bits = [0xff; 10];
        bits[9] = 0x01;
        assert_eq!(Bytes::new(&bits).varint(), Ok(u64::MAX));
        bits[9] = 0x02;
        assert_eq!(Bytes::new(&bits).varint(), Err(Malformed));
    }

    /// Takes a few bytes at a time, and is interrupted now and then.
    struct Slow(Vec<u8>, usize);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(3) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let count = bytes.len().min(self.1 % 5 + 1);
            self.0.extend(&bytes[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn slices_are_written_whole(slices in any::<Vec<Vec<u8>>>()) {
            let mut to = Slow(Vec::new(), 0);
            let mut parts: Vec<_> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
            write_all_vectored(&mut to, &mut parts).unwrap();
            prop_assert_eq!(to.0, slices.concat());
        }

        #[test]
        fn numbers_come_back(value: u64, shift in 0u32..64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            push_varint(&mut bytes, value);
            let mut from = Bytes::new(&bytes);
            prop_assert_eq!(from.varint(), Ok(value));
            prop_assert!(from.is_empty());
        }

        #[test]
        fn signed_numbers_come_back(value: i64, shift in 0u32..64) {
            let value = value >> shift;
            let mut bytes = Vec::new();
            push_signed(&mut bytes, value);
            prop_assert!((-64..64).contains(&value) == (bytes.len() == 1));
            let mut from = Bytes::new(&bytes);
            prop_assert_eq!(from.signed(), Ok(value));
            prop_assert!(from.is_empty());
        }
    }
}
