//! QEMU's own migration of a guest with the same memory, and the same writes to it.
//!
//! ```text
//!                writes of the history
//!   this process ---- qtest ----> QEMU, paused ---- counted, paced ----> QEMU -incoming
//!                ---- QMP ------>    memory from a file: the subject's
//! ```
//!
//! Neither QEMU runs a guest's program, both are paused: what a guest would write comes through
//! `-qtest`, which marks pages as dirty as a CPU does. The memory lies from 1 MiB on, above what a
//! PC has below. Its bytes are counted between the two, where the rate of the link is kept: what
//! QEMU itself counts for multifd is from before the compression.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use migrate::guest::replay::Change;
use migrate::pages::PAGE_SIZE;
use serde_json::{Value, json};

use crate::others::Taken;
use crate::subject::Subject;
use crate::{Result, io};

const PROGRAM: &str = "qemu-system-x86_64";

/// Where the subject's first page lies.
const BASE: u64 = 1 << 20;

/// Which of its ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Plain,
    Xbzrle,
    MultifdZstd,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Plain => "QEMU",
            Mode::Xbzrle => "QEMU, xbzrle",
            Mode::MultifdZstd => "QEMU, multifd, zstd",
        }
    }

    fn capability(self) -> Option<&'static str> {
        match self {
            Mode::Plain => None,
            Mode::Xbzrle => Some("xbzrle"),
            Mode::MultifdZstd => Some("multifd"),
        }
    }
}

/// What a migration took.
pub struct Moved {
    pub taken: Taken,
    /// CPU seconds of the source's process.
    pub cpu: f64,
}

/// Migrates the subject, at most `rate` bytes a second; with its writes, if `lives`. None where
/// there is no QEMU.
pub fn migrate(
    subject: &Subject,
    mode: Mode,
    rate: Option<u64>,
    lives: bool,
) -> Result<Option<Moved>> {
    if Command::new(PROGRAM)
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        return Ok(None);
    }
    let root = tempfile::tempdir()?;
    let image = root.path().join("memory");
    let mut file = File::create(&image)?;
    let size = BASE + subject.memory.pages() * PAGE_SIZE as u64;
    // QEMU's memory is of whole MiB.
    let size = size.next_multiple_of(1 << 20);
    file.set_len(size)?;
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(BASE))?;
    file.write_all(&subject.bytes())?;
    let empty = root.path().join("empty");
    File::create(&empty)?.set_len(size)?;
    let source = Machine::start(root.path(), "source", &image, size, false)?;
    let destination = Machine::start(root.path(), "destination", &empty, size, true)?;
    let mut here = source.monitor()?;
    let mut there = destination.monitor()?;
    for monitor in [&mut here, &mut there] {
        if let Some(capability) = mode.capability() {
            monitor.execute(
                "migrate-set-capabilities",
                json!({ "capabilities": [{ "capability": capability, "state": true }] }),
            )?;
        }
        let mut parameters = json!({
            "max-bandwidth": 1_u64 << 40,
            "downtime-limit": 300,
        });
        if mode == Mode::MultifdZstd {
            parameters["multifd-compression"] = json!("zstd");
            parameters["multifd-channels"] = json!(2);
        }
        monitor.execute("migrate-set-parameters", parameters)?;
    }
    let uri = |path: &Path| json!({ "uri": format!("unix:{}", path.display()) });
    let arriving = root.path().join("arriving");
    there.execute("migrate-incoming", uri(&arriving))?;
    let leaving = root.path().join("leaving");
    let wire = Wire::lay(&leaving, arriving, rate)?;
    let mut test = Test::connect(&source.socket("qtest"))?;
    let cpu = source.cpu()?;
    here.execute("migrate", uri(&leaving))?;
    let start = Instant::now();
    let mut steps = subject.history.steps.iter().peekable();
    let mut memory = subject.memory.clone();
    let mut first = None;
    loop {
        let status = here.execute("query-migrate", json!({}))?;
        let ram = &status["ram"];
        let sent = wire.bytes.load(Ordering::Relaxed);
        if first.is_none() && ram["dirty-sync-count"].as_u64() > Some(1) {
            first = Some(sent);
        }
        match status["status"].as_str() {
            Some("completed") => {
                let rounds = ram["dirty-sync-count"].as_u64().unwrap_or_default();
                let taken = Taken {
                    first: first.unwrap_or(sent),
                    whole: sent,
                    rounds: rounds as usize,
                    seconds: status["total-time"].as_f64().unwrap_or_default() / 1e3,
                };
                let cpu = source.cpu()? - cpu;
                return Ok(Some(Moved { taken, cpu }));
            }
            Some("failed") => {
                return Err(io::Error::other(format!("QEMU: {status}")).into());
            }
            _ => {}
        }
        while lives && let Some(step) = steps.next_if(|step| step.at <= start.elapsed()) {
            for write in &step.writes {
                // A type is none of QEMU's affairs, and a hole keeps what it held.
                let written =
                    memory.apply(write) && !matches!(write.change, Change::Type(_) | Change::Hole);
                if written && let Some((_, content)) = memory.page(write.pfn) {
                    let at = BASE + write.pfn * PAGE_SIZE as u64;
                    content.look(|page| test.write(at, page))?;
                }
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// What carries bytes from one to the other, at a rate, and counts them.
struct Wire {
    bytes: AtomicU64,
    rate: Option<f64>,
    free: Mutex<Instant>,
}

impl Wire {
    fn lay(from: &Path, to: std::path::PathBuf, rate: Option<u64>) -> Result<Arc<Wire>> {
        let wire = Arc::new(Wire {
            bytes: AtomicU64::new(0),
            rate: rate.map(|rate| rate as f64),
            free: Mutex::new(Instant::now()),
        });
        let listener = UnixListener::bind(from)?;
        let carrying = Arc::clone(&wire);
        // It ends with this process: who listens costs nothing.
        thread::spawn(move || {
            for source in listener.incoming().flatten() {
                let Ok(destination) = UnixStream::connect(&to) else {
                    return;
                };
                let back = destination
                    .try_clone()
                    .and_then(|it| Ok((it, source.try_clone()?)));
                let wire = Arc::clone(&carrying);
                thread::spawn(move || wire.carry(source, destination));
                if let Ok((mut destination, mut source)) = back {
                    thread::spawn(move || std::io::copy(&mut destination, &mut source));
                }
            }
        });
        Ok(wire)
    }

    fn carry(&self, mut source: UnixStream, mut destination: UnixStream) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count) = source.read(&mut buffer) {
            if count == 0 {
                break;
            }
            if let Some(rate) = self.rate {
                let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
                *free = (*free).max(Instant::now()) + Duration::from_secs_f64(count as f64 / rate);
                let wait = free.saturating_duration_since(Instant::now());
                drop(free);
                thread::sleep(wait);
            }
            self.bytes.fetch_add(count as u64, Ordering::Relaxed);
            if destination.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = destination.shutdown(std::net::Shutdown::Write);
    }
}

struct Machine<'a> {
    child: Child,
    root: &'a Path,
    name: &'static str,
}

impl<'a> Machine<'a> {
    fn start(
        root: &'a Path,
        name: &'static str,
        image: &Path,
        size: u64,
        incoming: bool,
    ) -> Result<Self> {
        let socket = |kind: &str| {
            let path = root.join(format!("{name}.{kind}"));
            format!("unix:{},server=on,wait=off", path.display())
        };
        let mut command = Command::new(PROGRAM);
        command
            .args(["-machine", "pc,memory-backend=ram", "-accel", "tcg", "-S"])
            .args(["-display", "none", "-nodefaults", "-no-user-config"])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=ram,size={size},mem-path={},share=off",
                image.display()
            ))
            .args(["-m", &format!("{}M", size >> 20)])
            .args(["-qtest", &socket("qtest"), "-qtest-log", "/dev/null"])
            .args(["-qmp", &socket("qmp")])
            .stdin(Stdio::null())
            // It complains about a timer of its own each time that a test connects.
            .stderr(Stdio::null());
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        Ok(Machine {
            child: command.spawn()?,
            root,
            name,
        })
    }

    fn socket(&self, kind: &str) -> std::path::PathBuf {
        self.root.join(format!("{}.{kind}", self.name))
    }

    fn monitor(&self) -> Result<Monitor> {
        let stream = connect(&self.socket("qmp"))?;
        let mut monitor = Monitor {
            reader: BufReader::new(stream.try_clone()?),
            writer: stream,
        };
        monitor.read()?;
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// CPU seconds so far, of all its threads.
    fn cpu(&self) -> Result<f64> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Behind the name, which may hold anything, from the third field on.
        let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
        let ticks: u64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse::<u64>().ok())
            .sum();
        // What the kernel counts in, everywhere.
        Ok(ticks as f64 / 100.0)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(path: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > Duration::from_secs(20) => return Err(error.into()),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

struct Monitor {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Monitor {
    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{request}")?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(format!("{command}: {error}")).into());
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }
}

/// Writes to a machine's memory.
struct Test {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    line: String,
}

impl Test {
    fn connect(path: &Path) -> Result<Test> {
        let stream = connect(path)?;
        Ok(Test {
            reader: BufReader::new(stream.try_clone()?),
            writer: stream,
            line: String::new(),
        })
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        use std::fmt::Write as _;
        self.line.clear();
        write!(self.line, "write {at:#x} {:#x} 0x", bytes.len())?;
        for byte in bytes {
            write!(self.line, "{byte:02x}")?;
        }
        self.line.push('\n');
        self.writer.write_all(self.line.as_bytes())?;
        self.line.clear();
        self.reader.read_line(&mut self.line)?;
        match self.line.starts_with("OK") {
            true => Ok(()),
            false => Err(io::Error::other(format!("qtest: {}", self.line)).into()),
        }
    }
}
