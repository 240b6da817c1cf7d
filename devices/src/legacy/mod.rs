//! What a PC has besides PCI: the serial port, reset and power registers, the I/O APIC.
//!
//! There is no CMOS clock: the guest takes its time from kvmclock, and the FADT says so
//! ("CMOS RTC Not Present").

#![forbid(unsafe_code)]

pub mod ioapic;
pub mod power;
pub mod serial;

pub use ioapic::{Ioapic, IoapicSink};
pub use power::{AcpiPower, DebugExit, I8042, PowerEvents};
pub use serial::SerialPort;
