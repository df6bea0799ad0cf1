//! What the programs of a test guest say to the outside: the answers of
//! `testbed-guest` (process 1 of a guest) and the report of `testbed-client`
//! (which watches a guest from a site).
//!
//! ```text
//!        site                                      guest
//!  testbed-client watch ── TCP port 7, UDP port 7, ICMP ──> echo
//!                       ── TCP port 7000: "status" ───────> control ── counter
//!  testbed-client ask   ── TCP port 7000: any command ────>         └─ workloads
//! ```
//!
//! The control port takes a command a line and answers each with a line of
//! JSON: an object of the command's own, or `{"error": "..."}`.

pub mod pattern;

use serde::{Deserialize, Serialize};

/// Port of the echo servers, TCP and UDP.
pub const ECHO_PORT: u16 = 7;

/// Port of the control server.
pub const CONTROL_PORT: u16 = 7000;

/// Port of the ssh server of a desktop.
pub const SSH_PORT: u16 = 22;

/// Port of the VNC server of a desktop: display 0.
pub const VNC_PORT: u16 = 5900;

/// What a guest knows of itself: the answer to `status`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Status {
    /// The name given on the kernel's command line.
    pub name: String,
    /// The kernel's random id of this boot: a reboot changes it, a move must not.
    pub boot_id: String,
    /// Counts up about every 10 ms from 0 at boot; never steps back.
    pub counter: u64,
    /// Seconds since boot by the monotonic clock.
    pub uptime: f64,
    /// Wall clock in seconds since 1970.
    pub time: f64,
    /// The online vCPUs, as the kernel lists them (`0-1`).
    pub vcpus: String,
    /// Memory that the kernel has, in KiB.
    pub memory_kib: u64,
    /// Whole passes of the rewriting workload over its memory.
    pub generation: u64,
    /// MiB under a workload.
    pub workload_mib: u64,
    /// Address spaces made and torn down by the churning workload.
    pub churned: u64,
    /// Blocks written, flushed and read back by the disk workload.
    pub disk_blocks: u64,
    /// Everything that must never happen. All zero in a healthy guest.
    pub errors: Errors,
}

/// Faults that a guest noticed in itself.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// Pages whose content was not what the workload had written.
    pub memory: u64,
    /// Times that the two copies of the counter differed.
    pub counter: u64,
    /// Times that the monotonic clock stepped back.
    pub clock: u64,
    /// Disk blocks that failed, or that held what was not written.
    pub disk: u64,
    /// The first fault in words, if there was one.
    pub first: Option<String>,
}

impl Errors {
    /// Whether nothing went wrong.
    #[must_use]
    pub fn none(&self) -> bool {
        self == &Self::default()
    }
}

/// What a watch saw of a guest from outside.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Watch {
    /// How long it watched, in seconds.
    pub seconds: f64,
    /// The TCP connection to the echo port, one for the whole watch.
    pub echo: EchoWatch,
    /// ICMP echo, 20 a second.
    pub ping: PingWatch,
    /// The counter, read over one TCP connection.
    pub counter: CounterWatch,
}

/// The part of a [`Watch`] about the echo connection.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct EchoWatch {
    /// Bytes sent.
    pub sent: u64,
    /// Bytes that came back, each one in its place.
    pub received: u64,
    /// Whether the connection still worked at the end.
    pub alive: bool,
    /// The longest time without a byte from the guest, in seconds.
    pub longest_gap: f64,
    /// When that began, in seconds from the start.
    pub gap_at: f64,
    /// What broke it, if something did.
    pub error: Option<String>,
}

/// The part of a [`Watch`] about pings.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct PingWatch {
    /// Requests sent.
    pub sent: u64,
    /// Replies.
    pub received: u64,
    /// The longest time without a reply, in seconds.
    pub longest_silence: f64,
    /// When that began, in seconds from the start.
    pub silence_at: f64,
    /// Why there were no pings, if so.
    pub error: Option<String>,
}

/// The part of a [`Watch`] about the guest's counter.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct CounterWatch {
    /// The first reading.
    pub first: u64,
    /// The last reading.
    pub last: u64,
    /// Readings taken.
    pub readings: u64,
    /// Readings smaller than the one before: must be 0.
    pub steps_back: u64,
    /// Changes of the boot id: reboots.
    pub reboots: u64,
    /// The guest's own errors at the last reading.
    pub errors: Errors,
    /// What broke the connection, if something did.
    pub error: Option<String>,
}

impl Watch {
    /// What a guest's move must not break: the echo connection lived with every
    /// byte in its place, the counter went on without stepping back or
    /// restarting, and the guest noticed no fault in itself. The first breach
    /// in words.
    ///
    /// # Errors
    /// The breach.
    pub fn intact(&self) -> Result<(), String> {
        if let Some(error) = &self.echo.error {
            return Err(format!("Echo connection: {error}"));
        }
        if !self.echo.alive {
            return Err("Echo connection: silent at the end".to_owned());
        }
        if let Some(error) = &self.counter.error {
            return Err(format!("Control connection: {error}"));
        }
        if self.counter.steps_back > 0 {
            return Err(format!(
                "Counter stepped back {} times",
                self.counter.steps_back
            ));
        }
        if self.counter.reboots > 0 {
            return Err("Guest restarted".to_owned());
        }
        if !self.counter.errors.none() {
            return Err(format!("Guest's own errors: {:?}", self.counter.errors));
        }
        if self.counter.readings < 2 || self.counter.last <= self.counter.first {
            return Err("Counter stands still".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Watch {
        Watch {
            seconds: 2.0,
            echo: EchoWatch {
                sent: 40,
                received: 40,
                alive: true,
                ..EchoWatch::default()
            },
            counter: CounterWatch {
                first: 10,
                last: 210,
                readings: 8,
                ..CounterWatch::default()
            },
            ..Watch::default()
        }
    }

    #[test]
    fn intact_names_each_breach() {
        assert_eq!(healthy().intact(), Ok(()));
        let breaches: [fn(&mut Watch); 7] = [
            |watch| watch.echo.error = Some("Byte 7 is wrong".into()),
            |watch| watch.echo.alive = false,
            |watch| watch.counter.error = Some("Connection reset".into()),
            |watch| watch.counter.steps_back = 1,
            |watch| watch.counter.reboots = 1,
            |watch| watch.counter.errors.memory = 1,
            |watch| watch.counter.last = watch.counter.first,
        ];
        for breach in breaches {
            let mut watch = healthy();
            breach(&mut watch);
            assert!(watch.intact().is_err(), "{watch:?}");
        }
    }
}
