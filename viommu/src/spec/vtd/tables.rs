//! Root, context and PASID tables (chapter 9). `RESERVED` constants are the bits that must be 0
//! in a present entry whatever the capabilities; what a capability takes away is up to the front
//! end.

use bitfield_struct::bitfield;

use super::ABOVE_HOST_ADDRESS;

/// Root Entry, legacy mode (9.1): 16 bytes, indexed by bus.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RootEntry {
    /// Bits 63:0.
    pub lo: RootEntryLow,
    /// Bits 127:64, reserved.
    pub hi: u64,
}

/// Half of a root entry: legacy bits 63:0, or either half in scalable mode (9.1, 9.2).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct RootEntryLow {
    /// Present (scalable: Lower or Upper Present).
    pub p: bool,
    #[bits(11)]
    __: u16,
    /// Context-table Pointer, bits 63:12.
    #[bits(52)]
    pub ctp: u64,
}

impl RootEntryLow {
    /// Must be 0.
    pub const RESERVED: u64 = 0xffe | ABOVE_HOST_ADDRESS;

    /// The context table's address, in bytes.
    pub const fn context_table(self) -> u64 {
        self.ctp() << 12
    }
}

/// Size of a root entry, in bytes, in both modes.
pub const ROOT_ENTRY_SIZE: u64 = 16;
/// Size of a legacy context entry, in bytes; the table has 256, indexed by devfn.
pub const CONTEXT_ENTRY_SIZE: u64 = 16;
/// Size of a scalable-mode context entry, in bytes; each table has 128, indexed by devfn mod 128.
pub const SCALABLE_CONTEXT_ENTRY_SIZE: u64 = 32;

/// Context Entry, legacy mode, bits 63:0 (9.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ContextEntryLow {
    /// Present.
    pub p: bool,
    /// Fault Processing Disable, meaningful also when not present.
    pub fpd: bool,
    /// Translation Type: 0 untranslated only, 1 all requests, 2 pass-through.
    #[bits(2)]
    pub tt: u8,
    #[bits(8)]
    __: u8,
    /// Second Stage Page Translation Pointer, bits 63:12.
    #[bits(52)]
    pub ssptptr: u64,
}

impl ContextEntryLow {
    /// Must be 0.
    pub const RESERVED: u64 = 0xff0 | ABOVE_HOST_ADDRESS;

    /// The second-stage root's address, in bytes.
    pub const fn second_stage(self) -> u64 {
        self.ssptptr() << 12
    }
}

/// Context Entry, legacy mode, bits 127:64 (9.3).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ContextEntryHigh {
    /// Address Width: 1 is 39, 2 is 48, 3 is 57 bits.
    #[bits(3)]
    pub aw: u8,
    /// Ignored by hardware.
    #[bits(4)]
    pub ign: u8,
    #[bits(1)]
    __: u8,
    /// Domain Identifier.
    #[bits(16)]
    pub did: u16,
    #[bits(40)]
    __: u64,
}

impl ContextEntryHigh {
    /// Must be 0.
    pub const RESERVED: u64 = (1 << 7) | (u64::MAX << 24);
}

/// Context Entry, scalable mode, bits 63:0 (9.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ScalableContextLow {
    /// Present.
    pub p: bool,
    /// Fault Processing Disable, meaningful also when not present.
    pub fpd: bool,
    /// Device-TLB Enable.
    pub dte: bool,
    /// PASID Enable.
    pub paside: bool,
    /// Page Request Enable.
    pub pre: bool,
    #[bits(4)]
    __: u8,
    /// PASID Directory Size: 2^(PDTS+7) entries.
    #[bits(3)]
    pub pdts: u8,
    /// PASID Directory Pointer, bits 63:12.
    #[bits(52)]
    pub pasiddirptr: u64,
}

impl ScalableContextLow {
    /// Must be 0.
    pub const RESERVED: u64 = 0x1e0 | ABOVE_HOST_ADDRESS;

    /// The PASID directory's address, in bytes.
    pub const fn directory(self) -> u64 {
        self.pasiddirptr() << 12
    }

    /// How many PASIDs the directory can name: 2^13 to 2^20.
    pub const fn pasids(self) -> u32 {
        PASID_TABLE_ENTRIES << (self.pdts() + 7)
    }
}

/// Context Entry, scalable mode, bits 127:64 (9.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ScalableContextHigh {
    /// The PASID of requests without PASID.
    #[bits(20)]
    pub rid_pasid: u32,
    /// Requests without PASID are privileged (ECAP.RPRIVS).
    pub rid_priv: bool,
    #[bits(43)]
    __: u64,
}

impl ScalableContextHigh {
    /// Must be 0.
    pub const RESERVED: u64 = u64::MAX << 21;
}

/// Size of a PASID directory entry, in bytes.
pub const PASID_DIRECTORY_ENTRY_SIZE: u64 = 8;
/// Size of a PASID table entry, in bytes.
pub const PASID_ENTRY_SIZE: u64 = 64;
/// Entries of one PASID table.
pub const PASID_TABLE_ENTRIES: u32 = 64;

/// PASID Directory Entry (9.5).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidDirectoryEntry {
    /// Present.
    pub p: bool,
    /// Fault Processing Disable, meaningful also when not present.
    pub fpd: bool,
    #[bits(10)]
    __: u16,
    /// Scalable Mode PASID Table Pointer, bits 63:12.
    #[bits(52)]
    pub smptblptr: u64,
}

impl PasidDirectoryEntry {
    /// Must be 0.
    pub const RESERVED: u64 = 0xffc | ABOVE_HOST_ADDRESS;

    /// The PASID table's address, in bytes.
    pub const fn table(self) -> u64 {
        self.smptblptr() << 12
    }
}

/// PASID Granular Translation Type (9.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pgtt {
    /// 001b.
    FirstStage,
    /// 010b.
    SecondStage,
    /// 011b.
    Nested,
    /// 100b.
    PassThrough,
    /// Reserved, with its value.
    Reserved(u8),
}

/// PASID Table Entry, bits 63:0 (9.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidEntry0 {
    /// Present.
    pub p: bool,
    /// Fault Processing Disable, meaningful also when not present.
    pub fpd: bool,
    /// Address Width of the second stage: 1 is 39, 2 is 48, 3 is 57 bits.
    #[bits(3)]
    pub aw: u8,
    #[bits(1)]
    __: u8,
    /// PASID Granular Translation Type, see [`PasidEntry0::translation_type`].
    #[bits(3)]
    pub pgtt: u8,
    /// Second Stage Access/Dirty Enable.
    pub ssade: bool,
    #[bits(2)]
    __: u8,
    /// Second Stage Page Translation Pointer, bits 63:12.
    #[bits(52)]
    pub ssptptr: u64,
}

impl PasidEntry0 {
    /// Must be 0.
    pub const RESERVED: u64 = 0xc20 | ABOVE_HOST_ADDRESS;

    /// What PGTT means.
    pub const fn translation_type(self) -> Pgtt {
        match self.pgtt() {
            1 => Pgtt::FirstStage,
            2 => Pgtt::SecondStage,
            3 => Pgtt::Nested,
            4 => Pgtt::PassThrough,
            other => Pgtt::Reserved(other),
        }
    }

    /// The second-stage root's address, in bytes.
    pub const fn second_stage(self) -> u64 {
        self.ssptptr() << 12
    }
}

/// PASID Table Entry, bits 127:64 (9.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidEntry1 {
    /// Domain Identifier.
    #[bits(16)]
    pub did: u16,
    #[bits(7)]
    __: u8,
    /// Page-Walk Snoop.
    pub pwsnp: bool,
    /// Page Snoop (ECAP.SC).
    pub pgsnp: bool,
    /// Cache Disable (ECAP.MTS).
    pub cd: bool,
    /// Extended Memory Type Enable (ECAP.MTS).
    pub emte: bool,
    #[bits(5)]
    __: u8,
    /// Page Attribute Table (ECAP.MTS).
    #[bits(32)]
    pub pat: u32,
}

impl PasidEntry1 {
    /// Must be 0.
    pub const RESERVED: u64 = 0xf87f_0000;
    /// Must be 0 when ECAP.MTS is clear.
    pub const MEMORY_TYPE: u64 = 0xffff_ffff_0600_0000;
}

/// PASID Table Entry, bits 191:128 (9.6).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PasidEntry2 {
    /// Supervisor Request Enable (ECAP.SRS).
    pub sre: bool,
    #[bits(1)]
    __: u8,
    /// First Stage Paging Mode: 0 is 4 levels, 1 is 5 levels.
    #[bits(2)]
    pub fspm: u8,
    /// Write Protect Enable (ECAP.SRS).
    pub wpe: bool,
    /// Ignored, for older software.
    #[bits(2)]
    pub ign: u8,
    /// Extended Accessed Flag Enable (ECAP.EAFS).
    pub eafe: bool,
    #[bits(4)]
    __: u8,
    /// First Stage Page Translation Pointer, bits 63:12.
    #[bits(52)]
    pub fsptptr: u64,
}

impl PasidEntry2 {
    /// Must be 0.
    pub const RESERVED: u64 = 0xf02 | ABOVE_HOST_ADDRESS;

    /// The first-stage root's address, in bytes.
    pub const fn first_stage(self) -> u64 {
        self.fsptptr() << 12
    }
}

/// PASID Table Entry (9.6): 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PasidEntry {
    /// Bits 63:0.
    pub q0: PasidEntry0,
    /// Bits 127:64.
    pub q1: PasidEntry1,
    /// Bits 191:128.
    pub q2: PasidEntry2,
    /// Bits 511:192, reserved.
    pub rest: [u64; 5],
}

impl PasidEntry {
    /// The entry in `words`, lowest first.
    pub const fn from_words(words: [u64; 8]) -> Self {
        let [q0, q1, q2, r0, r1, r2, r3, r4] = words;
        Self {
            q0: PasidEntry0::from_bits(q0),
            q1: PasidEntry1::from_bits(q1),
            q2: PasidEntry2::from_bits(q2),
            rest: [r0, r1, r2, r3, r4],
        }
    }

    /// As it lies in memory, lowest word first.
    pub const fn into_words(self) -> [u64; 8] {
        let [r0, r1, r2, r3, r4] = self.rest;
        [
            self.q0.into_bits(),
            self.q1.into_bits(),
            self.q2.into_bits(),
            r0,
            r1,
            r2,
            r3,
            r4,
        ]
    }
}

/// The second-stage width, in bits, that an AW field names.
pub const fn address_width(aw: u8) -> Option<u8> {
    match aw {
        1 => Some(39),
        2 => Some(48),
        3 => Some(57),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_linux_writes_them() {
        let entry = PasidEntry0::from_bits(0xdead_b000 | (1 << 9) | (3 << 6) | (2 << 2) | 1);
        assert_eq!(entry.translation_type(), Pgtt::Nested);
        assert!(entry.p() && !entry.fpd() && entry.ssade());
        assert_eq!((entry.aw(), entry.second_stage()), (2, 0xdead_b000));
        assert_eq!(PasidEntry1::new().with_pwsnp(true).into_bits(), 1 << 23);
        assert_eq!(PasidEntry1::new().with_pgsnp(true).into_bits(), 1 << 24);
        assert_eq!(PasidEntry2::new().with_eafe(true).into_bits(), 1 << 7);
        assert_eq!(
            PasidEntry2::new().with_fspm(1).with_wpe(true).into_bits(),
            0x14
        );
        assert_eq!(ScalableContextLow::new().with_pdts(7).into_bits(), 7 << 9);
        assert_eq!(ScalableContextLow::new().with_pdts(7).pasids(), 1 << 20);
        assert_eq!(
            ContextEntryHigh::new().with_did(0xffff).into_bits(),
            0xff_ff00
        );
    }

    #[test]
    fn reserved_bits_and_fields_do_not_overlap_and_leave_no_gap() {
        let named = |words: [u64; 8]| words.map(|word| word != 0);
        assert_eq!(
            named(PasidEntry::from_words([0; 8]).into_words()),
            [false; 8]
        );
        // Setting every field leaves exactly the reserved bits clear.
        let all = PasidEntry0::new()
            .with_p(true)
            .with_fpd(true)
            .with_aw(7)
            .with_pgtt(7)
            .with_ssade(true)
            .with_ssptptr((1 << 52) - 1);
        assert_eq!(
            !all.into_bits(),
            PasidEntry0::RESERVED & !ABOVE_HOST_ADDRESS
        );
        let all = ScalableContextLow::new()
            .with_p(true)
            .with_fpd(true)
            .with_dte(true)
            .with_paside(true)
            .with_pre(true)
            .with_pdts(7)
            .with_pasiddirptr((1 << 52) - 1);
        assert_eq!(
            !all.into_bits(),
            ScalableContextLow::RESERVED & !ABOVE_HOST_ADDRESS
        );
    }
}
