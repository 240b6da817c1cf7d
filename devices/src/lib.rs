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

#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(
    not(test),
    expect(
        clippy::unwrap_used,
        dead_code,
        reason = "fuzz harnesses use part of what tests do, and report by panicking as well"
    )
)]
mod testing;
