//! `testbed bench-xl`: measures moves beside `xl migrate`.

use crate::show::{POLICY, WAN, sites};
use anyhow::Result;
use std::thread;
use std::time::{Duration, Instant};
use testbed::{Guest, Hypervisor, Kind, Link, SiteName, Testbed};

/// Which rows to measure.
#[derive(Debug, clap::Args)]
pub struct Rows {
    /// Memory of the guests
    #[arg(long, value_name = "MIB", default_values_t = [128, 512])]
    memory: Vec<u32>,
    /// What the guests do. Empty ones, whose move is the floor, are measured in any case
    #[arg(long, value_name = "LOAD", default_values_t = Load::ALL)]
    load: Vec<Load>,
    /// Moves by each command: the medians are printed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    moves: u8,
}

/// What a guest does, or what is at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Load {
    /// Nothing.
    Idle,
    /// 8 MB are rewritten all the time, 40 MB are random.
    Busy,
    /// Nothing, and another guest of its trust group has left a shadow at the destination.
    Group,
    /// Nothing, and it comes back to where it has just been.
    Back,
}

impl Load {
    const ALL: [Load; 4] = [Load::Idle, Load::Busy, Load::Group, Load::Back];
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Load::Idle => "idle",
            Load::Busy => "busy",
            Load::Group => "group",
            Load::Back => "back",
        })
    }
}

/// What a move took.
#[derive(Debug, Clone, Copy)]
struct Figures {
    seconds: f64,
    /// What left the source's card.
    megabytes: f64,
    /// The longest silence of the pings; of an empty guest, from when it was asked to suspend to its
    /// first act at the destination.
    silence: f64,
    /// Whether the client's connection went on.
    alive: bool,
    /// How busy dom0's CPU was at the source and at the destination, in percent: near 100 where the
    /// emulated processor bounds the move rather than the link.
    busy: [f64; 2],
}

/// Ticks that dom0's CPUs were busy and idle since the boot.
fn ticks(testbed: &Testbed, site: SiteName) -> Result<(f64, f64)> {
    let line = testbed.site(site).run("head -1 /proc/stat")?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<std::result::Result<_, _>>()?;
    // user nice system idle iowait irq softirq steal: what others took of the processor counts.
    let idle: f64 = ticks.iter().skip(3).take(2).sum();
    Ok((ticks.iter().take(8).sum::<f64>() - idle, idle))
}

/// Measures one move.
fn measure(testbed: &Testbed, guest: &Guest, from: SiteName, command: &str) -> Result<Figures> {
    let bytes = |site: SiteName| -> Result<f64> {
        let text = testbed
            .site(site)
            .run("cat /sys/class/net/eth1/statistics/tx_bytes")?;
        Ok(text.trim().parse()?)
    };
    let run = || -> Result<(f64, f64, [f64; 2])> {
        let looks = || -> Result<_> { Ok([ticks(testbed, from)?, ticks(testbed, from.other())?]) };
        let (before, sent, start) = (looks()?, bytes(from)?, Instant::now());
        testbed.site(from).run(command)?;
        let (took, sent, after) = (start.elapsed(), bytes(from)? - sent, looks()?);
        let busy = [0, 1].map(|side| {
            let busy = after[side].0 - before[side].0;
            100.0 * busy / (busy + after[side].1 - before[side].1).max(1.0)
        });
        Ok((took.as_secs_f64(), sent, busy))
    };
    let (took, silence, alive) = if guest.kind == Kind::Empty {
        let pause = testbed.watch_pause(from, guest)?;
        (run()?, pause.finish()?.as_secs_f64(), true)
    } else {
        // A client at the destination: what it asks crosses the WAN before the move, not after.
        let watch = testbed.watch(from.other(), guest)?;
        thread::sleep(Duration::from_secs(2));
        let took = run()?;
        thread::sleep(Duration::from_secs(3));
        let seen = watch.finish()?;
        (took, seen.ping.longest_silence, seen.echo.alive)
    };
    let (seconds, sent, busy) = took;
    Ok(Figures {
        seconds,
        megabytes: sent / 1e6,
        silence,
        alive,
        busy,
    })
}

/// What is measured beside one another.
const COMMANDS: [&str; 3] = ["xl migrate", "xl migrate -s 'ssh -C'", "vmshadow migrate"];

/// And of guests that are never quiet, with leave to slow them down.
const SLOWING_DOWN: &str = "vmshadow migrate --throttle 5";

/// A guest's moves by each of the commands, as many of each: the medians; of moves `back`, after one
/// by the same command that is not measured. Each time it is started
/// anew: Linux loses a megabyte with every resume, which a small and busy guest has not to spare.
fn measure_all(
    testbed: &Testbed,
    guest: &Guest,
    commands: &[&str],
    moves: u8,
    back: bool,
) -> Result<Vec<Figures>> {
    let mut all = vec![Vec::new(); commands.len()];
    for _ in 0..moves {
        for (command, figures) in commands.iter().zip(&mut all) {
            testbed.start_guest(SiteName::A, guest)?;
            thread::sleep(Duration::from_secs(5));
            let to = |site: SiteName| format!("{command} {} {} 2>&1", guest.name, site.address());
            let mut from = SiteName::A;
            if back {
                testbed.site(from).run(&to(from.other()))?;
                from = from.other();
                thread::sleep(Duration::from_secs(5));
            }
            figures.push(measure(testbed, guest, from, &to(from.other()))?);
            testbed.stop_guest(&guest.name)?;
        }
    }
    Ok(all.iter().map(|figures| medians(figures)).collect())
}

/// The median; of an even count, the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count => f64::midpoint(values[(count - 1) / 2], values[count / 2]),
    }
}

/// Each figure's median. A connection that was lost once is told.
fn medians(moves: &[Figures]) -> Figures {
    let of = |figure: &dyn Fn(&Figures) -> f64| median(moves.iter().map(figure).collect());
    Figures {
        seconds: of(&|figures| figures.seconds),
        megabytes: of(&|figures| figures.megabytes),
        silence: of(&|figures| figures.silence),
        alive: moves.iter().all(|figures| figures.alive),
        busy: [
            of(&|figures| figures.busy[0]),
            of(&|figures| figures.busy[1]),
        ],
    }
}

/// Prints a guest's rows; with the floor, what is above it in brackets.
fn print_rows(label: &str, commands: &[&str], all: &[Figures], floor: Option<&[Figures]>) {
    for (at, (command, figures)) in commands.iter().zip(all).enumerate() {
        let cell = |value: f64, floor: Option<f64>, digits: usize| match floor {
            Some(floor) => format!("{value:.digits$} ({:.digits$})", value - floor),
            None => format!("{value:.digits$}"),
        };
        // One that may slow the guest down has the floor of the one that may not.
        let own = floor.and_then(|floor| floor.get(at).or(floor.last()));
        // A command that sends zeros as they are has no floor of its own in bytes.
        let least = floor.and_then(|floor| {
            let bytes = floor.iter().map(|figures| figures.megabytes);
            bytes.min_by(f64::total_cmp)
        });
        println!(
            "| {label} | {command} | {} | {} | {}{} | {:.0}, {:.0} |",
            cell(figures.seconds, own.map(|own| own.seconds), 1),
            cell(figures.megabytes, least, 1),
            cell(figures.silence, own.map(|own| own.silence), 2),
            // Stock tools are silent for so long on a slow machine that clients give up.
            if figures.alive {
                ""
            } else {
                ", connection lost"
            },
            figures.busy[0],
            figures.busy[1],
        );
    }
}

/// Stock `xl migrate`, with and without compression by ssh, and ours, in one run.
pub fn bench_xl(rows: &Rows) -> Result<()> {
    let testbed = sites(Hypervisor::Release)?;
    let moves = rows.moves;
    println!("50 Mbit/s, 40 ms RTT, PV guests, emulated Xen 4.17.5, the median of {moves} each");
    println!(
        "In brackets: above the floor, the move of an empty guest without a limit of the rate"
    );
    println!("| guest | command | seconds | MB on the wire | silence, s | dom0s busy, % |");
    println!("|---|---|---|---|---|---|");
    for &memory_mib in &rows.memory {
        let guest = Guest {
            memory_mib,
            ..Guest::new("g1", 101)
        };
        let empty = Guest {
            kind: Kind::Empty,
            ..guest.clone()
        };
        // What no encoding of pages changes: even zeros are free.
        testbed.set_link(&Link { mbit: None, ..WAN })?;
        let floor = measure_all(&testbed, &empty, &COMMANDS, moves, false)?;
        let label = format!("{memory_mib} MB empty, no limit");
        print_rows(&label, &COMMANDS, &floor, None);
        testbed.set_link(&WAN)?;
        let all = measure_all(&testbed, &empty, &COMMANDS, moves, false)?;
        print_rows(
            &format!("{memory_mib} MB empty"),
            &COMMANDS,
            &all,
            Some(&floor),
        );
        for load in &rows.load {
            let mut commands = COMMANDS.to_vec();
            let run: &[&str] = match load {
                Load::Busy => {
                    commands.push(SLOWING_DOWN);
                    &["rewrite 8", "random 40"]
                }
                Load::Idle | Load::Group | Load::Back => &[],
            };
            let guest = Guest {
                run: run.iter().map(|line| (*line).to_owned()).collect(),
                ..guest.clone()
            };
            if *load == Load::Group {
                leave_another(&testbed, &guest)?;
            }
            let all = measure_all(&testbed, &guest, &commands, moves, *load == Load::Back)?;
            print_rows(
                &format!("{memory_mib} MB {load}"),
                &commands,
                &all,
                Some(&floor),
            );
            for site in testbed.sites() {
                site.write("/etc/vmshadow/vmshadow.toml", POLICY.as_bytes())?;
            }
        }
    }
    testbed.down()?;
    Ok(())
}

/// Puts the guest into a trust group, another guest of which leaves a shadow at the destination.
fn leave_another(testbed: &Testbed, guest: &Guest) -> Result<()> {
    let key = "/etc/vmshadow/bench.key";
    let policy =
        format!("{POLICY}[[group]]\nname = \"bench\"\nkey_file = \"{key}\"\nguests = [\"g*\"]\n");
    for site in testbed.sites() {
        site.run(&format!(
            "vmshadow shadows --drop-all; umask 077; printf '%064d' 7 > {key}"
        ))?;
        site.write("/etc/vmshadow/vmshadow.toml", policy.as_bytes())?;
    }
    let other = Guest {
        name: "g2".into(),
        ..guest.clone()
    };
    testbed.start_guest(SiteName::A, &other)?;
    let there = SiteName::B.address();
    let here = testbed.site(SiteName::A);
    here.run(&format!("vmshadow shadow g2 {there} 2>&1"))?;
    testbed.stop_guest("g2")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_even_count_two_are_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 9.0, 1.0, 2.0]), 3.0);
        assert_eq!(median(vec![7.0]), 7.0);
    }
}
