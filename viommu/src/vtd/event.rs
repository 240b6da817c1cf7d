//! The interrupt of an event: fault, page request and invalidation completion have the same four
//! registers (10.4.10 to 10.4.13 and their like).

use crate::interrupt::Msi;
use crate::spec::vtd::registers::EventControl;

/// Control, data, address and upper address of one event interrupt.
#[derive(Clone, Copy, Debug)]
pub(super) struct EventInterrupt {
    control: EventControl,
    data: u32,
    address: u32,
    upper_address: u32,
}

impl Default for EventInterrupt {
    fn default() -> Self {
        Self {
            control: EventControl::new().with_im(true),
            data: 0,
            address: 0,
            upper_address: 0,
        }
    }
}

impl EventInterrupt {
    /// What the register at dword `index` (control, data, address, upper address) reads as.
    pub(super) fn read(&self, index: u64) -> u32 {
        match index {
            0 => self.control.into_bits(),
            1 => self.data,
            2 => self.address,
            _ => self.upper_address,
        }
    }

    /// The guest writes the register at dword `index`. Unmasking sends what is pending.
    pub(super) fn write(&mut self, index: u64, value: u32) -> Option<Msi> {
        match index {
            0 => {
                self.control.set_im(EventControl::from_bits(value).im());
                if !self.control.im() && self.control.ip() {
                    self.control.set_ip(false);
                    return Some(self.message());
                }
            }
            // Messages of the architecture have 16 bits of data: the rest is reserved.
            1 => self.data = value & 0xffff,
            2 => self.address = value & !3,
            _ => self.upper_address = value,
        }
        None
    }

    /// The event happens: the message to send, or none while masked (it is pending then).
    pub(super) fn raise(&mut self) -> Option<Msi> {
        if self.control.im() {
            self.control.set_ip(true);
            None
        } else {
            Some(self.message())
        }
    }

    /// Software has cleared every status that the event reports.
    pub(super) fn serviced(&mut self) {
        self.control.set_ip(false);
    }

    fn message(&self) -> Msi {
        Msi {
            address: u64::from(self.upper_address) << 32 | u64::from(self.address),
            data: self.data,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programmed() -> EventInterrupt {
        let mut event = EventInterrupt::default();
        assert_eq!(event.write(1, 0xabcd_4021), None);
        assert_eq!(event.write(2, 0xfee0_1007), None);
        assert_eq!(event.write(3, 0x100), None);
        event
    }

    const MESSAGE: Msi = Msi {
        address: 0x100_fee0_1004,
        data: 0x4021,
    };

    #[test]
    fn an_event_is_masked_after_reset_and_pending_until_unmasked() {
        let mut event = programmed();
        assert_eq!(event.read(0), 1 << 31);
        assert_eq!(event.raise(), None);
        assert_eq!(event.read(0), 3 << 30);
        assert_eq!(event.write(0, 0), Some(MESSAGE));
        assert_eq!(event.read(0), 0);
        assert_eq!(event.write(0, 0), None, "sent once");
        assert_eq!(event.raise(), Some(MESSAGE));
    }

    #[test]
    fn a_serviced_event_is_not_sent_when_unmasked() {
        let mut event = programmed();
        assert_eq!(event.raise(), None);
        event.serviced();
        assert_eq!(event.write(0, 0), None);
    }

    #[test]
    fn software_cannot_set_pending() {
        let mut event = programmed();
        assert_eq!(event.write(0, u32::MAX), None);
        assert_eq!(event.read(0), 1 << 31);
        assert_eq!(event.write(0, 1 << 30), None);
    }
}
