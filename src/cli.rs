// The command line. Also read by build.rs, which makes the man pages and completions from it.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::num::NonZeroUsize;
use std::path::PathBuf;

/// Moves running Xen guests between hosts, also across a WAN, without losing them on the way.
#[derive(Debug, Parser)]
#[command(
    name = "vmshadow",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
#[command(
    after_help = "Exit status: 0 done; 1 failed, and the message says where the guest is; \
2 bad usage.\nSet VMSHADOW_LOG=info (or debug) to see more."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const MIGRATE_HELP: &str = "Examples:
  vmshadow migrate g1 root@b.example.org
  vmshadow migrate g1 b --bandwidth 50M --report g1.json

Ctrl-C gives the move up, and the guest goes on at this host. Once the guest is
handed over to HOST the move is finished instead.";

const SET_HELP: &str = "Example:
  vmshadow set g1 bandwidth=20M downtime=500";
const SHADOW_HELP: &str =
    "The guest runs on here. Its memory is read, and what HOST does not have yet is sent;
a later move to HOST then sends what changed since. HOST decides how long it keeps
a shadow: [shadows] in /etc/vmshadow/vmshadow.toml.";

const RESOLVE_HELP: &str = "Without --decree nothing is guessed: where only the other host knows \
who has the
guest it is asked, and while it can't be reached the move stays open. Run this
again then, at either host, as often as you like.";

const PROXY_HELP: &str = "The edge is a netproxy at an address that stays; [edge] in \
/etc/vmshadow/vmshadow.toml
says where. A move takes the connections along by itself.";

/// The subcommands, in the order of `--help`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show whether this host, and HOST if given, can move guests, and what is missing
    Check(Check),
    /// List guests: memory, state, how their dirty pages can be tracked, and what hinders a move
    List(List),
    /// Move a running guest to another host
    #[command(after_help = MIGRATE_HELP)]
    Migrate(Migrate),
    /// Show the moves that are at work on this host
    Status(Status),
    /// Give a move up that is at work on this host; the guest goes on where it was
    Cancel(Cancel),
    /// Change the limits of a move while it runs
    #[command(after_help = SET_HELP)]
    Set(Set),
    /// Send what another host needs to take a guest quickly, while it runs on here
    #[command(after_help = SHADOW_HELP)]
    Shadow(Shadow),
    /// List what this host holds of guests that run elsewhere, or drop it
    Shadows(Shadows),
    /// Settle a move that a lost link or a killed process left open
    #[command(after_help = RESOLVE_HELP)]
    Resolve(Resolve),
    /// The edge's connections to guests, and the paths to guests here
    #[command(after_help = PROXY_HELP)]
    Proxy(Proxy),
    /// The other end of a move; started by ssh
    #[command(hide = true)]
    Receive(Receive),
    /// Watch over one move; started by a worker
    #[command(hide = true)]
    Guard(Guard),
    /// Obey on_reboot and its kin for one guest; started when it arrives
    #[command(hide = true)]
    Keeper(Keeper),
}

/// `vmshadow check`
#[derive(Debug, Args)]
pub struct Check {
    /// Another host, [USER@]HOST, to check as well: whether ssh reaches it with a key, and whether
    /// it can move guests
    pub host: Option<String>,
    /// How HOST is reached
    #[command(flatten)]
    pub remote: RemoteOptions,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmshadow list`
#[derive(Debug, Args)]
pub struct List {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmshadow migrate`
#[derive(Debug, Args)]
pub struct Migrate {
    /// The guest: its name or domain id
    pub domain: String,
    /// Where it goes: [USER@]HOST, reached by ssh with a key
    pub host: String,
    /// How HOST is reached
    #[command(flatten)]
    pub remote: RemoteOptions,
    /// Suspend the guest once it would be silent for no more than MS milliseconds. Where suspending
    /// and restoring it take most of that, once what is left would cross in a third of it. 0: copy
    /// for as long as rounds gain anything
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub downtime: u64,
    /// Send at most RATE bits a second, with k, M or G: 50M is 50 Mbit/s. At least 256k
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Send the guest's memory by N connections, and all else by another one; 1: everything by one.
    /// auto: as many as fill the link. A link without --bandwidth counts as 1 Gbit/s. Where they
    /// have to go through ssh there are no more than cores, or than 4 where a round trip takes
    /// 100 ms, until a move has filled these, or --bandwidth is given
    #[arg(long, value_name = "N", default_value = "auto", value_parser = parse_connections)]
    pub connections: Connections,
    /// Send the guest's memory through ssh as well. By default it goes by connections of our own,
    /// within TLS, where HOST can be reached by them; see [direct] in vmshadow.toml there
    #[arg(long)]
    pub no_direct: bool,
    /// Send by this congestion control of the kernel's: where a link loses packets, it says how full
    /// the link gets. By default this host's own (net.ipv4.tcp_congestion_control), and bbr from
    /// when on packets are seen to be lost all the time, if this host has it
    #[arg(long, value_name = "NAME")]
    pub congestion: Option<String>,
    /// Encode on N cores; by default on all that this host's dom0 has
    #[arg(long, value_name = "N")]
    pub cores: Option<NonZeroUsize>,
    /// When the guest is not handed over S seconds after the start, whatever is waited for, do what
    /// --on-timeout says
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: Option<u64>,
    /// What to do with a move whose time is over: give it up, with the guest running here, or hand
    /// the guest over. A handover waits until all memory has crossed once, and takes what it takes
    #[arg(
        long,
        value_enum,
        value_name = "WHAT",
        default_value = "fail",
        requires = "timeout"
    )]
    pub on_timeout: OnTimeout,
    /// Where the guest changes its memory faster than it crosses, slow it down while it is copied:
    /// it keeps at least PERCENT of the processor time that it may use otherwise. By default it is
    /// never slowed down
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..100))]
    pub throttle: Option<u8>,
    /// Move a guest that has writable disks, without their content: they are shared storage, which
    /// HOST has at the same paths
    #[arg(long)]
    pub no_disks: bool,
    /// How to find the memory that the guest changed; by default log-dirty where the hypervisor
    /// can, else scan
    #[arg(long, value_enum, value_name = "HOW")]
    pub tracker: Option<Tracker>,
    /// Read and compare all memory once more at both hosts before the guest is handed over, while
    /// it is silent
    #[arg(long)]
    pub verify: bool,
    /// Don't move the guest: say whether HOST would take it, whether its connections at the edge could
    /// follow, and what the move would take. Its memory is read for some seconds, and the link is
    /// measured unless --bandwidth says what it takes
    #[arg(long, conflicts_with_all = ["timeout", "verify"])]
    pub dry_run: bool,
    /// Leave the guest's connections at the edge as they are: they end
    #[arg(long)]
    pub no_edge: bool,
    /// After a lost link go on trying for S seconds without a step forward; 0: give up at once. The
    /// guest runs here meanwhile
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub retry: u64,
    /// Keep no shadow of the guest here when it has left. Its way back is longer then
    #[arg(long)]
    pub no_shadow: bool,
    /// Print the report as JSON, and no progress
    #[arg(long)]
    pub json: bool,
    /// Also write the report, as JSON, to FILE. A FILE that can't be written stops the move before
    /// it begins
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// `vmshadow status`
#[derive(Debug, Args)]
pub struct Status {
    /// The guest: its name or, where it leaves, its domain id; all of them if none
    pub domain: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmshadow cancel`
#[derive(Debug, Args)]
pub struct Cancel {
    /// The guest: its name or, where it leaves, its domain id
    pub domain: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `vmshadow shadow`
#[derive(Debug, Args)]
pub struct Shadow {
    /// The guest: its name or domain id
    pub domain: String,
    /// Where the shadow is to be: [USER@]HOST, reached by ssh with a key
    pub host: String,
    /// How HOST is reached
    #[command(flatten)]
    pub remote: RemoteOptions,
    /// Send at most RATE bits a second, with k, M or G: 50M is 50 Mbit/s. At least 256k
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Send by this congestion control of the kernel's, as `migrate` does
    #[arg(long, value_name = "NAME")]
    pub congestion: Option<String>,
    /// Go on: send again what changed, with a pause of S seconds, until Ctrl-C or
    /// `vmshadow cancel`. By default the shadow is sent once
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..))]
    pub every: Option<u64>,
    /// Allow a guest that has writable disks, as `migrate --no-disks` does
    #[arg(long)]
    pub no_disks: bool,
    /// Print the report as JSON, one for each time, and no progress
    #[arg(long)]
    pub json: bool,
}

/// `vmshadow set`
#[derive(Debug, Args)]
pub struct Set {
    /// The guest: its name or, where it leaves, its domain id
    pub domain: String,
    /// bandwidth=RATE, in bits a second as for migrate, or bandwidth=none; downtime=MS
    #[arg(required = true, value_name = "SETTING", value_parser = parse_setting)]
    pub settings: Vec<Setting>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One limit of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Bytes a second; none for no limit.
    Bandwidth(Option<u64>),
    /// Milliseconds.
    Downtime(u64),
}

/// `vmshadow shadows`
#[derive(Debug, Args)]
pub struct Shadows {
    /// Drop what is held of this guest: its name or UUID
    #[arg(long, value_name = "GUEST")]
    pub drop: Option<String>,
    /// Drop all
    #[arg(long, conflicts_with = "drop")]
    pub drop_all: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// How another host is reached.
#[derive(Debug, Args)]
pub struct RemoteOptions {
    /// The command that stands for ssh, with its options: "ssh -p 2222"
    #[arg(short = 's', long, value_name = "COMMAND", default_value = "ssh")]
    pub ssh: String,
    /// What to run at HOST, where vmshadow is not in the PATH of ssh
    #[arg(long, value_name = "COMMAND", default_value = "vmshadow")]
    pub remote_command: String,
}

/// What to do when time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnTimeout {
    /// Give the move up; the guest goes on here
    Fail,
    /// Suspend the guest, send what is left, and hand it over
    Handover,
}

/// How dirty pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tracker {
    /// The hypervisor logs which pages were written. For a PV guest it needs shadow paging
    LogDirty,
    /// Every page is read in each round, and its digest compared. Works with any hypervisor
    Scan,
}

/// `vmshadow resolve`
#[derive(Debug, Args)]
pub struct Resolve {
    /// The guest: its name, UUID or domain id
    #[arg(required_unless_present = "all")]
    pub domain: Option<String>,
    /// Settle every open move of this host. Goes on after one that can't be settled
    #[arg(long, conflicts_with_all = ["domain", "decree"])]
    pub all: bool,
    /// Your word on who has the guest, when the other host will never answer again. Make sure of it
    /// first: two guests on one disk destroy its data
    #[arg(long, value_enum, value_name = "WHERE")]
    pub decree: Option<Decree>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The operator's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Decree {
    /// The guest is this host's: let it go on here. If it runs there too, its disks are lost
    Here,
    /// The guest is the other host's: destroy what is left of it here
    There,
}

/// `vmshadow proxy`
#[derive(Debug, Args)]
pub struct Proxy {
    /// What to do
    #[command(subcommand)]
    pub command: ProxyCommand,
}

/// The subcommands of `vmshadow proxy`.
#[derive(Debug, Subcommand)]
pub enum ProxyCommand {
    /// List the guests that the edge knows: where they are, their connections
    List {
        /// Print JSON, with every connection
        #[arg(long)]
        json: bool,
    },
    /// Lead the edge's packets to a guest that runs here; a move does that by itself
    Open {
        /// The guest: its name or domain id
        domain: String,
    },
    /// Take that back
    Close {
        /// The guest's name
        guest: String,
    },
    /// Tell the edge that a guest is here now; connections that are still open follow
    Arrived {
        /// The guest, which has to be here: its name or domain id
        guest: String,
    },
    /// Refuse new connections to a guest, or to all; those that are open go on
    Drain {
        /// The guest's name
        guest: Option<String>,
        /// Take new connections again
        #[arg(long)]
        off: bool,
    },
    /// Let the edge read its configuration again
    Reload,
    /// Let the edge's new program take over, after the installation of a new version
    Upgrade,
    /// Print the edge's metrics, as Prometheus reads them
    Metrics,
}

/// `vmshadow receive`
#[derive(Debug, Args)]
pub struct Receive {
    /// Say what became of a move instead
    #[arg(long, value_name = "MOVE")]
    pub ask: Option<String>,
    /// Be one more connection of a move that is received already
    #[arg(long, value_name = "MOVE", conflicts_with = "ask")]
    pub join: Option<String>,
}

/// `vmshadow guard`
#[derive(Debug, Args)]
pub struct Guard {
    /// The move's journal
    pub journal: PathBuf,
}

/// `vmshadow keeper`
#[derive(Debug, Args)]
pub struct Keeper {
    /// The guest's UUID
    pub uuid: String,
}

/// How many connections carry a guest's memory; none where the link says it.
#[derive(Debug, Clone, Copy)]
pub struct Connections(pub Option<NonZeroUsize>);

/// The most connections that carry a guest's memory; as in the engine.
const MAX_CONNECTIONS: usize = 32;

fn parse_connections(text: &str) -> Result<Connections, String> {
    if text == "auto" {
        return Ok(Connections(None));
    }
    text.parse()
        .ok()
        .filter(|count: &NonZeroUsize| count.get() <= MAX_CONNECTIONS)
        .map(|count| Connections(Some(count)))
        .ok_or_else(|| format!("{text:?} is neither auto nor a number from 1 to {MAX_CONNECTIONS}"))
}

/// `NAME=VALUE` of a limit.
fn parse_setting(text: &str) -> Result<Setting, String> {
    match text.split_once('=') {
        Some(("bandwidth", "none")) => Ok(Setting::Bandwidth(None)),
        Some(("bandwidth", rate)) => parse_rate(rate).map(|rate| Setting::Bandwidth(Some(rate))),
        Some(("downtime", time)) => time
            .parse()
            .map(Setting::Downtime)
            .map_err(|_| format!("{time:?} is no number of milliseconds")),
        _ => Err("expected bandwidth=RATE, bandwidth=none or downtime=MS".into()),
    }
}

/// Bytes a second of a rate in bits a second with a suffix.
fn parse_rate(text: &str) -> Result<u64, String> {
    let (number, factor) = match text
        .trim_end_matches("bit/s")
        .trim_end_matches("bit")
        .trim()
    {
        text if text.ends_with(['k', 'K']) => (&text[..text.len() - 1], 1e3),
        text if text.ends_with(['m', 'M']) => (&text[..text.len() - 1], 1e6),
        text if text.ends_with(['g', 'G']) => (&text[..text.len() - 1], 1e9),
        text => (text, 1.0),
    };
    let number: f64 = number
        .trim()
        .parse()
        .map_err(|_| format!("{text:?} is no rate"))?;
    let bytes = number * factor / 8.0;
    // Below this what is queued takes longer than an answer is waited for; above it there is no
    // such link.
    if !(32e3..=1e12).contains(&bytes) {
        return Err(format!("{text:?} is out of range (256k to 8000G)"));
    }
    Ok(bytes as u64)
}
