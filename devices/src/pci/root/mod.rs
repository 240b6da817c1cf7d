//! The root complex: which functions there are, and where the guest put their registers.

#![forbid(unsafe_code)]

mod bridge;
mod ports;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use thiserror::Error;
use viommu::Rid;

pub use self::bridge::HostBridge;
pub use self::ports::{ConfigPorts, Ecam};

use crate::bus::{Bus, BusDevice};
use crate::limit::warn_limited;
use crate::pci::bar::{Bar, BarKind};
use crate::pci::config::CONFIG_SIZE;
use crate::pci::function::{Decoded, Effect, IoEvent, PciFunction, Space};

/// Where the functions of a root complex may be decoded. The guest's ACPI tables say the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RootConfig {
    /// Memory below 4 GiB, for 32-bit registers.
    pub mmio32: RangeInclusive<u64>,
    /// Memory above 4 GiB, for 64-bit registers.
    pub mmio64: RangeInclusive<u64>,
    /// Port I/O.
    pub pio: RangeInclusive<u64>,
}

/// Lets the host's kernel signal an eventfd when the guest writes to an address (`KVM_IOEVENTFD`).
///
/// Called with locks of the root complex held: an implementation must not call it.
pub trait IoEventRegistry: Send + Sync {
    /// Registers `event` at `address`.
    ///
    /// # Errors
    /// What the host said. The write then exits to user space and does the same there.
    fn add(&self, space: Space, address: u64, event: &IoEvent) -> io::Result<()>;

    /// Undoes [`add`](Self::add). Only called for what was added.
    fn remove(&self, space: Space, address: u64, event: &IoEvent);
}

/// Where a function is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Function 0 of the first free device of bus 0.
    Any,
    /// Exactly here.
    At(Rid),
}

/// Why a function was not added or removed.
#[derive(Error, Clone, PartialEq, Eq, Debug)]
pub enum RootError {
    /// Bus 0 is full.
    #[error("all 32 devices of PCI bus 0 are taken: remove one before adding another")]
    Full,
    /// The address is taken.
    #[error("PCI address {0} is taken: choose another or leave it out")]
    Taken(Rid),
    /// There is no such bus.
    #[error("PCI address {0} is not on bus 0, and there is no other bus")]
    NoBus(Rid),
    /// A register finds no place in its window.
    #[error(
        "no {length:#x} free bytes for base address register {bar} of {rid} in {window}: make the \
         window larger or remove a device"
    )]
    NoSpace {
        /// Whose register.
        rid: Rid,
        /// The register.
        bar: u8,
        /// Its bytes.
        length: u64,
        /// Which window.
        window: &'static str,
    },
    /// Nothing is there.
    #[error("there is no PCI function at {0}")]
    NoFunction(Rid),
}

#[derive(Clone)]
struct Present {
    rid: Rid,
    function: Arc<dyn PciFunction>,
}

/// A function's base address register on a bus.
struct BarWindow {
    root: std::sync::Weak<PciRoot>,
    function: Arc<dyn PciFunction>,
    bar: u8,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let effect = self.function.bar_write(self.bar, offset, data);
        if effect != Effect::default()
            && let Some(root) = self.root.upgrade()
        {
            root.apply(effect);
        }
    }
}

/// What is on the buses for one function.
struct Mapped {
    decoded: Decoded,
    events: Vec<IoEvent>,
}

#[derive(Default)]
struct State {
    /// Reserved by a [`Slot`] that is not filled yet.
    reserved: BTreeSet<Rid>,
    mapped: BTreeMap<Rid, Vec<Mapped>>,
}

/// The functions of a VM. All are on bus 0 today; the table is keyed by the whole RID, so that
/// functions behind root ports join it without a change here.
///
/// Locks: `state` is taken before the buses' and before a function's own. Configuration and BAR
/// accesses take none here, except writes that move a register.
pub struct PciRoot {
    config: RootConfig,
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    registry: Arc<dyn IoEventRegistry>,
    /// Sorted by RID.
    present: ArcSwap<Vec<Present>>,
    state: Mutex<State>,
    this: std::sync::Weak<Self>,
}

impl PciRoot {
    /// A root complex with the host bridge at 00:00.0 and nothing else.
    pub fn new(
        config: RootConfig,
        mmio: Arc<Bus>,
        pio: Arc<Bus>,
        registry: Arc<dyn IoEventRegistry>,
    ) -> Arc<Self> {
        let bridge = Present {
            rid: Rid::new(0, 0, 0),
            function: Arc::new(HostBridge::default()),
        };
        Arc::new_cyclic(|this| Self {
            config,
            mmio,
            pio,
            registry,
            present: ArcSwap::from_pointee(vec![bridge]),
            state: Mutex::default(),
            this: this.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves an address, so that a device can be built for it (its DMA port and its interrupts
    /// depend on the RID). The reservation ends when the slot is filled or dropped.
    ///
    /// # Errors
    /// [`RootError::Full`], [`RootError::Taken`], [`RootError::NoBus`].
    pub fn reserve(self: &Arc<Self>, placement: Placement) -> Result<Slot, RootError> {
        let mut state = self.state();
        let taken: BTreeSet<Rid> = self
            .rids()
            .into_iter()
            .chain(state.reserved.iter().copied())
            .collect();
        let rid = match placement {
            Placement::At(rid) if rid.bus() != 0 => return Err(RootError::NoBus(rid)),
            Placement::At(rid) if taken.contains(&rid) => return Err(RootError::Taken(rid)),
            Placement::At(rid) => rid,
            Placement::Any => (0..32)
                .find(|&device| taken.iter().all(|rid| rid.device() != device))
                .map(|device| Rid::new(0, device, 0))
                .ok_or(RootError::Full)?,
        };
        state.reserved.insert(rid);
        Ok(Slot {
            root: Arc::clone(self),
            rid,
        })
    }

    /// Takes a function off the buses and out of configuration space. The caller drops it, which
    /// stops it.
    ///
    /// # Errors
    /// [`RootError::NoFunction`].
    pub fn remove(&self, rid: Rid) -> Result<Arc<dyn PciFunction>, RootError> {
        let mut state = self.state();
        let present = self.present.load();
        let at = present
            .binary_search_by_key(&rid, |present| present.rid)
            .map_err(|_| RootError::NoFunction(rid))?;
        let mut rest = Vec::clone(&present);
        let gone = rest.remove(at);
        self.present.store(Arc::new(rest));
        for mapped in state.mapped.remove(&rid).unwrap_or_default() {
            self.unmap(&*gone.function, mapped);
        }
        // A register that was refused because of this one may have its place now.
        self.reconcile(&mut state);
        Ok(gone.function)
    }

    /// The addresses of all functions, in order.
    pub fn rids(&self) -> Vec<Rid> {
        self.present.load().iter().map(|here| here.rid).collect()
    }

    /// The function at `rid`.
    pub fn function(&self, rid: Rid) -> Option<Arc<dyn PciFunction>> {
        let present = self.present.load();
        Self::find(&present, rid).map(|here| Arc::clone(&here.function))
    }

    /// Resets every function, as a reset of the platform does.
    pub fn reset(&self) {
        for here in self.present.load().iter() {
            let _ = here.function.reset();
        }
        let mut state = self.state();
        self.reconcile(&mut state);
        // What firmware would do again: give every register its address.
        for here in self.present.load().iter() {
            if let Err(error) = self.assign(here.rid, &*here.function) {
                warn_limited!("{error}");
            }
        }
    }

    /// Reads configuration space: any length from 1 to 8 bytes at any offset. All ones where
    /// there is no function.
    pub fn config_read(&self, rid: Rid, offset: u16, data: &mut [u8]) {
        let present = self.present.load();
        let Some(here) = Self::find(&present, rid) else {
            data.fill(0xff);
            return;
        };
        let mut at = offset;
        for piece in pieces(offset, data.len()) {
            let part = &mut data[piece];
            if usize::from(at) + part.len() > CONFIG_SIZE {
                part.fill(0xff);
            } else {
                here.function.config_read(at, part);
            }
            at = at.saturating_add(part.len() as u16);
        }
        // Header Type bit 7: the device has more than function 0 (7.5.1.1.9). It depends on the
        // neighbours, so it is added here.
        const HEADER_TYPE: u16 = 0x0e;
        if rid.function() == 0
            && let Some(byte) = HEADER_TYPE
                .checked_sub(offset)
                .and_then(|at| data.get_mut(usize::from(at)))
            && present
                .iter()
                .any(|other| other.rid.0 >> 3 == rid.0 >> 3 && other.rid != rid)
        {
            *byte |= 0x80;
        }
    }

    /// Writes configuration space: any length from 1 to 8 bytes at any offset.
    pub fn config_write(&self, rid: Rid, offset: u16, data: &[u8]) {
        let mut effect = Effect::default();
        {
            let present = self.present.load();
            let Some(here) = Self::find(&present, rid) else {
                return;
            };
            let mut at = offset;
            for piece in pieces(offset, data.len()) {
                let part = &data[piece];
                if usize::from(at) + part.len() <= CONFIG_SIZE {
                    effect.decode |= here.function.config_write(at, part).decode;
                }
                at = at.saturating_add(part.len() as u16);
            }
        }
        self.apply(effect);
    }

    fn find(present: &[Present], rid: Rid) -> Option<&Present> {
        let at = present.binary_search_by_key(&rid, |here| here.rid).ok()?;
        present.get(at)
    }

    fn apply(&self, effect: Effect) {
        if effect.decode {
            self.reconcile(&mut self.state());
        }
    }

    /// Makes the buses show what the functions decode now. A range that is outside its window or
    /// meets another is not answered, until the guest moves one of the two.
    fn reconcile(&self, state: &mut State) {
        let present = self.present.load();
        let wanted: Vec<(&Present, Vec<Decoded>)> = present
            .iter()
            .map(|here| {
                let mut ranges = here.function.decoded();
                ranges.retain(|range| self.in_window(range));
                (here, ranges)
            })
            .collect();
        // First everything that goes, so that two registers can change places.
        for (here, ranges) in &wanted {
            let mapped = state.mapped.entry(here.rid).or_default();
            for gone in mapped.extract_if(.., |m| !ranges.contains(&m.decoded)) {
                self.unmap(&*here.function, gone);
            }
        }
        for (here, ranges) in wanted {
            let mapped = state.mapped.entry(here.rid).or_default();
            for range in ranges {
                if mapped.iter().all(|m| m.decoded != range) {
                    mapped.extend(self.map(here, range));
                }
            }
        }
    }

    fn map(&self, here: &Present, decoded: Decoded) -> Option<Mapped> {
        let window = Arc::new(BarWindow {
            root: self.this.clone(),
            function: Arc::clone(&here.function),
            bar: decoded.bar,
        });
        if let Err(error) = self
            .bus(decoded.space)
            .insert(decoded.base, decoded.length, window)
        {
            log::debug!("{}: register {} not mapped: {error}", here.rid, decoded.bar);
            return None;
        }
        let mut events = here.function.io_events();
        events.retain(|event| {
            let address = decoded.base.saturating_add(event.offset);
            event.bar == decoded.bar
                && match self.registry.add(decoded.space, address, event) {
                    Ok(()) => true,
                    Err(error) => {
                        warn_limited!("{}: doorbell at {address:#x} exits: {error}", here.rid);
                        false
                    }
                }
        });
        here.function.bar_mapped(decoded);
        Some(Mapped { decoded, events })
    }

    fn unmap(&self, function: &dyn PciFunction, mapped: Mapped) {
        let decoded = mapped.decoded;
        for event in &mapped.events {
            let address = decoded.base.saturating_add(event.offset);
            self.registry.remove(decoded.space, address, event);
        }
        if let Err(error) = self.bus(decoded.space).remove(decoded.base) {
            log::error!("a mapped register was not on its bus: {error}");
        }
        function.bar_unmapped(decoded);
    }

    fn bus(&self, space: Space) -> &Bus {
        match space {
            Space::Mmio => &self.mmio,
            Space::Pio => &self.pio,
        }
    }

    fn in_window(&self, range: &Decoded) -> bool {
        let Some(last) = range.base.checked_add(range.length - 1) else {
            return false;
        };
        let inside =
            |window: &RangeInclusive<u64>| window.contains(&range.base) && window.contains(&last);
        match range.space {
            Space::Mmio => inside(&self.config.mmio32) || inside(&self.config.mmio64),
            Space::Pio => inside(&self.config.pio),
        }
    }

    /// Gives an address to every register of `function` that has none, largest first.
    fn assign(&self, rid: Rid, function: &dyn PciFunction) -> Result<(), RootError> {
        let mut bars = function.bars();
        bars.retain(|(_, address)| *address == 0);
        bars.sort_by_key(|(bar, _)| std::cmp::Reverse(bar.length));
        for (bar, _) in bars {
            let windows: &[(&RangeInclusive<u64>, &'static str)] = match bar.kind {
                BarKind::Memory32 => &[(&self.config.mmio32, "the 32-bit window")],
                BarKind::Memory64 => &[
                    (&self.config.mmio64, "the 64-bit window"),
                    (&self.config.mmio32, "the 64-bit or the 32-bit window"),
                ],
                BarKind::Io => &[(&self.config.pio, "the port I/O window")],
            };
            let taken = self.taken(bar.space(), function);
            let address = windows
                .iter()
                .find_map(|(window, _)| first_fit(window, bar.length, &taken))
                .ok_or(RootError::NoSpace {
                    rid,
                    bar: bar.index,
                    length: bar.length,
                    window: windows.last().map_or("", |(_, name)| name),
                })?;
            function.assign_bar(bar.index, address);
        }
        Ok(())
    }

    /// Every range of a space that must not be given away, in order: what is on the bus and what
    /// registers hold, enabled or not.
    fn taken(&self, space: Space, newcomer: &dyn PciFunction) -> Vec<RangeInclusive<u64>> {
        let present = self.present.load();
        let registers = present
            .iter()
            .flat_map(|here| here.function.bars())
            .chain(newcomer.bars())
            .filter(|(bar, address)| bar.space() == space && *address != 0)
            .map(|(bar, address): (Bar, u64)| address..=address.saturating_add(bar.length - 1));
        let mut taken: Vec<_> = self.bus(space).ranges();
        taken.extend(registers);
        taken.sort_by_key(|range| *range.start());
        taken
    }
}

/// The lowest multiple of `length` in `window` that meets nothing in `taken` (in order of start).
/// Address 0 is never given: it means "none".
fn first_fit(
    window: &RangeInclusive<u64>,
    length: u64,
    taken: &[RangeInclusive<u64>],
) -> Option<u64> {
    let mut at = (*window.start()).max(1).checked_next_multiple_of(length)?;
    for range in taken {
        let last = at.checked_add(length - 1)?;
        if *range.end() >= at && *range.start() <= last {
            at = range
                .end()
                .checked_add(1)?
                .checked_next_multiple_of(length)?;
        }
    }
    let last = at.checked_add(length - 1)?;
    (last <= *window.end()).then_some(at)
}

/// Cuts an access of `length` bytes at `offset` into pieces of 1, 2 or 4 bytes that are naturally
/// aligned, which is all a function must understand.
fn pieces(offset: u16, length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = length - done;
        let at = usize::from(offset) + done;
        let size = [4, 2, 1]
            .into_iter()
            .find(|&size| size <= left && at.is_multiple_of(size))?;
        done += size;
        Some(done - size..done)
    })
}

/// A reserved address. Dropping it unfilled gives the address back.
#[must_use]
pub struct Slot {
    root: Arc<PciRoot>,
    rid: Rid,
}

impl Slot {
    /// The address.
    pub fn rid(&self) -> Rid {
        self.rid
    }

    /// Puts `function` here: assigns its base address registers and makes it visible.
    ///
    /// # Errors
    /// [`RootError::NoSpace`]; nothing is added then.
    pub fn fill(self, function: Arc<dyn PciFunction>) -> Result<Rid, RootError> {
        let mut state = self.root.state();
        self.root.assign(self.rid, &*function)?;
        let mut present = Vec::clone(&self.root.present.load());
        let at = present.partition_point(|here| here.rid < self.rid);
        let rid = self.rid;
        present.insert(at, Present { rid, function });
        self.root.present.store(Arc::new(present));
        self.root.reconcile(&mut state);
        Ok(rid)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.root.state().reserved.remove(&self.rid);
    }
}

#[cfg(test)]
mod tests;
