#![doc = include_str!("hotplug.md")]
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use devices::passthrough::HostError;
use devices::pci::hotplug::Ejection;
use devices::pci::root::{RootError, Slot};
use devices::pci::{PciFunction, PciRoot, Placement};
use viommu::Rid;
use viommu::backend::iommufd::Unfit;
use vmm_sys_util::eventfd::EventFd;

use super::devices::{DeviceError, Devices};
use super::event_loop::{EventLoop, Wake, WatchId};
use super::passthrough::{Passed, Passthrough, PassthroughError, reserved_by};
use super::slots::Home;
use crate::config::{Behind, DeviceConfig, DiskConfig, NetConfig, TestDeviceConfig};
use crate::control::{ApiError, Code, DeviceKind, NewDevice, PciDeviceInfo};

/// What adding a device does, in this order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Step {
    /// A free slot behind what the device is to be behind.
    Slot,
    /// What the device reserves does not meet guest memory.
    ReservedRegions,
    /// Opening it: the file, the interface, the host's device, which is bound to the VM then.
    Open,
    /// It can do what the guest was promised.
    Capabilities,
    /// Its vIOMMU takes it, blocked.
    Viommu,
    /// Its configuration space and interrupts.
    Function,
    /// Its registers find addresses, and it is on the bus.
    Bus,
    /// What the host says of it is listened to, and the guest is told.
    Notify,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slot => "slot",
            Self::ReservedRegions => "reserved-regions",
            Self::Open => "open",
            Self::Capabilities => "capabilities",
            Self::Viommu => "viommu",
            Self::Function => "function",
            Self::Bus => "bus",
            Self::Notify => "notify",
        })
    }
}

/// Why a device was not added: nothing of it is left.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct AddError {
    /// What failed.
    pub step: Step,
    /// Why.
    pub source: DeviceError,
}

impl AddError {
    /// As a client gets it.
    pub(super) fn to_api(&self) -> ApiError {
        let code = match (&self.source, self.step) {
            (DeviceError::NoSlot { .. }, _) => Code::NoFreeSlot,
            (_, Step::Capabilities | Step::Viommu | Step::ReservedRegions) => {
                Code::CapabilityMismatch
            }
            _ => Code::HostRefused,
        };
        ApiError::from_error(code, self)
    }
}

/// Says at which step something failed.
pub(super) trait AtStep<T> {
    fn at(self, step: Step) -> Result<T, AddError>;
}

impl<T, E: Into<DeviceError>> AtStep<T> for Result<T, E> {
    fn at(self, step: Step) -> Result<T, AddError> {
        self.map_err(|source| AddError {
            step,
            source: source.into(),
        })
    }
}

/// A device to add, by its configuration.
#[derive(Clone, Copy, Debug)]
pub(super) enum New<'c> {
    /// A virtio-blk disk.
    Disk(&'c DiskConfig),
    /// A virtio-net card.
    Net(&'c NetConfig),
    /// A device of the host.
    Device(&'c DeviceConfig),
    /// A DMA test engine.
    Test(&'c TestDeviceConfig),
}

impl<'c> From<&'c NewDevice> for New<'c> {
    fn from(device: &'c NewDevice) -> Self {
        match device {
            NewDevice::Disk(config) => Self::Disk(config),
            NewDevice::Net(config) => Self::Net(config),
            NewDevice::Device(config) => Self::Device(config),
            NewDevice::Test(config) => Self::Test(config),
        }
    }
}

impl<'c> New<'c> {
    /// Its name, which a validated configuration has.
    pub(super) fn id(self) -> &'c str {
        let id = match self {
            Self::Disk(disk) => &disk.id,
            Self::Net(net) => &net.id,
            Self::Device(device) => &device.id,
            Self::Test(device) => &device.id,
        };
        id.as_deref().unwrap_or_default()
    }

    pub(super) fn behind(self) -> Behind<'c> {
        let (iommu, viommu) = match self {
            Self::Disk(disk) => (disk.iommu, &disk.viommu),
            Self::Net(net) => (net.iommu, &net.viommu),
            Self::Device(device) => (device.iommu, &device.viommu),
            Self::Test(device) => (device.iommu, &device.viommu),
        };
        Behind::new(iommu, viommu.as_deref())
    }

    fn kind(self) -> DeviceKind {
        match self {
            Self::Disk(_) => DeviceKind::Disk,
            Self::Net(_) => DeviceKind::Net,
            Self::Device(_) => DeviceKind::Device,
            Self::Test(_) => DeviceKind::TestDevice,
        }
    }
}

/// A device that can be removed, and where it is.
pub(super) struct Plugged {
    pub(super) id: String,
    pub(super) kind: DeviceKind,
    pub(super) rid: Rid,
    pub(super) home: Home,
    /// It is a device of the host.
    pub(super) passed: Option<Passed>,
    /// What the event loop watches for it.
    pub(super) watches: Vec<WatchId>,
}

impl Plugged {
    /// Listens to what the host says of it: to all of it, or on an error to nothing.
    pub(super) fn watch(&mut self, event_loop: &mut EventLoop) -> io::Result<()> {
        for (event, about) in self.passed.iter().flat_map(Passed::events) {
            match event_loop.watch_event(event, Wake::Device(about)) {
                Ok(watch) => self.watches.push(watch),
                Err(why) => {
                    for watch in self.watches.drain(..) {
                        event_loop.unwatch(watch);
                    }
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    /// Nothing is listened to any more.
    pub(super) fn unwatch(self, event_loop: &mut EventLoop) {
        for watch in self.watches {
            event_loop.unwatch(watch);
        }
    }

    /// As clients know it.
    pub(super) fn info(&self) -> PciDeviceInfo {
        PciDeviceInfo {
            id: self.id.clone(),
            bdf: format!("0000:{}", self.rid),
        }
    }

    pub(super) fn new(new: New<'_>, rid: Rid, home: Home, passed: Option<Passed>) -> Self {
        Self {
            watches: Vec::new(),
            id: new.id().into(),
            kind: new.kind(),
            rid,
            home,
            passed,
        }
    }
}

/// What the guest lets go of: off the bus at once, on the vCPU's thread, and stopped and freed by
/// the event loop, which [`event`](Self::event) wakes.
pub(super) struct Ejected {
    root: Weak<PciRoot>,
    event: EventFd,
    gone: Mutex<Vec<Gone>>,
}

type Gone = (Rid, Arc<dyn PciFunction>);

impl Ejected {
    pub(super) fn new(root: &Arc<PciRoot>) -> io::Result<Self> {
        Ok(Self {
            root: Arc::downgrade(root),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            gone: Mutex::default(),
        })
    }

    /// Signalled when there is something to [`take`](Self::take).
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    fn gone(&self) -> MutexGuard<'_, Vec<Gone>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<Gone> {
        std::mem::take(&mut *self.gone())
    }
}

impl Ejection for Ejected {
    fn ejected(&self, device: u8) {
        let rid = Rid::new(0, device, 0);
        let Some(root) = self.root.upgrade() else {
            return;
        };
        match root.remove(rid) {
            Ok(function) => self.gone().push((rid, function)),
            Err(why) => log::error!("the guest ejected what is not there: {why}"),
        }
        // A full counter wakes as well.
        let _ = self.event.write(1);
    }
}

impl Devices {
    /// Adds `new` to the running VM, lets `watch` listen to what the host says of it, and tells the
    /// guest, which may eject it from then on. `progress` is told each step before it is done.
    ///
    /// # Errors
    /// Nothing is changed then. `watch` leaves nothing when it fails.
    pub(super) fn add(
        &mut self,
        new: New<'_>,
        progress: &dyn Fn(Step),
        watch: impl FnOnce(&mut Plugged) -> io::Result<()>,
    ) -> Result<PciDeviceInfo, AddError> {
        let plugged = self.plug(new, progress)?;
        progress(Step::Notify);
        let (rid, info) = (plugged.rid, plugged.info());
        if let Err(source) = watch(plugged) {
            self.take_back(rid);
            let what = "a watch for the device's events";
            return Err(DeviceError::Host { what, source }).at(Step::Notify);
        }
        self.registers.occupy(rid.device(), true);
        Ok(info)
    }

    /// All but the last step: the guest knows nothing of it.
    fn plug(&mut self, new: New<'_>, progress: &dyn Fn(Step)) -> Result<&mut Plugged, AddError> {
        progress(Step::Slot);
        let home = self.viommus().home(new.behind());
        let slot = self.free_slot(home).at(Step::Slot)?;
        let plugged = match new {
            New::Device(config) => self.plug_host_device(slot, config, progress)?,
            emulated => {
                progress(Step::Open);
                self.plug_emulated(slot, emulated)?
            }
        };
        Ok(self.plugged.push_mut(plugged))
    }

    /// Takes back what [`plug`](Self::plug) did.
    fn take_back(&mut self, rid: Rid) {
        if let Ok(function) = self.root.remove(rid) {
            drop(self.unplug(rid, function));
        }
    }

    /// A free slot behind `home`: not one whose device the guest has let go of and that is not
    /// [gone](Self::ejected) yet. One whose device went without the guest's word is taken last: the
    /// guest may still have to find out.
    fn free_slot(&self, home: Home) -> Result<Slot, DeviceError> {
        let (fresh, stale): (Vec<Rid>, Vec<Rid>) = self
            .slots
            .of(home)
            .partition(|rid| self.vanished & 1 << rid.device() == 0);
        let all = fresh.into_iter().chain(stale);
        let mut free = all.filter(|rid| self.at(*rid).is_none());
        free.find_map(|rid| self.root.reserve(Placement::At(rid)).ok())
            .ok_or_else(|| DeviceError::NoSlot {
                behind: self.viommus().name(home).map(str::to_owned),
                slots: self.slots.of(home).count(),
            })
    }

    /// As at boot, in its own order: one after the other, since nobody else comes.
    fn plug_host_device(
        &mut self,
        slot: Slot,
        config: &DeviceConfig,
        progress: &dyn Fn(Step),
    ) -> Result<Plugged, AddError> {
        progress(Step::ReservedRegions);
        self.check_reserved(&config.path)?;
        progress(Step::Open);
        let first = self.passthrough.is_none();
        if first {
            let opened = Passthrough::open(&self.kvm, self.paging, self.offered, &self.descriptors);
            self.passthrough = Some(opened.at(Step::Open)?);
        }
        let plugged = self.plug_admitted(slot, config, progress);
        if plugged.is_err() && first {
            self.passthrough = None;
        }
        plugged
    }

    fn check_reserved(&self, path: &Path) -> Result<(), AddError> {
        let reserved = reserved_by(path).at(Step::Open)?;
        let admitted = self
            .layout
            .admits(&reserved)
            .map_err(PassthroughError::from);
        admitted.at(Step::ReservedRegions)
    }

    fn plug_admitted(
        &mut self,
        slot: Slot,
        config: &DeviceConfig,
        progress: &dyn Fn(Step),
    ) -> Result<Plugged, AddError> {
        let Self {
            passthrough: Some(passthrough),
            viommus,
            ..
        } = self
        else {
            return Err(RootError::NoFunction(slot.rid())).at(Step::Open);
        };
        let new = New::Device(config);
        let rid = slot.rid();
        let waiting = passthrough.admit(config, slot).map_err(|source| AddError {
            step: step_of(&source),
            source: source.into(),
        })?;
        progress(Step::Viommu);
        passthrough.place(&waiting, viommus).at(Step::Viommu)?;
        progress(Step::Function);
        let passed =
            match passthrough.connect(waiting, viommus, &self.interrupts, &self.buses.ioapic) {
                Ok(passed) => passed,
                Err(source) => {
                    viommus.remove(rid);
                    let step = step_of(&source).max(Step::Function);
                    return Err(source).at(step);
                }
            };
        let home = viommus.home(new.behind());
        Ok(Plugged::new(new, rid, home, Some(passed)))
    }

    /// The device with this name.
    pub(super) fn find(&self, id: &str) -> Option<&Plugged> {
        self.plugged.iter().find(|plugged| plugged.id == id)
    }

    /// The device at this address.
    pub(super) fn at(&self, rid: Rid) -> Option<&Plugged> {
        self.plugged.iter().find(|plugged| plugged.rid == rid)
    }

    /// Whether the guest has let go of the device at `rid`, and it is about to be
    /// [gone](Self::ejected).
    pub(super) fn is_let_go(&self, rid: Rid) -> bool {
        self.at(rid).is_some() && !self.registers.is_occupied(rid.device())
    }

    /// Asks the guest to let go of the device at `rid`.
    pub(super) fn ask(&self, rid: Rid) {
        self.registers.ask(rid.device());
    }

    /// The guest is no longer asked.
    pub(super) fn withdraw(&self, rid: Rid) {
        self.registers.withdraw(rid.device());
    }

    /// Takes the device at `rid` away, whatever the guest does. `None` when the guest has let go
    /// of it just now: it is among the [`ejected`](Self::ejected) then.
    pub(super) fn take_away(&mut self, rid: Rid) -> Option<Plugged> {
        if !self.registers.vacate(rid.device(), true) {
            return None;
        }
        self.vanished |= 1 << rid.device();
        let function = self.root.remove(rid).ok()?;
        self.unplug(rid, function)
    }

    /// What the guest has let go of, gone by now with everything that belonged to it.
    pub(super) fn ejected(&mut self) -> Vec<Plugged> {
        let gone = self.ejected.take();
        gone.into_iter()
            .filter_map(|(rid, function)| {
                self.vanished &= !(1 << rid.device());
                self.unplug(rid, function)
            })
            .collect()
    }

    /// The last part of both: `function` is off the bus.
    fn unplug(&mut self, rid: Rid, function: Arc<dyn PciFunction>) -> Option<Plugged> {
        // It does no DMA from here on.
        let _ = function.reset();
        self.viommus.remove(rid);
        drop(function);
        let at = self.plugged.iter().position(|plugged| plugged.rid == rid)?;
        let mut plugged = self.plugged.remove(at);
        // The host's device is closed here.
        drop(plugged.passed.take());
        if self.plugged.iter().all(|other| other.passed.is_none()) {
            // Guest memory is pinned for devices that are there, and for no longer.
            self.passthrough = None;
        }
        Some(plugged)
    }
}

/// Where opening or connecting a host's device failed.
fn step_of(error: &PassthroughError) -> Step {
    match error {
        PassthroughError::Device { source, .. } | PassthroughError::Host(source) => match source {
            HostError::Iommufd { .. } | HostError::Open(_) | HostError::Legacy(_) => Step::Open,
            HostError::Unfit(Unfit::ReservedByDevice(_)) => Step::ReservedRegions,
            HostError::Unfit(_) | HostError::NotOffered(_) => Step::Capabilities,
            HostError::Refused(_) | HostError::NoViommu => Step::Viommu,
            HostError::Device { .. } => Step::Function,
        },
        PassthroughError::Viommu { .. } => Step::Viommu,
        PassthroughError::Collision(_) => Step::ReservedRegions,
        PassthroughError::Pci(_) => Step::Bus,
        _ => Step::Open,
    }
}

#[cfg(test)]
#[path = "hotplug_tests.rs"]
mod tests;
