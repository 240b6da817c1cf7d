//! nestling's virtual machine: KVM, memory layout, boot, ACPI, interrupt routing and the device
//! manager.
//!
//! [`config`] is what a user asks for, [`vm::Prepared::run`] makes it true, [`outcome`] says how
//! it ended; [`control`] is how clients reach it meanwhile.

pub mod acpi;
pub mod boot;
pub mod config;
pub mod control;
pub mod doctor;
pub mod interrupts;
pub mod kvm;
pub mod memory;
pub mod outcome;
pub mod sandbox;
pub mod terminal;
pub mod vm;
