//! How full a link gets by ssh, as guests really cross: the first round's time against its bytes over
//! the link's rate.
//!
//! ```text
//!   near                               far
//!     this program -- ssh ===========    sshd -- this program, as `vmshadow receive --join` --+
//!     (the source)                                                                            |
//!     (the destination) <---------------------------------- the door of a move ---------------+
//! ```

use std::fs::{self, File};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use migrate::directories::Directories;
use migrate::link::door::{self, Door};
use migrate::link::ssh::{Remote, Session};
use migrate::link::{Link, OPENED_AT_ONCE};
use migrate::wire::MoveId;
use wires::Hosts;

use crate::subject::{Subject, incompressible};
use crate::tcp::{FAR, LOST, hosts};
use crate::wire::{beside_ideal, first_round};
use crate::{Result, io};

const PORT: u16 = 7022;

/// How long a connection, or a server, may take to be there.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run() -> Result<()> {
    println!("\n## Links: the first round by ssh\n");
    let Some(sshd) = sshd() else {
        println!("Left out: there is no sshd. `make bench` brings one along.");
        return Ok(());
    };
    println!("| MiB | Mbit/s | RTT, ms | lost | connections | MB | s | over bytes / rate |");
    println!("|---|---|---|---|---|---|---|---|");
    row(&sshd, &incompressible(1024), 10, 0, 1)?;
    row(&sshd, &incompressible(1024), 200, 0, 4)?;
    let subject = incompressible(4096);
    for (lost, connections) in [(0, 16), (LOST, 16), (LOST, 32)] {
        row(&sshd, &subject, 200, lost, connections)?;
    }
    Ok(())
}

/// The server: the one that is named, or this machine's.
fn sshd() -> Option<PathBuf> {
    let named = std::env::var_os("SSHD").map(PathBuf::from);
    named
        .into_iter()
        .chain([PathBuf::from("/usr/sbin/sshd")])
        .find(|path| path.exists())
}

/// `passing ROOT receive --join MOVE`: what sshd starts.
pub fn pass(arguments: &[String]) -> Result<()> {
    let [root, _, _, move_id] = arguments else {
        return Err(io::Error::other("Not for people").into());
    };
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let directories = Directories::under(Path::new(root));
    Ok(door::join(&directories, move_id.parse()?, input, output)?)
}

fn row(sshd: &Path, subject: &Subject, rtt: u64, lost: u32, connections: usize) -> Result<()> {
    const MBIT: u64 = 1000;
    let hosts = hosts(MBIT, rtt, lost)?;
    let root = tempfile::tempdir()?;
    let _server = Server::start(sshd, &hosts, root.path())?;
    let move_id = MoveId::from_random([7; 16]);
    let (_door, come) = Door::open(&Directories::under(root.path()), move_id)?;
    let congestion = if lost > 0 { "bbr" } else { "cubic" };
    let mut client = Client {
        hosts: &hosts,
        remote: remote(root.path(), congestion)?,
        move_id,
        come,
        sessions: Vec::new(),
    };
    let first = client.connect(1)?.remove(0);
    let mut data = (Vec::new(), Vec::new());
    if connections > 1 {
        while data.0.len() < connections {
            let some = OPENED_AT_ONCE.min(connections - data.0.len());
            data.extend(client.connect(some)?);
        }
    }
    for session in &client.sessions {
        session.follow_congestion()?;
    }
    let round = first_round(subject, first, data)?;
    println!(
        "| {} | {MBIT} | {rtt} | {} % | {connections} {congestion} | {} |",
        subject.mib(),
        f64::from(lost) / 10.0,
        beside_ideal(&round, MBIT * 125_000)
    );
    Ok(())
}

/// How the far host is reached, with the keys that are kept in `root`.
fn remote(root: &Path, congestion: &str) -> Result<Remote> {
    let kept = root.display();
    let ssh = format!(
        "ssh -F none -p {PORT} -i {kept}/user -oStrictHostKeyChecking=no \
         -oUserKnownHostsFile={kept}/known"
    );
    let this = std::env::current_exe()?;
    let program = format!("{} passing {kept}", this.display());
    let mut remote = Remote::new(&ssh, &format!("root@{FAR}"), &program)?;
    remote.congestion = Some(congestion.to_owned());
    Ok(remote)
}

/// The near host's ssh processes, which end with this.
struct Client<'a> {
    hosts: &'a Hosts,
    remote: Remote,
    move_id: MoveId,
    come: Receiver<Link>,
    sessions: Vec<Session>,
}

impl Client<'_> {
    /// So many more connections. Their far ends come in any order: a pair are the ends of one only where
    /// one was asked for.
    fn connect(&mut self, count: usize) -> Result<Vec<(Link, Link)>> {
        let mut near = Vec::new();
        for _ in 0..count {
            let (remote, move_id) = (self.remote.clone(), self.move_id);
            let (link, session) = self.hosts.inside("near", move || remote.join(move_id))?;
            near.push(link);
            self.sessions.push(session);
        }
        near.into_iter()
            .map(|near| Ok((near, self.come.recv_timeout(PATIENCE)?)))
            .collect()
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        for session in &mut self.sessions {
            session.finish(Duration::ZERO);
        }
    }
}

/// The far host's sshd, which ends with this.
struct Server(Child);

impl Server {
    /// In a mount namespace of its own, which has the user and the directory that it needs.
    fn start(sshd: &Path, hosts: &Hosts, root: &Path) -> Result<Server> {
        let kept = root.display();
        for key in ["host", "user"] {
            let path = format!("{kept}/{key}");
            wires::run(
                "ssh-keygen",
                &["-q", "-t", "ed25519", "-N", "", "-f", &path],
            );
        }
        let users = fs::read_to_string("/etc/passwd")?;
        let user = "sshd:x:64999:65534::/run/sshd:/usr/sbin/nologin\n";
        fs::write(root.join("passwd"), users + user)?;
        fs::write(
            root.join("config"),
            format!(
                "Port {PORT}\nListenAddress {FAR}\nHostKey {kept}/host\n\
                 AuthorizedKeysFile {kept}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n\
                 PermitRootLogin yes\n"
            ),
        )?;
        let script = format!(
            "mount --bind {kept}/passwd /etc/passwd && \
             mount -t tmpfs tmpfs /run && mkdir /run/sshd && \
             exec {} -D -e -f {kept}/config 2>{kept}/log",
            sshd.display()
        );
        // What it needs is beside it where it was taken out of its package.
        let libraries = sshd.with_file_name("../lib/x86_64-linux-gnu");
        let child = hosts.inside("far", move || {
            Command::new("unshare")
                .args(["--mount", "sh", "-c", &script])
                .env("LD_LIBRARY_PATH", libraries)
                .stdin(Stdio::null())
                .spawn()
        })?;
        let server = Server(child);
        let deadline = Instant::now() + PATIENCE;
        while hosts.inside("near", || TcpStream::connect((FAR, PORT)).is_err()) {
            if Instant::now() > deadline {
                let log = fs::read_to_string(root.join("log")).unwrap_or_default();
                return Err(io::Error::other(format!("No sshd: {log}")).into());
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Its connections end with the clients.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
