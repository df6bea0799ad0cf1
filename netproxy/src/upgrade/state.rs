//! What one program hands to the next: the format.
//!
//! ```text
//!  8 bytes "netproxy" │ version u32 LE │ length of the JSON u64 LE │ JSON │ bytes of the flows
//! ```
//!
//! Descriptors are in it by their numbers, and the flows' bytes follow in the order in which the
//! JSON names them. A program that does not know the version is never given it: see
//! [`super::ANSWER`].

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::splice::End;
use crate::sys;

const MAGIC: &[u8; 8] = b"netproxy";
/// The version of the format.
pub(crate) const VERSION: u32 = 1;

/// A descriptor that goes from one program to the next under the same number.
#[derive(Debug)]
pub(crate) struct Handed(pub OwnedFd);

impl Serialize for Handed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i32(self.0.as_raw_fd())
    }
}

impl<'de> Deserialize<'de> for Handed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i32::deserialize(deserializer)?;
        sys::adopt(number)
            .map(Self)
            .map_err(|error| serde::de::Error::custom(format!("descriptor {number}: {error}")))
    }
}

/// Microseconds from a moment to now, or from now to a moment.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Micros(u64);

impl Micros {
    pub(crate) fn of(time: Duration) -> Self {
        Self(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
    }

    pub(crate) fn time(self) -> Duration {
        Duration::from_micros(self.0)
    }

    /// How long ago `then` was.
    pub(crate) fn since(then: Instant, now: Instant) -> Self {
        Self::of(now.saturating_duration_since(then))
    }

    /// The moment so long ago; `now`, if this host had not started then.
    pub(crate) fn ago(self, now: Instant) -> Instant {
        now.checked_sub(self.time()).unwrap_or(now)
    }

    /// How long it is to `then`.
    pub(crate) fn until(then: Instant, now: Instant) -> Self {
        Self::of(then.saturating_duration_since(now))
    }

    /// The moment so far ahead.
    pub(crate) fn ahead(self, now: Instant) -> Instant {
        now.checked_add(self.time()).unwrap_or(now)
    }
}

/// A piece of a flow's queue.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum SegmentState {
    Bytes {
        length: u64,
        #[serde(skip)]
        bytes: Vec<u8>,
    },
    Pipe {
        reader: Handed,
        writer: Handed,
        capacity: usize,
        filled: usize,
    },
}

/// One direction of a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FlowState {
    pub end: End,
    pub bulk: u8,
    pub may_splice: bool,
    pub written: u64,
    /// None in what an older program wrote.
    #[serde(default)]
    pub given: Option<u64>,
    #[serde(default)]
    pub again: usize,
    pub segments: Vec<SegmentState>,
}

/// A released connection whose guest has not answered yet.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProvingState {
    pub released: Micros,
    pub in_flight: u32,
    pub base: u64,
    pub rtt: Micros,
    pub covered: bool,
    pub answered: bool,
    #[serde(default)]
    pub went_back: bool,
    pub next_probe: Micros,
    pub probe_wait: Micros,
    pub next_mark: Micros,
}

/// The side of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum UpstreamState {
    Waiting,
    Connecting(Handed, Micros),
    Open(Handed),
}

/// One connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ConnectionState {
    pub id: u64,
    /// Its place in [`State::guests`].
    pub guest: usize,
    /// Its place in [`State::services`].
    pub service: usize,
    pub client_address: SocketAddr,
    pub client: Handed,
    /// Only with `proving`: an older program does not look at such a client any more, and ends the
    /// connection when that is over.
    pub client_lost: bool,
    /// The same, for programs that end it by themselves.
    #[serde(default)]
    pub client_gone: bool,
    #[serde(default)]
    pub guest_lost: bool,
    pub upstream: UpstreamState,
    pub to_guest: FlowState,
    /// 0 in what an older program wrote.
    #[serde(default)]
    pub header: usize,
    pub to_client: FlowState,
    pub proving: Option<ProvingState>,
    pub opened: Micros,
    pub last_activity: Micros,
    pub moved_before: bool,
}

/// An old socket that is kept for what comes late.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LateState {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub left: Micros,
    pub socket: Handed,
}

/// One thread's part.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct WorkerState {
    /// Listeners by their number.
    pub listeners: Vec<(usize, Handed)>,
    pub connections: Vec<ConnectionState>,
    pub late: Vec<LateState>,
}

/// A guest, as the configuration had it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GuestState {
    /// Its part of the configuration, as TOML.
    pub settings: String,
    pub site: String,
    pub draining: bool,
    /// Whether the configuration names it still.
    pub named: bool,
}

/// A listening address.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ListenerState {
    pub id: usize,
    pub guest: String,
    pub service: String,
    pub configured: SocketAddr,
    pub address: SocketAddr,
}

/// Everything.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    /// The configuration that the new program was checked with.
    pub text: String,
    pub next_id: u64,
    pub guests: Vec<GuestState>,
    /// Services, as TOML.
    pub services: Vec<String>,
    pub listeners: Vec<ListenerState>,
    pub workers: Vec<WorkerState>,
    /// When guests left sites: guest, site, how long ago.
    pub left: Vec<(String, String, Micros)>,
    /// The control socket.
    pub control: Handed,
    pub control_path: PathBuf,
    /// Who waits there for word of the upgrade.
    pub caller: Option<Handed>,
}

impl State {
    /// Every descriptor in it.
    pub(crate) fn descriptors(&self) -> Vec<&OwnedFd> {
        let mut all = vec![&self.control.0];
        all.extend(self.caller.iter().map(|caller| &caller.0));
        for worker in &self.workers {
            all.extend(worker.listeners.iter().map(|(_, socket)| &socket.0));
            all.extend(worker.late.iter().map(|late| &late.socket.0));
            for connection in &worker.connections {
                all.push(&connection.client.0);
                match &connection.upstream {
                    UpstreamState::Waiting => {}
                    UpstreamState::Connecting(socket, _) | UpstreamState::Open(socket) => {
                        all.push(&socket.0);
                    }
                }
                for flow in [&connection.to_guest, &connection.to_client] {
                    for segment in &flow.segments {
                        if let SegmentState::Pipe { reader, writer, .. } = segment {
                            all.extend([&reader.0, &writer.0]);
                        }
                    }
                }
            }
        }
        all
    }

    fn flows(&mut self) -> impl Iterator<Item = &mut FlowState> {
        self.workers
            .iter_mut()
            .flat_map(|worker| &mut worker.connections)
            .flat_map(|connection| [&mut connection.to_guest, &mut connection.to_client])
    }

    /// Writes it.
    pub(crate) fn write(&mut self, out: &mut impl Write) -> io::Result<()> {
        let json = serde_json::to_vec(&*self)?;
        out.write_all(MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&(json.len() as u64).to_le_bytes())?;
        out.write_all(&json)?;
        for flow in self.flows() {
            for segment in &flow.segments {
                if let SegmentState::Bytes { bytes, .. } = segment {
                    out.write_all(bytes)?;
                }
            }
        }
        out.flush()
    }

    /// Reads what [`Self::write`] wrote, and takes the descriptors.
    pub(crate) fn read(input: &mut impl Read) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        let (mut magic, mut version, mut length) = ([0; 8], [0; 4], [0; 8]);
        input.read_exact(&mut magic)?;
        if &magic != MAGIC {
            return Err(invalid("it is no state of a proxy"));
        }
        input.read_exact(&mut version)?;
        if u32::from_le_bytes(version) != VERSION {
            return Err(invalid("its version is not known"));
        }
        input.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        let mut json = Vec::new();
        input.by_ref().take(length).read_to_end(&mut json)?;
        if json.len() as u64 != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut state: Self = serde_json::from_slice(&json)?;
        for flow in state.flows() {
            for segment in &mut flow.segments {
                if let SegmentState::Bytes { length, bytes } = segment {
                    input.by_ref().take(*length).read_to_end(bytes)?;
                    if bytes.len() as u64 != *length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn handed() -> Handed {
        Handed(UnixStream::pair().unwrap().0.into())
    }

    fn flow(bytes: &[u8]) -> FlowState {
        FlowState {
            end: End::Seen,
            bulk: 2,
            may_splice: true,
            written: 9,
            given: Some(7),
            again: 1,
            segments: vec![SegmentState::Bytes {
                length: bytes.len() as u64,
                bytes: bytes.to_vec(),
            }],
        }
    }

    fn state() -> State {
        let now = Instant::now();
        State {
            text: String::new(),
            next_id: 5,
            guests: Vec::new(),
            services: Vec::new(),
            listeners: Vec::new(),
            workers: vec![WorkerState {
                connections: vec![ConnectionState {
                    id: 4,
                    guest: 0,
                    service: 0,
                    client_address: "192.0.2.1:7".parse().unwrap(),
                    client: handed(),
                    client_lost: false,
                    client_gone: false,
                    guest_lost: false,
                    upstream: UpstreamState::Open(handed()),
                    to_guest: flow(b"one"),
                    header: 0,
                    to_client: flow(b"three"),
                    proving: None,
                    opened: Micros::since(now, now),
                    last_activity: Micros::since(now, now),
                    moved_before: true,
                }],
                ..WorkerState::default()
            }],
            left: Vec::new(),
            control: handed(),
            control_path: PathBuf::new(),
            caller: None,
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut before = state();
        assert_eq!(before.descriptors().len(), 3);
        let mut written = Vec::new();
        before.write(&mut written).unwrap();
        // As after an exec: the numbers are nobody's.
        let numbers: Vec<i32> = before
            .descriptors()
            .iter()
            .map(|fd| fd.as_raw_fd())
            .collect();
        std::mem::forget(before);
        let mut after = State::read(&mut written.as_slice()).unwrap();
        let taken: Vec<i32> = after
            .descriptors()
            .iter()
            .map(|fd| fd.as_raw_fd())
            .collect();
        assert_eq!(taken, numbers);
        let bytes: Vec<Vec<u8>> = after
            .flows()
            .flat_map(|flow| &flow.segments)
            .map(|segment| match segment {
                SegmentState::Bytes { bytes, .. } => bytes.clone(),
                SegmentState::Pipe { .. } => Vec::new(),
            })
            .collect();
        assert_eq!(bytes, [b"one".to_vec(), b"three".to_vec()]);
    }

    #[test]
    fn what_is_cut_short_or_foreign_is_an_error() {
        // It keeps its descriptors: other tests of this process would be given their numbers.
        let mut before = state();
        let mut written = Vec::new();
        before.write(&mut written).unwrap();
        let text = String::from_utf8_lossy(&written).into_owned();
        assert!(text.contains("\"next_id\":5"));
        for length in [0, 5, 11, 19, 40] {
            assert!(State::read(&mut &written[..length]).is_err());
        }
        written[8] = 99;
        let error = State::read(&mut written.as_slice()).unwrap_err();
        assert!(error.to_string().contains("version"));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_not_taken() {
        for number in [-1, i32::MAX] {
            assert!(serde_json::from_value::<Handed>(number.into()).is_err());
        }
    }
}
