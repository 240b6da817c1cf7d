//! How interrupts reach the guest: GSI routes and irqfds of KVM.
//!
//! One table of routes for the VM. GSIs 0 to 23 are the I/O APIC's pins: their routes mirror its
//! redirection entries, so that KVM tells us about EOIs of level-triggered ones. The GSIs above
//! are handed out to the vectors of PCI functions.
//!
//! A function behind a remapping unit has a [`Remapper`]: what the guest programmed passes through
//! it whenever a route is made, and again in [`Interrupts::reevaluate`] when the unit's cache is
//! invalidated. The irqfd stays connected throughout.
//!
//! Locks: `state` is held while a [`Remapper`] is asked, so that "done means done" holds for
//! `reevaluate` whatever other threads do. A remapper takes no lock that is held by a caller of
//! this module.

#![forbid(unsafe_code)]

pub mod remapping;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::interrupt::{MsiSource, MsiVector};
use devices::legacy::IoapicSink;
use devices::pci::root::IoEventRegistry;
use devices::pci::{IoEvent, Space};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use viommu::Rid;
use viommu::interrupt::{MessageSink, Msi, MsiSink};
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::IOAPIC_PINS;

/// KVM's own limit of routes (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// Remaps the interrupts of endpoints (VT-d 5.1).
pub trait Remapper: Send + Sync {
    /// What `msi` from `rid` is delivered as; `None` when it is blocked. Asked when a route is
    /// made, not when an interrupt is sent, so it records nothing. Must take no lock that a caller
    /// of [`Interrupts::reevaluate`] may hold.
    fn remap(&self, rid: Rid, msi: Msi) -> Option<Msi>;

    /// `rid` has sent `msi` and it was blocked: tells the guest.
    fn report(&self, rid: Rid, msi: Msi);
}

/// Where one GSI should lead and does.
struct Line {
    rid: Rid,
    remapper: Option<Arc<dyn Remapper>>,
    /// What the guest programmed.
    wanted: Option<Msi>,
    /// Whose signals KVM delivers, while it does; pins have none.
    irqfd: Option<Arc<EventFd>>,
    connected: bool,
}

impl Line {
    fn target(&self) -> Option<Msi> {
        let wanted = self.wanted?;
        match &self.remapper {
            Some(remapper) => remapper.remap(self.rid, wanted),
            None => Some(wanted),
        }
    }
}

#[derive(Default)]
struct State {
    lines: BTreeMap<u32, Line>,
    /// What KVM was told last.
    routes: BTreeMap<u32, Msi>,
}

/// The interrupt routes of a VM.
pub struct Interrupts {
    vm: Arc<VmFd>,
    state: Mutex<State>,
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(&self.state().routes).finish()
    }
}

impl Interrupts {
    /// The routes of `vm`, of which there are none.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
            let line = state.lines.entry(pin).or_insert_with(pin_line);
            line.rid = rid;
            line.remapper = Some(remapper.clone());
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
        state.lines.entry(gsi).or_insert_with(pin_line).wanted = msi;
        self.commit(&mut state, &[gsi])
    }

    /// Delivers one interrupt of `pin` as its route says.
    pub fn pulse_pin(&self, pin: u8) {
        let (state, gsi) = (self.state(), u32::from(pin));
        let Some(line) = state.lines.get(&gsi).filter(|_| gsi < IOAPIC_PINS) else {
            return;
        };
        if state.routes.contains_key(&gsi) {
            // Refused only where the message names no APIC: hardware would lose it, too.
            let _ = self.vm.set_irq_line(gsi, true);
        } else if let (Some(remapper), Some(msi)) = (&line.remapper, line.wanted) {
            remapper.report(line.rid, msi);
        }
    }

    /// Asks the remappers again about every line that `which` picks by its source and by what the
    /// guest programmed; when this returns, none of them takes an old route. One update of KVM's
    /// table for all of them.
    ///
    /// # Errors
    /// The host refused; the lines concerned are disconnected then.
    pub fn reevaluate(&self, which: &dyn Fn(Rid, Msi) -> bool) -> io::Result<()> {
        let mut state = self.state();
        let gsis: Vec<u32> = state
            .lines
            .iter()
            .filter(|(_, line)| {
                line.remapper.is_some() && line.wanted.is_some_and(|msi| which(line.rid, msi))
            })
            .map(|(gsi, _)| *gsi)
            .collect();
        self.commit(&mut state, &gsis)
    }

    /// Makes KVM's table and irqfds true for `gsis`.
    fn commit(&self, state: &mut State, gsis: &[u32]) -> io::Result<()> {
        let mut changed = false;
        for gsi in gsis {
            let target = state.lines.get(gsi).and_then(Line::target);
            match target {
                Some(msi) => changed |= state.routes.insert(*gsi, msi) != Some(msi),
                None => {
                    if let Some(line) = state.lines.get_mut(gsi) {
                        self.disconnect(*gsi, line);
                    }
                    changed |= state.routes.remove(gsi).is_some();
                }
            }
        }
        if changed && let Err(why) = self.set_routes(&state.routes) {
            for gsi in gsis {
                state.routes.remove(gsi);
                if let Some(line) = state.lines.get_mut(gsi) {
                    self.disconnect(*gsi, line);
                }
            }
            return Err(why);
        }
        for gsi in gsis.iter().filter(|gsi| state.routes.contains_key(gsi)) {
            if let Some(line) = state.lines.get_mut(gsi)
                && !line.connected
                && let Some(irqfd) = &line.irqfd
            {
                self.vm.register_irqfd(irqfd, *gsi)?;
                line.connected = true;
            }
        }
        Ok(())
    }

    fn disconnect(&self, gsi: u32, line: &mut Line) {
        if line.connected
            && let Some(irqfd) = &line.irqfd
        {
            if let Err(why) = self.vm.unregister_irqfd(irqfd, gsi) {
                log::error!("KVM_IRQFD does not let go of GSI {gsi}: {why}");
            }
            line.connected = false;
        }
    }

    fn set_routes(&self, routes: &BTreeMap<u32, Msi>) -> io::Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = routes
            .iter()
            .map(|(gsi, msi)| route_entry(*gsi, *msi))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }

    fn add(
        &self,
        rid: Rid,
        remapper: Option<Arc<dyn Remapper>>,
        irqfd: Arc<EventFd>,
    ) -> io::Result<u32> {
        let mut state = self.state();
        let gsi = (IOAPIC_PINS..MAX_ROUTES)
            .find(|gsi| !state.lines.contains_key(gsi))
            .ok_or_else(|| {
                io::Error::other(format!(
                    "all {MAX_ROUTES} interrupt routes of the VM are taken"
                ))
            })?;
        state.lines.insert(
            gsi,
            Line {
                rid,
                remapper,
                wanted: None,
                irqfd: Some(irqfd),
                connected: false,
            },
        );
        Ok(gsi)
    }

    fn remove(&self, gsi: u32) {
        let mut state = self.state();
        if let Some(mut line) = state.lines.remove(&gsi) {
            self.disconnect(gsi, &mut line);
        }
        // KVM's table may keep the entry until the next change: without an irqfd it does nothing.
        state.routes.remove(&gsi);
    }
}

fn pin_line() -> Line {
    Line {
        rid: Rid(0),
        remapper: None,
        wanted: None,
        irqfd: None,
        connected: false,
    }
}

/// `msi` as KVM takes it with 32-bit APIC IDs: destination bits 31:8 in the high half.
fn route_entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    };
    entry
}

impl MsiSink for Interrupts {
    fn send(&self, msi: Msi) {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // Refused only where the message names no APIC: hardware would lose it, too.
        let _ = self.vm.signal_msi(message);
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
        let address = io_event_address(space, address);
        Ok(self
            .vm
            .register_ioevent(&event.eventfd, &address, NoDatamatch)?)
    }

    fn remove(&self, space: Space, address: u64, event: &IoEvent) {
        let address = io_event_address(space, address);
        if let Err(why) = self
            .vm
            .unregister_ioevent(&event.eventfd, &address, NoDatamatch)
        {
            log::error!("KVM_IOEVENTFD does not let go of a doorbell: {why}");
        }
    }
}

fn io_event_address(space: Space, address: u64) -> IoEventAddress {
    match space {
        Space::Mmio => IoEventAddress::Mmio(address),
        Space::Pio => IoEventAddress::Pio(address),
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
        match remapper.remap(endpoint, msi) {
            Some(remapped) => self.interrupts.send(remapped),
            None => remapper.report(endpoint, msi),
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
        if let Some(line) = state.lines.get_mut(&self.gsi) {
            line.wanted = msi;
        }
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
