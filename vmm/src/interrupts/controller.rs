//! What of the host's kernel interrupts go through: KVM's, or a test's.

use std::io;

use devices::pci::Space;
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use viommu::interrupt::Msi;
use vmm_sys_util::eventfd::EventFd;

/// KVM's own limit of routes (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// One route: an interrupt number of the kernel's and the message that it stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Route {
    /// The number (GSI).
    pub gsi: u32,
    /// The message.
    pub msi: Msi,
}

/// The interrupt controller of a VM in the host's kernel.
pub trait Controller: Send + Sync {
    /// How many routes there may be.
    fn limit(&self) -> u32 {
        MAX_ROUTES
    }

    /// Makes `routes` all there are, at once.
    ///
    /// # Errors
    /// What the kernel says; the routes are as before then.
    fn set_routes(&self, routes: &[Route]) -> io::Result<()>;

    /// Lets signals of `eventfd` be interrupts of `gsi`, with those that are in it already.
    ///
    /// # Errors
    /// What the kernel says.
    fn connect(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()>;

    /// Ends that: later signals stay in `eventfd`.
    ///
    /// # Errors
    /// What the kernel says.
    fn disconnect(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()>;

    /// Delivers one interrupt of `gsi` as its route says.
    fn pulse(&self, gsi: u32);

    /// Delivers `msi` once.
    fn signal(&self, msi: Msi);

    /// Has writes of the guest to `address` signal `event` (or no longer).
    ///
    /// # Errors
    /// What the kernel says.
    fn doorbell(&self, on: bool, space: Space, address: u64, event: &EventFd) -> io::Result<()>;
}

impl Controller for VmFd {
    fn set_routes(&self, routes: &[Route]) -> io::Result<()> {
        let entries: Vec<_> = routes.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        Ok(self.set_gsi_routing(&table)?)
    }

    fn connect(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.register_irqfd(eventfd, gsi)?)
    }

    fn disconnect(&self, eventfd: &EventFd, gsi: u32) -> io::Result<()> {
        Ok(self.unregister_irqfd(eventfd, gsi)?)
    }

    fn pulse(&self, gsi: u32) {
        // Refused only where the message names no APIC: hardware would lose it, too.
        let _ = self.set_irq_line(gsi, true);
    }

    fn signal(&self, msi: Msi) {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // As above.
        let _ = self.signal_msi(message);
    }

    fn doorbell(&self, on: bool, space: Space, address: u64, event: &EventFd) -> io::Result<()> {
        let address = match space {
            Space::Mmio => IoEventAddress::Mmio(address),
            Space::Pio => IoEventAddress::Pio(address),
        };
        match on {
            true => self.register_ioevent(event, &address, NoDatamatch)?,
            false => self.unregister_ioevent(event, &address, NoDatamatch)?,
        }
        Ok(())
    }
}

/// `route` as KVM takes it with 32-bit APIC IDs: destination bits 31:8 in the high half.
fn entry(route: &Route) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: route.gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: route.msi.address as u32,
        address_hi: (route.msi.address >> 32) as u32,
        data: route.msi.data,
        ..Default::default()
    };
    entry
}
