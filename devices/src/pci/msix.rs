//! MSI-X (PCIe 6.0, 6.1.4 and 7.7.2): capability, table and pending bit array.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::interrupt::Msi;

use super::config::{ConfigError, ConfigSpace};
use super::vector::{Delivery, Gate, Vector};
use crate::interrupt::{MsiSource, MsiVector};

/// The most vectors that one function can have.
pub const MAX_VECTORS: u16 = 2048;

const CAPABILITY: u8 = 0x11;
/// Message Control: MSI-X Enable and Function Mask.
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

const ENTRY: usize = 16;
/// Vector Control: Mask Bit.
const VECTOR_MASKED: u8 = 1;

/// Where table and pending bits are: a base address register and bytes into it, a multiple of 8.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The base address register.
    pub bar: u8,
    /// Bytes into it.
    pub offset: u32,
}

/// The MSI-X state of one function.
///
/// The function routes accesses of table, pending bits and Message Control here, and the device
/// calls [`signal`](Self::signal).
pub struct Msix {
    state: Mutex<State>,
}

struct State {
    control: u16,
    /// The function may write messages; while it may not, they are pending.
    bus_master: bool,
    /// The table as the guest reads it.
    table: Vec<u8>,
    vectors: Vec<Vector>,
}

impl Msix {
    /// `count` vectors (1 to [`MAX_VECTORS`]) from `source`, all masked, MSI-X disabled.
    ///
    /// # Errors
    /// The host has no more routes or file descriptors.
    pub fn new(count: u16, delivery: Delivery, source: &dyn MsiSource) -> io::Result<Self> {
        let count = count.clamp(1, MAX_VECTORS);
        Ok(Self {
            state: Mutex::new(State {
                control: 0,
                bus_master: true,
                table: State::fresh_table(count.into()),
                vectors: Vector::many(count, delivery, source)?,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.state().vectors.len() as u16
    }

    /// Bytes of the table.
    pub fn table_length(&self) -> u64 {
        ENTRY as u64 * u64::from(self.count())
    }

    /// Bytes of the pending bit array.
    pub fn pba_length(&self) -> u64 {
        8 * u64::from(self.count()).div_ceil(64)
    }

    /// Appends the capability to `config` and returns its offset; Message Control is 2 bytes
    /// after that.
    ///
    /// # Errors
    /// [`ConfigError::NoRoom`].
    pub fn add_capability(
        &self,
        config: &mut ConfigSpace,
        table: Place,
        pba: Place,
    ) -> Result<u16, ConfigError> {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.count() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table.offset & !7 | u32::from(table.bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pba.offset & !7 | u32::from(pba.bar)).to_le_bytes());
        let writable = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
        config.add_capability(CAPABILITY, &body, &writable.to_le_bytes())
    }

    /// The guest wrote Message Control, which now reads `control`.
    pub fn set_control(&self, control: u16) {
        let mut state = self.state();
        if state.control != control {
            state.control = control;
            for index in 0..state.vectors.len() {
                state.update(index);
            }
        }
    }

    /// The guest wrote Bus Master Enable (7.5.1.1.3): a message is a write of the function's own.
    /// Functions that never say so have it on.
    pub fn set_bus_master(&self, enabled: bool) {
        let mut state = self.state();
        if state.bus_master != enabled {
            state.bus_master = enabled;
            for index in 0..state.vectors.len() {
                state.update(index);
            }
        }
    }

    /// Reads the table at `offset` bytes; 0 beyond its end.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(state.table.iter().skip(start)) {
            *to = *from;
        }
    }

    /// Writes the table at `offset` bytes. What becomes unmasked delivers what is pending.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, new) in (start..state.table.len()).zip(data) {
            let writable = match at % ENTRY {
                0 => 0xfc, // Message Address bits 1:0 are 0
                1..=11 => 0xff,
                12 => VECTOR_MASKED,
                _ => 0, // the rest of Vector Control is reserved
            };
            state.table[at] = new & writable;
        }
        let touched = start / ENTRY..=start.saturating_add(data.len().max(1) - 1) / ENTRY;
        for index in touched {
            if index < state.vectors.len() {
                state.update(index);
            }
        }
    }

    /// Reads the pending bit array at `offset` bytes; 0 beyond its end. Writes have no effect.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state();
        let first = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .saturating_mul(8);
        for (byte, n) in data.iter_mut().zip(0..) {
            *byte = (0..8).fold(0, |bits, bit| {
                let index = first.saturating_add(8 * n + bit);
                bits | u8::from(state.is_pending(index)) << bit
            });
        }
    }

    /// The device interrupts on `vector`: delivered, or pending while masked, or lost while
    /// MSI-X is disabled. Vectors that do not exist are ignored. Returns whether MSI-X is enabled.
    pub fn signal(&self, vector: u16) -> bool {
        let mut state = self.state();
        let gate = state.gate(vector.into());
        if let Some(vector) = state.vectors.get_mut(usize::from(vector)) {
            vector.signal(gate);
        }
        state.control & CONTROL_ENABLE != 0
    }

    /// The vector itself, for a device whose interrupts the host's kernel signals.
    pub fn vector(&self, index: u16) -> Option<Arc<dyn MsiVector>> {
        let state = self.state();
        let vector = state.vectors.get(usize::from(index))?;
        Some(Arc::clone(vector.handle()))
    }

    /// Whether the guest enabled MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.state().control & CONTROL_ENABLE != 0
    }

    /// The state after power-on: disabled, every vector masked and nothing pending.
    pub fn reset(&self) {
        let mut state = self.state();
        state.control = 0;
        state.table = State::fresh_table(state.vectors.len());
        for index in 0..state.vectors.len() {
            state.update(index);
        }
    }
}

impl State {
    fn fresh_table(count: usize) -> Vec<u8> {
        let mut entry = [0; ENTRY];
        entry[12] = VECTOR_MASKED;
        entry.repeat(count)
    }

    fn gate(&self, index: usize) -> Gate {
        let masked = self
            .table
            .get(ENTRY * index + 12)
            .is_none_or(|control| control & VECTOR_MASKED != 0);
        if self.control & CONTROL_ENABLE == 0 {
            Gate::Disabled
        } else if masked || !self.bus_master || self.control & CONTROL_FUNCTION_MASK != 0 {
            Gate::Masked
        } else {
            Gate::Open
        }
    }

    fn message(&self, index: usize) -> Msi {
        let dword = |at: usize| {
            let bytes = self.table.get(ENTRY * index + at..).unwrap_or_default();
            bytes
                .first_chunk()
                .map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        Msi {
            address: u64::from(dword(4)) << 32 | u64::from(dword(0)),
            data: dword(8),
        }
    }

    fn update(&mut self, index: usize) {
        let (gate, message) = (self.gate(index), self.message(index));
        if let Some(vector) = self.vectors.get_mut(index) {
            vector.update(gate, message);
        }
    }

    fn is_pending(&mut self, index: usize) -> bool {
        if index >= self.vectors.len() {
            return false;
        }
        let gate = self.gate(index);
        self.vectors
            .get_mut(index)
            .is_some_and(|vector| vector.is_pending(gate))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::interrupt::fake::FakeMsi;

    const COUNT: u16 = 5;

    fn msix(delivery: Delivery) -> (FakeMsi, Msix) {
        let msi = FakeMsi::default();
        let msix = Msix::new(COUNT, delivery, &msi).unwrap();
        (msi, msix)
    }

    fn program(msix: &Msix, vector: u64, data: u32, masked: bool) {
        msix.table_write(16 * vector, &0xfee0_1000u64.to_le_bytes());
        msix.table_write(16 * vector + 8, &data.to_le_bytes());
        msix.table_write(16 * vector + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.pba_read(0, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn without_bus_mastering_messages_are_pending() {
        let (msi, msix) = msix(Delivery::Emulated);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 2, 7, false);
        msix.set_bus_master(false);
        msix.signal(2);
        assert_eq!((msi.get(2).signals(), pending(&msix)), (0, 1 << 2));
        msix.set_bus_master(true);
        assert_eq!((msi.get(2).signals(), pending(&msix)), (1, 0));
    }

    #[test]
    fn after_power_on_every_vector_is_masked_and_nothing_is_delivered() {
        let (msi, msix) = msix(Delivery::Emulated);
        let mut control = [0; 4];
        for vector in 0..COUNT {
            msix.table_read(16 * u64::from(vector) + 12, &mut control);
            assert_eq!(control, [1, 0, 0, 0]);
            assert!(!msix.signal(vector), "MSI-X is disabled");
            assert_eq!(msi.get(vector.into()).signals(), 0);
        }
        assert_eq!(pending(&msix), 0, "lost, not pending");
    }

    #[test]
    fn an_enabled_vector_leads_where_its_entry_says() {
        let (msi, msix) = msix(Delivery::Emulated);
        program(&msix, 3, 0x4321, false);
        assert_eq!(msi.get(3).route(), None, "not before it is enabled");
        msix.set_control(CONTROL_ENABLE);
        let msi_3 = Msi {
            address: 0xfee0_1000,
            data: 0x4321,
        };
        assert_eq!(msi.get(3).route(), Some(msi_3));
        assert!(msix.signal(3));
        assert_eq!(msi.get(3).signals(), 1);
    }

    #[test]
    fn what_comes_while_masked_is_pending_and_delivered_once_at_unmask() {
        let (msi, msix) = msix(Delivery::Emulated);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 1, 0x41, true);
        msix.signal(1);
        msix.signal(1);
        assert_eq!((pending(&msix), msi.get(1).signals()), (0b10, 0));
        program(&msix, 1, 0x55, false);
        assert_eq!((pending(&msix), msi.get(1).signals()), (0, 1));
        assert_eq!(msi.get(1).route().unwrap().data, 0x55, "the new message");
    }

    #[test]
    fn the_function_mask_masks_every_vector() {
        let (msi, msix) = msix(Delivery::Emulated);
        for vector in 0..3 {
            program(&msix, vector, 0x41, false);
        }
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        for vector in 0..3 {
            msix.signal(vector);
        }
        assert_eq!(pending(&msix), 0b111);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(pending(&msix), 0);
        assert_eq!([0, 1, 2].map(|n| msi.get(n).signals()), [1, 1, 1]);
    }

    #[test]
    fn masking_and_unmasking_changes_no_route_unless_the_message_did() {
        let (msi, msix) = msix(Delivery::Emulated);
        msix.set_control(CONTROL_ENABLE);
        for _ in 0..5 {
            program(&msix, 0, 0x41, true);
            program(&msix, 0, 0x41, false);
        }
        assert_eq!(msi.get(0).take_routes().len(), 1);
    }

    #[test]
    fn a_vector_of_the_kernel_is_disconnected_while_masked_and_its_signals_wait() {
        let (msi, msix) = msix(Delivery::Kernel);
        program(&msix, 0, 0x41, false);
        msix.set_control(CONTROL_ENABLE);
        assert!(msi.get(0).route().is_some());
        program(&msix, 0, 0x41, true);
        assert_eq!(msi.get(0).route(), None);
        msi.get(0).eventfd().write(1).unwrap();
        assert_eq!(pending(&msix), 1);
        assert_eq!(pending(&msix), 1, "reading does not clear it");
        program(&msix, 0, 0x41, false);
        assert_eq!(pending(&msix), 0);
        assert!(msi.get(0).route().is_some());
        assert_eq!(msi.get(0).signals(), 1, "delivered at unmask");
    }

    #[test]
    fn disabling_disconnects_and_forgets_what_is_pending() {
        let (msi, msix) = msix(Delivery::Emulated);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 2, 0x41, false);
        program(&msix, 2, 0x41, true);
        msix.signal(2);
        msix.set_control(0);
        assert_eq!(msi.get(2).route(), None);
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 2, 0x41, false);
        assert_eq!(msi.get(2).signals(), 0);
    }

    #[test]
    fn accesses_beyond_table_and_pba_read_zero() {
        let (_, msix) = msix(Delivery::Emulated);
        let mut data = [1; 8];
        msix.table_read(16 * u64::from(COUNT), &mut data);
        assert_eq!(data, [0; 8]);
        msix.table_write(u64::MAX - 3, &[0xff; 8]);
        msix.pba_read(u64::MAX - 3, &mut data);
        assert_eq!(data, [0; 8]);
        assert!(!msix.signal(COUNT));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Control(bool, bool),
        Mask(u8, bool),
        Signal(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let vector = 0..COUNT as u8;
        prop_oneof![
            any::<(bool, bool)>().prop_map(|(on, masked)| Step::Control(on, masked)),
            (vector.clone(), any::<bool>()).prop_map(|(v, masked)| Step::Mask(v, masked)),
            vector.prop_map(Step::Signal),
        ]
    }

    proptest! {
        #[test]
        fn every_interrupt_is_delivered_pending_or_lost_as_the_masks_say(
            steps in prop::collection::vec(step(), 0..80)
        ) {
            let (msi, msix) = msix(Delivery::Emulated);
            // The model: enabled, function mask, and per vector mask, pending, delivered.
            let (mut on, mut all) = (false, false);
            let mut model = [(true, false, 0u64); COUNT as usize];
            for step in steps {
                match step {
                    Step::Control(enable, mask) => {
                        (on, all) = (enable, mask);
                        let bits = [(enable, CONTROL_ENABLE), (mask, CONTROL_FUNCTION_MASK)];
                        msix.set_control(bits.iter().map(|(set, bit)| u16::from(*set) * bit).sum());
                    }
                    Step::Mask(vector, masked) => {
                        model[usize::from(vector)].0 = masked;
                        program(&msix, vector.into(), 0x40, masked);
                    }
                    Step::Signal(vector) => {
                        let (masked, pending, delivered) = &mut model[usize::from(vector)];
                        msix.signal(vector.into());
                        *pending |= on && (all || *masked);
                        *delivered += u64::from(on && !all && !*masked);
                    }
                }
                for (masked, pending, delivered) in &mut model {
                    if !on {
                        *pending = false;
                    } else if !all && !*masked {
                        *delivered += u64::from(std::mem::take(pending));
                    }
                }
                let bits = (0..).zip(&model).map(|(n, (_, p, _))| u64::from(*p) << n);
                prop_assert_eq!(pending(&msix), bits.sum::<u64>());
            }
            for (n, (_, _, delivered)) in model.iter().enumerate() {
                prop_assert_eq!(msi.get(n).signals(), *delivered);
            }
        }

        #[test]
        fn the_table_keeps_what_is_written_except_reserved_bits(
            offset in 0..16 * u64::from(COUNT), data in prop::collection::vec(any::<u8>(), 1..9)
        ) {
            let (_, msix) = msix(Delivery::Emulated);
            msix.table_write(offset, &data);
            let mut read = vec![0; data.len()];
            msix.table_read(offset, &mut read);
            for (n, (wrote, read)) in data.iter().zip(&read).enumerate() {
                let at = offset as usize + n;
                let mask = match (at < ENTRY * usize::from(COUNT), at % ENTRY) {
                    (false, _) | (_, 13..) => 0,
                    (_, 0) => 0xfc,
                    (_, 12) => 1,
                    _ => 0xff,
                };
                prop_assert_eq!(*read, wrote & mask);
            }
        }
    }
}
