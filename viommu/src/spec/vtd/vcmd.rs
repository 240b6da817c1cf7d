//! The virtual command registers: how a guest asks its host for PASIDs (VT-d, "Virtual Command
//! Capability", "Virtual Command" and "Virtual Command Response" registers).
//!
//! They exist when `ECAP.VCS` (bit 44) is set. Linux uses them up to 6.3, with CM and scalable
//! mode, and not at all since.

use bitfield_struct::bitfield;

/// Offset of [`Vcmd`] in the unit's registers, in bytes.
pub const VCMD: u64 = 0xe00;
/// Offset of [`Vcrsp`] in the unit's registers, in bytes.
pub const VCRSP: u64 = 0xe10;
/// Offset of [`Vccap`] in the unit's registers, in bytes.
pub const VCCAP: u64 = 0xe30;

/// `ECAP.VCS`: the virtual command registers exist.
pub const ECAP_VCS: u64 = 1 << 44;

/// Virtual Command Capability Register.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Vccap {
    /// Null Command Support: [`NULL`] is there. Linux up to 6.3 reads this bit as PAS.
    pub ns: bool,
    /// PASID Allocation Support: [`ALLOCATE_PASID`] is there.
    pub pas: bool,
    /// Free PASID Support: [`FREE_PASID`] is there.
    pub fps: bool,
    #[bits(61)]
    __: u64,
}

/// Virtual Command Register. Writing it submits a command.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Vcmd {
    /// Which command.
    pub command: u8,
    __: u8,
    /// The PASID of [`FREE_PASID`].
    #[bits(20)]
    pub pasid: u32,
    #[bits(28)]
    __: u32,
}

/// Virtual Command Response Register. Read-only.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Vcrsp {
    /// In Progress: the last command is not done; nothing else here means anything yet.
    pub ip: bool,
    /// Status Code of the last command.
    #[bits(7)]
    pub sc: u8,
    __: u8,
    /// What [`ALLOCATE_PASID`] allocated.
    #[bits(20)]
    pub pasid: u32,
    #[bits(28)]
    __: u32,
}

/// Does nothing, successfully.
pub const NULL: u8 = 0;
/// Allocates a PASID.
pub const ALLOCATE_PASID: u8 = 1;
/// Frees a PASID.
pub const FREE_PASID: u8 = 2;

/// The command was done.
pub const SC_SUCCESS: u8 = 0;
/// There is no such command here.
pub const SC_UNDEFINED: u8 = 1;
/// [`ALLOCATE_PASID`]: no PASID is available.
pub const SC_NO_PASID: u8 = 16;
/// [`FREE_PASID`]: the PASID is not one that was allocated here.
pub const SC_INVALID_PASID: u8 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_where_linux_6_1_has_them() {
        assert_eq!(Vccap::new().with_ns(true).into_bits(), 1);
        let free = Vcmd::new()
            .with_command(FREE_PASID)
            .with_pasid(0xf_ffff)
            .into_bits();
        assert_eq!(free, 0xf_ffff << 16 | 2);
        let response = Vcrsp::new()
            .with_ip(true)
            .with_sc(SC_NO_PASID)
            .with_pasid(0x8_0001)
            .into_bits();
        assert_eq!(response & 1, 1);
        assert_eq!((response & 0xff) >> 1, 16);
        assert_eq!(response >> 16, 0x8_0001);
    }
}
