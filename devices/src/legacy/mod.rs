//! What a PC has besides PCI: the serial port, reset and power registers, the I/O APIC.

/// What the guest asks of its platform. Called on vCPU threads: an implementation notes the wish,
/// wakes the VM's event loop and returns.
pub trait PowerEvents: Send + Sync {
    /// Reset the machine (0xcf9, i8042, or the ACPI reset register).
    fn reset(&self);

    /// Power off (ACPI S5).
    fn power_off(&self);

    /// End the VMM with this status (debug-exit port).
    fn debug_exit(&self, status: u8);
}
