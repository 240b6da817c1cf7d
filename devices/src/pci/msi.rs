//! MSI (PCIe 6.0, 6.1.4 and 7.7.1) with 64-bit addresses and per-vector masking.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::interrupt::Msi;

use super::config::{ConfigError, ConfigSpace};
use super::vector::{Delivery, Gate, Vector};
use crate::interrupt::{MsiSource, MsiVector};

const CAPABILITY: u8 = 0x05;
/// Message Control: MSI Enable, Multiple Message Enable, 64-bit Address, Per-Vector Masking.
const CONTROL_ENABLE: u16 = 1 << 0;
const CONTROL_MULTIPLE: u16 = 0b111 << 4;
const CONTROL_64_BIT: u16 = 1 << 7;
const CONTROL_MASKING: u16 = 1 << 8;

/// Bytes of the capability, and of its registers from its start.
const LENGTH: u16 = 24;
const CONTROL: u16 = 2;
const ADDRESS: u16 = 4;
const DATA: u16 = 12;
const MASK: u16 = 16;
const PENDING: u16 = 20;

/// The MSI state of one function. The registers are in its configuration space: the function
/// calls [`written`](Self::written) after a guest wrote there, and [`refresh`](Self::refresh)
/// before a guest reads.
pub struct MsiCapability {
    offset: u16,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    control: u16,
    message: Msi,
    mask: u32,
    vectors: Vec<Vector>,
}

impl MsiCapability {
    /// Appends the capability to `config`, with `count` vectors: a power of two, 1 to 32.
    ///
    /// # Errors
    /// The host has no more routes or file descriptors, or configuration space has no room.
    pub fn new(
        config: &mut ConfigSpace,
        count: u16,
        delivery: Delivery,
        source: &dyn MsiSource,
    ) -> io::Result<Self> {
        let count = count.clamp(1, 32).next_power_of_two();
        let control = CONTROL_64_BIT | CONTROL_MASKING | (count.ilog2() as u16) << 1;
        let mut body = [0; LENGTH as usize - 2];
        body[..2].copy_from_slice(&control.to_le_bytes());
        let mut writable = [0; LENGTH as usize - 2];
        writable[..2].copy_from_slice(&(CONTROL_ENABLE | CONTROL_MULTIPLE).to_le_bytes());
        writable[2..10].copy_from_slice(&(!3u64).to_le_bytes());
        writable[10..12].fill(0xff);
        let vectors_mask = u32::MAX >> (32 - count);
        writable[14..18].copy_from_slice(&vectors_mask.to_le_bytes());
        let offset = config
            .add_capability(CAPABILITY, &body, &writable)
            .map_err(|error: ConfigError| io::Error::other(error))?;
        Ok(Self {
            offset,
            state: Mutex::new(State {
                vectors: Vector::many(count, delivery, source)?,
                ..State::default()
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the guest wrote to `config`. What becomes unmasked delivers what is
    /// pending.
    pub fn written(&self, config: &ConfigSpace) {
        let mut state = self.state();
        let at = |register| config.dword(self.offset + register);
        state.control = config.word(self.offset + CONTROL);
        state.message = Msi {
            address: u64::from(at(ADDRESS + 4)) << 32 | u64::from(at(ADDRESS)),
            data: u32::from(config.word(self.offset + DATA)),
        };
        state.mask = at(MASK);
        for index in 0..state.vectors.len() {
            let (gate, message) = (state.gate(index), state.message(index));
            state.vectors[index].update(gate, message);
        }
    }

    /// Brings the pending bits in `config` up to date.
    pub fn refresh(&self, config: &mut ConfigSpace) {
        let mut state = self.state();
        let pending = (0..state.vectors.len()).fold(0u32, |bits, index| {
            let gate = state.gate(index);
            bits | u32::from(state.vectors[index].is_pending(gate)) << index
        });
        config.set(self.offset + PENDING, &pending.to_le_bytes());
    }

    /// The device interrupts on `vector`; those beyond what the guest enabled are sent as the
    /// highest that it did (the device must fit, 7.7.1.2).
    pub fn signal(&self, vector: u16) {
        let mut state = self.state();
        let index = usize::from(vector.min(state.enabled() - 1));
        let gate = state.gate(index);
        if let Some(vector) = state.vectors.get_mut(index) {
            vector.signal(gate);
        }
    }

    /// The vector itself, for a device whose interrupts the host's kernel signals.
    pub fn vector(&self, index: u16) -> Option<Arc<dyn MsiVector>> {
        let state = self.state();
        let vector = state.vectors.get(usize::from(index))?;
        Some(Arc::clone(vector.handle()))
    }
}

impl State {
    /// How many vectors the guest enabled.
    fn enabled(&self) -> u16 {
        let wanted = 1u16 << ((self.control & CONTROL_MULTIPLE) >> 4);
        wanted.min(self.vectors.len() as u16).max(1)
    }

    fn gate(&self, index: usize) -> Gate {
        if self.control & CONTROL_ENABLE == 0 || index >= usize::from(self.enabled()) {
            Gate::Disabled
        } else if self.mask >> index & 1 != 0 {
            Gate::Masked
        } else {
            Gate::Open
        }
    }

    /// The vector's number replaces the low bits of the data that belong to the vectors.
    fn message(&self, index: usize) -> Msi {
        let low = u32::from(self.enabled()) - 1;
        Msi {
            data: self.message.data & !low | index as u32 & low,
            ..self.message
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fake::FakeMsi;
    use crate::pci::config::Identity;

    struct Function {
        config: ConfigSpace,
        msi: FakeMsi,
        capability: MsiCapability,
    }

    fn function(count: u16) -> Function {
        let msi = FakeMsi::default();
        let mut config = ConfigSpace::new(Identity::default());
        let capability = MsiCapability::new(&mut config, count, Delivery::Emulated, &msi).unwrap();
        Function {
            config,
            msi,
            capability,
        }
    }

    impl Function {
        fn write(&mut self, register: u16, value: u32) {
            let at = self.capability.offset + register;
            let _ = self.config.write(at, &value.to_le_bytes());
            self.capability.written(&self.config);
        }

        fn control(&mut self, control: u16) {
            let at = self.capability.offset + CONTROL;
            let _ = self.config.write(at, &control.to_le_bytes());
            self.capability.written(&self.config);
        }

        fn pending(&mut self) -> u32 {
            self.capability.refresh(&mut self.config);
            self.config.dword(self.capability.offset + PENDING)
        }
    }

    #[test]
    fn each_vector_sends_the_data_with_its_number_in_the_low_bits() {
        let mut function = function(4);
        function.write(ADDRESS, 0xfee0_2003);
        function.write(DATA, 0x47);
        function.control(CONTROL_ENABLE | 2 << 4);
        for vector in 0..4 {
            function.capability.signal(vector);
            let fake = function.msi.get(vector.into());
            assert_eq!(fake.signals(), 1);
            let msi = fake.route().unwrap();
            assert_eq!(
                (msi.address, msi.data),
                (0xfee0_2000, 0x44 + u32::from(vector))
            );
        }
    }

    #[test]
    fn vectors_beyond_those_enabled_are_sent_as_the_highest_enabled() {
        let mut function = function(4);
        function.control(CONTROL_ENABLE | 1 << 4);
        function.capability.signal(3);
        assert_eq!(function.msi.get(1).signals(), 1);
        assert_eq!(function.msi.get(3).signals(), 0);
        function.control(CONTROL_ENABLE | 7 << 4);
        function.capability.signal(200);
        assert_eq!(function.msi.get(3).signals(), 1, "no more than there are");
    }

    #[test]
    fn a_masked_vector_is_pending_until_it_is_unmasked() {
        let mut function = function(2);
        function.control(CONTROL_ENABLE | 1 << 4);
        function.write(MASK, u32::MAX);
        assert_eq!(function.config.dword(function.capability.offset + MASK), 3);
        function.capability.signal(1);
        assert_eq!(function.pending(), 2);
        function.write(PENDING, u32::MAX);
        assert_eq!(function.pending(), 2, "read-only");
        function.write(MASK, 0);
        assert_eq!(function.pending(), 0);
        assert_eq!(function.msi.get(1).signals(), 1);
    }

    #[test]
    fn nothing_is_delivered_while_it_is_disabled() {
        let mut function = function(1);
        function.capability.signal(0);
        function.control(CONTROL_ENABLE);
        assert_eq!(function.msi.get(0).signals(), 0);
        function.control(0);
        assert_eq!(function.msi.get(0).route(), None);
    }
}
