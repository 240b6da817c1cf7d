//! What a PCI function is to the root complex.

#![forbid(unsafe_code)]

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::counters::Counters;

/// Which bus a range is decoded on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Space {
    /// Memory.
    Mmio,
    /// Port I/O.
    Pio,
}

/// A base address register's range that a function answers now: decoding is on and the register
/// holds this address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Decoded {
    /// The bus.
    pub space: Space,
    /// First address, in bytes.
    pub base: u64,
    /// Bytes, a power of two.
    pub length: u64,
    /// The base address register, 0 to 5 (the lower one of a 64-bit pair); 6 is the expansion ROM.
    pub bar: u8,
}

/// What a configuration write asks of the root complex. Returned instead of calling back, so
/// that no lock of the function is held while the buses change.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[must_use]
pub struct Effect {
    /// [`PciFunction::decoded`] may have changed.
    pub decode: bool,
}

/// A doorbell that the host's kernel can ring without an exit to user space: a write of `length`
/// bytes at `offset` into BAR `bar` signals `eventfd`.
#[derive(Clone, Debug)]
pub struct IoEvent {
    /// The base address register.
    pub bar: u8,
    /// Bytes into it.
    pub offset: u64,
    /// Bytes of the write: 1, 2, 4 or 8; 0 for any length.
    pub length: u8,
    /// Signalled by each such write, whatever is written.
    pub eventfd: Arc<EventFd>,
}

/// One PCI function. Called on vCPU threads, several at a time: a function does its own locking,
/// and calls neither the root complex nor a bus.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. `offset` is below 4096, and `data` (1, 2 or 4 bytes) does not
    /// cross a multiple of 4. All of `data` is written; what does not exist reads as zero.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space; offset and length as in [`config_read`](Self::config_read).
    fn config_write(&self, offset: u16, data: &[u8]) -> Effect;

    /// The ranges that the function answers now, no more than one per base address register and
    /// one of its expansion ROM.
    fn decoded(&self) -> Vec<Decoded>;

    /// What each implemented base address register is, for address assignment: register number,
    /// kind, length in bytes and the address it holds (0: none yet). An expansion ROM is the guest's
    /// to place.
    fn bars(&self) -> Vec<(super::Bar, u64)>;

    /// Puts a base address register at `address`, as firmware does before the guest runs. It is
    /// answered there once the guest enables decoding.
    fn assign_bar(&self, bar: u8, address: u64);

    /// Reads `data` (1, 2, 4 or 8 bytes) at `offset` into BAR `bar`; all of it is written.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes `data` (1, 2, 4 or 8 bytes) at `offset` into BAR `bar`.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effect;

    /// The doorbells that may bypass [`bar_write`](Self::bar_write). Fixed for the life of the
    /// function; the root complex registers them wherever their BAR is.
    fn io_events(&self) -> Vec<IoEvent> {
        Vec::new()
    }

    /// What it counts.
    fn counters(&self) -> Vec<Arc<dyn Counters>> {
        Vec::new()
    }

    /// BAR `decoded.bar` is now answered at `decoded.base`. For functions that map memory of
    /// their own into the guest; the buses and [`io_events`](Self::io_events) are served already.
    fn bar_mapped(&self, decoded: Decoded) {
        let _ = decoded;
    }

    /// BAR `decoded.bar` is no longer answered at `decoded.base`.
    fn bar_unmapped(&self, decoded: Decoded) {
        let _ = decoded;
    }

    /// Back to the state after power-on: decoding off, interrupts disabled, all work of the
    /// device stopped when this returns. Base address registers become 0.
    fn reset(&self) -> Effect;
}
