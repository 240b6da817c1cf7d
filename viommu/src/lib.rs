//! A guest's own IOMMU, in front of real and emulated devices.
//!
//! Two *front ends* are what a guest sees: [`vtd`] (Intel VT-d) and [`virtio`] (virtio-iommu).
//! Two *back ends* are what really translates: the host's iommufd and our own software engine.
//! Between them is one contract, [`backend`]: a front end decodes what the guest asked for into
//! one small [`Translation`](backend::Translation) per (endpoint, PASID), and a back end makes it
//! true. Nothing else crosses.
//!
//! This crate knows no KVM, no PCI emulation and no REST: it can be embedded in another VMM. An
//! embedder supplies guest RAM ([`GuestRam`]), a way to send the unit's own interrupts
//! ([`interrupt::MsiSink`]) and the endpoints; emulated devices do their DMA through a
//! [`dma::DmaPort`].

pub mod backend;
pub mod dma;
pub mod doorbell;
mod ids;
pub mod interrupt;
pub mod page_requests;
pub mod pasid;
pub mod reserved;
pub mod spec;
pub mod thread;
pub mod virtio;
pub mod vtd;

pub use ids::{DomainId, Gpa, HwptId, Iova, Pasid, Rid, Target};

/// Guest RAM as every part of this crate sees it. Cloning is cheap (an `Arc`).
pub type GuestRam = std::sync::Arc<vm_memory::GuestMemoryMmap<()>>;
