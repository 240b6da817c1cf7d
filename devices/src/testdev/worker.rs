//! The channels at work: one thread that does a piece for each in turn, and who waits for whom.
//!
//! Locks: everything is under one mutex, which is never held while a piece is done, a page
//! request is sent or an interrupt is signalled. So a response may come on a thread that holds
//! locks of a front end, also before [`Upstream::page_request`] returns.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use viommu::Pasid;
use viommu::backend::{PageResponse, ResponseCode};

use super::CHANNELS;
use super::registers::{Ask, Channel, Control, Enables, Job, PIECE, Reason, State};
use super::requests::{Upstream, perform};
use crate::counters;
use crate::pci::msix::Msix;

/// The channels, and the page request groups they have outstanding.
pub(super) struct Channels {
    board: Mutex<Board>,
    /// There may be something for the worker, or it has finished a step.
    changed: Condvar,
    msix: Msix,
    counts: Arc<Counts>,
}

counters! {
    /// What the engine counts, also across its resets.
    pub(super) struct Counts {
        /// Pieces of work.
        steps,
        /// Interrupts.
        interrupts,
        /// Pages that were asked for.
        page_requests,
        /// Answers to them.
        page_responses,
    }
}

struct Board {
    channels: Vec<Channel>,
    enables: Enables,
    /// Who waits for which group: channel and START. A channel that was aborted waits no more,
    /// but its group stays until its response comes.
    groups: BTreeMap<(Option<Pasid>, u16), (usize, u64)>,
    paging: Paging,
    counters: Counters,
    /// The channel that was served last.
    last: usize,
    /// How many wait for the step in flight to end: no other is begun.
    paused: u32,
    stop: bool,
}

/// The state behind PRI's status register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Paging {
    /// Response Failure.
    pub(super) failed: bool,
    /// Unexpected Page Request Group Index.
    pub(super) unexpected: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: u64,
    pub(super) responses: u64,
    pub(super) stray: u64,
}

impl Board {
    fn new() -> Self {
        Self {
            channels: (0..CHANNELS).map(Channel::new).collect(),
            enables: Enables::default(),
            groups: BTreeMap::new(),
            paging: Paging::default(),
            counters: Counters::default(),
            last: 0,
            paused: 0,
            stop: false,
        }
    }

    /// The next step of the next RUNNING channel. Channels that cannot go on end here, and their
    /// interrupts are added to `vectors`.
    fn next(&mut self, vectors: &mut Vec<u16>) -> Option<(usize, Job)> {
        if self.paused > 0 {
            return None;
        }
        for turn in 1..=CHANNELS {
            let index = (self.last + turn) % CHANNELS;
            let channel = &mut self.channels[index];
            match channel.step(self.enables) {
                None => {}
                Some(Ok(job)) => {
                    self.last = index;
                    return Some((index, job));
                }
                Some(Err(reason)) => {
                    channel.fail(reason);
                    channel.landed();
                    vectors.extend(channel.interrupt());
                }
            }
        }
        None
    }

    /// Whether the requests may be sent now, and if so, that they are on record.
    fn ask(&mut self, index: usize, job: &Job, ask: Ask) -> bool {
        let key = (job.attributes.pasid, job.group);
        let channel = &mut self.channels[index];
        if self.paging.failed {
            channel.fail(Reason::Disabled);
        } else if self.groups.contains_key(&key) {
            channel.fail(Reason::GroupBusy);
        } else if self.groups.len() >= CHANNELS.min(self.enables.allocation as usize) {
            channel.starve();
        } else {
            if ask.last {
                self.groups.insert(key, (index, job.number));
            }
            self.counters.requests += ask.pages;
            channel.wait(ask);
            return true;
        }
        false
    }

    /// The requests that [`ask`](Self::ask) put on record were not sent.
    fn unsend(&mut self, index: usize, job: &Job) {
        let of_job = |waits: &mut (usize, u64)| *waits == (index, job.number);
        let key = (job.attributes.pasid, job.group);
        if self.groups.get_mut(&key).is_some_and(of_job) {
            self.groups.remove(&key);
        }
        self.channels[index].fail(Reason::PageRefused);
    }

    /// There may be room for more groups.
    fn feed(&mut self) {
        self.channels.iter_mut().for_each(Channel::feed);
    }
}

/// Sends page requests; whether the last of them was sent.
fn send(job: &Job, ask: Ask, upstream: &dyn Upstream) -> bool {
    let mut sent = false;
    for page in 0..ask.pages {
        let iova = ask.iova.wrapping_add(4096 * page);
        let last = ask.last && page + 1 == ask.pages;
        sent = upstream.page_request(&job.attributes, iova, ask.access, job.group, last);
    }
    sent
}

impl Channels {
    pub(super) fn new(msix: Msix) -> Self {
        Self {
            board: Mutex::new(Board::new()),
            changed: Condvar::new(),
            msix,
            counts: Arc::default(),
        }
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }

    pub(super) fn msix(&self) -> &Msix {
        &self.msix
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The 4 bytes at `at` of channel `index`.
    pub(super) fn read(&self, index: usize, at: u64) -> u32 {
        self.board()
            .channels
            .get(index)
            .map_or(0, |channel| channel.read(at))
    }

    /// Writes the 4 bytes at `at` of channel `index`.
    pub(super) fn write(&self, index: usize, at: u64, value: u32) {
        let mut board = self.board();
        let Some(channel) = board.channels.get_mut(index) else {
            return;
        };
        let ended = match channel.write(at, value) {
            None => false,
            Some(Control::Start) => channel.start(),
            Some(Control::Abort) => channel.abort(),
        };
        let interrupt = channel.interrupt().filter(|_| ended);
        drop(board);
        self.changed.notify_all();
        self.interrupt(interrupt);
    }

    fn interrupt(&self, vectors: impl IntoIterator<Item = u16>) {
        for vector in vectors {
            self.counts.interrupts.add(1);
            self.msix.signal(vector);
        }
    }

    /// What configuration space allows has changed. Returns when no piece that was begun under
    /// more is in flight.
    pub(super) fn enable(&self, enables: Enables) {
        let mut board = self.board();
        if board.enables == enables {
            return;
        }
        if enables.pri && !board.enables.pri {
            board.paging.failed = false;
        }
        board.enables = enables;
        board.feed();
        drop(self.settle(board));
    }

    /// Everything as after power-on, except what configuration space allows. Returns when no DMA
    /// is in flight.
    pub(super) fn reset(&self) {
        let mut board = self.board();
        for channel in &mut board.channels {
            channel.abort();
        }
        let mut board = self.settle(board);
        let mut fresh = Board {
            enables: board.enables,
            paused: board.paused,
            stop: board.stop,
            ..Board::new()
        };
        for (new, old) in fresh.channels.iter_mut().zip(&board.channels) {
            new.continue_from(old);
        }
        *board = fresh;
    }

    /// Waits until no step is in flight. None is begun before the guard is dropped.
    fn settle<'b>(&self, mut board: MutexGuard<'b, Board>) -> MutexGuard<'b, Board> {
        board.paused += 1;
        let busy = |board: &mut Board| board.channels.iter().any(Channel::in_flight);
        let settled = self.changed.wait_while(board, busy);
        let mut board = settled.unwrap_or_else(PoisonError::into_inner);
        board.paused -= 1;
        self.changed.notify_all();
        board
    }

    /// The counters, how many groups are outstanding, and the ENABLED register.
    pub(super) fn counters(&self) -> (Counters, u32, u32) {
        let board = self.board();
        (
            board.counters,
            board.groups.len() as u32,
            board.enables.bits(),
        )
    }

    /// The state of PRI, and whether it is stopped: neither asking nor owed a response.
    pub(super) fn paging(&self) -> (Paging, bool) {
        let board = self.board();
        let active = board.enables.pri && !board.paging.failed;
        (board.paging, !active && board.groups.is_empty())
    }

    /// The guest cleared status bits.
    pub(super) fn set_paging(&self, paging: Paging) {
        self.board().paging = paging;
    }

    /// PRI's Reset: groups are outstanding no more, and nobody waits for them.
    pub(super) fn reset_paging(&self) {
        let mut board = self.board();
        let groups = std::mem::take(&mut board.groups);
        let mut vectors = Vec::new();
        for (index, number) in groups.into_values() {
            let channel = &mut board.channels[index];
            if channel.number() == number && channel.state() == State::Waiting {
                channel.fail(Reason::Disabled);
                vectors.extend(channel.ended());
            }
        }
        board.paging = Paging::default();
        board.feed();
        drop(board);
        self.changed.notify_all();
        self.interrupt(vectors);
    }

    /// A response came.
    pub(super) fn respond(&self, response: PageResponse) {
        let mut board = self.board();
        let mut ended = None;
        self.counts.page_responses.add(1);
        board.counters.responses += 1;
        match board
            .groups
            .remove(&(response.target.pasid, response.group))
        {
            None => {
                board.counters.stray += 1;
                board.paging.unexpected = true;
            }
            Some((index, number)) => {
                let channel = &mut board.channels[index];
                if channel.number() == number && channel.state() == State::Waiting {
                    channel.respond(response.code);
                    ended = channel.ended();
                }
            }
        }
        board.paging.failed |= response.code == ResponseCode::Failure;
        board.feed();
        drop(board);
        self.changed.notify_all();
        self.interrupt(ended);
    }

    /// Does steps until the worker is stopped.
    fn work(&self, upstream: &dyn Upstream) {
        let mut buffer = Box::new([0; PIECE]);
        let mut board = self.board();
        while !board.stop {
            let busy;
            (board, busy) = self.turn(board, upstream, &mut buffer);
            if !busy {
                let woken = self.changed.wait(board);
                board = woken.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Does one step on this thread, for the fuzz harness, which has no worker.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn step(&self, upstream: &dyn Upstream, buffer: &mut [u8; PIECE]) -> bool {
        self.turn(self.board(), upstream, buffer).1
    }

    /// Does one step, if there is one; `false` when nothing was done, with the lock never let go.
    fn turn<'b>(
        &'b self,
        mut board: MutexGuard<'b, Board>,
        upstream: &dyn Upstream,
        buffer: &mut [u8; PIECE],
    ) -> (MutexGuard<'b, Board>, bool) {
        let mut vectors = Vec::new();
        let next = board.next(&mut vectors);
        if next.is_none() && vectors.is_empty() {
            return (board, false);
        }
        if let Some((index, job)) = next {
            drop(board);
            self.counts.steps.add(1);
            let outcome = perform(&job, upstream, buffer);
            board = self.board();
            let ask = board.channels[index].apply(&job, outcome);
            if let Some(ask) = ask
                && board.ask(index, &job, ask)
            {
                drop(board);
                self.counts.page_requests.add(ask.pages);
                let sent = send(&job, ask, upstream);
                board = self.board();
                if !sent {
                    board.unsend(index, &job);
                }
            }
            let channel = &mut board.channels[index];
            channel.landed();
            vectors.extend(channel.ended());
            self.changed.notify_all();
        }
        drop(board);
        self.interrupt(vectors);
        (self.board(), true)
    }
}

/// The thread. Dropping it ends the thread.
pub(super) struct Worker {
    channels: Arc<Channels>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn start(channels: Arc<Channels>, upstream: Box<dyn Upstream>) -> io::Result<Self> {
        let work = {
            let channels = Arc::clone(&channels);
            move || channels.work(&*upstream)
        };
        let thread = viommu::thread::spawn("dma-test-engine", work)?;
        Ok(Self {
            channels,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.channels.board().stop = true;
        self.channels.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the DMA test engine's thread panicked");
        }
    }
}
