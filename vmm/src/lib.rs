//! nestling's virtual machine: KVM, memory layout, boot, ACPI, interrupt routing and the device
//! manager.

pub mod acpi;
pub mod boot;
pub mod config;
pub mod interrupts;
pub mod kvm;
pub mod memory;
