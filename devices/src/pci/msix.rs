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
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = at.saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let index = usize::try_from(first.saturating_add(bit)).unwrap_or(usize::MAX);
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
        } else if masked || self.control & CONTROL_FUNCTION_MASK != 0 {
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
        let gate = self.gate(index);
        self.vectors
            .get_mut(index)
            .is_some_and(|vector| vector.is_pending(gate))
    }
}
