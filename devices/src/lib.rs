//! Device models: PCI, virtio, passthrough and legacy devices.
//!
//! A device reaches guest memory through its [`viommu::dma::DmaPort`] and interrupts the guest
//! through [`interrupt`]; it never learns whether a vIOMMU stands behind either.

pub mod bus;
pub mod counters;
pub mod interrupt;
pub mod legacy;
mod limit;
pub mod passthrough;
pub mod pci;
pub mod testdev;
pub mod virtio;

#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "fuzz harnesses use a part of it")
)]
#[expect(clippy::unwrap_used, reason = "it reports to a test by panicking")]
mod testing;
