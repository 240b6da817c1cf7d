//! PCI Express as the guest sees it: functions, their configuration spaces, and the root complex.
//!
//! A [`PciFunction`] is one function. A [`PciRoot`] holds the functions of the VM, answers
//! configuration accesses from [`Ecam`] and [`ConfigPorts`], and keeps the buses in step with the
//! base address registers that the guest programs.

pub mod bar;
pub mod config;
pub mod function;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod hotplug;
pub mod msi;
pub mod msix;

pub mod root;
mod vector;

pub use bar::{Bar, BarKind};
pub use config::ConfigSpace;
pub use function::{Decoded, Effect, IoEvent, PciFunction, Space};
pub use root::{ConfigPorts, Ecam, PciRoot, Placement, RootConfig, Slot};
pub use vector::Delivery;
