//! What simple ways to send pages would take: each with the rounds that its own bytes make.
//!
//! Their work costs no time here: the link alone holds them up.

use std::collections::vec_deque;
use std::iter::Peekable;
use std::time::Duration;

use lz4_flex::block::{compress_into, get_maximum_output_size};
use migrate::guest::replay::{Memory, Step};
use migrate::pages::{PAGE_SIZE, Page, PageSet};
use migrate::rounds::{FixedCost, Forecast, Left, Limits, Next, RoundFacts, Sent, Share, decide};
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer};

use crate::subject::Subject;

/// The link alone costs time.
const NO_COST: FixedCost = FixedCost {
    set_up: 0.0,
    suspend: 0.0,
    restore: 0.0,
    commit: 0.0,
    clean_up: 0.0,
};

/// Before each page: which it is.
const HEAD: u64 = 8;

pub enum Way {
    Raw,
    Lz4Page(Vec<u8>),
    Stream(CCtx<'static>, Vec<u8>),
}

impl Way {
    pub fn lz4() -> Way {
        Way::Lz4Page(vec![0; get_maximum_output_size(PAGE_SIZE)])
    }

    /// As the command `zstd` compresses its standard input at that level.
    pub fn zstd(level: i32) -> Way {
        let mut context = CCtx::create();
        // A level is always taken.
        let _ = context.set_parameter(CParameter::CompressionLevel(level));
        Way::Stream(context, vec![0; CCtx::out_size()])
    }

    /// Bytes for one more page.
    pub fn page(&mut self, page: &Page) -> u64 {
        match self {
            Way::Raw => PAGE_SIZE as u64,
            Way::Lz4Page(into) => {
                let length = compress_into(page, into).unwrap_or(PAGE_SIZE);
                length.min(PAGE_SIZE) as u64
            }
            Way::Stream(..) => self.compress(page, ZSTD_EndDirective::ZSTD_e_continue),
        }
    }

    /// Bytes that were held back.
    pub fn flush(&mut self) -> u64 {
        match self {
            Way::Stream(..) => self.compress(&[], ZSTD_EndDirective::ZSTD_e_flush),
            _ => 0,
        }
    }

    fn compress(&mut self, from: &[u8], end: ZSTD_EndDirective) -> u64 {
        let Way::Stream(context, into) = self else {
            return 0;
        };
        let mut input = InBuffer::around(from);
        let mut bytes = 0;
        loop {
            let mut output = OutBuffer::around(&mut into[..]);
            let left = context.compress_stream2(&mut output, &mut input, end);
            let left =
                left.unwrap_or_else(|code| panic!("zstd: {}", zstd_safe::get_error_name(code)));
            bytes += output.pos() as u64;
            let flushing = end != ZSTD_EndDirective::ZSTD_e_continue;
            if input.pos() == from.len() && !(flushing && left > 0) {
                return bytes;
            }
        }
    }
}

/// What a move takes.
pub struct Taken {
    pub first: u64,
    pub whole: u64,
    pub rounds: usize,
    pub seconds: f64,
}

/// Moves the subject over a link of `rate` bytes a second, by the same rules as ours.
pub fn simulate(subject: &Subject, mut way: Way, rate: u64, limits: &Limits) -> Taken {
    let mut guest = Guest {
        memory: subject.memory.clone(),
        steps: subject.history.steps.iter().peekable(),
        written: PageSet::new(subject.memory.pages()),
    };
    let mut now = Duration::ZERO;
    let mut dirty = PageSet::full(subject.memory.pages());
    let mut history: Vec<RoundFacts> = Vec::new();
    let mut forecast = Forecast::new(NO_COST);
    // Only ours knows hot pages.
    let mut left = Left::default();
    let mut first = 0;
    let mut whole = 0;
    loop {
        let suspended = matches!(
            decide(&history, &left, &forecast, limits, Share::WHOLE),
            Next::Suspend(_)
        );
        let link = Link { began: now, rate };
        let (sent, bytes) = send(&mut guest, &dirty, &mut way, (!suspended).then_some(link));
        let took = link.takes(bytes);
        now += took;
        whole += bytes;
        if history.is_empty() {
            first = bytes;
        }
        if suspended {
            return Taken {
                first,
                whole,
                rounds: history.len() + 1,
                seconds: now.as_secs_f64(),
            };
        }
        dirty = guest.take_written();
        forecast.sent(Sent {
            first: history.is_empty(),
            pages: sent,
            bytes,
            took,
        });
        left.cold = dirty.len();
        history.push(RoundFacts {
            sent,
            left: dirty.len(),
            wire_bytes: bytes,
            took,
            ..RoundFacts::default()
        });
    }
}

/// A guest that writes as its history says.
struct Guest<'a> {
    memory: Memory,
    steps: Peekable<vec_deque::Iter<'a, Step>>,
    /// Pages that it has written since they were taken last.
    written: PageSet,
}

impl Guest<'_> {
    /// Writes what it has written by then.
    fn run(&mut self, until: Duration) {
        while let Some(step) = self.steps.next_if(|step| step.at <= until) {
            for write in &step.writes {
                if self.memory.apply(write) {
                    self.written.insert(write.pfn);
                }
            }
        }
    }

    fn take_written(&mut self) -> PageSet {
        let none = PageSet::new(self.memory.pages());
        std::mem::replace(&mut self.written, none)
    }
}

/// A link with a rate in bytes a second, by which a round began to be sent then.
#[derive(Clone, Copy)]
struct Link {
    began: Duration,
    rate: u64,
}

impl Link {
    fn takes(self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.rate as f64)
    }
}

/// Sends pages, each as it is when the link has come to it; over no `link` while the guest is
/// suspended. How many had content, and the bytes.
fn send(guest: &mut Guest<'_>, dirty: &PageSet, way: &mut Way, link: Option<Link>) -> (u64, u64) {
    let (mut sent, mut bytes) = (0, 0);
    for pfn in dirty.iter() {
        if let Some((page_type, content)) = guest.memory.page(pfn)
            && page_type.has_data()
        {
            sent += 1;
            bytes += HEAD + content.look(|page| way.page(page));
            if let Some(link) = link {
                guest.run(link.began + link.takes(bytes));
            }
        }
    }
    bytes += way.flush();
    if let Some(link) = link {
        guest.run(link.began + link.takes(bytes));
    }
    (sent, bytes)
}
