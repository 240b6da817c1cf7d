//! How a device's own driver (VFIO, or the kernel's mock) attaches it to a hardware page table.
#![forbid(unsafe_code)]

use std::io;

use crate::Pasid;

/// A device bound to the iommufd. Calls for one device are never concurrent.
///
/// Bound and not attached, a device's DMA is blocked: binding claims DMA ownership of its group,
/// and from then on "no table" means the kernel's blocking domain, not the host's. That is why
/// *Blocked* is *detached* here: no empty address space is needed (it would cost a domain id per
/// IOMMU), and detaching cannot fail for want of memory.
pub trait AttachDevice: Send + Sync {
    /// Attaches requests without PASID (`None`) or with `pasid` to the hardware page table `hwpt`.
    /// What is attached already is replaced.
    ///
    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`. `Some(Pasid(0))` is never passed: VFIO takes it for
    /// requests without PASID.
    ///
    /// # Errors
    /// What the kernel says. After a failed replace it is unknown what is in force: VT-d has
    /// removed the old table, while iommufd still has it on record (`linux.md`, A4).
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()>;

    /// Detaches: `VFIO_DEVICE_DETACH_IOMMUFD_PT`. DMA is blocked when it returns.
    ///
    /// # Errors
    /// What the kernel says; nothing changed then.
    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()>;

    /// The last resort, after a detach failed: stops all DMA of the device (PCI: bus mastering
    /// off, whatever the guest or a reset makes of it) until [`resume`](Self::resume).
    fn stop(&self);

    /// Lets the device do what DMA its driver wants again: everything that could not be detached
    /// now is.
    fn resume(&self);
}
