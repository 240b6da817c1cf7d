//! Which addresses a piece of DMA work in flight may have translated, so that an invalidation
//! can wait for exactly the work it must wait for.
//!
//! Every port has one [`Slot`]. Its owner *announces* a range before it translates there; an
//! invalidation first makes itself seen (it raises a generation) and then looks at the slots.
//! The order is what makes it sound without a lock (Dekker's argument, all four `SeqCst`):
//!
//! - owner: announce in `state` (A1), then load the generation (A2);
//! - invalidation: store the generation (B1), then load `state` (B2).
//!
//! In the single order of all `SeqCst` operations, if B2 comes before A1 then B1 comes before A2:
//! the owner sees the new generation, drops what it has cached and walks tables that the guest
//! changed before it asked for the invalidation. Otherwise B2 sees the announcement, and the
//! invalidation waits if the ranges overlap. There is no third case. On x86 the loads are plain,
//! and an announcement costs one locked instruction per range that is new to the access.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// Inclusive IOVA range.
pub(super) type Range = RangeInclusive<u64>;

/// Every address.
pub(super) const EVERYTHING: Range = 0..=u64::MAX;

/// Ranges that are kept apart. An access with more of them announces the hull of all.
const RANGES: usize = 32;

/// Ranges that an access looks through before it announces another: a queue's rings come first,
/// and come back between the buffers.
const RINGS: usize = 4;

// `state`: how many ranges are announced, two flags, and which access this is.
const COUNT: u64 = 0xff;
const BUSY: u64 = 1 << 8;
const WAITED_FOR: u64 = 1 << 9;
const NEXT_ACCESS: u64 = 1 << 10;

/// Loads before a waiting thread sleeps: most accesses end within a microsecond.
const SPINS: u32 = 256;

thread_local! {
    /// A number of this thread's own, never 0.
    static ME: u64 = {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Ordering::Relaxed)
    };
}

/// The announced ranges of one port. Padded, so that ports of different threads share no line.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Slot {
    state: AtomicU64,
    /// The thread in the access, 0 between accesses.
    owner: AtomicU64,
    ranges: [Bounds; RANGES],
    asleep: Mutex<()>,
    over: Condvar,
}

#[derive(Default)]
struct Bounds {
    first: AtomicU64,
    last: AtomicU64,
}

impl Bounds {
    fn get(&self) -> (u64, u64) {
        (
            self.first.load(Ordering::Relaxed),
            self.last.load(Ordering::Relaxed),
        )
    }

    fn set(&self, first: u64, last: u64) {
        self.first.store(first, Ordering::Relaxed);
        self.last.store(last, Ordering::Relaxed);
    }
}

/// One access as an invalidation saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Seen(u64);

impl Slot {
    /// Begins an access. `false` when one is in flight already.
    pub(super) fn begin(&self) -> bool {
        let idle = self.state.load(Ordering::Relaxed);
        // Acquire: what the previous owner left in the port's cache is seen.
        let begun = idle & BUSY == 0
            && self
                .state
                .compare_exchange(idle, idle | BUSY, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        if begun {
            // Published by the first announcement, before which nobody asks.
            self.owner.store(ME.with(|me| *me), Ordering::Relaxed);
        }
        begun
    }

    /// Ends the access and wakes who waits for it.
    pub(super) fn end(&self) {
        self.owner.store(0, Ordering::Relaxed);
        let access = self.state.load(Ordering::Relaxed) / NEXT_ACCESS;
        // Release: a waiter that sees the end also sees the DMA done.
        let was = self
            .state
            .swap(access.wrapping_add(1) * NEXT_ACCESS, Ordering::AcqRel);
        if was & WAITED_FOR != 0 {
            // Between a waiter's check and its sleep it holds the lock.
            drop(self.asleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.over.notify_all();
        }
    }

    /// Announces `first..=last`, by the owner; returns the announced range that covers it.
    pub(super) fn announce(&self, first: u64, last: u64) -> (u64, u64) {
        let count = (self.state.load(Ordering::Relaxed) & COUNT) as usize;
        let rings = self.ranges.iter().take(count.min(RINGS));
        let mut known = rings.map(Bounds::get);
        if let Some(known) = known.find(|&(a, b)| a <= first && last <= b) {
            return known;
        }
        // Widening a range only adds to what is announced, so who reads a torn pair meanwhile
        // still finds what was announced before.
        if let Some(bounds) = count.checked_sub(1).and_then(|at| self.ranges.get(at)) {
            // A scattered buffer often has one piece of the IOVA space.
            let (a, b) = bounds.get();
            if b.checked_add(1) == Some(first) {
                bounds.set(a, last);
                self.state.fetch_or(BUSY, Ordering::SeqCst);
                return (a, last);
            }
        }
        if let Some(free) = self.ranges.get(count) {
            free.set(first, last);
            self.state.fetch_add(1, Ordering::SeqCst);
            return (first, last);
        }
        let hull = |(a, b): (u64, u64), (c, d)| (a.min(c), b.max(d));
        let all = self
            .ranges
            .iter()
            .map(Bounds::get)
            .fold((first, last), hull);
        self.ranges[0].set(all.0, all.1);
        self.state.fetch_or(BUSY, Ordering::SeqCst);
        all
    }

    /// The access in flight that may have translated part of `range`.
    pub(super) fn uses(&self, range: &Range) -> Option<Seen> {
        let state = self.state.load(Ordering::SeqCst);
        let count = (state & COUNT) as usize;
        // If the access ended and the ranges are another's by now, then the other announces them
        // after this load of `state` and sees the generation.
        let overlaps = self.ranges[..count.min(RANGES)].iter().any(|bounds| {
            let (first, last) = bounds.get();
            first <= *range.end() && *range.start() <= last
        });
        overlaps.then_some(Seen(state / NEXT_ACCESS))
    }

    /// Waits until the access has ended.
    ///
    /// # Panics
    /// In debug builds, when it is the calling thread's own: that is a mistake of the caller.
    /// Release builds log it and do not wait, as they would for ever.
    pub(super) fn wait(&self, seen: Seen) {
        let over = || self.state.load(Ordering::Acquire) / NEXT_ACCESS != seen.0;
        // An owner's number is published by its announcement and withdrawn before its end, so it
        // is never the one of an access of this thread that is over.
        if self.owner.load(Ordering::Relaxed) == ME.with(|me| *me) && !over() {
            debug_assert!(false, "a thread invalidates what its own DmaAccess uses");
            log::error!("a thread invalidates what its own DmaAccess uses; drop the access first");
            return;
        }
        for _ in 0..SPINS {
            if over() {
                return;
            }
            std::hint::spin_loop();
        }
        let mut asleep = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state / NEXT_ACCESS != seen.0 {
                return;
            }
            let asked = state & WAITED_FOR != 0
                || self
                    .state
                    .compare_exchange(
                        state,
                        state | WAITED_FOR,
                        Ordering::AcqRel,
                        Ordering::Acquire,
                    )
                    .is_ok();
            if asked {
                asleep = self
                    .over
                    .wait(asleep)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_seen_by_the_ranges_it_announced() {
        let slot = Slot::default();
        assert!(slot.begin());
        assert!(!slot.begin(), "one access at a time");
        assert_eq!(slot.uses(&EVERYTHING), None, "nothing is announced yet");
        slot.announce(0x1000, 0x1fff);
        slot.announce(0x5000, 0x5fff);
        assert!(slot.uses(&(0x1fff..=0x1fff)).is_some());
        assert!(slot.uses(&(0x4000..=0x5000)).is_some());
        assert_eq!(slot.uses(&(0x2000..=0x4fff)), None);
        slot.end();
        assert_eq!(slot.uses(&EVERYTHING), None);
    }

    #[test]
    fn more_ranges_than_there_is_room_for_are_still_covered() {
        let slot = Slot::default();
        assert!(slot.begin());
        for i in 0..100u64 {
            let first = i * i * 0x10_0000;
            let (a, b) = slot.announce(first, first + 0xfff);
            assert!(a <= first && first + 0xfff <= b);
        }
        for i in 0..100u64 {
            let first = i * i * 0x10_0000;
            assert!(slot.uses(&(first..=first + 0xfff)).is_some(), "{i}");
        }
        slot.announce(u64::MAX, u64::MAX);
        slot.announce(0, 0);
        assert!(slot.uses(&(u64::MAX..=u64::MAX)).is_some());
    }

    #[test]
    fn pieces_that_follow_each_other_are_one_range() {
        let slot = Slot::default();
        assert!(slot.begin());
        slot.announce(0x1000, 0x1fff);
        let mut covering = (0, 0);
        for page in 0x10..0x1000u64 {
            covering = slot.announce(page << 12, page << 12 | 0xfff);
        }
        assert_eq!(covering, (0x1_0000, 0xff_ffff));
        assert_eq!(slot.uses(&(0x2000..=0xffff)), None, "no hull was needed");
        assert!(slot.uses(&(0x1000..=0x1000)).is_some());
        assert!(slot.uses(&(0xff_ffff..=0xff_ffff)).is_some());
    }

    #[test]
    fn a_waiter_returns_when_the_access_it_saw_ends() {
        let slot = Slot::default();
        std::thread::scope(|scope| {
            let (tell, told) = std::sync::mpsc::channel();
            let (finish, finished) = std::sync::mpsc::channel::<()>();
            let slot = &slot;
            scope.spawn(move || {
                assert!(slot.begin());
                slot.announce(0, 0xfff);
                tell.send(()).unwrap();
                finished.recv().unwrap();
                slot.end();
                // The next access is not what the waiter waits for.
                assert!(slot.begin());
                slot.announce(0, 0xfff);
                slot.end();
            });
            told.recv().unwrap();
            let seen = slot.uses(&(0..=0)).unwrap();
            let late = scope.spawn(move || {
                std::thread::sleep(std::time::Duration::from_millis(20));
                finish.send(()).unwrap();
            });
            slot.wait(seen);
            assert_ne!(slot.uses(&(0..=0)), Some(seen));
            late.join().unwrap();
        });
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "its own DmaAccess")]
    fn waiting_for_oneself_is_caught() {
        let slot = Slot::default();
        assert!(slot.begin());
        slot.announce(0, 0xfff);
        slot.wait(slot.uses(&EVERYTHING).unwrap());
    }
}
