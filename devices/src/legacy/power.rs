//! Registers by which a guest resets, powers off or ends its machine.

use std::sync::Arc;

use crate::bus::BusDevice;

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

/// The keyboard controller's command port, of which only the processor reset line is there.
pub struct I8042(pub Arc<dyn PowerEvents>);

impl I8042 {
    /// Where it goes on the port I/O bus; one byte.
    pub const PORT: u64 = 0x64;
    /// Pulse output line 0, which is the processor's reset.
    const PULSE_RESET: u8 = 0xfe;
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Status: both buffers empty, so that a driver does not wait before it writes.
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [Self::PULSE_RESET] {
            self.0.reset();
        }
    }
}

/// Ends the VMM with the byte that is written to it as its status. For tests only.
pub struct DebugExit(pub Arc<dyn PowerEvents>);

impl DebugExit {
    /// Where it goes on the port I/O bus; one byte.
    pub const PORT: u64 = 0xf4;
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if let Some(status) = data.first() {
            self.0.debug_exit(*status);
        }
    }
}

/// The registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 4.8.3.6), a byte each: sleep
/// control, sleep status, reset. The FADT names their addresses.
pub struct AcpiPower(pub Arc<dyn PowerEvents>);

impl AcpiPower {
    /// Bytes on the port I/O bus.
    pub const LENGTH: u64 = 3;
    /// Offset of SLEEP_CONTROL_REG.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of SLEEP_STATUS_REG.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of RESET_REG.
    pub const RESET: u64 = 2;
    /// RESET_VALUE.
    pub const RESET_VALUE: u8 = 1;
    /// SLP_TYP of soft-off, as `\_S5` must say.
    pub const SLEEP_TYPE_S5: u8 = 5;

    const SLP_EN: u8 = 1 << 5;
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let sleep_type = value >> 2 & 7;
        match offset {
            Self::SLEEP_CONTROL
                if value & Self::SLP_EN != 0 && sleep_type == Self::SLEEP_TYPE_S5 =>
            {
                self.0.power_off();
            }
            Self::RESET if value == Self::RESET_VALUE => self.0.reset(),
            _ => {}
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Writes down what was asked.
    #[derive(Default)]
    pub(crate) struct Wishes(pub(crate) Mutex<Vec<String>>);

    impl PowerEvents for Wishes {
        fn reset(&self) {
            self.0.lock().unwrap().push("reset".into());
        }
        fn power_off(&self) {
            self.0.lock().unwrap().push("power off".into());
        }
        fn debug_exit(&self, status: u8) {
            self.0.lock().unwrap().push(format!("exit {status}"));
        }
    }

    #[test]
    fn each_register_asks_for_its_own_end_and_nothing_else_does() {
        let wishes = Arc::new(Wishes::default());
        let keyboard = I8042(wishes.clone());
        let exit = DebugExit(wishes.clone());
        let acpi = AcpiPower(wishes.clone());
        keyboard.write(0, &[0xd1]);
        keyboard.write(0, &[0xfe]);
        exit.write(0, &[42]);
        acpi.write(AcpiPower::SLEEP_CONTROL, &[5 << 2]);
        acpi.write(AcpiPower::SLEEP_CONTROL, &[1 << 5 | 3 << 2]);
        acpi.write(AcpiPower::SLEEP_CONTROL, &[1 << 5 | 5 << 2]);
        acpi.write(AcpiPower::RESET, &[0]);
        acpi.write(AcpiPower::RESET, &[1]);
        assert_eq!(
            *wishes.0.lock().unwrap(),
            ["reset", "exit 42", "power off", "reset"]
        );
    }
}
