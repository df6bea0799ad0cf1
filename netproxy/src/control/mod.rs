//! The control socket: a Unix socket that only its owner may open, with one JSON value a line.
//!
//! ```text
//! → {"version":1,"command":"prepare","guest":"desktop","site":"dublin"}
//! ← {"version":1,"ok":true,"connect_ms":21.4,"window":true,"warnings":[]}
//! → {"version":1,"command":"hold","guest":"sparrow"}
//! ← {"version":1,"ok":false,"error":"No guest is named sparrow"}
//! ```
//!
//! Every request has one answer, in order. A line is at most [`MAX_LINE`] bytes.

mod client;
mod guest_move;
mod server;

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::retarget::lease;
use crate::site::Translation;

pub use client::{Client, attach};
pub use guest_move::Move;
pub(crate) use server::{Attendant, ControlServer};

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// The longest request, in bytes.
pub const MAX_LINE: usize = 64 * 1024;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    /// All connections, and where each guest is.
    List,
    /// Warm the path to a site.
    Prepare {
        /// The guest.
        guest: String,
        /// Where it will go.
        site: String,
        /// Cancel the move when this control connection closes before the hold.
        #[serde(default)]
        tied: bool,
    },
    /// The guest is suspended: freeze its connections.
    Hold {
        /// The guest.
        guest: String,
        /// Cancel the move unless it is released within so many milliseconds, or renewed.
        #[serde(default = "default_lease")]
        lease_ms: u64,
        /// Also cancel the move when this control connection closes.
        #[serde(default)]
        tied: bool,
    },
    /// The move needs longer.
    Renew {
        /// The guest.
        guest: String,
        /// So many milliseconds from now.
        #[serde(default = "default_lease")]
        lease_ms: u64,
    },
    /// Make its connections anew, towards the new site.
    Retarget {
        /// The guest.
        guest: String,
    },
    /// The guest runs at the new site: go on.
    Release {
        /// The guest.
        guest: String,
        /// Ask the guest until it answers, at most so many milliseconds, before what is pending
        /// is sent. 0: it is known to be reachable.
        #[serde(default)]
        wait_ms: u64,
    },
    /// Go on at the old site.
    Cancel {
        /// The guest.
        guest: String,
    },
    /// The guest runs at this site, however it came there: settle whatever is open.
    Arrived {
        /// The guest.
        guest: String,
        /// Where it is.
        site: String,
    },
    /// How the guest is reached at a site, and what that has to translate.
    Translation {
        /// The guest.
        guest: String,
        /// The site.
        site: String,
    },
    /// Refuse new connections, or take them again.
    Drain {
        /// The guest; all guests if none.
        guest: Option<String>,
        /// False to take connections again.
        #[serde(default = "yes")]
        on: bool,
    },
    /// Read the configuration file again.
    Reload,
    /// Make way for the program that is now where this one was started from. That one answers.
    Upgrade,
    /// The metrics, as Prometheus reads them.
    Metrics,
}

/// How the proxy reaches a guest at a site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reach {
    /// The guest's own address.
    pub address: IpAddr,
    /// What the site has to translate; nothing where the guest's own address is routed there.
    pub translation: Option<Translation>,
}

fn default_lease() -> u64 {
    milliseconds(lease::DEFAULT)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    #[serde(flatten)]
    body: T,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    version: u32,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(flatten)]
    result: serde_json::Map<String, serde_json::Value>,
}

impl Answer {
    fn of(result: Result<serde_json::Value, String>) -> Self {
        let (ok, error, result) = match result {
            Ok(serde_json::Value::Object(map)) => (true, None, map),
            Ok(other) => (
                true,
                None,
                [("result".to_owned(), other)].into_iter().collect(),
            ),
            Err(error) => (false, Some(error), serde_json::Map::new()),
        };
        Self {
            version: VERSION,
            ok,
            error,
            result,
        }
    }
}

/// Reads one request.
fn parse(line: &str) -> Result<Request, String> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let version: Version =
        serde_json::from_str(line).map_err(|error| format!("Not a request: {error}"))?;
    if version.version != VERSION {
        return Err(format!(
            "Version {} is not spoken here: {VERSION} is",
            version.version
        ));
    }
    let envelope: Envelope<Request> =
        serde_json::from_str(line).map_err(|error| format!("Not a request: {error}"))?;
    Ok(envelope.body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests() {
        assert_eq!(
            parse(r#"{"version":1,"command":"release","guest":"g"}"#),
            Ok(Request::Release {
                guest: "g".into(),
                wait_ms: 0
            })
        );
        assert_eq!(
            parse(r#"{"version":1,"command":"hold","guest":"g"}"#),
            Ok(Request::Hold {
                guest: "g".into(),
                lease_ms: 120_000,
                tied: false
            })
        );
        assert_eq!(
            parse(r#"{"version":1,"command":"drain"}"#),
            Ok(Request::Drain {
                guest: None,
                on: true
            })
        );
        assert!(
            parse(r#"{"version":2,"command":"list"}"#)
                .unwrap_err()
                .contains("not spoken")
        );
        assert!(parse(r#"{"version":1,"command":"explode"}"#).is_err());
        assert!(parse(r#"{"command":"list"}"#).is_err());
    }

    #[test]
    fn what_is_written_can_be_read() {
        let request = Request::Prepare {
            guest: "g".into(),
            site: "b".into(),
            tied: true,
        };
        let line = serde_json::to_string(&Envelope {
            version: VERSION,
            body: request.clone(),
        })
        .unwrap();
        assert_eq!(parse(&line), Ok(request));
    }

    proptest! {
        #[test]
        fn any_line_gives_an_answer(line in ".{0,200}") {
            let _ = parse(&line);
        }
    }
}
