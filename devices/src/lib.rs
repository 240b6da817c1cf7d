//! Device models: PCI, virtio, passthrough and legacy devices.
//!
//! A device reaches guest memory through its [`viommu::dma::DmaPort`] and interrupts the guest
//! through [`interrupt`]; it never learns whether a vIOMMU stands behind either.

pub mod bus;
pub mod interrupt;
pub mod legacy;
pub mod passthrough;
pub mod pci;
pub mod testdev;
pub mod virtio;

#[cfg(test)]
mod testing;
