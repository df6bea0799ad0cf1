//! What is said over the control socket: pure.
//!
//! ```text
//! → {"version":1,"command":"set","bandwidth":50000000}
//! ← {"version":1,"ok":{"set":{"bandwidth":50000000,"downtime_ms":300}}}
//! → {"version":1,"command":"cancel"}
//! ← {"version":1,"error":"g1 is handed over to b already"}
//! ```
//!
//! Every request has one answer, in order; that to a cancel comes when the move has ended. A line
//! is at most [`MAX_LINE`] bytes.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result as CrateResult};
use crate::handover::journal::Role;
use crate::whereabouts::Whereabouts;
use crate::wire::Purpose;

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The longest line, in bytes.
pub const MAX_LINE: usize = 16 << 10;

/// What can be asked of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// How the move goes.
    Status,
    /// Give the move up; answered when it has ended.
    Cancel,
    /// Other limits.
    Set(Change),
}

/// A limit of what is sent, in bits a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Bandwidth {
    /// At most so much.
    Limit(u64),
    /// `"none"`: as much as the link takes.
    None(Unlimited),
}

/// The word for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unlimited {
    /// No limit.
    None,
}

impl Bandwidth {
    /// Of bytes a second.
    #[must_use]
    pub fn of_bytes(bytes: Option<u64>) -> Self {
        match bytes {
            Some(bytes) => Self::Limit(bytes.saturating_mul(8)),
            None => Self::None(Unlimited::None),
        }
    }

    /// Bytes a second, if there is a limit.
    #[must_use]
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Limit(bits) => Some(bits / 8),
            Self::None(_) => None,
        }
    }
}

/// What is to be changed; what is absent stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The most that is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// The downtime to reach, ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
}

/// How a move goes. Figures are absent where nothing is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Which end of the move this is.
    pub role: Role,
    /// The move, the same at both ends.
    pub move_id: String,
    /// The guest's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// Its domain id here, at the source.
    pub domid: Option<u32>,
    /// The other host.
    pub peer: String,
    /// The worker's process id.
    pub pid: u32,
    /// What is being done.
    pub phase: String,
    /// Seconds since the move began.
    pub seconds: f64,
    /// The guest's memory, bytes.
    pub guest_bytes: u64,
    /// Bytes on the link so far: sent at the source, received at the destination.
    pub wire_bytes: u64,
    /// What crosses of late, bytes a second.
    pub rate: Option<f64>,
    /// The pass over dirty pages that is under way, from 1.
    pub round: u32,
    /// Pages of this round that were looked at.
    pub pages_done: u64,
    /// Pages of this round.
    pub pages: u64,
    /// Memory that the guest changes, bytes a second.
    pub dirty_rate: Option<f64>,
    /// Memory that is still to be looked at: the rest of this round, and what has changed since,
    /// bytes.
    pub remaining_bytes: Option<u64>,
    /// When the guest will run at the destination, in seconds from now.
    pub eta_seconds: Option<f64>,
    /// How long it would be silent if it were suspended now, seconds.
    pub predicted_downtime: Option<f64>,
    /// The downtime that is to be reached, ms.
    pub downtime_ms: u64,
    /// The most that is sent.
    pub bandwidth: Bandwidth,
    /// It waits to begin anew, and holds nothing meanwhile: another move of the guest may be at work.
    #[serde(default)]
    pub waiting: bool,
    /// The move is being given up.
    pub cancelling: bool,
    /// It is too late for that.
    pub committed: bool,
}

/// How a move came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The guest is at the destination.
    Moved,
    /// The destination has a shadow of the guest, which stays where it is.
    Kept,
    /// The move was given up because somebody asked for it.
    Cancelled,
    /// The move failed.
    Failed,
}

/// What became of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// How it came out.
    pub outcome: Outcome,
    /// Where the guest is. Workers of earlier versions don't say.
    #[serde(default)]
    pub guest: Whereabouts,
    /// Where the guest is, and what went wrong, for people.
    pub what: String,
}

impl Ended {
    /// Of a move that ended like this; `what` says it for people.
    #[must_use]
    pub fn of(
        result: &CrateResult<()>,
        purpose: Purpose,
        guest: Whereabouts,
        what: String,
    ) -> Self {
        let outcome = match result {
            Ok(()) if purpose == Purpose::Shadow => Outcome::Kept,
            Ok(()) => Outcome::Moved,
            Err(Error::Cancelled) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
        Ended {
            outcome,
            guest,
            what,
        }
    }
}

/// What is said of a request that was carried out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Done {
    /// [`Request::Status`].
    Status(Box<Status>),
    /// [`Request::Cancel`].
    Cancel(Ended),
    /// [`Request::Set`]: the limits that hold now.
    Set(Change),
}

#[derive(Debug, Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    body: T,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Ok(Done),
    Error(String),
}

/// The version alone: the rest of another one can't be judged.
fn check_version(line: &str, what: &str) -> Result<(), String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let version: Version =
        serde_json::from_str(line).map_err(|error| format!("Not {what}: {error}"))?;
    if version.version == VERSION {
        Ok(())
    } else {
        Err(format!(
            "Version {} of the control protocol is not spoken here: {VERSION} is",
            version.version
        ))
    }
}

/// Reads a request.
///
/// # Errors
/// Says what is wrong with it.
pub fn read_request(line: &str) -> Result<Request, String> {
    check_version(line, "a request")?;
    let envelope: Envelope<Request> =
        serde_json::from_str(line).map_err(|error| format!("Not a request: {error}"))?;
    Ok(envelope.body)
}

/// Writes a request as a line.
pub(super) fn write_request(request: &Request) -> serde_json::Result<String> {
    write(request)
}

/// Reads an answer.
pub(super) fn read_answer(line: &str) -> Result<Result<Done, String>, String> {
    check_version(line, "an answer")?;
    let envelope: Envelope<Answer> =
        serde_json::from_str(line).map_err(|error| format!("Not an answer: {error}"))?;
    Ok(match envelope.body {
        Answer::Ok(done) => Ok(done),
        Answer::Error(error) => Err(error),
    })
}

/// Writes an answer as a line.
pub(super) fn write_answer(answer: Result<Done, String>) -> serde_json::Result<String> {
    write(match answer {
        Ok(done) => Answer::Ok(done),
        Err(error) => Answer::Error(error),
    })
}

fn write(body: impl Serialize) -> serde_json::Result<String> {
    let mut line = serde_json::to_string(&Envelope {
        version: VERSION,
        body,
    })?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_in_their_written_form() {
        let set = |bandwidth, downtime_ms| {
            Ok(Request::Set(Change {
                bandwidth,
                downtime_ms,
            }))
        };
        assert_eq!(
            read_request(r#"{"version":1,"command":"set","bandwidth":50000000}"#),
            set(Some(Bandwidth::Limit(50_000_000)), None)
        );
        assert_eq!(
            read_request(r#"{"version":1,"command":"set","bandwidth":"none","downtime_ms":40}"#),
            set(Some(Bandwidth::of_bytes(None)), Some(40))
        );
        assert_eq!(
            read_request(r#"{"version":1,"command":"cancel"}"#),
            Ok(Request::Cancel)
        );
        for bad in [
            r#"{"version":1,"command":"set","bandwidth":"some"}"#,
            r#"{"version":1,"command":"explode"}"#,
            r#"{"command":"status"}"#,
            "",
        ] {
            assert!(read_request(bad).is_err(), "{bad}");
        }
        let other = read_request(r#"{"version":2,"command":"status"}"#).unwrap_err();
        assert!(other.contains("not spoken"), "{other}");
    }

    #[test]
    fn a_worker_that_knows_of_no_waiting_is_understood() {
        let status = crate::control::shared::tests::a_move(Role::Source, 1).status();
        let mut older = serde_json::to_value(&status).unwrap();
        assert!(older.as_object_mut().unwrap().remove("waiting").is_some());
        assert_eq!(serde_json::from_value::<Status>(older).unwrap(), status);
    }

    #[test]
    fn a_shadow_that_is_there_is_no_move() {
        let ended = |purpose| {
            let ended = Ended::of(&Ok(()), purpose, Whereabouts::Source, String::new());
            serde_json::to_value(ended.outcome).unwrap()
        };
        assert_eq!(ended(Purpose::Shadow), "kept");
        assert_eq!(ended(Purpose::Move), "moved");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let changes = [
            Change::default(),
            Change {
                bandwidth: Some(Bandwidth::of_bytes(Some(32_000))),
                downtime_ms: Some(0),
            },
            Change {
                bandwidth: Some(Bandwidth::of_bytes(None)),
                downtime_ms: None,
            },
        ];
        for change in changes {
            let request = Request::Set(change);
            assert_eq!(
                read_request(&write_request(&request).unwrap()),
                Ok(request.clone())
            );
            let answer = Ok(Done::Set(change));
            assert_eq!(
                read_answer(&write_answer(answer.clone()).unwrap()),
                Ok(answer)
            );
        }
        let ended = Ended {
            outcome: Outcome::Cancelled,
            guest: Whereabouts::Source,
            what: "g1 was not moved and runs here".into(),
        };
        let answer = Ok(Done::Cancel(ended));
        assert_eq!(
            read_answer(&write_answer(answer.clone()).unwrap()),
            Ok(answer)
        );
        let refused = Err("too late".to_owned());
        assert_eq!(
            read_answer(&write_answer(refused.clone()).unwrap()),
            Ok(refused)
        );
    }

    #[test]
    fn where_the_guest_is_can_be_left_out() {
        let ended = |json: &str| {
            let line = format!(r#"{{"version":1,"ok":{{"cancel":{json}}}}}"#);
            match read_answer(&line).unwrap() {
                Ok(Done::Cancel(ended)) => ended.guest,
                other => panic!("{other:?}"),
            }
        };
        let before = ended(r#"{"outcome":"cancelled","what":"g1 runs here"}"#);
        assert_eq!(before, Whereabouts::Unknown);
        let now = ended(r#"{"outcome":"moved","guest":"destination","what":"g1 has moved"}"#);
        assert_eq!(now, Whereabouts::Destination);
    }

    proptest! {
        #[test]
        fn any_line_is_answered_or_refused(line in ".{0,200}") {
            let _ = read_request(&line);
            let _ = read_answer(&line);
        }
    }
}
