#![doc = include_str!("README.md")]
#![forbid(unsafe_code)]

mod capabilities;
mod context;
mod event;
mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod invalidate;
mod page_request;
mod pasid;
mod queue;
mod registers;
mod remap;
mod state;
mod targets;
#[cfg(any(test, feature = "fuzzing"))]
#[cfg_attr(
    not(test),
    allow(dead_code, reason = "fuzzers use a part of the harness")
)]
mod testing;
#[cfg(test)]
mod tests;
mod unit;
pub mod vcmd;

pub use capabilities::{Extras, Mode, Offer, UnitConfig, Unsupported, check_agreement};
pub use fault::{Recorded, RequestKind};
pub use invalidate::QueueCounts;
pub use remap::{InterruptRemapper, Remapping, RemappingTable};
pub use state::{EndpointState, UnitState};
pub use targets::{MAX_LIVE_PASIDS, MAX_TABLES_PER_SCAN, TargetCounts, TargetState};
pub use unit::{AddError, Connections, Unit};

/// Size of a unit's register page, in bytes. It must be aligned to it, and reserved in the
/// guest's memory map.
pub const REGISTERS_SIZE: u64 = crate::spec::vtd::registers::SIZE;
