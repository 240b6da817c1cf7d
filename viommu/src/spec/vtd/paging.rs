//! Paging-structure entries: first-stage (VT-d 9.8, "First-Stage Paging Entries", the format of
//! x86-64) and second-stage (VT-d 9.7, "Second-Stage Paging Entries").
//!
//! One type per stage. The levels differ only in what bit 7 means and in which address bits a
//! large page leaves reserved, so these are asked for with a level: 1 is the table of 4 KiB
//! pages (FS-PTE, SS-PTE), 2 FS-PDE, 3 FS-PDPE, 4 FS-PML4E, 5 FS-PML5E.

use bitfield_struct::bitfield;

use crate::Gpa;

/// Bits of an address inside a 4 KiB page.
pub const PAGE_SHIFT: u32 = 12;
/// Bits of an address that one level of either format translates.
pub const LEVEL_BITS: u32 = 9;
/// The deepest table of either format.
pub const MAX_LEVELS: u8 = 5;
/// Bits 51:12, the widest address an entry can hold.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Number of low address bits that an entry of `level` (1 to 5) leaves untranslated: 12 for
/// level 1, 21 for level 2, and so on.
pub const fn level_shift(level: u8) -> u32 {
    PAGE_SHIFT + LEVEL_BITS * (level as u32 - 1)
}

/// The byte offset in its table of the entry of `level` that translates `address`.
pub const fn entry_offset(address: u64, level: u8) -> u64 {
    (address >> level_shift(level) & 0x1ff) * 8
}

/// Address bits that must be zero in any entry: those between `haw` (the host address width in
/// bits, at most 52) and bit 51.
const fn beyond(haw: u8) -> u64 {
    ADDRESS & !((1u64 << haw) - 1)
}

/// Bits below the page size that a large leaf of `level` reserves, from bit `lowest` up.
const fn large_page_low_bits(level: u8, lowest: u32) -> u64 {
    ((1u64 << level_shift(level)) - 1) & !((1u64 << lowest) - 1)
}

/// An entry of a first-stage paging structure.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct FirstStageEntry {
    /// Present.
    pub p: bool,
    /// Read/Write: writes are allowed.
    pub rw: bool,
    /// User/Supervisor: user-privileged requests are allowed.
    pub us: bool,
    /// Page-level Write-Through.
    pub pwt: bool,
    /// Page-level Cache Disable.
    pub pcd: bool,
    /// Accessed.
    pub a: bool,
    /// Dirty; only in leaves.
    pub d: bool,
    /// Page Size: the entry is a leaf, at levels 2 and 3. At level 1 this bit is PAT, above
    /// level 3 it is reserved.
    pub ps: bool,
    /// Global; ignored for DMA.
    pub g: bool,
    #[bits(1)]
    __: u8,
    /// Extended Accessed.
    pub ea: bool,
    #[bits(1)]
    __: u8,
    /// ADDR, bits 51:12: the next table or the page. In a large leaf bit 12 is PAT and the rest
    /// below the page size is reserved.
    #[bits(40)]
    pub addr: u64,
    #[bits(11)]
    __: u16,
    /// Execute Disable. Only execute requests look at it.
    pub xd: bool,
}

impl FirstStageEntry {
    /// Whether an entry of `level` maps a page (of any size) and not a further table.
    pub const fn is_leaf(self, level: u8) -> bool {
        level == 1 || self.ps()
    }

    /// The next table.
    pub const fn table(self) -> Gpa {
        Gpa(self.into_bits() & ADDRESS)
    }

    /// The page that a leaf of `level` maps.
    pub const fn page(self, level: u8) -> Gpa {
        Gpa(self.into_bits() & ADDRESS & !((1 << level_shift(level)) - 1))
    }

    /// Whether a reserved bit is set in a present entry of `level`, with addresses of `haw` bits.
    pub const fn has_reserved(self, level: u8, haw: u8) -> bool {
        let layout = match level {
            1 => 0,
            2 | 3 if self.ps() => large_page_low_bits(level, 13),
            2 | 3 => 0,
            _ => 1 << 7,
        };
        self.into_bits() & (layout | beyond(haw)) != 0
    }

    /// The bits that are reserved in every present entry of level 1, with addresses of `haw` bits.
    pub const fn reserved_in_leaf(haw: u8) -> u64 {
        beyond(haw)
    }
}

/// An entry of a second-stage paging structure.
///
/// SNP and TM have no effect on a software walk (which is always coherent and has no device TLB),
/// so they are accepted in leaves whether or not the unit offers them.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SecondStageEntry {
    /// Read.
    pub r: bool,
    /// Write.
    pub w: bool,
    /// Execute; ignored, as second-stage execute control is not offered.
    pub x: bool,
    /// Extended Memory Type; ignored outside leaves.
    #[bits(3)]
    pub emt: u8,
    /// Ignore PAT.
    pub ipat: bool,
    /// Page Size: the entry is a leaf, at levels 2 and 3. Ignored at level 1, reserved above
    /// level 3.
    pub ps: bool,
    /// Accessed, when second-stage accessed/dirty flags are enabled.
    pub a: bool,
    /// Dirty, likewise; only in leaves.
    pub d: bool,
    #[bits(1)]
    __: u8,
    /// Snoop; reserved outside leaves.
    pub snp: bool,
    /// ADDR, bits 51:12: the next table or the page.
    #[bits(40)]
    pub addr: u64,
    #[bits(10)]
    __: u16,
    /// Transient Mapping; reserved outside leaves.
    pub tm: bool,
    #[bits(1)]
    __: u8,
}

impl SecondStageEntry {
    /// Present: reads or writes are allowed.
    pub const fn is_present(self) -> bool {
        self.r() || self.w()
    }

    /// Whether an entry of `level` maps a page (of any size) and not a further table.
    pub const fn is_leaf(self, level: u8) -> bool {
        level == 1 || self.ps()
    }

    /// The next table.
    pub const fn table(self) -> Gpa {
        Gpa(self.into_bits() & ADDRESS)
    }

    /// The page that a leaf of `level` maps.
    pub const fn page(self, level: u8) -> Gpa {
        Gpa(self.into_bits() & ADDRESS & !((1 << level_shift(level)) - 1))
    }

    /// Whether a reserved bit is set in a present entry of `level`, with addresses of `haw` bits.
    pub const fn has_reserved(self, level: u8, haw: u8) -> bool {
        const TABLE: u64 = 1 << 11 | 1 << 62;
        let layout = match level {
            1 => 0,
            2 | 3 if self.ps() => large_page_low_bits(level, PAGE_SHIFT),
            2 | 3 => TABLE,
            _ => TABLE | 1 << 7,
        };
        self.into_bits() & (layout | beyond(haw)) != 0
    }

    /// The bits that are reserved in every present entry of level 1, with addresses of `haw` bits.
    pub const fn reserved_in_leaf(haw: u8) -> u64 {
        beyond(haw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_stage_bits_are_where_the_specification_has_them() {
        let entry = FirstStageEntry::new()
            .with_p(true)
            .with_rw(true)
            .with_us(true)
            .with_a(true)
            .with_d(true)
            .with_ps(true)
            .with_ea(true)
            .with_xd(true)
            .with_addr(0xff_ffff_ffff);
        assert_eq!(entry.into_bits(), 0x800f_ffff_ffff_f4e7);
    }

    #[test]
    fn second_stage_bits_are_where_the_specification_has_them() {
        let entry = SecondStageEntry::new()
            .with_r(true)
            .with_w(true)
            .with_x(true)
            .with_emt(7)
            .with_ipat(true)
            .with_ps(true)
            .with_a(true)
            .with_d(true)
            .with_snp(true)
            .with_tm(true)
            .with_addr(0xff_ffff_ffff);
        assert_eq!(entry.into_bits(), 0x400f_ffff_ffff_fbff);
    }

    #[test]
    fn each_level_translates_nine_bits() {
        let address = 0x01ff_8080_4020_1fff | 0x1ff << 48;
        assert_eq!([1, 2, 3, 4, 5].map(level_shift), [12, 21, 30, 39, 48]);
        assert_eq!(entry_offset(address, 1), 8);
        assert_eq!(entry_offset(address, 5), 0x1ff * 8);
        for level in 1..=5 {
            assert_eq!(entry_offset(1 << level_shift(level), level), 8);
        }
    }

    /// The reserved bits of both formats, bit by bit, against the tables of VT-d 9.7 and 9.8.
    #[test]
    fn reserved_bits_are_those_of_the_specification() {
        let haw = 46;
        for bit in 0..64u32 {
            let value = 1u64 << bit;
            let above = (46..52).contains(&bit);
            for level in 1..=5u8 {
                let first = FirstStageEntry::from_bits(value).has_reserved(level, haw);
                assert_eq!(first, above || level > 3 && bit == 7, "FS {level} {bit}");
                let second = SecondStageEntry::from_bits(value).has_reserved(level, haw);
                let table = level > 1 && (bit == 11 || bit == 62);
                let ps = level > 3 && bit == 7;
                let not_leaf = level == 1 || !SecondStageEntry::from_bits(value).ps();
                assert_eq!(second, above || table && not_leaf || ps, "SS {level} {bit}");
            }
            for (level, top) in [(2, 21), (3, 30)] {
                let leaf = value | 1 << 7;
                let first = FirstStageEntry::from_bits(leaf).has_reserved(level, haw);
                assert_eq!(
                    first,
                    above || (13..top).contains(&bit),
                    "FS leaf {level} {bit}"
                );
                let second = SecondStageEntry::from_bits(leaf).has_reserved(level, haw);
                assert_eq!(
                    second,
                    above || (12..top).contains(&bit),
                    "SS leaf {level} {bit}"
                );
            }
        }
    }

    #[test]
    fn a_large_leaf_drops_pat_and_low_bits_from_its_address() {
        let bits = 0x0000_1234_5678_9fff;
        assert_eq!(
            FirstStageEntry::from_bits(bits).page(2),
            Gpa(0x1234_5660_0000)
        );
        assert_eq!(
            SecondStageEntry::from_bits(bits).page(3),
            Gpa(0x1234_4000_0000)
        );
        assert_eq!(
            FirstStageEntry::from_bits(bits).table(),
            Gpa(0x1234_5678_9000)
        );
    }
}
