//! The table of what a journal demands.

use super::*;
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
