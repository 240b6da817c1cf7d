//! One VM's share of the host's PASIDs.
//!
//! Locks are taken in *runs* of up to [`RUN`] PASIDs, and most allocations and frees happen
//! inside a run that is owned already. So a guest that allocates and frees in a loop costs its
//! host almost nothing, and however it scatters its PASIDs, the kernel's list of locks, which
//! every lock operation of every VM walks, stays short.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::file::{Owner, PasidFile, Seat, Slot};
use super::locks::Range;
use super::{Error, PasidAllocator};
use crate::Pasid;

/// PASIDs that are locked together, at most.
const RUN: u32 = 64;
/// Locks of others that one search on a vCPU thread may look at. The next one goes on from there.
const FEW_LOCKS: u32 = 512;

/// What a VM may have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The VM's name, for [`holders`](super::holders); at most 128 bytes of it are kept.
    pub owner: String,
    /// The lowest PASID it may get, at least 1.
    pub min: Pasid,
    /// The highest, which every device it has must be able to use.
    pub max: Pasid,
    /// How many it may own at once.
    pub quota: u32,
}

impl Config {
    /// The quota of a VM whose user chose none.
    pub const DEFAULT_QUOTA: u32 = 1024;

    /// Any PASID of `bits` bits (those of the narrowest device that uses them) but 0, and
    /// [`DEFAULT_QUOTA`](Self::DEFAULT_QUOTA) of them.
    pub fn new(owner: impl Into<String>, bits: u8) -> Self {
        Self {
            owner: owner.into(),
            min: Pasid(1),
            max: Pasid(Pasid::MAX.0 >> (Pasid::BITS - bits.min(Pasid::BITS))),
            quota: Self::DEFAULT_QUOTA,
        }
    }

    fn range(&self) -> Range {
        Range::new(self.min.0, self.max.0)
    }
}

/// How many PASIDs a VM has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Counts {
    /// Owned: no other VM can have them.
    pub owned: u32,
    /// Of those, allocated.
    pub in_use: u32,
    /// The most that may be owned.
    pub quota: u32,
}

/// The host-wide allocator, as one VM has it. All it owns is free again when this is dropped, or
/// when the process ends in whatever way.
///
/// A `fork` shares it: a child that neither executes another program nor ends keeps the locks.
#[derive(Debug)]
pub struct HostPasids {
    file: PasidFile,
    seat: Seat,
    config: Config,
    runs: Mutex<Runs>,
}

/// The runs this VM owns. At most one of them has no PASID in use.
#[derive(Debug, Default)]
struct Runs {
    /// By first PASID.
    all: BTreeMap<u32, Run>,
    /// First PASIDs of those with room.
    roomy: BTreeSet<u32>,
    /// First PASID of the one with nothing in use.
    idle: Option<u32>,
    owned: u32,
    in_use: u32,
    /// The next PASID to try, so that one that was freed is not handed out again at once.
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    /// 1 to [`RUN`].
    len: u32,
    /// A bit per PASID.
    used: u64,
}

impl Run {
    fn free(self) -> u64 {
        !self.used & u64::MAX >> (RUN - self.len)
    }
}

impl HostPasids {
    /// Opens the host's PASID file in `directory` (made if it is not there) for one VM, and takes
    /// a first PASID, which no other VM can have from then on: the first allocation will succeed.
    ///
    /// # Errors
    /// Each says what to do: no such directory, no permission, not a PASID file, no PASID free in
    /// the range, senseless limits.
    pub fn open(directory: &Path, config: Config) -> Result<Self, Error> {
        let (min, max, quota) = (config.min.0, config.max.0, config.quota);
        if min == 0 || min > max || max > Pasid::MAX.0 || quota == 0 {
            return Err(Error::Limits { min, max, quota });
        }
        let file = PasidFile::open(directory)?;
        let seat = file.take_seat(&Owner {
            name: config.owner.clone(),
            pid: std::process::id(),
        })?;
        // Spread the VMs, so that each one's runs lie side by side and make one lock.
        let span = u64::from(config.range().len());
        let place = (u64::from(u32::from(seat.number).wrapping_mul(0x9e37_79b1)) * span) >> 32;
        let mut runs = Runs {
            next: align_down(min + place as u32).max(min),
            ..Runs::default()
        };
        let this = Self {
            file,
            seat,
            config,
            runs: Mutex::default(),
        };
        // Before any vCPU runs there is time for an answer that is certain.
        this.grow(&mut runs, u32::MAX)?;
        *this.lock() = runs;
        Ok(this)
    }

    /// How many PASIDs this VM has.
    pub fn counts(&self) -> Counts {
        let runs = self.lock();
        Counts {
            owned: runs.owned,
            in_use: runs.in_use,
            quota: self.config.quota,
        }
    }

    /// What the VM may have.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn lock(&self) -> MutexGuard<'_, Runs> {
        // Every change of `Runs` is complete before anything can panic.
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Owns one more run, if a search that looks at `locks` locks of others finds one.
    fn grow(&self, runs: &mut Runs, locks: u32) -> Result<(), Error> {
        let quota = self.config.quota;
        if runs.owned >= quota {
            return Err(Error::Quota { quota });
        }
        self.file.check_in_place()?;
        let range = self.find(runs, quota - runs.owned, locks)?;
        let slot = Slot {
            seat: self.seat,
            in_use: false,
        };
        if let Err(error) = self.file.set_slots(range, slot) {
            self.give_up(range);
            return Err(error);
        }
        runs.add(range);
        Ok(())
    }

    /// Locks the first free run at or after `runs.next`, or after the start of the range: `most`
    /// PASIDs or fewer, none of them ours. Looks at no more than `locks` locks of others.
    fn find(&self, runs: &mut Runs, most: u32, mut locks: u32) -> Result<Range, Error> {
        let whole = self.config.range();
        let start = runs.next.clamp(whole.first, whole.last);
        'search: for part in [Range::new(start, whole.last), whole] {
            let mut at = part.first;
            'places: while at <= part.last {
                if let Some(ours) = runs.covering(at) {
                    at = ours.last + 1;
                    continue;
                }
                let mut end = part.last.min(align_down(at) + RUN - 1);
                end = end.min(at + most.min(RUN) - 1);
                if let Some((&ours, _)) = runs.all.range(at..).next() {
                    end = end.min(ours - 1);
                }
                // Each round sees a lock that was not seen before, or somebody's race lost.
                while locks > 0 {
                    locks -= 1;
                    let wanted = Range::new(at, end);
                    if self.file.try_lock(wanted)? {
                        return Ok(wanted);
                    }
                    match self.file.conflict(wanted)? {
                        Some(taken) if taken.first > at => end = taken.first - 1,
                        Some(taken) => {
                            at = taken.last.saturating_add(1);
                            continue 'places;
                        }
                        None => {}
                    }
                }
                // The next search goes on from here.
                runs.next = at;
                break 'search;
            }
        }
        Err(Error::Exhausted {
            min: whole.first,
            max: whole.last,
        })
    }

    fn say(&self, pasid: u32, in_use: bool) -> Result<(), Error> {
        let seat = self.seat;
        let slot = Slot { seat, in_use };
        self.file.set_slots(Range::new(pasid, pasid), slot)
    }

    /// Owns `range` no more.
    fn give_up(&self, range: Range) {
        // What stays locked is ours still, and `find` will find it as if it were free.
        if let Err(error) = self.file.unlock(range) {
            log::warn!("PASIDs stay with this VM until it ends: {error}");
        }
    }
}

impl PasidAllocator for HostPasids {
    fn allocate(&self) -> Result<Pasid, Error> {
        let mut runs = self.lock();
        if runs.roomy.is_empty() {
            self.grow(&mut runs, FEW_LOCKS)?;
        }
        let pasid = runs.take().ok_or(Error::Quota {
            quota: self.config.quota,
        })?;
        if let Err(error) = self.say(pasid, true) {
            runs.put(pasid);
            if let Some(range) = runs.surplus(pasid) {
                self.give_up(range);
            }
            return Err(error);
        }
        Ok(Pasid(pasid))
    }

    fn free(&self, pasid: Pasid) -> Result<(), Error> {
        let Pasid(pasid) = pasid;
        let mut runs = self.lock();
        if !runs.put(pasid) {
            return Err(Error::NotOwned { pasid });
        }
        if let Err(error) = self.say(pasid, false) {
            log::warn!("PASID {pasid:#x} is free but listed as used: {error}");
        }
        if let Some(range) = runs.surplus(pasid) {
            self.give_up(range);
        }
        Ok(())
    }

    fn free_all(&self) {
        let mut runs = self.lock();
        let Some(kept) = runs.keep_one() else {
            return;
        };
        let whole = self.config.range();
        if kept.first > whole.first {
            self.give_up(Range::new(whole.first, kept.first - 1));
        }
        if kept.last < whole.last {
            self.give_up(Range::new(kept.last + 1, whole.last));
        }
        let seat = self.seat;
        let idle = Slot {
            seat,
            in_use: false,
        };
        if let Err(error) = self.file.set_slots(kept, idle) {
            log::warn!("PASIDs are free but listed as used: {error}");
        }
    }
}

impl Runs {
    fn add(&mut self, range: Range) {
        let len = range.len();
        self.all.insert(range.first, Run { len, used: 0 });
        self.roomy.insert(range.first);
        self.idle = Some(range.first);
        self.owned += len;
        self.next = range.first;
    }

    /// The run that has `pasid`.
    fn covering(&self, pasid: u32) -> Option<Range> {
        let (&first, run) = self.all.range(..=pasid).next_back()?;
        let range = Range::new(first, first + run.len - 1);
        (pasid <= range.last).then_some(range)
    }

    /// Allocates the first free one at or after `next`, or the first of all.
    fn take(&mut self) -> Option<u32> {
        let here = self.covering(self.next).map(|range| range.first);
        let here = here.filter(|first| {
            let run = self.all.get(first);
            run.is_some_and(|run| run.free() >> (self.next - first) != 0)
        });
        let first = here
            .or_else(|| self.roomy.range(self.next..).next().copied())
            .or_else(|| self.roomy.first().copied())?;
        let run = self.all.get_mut(&first)?;
        let skip = self.next.checked_sub(first).filter(|_| here.is_some());
        let free = run.free() & u64::MAX << skip.unwrap_or(0);
        let bit = free.trailing_zeros();
        run.used |= 1 << bit;
        if run.free() == 0 {
            self.roomy.remove(&first);
        }
        if self.idle == Some(first) {
            self.idle = None;
        }
        self.in_use += 1;
        self.next = first + bit + 1;
        Some(first + bit)
    }

    /// Frees `pasid`; `false` when it was not allocated.
    fn put(&mut self, pasid: u32) -> bool {
        let Some((&first, run)) = self.all.range_mut(..=pasid).next_back() else {
            return false;
        };
        let bit = pasid - first;
        if bit >= run.len || run.used & 1 << bit == 0 {
            return false;
        }
        run.used &= !(1 << bit);
        self.roomy.insert(first);
        self.in_use -= 1;
        true
    }

    /// After `pasid` was freed: its run, no longer ours, if that has nothing in use and another
    /// run has nothing in use either.
    fn surplus(&mut self, pasid: u32) -> Option<Range> {
        let range = self.covering(pasid)?;
        if self.all.get(&range.first)?.used != 0 {
            return None;
        }
        if self.idle.is_none() {
            self.idle = Some(range.first);
            return None;
        }
        self.all.remove(&range.first);
        self.roomy.remove(&range.first);
        self.owned -= range.len();
        Some(range)
    }

    /// Frees everything and keeps one run.
    fn keep_one(&mut self) -> Option<Range> {
        let (&first, &run) = self.all.first_key_value()?;
        let range = Range::new(first, first + run.len - 1);
        *self = Self::default();
        self.add(range);
        Some(range)
    }
}

/// The start of the aligned run that has `pasid`.
const fn align_down(pasid: u32) -> u32 {
    pasid & !(RUN - 1)
}

#[cfg(test)]
mod tests;
