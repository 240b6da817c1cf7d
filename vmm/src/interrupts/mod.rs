//! How interrupts reach the guest: GSI routes and irqfds of KVM.
//!
//! One table of routes for the VM. GSIs 0 to 23 are the I/O APIC's pins: their routes mirror its
//! redirection entries, so that KVM tells us about EOIs of level-triggered ones. The GSIs above
//! are handed out to the vectors of PCI functions.
//!
//! A function behind a remapping unit has a [`Remapper`]: what the guest programmed passes through
//! it whenever a route is made, and again in [`Interrupts::reevaluate`] when the unit's cache is
//! invalidated. The irqfd stays connected throughout, but where the remapper blocks the interrupt:
//! then the eventfd is read by us (`blocked`), and each signal is a fault.
//!
//! Locks: `state` is held while a [`Remapper`] is asked, so that "done means done" holds for
//! `reevaluate` whatever other threads do. A remapper takes no lock that is held by a caller of
//! this module.

#![forbid(unsafe_code)]

mod blocked;
pub mod controller;
pub mod doorbell;
pub mod remapping;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use devices::interrupt::{MsiSource, MsiVector};
use devices::legacy::IoapicSink;
use devices::pci::root::IoEventRegistry;
use devices::pci::{IoEvent, Space};
use viommu::Rid;
use viommu::interrupt::{MessageSink, Msi, MsiSink};
use vmm_sys_util::eventfd::EventFd;

use self::blocked::Watch;
use self::controller::{Controller, Route};
use crate::kvm::IOAPIC_PINS;

/// Remaps the interrupts of endpoints (VT-d 5.1).
pub trait Remapper: Send + Sync {
    /// What `msi` from `rid` is delivered as; `None` when it is blocked. Asked when a route is
    /// made, not when an interrupt is sent, so it records nothing. Must take no lock that a caller
    /// of [`Interrupts::reevaluate`] may hold.
    fn remap(&self, rid: Rid, msi: Msi) -> Option<Msi>;

    /// The same when `rid` sends `msi`: if it is blocked, the guest is told.
    fn send(&self, rid: Rid, msi: Msi) -> Option<Msi>;

    /// The entry of the remapper's table that `msi` goes by, if it does by one.
    fn entry(&self, _msi: Msi) -> Option<u32> {
        None
    }
}

/// What tells remappers apart: where they are, since a line keeps its remapper.
fn key(remapper: &dyn Remapper) -> usize {
    std::ptr::from_ref(remapper).addr()
}

/// Where one GSI should lead and does.
struct Line {
    rid: Rid,
    remapper: Option<Arc<dyn Remapper>>,
    /// What the guest programmed.
    wanted: Option<Msi>,
    /// What signals it; pins have none.
    irqfd: Option<Arc<EventFd>>,
    /// Who has the signals of `irqfd`.
    reader: Reader,
}

/// Who has the signals of an eventfd.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Reader {
    /// They stay in it.
    Nobody,
    /// KVM delivers them.
    Kernel,
    /// They are blocked, and become faults.
    Watch,
}

impl Line {
    fn target(&self) -> Option<Msi> {
        let wanted = self.wanted?;
        match &self.remapper {
            Some(remapper) => remapper.remap(self.rid, wanted),
            None => Some(wanted),
        }
    }

    /// Where it is in [`State::by_entry`], while it is.
    fn place(&self, gsi: u32) -> Option<Place> {
        let (remapper, wanted) = (self.remapper.as_ref()?, self.wanted?);
        Some((key(&**remapper), remapper.entry(wanted), gsi))
    }
}

/// A remapper, the entry of its table and a GSI.
type Place = (usize, Option<u32>, u32);

#[derive(Default)]
struct State {
    lines: BTreeMap<u32, Line>,
    /// Lines that are remapped, so that an invalidation finds those that it touches without a
    /// look at the others.
    by_entry: BTreeSet<Place>,
    /// What the kernel was told last.
    routes: Routes,
    watch: Option<Watch>,
}

impl State {
    /// Changes a line and where it is found.
    fn change(&mut self, gsi: u32, change: impl FnOnce(&mut Line)) {
        let Some(line) = self.lines.get_mut(&gsi) else {
            return;
        };
        let before = line.place(gsi);
        change(line);
        let after = line.place(gsi);
        if before != after {
            before.map(|place| self.by_entry.remove(&place));
            after.map(|place| self.by_entry.insert(place));
        }
    }
}

/// Routes as the kernel takes them: a change is made in place.
#[derive(Default)]
struct Routes {
    list: Vec<Route>,
    at: HashMap<u32, usize>,
}

impl Routes {
    fn has(&self, gsi: u32) -> bool {
        self.at.contains_key(&gsi)
    }

    /// Returns whether that is a change.
    fn put(&mut self, gsi: u32, msi: Msi) -> bool {
        let route = Route { gsi, msi };
        match self.at.get(&gsi).and_then(|&at| self.list.get_mut(at)) {
            Some(old) => std::mem::replace(old, route) != route,
            None => {
                self.at.insert(gsi, self.list.len());
                self.list.push(route);
                true
            }
        }
    }

    /// Returns whether there was one.
    fn remove(&mut self, gsi: u32) -> bool {
        let Some(at) = self.at.remove(&gsi) else {
            return false;
        };
        self.list.swap_remove(at);
        if let Some(moved) = self.list.get(at) {
            self.at.insert(moved.gsi, at);
        }
        true
    }
}

/// The interrupt routes of a VM.
pub struct Interrupts {
    vm: Arc<dyn Controller>,
    this: Weak<Self>,
    state: Mutex<State>,
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.state().routes.list).finish()
    }
}

impl Interrupts {
    /// The routes of `vm`, of which there are none.
    pub fn new(vm: Arc<dyn Controller>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            vm,
            this: this.clone(),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vectors and pins there are.
    #[cfg(test)]
    pub(crate) fn lines(&self) -> usize {
        self.state().lines.len()
    }

    /// The source of vectors for the PCI function `rid`.
    pub fn source(
        self: &Arc<Self>,
        rid: Rid,
        remapper: Option<Arc<dyn Remapper>>,
    ) -> Arc<dyn MsiSource> {
        Arc::new(Source {
            interrupts: self.clone(),
            rid,
            remapper,
        })
    }

    /// Takes the messages that endpoints send as DMA writes.
    pub fn messages(self: &Arc<Self>, remapper: Option<Arc<dyn Remapper>>) -> Arc<dyn MessageSink> {
        Arc::new(Messages {
            interrupts: self.clone(),
            remapper,
        })
    }

    /// Names who remaps the I/O APIC's interrupts and as which source.
    pub fn remap_pins(&self, rid: Rid, remapper: &Arc<dyn Remapper>) {
        let mut state = self.state();
        for pin in 0..IOAPIC_PINS {
            state.lines.entry(pin).or_insert_with(pin_line);
            state.change(pin, |line| {
                line.rid = rid;
                line.remapper = Some(remapper.clone());
            });
        }
    }

    /// Leads `pin` of the I/O APIC to `msi`, whose bit 15 (trigger mode) decides whether KVM
    /// reports EOIs; `None` masks it.
    ///
    /// # Errors
    /// The host refused the route; the pin leads nowhere then.
    pub fn set_pin(&self, pin: u8, msi: Option<Msi>) -> io::Result<()> {
        let gsi = u32::from(pin);
        if gsi >= IOAPIC_PINS {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut state = self.state();
        state.lines.entry(gsi).or_insert_with(pin_line);
        state.change(gsi, |line| line.wanted = msi);
        self.commit(&mut state, &[gsi])
    }

    /// Delivers one interrupt of `pin` as its route says.
    pub fn pulse_pin(&self, pin: u8) {
        let (mut state, gsi) = (self.state(), u32::from(pin));
        let Some(line) = state.lines.get(&gsi).filter(|_| gsi < IOAPIC_PINS) else {
            return;
        };
        if !state.routes.has(gsi) {
            // Blocked when the route was made. It may pass now: what is not present is not cached.
            let sent = match (&line.remapper, line.wanted) {
                (Some(remapper), Some(msi)) => remapper.send(line.rid, msi),
                _ => None,
            };
            if sent.is_none() || self.commit(&mut state, &[gsi]).is_err() {
                return;
            }
        }
        self.vm.pulse(gsi);
    }

    /// Asks `remapper` again about its lines: about all of them, or those that go by one of `entries`.
    /// When this returns, none of them takes an old route. One update of the kernel's table for all
    /// of them, and none when nothing has changed.
    ///
    /// # Errors
    /// The host refused; the lines concerned are disconnected then.
    pub fn reevaluate(
        &self,
        remapper: &dyn Remapper,
        entries: Option<&[RangeInclusive<u32>]>,
    ) -> io::Result<()> {
        let key = key(remapper);
        let mut state = self.state();
        let by_entry = &state.by_entry;
        let touched = |first: Option<u32>, last: u32| {
            let lines = by_entry.range((key, first, 0)..=(key, Some(last), u32::MAX));
            lines.map(|&(_, _, gsi)| gsi)
        };
        let gsis: Vec<u32> = match entries {
            None => touched(None, u32::MAX).collect(),
            Some(entries) => {
                let ranges = entries.iter().filter(|range| !range.is_empty());
                let lines = ranges.flat_map(|range| touched(Some(*range.start()), *range.end()));
                let mut gsis: Vec<u32> = lines.collect();
                // Ranges may overlap.
                gsis.sort_unstable();
                gsis.dedup();
                gsis
            }
        };
        self.commit(&mut state, &gsis)
    }

    /// Makes the kernel's table and the readers of the eventfds true for `gsis`. What fails for one
    /// of them leads nowhere, and keeps no other as it was.
    fn commit(&self, state: &mut State, gsis: &[u32]) -> io::Result<()> {
        let (mut changed, mut result) = (false, Ok(()));
        for &gsi in gsis {
            match state.lines.get(&gsi).and_then(Line::target) {
                Some(msi) => changed |= state.routes.put(gsi, msi),
                None => {
                    let blocked = state.lines.get(&gsi).is_some_and(|l| l.wanted.is_some());
                    let reader = match blocked {
                        true => Reader::Watch,
                        false => Reader::Nobody,
                    };
                    result = result.and(self.read_by(state, gsi, reader));
                    changed |= state.routes.remove(gsi);
                }
            }
        }
        if changed && let Err(why) = self.vm.set_routes(&state.routes.list) {
            for &gsi in gsis {
                state.routes.remove(gsi);
                // The first error is the one to tell.
                let _ = self.read_by(state, gsi, Reader::Nobody);
            }
            return Err(why);
        }
        for &gsi in gsis {
            if state.routes.has(gsi) {
                result = result.and(self.read_by(state, gsi, Reader::Kernel));
            }
        }
        result
    }

    /// Gives the signals of a line to `reader`.
    fn read_by(&self, state: &mut State, gsi: u32, reader: Reader) -> io::Result<()> {
        let Some(line) = state.lines.get_mut(&gsi) else {
            return Ok(());
        };
        let Some(irqfd) = line.irqfd.clone().filter(|_| line.reader != reader) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut line.reader, Reader::Nobody);
        match before {
            Reader::Nobody => {}
            Reader::Kernel => {
                if let Err(why) = self.vm.disconnect(&irqfd, gsi) {
                    log::error!("KVM_IRQFD does not let go of GSI {gsi}: {why}");
                }
            }
            Reader::Watch => {
                if let Some(Err(why)) = state.watch.as_ref().map(|w| w.remove(&irqfd, gsi)) {
                    log::error!("GSI {gsi} is waited for in vain: {why}");
                }
                // What the thread has not read yet: a fault, or delivered if it passes by now.
                if irqfd.read().is_ok()
                    && let (Some(remapper), Some(msi)) = (&line.remapper, line.wanted)
                    && let Some(msi) = remapper.send(line.rid, msi)
                {
                    self.vm.signal(msi);
                }
            }
        }
        match reader {
            Reader::Nobody => {}
            Reader::Kernel => self.vm.connect(&irqfd, gsi)?,
            Reader::Watch => {
                if state.watch.is_none() {
                    state.watch = Some(Watch::start(self.this.clone())?);
                }
                if let Some(watch) = &state.watch {
                    watch.add(&irqfd, gsi)?;
                }
            }
        }
        line.reader = reader;
        Ok(())
    }

    /// A signal of a line whose interrupts are blocked.
    fn blocked_signal(&self, gsi: u32) {
        let mut state = self.state();
        let Some(line) = state.lines.get(&gsi) else {
            return;
        };
        // It may be the kernel's again since the thread was woken.
        let Some(irqfd) = line.irqfd.as_ref().filter(|_| line.reader == Reader::Watch) else {
            return;
        };
        let (Ok(_), Some(remapper), Some(msi)) = (irqfd.read(), &line.remapper, line.wanted) else {
            return;
        };
        // It may pass now, since what is not present is not cached.
        if let Some(msi) = remapper.send(line.rid, msi) {
            self.vm.signal(msi);
            if let Err(why) = self.commit(&mut state, &[gsi]) {
                log::error!("interrupt route {gsi} is lost: {why}");
            }
        }
    }

    fn add(
        &self,
        rid: Rid,
        remapper: Option<Arc<dyn Remapper>>,
        irqfd: Arc<EventFd>,
    ) -> io::Result<u32> {
        let mut state = self.state();
        let limit = self.vm.limit();
        let gsi = (IOAPIC_PINS..limit)
            .find(|gsi| !state.lines.contains_key(gsi))
            .ok_or_else(|| {
                io::Error::other(format!("all {limit} interrupt routes of the VM are taken"))
            })?;
        state.lines.insert(
            gsi,
            Line {
                rid,
                remapper,
                wanted: None,
                irqfd: Some(irqfd),
                reader: Reader::Nobody,
            },
        );
        Ok(gsi)
    }

    fn remove(&self, gsi: u32) {
        let mut state = self.state();
        state.change(gsi, |line| line.wanted = None);
        // Nobody reads cannot fail.
        let _ = self.read_by(&mut state, gsi, Reader::Nobody);
        state.lines.remove(&gsi);
        // KVM's table may keep the entry until the next change: without an irqfd it does nothing.
        state.routes.remove(gsi);
    }
}

fn pin_line() -> Line {
    Line {
        rid: Rid(0),
        remapper: None,
        wanted: None,
        irqfd: None,
        reader: Reader::Nobody,
    }
}

impl MsiSink for Interrupts {
    fn send(&self, msi: Msi) {
        self.vm.signal(msi);
    }
}

impl IoapicSink for Interrupts {
    fn route(&self, pin: u8, msi: Msi) {
        if let Err(why) = self.set_pin(pin, Some(msi)) {
            log::error!("KVM refuses the route of I/O APIC pin {pin}: {why}");
        }
    }

    fn deliver(&self, pin: u8, _msi: Msi) {
        self.pulse_pin(pin);
    }
}

impl IoEventRegistry for Interrupts {
    fn add(&self, space: Space, address: u64, event: &IoEvent) -> io::Result<()> {
        self.vm.doorbell(true, space, address, &event.eventfd)
    }

    fn remove(&self, space: Space, address: u64, event: &IoEvent) {
        if let Err(why) = self.vm.doorbell(false, space, address, &event.eventfd) {
            log::error!("KVM_IOEVENTFD does not let go of a doorbell: {why}");
        }
    }
}

struct Messages {
    interrupts: Arc<Interrupts>,
    remapper: Option<Arc<dyn Remapper>>,
}

impl MessageSink for Messages {
    fn message(&self, endpoint: Rid, msi: Msi) {
        let Some(remapper) = &self.remapper else {
            return self.interrupts.send(msi);
        };
        if let Some(remapped) = remapper.send(endpoint, msi) {
            self.interrupts.send(remapped);
        }
    }
}

struct Source {
    interrupts: Arc<Interrupts>,
    rid: Rid,
    remapper: Option<Arc<dyn Remapper>>,
}

impl MsiSource for Source {
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let eventfd = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let gsi = self
            .interrupts
            .add(self.rid, self.remapper.clone(), eventfd.clone())?;
        Ok(Arc::new(Vector {
            interrupts: self.interrupts.clone(),
            gsi,
            eventfd,
        }))
    }
}

struct Vector {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    eventfd: Arc<EventFd>,
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn route(&self, msi: Option<Msi>) -> io::Result<()> {
        let mut state = self.interrupts.state();
        state.change(self.gsi, |line| line.wanted = msi);
        self.interrupts.commit(&mut state, &[self.gsi])
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        self.interrupts.remove(self.gsi);
    }
}

#[cfg(test)]
mod tests;
