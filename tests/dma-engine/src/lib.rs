//! Drives nestling's DMA test engine from guest user space.
//!
//! [`registers`] is a driver of the device's documented registers over any way to reach them;
//! [`memory`] has the ways and the buffers; [`sysfs`], [`vfio`] and [`sva`] are three ways to own
//! the device: with no driver at all, through VFIO (legacy group or iommufd with PASIDs), and
//! through the kernel module beside this crate, which binds the process's own address space.
//! [`map_benchmark`] has the kernel measure itself. [`checks`] are the tests that `dma-engine CHECK ADDRESS` runs in a guest.

pub mod checks;
pub mod doorbell;
mod fork;
mod ioctl;
pub mod map_benchmark;
pub mod memory;
pub mod process_checks;
pub mod processes;
pub mod registers;
pub mod sva;
pub mod sysfs;
pub mod vfio;
