//! How a device interrupts the guest: one path for MSI and MSI-X, one for lines.
//!
//! A device never builds a KVM route. It asks its [`MsiSource`] (one per PCI function, which
//! knows the function's RID and so the unit that remaps it) for vectors, tells each vector what
//! the guest programmed, and signals the vector's eventfd. Remapping happens behind
//! [`MsiVector::route`], so an irqfd stays on for devices behind a vIOMMU.

#[cfg(any(test, feature = "testing"))]
pub mod fake;

use std::io;
use std::sync::{Arc, Weak};

use viommu::interrupt::Msi;
use vmm_sys_util::eventfd::EventFd;

/// Hands out the interrupt vectors of one PCI function.
pub trait MsiSource: Send + Sync {
    /// A new vector, connected to nothing.
    ///
    /// # Errors
    /// The host has no more interrupt routes or file descriptors.
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// One vector: an eventfd, and where it leads. Dropping the last reference frees its route.
pub trait MsiVector: Send + Sync {
    /// Signalling this delivers the interrupt (by irqfd, from any thread or from the kernel).
    /// It is non-blocking (`EFD_NONBLOCK`).
    fn eventfd(&self) -> &EventFd;

    /// Leads the eventfd to `msi`; `None` disconnects it: a signal is then not delivered but
    /// stays in the eventfd's counter, and is delivered when the eventfd is connected again (KVM
    /// does so when the irqfd is assigned).
    ///
    /// # Errors
    /// The host refused the route; the vector is disconnected then.
    fn route(&self, msi: Option<Msi>) -> io::Result<()>;
}

/// A level-triggered or edge-triggered line into the interrupt controller.
pub trait IrqLine: Send + Sync {
    /// Raises (`true`) or lowers the line. For an edge-triggered pin the rising edge counts.
    fn set(&self, level: bool);
}

/// A level-triggered line whose device cannot be asked for its level, but interrupts again if it
/// is not content (VFIO's INTx).
pub trait LevelLine: IrqLine {
    /// Has `observer` told of each end of an interrupt of this line. One observer at a time: the
    /// last one named.
    fn watch(&self, observer: Weak<dyn EndOfInterrupt>);
}

/// Who is told that the guest ended an interrupt.
pub trait EndOfInterrupt: Send + Sync {
    /// The guest ended one. If the line is high after this, it interrupts again. Called on vCPU
    /// threads, with nothing locked.
    fn ended(&self);
}
