// The command line. Also read by build.rs, which makes the man pages and completions from it.

use clap::{Args, Parser, Subcommand, ValueEnum};
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

/// The subcommands, in the order of `--help`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show whether this host, and HOST if given, can move guests
    Check(Check),
    /// List guests: memory, state, how their dirty pages can be tracked, and what hinders a move
    List(List),
    /// Move a running guest to another host
    Migrate(Migrate),
    /// Settle a move that a lost link or a killed process left open
    Resolve(Resolve),
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
    /// Also check whether another host can be reached and move guests: [USER@]HOST
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
    /// Suspend the guest once the rest crosses in this many milliseconds
    #[arg(long, value_name = "MS", default_value_t = 300)]
    pub downtime: u64,
    /// Send at most this much: bits per second, with k, M or G (50M is 50 Mbit/s)
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub bandwidth: Option<u64>,
    /// Give up, with the guest running here, when copying is not at its end S seconds after the start
    #[arg(long, value_name = "S")]
    pub timeout: Option<u64>,
    /// Move a guest with writable disks: they are shared storage, at the same path on HOST
    #[arg(long)]
    pub no_disks: bool,
    /// Find dirty pages this way; by default as the hypervisor allows
    #[arg(long, value_enum, value_name = "HOW")]
    pub tracker: Option<Tracker>,
    /// Compare all memory again at both hosts before the guest is handed over
    #[arg(long)]
    pub verify: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Also write the report, as JSON, to FILE
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// How another host is reached.
#[derive(Debug, Args)]
pub struct RemoteOptions {
    /// The ssh command, with its options
    #[arg(short = 's', long, value_name = "COMMAND", default_value = "ssh")]
    pub ssh: String,
    /// The program at the other host
    #[arg(long, value_name = "COMMAND", default_value = "vmshadow")]
    pub remote_command: String,
}

/// How dirty pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tracker {
    /// The hypervisor logs them
    LogDirty,
    /// Every page is digested and compared
    Scan,
}

/// `vmshadow resolve`
#[derive(Debug, Args)]
pub struct Resolve {
    /// The guest: its name
    #[arg(required_unless_present = "all")]
    pub domain: Option<String>,
    /// Every open move of this host
    #[arg(long, conflicts_with_all = ["domain", "decree"])]
    pub all: bool,
    /// Your word, when the other host never answers again: who has the guest
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

/// `vmshadow receive`
#[derive(Debug, Args)]
pub struct Receive {
    /// Say what became of a move instead
    #[arg(long, value_name = "MOVE")]
    pub ask: Option<String>,
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
    // Below this a move never ends; above it there is no such link.
    if !(1e3..=1e12).contains(&bytes) {
        return Err(format!("{text:?} is out of range (8k to 8000G)"));
    }
    Ok(bytes as u64)
}
