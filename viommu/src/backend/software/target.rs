//! What is in force for one target, and how those who use it learn of a change.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use arc_swap::ArcSwap;

use super::domain::Mappings;
use super::inflight::{EVERYTHING, Range, Seen, Slot};
use super::walk::{Allowed, Page, Request, Walker};
use crate::backend::{FaultCause, Translation};
use crate::spec::vtd::paging::level_shift;
use crate::{Iova, Target};

/// Locks, also when another thread panicked while it held the lock: every state that these locks
/// protect is valid between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// 0xfee0_0000-0xfeef_ffff: requests without PASID to it are interrupt messages (VT-d 3.14).
pub(crate) const INTERRUPT_RANGE: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// The page sizes that a cache holds, largest first.
const CACHED: [u32; 3] = [level_shift(3), level_shift(2), level_shift(1)];

/// A domain's mappings and the targets that use them.
#[derive(Default)]
pub(super) struct Domain {
    pub(super) mappings: RwLock<Mappings>,
    pub(super) users: Mutex<Vec<Arc<TargetState>>>,
}

/// What translates a target's requests.
#[derive(Default)]
pub(super) struct Space {
    /// Which of the spaces that the target ever had this is, from 1; 0 is its first, Blocked.
    pub(super) number: u64,
    pub(super) translation: Translation,
    /// The domain that `translation` names.
    pub(super) domain: Option<Arc<Domain>>,
}

impl Space {
    /// The page that holds `iova`, by the tables as they are now.
    pub(super) fn walk(
        &self,
        walker: Walker<'_>,
        iova: u64,
        request: Request,
        has_pasid: bool,
    ) -> Result<Page, FaultCause> {
        if !has_pasid && INTERRUPT_RANGE.contains(&iova) {
            return Err(FaultCause::NotAMessage);
        }
        if request.execute && !self.serves_fetches() {
            return Err(FaultCause::ExecuteDisabled);
        }
        let page = self.page(walker, iova, request)?;
        around_interrupts(page, iova, has_pasid)
    }

    /// Whether instruction fetches pass at all. Only a first stage can serve them.
    fn serves_fetches(&self) -> bool {
        match &self.translation {
            Translation::Stage1(stage1) | Translation::Nested { stage1, .. } => stage1.ere,
            Translation::Blocked => true,
            Translation::Identity | Translation::Stage2(_) | Translation::Domain(_) => false,
        }
    }

    /// Where an interrupt message to `iova` leads that is translated like any other write.
    pub(super) fn doorbell(&self, walker: Walker<'_>, iova: u64) -> Result<u64, FaultCause> {
        let write = Request {
            read: false,
            write: true,
            execute: false,
            privileged: false,
        };
        let page = self.page(walker, iova, write)?;
        Ok(page.base | iova & ((1 << page.shift) - 1))
    }

    /// The page that holds `iova`, whatever is there.
    fn page(&self, walker: Walker<'_>, iova: u64, request: Request) -> Result<Page, FaultCause> {
        Ok(match &self.translation {
            Translation::Blocked => return Err(FaultCause::Blocked),
            Translation::Identity => Page {
                base: iova >> CACHED[0] << CACHED[0],
                shift: CACHED[0],
                allowed: Allowed::both(true, true),
            },
            Translation::Stage1(stage1) => walker.first_stage(stage1, None, iova, request)?,
            Translation::Nested { stage1, stage2 } => {
                walker.first_stage(stage1, Some(stage2), iova, request)?
            }
            Translation::Stage2(stage2) => walker.second_stage_alone(stage2, iova, request)?,
            Translation::Domain(_) => self.mapped(iova, request)?,
        })
    }

    /// The largest cacheable part of a domain's mapping around `iova`.
    fn mapped(&self, iova: u64, request: Request) -> Result<Page, FaultCause> {
        let found = self.domain.as_ref().and_then(|domain| {
            let mappings = domain.mappings.read();
            mappings.unwrap_or_else(PoisonError::into_inner).find(iova)
        });
        let mapping = found.ok_or(FaultCause::DomainUnmapped)?;
        let allowed = Allowed::both(mapping.access.read, mapping.access.write);
        if !allowed.has(request.needs()) {
            return Err(FaultCause::DomainAccess);
        }
        let Iova(first) = mapping.iova;
        let last = first + (mapping.length - 1);
        let moved = mapping.gpa.0.wrapping_sub(first);
        let fits = |shift: &u32| {
            let low = (1u64 << shift) - 1;
            let block = iova & !low;
            moved & low == 0 && first <= block && block | low <= last
        };
        // 4 KiB always fits: mappings are made of whole pages.
        let shift = CACHED.into_iter().find(fits).unwrap_or(CACHED[2]);
        Ok(Page {
            base: iova.wrapping_add(moved) >> shift << shift,
            shift,
            allowed,
        })
    }
}

/// The largest part of `page` around `iova` that neither answers for interrupt messages (which
/// are not translated) nor leads to the interrupt range.
fn around_interrupts(page: Page, iova: u64, has_pasid: bool) -> Result<Page, FaultCause> {
    let touches = |first: u64, shift: u32| {
        let last = first | ((1 << shift) - 1);
        first <= *INTERRUPT_RANGE.end() && *INTERRUPT_RANGE.start() <= last
    };
    let clear = |part: &Page| {
        let input = iova >> part.shift << part.shift;
        (has_pasid || !touches(input, part.shift)) && !touches(part.base, part.shift)
    };
    if clear(&page) {
        return Ok(page);
    }
    let parts = CACHED.map(|shift| page.part(iova, shift));
    parts
        .into_iter()
        .find(clear)
        .ok_or(FaultCause::InterruptRange)
}

/// What changed for a target, so that its ports forget no more than they must.
#[derive(Clone)]
struct Change {
    range: Range,
    leaves_only: bool,
}

/// Changes that are remembered. A port that is further behind forgets everything.
const REMEMBERED: usize = 32;

/// One target's state: 48 bytes, since a guest decides how many PASIDs there are. Its ports hold
/// it too, so it outlives its endpoint.
pub(super) struct TargetState {
    pub(super) target: Target,
    pub(super) space: ArcSwap<Space>,
    /// How many changes there have been. Written under `ports`, read by every translation.
    generation: AtomicU64,
    /// From the first port on: most PASIDs have none most of the time.
    ports: Mutex<Option<Box<Ports>>>,
}

/// What a target's ports have to know, and how they are waited for.
struct Ports {
    /// The last changes, by generation.
    changes: [Change; REMEMBERED],
    slots: Vec<Arc<Slot>>,
}

impl Default for Ports {
    fn default() -> Self {
        let unknown = |_| Change {
            range: EVERYTHING,
            leaves_only: false,
        };
        Self {
            changes: std::array::from_fn(unknown),
            slots: Vec::new(),
        }
    }
}

/// Accesses that an invalidation has to wait for, once it holds no lock any more.
#[derive(Default)]
pub(super) struct Drain(Vec<(Arc<Slot>, Seen)>);

impl Drain {
    /// How many accesses there are to wait for.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds those of `slots` that may use what they translated in `range`.
    pub(super) fn add(&mut self, slots: &[Arc<Slot>], range: &Range) {
        for slot in slots {
            if let Some(seen) = slot.uses(range) {
                self.0.push((Arc::clone(slot), seen));
            }
        }
    }

    /// Waits until they have ended. To be called without any lock: the owner of an access may
    /// need it to come to the end.
    pub(super) fn wait(self) {
        for (slot, seen) in self.0 {
            slot.wait(seen);
        }
    }
}

impl TargetState {
    pub(super) fn new(target: Target) -> Self {
        Self {
            target,
            space: ArcSwap::default(),
            generation: AtomicU64::new(0),
            ports: Mutex::default(),
        }
    }

    /// Which change was the last; see [`inflight`](super::inflight) for the order.
    #[inline]
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Makes a change known to the ports: what was translated in `range` before is not to be
    /// used any more, by accesses that have not announced it yet.
    pub(super) fn post(&self, range: Range, leaves_only: bool) {
        let mut ports = lock(&self.ports);
        let next = self.generation.load(Ordering::Relaxed) + 1;
        if let Some(ports) = &mut *ports {
            ports.changes[next as usize % REMEMBERED] = Change { range, leaves_only };
        }
        self.generation.store(next, Ordering::SeqCst);
    }

    /// Calls `forget` for the changes after `seen`, or once for everything when they are too
    /// many; returns the last one.
    pub(super) fn catch_up(&self, seen: u64, mut forget: impl FnMut(&Range, bool)) -> u64 {
        let ports = lock(&self.ports);
        let last = self.generation.load(Ordering::Relaxed);
        match &*ports {
            Some(ports) if last - seen <= REMEMBERED as u64 => {
                for change in seen + 1..=last {
                    let change = &ports.changes[change as usize % REMEMBERED];
                    forget(&change.range, change.leaves_only);
                }
            }
            _ => forget(&EVERYTHING, false),
        }
        last
    }

    /// Adds the accesses that may use what they translated in `range`, after [`post`](Self::post).
    pub(super) fn drain(&self, range: &Range, drain: &mut Drain) {
        if let Some(ports) = &*lock(&self.ports) {
            drain.add(&ports.slots, range);
        }
    }

    /// Puts `space` in force, with a number of its own, and makes that known. The caller holds
    /// `control`.
    pub(super) fn switch(this: &Arc<Self>, mut space: Space, drain: &mut Drain) {
        space.number = this.space.load().number + 1;
        if let Some(domain) = &space.domain {
            lock(&domain.users).push(Arc::clone(this));
        }
        let old = this.space.swap(Arc::new(space));
        if let Some(domain) = &old.domain {
            let mut users = lock(&domain.users);
            if let Some(at) = users.iter().position(|user| Arc::ptr_eq(user, this)) {
                users.swap_remove(at);
            }
        }
        this.post(EVERYTHING, false);
        this.drain(&EVERYTHING, drain);
    }

    pub(super) fn translation(&self) -> Translation {
        self.space.load().translation
    }

    /// Registers a port's slot.
    pub(super) fn add_slot(&self, slot: &Arc<Slot>) {
        let mut ports = lock(&self.ports);
        ports.get_or_insert_default().slots.push(Arc::clone(slot));
    }

    /// Removes it again.
    pub(super) fn remove_slot(&self, slot: &Arc<Slot>) {
        if let Some(ports) = &mut *lock(&self.ports) {
            ports.slots.retain(|other| !Arc::ptr_eq(other, slot));
        }
    }
}
