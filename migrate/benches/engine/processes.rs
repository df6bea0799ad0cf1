//! The two ends of a move in processes of their own, for what a process needs.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migrate::guest::replay::{
    Content, Crossing, Guest, Memory, Recording, Restored, Site, arrive, leave,
};
use migrate::handover::recovery::Owner;
use migrate::link::Link;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::subject::generated;
use crate::{Result, io};

/// How often a process looks at its memory.
const LOOK: Duration = Duration::from_millis(5);

/// What one end needed.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Needed {
    /// Seconds of all its threads.
    pub cpu: f64,
    /// Seconds in all.
    pub seconds: f64,
    /// Memory of its own at the most, beyond what it had before, in KiB.
    pub anonymous_kib: u64,
    /// Bytes on the wire; of the source.
    pub wire_bytes: u64,
}

/// Moves the guest that `subject` names: "bytes MIB", "made MIB", or a recording's path. At most
/// `rate` bytes a second, 0 for no limit. The source keeps a shadow of it, or does not.
pub fn run(subject: &str, rate: u64, keep: bool) -> Result<(Needed, Needed)> {
    let root = tempfile::tempdir()?;
    let socket = root.path().join("socket");
    let start = |arguments: &[&str]| -> Result<Child> {
        let child = Command::new(std::env::current_exe()?)
            .arg("end")
            .args(arguments)
            .arg(&socket)
            .arg(root.path().join(arguments[0]))
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(child)
    };
    let destination = start(&["destination"])?;
    while !socket.exists() {
        thread::sleep(Duration::from_millis(5));
    }
    let source = start(&["source", subject, &rate.to_string(), &keep.to_string()])?;
    Ok((finish(source)?, finish(destination)?))
}

fn finish(mut child: Child) -> Result<Needed> {
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        out.read_to_string(&mut text)?;
    }
    let status = child.wait()?;
    if !status.success() {
        return Err(io::Error::other(format!("An end of a move: {status}")).into());
    }
    Ok(serde_json::from_str(&text)?)
}

/// One of the ends: this process.
pub fn end(arguments: &[String]) -> Result<()> {
    let needed = match arguments {
        [role, socket, root] if role == "destination" => {
            destination(socket.as_ref(), root.as_ref())
        }
        [role, subject, rate, keep, socket, root] if role == "source" => source(
            subject,
            rate.parse()?,
            keep.parse()?,
            socket.as_ref(),
            root.as_ref(),
        ),
        _ => Err(io::Error::other("No such end").into()),
    }?;
    println!("{}", serde_json::to_string(&needed)?);
    Ok(())
}

fn destination(socket: &Path, root: &Path) -> Result<Needed> {
    let site = Site::new(root)?;
    let (stream, _) = UnixListener::bind(socket)?.accept()?;
    let link = link(stream)?;
    let mut needed = measure(|| {
        let end = arrive(&site, link, Restored::Dropped, &(Arc::new(|_| Ok(())) as _))?;
        match end.is_ok() {
            true => Ok(0),
            false => Err(io::Error::other(format!("{end:?}")).into()),
        }
    })?;
    needed.wire_bytes = 0;
    Ok(needed)
}

fn source(subject: &str, rate: u64, keep: bool, socket: &Path, root: &Path) -> Result<Needed> {
    let memory = match subject.split_once(' ') {
        Some(("bytes", mib)) => generated(mib.parse()?, 0).memory,
        Some(("made", mib)) => made(mib.parse()?),
        _ => Arc::new(Recording::open(subject.as_ref())?).memory(),
    };
    let site = Site::new(root)?;
    site.start(Guest::idle("subject", memory));
    let link = link(UnixStream::connect(socket)?)?;
    let mut crossing = Crossing {
        rate: Some(rate).filter(|rate| *rate > 0),
        keep,
        ..Crossing::default()
    };
    measure(|| {
        let left = leave(&site, link, &mut crossing, &mut |_| Ok(Owner::Unknown))?;
        match (left.end.is_ok(), left.report) {
            (true, Some(report)) => Ok(report.wire_bytes),
            _ => Err(io::Error::other(format!("{:?}", left.end)).into()),
        }
    })
}

/// A guest whose content takes no memory here, half of it zero.
fn made(mib: u64) -> Memory {
    use migrate::guest::replay::generated::{Kind, Made};
    let content = |pfn: u64| match pfn / 64 % 2 {
        0 => Content::Made(Made {
            kind: [Kind::Table, Kind::Records][(pfn / 128 % 2) as usize],
            seed: pfn,
        }),
        _ => Content::Zero,
    };
    Memory::of((0..mib << 8).map(content).collect())
}

fn link(stream: UnixStream) -> Result<Link> {
    Ok(Link::new(stream.try_clone()?, stream))
}

/// The process's own memory, in KiB: what no file can take back.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

fn cpu() -> Result<f64> {
    let time = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    Ok(Duration::from(time).as_secs_f64())
}

fn measure(act: impl FnOnce() -> Result<u64>) -> Result<Needed> {
    let before = anonymous_kib();
    let most = AtomicU64::new(before);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(anonymous_kib(), Ordering::Relaxed);
                thread::sleep(LOOK);
            }
        });
        let (start, cpu_before) = (Instant::now(), cpu()?);
        let acted = act();
        let needed = (start.elapsed().as_secs_f64(), cpu()? - cpu_before);
        done.store(true, Ordering::Relaxed);
        Ok(Needed {
            wire_bytes: acted?,
            seconds: needed.0,
            cpu: needed.1,
            anonymous_kib: most.load(Ordering::Relaxed) - before,
        })
    })
}
