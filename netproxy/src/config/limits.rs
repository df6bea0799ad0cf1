//! `[limits]`, and how sizes and times are written.
//!
//! Values that the kernel refuses, or with which nothing could be carried, are mistakes: else they
//! would show with the first client, or in the middle of a move.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::{Mistake, mistake};

/// What the kernel takes for the times of keep-alive, in whole seconds.
const SECONDS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);
/// What it takes for the number of questions.
const PROBES: RangeInclusive<u32> = 1..=127;

/// Limits. A connection that would break one is refused; those that are open go on.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one client, to all services together: of one IPv4 address, or of all of an
    /// IPv6 network of 64 bits.
    pub connections_per_client: usize,
    /// Bytes that one connection may hold in one direction while its sink is slow, beside the
    /// kernel's own buffers.
    #[serde(deserialize_with = "buffer")]
    pub buffer: ByteSize,
    /// Bytes that all connections together may hold so.
    pub buffer_total: ByteSize,
    /// Bytes that one connection may take along at a re-target; one that holds more is closed. What
    /// it can hold at all is what the kernel lets its buffers grow to, and `buffer` each way.
    pub carry: Option<ByteSize>,
    /// How long a connection to a guest may take to open.
    #[serde(deserialize_with = "some_time")]
    pub connect: Period,
    /// How long a connection may carry nothing.
    #[serde(deserialize_with = "some_time")]
    pub idle: Period,
    /// How long it may carry nothing after one direction has ended; with 0, both end with the first.
    pub half_closed: Period,
    /// How long the last bytes may wait to be acknowledged: by the guest, when both directions have
    /// ended, and by either side, when the other one has failed.
    pub linger: Period,
    /// When a silent peer is first asked if it is there; 0 is never.
    #[serde(deserialize_with = "asked_after")]
    pub keepalive: Period,
    /// How long between such questions.
    pub keepalive_interval: Spanned<Period>,
    /// How many of them may go unanswered.
    pub keepalive_probes: Spanned<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            connections_per_client: 1_000,
            buffer: ByteSize(256 << 10),
            buffer_total: ByteSize(512 << 20),
            carry: None,
            connect: Period(Duration::from_secs(10)),
            idle: Period(Duration::from_secs(24 * 3600)),
            half_closed: Period(Duration::from_secs(3600)),
            linger: Period(Duration::from_secs(60)),
            keepalive: Period(Duration::from_secs(60)),
            keepalive_interval: Spanned::new(0..0, Period(Duration::from_secs(15))),
            keepalive_probes: Spanned::new(0..0, 8),
        }
    }
}

impl Limits {
    /// What depends on more than one value.
    pub(super) fn check(&self) -> Result<(), Mistake> {
        // Who is never asked needs neither.
        if self.keepalive.0.is_zero() {
            return Ok(());
        }
        if !SECONDS.contains(&self.keepalive_interval.get_ref().0) {
            return Err(mistake(&self.keepalive_interval, "it is 1 s to 32767 s"));
        }
        if !PROBES.contains(self.keepalive_probes.get_ref()) {
            return Err(mistake(&self.keepalive_probes, "it is 1 to 127"));
        }
        Ok(())
    }

    /// How long a peer may leave everything unanswered, keep-alive's questions or data. None where
    /// it may do so for as long as the kernel goes on sending.
    pub(crate) fn silence(&self) -> Option<Duration> {
        const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
        let asked = self
            .keepalive_interval
            .get_ref()
            .0
            .saturating_mul(*self.keepalive_probes.get_ref());
        let silence = self.keepalive.0.saturating_add(asked).min(YEAR);
        (!self.keepalive.0.is_zero()).then_some(silence)
    }
}

/// A buffer in which something can be held.
fn buffer<'de, D: Deserializer<'de>>(from: D) -> Result<ByteSize, D::Error> {
    let size = ByteSize::deserialize(from)?;
    (size.0 > 0)
        .then_some(size)
        .ok_or_else(|| D::Error::custom("it can't be 0: nothing would pass"))
}

/// A time after which a connection is ended: one that is over at once would end all of them.
fn some_time<'de, D: Deserializer<'de>>(from: D) -> Result<Period, D::Error> {
    let period = Period::deserialize(from)?;
    (!period.0.is_zero())
        .then_some(period)
        .ok_or_else(|| D::Error::custom("it can't be 0: each connection would end at once"))
}

fn asked_after<'de, D: Deserializer<'de>>(from: D) -> Result<Period, D::Error> {
    let period = Period::deserialize(from)?;
    (period.0.is_zero() || SECONDS.contains(&period.0))
        .then_some(period)
        .ok_or_else(|| D::Error::custom("it is 1 s to 32767 s, or 0 for never"))
}

/// A count of bytes: a number, or text such as "64KiB" or "1MiB".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

/// A length of time: text such as "250ms", "10s", "5m", "2h", or a number of seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(pub Duration);

#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

/// Splits "250ms" into 250 and the factor of its unit.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const UNITS: [(&str, u64); 5] = [
            ("", 1),
            ("B", 1),
            ("KiB", 1 << 10),
            ("MiB", 1 << 20),
            ("GiB", 1 << 30),
        ];
        let bytes = match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(number) => Some(number),
            NumberOrText::Text(text) => with_unit(&text, &UNITS),
        };
        bytes
            .and_then(|bytes| usize::try_from(bytes).ok())
            .map(Self)
            .ok_or_else(|| {
                D::Error::custom("a size is a number of bytes, or one with KiB, MiB or GiB")
            })
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
        let milliseconds = match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(seconds) => seconds.checked_mul(1000),
            NumberOrText::Text(text) => with_unit(&text, &UNITS),
        };
        milliseconds
            .map(|ms| Self(Duration::from_millis(ms)))
            .ok_or_else(|| {
                D::Error::custom("a time is a number of seconds, or one with ms, s, m or h")
            })
    }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    #[test]
    fn what_could_carry_nothing_is_refused_with_its_line() {
        let with = |line: &str| {
            let text = format!("version = 1\n[limits]\nconnections = 5\n{line}\n");
            Config::parse(&text, "x").map(drop)
        };
        for line in [
            "buffer = 0",
            "connect = 0",
            "idle = 0",
            "keepalive = \"500ms\"",
            "keepalive = 32768",
            "keepalive_interval = 0",
            "keepalive_interval = \"999ms\"",
            "keepalive_interval = \"10h\"",
            "keepalive_probes = 0",
            "keepalive_probes = 128",
        ] {
            let error = with(line).expect_err(line).to_string();
            assert!(error.starts_with("x:4: it "), "{line}: {error}");
        }
        for line in [
            "buffer = 1",
            "buffer_total = 0",
            "idle = \"1ms\"",
            "half_closed = \"0s\"",
            "linger = 0",
            "keepalive = 0",
            "keepalive = 0\nkeepalive_interval = 0\nkeepalive_probes = 0",
            "keepalive = 1",
            "keepalive = 32767",
            "keepalive_interval = 32767",
            "keepalive_probes = 127",
        ] {
            with(line).expect(line);
        }
    }
}
