//! How a move goes, for people.
//!
//! On a terminal one line that changes, with rate, what remains and when it ends; elsewhere plain
//! lines, one a phase and round.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use migrate::pages::PAGE_SIZE;
use migrate::report::{Observer, Progress, Report};
use migrate::rounds::Outlook;

use crate::beside::Beside;

/// The observer that fits where we write to. Progress goes to standard error; `quiet` leaves only
/// warnings.
pub fn observer(quiet: bool) -> Box<dyn Observer> {
    let mut shown: Box<dyn Observer> = if quiet {
        Box::new(Warnings)
    } else if let Some(terminal) = Terminal::new() {
        Box::new(terminal)
    } else {
        Box::new(Lines {
            start: Instant::now(),
        })
    };
    Box::new(Unhurried(Beside::new(move |progress| {
        shown.notice(progress);
    })))
}

/// Never waits for a terminal.
struct Unhurried(Beside<Progress>);

impl Observer for Unhurried {
    fn notice(&mut self, progress: Progress) {
        match progress {
            Progress::Pages { .. } => self.0.show_in_passing(progress),
            _ => self.0.show(progress),
        }
    }
}

struct Warnings;

impl Observer for Warnings {
    fn notice(&mut self, progress: Progress) {
        if let Progress::Warning(text) = progress {
            tell!("Warning: {text}");
        }
    }
}

struct Lines {
    start: Instant,
}

impl Observer for Lines {
    fn notice(&mut self, progress: Progress) {
        let at = self.start.elapsed().as_secs_f64();
        match progress {
            Progress::Phase(name) => tell!("{at:7.1} s  {name}"),
            Progress::Warning(text) => tell!("{at:7.1} s  warning: {text}"),
            Progress::Round {
                number,
                round,
                left,
                hot,
            } => {
                let left = match (left, hot) {
                    (u64::MAX, _) => "?".to_owned(),
                    (left, 0) => left.to_string(),
                    (left, hot) => format!("{left} ({hot} of them hot)"),
                };
                tell!(
                    "{at:7.1} s  round {number}: {} of {} pages sent, {} on the wire, {left} left",
                    round.sent(),
                    round.pages,
                    HumanBytes(round.wire_bytes),
                );
            }
            Progress::Pages { .. } => {}
        }
    }
}

struct Terminal {
    bar: ProgressBar,
}

impl Terminal {
    /// None where standard error is no terminal, or one that can't move its cursor.
    fn new() -> Option<Self> {
        let bar = ProgressBar::no_length();
        if !stderr().is_terminal() || bar.is_hidden() {
            return None;
        }
        // The template is ours and is right; without it the bar still shows. What finds no room in
        // the line is cut off.
        if let Ok(style) = ProgressStyle::with_template("{prefix:14} {bar:20} {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Some(Terminal { bar })
    }
}

impl Observer for Terminal {
    fn notice(&mut self, progress: Progress) {
        match progress {
            Progress::Phase(name) => self.bar.set_prefix(name),
            Progress::Warning(text) => self.bar.suspend(|| tell!("Warning: {text}")),
            Progress::Pages {
                round,
                done,
                total,
                wire_bytes,
                outlook,
            } => {
                self.bar.set_length(total);
                self.bar.set_position(done);
                self.bar.set_message(line(round, wire_bytes, &outlook));
            }
            Progress::Round { .. } => {}
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// What the line on the terminal says of a round: as far as it is known.
fn line(round: u32, wire_bytes: u64, outlook: &Outlook) -> String {
    let mut parts = vec![format!("round {round}"), HumanBytes(wire_bytes).to_string()];
    if let Some(rate) = outlook.rate {
        parts.push(format!("{}/s", HumanBytes(rate as u64)));
    }
    let memory = |pages: f64| HumanBytes((pages * PAGE_SIZE as f64) as u64);
    if let Some(dirty) = outlook.dirty {
        parts.push(format!("{}/s change", memory(dirty)));
    }
    if let Some(left) = outlook.left {
        parts.push(format!("{} to look at", memory(left as f64)));
    }
    if let Some(rest) = outlook.rest {
        parts.push(format!("{} left", HumanDuration(rest)));
    }
    if let Some(downtime) = outlook.downtime {
        parts.push(format!("silence {:.1} s", downtime.as_secs_f64()));
    }
    parts.join("  ")
}

/// A finished move in a few lines.
pub fn summary(report: &Report) -> String {
    let mut text = format!(
        "{} moved to {} in {:.1} s: {} of memory, {} on the wire, {} rounds ({}), silent for {:.2} s\n",
        report.domain,
        report.destination,
        report.took.as_secs_f64(),
        HumanBytes(report.guest_bytes),
        HumanBytes(report.wire_bytes),
        report.rounds.len(),
        report
            .tracker
            .map(|tracker| tracker.to_string())
            .unwrap_or_default(),
        report.downtime.total.as_secs_f64(),
    );
    let phases: Vec<String> = report
        .phases
        .iter()
        .map(|(name, seconds)| format!("{name} {seconds:.1}"))
        .collect();
    text.push_str(&format!("  phases, s: {}\n", phases.join(", ")));
    let parts: Vec<String> = report
        .downtime
        .parts
        .iter()
        .map(|(name, seconds)| format!("{name} {seconds:.2}"))
        .collect();
    text.push_str(&format!("  silence, s: {}\n", parts.join(", ")));
    if let Some(predicted) = report.predicted.after_first_round {
        text.push_str(&format!(
            "  predicted after round 1: {:.1} s, {} on the wire, silent for {:.2} s\n",
            predicted.seconds,
            HumanBytes(predicted.bytes),
            predicted.downtime,
        ));
    }
    if let Some(slowed) = report.slowed_down {
        text.push_str(&format!(
            "  slowed down to {} of its processor time for {:.1} s\n",
            slowed.share, slowed.seconds,
        ));
    }
    if report.verified {
        text.push_str("  verified: all memory compared at both hosts\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_is_known() {
        assert_eq!(line(1, 2 << 20, &Outlook::default()), "round 1  2.00 MiB");
        let outlook = Outlook {
            rate: Some(1e6),
            dirty: Some(256.0),
            left: Some(512),
            rest: Some(Duration::from_secs(8)),
            downtime: Some(Duration::from_millis(730)),
        };
        assert_eq!(
            line(2, 3 << 20, &outlook),
            "round 2  3.00 MiB  976.56 KiB/s  1.00 MiB/s change  2.00 MiB to look at  \
             8 seconds left  silence 0.7 s"
        );
    }
}
