//! What earlier moves from this host have cost: what the next one will take can be told from it.
//!
//! One small file, `/var/lib/vmshadow/costs.json`, the newest move last. It is only ever of help: a
//! file that is missing, damaged or of another version counts as none, and is written anew.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::directories::Directories;
use crate::error::{IoContext, Result};
use crate::report::Report;
use crate::rounds::{FixedCost, Prediction};

/// The version of the file's format.
pub const VERSION: u32 = 1;

/// So many moves are remembered.
const KEPT: usize = 64;

/// So many of the newest tell what the next one costs.
const RECENT: usize = 9;

/// The largest file that is read.
const LONGEST: u64 = 1 << 20;

/// A move that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Past {
    /// Where it went, as the operator named it.
    pub peer: String,
    /// The guest's UUID.
    pub uuid: String,
    /// Its memory.
    pub guest_bytes: u64,
    /// All that crossed.
    pub wire_bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// The guest's silence.
    pub downtime: f64,
    /// Of that, what is spent whatever is left to send.
    pub fixed: FixedCost,
    /// What the link carried, bytes a second, if that was found out.
    #[serde(default)]
    pub link: Option<f64>,
    /// Seconds that it took after the handover to keep what the guest left as a shadow; nothing
    /// where none was kept.
    #[serde(default)]
    pub keeping: Option<f64>,
}

impl Past {
    /// Of a move that succeeded, by its report.
    #[must_use]
    pub fn of(report: &Report) -> Self {
        let part = |name: &str| report.downtime.parts.get(name).copied().unwrap_or(0.0);
        let lap = |wanted: &str| {
            let mut named = report.phases.iter().filter(|(name, _)| name == wanted);
            named.next().map(|(_, seconds)| *seconds)
        };
        let phase = |wanted: &str| lap(wanted).unwrap_or(0.0);
        // What the destination did, and half a round trip there and back. Not what was asked for
        // beside the move.
        let restore: f64 = report
            .downtime
            .parts
            .iter()
            .filter(|(name, _)| name.starts_with("destination: ") && !name.ends_with(": verify"))
            .map(|(_, seconds)| seconds)
            .sum();
        Past {
            peer: report.destination.clone(),
            uuid: report.uuid.clone(),
            link: report.link.carries_mbit.map(|mbit| mbit * 125_000.0),
            guest_bytes: report.guest_bytes,
            wire_bytes: report.wire_bytes,
            seconds: report.took.as_secs_f64(),
            downtime: report.downtime.total.as_secs_f64(),
            keeping: lap("keep a shadow"),
            fixed: FixedCost {
                suspend: part("suspend"),
                restore: restore + part("confirm") + report.link.rtt_ms / 1e3,
                commit: part("commit and unpause"),
                set_up: phase("connect") + phase("offer"),
                clean_up: phase("clean up"),
            },
        }
    }
}

/// What earlier moves tell of the next one.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Earlier {
    /// What its handover will cost.
    pub fixed: FixedCost,
    /// What all of it will take, where one like it is known.
    pub prediction: Option<Prediction>,
    /// What the link to that site carries, bytes a second, where a move has found that out.
    pub link: Option<f64>,
}

/// The moves of one host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Costs {
    path: PathBuf,
    moves: Vec<Past>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    version: u32,
    moves: Vec<Past>,
}

impl Costs {
    /// What this host remembers.
    #[must_use]
    pub fn read(directories: &Directories) -> Self {
        let path = directories.state.join("costs.json");
        let moves = read(&path).unwrap_or_default();
        Costs { path, moves }
    }

    /// What a handover to `peer` costs: the median of the last moves there, else of the last moves
    /// anywhere; nothing before the first. `kept` bytes of the guest are kept as a shadow then.
    #[must_use]
    pub fn fixed(&self, peer: &str, kept: u64) -> Option<FixedCost> {
        let there = self.recent(|past| past.peer == peer);
        let moves = match there.is_empty() {
            true => self.recent(|_| true),
            false => there,
        };
        let keeping = median(moves.iter().filter_map(|past| {
            let scale = kept as f64 / past.guest_bytes.max(1) as f64;
            past.keeping.map(|seconds| seconds * scale)
        }));
        let of = |part: fn(&FixedCost) -> f64| median(moves.iter().map(|past| part(&past.fixed)));
        Some(FixedCost {
            set_up: of(|cost| cost.set_up)?,
            suspend: of(|cost| cost.suspend)?,
            restore: of(|cost| cost.restore)?,
            commit: of(|cost| cost.commit)?,
            clean_up: of(|cost| cost.clean_up)? + keeping.unwrap_or(0.0),
        })
    }

    /// What moving this guest to `peer` will take, by what it took before: this guest, else others
    /// in the proportion of their memory. Nothing where none has gone there.
    #[must_use]
    pub fn predict(&self, uuid: &str, peer: &str, guest_bytes: u64) -> Option<Prediction> {
        let same = self.recent(|past| past.peer == peer && past.uuid == uuid);
        let moves = match same.is_empty() {
            true => self.recent(|past| past.peer == peer),
            false => same,
        };
        let scale = |past: &Past| guest_bytes as f64 / past.guest_bytes.max(1) as f64;
        let of = |part: &dyn Fn(&Past) -> f64| median(moves.iter().map(|past| part(past)));
        Some(Prediction {
            seconds: of(&|past| past.seconds * scale(past))?,
            bytes: of(&|past| past.wire_bytes as f64 * scale(past))? as u64,
            downtime: of(&|past| past.downtime)?,
        })
    }

    /// What the link to `peer` carried in the newest move that found it out, bytes a second.
    #[must_use]
    pub fn link(&self, peer: &str) -> Option<f64> {
        let mut there = self.moves.iter().rev().filter(|past| past.peer == peer);
        there.find_map(|past| past.link)
    }

    /// All of it, of a guest that is to go to `peer`, where `kept` bytes of it are kept as a shadow.
    #[must_use]
    pub fn earlier(&self, uuid: &str, peer: &str, guest_bytes: u64, kept: u64) -> Earlier {
        Earlier {
            fixed: self.fixed(peer, kept).unwrap_or_default(),
            prediction: self.predict(uuid, peer, guest_bytes),
            link: self.link(peer),
        }
    }

    /// The newest of some.
    fn recent(&self, which: impl Fn(&Past) -> bool) -> Vec<&Past> {
        let mut found: Vec<_> = self.moves.iter().rev().filter(|past| which(past)).collect();
        found.truncate(RECENT);
        found
    }

    /// Remembers one more move.
    ///
    /// # Errors
    /// [`crate::Error::Io`] where it can't be written; the file is as it was then.
    pub fn note(&mut self, past: Past) -> Result<()> {
        // Another worker may have written meanwhile.
        self.moves = read(&self.path).unwrap_or_default();
        self.moves.push(past);
        let surplus = self.moves.len().saturating_sub(KEPT);
        self.moves.drain(..surplus);
        let failed = || format!("Can't write {}", self.path.display());
        let document = Document {
            version: VERSION,
            moves: self.moves.clone(),
        };
        let text = serde_json::to_vec_pretty(&document)
            .map_err(std::io::Error::from)
            .context(failed)?;
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let name = format!(".costs.{}", std::process::id());
        let unfinished = directory.join(name);
        let written = fs::File::create(&unfinished)
            .and_then(|mut file| file.write_all(&text))
            .and_then(|()| fs::rename(&unfinished, &self.path));
        if written.is_err() {
            // It may not even be there.
            let _ = fs::remove_file(&unfinished);
        }
        written.context(failed)
    }
}

/// Nothing where there is no such file, or it can't be read.
fn read(path: &Path) -> Option<Vec<Past>> {
    let length = fs::metadata(path).ok()?.len();
    if length > LONGEST {
        return None;
    }
    let document: Document = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (document.version == VERSION).then_some(document.moves)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn past(peer: &str, uuid: &str, mebibytes: u64, suspend: f64) -> Past {
        Past {
            peer: peer.into(),
            uuid: uuid.into(),
            guest_bytes: mebibytes << 20,
            wire_bytes: mebibytes << 18,
            seconds: mebibytes as f64 / 10.0,
            downtime: suspend + 0.5,
            fixed: FixedCost {
                set_up: 2.0,
                suspend,
                restore: 0.3,
                commit: 0.1,
                clean_up: 0.5,
            },
            link: None,
            keeping: None,
        }
    }

    fn host() -> (tempfile::TempDir, Directories) {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::under(root.path());
        directories.create().unwrap();
        (root, directories)
    }

    #[test]
    fn what_was_seen_is_foretold() {
        let (_root, directories) = host();
        let mut costs = Costs::read(&directories);
        assert_eq!(costs.fixed("b", 0), None);
        assert_eq!(costs.predict("u", "b", 1), None);
        for suspend in [0.1, 0.2, 9.0] {
            costs.note(past("b", "u", 100, suspend)).unwrap();
        }
        costs.note(past("c", "v", 100, 0.7)).unwrap();
        let costs = Costs::read(&directories);
        // One that took for ever is no rule.
        assert_eq!(costs.fixed("b", 0).unwrap().suspend, 0.2);
        assert_eq!(costs.fixed("c", 0).unwrap().suspend, 0.7);
        // A host that nobody went to yet.
        assert_eq!(costs.fixed("d", 0).unwrap().suspend, 0.7);
        assert_eq!(costs.predict("u", "d", 1), None);
        let predicted = costs.predict("u", "b", 100 << 20).unwrap();
        assert_eq!((predicted.seconds, predicted.bytes), (10.0, 25 << 20));
        // Another guest of twice the memory.
        let predicted = costs.predict("w", "b", 200 << 20).unwrap();
        assert_eq!((predicted.seconds, predicted.bytes), (20.0, 50 << 20));
    }

    #[test]
    fn a_larger_guest_takes_longer_to_keep() {
        let (_root, directories) = host();
        let mut costs = Costs::read(&directories);
        let keeping = Some(2.0);
        costs.note(past("b", "u", 100, 0.1)).unwrap();
        let kept = past("b", "u", 100, 0.1);
        costs.note(Past { keeping, ..kept }).unwrap();
        let clean_up = |kept| costs.fixed("b", kept).unwrap().clean_up;
        assert_eq!(clean_up(0), 0.5);
        assert_eq!(clean_up(200 << 20), 4.5);
    }

    #[test]
    fn the_newest_that_is_known_of_a_link_counts() {
        let (_root, directories) = host();
        let mut costs = Costs::read(&directories);
        for (peer, link) in [
            ("b", Some(6e6)),
            ("b", Some(5e6)),
            ("b", None),
            ("c", Some(9e6)),
        ] {
            let past = past(peer, "u", 1, 0.1);
            costs.note(Past { link, ..past }).unwrap();
        }
        let costs = Costs::read(&directories);
        assert_eq!(costs.link("b"), Some(5e6));
        assert_eq!(costs.link("d"), None);
        assert_eq!(costs.earlier("u", "c", 1, 1).link, Some(9e6));
        // What was written before it was looked at.
        let old = serde_json::to_string(&past("b", "u", 1, 0.1)).unwrap();
        let old = old.replace(",\"link\":null", "");
        assert!(!old.contains("link"));
        assert_eq!(serde_json::from_str::<Past>(&old).unwrap().link, None);
    }

    #[test]
    fn only_the_newest_are_kept() {
        let (_root, directories) = host();
        let mut costs = Costs::read(&directories);
        for number in 0..KEPT + 10 {
            costs.note(past("b", "u", 100, number as f64)).unwrap();
        }
        let costs = Costs::read(&directories);
        assert_eq!(costs.moves.len(), KEPT);
        assert_eq!(costs.moves[0].fixed.suspend, 10.0);
    }

    #[test]
    fn a_damaged_file_counts_as_none_and_is_written_anew() {
        let (_root, directories) = host();
        let path = directories.state.join("costs.json");
        for damaged in ["", "{", r#"{"version":2,"moves":[]}"#] {
            fs::write(&path, damaged).unwrap();
            let mut costs = Costs::read(&directories);
            assert_eq!(costs.fixed("b", 0), None);
            costs.note(past("b", "u", 1, 1.0)).unwrap();
            assert!(Costs::read(&directories).fixed("b", 0).is_some());
        }
        let unfinished = fs::read_dir(&directories.state).unwrap().any(|entry| {
            let name = entry.unwrap().file_name();
            name.to_string_lossy().starts_with(".costs")
        });
        assert!(!unfinished);
    }
}
