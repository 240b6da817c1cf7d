//! Interrupt Remapping Table Entry and remappable interrupt requests (9.9, 5.1.2).

use bitfield_struct::bitfield;

/// Size of an entry, in bytes.
pub const IRTE_SIZE: u64 = 16;

/// Interrupt Remapping Table Entry for remapped interrupts, bits 63:0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct IrteLow {
    /// Present.
    pub p: bool,
    /// Fault Processing Disable.
    pub fpd: bool,
    /// Destination Mode: logical.
    pub dm: bool,
    /// Redirection Hint: lowest priority among the destinations.
    pub rh: bool,
    /// Trigger Mode: level.
    pub tm: bool,
    /// Delivery Mode.
    #[bits(3)]
    pub dlm: u8,
    /// Available to software.
    #[bits(4)]
    pub avail: u8,
    #[bits(3)]
    __: u8,
    /// IRTE Mode: posted (CAP.PI).
    pub im: bool,
    /// Vector.
    #[bits(8)]
    pub v: u8,
    #[bits(8)]
    __: u8,
    /// Destination ID: all 32 bits with EIME, else bits 15:8.
    #[bits(32)]
    pub dst: u32,
}

impl IrteLow {
    /// Must be 0.
    pub const RESERVED: u64 = 0xff00_7000;
}

/// Interrupt Remapping Table Entry, bits 127:64.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct IrteHigh {
    /// Source Identifier.
    #[bits(16)]
    pub sid: u16,
    /// Source-id Qualifier: how many function bits are ignored.
    #[bits(2)]
    pub sq: u8,
    /// Source Validation Type: 0 none, 1 SID with SQ, 2 bus range.
    #[bits(2)]
    pub svt: u8,
    #[bits(44)]
    __: u64,
}

impl IrteHigh {
    /// Must be 0.
    pub const RESERVED: u64 = u64::MAX << 20;
}

/// Address of a remappable MSI (5.1.2.2).
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct RemappableAddress {
    #[bits(2)]
    __: u8,
    /// Interrupt index, bit 15.
    pub handle_15: bool,
    /// Sub-Handle Valid: the data is added to the handle.
    pub shv: bool,
    /// Interrupt Format: remappable.
    pub remappable: bool,
    /// Interrupt index, bits 14:0.
    #[bits(15)]
    pub handle: u16,
    /// 0xfee.
    #[bits(12)]
    pub doorbell: u16,
}

impl RemappableAddress {
    /// The whole 16-bit handle.
    pub const fn index(self) -> u16 {
        self.handle() | (self.handle_15() as u16) << 15
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remappable_address_has_the_handle_in_two_pieces() {
        let address =
            RemappableAddress::from_bits(0xfee0_0000 | (0x1234 << 5) | (1 << 4) | (1 << 2));
        assert!(address.remappable() && !address.shv());
        assert_eq!(address.index(), 0x9234);
        assert_eq!(address.doorbell(), 0xfee);
    }
}
