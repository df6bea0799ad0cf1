//! The table of what a journal demands.

use std::cell::Cell;

use super::*;
use crate::guest::EndedSuspend;
use crate::handover::journal::Begin;

fn entry(role: Role, phase: Phase, outcome: Option<Outcome>) -> Entry {
    Entry {
        path: "/nowhere".into(),
        begin: Begin::new(role, "m", "g1", "u", "b").unwrap(),
        phase,
        cap: None,
        outcome,
    }
}

const PHASES: [Phase; 8] = [
    Phase::Begun,
    Phase::Tracking,
    Phase::Suspending,
    Phase::Resuming,
    Phase::Ready,
    Phase::Committed,
    Phase::Owner,
    Phase::Running,
];

/// Law 1 as a table: whatever pair of journals a double crash leaves behind, one guest runs.
#[test]
fn every_pair_of_journals_leaves_one_owner() {
    // The pairs that the protocol can reach: ready precedes committed precedes owner.
    let reachable = |source: Phase, destination: Phase| match destination {
        Phase::Begun => source < Phase::Committed,
        Phase::Ready => true,
        Phase::Owner | Phase::Running => source == Phase::Committed,
        _ => false,
    };
    let mut pairs = 0;
    for source in [
        Phase::Begun,
        Phase::Tracking,
        Phase::Suspending,
        Phase::Resuming,
        Phase::Committed,
    ] {
        for destination in [Phase::Begun, Phase::Ready, Phase::Owner, Phase::Running] {
            if !reachable(source, destination) {
                continue;
            }
            pairs += 1;
            let there = matches!(
                action(&entry(Role::Destination, destination, None)),
                Action::Finish | Action::ClearUp
            );
            let here = match action(&entry(Role::Source, source, None)) {
                Action::GoOn | Action::Resume => true,
                // The source does what the destination's own settlement decided.
                Action::AskDestination => !there,
                other => panic!("{other:?}"),
            };
            assert!(here ^ there, "{source:?} {destination:?}");
        }
    }
    assert_eq!(pairs, 11);
}

#[test]
fn a_source_never_resumes_by_itself_after_commit() {
    for phase in PHASES
        .into_iter()
        .filter(|phase| *phase >= Phase::Committed)
    {
        assert_eq!(
            action(&entry(Role::Source, phase, None)),
            Action::AskDestination
        );
    }
}

/// A move that would else stay open until no suspend can come any more.
#[test]
fn only_a_suspend_that_is_not_known_to_have_come_is_waited_for() {
    let waited_for = |phase| asked(phase, LateSuspend::IsWaitedFor) != Asked::Done;
    let phases: Vec<_> = PHASES.into_iter().filter(|it| waited_for(*it)).collect();
    assert_eq!(phases, [Phase::Suspending]);
    let no_longer = asked(Phase::Suspending, LateSuspend::StaysOpen);
    assert_eq!(no_longer, Asked::Waiting(Duration::ZERO));
}

/// Whoever decided that it goes on at the source may have let it run there.
#[test]
fn a_source_that_resumes_its_guest_asks_nobody_any_more() {
    let entry = entry(Role::Source, Phase::Resuming, None);
    assert_eq!(action(&entry), Action::Resume);
    assert!(!can_be_decreed(Role::Source, Phase::Resuming, false));
}

#[test]
fn a_site_that_may_run_the_guest_can_not_be_told_that_it_is_elsewhere() {
    for phase in PHASES {
        let source = phase == Phase::Committed;
        for here in [true, false] {
            assert_eq!(can_be_decreed(Role::Source, phase, here), source);
        }
        let complete = phase == Phase::Ready;
        let owned = action(&entry(Role::Destination, phase, None)) == Action::Finish;
        assert_eq!(can_be_decreed(Role::Destination, phase, false), complete);
        assert_eq!(
            can_be_decreed(Role::Destination, phase, true),
            complete || owned
        );
    }
}

#[test]
fn a_journal_that_can_not_be_read_may_be_of_an_open_move() {
    let root = tempfile::tempdir().unwrap();
    let directories = Directories::under(root.path());
    directories.create().unwrap();
    refuse_open_moves(&directories, "u", "g1").unwrap();
    let journal = directories.moves().join("00000000-00.source.journal");
    fs::write(&journal, "{\"record\":\"of another time\"}\n").unwrap();
    let error = refuse_open_moves(&directories, "u", "g1").unwrap_err();
    assert!(chain(&error).contains("00000000-00"), "{error}");
}

#[test]
fn an_ended_move_needs_nothing() {
    for role in [Role::Source, Role::Destination] {
        for phase in PHASES {
            for outcome in [Outcome::Moved, Outcome::Aborted] {
                assert_eq!(action(&entry(role, phase, Some(outcome))), Action::Nothing);
            }
        }
    }
}

/// A guest whose recovery fails once, before or after it has done a certain step.
#[derive(Default)]
struct Faulty {
    suspended: Cell<bool>,
    log_dirty: Cell<bool>,
    incoming: Cell<bool>,
    kept: Cell<bool>,
    cap: Cell<u32>,
    steps: Cell<u32>,
    fails_at: Cell<Option<u32>>,
}

impl Faulty {
    fn step(&self, done: impl FnOnce()) -> Result<()> {
        let failed = || Err(Error::Refused("It can't be done".into()));
        let at = self.steps.replace(self.steps.get() + 2);
        if self.fails_at.get() == Some(at) {
            return failed();
        }
        done();
        match self.fails_at.get() == Some(at + 1) {
            true => failed(),
            false => Ok(()),
        }
    }
}

impl Here for &Faulty {
    type Domain = u32;

    fn find(&self) -> Result<Option<u32>> {
        self.step(|| ()).map(|()| Some(1))
    }

    fn find_incoming(&self) -> Result<Option<u32>> {
        Ok(self.incoming.get().then_some(2))
    }

    fn is_left(&self, _domid: u32) -> Result<bool> {
        Ok(true)
    }

    fn is_suspended(&self, _domid: u32) -> Result<bool> {
        Ok(self.suspended.get())
    }

    fn restore_cpu_cap(&self, percent: u32) -> Result<()> {
        self.step(|| self.cap.set(percent))
    }

    fn end_suspend(&self, _domid: u32, asked: Asked) -> Result<EndedSuspend> {
        self.step(|| ())?;
        Ok(match (self.suspended.get(), asked) {
            (true, _) => EndedSuspend::Suspended,
            (false, Asked::Done) => EndedSuspend::GoesOn,
            (false, _) => EndedSuspend::MayCome,
        })
    }

    fn keep(&self) -> Result<()> {
        self.step(|| self.kept.set(true))
    }

    fn resume(&self, _domid: u32) -> Result<()> {
        self.step(|| self.suspended.set(false))
    }

    fn end_log_dirty(&self, _domid: u32) -> Result<()> {
        self.step(|| self.log_dirty.set(false))
    }

    fn destroy(&self, _domid: u32) -> Result<()> {
        self.step(|| self.incoming.set(false))
    }

    fn take_over(&self, _domid: u32) -> Result<()> {
        self.step(|| self.incoming.set(false))
    }

    fn name_arrived(&self, _domid: u32) {}
}

/// Whatever step of it fails, and whether it was carried out or not: the next one to come settles
/// the move, at once.
#[test]
fn recovery_that_was_cut_short_is_run_again() {
    let root = tempfile::tempdir().unwrap();
    let directories = Directories::under(root.path());
    directories.create().unwrap();
    let cases = [
        (Role::Source, Phase::Tracking),
        (Role::Source, Phase::Suspending),
        (Role::Source, Phase::Resuming),
        (Role::Source, Phase::Committed),
        (Role::Destination, Phase::Ready),
        (Role::Destination, Phase::Owner),
        (Role::Destination, Phase::Running),
    ];
    for (role, phase) in cases {
        for fails_at in 0.. {
            let (source, suspended) = (role == Role::Source, phase >= Phase::Suspending);
            let here = Faulty::default();
            here.log_dirty.set(source);
            here.suspended.set(source && suspended);
            here.incoming.set(!source && phase < Phase::Running);
            here.fails_at.set(Some(fails_at));
            let begin = Begin::new(role, "0123abcd-ef", "g1", "u", "b").unwrap();
            let mut journal = Journal::create(&directories, begin).unwrap();
            let path = journal.entry().path.clone();
            if source {
                journal.slowing(70).unwrap();
            }
            journal.reach(phase).unwrap();
            let settle = || {
                let mut journal = Journal::open(&path).unwrap();
                let mut ask = |_: &Entry| {
                    // Once it may go on here, nobody is.
                    assert!(here.suspended.get(), "{role:?}, {phase:?}, {fails_at}");
                    Ok(Owner::Source)
                };
                carry_out(&mut journal, LateSuspend::StaysOpen, &mut ask, || Ok(&here))?;
                Ok::<_, Error>(journal.entry().outcome)
            };
            let mut outcome = settle();
            if outcome.is_err() {
                here.fails_at.set(None);
                outcome = settle();
            }
            let case = format!("{role:?}, {phase:?}, {fails_at}: {outcome:?}");
            let moved = !source && phase >= Phase::Owner;
            let expected = if moved {
                Outcome::Moved
            } else {
                Outcome::Aborted
            };
            assert_eq!(outcome.ok().flatten(), Some(expected), "{case}");
            assert!(!here.suspended.get() && !here.log_dirty.get(), "{case}");
            assert!(!here.incoming.get(), "{case}");
            assert_eq!(here.kept.get(), moved || (source && suspended), "{case}");
            assert_eq!(here.cap.get(), if source { 70 } else { 0 }, "{case}");
            let _ = fs::remove_file(&path);
            if here.steps.get() <= fails_at {
                break;
            }
        }
    }
}
