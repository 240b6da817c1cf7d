//! The memory map that firmware would report (E820, and PVH's memory map).

use super::{ACPI_AREA, HIGH_MEMORY, ROM};
use crate::memory::layout::{Layout, Range, VTD_UNITS};

/// What a range is to the guest's kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// RAM to use.
    Ram,
    /// Keep off.
    Reserved,
    /// ACPI tables, which could be reclaimed.
    Acpi,
}

impl Kind {
    /// The type's number, the same in E820 and in PVH's map.
    pub(super) fn e820(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::Acpi => 3,
        }
    }
}

/// Ranges in ascending order, none overlapping.
pub type MemoryMap = Vec<(Range, Kind)>;

/// The extended BIOS data area and the legacy video and ROM area: no RAM.
const LEGACY: Range = Range::new(0x9_fc00, ACPI_AREA.first - 1);

/// The map of `layout`. ECAM must be in it (Linux refuses to use an ECAM that is neither reserved
/// here nor by ACPI), and so are the pages of VT-d units.
pub fn memory_map(layout: &Layout) -> MemoryMap {
    let mut map = vec![
        (Range::new(0, LEGACY.first - 1), Kind::Ram),
        (LEGACY, Kind::Reserved),
        (ACPI_AREA, Kind::Acpi),
        (ROM, Kind::Reserved),
        (layout.ecam, Kind::Reserved),
        (VTD_UNITS, Kind::Reserved),
    ];
    for (n, region) in layout.ram.iter().enumerate() {
        let first = if n == 0 { HIGH_MEMORY } else { region.first };
        map.push((Range::new(first, region.last), Kind::Ram));
    }
    map.sort_by_key(|(range, _)| *range);
    map
}
