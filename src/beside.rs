//! What is shown by a thread of its own.
//!
//! ```text
//!   move -- show() --> [ ][ ][ ] --> thread --> terminal
//! ```
//!
//! A terminal may stand still: by Ctrl-S, or as the end of a session that hangs. Whoever writes to it
//! waits then, and that must not be who has a guest suspended.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

/// So much is kept for a terminal that stands still. What comes then is not shown.
pub const KEPT: usize = 256;

/// How long the end waits for what is to be shown still.
const LAST: Duration = Duration::from_secs(1);

/// Shows things in their order. Dropping it waits until all is shown, unless the terminal stands still.
pub struct Beside<T> {
    things: Option<Sender<T>>,
    /// Closes when all is shown.
    shown: Receiver<()>,
}

impl<T: Send + 'static> Beside<T> {
    pub fn new(show: impl FnMut(T) + Send + 'static) -> Self {
        let (things, coming) = bounded(KEPT);
        let (showing, shown) = bounded::<()>(0);
        thread::spawn(move || {
            // Closes when this thread ends: after what shows has, and has shown its last.
            let _showing = showing;
            let mut show = show;
            coming.into_iter().for_each(&mut show);
        });
        Beside {
            things: Some(things),
            shown,
        }
    }
}

impl<T> Beside<T> {
    /// Has it shown, and never waits for that.
    pub fn show(&self, thing: T) {
        if let Some(things) = &self.things {
            // Nobody sees what a terminal that stands still does not show.
            let _ = things.try_send(thing);
        }
    }

    /// Has it shown if there is room for what matters more. What comes after it says the same anew.
    pub fn show_in_passing(&self, thing: T) {
        if self.things.as_ref().is_some_and(|it| it.len() < KEPT / 2) {
            self.show(thing);
        }
    }
}

impl<T> Drop for Beside<T> {
    fn drop(&mut self) {
        self.things = None;
        // It closes, or the terminal stands still.
        let _ = self.shown.recv_timeout(LAST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_that_stands_still_holds_nothing_up() {
        let (keep, stuck) = bounded::<()>(0);
        let beside = Beside::new(move |_| {
            let _ = stuck.recv();
        });
        for line in 0..2 * KEPT {
            beside.show(line);
        }
        drop(beside);
        drop(keep);
    }

    #[test]
    fn what_passes_leaves_room() {
        let (keep, stuck) = bounded::<()>(0);
        let (sender, shown) = bounded(2 * KEPT);
        let beside = Beside::new(move |line| {
            let _ = stuck.recv();
            sender.send(line).unwrap();
        });
        for _ in 0..2 * KEPT {
            beside.show_in_passing("page");
        }
        beside.show("warning");
        drop(keep);
        drop(beside);
        assert_eq!(shown.iter().last(), Some("warning"));
    }

    #[test]
    fn all_is_shown_in_order_before_the_end() {
        let (sender, shown) = bounded(KEPT);
        let beside = Beside::new(move |line| sender.send(line).unwrap());
        for line in 0..9 {
            beside.show(line);
        }
        drop(beside);
        assert!(shown.iter().eq(0..9));
    }
}
