//! Flows between real sockets on loopback.

use super::*;
use std::net::{TcpListener, TcpStream as StdStream};

fn pair() -> (StdStream, Endpoint) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let outer = StdStream::connect(listener.local_addr().unwrap()).unwrap();
    let (inner, _) = listener.accept().unwrap();
    inner.set_nonblocking(true).unwrap();
    (outer, Endpoint::new(TcpStream::from_std(inner)))
}

struct Bench {
    scratch: Vec<u8>,
    pool: PipePool,
    budget: Budget,
    limit: usize,
}

impl Bench {
    fn new(pipes: usize, limit: usize) -> Self {
        Self {
            scratch: vec![0; 1 << 16],
            pool: PipePool::new(pipes, 1 << 17),
            budget: Budget::new(1 << 24),
            limit,
        }
    }

    fn work(&mut self) -> Workspace<'_> {
        Workspace {
            scratch: &mut self.scratch,
            pool: &mut self.pool,
            budget: &self.budget,
            limit: self.limit,
            turn: 1 << 20,
        }
    }
}

/// Sends `length` bytes through a flow, splicing or not, with a slow reader, and compares.
fn carry(pipes: usize, length: usize) {
    let (mut from, mut source) = pair();
    let (to, mut sink) = pair();
    let sent: Vec<u8> = (0..length)
        .map(|i| u8::try_from(i * 7 % 253).unwrap())
        .collect();
    let expected = sent.clone();
    let writer = std::thread::spawn(move || {
        from.write_all(&sent).unwrap();
        from.shutdown(std::net::Shutdown::Write).unwrap();
        from
    });
    let reader = std::thread::spawn(move || {
        let mut to = to;
        let mut got = Vec::new();
        to.read_to_end(&mut got).unwrap();
        got
    });
    let mut bench = Bench::new(pipes, 1 << 16);
    let mut flow = Flow::new();
    while flow.end() != End::Told {
        // No event loop here: try both sides each time.
        source.readable = true;
        sink.writable = true;
        flow.pump(Some(&mut source), Some(&mut sink), &mut bench.work())
            .unwrap();
        std::thread::yield_now();
    }
    assert!(reader.join().unwrap() == expected);
    writer.join().unwrap();
    assert_eq!(bench.budget.held(), 0);
    assert_eq!(flow.written(), length as u64);
}

#[test]
fn all_bytes_arrive_copied_or_spliced() {
    carry(0, 3_000_000);
    carry(1, 30_000_000);
    carry(1, 10);
    carry(1, 0);
}

#[test]
fn without_a_sink_no_more_than_the_limit_is_taken() {
    let (mut from, mut source) = pair();
    from.write_all(&[1; 100_000]).unwrap();
    let mut bench = Bench::new(1, 5_000);
    let mut flow = Flow::new();
    for _ in 0..100 {
        source.readable = true;
        flow.pump(Some(&mut source), None, &mut bench.work())
            .unwrap();
    }
    assert_eq!(flow.queued(), 5_000);
    assert_eq!(bench.budget.held(), 5_000);
    flow.clear(&mut bench.pool, &bench.budget);
    assert_eq!(bench.budget.held(), 0);
}

#[test]
fn what_is_put_in_front_goes_first() {
    let (mut to, mut sink) = pair();
    let mut bench = Bench::new(0, 100);
    let mut flow = Flow::new();
    flow.push_back(b"second", &bench.budget);
    flow.push_front(b"first ".to_vec(), &bench.budget);
    flow.push_back(b" third", &bench.budget);
    assert_eq!((flow.queued(), flow.taken()), (18, 12));
    flow.source_ended();
    flow.pump(None, Some(&mut sink), &mut bench.work()).unwrap();
    assert_eq!(flow.end(), End::Told);
    let mut got = String::new();
    to.read_to_string(&mut got).unwrap();
    assert_eq!(got, "first second third");
    // What is in front was counted before.
    assert_eq!((flow.written(), flow.given()), (18, 12));
    assert_eq!(flow.taken(), 12);
}

#[test]
fn what_the_kernel_does_not_take_apart_stays_in_front() {
    let (mut to, mut sink) = pair();
    let mut bench = Bench::new(0, 100);
    let mut flow = Flow::new();
    flow.push_back(b"the end", &bench.budget);
    let first: Vec<u8> = (0..30_000_000_u32)
        .map(|i| u8::try_from(i % 241).unwrap())
        .collect();
    flow.write_apart(first.clone(), &sink.stream, &bench.budget);
    // No window takes all of that.
    assert!(flow.written() > 0 && flow.queued() > 7);
    assert_eq!(flow.written() as usize + flow.queued(), first.len() + 7);
    flow.source_ended();
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        to.read_to_end(&mut got).unwrap();
        got
    });
    while flow.end() != End::Told {
        sink.writable = true;
        flow.pump(None, Some(&mut sink), &mut bench.work()).unwrap();
        std::thread::yield_now();
    }
    let got = reader.join().unwrap();
    assert!(got[..first.len()] == first && &got[first.len()..] == b"the end");
}

#[test]
fn a_reset_is_a_failure_of_its_side() {
    let (from, mut source) = pair();
    let (_to, mut sink) = pair();
    socket2::SockRef::from(&from)
        .set_linger(Some(std::time::Duration::ZERO))
        .unwrap();
    drop(from);
    let mut bench = Bench::new(0, 100);
    let mut flow = Flow::new();
    // The reset takes its time.
    let failure = loop {
        source.readable = true;
        match flow.pump(Some(&mut source), Some(&mut sink), &mut bench.work()) {
            Ok(_) => assert_eq!((flow.end(), flow.queued()), (End::Open, 0)),
            Err(failure) => break failure,
        }
        std::thread::yield_now();
    };
    assert!(matches!(failure, Failure::Source(_)));
}
