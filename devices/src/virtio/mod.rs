//! virtio 1.3 devices and their PCI transport (modern only).
//!
//! A [`VirtioDevice`] knows queues, features and its configuration; [`VirtioPci`] is the PCI
//! function around it. Rings are walked by one helper, [`ring::Ring`], which refuses what the
//! specification forbids; guest memory is reached through the device's
//! [`DmaPort`](viommu::dma::DmaPort) only.

#[cfg(test)]
mod behind_viommu_tests;
pub mod block;
pub mod buffers;
pub mod console;
pub mod device;
mod flat;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz;
pub mod iommu;
pub mod net;
pub mod ring;
pub mod rng;
pub mod tap;
pub mod transport;
pub mod worker;

pub use block::{Block, BlockConfig, BlockError};
pub use console::{Console, ConsoleBackend, ConsoleConfig, ConsoleError};
pub use device::{Activation, ActiveQueue, DeviceType, VirtioDevice, VirtioInterrupt};
pub use iommu::VirtioIommu;
pub use net::{Net, NetConfig};
pub use rng::{Rng, RngError};
pub use tap::{TapError, TapSource};
pub use transport::{VirtioPci, VirtioPciError};
