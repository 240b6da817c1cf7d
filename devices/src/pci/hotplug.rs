//! Hot-plug of PCI functions by ACPI: the registers by which firmware code in the guest learns
//! which devices of bus 0 came or are to go, and lets go of them.
//!
//! Four registers of 32 bits, one bit for each device number. Reading one of the first three
//! clears it, so that each event is told once; the line is high as long as one of them is not 0.
//! Level-triggered, it waits for a guest that has no handler yet. Only aligned accesses of four
//! bytes mean anything.
//!
//! | offset | read | write |
//! |---|---|---|
//! | [`INSERTED`] | devices that came; cleared | - |
//! | [`LEAVING`] | devices that are to be ejected; cleared | - |
//! | [`VANISHED`] | devices that went without asking; cleared | - |
//! | [`EJECT`] | devices that can be ejected | the guest lets go of these |

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// Offset of the devices that came.
pub const INSERTED: u64 = 0x0;
/// Offset of the devices that are asked to go.
pub const LEAVING: u64 = 0x4;
/// Offset of the devices that are gone already.
pub const VANISHED: u64 = 0x8;
/// Offset of the devices that the guest lets go.
pub const EJECT: u64 = 0xc;
/// Bytes that the registers take.
pub const LENGTH: u64 = 0x10;

/// Who acts when the guest lets go of devices.
///
/// Called on vCPU threads, with no lock of the registers held. The guest takes the device for gone
/// when this returns: it must answer no access then.
pub trait Ejection: Send + Sync {
    /// The guest has let go of the device with this number, which was
    /// [occupied](HotplugRegisters::occupy) and no longer is.
    fn ejected(&self, device: u8);
}

/// The registers of bus 0.
pub struct HotplugRegisters {
    line: Arc<dyn IrqLine>,
    ejection: Arc<dyn Ejection>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct State {
    /// Has a device that the guest may eject.
    occupied: u32,
    inserted: u32,
    leaving: u32,
    vanished: u32,
}

impl State {
    fn read(&mut self, offset: u64) -> u32 {
        match offset {
            INSERTED => std::mem::take(&mut self.inserted),
            LEAVING => std::mem::take(&mut self.leaving),
            VANISHED => std::mem::take(&mut self.vanished),
            EJECT => self.occupied,
            _ => u32::MAX,
        }
    }

    /// The devices that go with this write.
    fn write(&mut self, offset: u64, value: u32) -> u32 {
        if offset != EJECT {
            return 0;
        }
        let ejected = self.occupied & value;
        self.forget(ejected);
        ejected
    }

    fn forget(&mut self, devices: u32) {
        self.occupied &= !devices;
        self.inserted &= !devices;
        self.leaving &= !devices;
    }

    fn pending(self) -> bool {
        self.inserted | self.leaving | self.vanished != 0
    }
}

/// The bit of a device number; none for a number that bus 0 does not have.
fn bit(device: u8) -> u32 {
    1u32.checked_shl(device.into()).unwrap_or(0)
}

impl HotplugRegisters {
    /// No device can be ejected yet.
    pub fn new(line: Arc<dyn IrqLine>, ejection: Arc<dyn Ejection>) -> Self {
        Self {
            line,
            ejection,
            state: Mutex::default(),
        }
    }

    /// Device number `device` has a device that the guest may eject. `announce` tells the guest,
    /// which a device needs that was not there when the guest started.
    pub fn occupy(&self, device: u8, announce: bool) {
        self.change(|state| {
            state.occupied |= bit(device);
            // What went before it there is told all the same.
            if announce {
                state.inserted |= bit(device);
            }
        });
    }

    /// Whether there is a device that the guest has not ejected. What it ejects is told by
    /// [`Ejection::ejected`], perhaps a moment later.
    pub fn is_occupied(&self, device: u8) -> bool {
        self.state().occupied & bit(device) != 0
    }

    /// Asks the guest to eject a device, once more if it was asked before. Without effect where
    /// there is none.
    pub fn ask(&self, device: u8) {
        self.change(|state| state.leaving |= bit(device) & state.occupied);
    }

    /// Takes back what [`ask`](Self::ask) asked, if the guest has not seen it.
    pub fn withdraw(&self, device: u8) {
        self.change(|state| state.leaving &= !bit(device));
    }

    /// The device is gone, whatever the guest does with it. Whether it was there: the guest may
    /// have ejected it just now, which [`Ejection::ejected`] tells then.
    ///
    /// `announce` tells a guest that knew it.
    pub fn vacate(&self, device: u8, announce: bool) -> bool {
        self.change(|state| {
            let there = state.occupied & bit(device);
            if announce {
                state.vanished |= there;
            }
            state.forget(there);
            there != 0
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The line follows the state in one step, so that no change of it is lost.
    fn change<T>(&self, edit: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let before = state.pending();
        let result = edit(&mut state);
        if state.pending() != before {
            self.line.set(!before);
        }
        result
    }
}

impl BusDevice for HotplugRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data) else {
            return data.fill(0xff);
        };
        *data = self.change(|state| state.read(offset)).to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let ejected = self.change(|state| state.write(offset, u32::from_le_bytes(data)));
        for device in (0..32).filter(|device| ejected & bit(*device) != 0) {
            self.ejection.ejected(device);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Seen {
        high: Mutex<bool>,
        ejected: Mutex<Vec<u8>>,
    }

    impl IrqLine for Seen {
        fn set(&self, level: bool) {
            let before = std::mem::replace(&mut *self.high.lock().unwrap(), level);
            assert_ne!(before, level, "told twice");
        }
    }

    impl Ejection for Seen {
        fn ejected(&self, device: u8) {
            self.ejected.lock().unwrap().push(device);
        }
    }

    fn registers() -> (HotplugRegisters, Arc<Seen>) {
        let seen = Arc::new(Seen::default());
        (HotplugRegisters::new(seen.clone(), seen.clone()), seen)
    }

    fn read(registers: &HotplugRegisters, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(registers: &HotplugRegisters, devices: u32) {
        registers.write(EJECT, &devices.to_le_bytes());
    }

    #[test]
    fn a_device_that_comes_is_told_once_and_the_line_waits_for_the_guest() {
        let (registers, seen) = registers();
        registers.occupy(3, true);
        registers.occupy(31, true);
        assert!(*seen.high.lock().unwrap());
        assert_eq!(read(&registers, INSERTED), 1 << 3 | 1 << 31);
        assert!(!*seen.high.lock().unwrap());
        assert_eq!(read(&registers, INSERTED), 0);
        assert_eq!(read(&registers, EJECT), 1 << 3 | 1 << 31);
    }

    #[test]
    fn a_device_that_was_there_at_the_start_is_not_told() {
        let (registers, seen) = registers();
        registers.occupy(3, false);
        assert!(!*seen.high.lock().unwrap());
        assert_eq!(read(&registers, INSERTED), 0);
        assert!(registers.is_occupied(3));
        eject(&registers, 1 << 3);
        assert_eq!(*seen.ejected.lock().unwrap(), [3]);
        assert!(!registers.is_occupied(3));
    }

    #[test]
    fn a_guest_is_asked_as_often_as_the_caller_asks_and_ejects_once() {
        let (registers, seen) = registers();
        registers.occupy(5, false);
        for _ in 0..2 {
            registers.ask(5);
            assert_eq!(read(&registers, LEAVING), 1 << 5);
        }
        registers.ask(5);
        eject(&registers, 1 << 5 | 1 << 6);
        assert_eq!(read(&registers, LEAVING), 0, "it is gone");
        assert!(!*seen.high.lock().unwrap());
        eject(&registers, u32::MAX);
        assert_eq!(*seen.ejected.lock().unwrap(), [5]);
    }

    #[test]
    fn what_was_asked_can_be_taken_back() {
        let (registers, seen) = registers();
        registers.occupy(5, false);
        registers.ask(5);
        registers.withdraw(5);
        assert!(!*seen.high.lock().unwrap());
        assert_eq!(read(&registers, LEAVING), 0);
        assert_eq!(read(&registers, EJECT), 1 << 5);
    }

    #[test]
    fn a_device_that_vanishes_is_told_and_cannot_be_ejected() {
        let (registers, seen) = registers();
        registers.occupy(5, true);
        assert!(registers.vacate(5, true));
        assert!(!registers.vacate(5, true));
        assert_eq!(read(&registers, INSERTED), 0);
        assert_eq!(read(&registers, VANISHED), 1 << 5);
        eject(&registers, 1 << 5);
        assert!(seen.ejected.lock().unwrap().is_empty());
        // An insertion that failed was never seen.
        registers.occupy(6, true);
        registers.vacate(6, false);
        assert!(!*seen.high.lock().unwrap());
    }

    #[test]
    fn where_there_is_no_device_nothing_is_asked_or_ejected() {
        let (registers, seen) = registers();
        registers.ask(7);
        registers.ask(200);
        registers.occupy(200, true);
        eject(&registers, u32::MAX);
        assert!(!*seen.high.lock().unwrap());
        assert!(seen.ejected.lock().unwrap().is_empty());
    }

    #[test]
    fn only_aligned_accesses_of_four_bytes_mean_anything() {
        let (registers, seen) = registers();
        registers.occupy(0, true);
        for length in [1, 2, 8] {
            let mut data = vec![0; length];
            registers.read(INSERTED, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff));
            registers.write(EJECT, &vec![0xff; length]);
        }
        registers.write(EJECT - 1, &[0xff; 4]);
        assert_eq!(read(&registers, 2), u32::MAX);
        assert!(seen.ejected.lock().unwrap().is_empty());
        assert_eq!(read(&registers, INSERTED), 1);
    }

    proptest! {
        #[test]
        fn the_line_is_high_exactly_while_something_is_untold(
            steps in prop::collection::vec((0..8u8, 0..4u8, any::<u32>()), 0..80)
        ) {
            let (registers, seen) = registers();
            let mut there = 0u32;
            let mut ejections = 0;
            for (what, device, value) in steps {
                match what {
                    0 => { registers.occupy(device, value & 1 != 0); there |= bit(device); }
                    1 => registers.ask(device),
                    2 => registers.withdraw(device),
                    3 => {
                        let was = registers.vacate(device, value & 1 != 0);
                        prop_assert_eq!(was, there & bit(device) != 0);
                        there &= !bit(device);
                    }
                    4 => {
                        ejections += (there & value).count_ones() as usize;
                        eject(&registers, value);
                        there &= !value;
                    }
                    _ => { read(&registers, u64::from(what - 5) * 4); }
                }
                let state = *registers.state();
                prop_assert_eq!(*seen.high.lock().unwrap(), state.pending());
                prop_assert_eq!(state.occupied, there);
                prop_assert_eq!(state.leaving & !there, 0);
                prop_assert_eq!(state.inserted & !there, 0);
                prop_assert_eq!(seen.ejected.lock().unwrap().len(), ejections);
            }
        }
    }
}
