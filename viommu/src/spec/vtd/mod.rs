//! VT-d registers, tables, queue descriptors and records: layouts and numbers only.
//!
//! Field names are those of "Intel Virtualization Technology for Directed I/O, Architecture
//! Specification", revision 4.1; the section is named at each type. No other module shifts bits
//! of these by hand. Everything in guest memory is little-endian.

pub mod descriptor;
pub mod dmar;
pub mod fault;
pub mod irte;
pub mod page_request;
pub mod paging;
pub mod registers;
pub mod tables;
pub mod vcmd;

/// Size of every VT-d page and table, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Bits of guest-physical address that a table pointer may have; the bits above are reserved.
pub const HOST_ADDRESS_BITS: u8 = 52;

/// The bits of a pointer that are reserved because they lie above [`HOST_ADDRESS_BITS`].
pub const ABOVE_HOST_ADDRESS: u64 = u64::MAX << HOST_ADDRESS_BITS;

/// First address of the interrupt range, never translated (3.14).
pub const INTERRUPT_RANGE_FIRST: u64 = 0xfee0_0000;
/// Last address of the interrupt range.
pub const INTERRUPT_RANGE_LAST: u64 = 0xfeef_ffff;
