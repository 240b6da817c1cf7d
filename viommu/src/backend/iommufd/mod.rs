//! The host kernel as a back end: nested HWPTs over one nest parent, domains as their own HWPTs.
//!
//! ```text
//!              Memory (one IOAS, all guest RAM, mapped once)
//!                │                         └─ copies ─► IOAS of a domain ─► its table
//!                ▼                         └─ copies ─► IOAS of a mirror ─► its table
//!   parent (one per kind of host IOMMU)      = Identity
//!                ▼
//!   nested tables (by guest table)           = Stage1
//! ```
//!
//! How each [`Translation`](super::Translation) is made true:
//!
//! | wanted | how |
//! |---|---|
//! | Blocked | detached: the kernel's blocking domain ([`AttachDevice`]) |
//! | Identity | attached to the parent |
//! | Stage1 | a nested table on the parent, shared by equal (table, flags, parent) |
//! | Stage2 | mirrored into an address space of its own |
//! | Domain | an address space of its own, copied from guest memory |
//! | Nested | refused: the hardware has two stages |
//!
//! **Copies, not files.** A domain could be filled by file (`IOMMU_IOAS_MAP_FILE`) as well as by copy
//! of guest memory's mapping (`IOMMU_IOAS_COPY`). A copy shares the pins that guest memory has; a
//! file pins its pages once more, and took 1.14 times as long per page of 4 KiB on the kernel's mock
//! (the test `a_copy_shares_the_pins_of_guest_memory_and_a_file_pins_anew` prints it).
//!
//! **First attach, and reserved regions.** A device that is attached straight to a nested table can
//! miss the reserved-region work of the parent. So [`HostIommu::add_device`] attaches each device
//! to its parent once, while it cannot do DMA, reads what can be mapped then, and detaches. The
//! regions stay on record for good and every later mapping is checked against them, because the
//! kernel forgets them with the detach. To go through the parent before each nested attach instead
//! would open all guest memory to the device for that moment.
//!
//! **Switching.** VT-d's replace is not transactional: it removes the old table first, and where
//! the new one then fails, iommufd still has the old one on record. So everything the hardware
//! could refuse is checked before, and a failed replace is followed by a detach, which makes kernel
//! and record agree, and by one attach from there. A target that has a fault queue and is to get
//! another such table is detached in between, since the kernel leaks a reference otherwise.
//!
//! Lock order: `endpoints`, one endpoint's `state`, `tables` / `shadows` / `domains`, an address
//! space's areas, guest memory, page requests. Invalidation takes the first two only, for reading
//! out what to invalidate.
//!
#![doc = include_str!("linux.md")]

mod admission;
mod attach;
mod faults;
mod host;
pub mod hwinfo;
pub mod kernel;
mod memory;
mod nested;
pub mod object;
mod owner;
mod parent;
mod prefault;
mod shadow;
mod space;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod virtio_tests;

pub use admission::Unfit;
pub use attach::AttachDevice;
pub use host::{Device, HostIommu, MAX_MAPPINGS, MAX_PASIDS};
pub use prefault::prefault;
