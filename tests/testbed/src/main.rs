//! `testbed`: two real Xen sites in QEMU, from the command line.

mod bench;
mod record;
mod show;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use std::io::{IsTerminal, Read};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};
use testbed::{Guest, Hypervisor, Kind, Link, Options, RunDirectory, SiteName, Testbed, image};

/// Two real Xen sites in QEMU's software emulation: real hypervisors, real dom0s,
/// and a link between them as long and as slow as you like.
#[derive(Debug, Parser)]
#[command(name = "testbed", arg_required_else_help = true)]
struct Arguments {
    /// Which testbed
    #[arg(
        long = "name",
        value_name = "NAME",
        global = true,
        default_value = "main"
    )]
    testbed: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show a move between two sites; VMSHADOW_DEB names the package
    Demo,
    /// Measure moves beside `xl migrate`; VMSHADOW_DEB names the package
    BenchXl(bench::Rows),
    /// Record guests' memory for benchmarks; VMSHADOW_RECORDER names the program
    Record {
        /// For this long each
        #[arg(long, default_value_t = 40, value_name = "S")]
        seconds: u32,
        /// What guests do: idle, edit, build, browse
        #[arg(default_values = ["idle", "edit", "build", "browse"])]
        states: Vec<String>,
    },
    /// Start two sites; they run until `down`
    Up(Up),
    /// End the sites, and remove what they wrote
    Down,
    /// The testbeds that are up
    List,
    /// A shell at a site, or a command there
    Ssh {
        /// a or b
        site: SiteName,
        /// The command; without one, a shell
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Copy a file to a site
    Copy {
        /// The file here
        from: PathBuf,
        /// a or b
        site: SiteName,
        /// The path there
        to: String,
    },
    /// Copy a file from a site
    Get {
        /// a or b
        site: SiteName,
        /// The path there
        from: String,
        /// The file here
        to: PathBuf,
    },
    /// Install Debian packages, or programs into /usr/local/bin, at both sites
    Install {
        /// The packages (.deb) and programs
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Change the link between the sites
    Link(LinkArguments),
    /// Start, list, ask and end guests
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Watch a guest from a site, then print what was seen as JSON
    Watch {
        /// The guest's name
        guest: String,
        /// Watch from this site
        #[arg(long, default_value = "a")]
        from: SiteName,
        /// For this long; else until the end of standard input
        #[arg(long, value_name = "S")]
        seconds: Option<f64>,
    },
    /// Pull a site's plug and start it again
    PowerCycle {
        /// a or b
        site: SiteName,
    },
    /// Print what a site's hypervisor and kernel said
    Console {
        /// a or b
        site: SiteName,
        /// Go on printing
        #[arg(long, short)]
        follow: bool,
    },
    /// Collect the logs of both sites
    Logs {
        /// Into this directory
        directory: PathBuf,
    },
    /// Build the disk images, if they aren't there
    Build,
    /// End testbeds that were left behind, and remove the disk images
    Clean,
}

#[derive(Debug, Args)]
struct Up {
    /// release (with shadow paging) or security (without)
    #[arg(long, default_value = "release")]
    hypervisor: Hypervisor,
    /// Memory of each machine
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    memory: u32,
    /// CPUs of each machine
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory of each dom0
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    dom0_memory: u32,
    /// vCPUs of each dom0
    #[arg(long, default_value_t = 1, value_name = "N")]
    dom0_cpus: u32,
    /// More for the hypervisor's command line
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    xen_arguments: String,
    /// CPU features that site a has and site b has not, in QEMU's words
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    cpu_features: String,
    /// With an IOMMU, for passing PCI devices through
    #[arg(long)]
    iommu: bool,
}

#[derive(Debug, Args)]
struct LinkArguments {
    /// Cut it or mend it
    #[arg(conflicts_with_all = ["rtt", "rate", "loss"], value_parser = ["cut", "mend"])]
    action: Option<String>,
    /// Round-trip time in milliseconds
    #[arg(long, default_value_t = 0.0, value_name = "MS")]
    rtt: f64,
    /// Rate each way, in Mbit/s
    #[arg(long, value_name = "MBIT")]
    rate: Option<f64>,
    /// Packets lost, in percent
    #[arg(long, default_value_t = 0.0, value_name = "PERCENT")]
    loss: f64,
}

#[derive(Debug, Subcommand)]
enum GuestCommand {
    /// Start a guest, and wait until it answers
    Start {
        /// The domain's name
        name: String,
        /// Where
        #[arg(long, default_value = "a")]
        site: SiteName,
        /// pv, pvh or empty
        #[arg(long, default_value = "pv")]
        kind: Kind,
        /// Memory
        #[arg(long, default_value_t = 128, value_name = "MIB")]
        memory: u32,
        /// What the balloon may grow to
        #[arg(long, default_value_t = 0, value_name = "MIB")]
        maximum: u32,
        /// vCPUs
        #[arg(long, default_value_t = 1, value_name = "N")]
        vcpus: u32,
        /// Physical CPUs to run on, in xl's words
        #[arg(long, value_name = "LIST")]
        cpus: Option<String>,
        /// Last byte of the address 10.77.0.X
        #[arg(long, default_value_t = 101, value_name = "X")]
        address: u8,
        /// A workload, as the control port takes it: "rewrite 8", "random 40"
        #[arg(long, value_name = "COMMAND")]
        run: Vec<String>,
        /// Size of a disk
        #[arg(long, default_value_t = 0, value_name = "MIB")]
        disk: u32,
        /// Serve a desktop by VNC, and ssh
        #[arg(long)]
        desktop: bool,
        /// A line for the domain's configuration
        #[arg(long, value_name = "LINE")]
        extra: Vec<String>,
    },
    /// The guests, and where they are
    List,
    /// Send a command to a guest: status, verify, rewrite MIB [RATE], random MIB,
    /// text MIB, churn, edit, build, browse, drop, disk PATH MIB, balloon MIB, online, reboot, poweroff,
    /// crash
    Ask {
        /// The guest's name
        name: String,
        /// The command
        #[arg(required = true)]
        command: Vec<String>,
        /// From this site
        #[arg(long, default_value = "a")]
        from: SiteName,
    },
    /// End a guest at once
    Stop {
        /// Its name
        name: String,
    },
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp(None)
        .format_target(false)
        .init();
    match carry_out(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("testbed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(arguments: Arguments) -> Result<ExitCode> {
    let attach = || Testbed::attach(&arguments.testbed);
    match arguments.command {
        Command::Up(up) => {
            let started = Instant::now();
            let testbed = Testbed::up_detached(&Options {
                name: arguments.testbed,
                hypervisor: up.hypervisor,
                memory_mib: up.memory,
                cpus: up.cpus.unwrap_or(up.dom0_cpus),
                dom0_memory_mib: up.dom0_memory,
                dom0_vcpus: up.dom0_cpus,
                xen_arguments: up.xen_arguments,
                cpu_features: up.cpu_features,
                iommu: up.iommu,
                ..Options::default()
            })?;
            let seconds = started.elapsed().as_secs_f64();
            eprintln!("Testbed {} is up, after {seconds:.1} s", testbed.name());
        }
        Command::Down => attach()?.down()?,
        Command::List => {
            for run in RunDirectory::list()? {
                let testbed = Testbed::attach(run.name())?;
                println!("{}\t{}", run.name(), testbed.options().hypervisor);
            }
        }
        Command::Ssh { site, command } => {
            let testbed = attach()?;
            let site = testbed.site(site);
            let mut ssh = match command.is_empty() {
                true => site.shell(),
                false => site.command(&command.join(" ")),
            };
            let status = ssh
                .stdin(Stdio::inherit())
                .status()
                .context("Can't start ssh")?;
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
        }
        Command::Copy { from, site, to } => {
            let mode = std::fs::metadata(&from).map(|file| {
                use std::os::unix::fs::PermissionsExt;
                file.permissions().mode() & 0o777
            });
            attach()?
                .site(site)
                .put(&from, &to, mode.unwrap_or(0o644))?;
        }
        Command::Get { site, from, to } => attach()?.site(site).get(&from, &to)?,
        Command::Install { files } => {
            for site in attach()?.sites() {
                for file in &files {
                    site.install(file)?;
                }
            }
        }
        Command::Link(link) => change_link(&attach()?, &link)?,
        Command::Guest(command) => guest(&attach()?, command)?,
        Command::Watch {
            guest,
            from,
            seconds,
        } => {
            let testbed = attach()?;
            let watch = testbed.watch(from, &testbed.guest(&guest)?)?;
            match seconds {
                Some(seconds) => std::thread::sleep(Duration::from_secs_f64(seconds.max(0.0))),
                None => {
                    if std::io::stdin().is_terminal() {
                        eprintln!("Watching until Ctrl-D");
                    }
                    std::io::stdin().read_to_end(&mut Vec::new())?;
                }
            }
            let watch = watch.finish()?;
            println!("{}", serde_json::to_string_pretty(&watch)?);
            if let Err(breach) = watch.intact() {
                eprintln!("testbed: {breach}");
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::PowerCycle { site } => attach()?.power_cycle(site)?,
        Command::Console { site, follow } => {
            let mut tail = std::process::Command::new("tail");
            tail.args(["--lines", "+1"])
                .args(follow.then_some("--follow"));
            tail.arg(attach()?.site(site).console())
                .status()
                .context("Can't start tail")?;
        }
        Command::Logs { directory } => attach()?.collect_logs(&directory)?,
        Command::Demo => show::demo()?,
        Command::BenchXl(rows) => bench::bench_xl(&rows)?,
        Command::Record { seconds, states } => record::record(seconds, &states)?,
        Command::Build => {
            let images = image::Images::obtain()?;
            println!("{}", images.directory().display());
        }
        Command::Clean => {
            for name in testbed::sweep()? {
                eprintln!("Testbed {name} was left behind; it is gone now");
            }
            image::remove_all()?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn change_link(testbed: &Testbed, link: &LinkArguments) -> testbed::Result<()> {
    match link.action.as_deref() {
        Some("cut") => testbed.cut_link(),
        Some(_) => testbed.mend_link(),
        None => testbed.set_link(&Link {
            rtt_ms: link.rtt,
            mbit: link.rate,
            loss_percent: link.loss,
        }),
    }
}

fn guest(testbed: &Testbed, command: GuestCommand) -> testbed::Result<()> {
    match command {
        GuestCommand::Start {
            name,
            site,
            kind,
            memory,
            maximum,
            vcpus,
            cpus,
            address,
            run,
            disk,
            desktop,
            extra,
        } => {
            let guest = Guest {
                kind,
                memory_mib: memory,
                maximum_mib: maximum,
                vcpus,
                cpus,
                run,
                disk_mib: disk,
                desktop,
                extra,
                ..Guest::new(&name, address)
            };
            testbed.start_guest(site, &guest)
        }
        GuestCommand::List => {
            for guest in testbed.guests()? {
                let sites = testbed.where_is(&guest.name)?;
                let sites: Vec<String> = sites.iter().map(SiteName::to_string).collect();
                let Guest {
                    name,
                    kind,
                    memory_mib,
                    vcpus,
                    ..
                } = &guest;
                let sites = if sites.is_empty() {
                    "nowhere".to_owned()
                } else {
                    sites.join(" ")
                };
                println!(
                    "{name}\t{kind}\t{memory_mib} MiB\t{vcpus}\t{}\t{sites}",
                    guest.address()
                );
            }
            Ok(())
        }
        GuestCommand::Ask {
            name,
            command,
            from,
        } => {
            let guest = testbed.guest(&name)?;
            println!("{}", testbed.ask(from, &guest, &command.join(" "))?);
            Ok(())
        }
        GuestCommand::Stop { name } => testbed.stop_guest(&name),
    }
}
