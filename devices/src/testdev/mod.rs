#![doc = include_str!("README.md")]
//!
//! # How it is built
//!
//! `registers` is one channel as a pure state machine, `requests` what one step of it does over a
//! small trait, `worker` the thread and the page request groups, `function` the PCI function.

#![forbid(unsafe_code)]

mod function;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod registers;
mod requests;
mod worker;

pub use function::{Features, NewError, TestDevice};

/// Channels of one device.
pub const CHANNELS: usize = 64;
/// MSI-X vectors of one device.
pub const VECTORS: u16 = 16;

#[cfg(test)]
mod tests;
