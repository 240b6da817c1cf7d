//! Base address registers (PCIe 6.0, 7.5.1.2.1).
//!
//! A register is nothing but a mask: bits below its length read as the kind and cannot be
//! written. The sizing protocol (write all ones, read back) follows from that.

#![forbid(unsafe_code)]

use super::function::Space;

/// What a base address register decodes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BarKind {
    /// 32 bits of memory address.
    Memory32,
    /// 64 bits of memory address; takes the next register too.
    Memory64,
    /// Port I/O.
    Io,
}

/// One base address register of a function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Bar {
    /// Register number, 0 to 5 (0 to 4 for [`BarKind::Memory64`]).
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Reads have no side effects, so that a bridge may place it in a prefetchable window.
    pub prefetchable: bool,
    /// Bytes, a power of two: at least 16 for memory, 4 to 256 for port I/O.
    pub length: u64,
}

impl Bar {
    /// A 64-bit memory register that is not prefetchable: what most functions need.
    pub const fn memory64(index: u8, length: u64) -> Self {
        Self {
            index,
            kind: BarKind::Memory64,
            prefetchable: false,
            length,
        }
    }

    /// Whether index and length are what the specification allows.
    pub const fn is_valid(&self) -> bool {
        let power = self.length.is_power_of_two();
        match self.kind {
            BarKind::Memory32 => {
                self.index < 6 && power && self.length >= 16 && self.length <= 1 << 31
            }
            BarKind::Memory64 => {
                self.index < 5 && power && self.length >= 16 && self.length <= 1 << 62
            }
            BarKind::Io => {
                self.index < 6
                    && power
                    && self.length >= 4
                    && self.length <= 256
                    && !self.prefetchable
            }
        }
    }

    /// How many of the six registers it takes.
    pub const fn registers(&self) -> u8 {
        match self.kind {
            BarKind::Memory64 => 2,
            BarKind::Memory32 | BarKind::Io => 1,
        }
    }

    /// The bus that it decodes on.
    pub const fn space(&self) -> Space {
        match self.kind {
            BarKind::Memory32 | BarKind::Memory64 => Space::Mmio,
            BarKind::Io => Space::Pio,
        }
    }

    /// Offset of the (lower) register in configuration space.
    pub(crate) const fn offset(&self) -> u16 {
        0x10 + 4 * self.index as u16
    }

    /// The read-only low bits that say the kind.
    pub(crate) const fn flags(&self) -> u64 {
        let kind = match self.kind {
            BarKind::Memory32 => 0b000,
            BarKind::Memory64 => 0b100,
            BarKind::Io => 0b01,
        };
        kind | if self.prefetchable { 0b1000 } else { 0 }
    }

    /// The bits that the guest can write: the address. Port addresses have 16 bits.
    pub(crate) const fn mask(&self) -> u64 {
        let width = match self.kind {
            BarKind::Memory32 => u32::MAX as u64,
            BarKind::Memory64 => u64::MAX,
            BarKind::Io => u16::MAX as u64,
        };
        !(self.length - 1) & width
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_takes_lengths_that_the_specification_allows() {
        assert!(Bar::memory64(0, 0x4000).is_valid());
        assert!(!Bar::memory64(5, 0x4000).is_valid(), "needs two registers");
        assert!(!Bar::memory64(0, 0x3000).is_valid(), "not a power of two");
        assert!(
            !Bar::memory64(0, 8).is_valid(),
            "smaller than its own flags"
        );
        let port = Bar {
            index: 5,
            kind: BarKind::Io,
            prefetchable: false,
            length: 0x20,
        };
        assert!(port.is_valid());
        assert!(
            !Bar {
                length: 512,
                ..port
            }
            .is_valid()
        );
    }
}
