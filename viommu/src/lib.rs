//! A guest's own IOMMU, in front of real and emulated devices.
//!
//! Two *front ends* are what a guest sees: [`vtd`] (Intel VT-d) and [`virtio`] (virtio-iommu).
//! Two *back ends* are what really translates: the host's [`iommufd`](backend::iommufd) and our
//! own [software engine](backend::software). Between them is one contract, [`backend`]: a front
//! end decodes what the guest asked for into one small [`Translation`](backend::Translation) per
//! (endpoint, PASID), and a back end makes it true. Nothing else crosses.
//!
//! ```text
//!   guest's driver       registers, queues, tables in guest memory       requests on a virtqueue
//!   ----------------------------|---------------------------------------------------|----------
//!   front ends                vtd::Unit                                      virtio::Iommu
//!                               |    apply, invalidate, map, unmap                  |
//!   the waist           backend::Backend  <------------------------------------------
//!                               |    faults, page requests: backend::EventSink
//!   back ends          iommufd::HostIommu              software::Engine
//!                               |                           |
//!   devices            passed through (VFIO)       emulated, each with a dma::DmaPort
//! ```
//!
//! # What it promises
//!
//! 1. **Fail closed.** An endpoint is Blocked from the moment it exists until the guest (or the
//!    bypass policy) gives it something. What a back end refuses leaves it Blocked and is told in
//!    the guest's own fault log; the next invalidation tries again.
//! 2. **Done means done.** A wait descriptor or a virtio reply is written after every effect before
//!    it took place and after DMA in flight to what was removed has ended.
//! 3. **Bounded.** No value that the guest writes decides how long a call takes or how much it
//!    allocates.
//! 4. **Capabilities are composed, then frozen.** What the guest sees is what we implement AND what
//!    every back end of its endpoints can do AND what the user asked for. It freezes when the guest
//!    first looks; an endpoint that comes later and cannot keep it is refused, and nothing is ever
//!    switched off in a running guest.
//! 5. **The host's map rules.** What a host cannot map ([`reserved`]) is known per endpoint, refused
//!    in mappings and told to the guest.
//! 6. **Nothing left behind.** An endpoint that goes takes every table, mapping, page request and
//!    PASID along; [`Backend::objects`](backend::Backend::objects) counts them.
//! 7. **The guest is the adversary.** It may write anything anywhere at any time, from several vCPUs
//!    at once; the worst it can do is break itself.
//!
//! # To embed it
//!
//! This crate knows no KVM, no PCI emulation and no REST. Two examples are a VMM in miniature, each
//! with the guest that drives it: `examples/vtd.rs` and `examples/virtio_iommu.rs`. A VMM brings
//!
//! | what | as | which is |
//! |---|---|---|
//! | guest RAM | [`GuestRam`] | shared by front ends and back ends |
//! | the unit's own interrupts | [`interrupt::MsiSink`] | one function, which must not block |
//! | accesses of VT-d's register page | [`vtd::Unit::read`], [`vtd::Unit::write`] | called on vCPU threads |
//! | requests of virtio-iommu's queue | [`virtio::Iommu::serve`] | the transport is the VMM's |
//! | emulated devices | [`Engine::add_endpoint`](backend::software::Engine::add_endpoint) | gives each a [`dma::DmaPort`], which is a `GuestMemory` to virtio-queue |
//! | passed-through devices | [`HostIommu::add_device`](backend::iommufd::HostIommu::add_device) | attach and detach ([`AttachDevice`](backend::iommufd::AttachDevice)) are calls of its VFIO device |
//! | the ACPI table | [`Dmar`](spec::vtd::dmar::Dmar), [`viot`](virtio::viot) | made here, placed by the VMM |
//! | remapped interrupts, if offered | [`vtd::InterruptRemapper`] | the VMM's routes change when an entry does |
//! | PASIDs of the host, if offered | [`pasid::PasidAllocator`] | one for all VMs: [`pasid`] has one in a file |
//!
//! The rest is the embedder's choice: a back end of its own implements [`backend::Backend`] and runs
//! the suite that ours run (`backend::conformance`, with the feature `conformance`).
//!
//! # To read it
//!
//! Start with [`backend`], which is one file. Each front end is *decode* (pure, total, fuzzed), then
//! a *state machine* (pure, property-tested), then calls of a back end; `spec` has bit layouts and
//! numbers only, by the specifications' names and sections. "What happens when a guest invalidates"
//! is `vtd/invalidate.rs` and `backend/software/mod.rs`.

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
