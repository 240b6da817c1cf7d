//! [`VfioPci`]: a host's device as a PCI function of the guest.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::config::{GuestConfig, Offer, ROM_BAR, SIZE, Written};
use super::hardware::{CONFIG, Hardware, Irq, Mapping, borrow};
use super::layout;
use super::line::Line;
use crate::counters;
use crate::counters::Counters;
use crate::interrupt::{LevelLine, MsiSource, MsiVector};
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msi::MsiCapability;
use crate::pci::msix::Msix;
use crate::pci::{Bar, Decoded, Delivery, Effect, PciFunction, Space};

/// Where device memory is shown without an exit. Implemented by whoever owns KVM's memory slots.
pub trait DirectMemory: Send + Sync {
    /// Shows `mapping` at guest-physical `gpa`. The implementation keeps `mapping` until
    /// [`remove`](Self::remove).
    ///
    /// # Errors
    /// No slot is left. The guest reaches the memory by exits then.
    fn add(&self, gpa: u64, mapping: Arc<Mapping>) -> io::Result<()>;

    /// Undoes [`add`](Self::add).
    fn remove(&self, gpa: u64);
}

/// Where device memory is shown to the DMA of other devices (P2P). The host's iommufd, usually.
pub trait PeerMemory: Send + Sync {
    /// Shows all `length` bytes of `buffer` at `gpa`.
    ///
    /// # Errors
    /// The host has no P2P between these.
    fn add(&self, gpa: u64, buffer: OwnedFd, length: u64) -> io::Result<()>;

    /// Undoes [`add`](Self::add).
    fn remove(&self, gpa: u64);
}

impl PeerMemory for viommu::backend::iommufd::HostIommu {
    fn add(&self, gpa: u64, buffer: OwnedFd, length: u64) -> io::Result<()> {
        self.add_device_memory(gpa, buffer.as_fd(), 0, length)
            .map_err(io::Error::other)
    }

    fn remove(&self, gpa: u64) {
        if let Err(error) = self.remove_device_memory(gpa) {
            log::warn!("{error}");
        }
    }
}

/// What a [`VfioPci`] is connected to.
pub struct Connections<'a> {
    /// Its messages.
    pub messages: &'a dyn MsiSource,
    /// Its line, for as long as its driver enables no messages.
    pub line: Option<Arc<dyn LevelLine>>,
    /// Memory slots.
    pub direct: Arc<dyn DirectMemory>,
    /// Where other devices can reach it; `None` without P2P.
    pub peers: Option<Arc<dyn PeerMemory>>,
}

/// A function that the host passes through.
///
/// Lock order: `state`, `shown`. Neither is held while the other devices' parts are called, except
/// [`DirectMemory`] and [`PeerMemory`] under `shown`.
pub struct VfioPci {
    hardware: Arc<dyn Hardware>,
    state: Mutex<State>,
    msix: Option<Msix>,
    /// What is shown to the guest and to peers, by guest-physical address.
    shown: Mutex<BTreeMap<u64, Shown>>,
    direct: Arc<dyn DirectMemory>,
    peers: Option<Arc<dyn PeerMemory>>,
    /// Mappings of this process, made once: (register, offset).
    mappings: BTreeMap<(u8, u64), Arc<Mapping>>,
    /// The expansion ROM, once it was read: the host switches it on and off, and maps it, for each
    /// read.
    rom: OnceLock<Vec<u8>>,
    line: Option<Line>,
    error: EventFd,
    request: EventFd,
    counts: Arc<Counts>,
}

counters! {
    /// What a passed-through function counts: what the guest does to it through us. What it does
    /// to its memory directly, and its interrupts, pass us by.
    struct Counts {
        /// Reads of configuration space.
        config_reads,
        /// Writes to it.
        config_writes,
        /// Reads of its registers and memory that came as exits.
        bar_reads,
        /// Writes to them.
        bar_writes,
        /// Resets.
        resets,
    }
}

struct State {
    config: GuestConfig,
    msi: Option<MsiState>,
    /// What the hardware interrupts with now.
    connected: Option<Connected>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Connected {
    Line,
    Msi(u16),
    Msix,
}

/// MSI's logic, with registers in its own layout: 64-bit and maskable, as it always is there.
struct MsiState {
    capability: MsiCapability,
    scratch: ConfigSpace,
    /// Offset of the capability in `scratch`.
    at: u16,
}

struct Shown {
    bar: u8,
    to_peers: bool,
}

impl VfioPci {
    /// The function over `hardware`, which nothing else uses.
    ///
    /// # Errors
    /// Configuration space cannot be read, or the host has no more interrupt routes.
    pub fn new(
        hardware: Arc<dyn Hardware>,
        offer: Offer,
        connections: Connections<'_>,
    ) -> io::Result<Arc<Self>> {
        let mut raw = [0; SIZE];
        let length = (hardware.region(CONFIG).length as usize).min(SIZE);
        // Four bytes at a time: a larger read may have side effects that a driver would not cause.
        for (at, dword) in (0..).step_by(4).zip(raw[..length].chunks_exact_mut(4)) {
            hardware.read(CONFIG, at, dword)?;
        }
        let regions: [_; 7] = std::array::from_fn(|index| hardware.region(index as u32));
        let lengths = regions.each_ref().map(|region| region.length);
        let has_line = connections.line.is_some() && hardware.interrupts(Irq::Intx) > 0;
        let pin = if has_line { offer.pin } else { 0 };
        let config = GuestConfig::new(&raw, lengths, Offer { pin, ..offer });
        let msi = match config.msi_place() {
            Some(place) => Some(MsiState::new(place.count, connections.messages)?),
            None => None,
        };
        let msix = match config.msix_place() {
            Some(place) => Some(Msix::new(
                place.count,
                Delivery::Kernel,
                connections.messages,
            )?),
            None => None,
        };
        let mut mappings = BTreeMap::new();
        for (bar, _) in config.bars() {
            if bar.space() != Space::Mmio {
                continue;
            }
            let trapped = config
                .msix_place()
                .map_or_else(Vec::new, |place| place.trapped(bar.index));
            let region = &regions[usize::from(bar.index)];
            for (offset, length) in layout::direct(&region.mappable, &trapped) {
                match hardware.map(bar.index.into(), offset, length) {
                    Ok(mapping) => drop(mappings.insert((bar.index, offset), mapping)),
                    // By exits, then: slower, and right.
                    Err(error) => log::warn!("BAR {} is not mapped: {error}", bar.index),
                }
            }
        }
        let line = match connections.line.filter(|_| has_line && offer.pin != 0) {
            Some(line) => Some(Line::start(hardware.clone(), line)?),
            None => None,
        };
        let this = Self {
            state: Mutex::new(State {
                config,
                msi,
                connected: None,
            }),
            msix,
            shown: Mutex::default(),
            direct: connections.direct,
            peers: connections.peers,
            mappings,
            rom: OnceLock::new(),
            line,
            error: EventFd::new(libc::EFD_NONBLOCK)?,
            request: EventFd::new(libc::EFD_NONBLOCK)?,
            counts: Arc::default(),
            hardware,
        };
        for (irq, event) in [(Irq::Error, &this.error), (Irq::Request, &this.request)] {
            if this.hardware.interrupts(irq) > 0 {
                this.hardware.connect(irq, &[borrow(event)])?;
            }
        }
        this.reconnect(&mut this.state());
        Ok(Arc::new(this))
    }

    /// Signalled when the device had an uncorrected error: what it does from now on is undefined,
    /// and the guest should be stopped.
    pub fn error_event(&self) -> &EventFd {
        &self.error
    }

    /// Signalled when the host wants the device back: it is to be unplugged.
    pub fn request_event(&self) -> &EventFd {
        &self.request
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, BTreeMap<u64, Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the hardware interrupt with what the guest has enabled: MSI-X before MSI before the
    /// line.
    fn reconnect(&self, state: &mut State) {
        let wanted = if self.msix.as_ref().is_some_and(Msix::is_enabled) {
            Some(Connected::Msix)
        } else if let Some(count) = state.msi_enabled() {
            Some(Connected::Msi(count))
        } else {
            self.line.as_ref().map(|_| Connected::Line)
        };
        if wanted == state.connected {
            return;
        }
        self.disconnect(state);
        let vectors = match (wanted, &self.msix, &state.msi) {
            (Some(Connected::Msix), Some(msix), _) => (0..msix.count())
                .map_while(|index| msix.vector(index))
                .collect(),
            (Some(Connected::Msi(count)), _, Some(msi)) => (0..count)
                .map_while(|index| msi.capability.vector(index))
                .collect(),
            _ => Vec::<Arc<dyn MsiVector>>::new(),
        };
        let fds = match (wanted, &self.line) {
            (Some(Connected::Line), Some(line)) => vec![borrow(line.event())],
            _ => vectors
                .iter()
                .map(|vector| borrow(vector.eventfd()))
                .collect(),
        };
        let Some(wanted) = wanted else {
            return;
        };
        if let (Connected::Line, Some(line)) = (wanted, &self.line) {
            line.turn(true);
        }
        match self.hardware.connect(wanted.irq(), &fds) {
            Ok(()) => state.connected = Some(wanted),
            // The device does not interrupt; the guest's driver times out and says so.
            Err(error) => log::warn!("the host has no interrupts for a device: {error}"),
        }
    }

    /// Ends what the hardware interrupts with.
    fn disconnect(&self, state: &mut State) {
        let Some(old) = state.connected.take() else {
            return;
        };
        if let Err(error) = self.hardware.connect(old.irq(), &[]) {
            log::warn!("interrupts are not disabled: {error}");
        }
        if let (Connected::Line, Some(line)) = (old, &self.line) {
            line.turn(false);
        }
    }

    /// What a configuration write asks for, with the state locked.
    fn act(&self, state: &mut State, written: &Written) {
        if written.msi {
            state.msi_written();
        }
        if written.msix
            && let (Some(msix), Some(place)) = (&self.msix, state.config.msix_place())
        {
            msix.set_control(state.config.word(place.at + 2));
        }
        if written.msi || written.msix {
            self.reconnect(state);
        }
    }

    /// Resets hardware and view, with the state locked.
    fn reset_locked(&self, state: &mut State) {
        self.counts.resets.add(1);
        state.config.reset();
        state.msi_written();
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.disconnect(state);
        // The kernel puts back after the reset what the command register was before it.
        if let Err(error) = self.stop_dma() {
            log::warn!("a device may still do DMA while it is reset: {error}");
        }
        if let Err(error) = self.hardware.reset() {
            log::warn!("a device was not reset: {error}");
            // Then at least it does no DMA of its own accord.
            if let Err(error) = self.hardware.write(CONFIG, 4, &[0, 0]) {
                log::error!("a device that was not reset may do DMA: {error}");
            }
        }
        self.reconnect(state);
    }

    /// Clears Bus Master Enable.
    fn stop_dma(&self) -> io::Result<()> {
        const BUS_MASTER: u8 = 1 << 2;
        let mut command = [0; 2];
        self.hardware.read(CONFIG, 4, &mut command)?;
        command[0] &= !BUS_MASTER;
        self.hardware.write(CONFIG, 4, &command)
    }

    /// Reads the expansion ROM: from the device at first, and then what that gave.
    fn rom_read(&self, offset: u64, data: &mut [u8]) {
        let rom = self.rom.get_or_init(|| {
            let region = u32::from(ROM_BAR);
            let length = usize::try_from(self.hardware.region(region).length).unwrap_or(0);
            let mut rom = vec![0xff; length];
            if let Err(error) = self.hardware.read(region, 0, &mut rom) {
                log::warn!("an expansion ROM cannot be read: {error}");
                rom.clear();
            }
            rom
        });
        data.fill(0xff);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(rom.iter().skip(start)) {
            *to = *from;
        }
    }

    /// MSI-X's table or pending bits at `offset` of `bar`: whether it is the table, and bytes into
    /// either.
    fn in_tables(&self, bar: u8, offset: u64, length: usize) -> Option<(bool, u64)> {
        let place = self.state().config.msix_place()?;
        let count = u64::from(place.count);
        let inside = |(of, start): (u8, u64), bytes: u64| {
            let into = offset.checked_sub(start).filter(|_| of == bar)?;
            (into + length as u64 <= bytes).then_some(into)
        };
        inside(place.table, count * 16)
            .map(|into| (true, into))
            .or_else(|| inside(place.pending, count.div_ceil(64) * 8).map(|into| (false, into)))
    }
}

impl Connected {
    fn irq(self) -> Irq {
        match self {
            Self::Line => Irq::Intx,
            Self::Msi(_) => Irq::Msi,
            Self::Msix => Irq::Msix,
        }
    }
}

impl MsiState {
    fn new(count: u16, source: &dyn MsiSource) -> io::Result<Self> {
        let mut scratch = ConfigSpace::new(Identity::default());
        // The first capability of an empty space.
        let at = 0x40;
        let capability = MsiCapability::new(&mut scratch, count, Delivery::Kernel, source)?;
        Ok(Self {
            capability,
            scratch,
            at,
        })
    }
}

impl State {
    /// How many vectors of MSI the guest has enabled.
    fn msi_enabled(&self) -> Option<u16> {
        let place = self.config.msi_place()?;
        let control = self.config.word(place.at + 2);
        (control & 1 != 0).then(|| (1u16 << (control >> 4 & 7).min(5)).min(place.count))
    }

    /// Hands the guest's MSI registers on, in the layout of [`MsiCapability`].
    fn msi_written(&mut self) {
        let (Some(place), Some(msi)) = (self.config.msi_place(), &mut self.msi) else {
            return;
        };
        let (config, at) = (&self.config, place.at);
        let own = msi.at;
        // Enable and Multiple Message Enable; the capability bits are its own.
        let control = msi.scratch.word(own + 2) & !0x71 | config.word(at + 2) & 0x71;
        msi.scratch.set(own + 2, &control.to_le_bytes());
        msi.scratch
            .set(own + 4, &config.dword(at + 4).to_le_bytes());
        let high = if place.wide { config.dword(at + 8) } else { 0 };
        msi.scratch.set(own + 8, &high.to_le_bytes());
        let data = config.word(at + place.data());
        msi.scratch.set(own + 12, &data.to_le_bytes());
        let mask = place.mask().map_or(0, |mask| config.dword(at + mask));
        msi.scratch.set(own + 16, &mask.to_le_bytes());
        msi.capability.written(&msi.scratch);
    }

    /// Brings the guest's pending bits up to date.
    fn msi_refresh(&mut self) {
        if let (Some(place), Some(msi)) = (self.config.msi_place(), &mut self.msi)
            && let Some(mask) = place.mask()
        {
            msi.capability.refresh(&mut msi.scratch);
            let pending = msi.scratch.dword(msi.at + 20);
            self.config.set(place.at + mask + 4, &pending.to_le_bytes());
        }
    }
}

impl PciFunction for VfioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        self.counts.config_reads.add(1);
        let mut state = self.state();
        if !state.config.is_kept(offset, data.len())
            && let Err(error) = self.hardware.read(CONFIG, offset.into(), data)
        {
            // A conventional function has 256 bytes; beyond them there is nothing.
            log::debug!("configuration space at {offset:#x}: {error}");
            data.fill(0);
        }
        state.msi_refresh();
        state.config.overlay(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        self.counts.config_writes.add(1);
        let mut state = self.state();
        let written = state.config.write(offset, data);
        if written.reset {
            self.reset_locked(&mut state);
            return Effect { decode: true };
        }
        if written.hardware
            && let Err(error) = self.hardware.write(CONFIG, offset.into(), data)
        {
            log::debug!("configuration space at {offset:#x}: {error}");
        }
        self.act(&mut state, &written);
        Effect {
            decode: written.decode,
        }
    }

    fn decoded(&self) -> Vec<Decoded> {
        self.state().config.decoded()
    }

    fn bars(&self) -> Vec<(Bar, u64)> {
        self.state().config.bars()
    }

    fn assign_bar(&self, bar: u8, address: u64) {
        self.state().config.assign(bar, address);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.counts.bar_reads.add(1);
        match (self.in_tables(bar, offset, data.len()), &self.msix) {
            (Some((true, into)), Some(msix)) => msix.table_read(into, data),
            (Some((false, into)), Some(msix)) => msix.pba_read(into, data),
            _ if bar == ROM_BAR => self.rom_read(offset, data),
            _ => {
                if let Err(error) = self.hardware.read(bar.into(), offset, data) {
                    // As on a bus where nobody answers.
                    log::debug!("BAR {bar} at {offset:#x}: {error}");
                    data.fill(0xff);
                }
            }
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effect {
        self.counts.bar_writes.add(1);
        match (self.in_tables(bar, offset, data.len()), &self.msix) {
            (Some((true, into)), Some(msix)) => msix.table_write(into, data),
            (Some((false, _)), _) => {}
            // It is read only.
            _ if bar == ROM_BAR => {}
            _ => {
                if let Err(error) = self.hardware.write(bar.into(), offset, data) {
                    log::debug!("BAR {bar} at {offset:#x}: {error}");
                }
            }
        }
        Effect::default()
    }

    fn bar_mapped(&self, decoded: Decoded) {
        let mut shown = self.shown();
        let parts = self.mappings.range((decoded.bar, 0)..(decoded.bar + 1, 0));
        for (&(bar, offset), mapping) in parts {
            let gpa = decoded.base + offset;
            if let Err(error) = self.direct.add(gpa, mapping.clone()) {
                log::warn!("BAR {bar} is reached by exits: {error}");
                continue;
            }
            let to_peers = self.peers.as_ref().is_some_and(|peers| {
                let added = self
                    .hardware
                    .export(bar.into(), offset, mapping.length())
                    .and_then(|buffer| peers.add(gpa, buffer, mapping.length()));
                if let Err(error) = &added {
                    log::info!("BAR {bar} is not reached by other devices' DMA: {error}");
                }
                added.is_ok()
            });
            shown.insert(gpa, Shown { bar, to_peers });
        }
    }

    fn bar_unmapped(&self, decoded: Decoded) {
        let mut shown = self.shown();
        let last = decoded.base + (decoded.length - 1);
        let gone = shown
            .range(decoded.base..=last)
            .filter(|(_, shown)| shown.bar == decoded.bar)
            .map(|(&gpa, shown)| (gpa, shown.to_peers))
            .collect::<Vec<_>>();
        for (gpa, to_peers) in gone {
            // Peers first: what no longer is device memory must not be written to.
            if let Some(peers) = self.peers.as_ref().filter(|_| to_peers) {
                peers.remove(gpa);
            }
            self.direct.remove(gpa);
            shown.remove(&gpa);
        }
    }

    fn counters(&self) -> Vec<Arc<dyn Counters>> {
        vec![self.counts.clone()]
    }

    fn reset(&self) -> Effect {
        self.reset_locked(&mut self.state());
        Effect { decode: true }
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
mod tests;
