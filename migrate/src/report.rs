//! What a move did, in figures: measured, for users and for benchmarks.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::codec::{Class, PagesByTechnique};
use crate::connections::Kept;
use crate::error::{Error, chain};
use crate::retry::Interruption;
use crate::rounds::{Outlook, Prediction, Share, Stop, seconds};
use crate::whereabouts::Whereabouts;

/// How dirty pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// The hypervisor logs them.
    LogDirty,
    /// Every page is digested and compared.
    Scan,
}

impl std::fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TrackerKind::LogDirty => "log-dirty",
            TrackerKind::Scan => "scan",
        })
    }
}

/// One pass over the dirty pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Round {
    /// Pages looked at. What follows, but for `compressed`, adds up to them.
    pub pages: u64,
    /// Of these, not sent: the destination has them already.
    pub same: u64,
    /// Of these, sent as a new type: it has the content already.
    pub retyped: u64,
    /// Of these, all zero.
    pub zero: u64,
    /// Of these, sent as the number of another page with that content.
    pub reference: u64,
    /// Of these, sent as what changed in them.
    pub delta: u64,
    /// Of these, sent as the place of what the destination has of other guests of the trust group.
    pub shared: u64,
    /// Of these, sent with their content.
    pub raw: u64,
    /// Of the raw pages and deltas, how many each technique wrote.
    pub compressed: PagesByTechnique,
    /// Of these, holes and other pages without content.
    pub no_data: u64,
    /// Of these, left for a later round: page tables that can't be translated while the guest
    /// runs.
    pub deferred: u64,
    /// Besides these pages, hot ones that were held back for a later round.
    pub held: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    #[serde(rename = "seconds", with = "seconds")]
    pub took: Duration,
}

impl Round {
    /// Counts a page that was sent.
    pub(crate) const fn count(&mut self, class: Class) {
        let count = match class {
            Class::None => &mut self.no_data,
            Class::Zero => &mut self.zero,
            Class::Raw | Class::Noise => &mut self.raw,
            Class::Same => &mut self.retyped,
            Class::Reference => &mut self.reference,
            Class::Delta => &mut self.delta,
            Class::Shared => &mut self.shared,
        };
        *count += 1;
    }

    /// Pages that were sent, in whatever form.
    #[must_use]
    pub const fn sent(&self) -> u64 {
        let known = self.reference + self.delta + self.shared;
        self.no_data + self.zero + self.raw + self.retyped + known
    }

    /// Pages that were sent with content, and one in 16 of the others that were sent: about what
    /// they cost.
    #[must_use]
    pub const fn with_content(&self) -> u64 {
        let content = self.raw + self.reference + self.delta + self.shared;
        content + self.sent().saturating_sub(content) / 16
    }
}

/// The guest's silence and what it went into.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Downtime {
    /// From the request to suspend until the source heard that the guest runs again.
    #[serde(rename = "seconds", with = "seconds")]
    pub total: Duration,
    /// Its parts at both sites, by name, in seconds.
    pub parts: BTreeMap<String, f64>,
}

/// What is known of the link.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Link {
    /// The shortest round trip seen, ms.
    pub rtt_ms: f64,
    /// The rate at which the first round crossed, Mbit/s.
    pub mbit: f64,
    /// What it carries, as far as that was found out, Mbit/s; none where it was not, and where there
    /// was a limit.
    pub carries_mbit: Option<f64>,
    /// The connections that pages went by; besides them there is one for all else, where there are
    /// more than one.
    pub connections: u32,
    /// Whether these went from worker to worker, within TLS; else they went through ssh.
    pub direct: bool,
    /// The kernel's congestion control that this side sent by; none where ssh has no connection of
    /// its own.
    pub congestion: Option<String>,
}

/// What was foretold of a move, to be compared with what came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Predicted {
    /// Before it began, from earlier moves to the same site; none before the first.
    pub at_start: Option<Prediction>,
    /// After round 1.
    pub after_first_round: Option<Prediction>,
}

/// Memory of the two workers' own: what no file can take back. The most that was seen at the ends
/// of rounds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryOfBoth {
    /// At the source, in bytes.
    pub source_bytes: u64,
    /// At the destination, in bytes; 0 where the move didn't come to a last round.
    pub destination_bytes: u64,
}

/// The memory that this process has of its own now, in bytes; 0 where the kernel doesn't say.
#[must_use]
pub fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

/// That the guest was slowed down while it was copied.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SlowedDown {
    /// What it had in the end of the processor time that it may use otherwise, in percent.
    pub share: Share,
    /// How long it was slowed down, more and more.
    pub seconds: f64,
}

/// A whole move.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The format of this report.
    pub version: u32,
    /// The guest's name.
    pub domain: String,
    /// The guest's UUID.
    pub uuid: String,
    /// "pv" or "pvh".
    pub kind: String,
    /// This host.
    pub source: String,
    /// Where it went, as the operator named it.
    pub destination: String,
    /// "moved", or "failed: " and the reason.
    pub outcome: String,
    /// Where the guest is. It is looked for when all is over, and unknown until then.
    pub guest: Whereabouts,
    /// How dirty pages were found.
    pub tracker: Option<TrackerKind>,
    /// The guest's memory.
    pub guest_bytes: u64,
    /// All bytes that this side wrote to the link and read from it, in all attempts.
    pub wire_bytes: u64,
    /// From the command's start until the guest's old domain was gone.
    #[serde(rename = "seconds", with = "seconds")]
    pub took: Duration,
    /// Attempts that ended with their link, before the last one, of which the rest tells.
    pub interruptions: Vec<Interruption>,
    /// Phases in their order: name and seconds.
    pub phases: Vec<(String, f64)>,
    /// The guest's silence.
    pub downtime: Downtime,
    /// The link.
    pub link: Link,
    /// Pages of which the destination had something at the start: its shadow's.
    pub recalled: u64,
    /// Contents that the destination shares, of other guests of the trust group.
    pub shareable: u64,
    /// What was foretold: of `seconds`, `wire_bytes` and `downtime`.
    pub predicted: Predicted,
    /// Why pre-copy ended.
    pub stop: Option<Stop>,
    /// Whether the guest was slowed down meanwhile.
    pub slowed_down: Option<SlowedDown>,
    /// Each pass, the last one with the guest suspended.
    pub rounds: Vec<Round>,
    /// Whether the verify mode compared all memory at both sides.
    pub verified: bool,
    /// What became of connections that an edge kept; none where the guest has no edge.
    pub connections: Option<Kept>,
    /// What the two workers needed.
    pub memory: MemoryOfBoth,
}

impl Report {
    /// The outcome of a move that ended with `error`.
    #[must_use]
    pub fn failed(error: &Error) -> String {
        format!("failed: {}", chain(error))
    }
}

/// The version of [`Report`]'s format.
pub const REPORT_VERSION: u32 = 6;

/// Times phases one after the other.
#[derive(Debug)]
pub struct Stopwatch {
    start: Instant,
    last: Instant,
    phases: Vec<(String, f64)>,
}

impl Default for Stopwatch {
    fn default() -> Self {
        let now = Instant::now();
        Stopwatch {
            start: now,
            last: now,
            phases: Vec::new(),
        }
    }
}

impl Stopwatch {
    /// What ended now is called `name`.
    pub fn lap(&mut self, name: &str) -> Duration {
        let now = Instant::now();
        let took = now - self.last;
        self.last = now;
        self.phases.push((name.to_owned(), rounded(took)));
        took
    }

    /// Since the start.
    pub fn total(&self) -> Duration {
        self.start.elapsed()
    }

    /// What was timed.
    pub fn phases(&self) -> &[(String, f64)] {
        &self.phases
    }
}

/// Seconds to a tenth of a millisecond.
pub fn rounded(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e4).round() / 1e4
}

/// What a worker tells whoever watches, while it works.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// A phase has begun.
    Phase(&'static str),
    /// Something the operator should know, that doesn't stop the move.
    Warning(String),
    /// Within a round.
    Pages {
        /// Which round, from 1.
        round: u32,
        /// Pages looked at so far.
        done: u64,
        /// Pages of this round.
        total: u64,
        /// Bytes written to the link since the start.
        wire_bytes: u64,
        /// What is known of what comes.
        outlook: Outlook,
    },
    /// A round has ended.
    Round {
        /// Which, from 1.
        number: u32,
        /// What it did.
        round: Round,
        /// Pages expected dirty now.
        left: u64,
        /// Of these, hot ones.
        hot: u64,
    },
}

/// Watches a move.
pub trait Observer: Send {
    /// Something happened.
    fn notice(&mut self, progress: Progress);
}
