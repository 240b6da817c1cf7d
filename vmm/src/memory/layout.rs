//! The guest's physical address map, composed around reserved ranges.
//!
//! Input: how much RAM, how wide addresses are, and the ranges that must stay free of RAM and of
//! device memory. The architectural ones ([`ARCHITECTURAL`]) are always in the list; passthrough
//! adds those of each host device. Output: RAM, the PCI apertures and ECAM, none of which touches
//! a reserved range or another.
//!
//! ```text
//! 0 ........ RAM ........ 3 GiB  ECAM, 32-bit aperture, APICs  4 GiB .. RAM ..  64-bit aperture
//! ```

#![forbid(unsafe_code)]

use std::fmt;

use viommu::reserved::{Region, Regions, X86_MSI};

use crate::config::Size;

/// A range of guest-physical addresses in bytes, both ends inclusive.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range {
    /// First address.
    pub first: u64,
    /// Last address, not below `first`.
    pub last: u64,
}

impl Range {
    /// `first` to `last`, inclusive.
    pub const fn new(first: u64, last: u64) -> Self {
        assert!(first <= last, "a range that ends before it begins");
        Self { first, last }
    }

    /// Bytes in it; a range never spans all 2^64 bytes.
    pub const fn len(self) -> u64 {
        self.last - self.first + 1
    }

    /// Never: a range has at least one byte.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// Whether the two share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether all of `other` lies in it.
    pub const fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// What is left when both ends are cut inward to multiples of `unit` (a power of two).
    fn shrink(self, unit: u64) -> Option<Self> {
        let first = self.first.checked_next_multiple_of(unit)?;
        let end = match self.last.checked_add(1) {
            Some(end) => end & !(unit - 1),
            None => return Some(Self::new(first, self.last)),
        };
        (first < end).then(|| Self::new(first, end - 1))
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What one host device keeps out of guest memory, and its name (for errors).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostReserved {
    /// What needs them, for example a host device's address.
    pub what: String,
    /// The addresses.
    pub regions: Regions,
}

/// Where the I/O APIC's registers are.
pub const IOAPIC: Range = Range::new(0xfec0_0000, 0xfec0_0fff);
/// Where the registers of VT-d units are: one page of 4 KiB each.
pub const VTD_UNITS: Range = Range::new(0xfed9_0000, 0xfed9_ffff);
/// The local APICs' page, which is also the MSI doorbell.
pub const MSI_DOORBELL: Range = Range::new(X86_MSI.first, X86_MSI.last);
/// KVM's identity page table (one page) and, after it, its real-mode TSS (three pages): needed on
/// Intel hosts without unrestricted guests.
pub const KVM_PAGES: Range = Range::new(0xfffb_c000, 0xfffb_ffff);

/// What is reserved on every machine: from the I/O APIC to the end of the first 4 GiB (I/O APIC,
/// HPET, VT-d units, local APIC and MSI doorbell, KVM's pages, the firmware's flash), and the
/// HyperTransport range, which AMD's IOMMUs do not translate.
pub const ARCHITECTURAL: &[(Range, &str)] = &[
    (Range::new(0xfec0_0000, 0xffff_ffff), "chipset registers"),
    (
        Range::new(0xfd_0000_0000, 0xff_ffff_ffff),
        "the HyperTransport range",
    ),
];

const GIB: u64 = 1 << 30;
/// RAM lies below this, and from 4 GiB on.
const LOW_RAM_END: u64 = 3 * GIB;
/// Nothing may be reserved below this: the boot protocol, the kernel's start and ACPI's tables.
pub const BOOT_AREA: Range = Range::new(0, 16 * (1 << 20) - 1);
const ECAM_SIZE: u64 = 256 << 20;
const APERTURE32_UNIT: u64 = 1 << 20;
const APERTURE32_MIN: u64 = 64 << 20;
const APERTURE64_UNIT: u64 = GIB;
/// What ends of RAM regions are multiples of: a huge page.
pub const RAM_UNIT: u64 = 2 << 20;

/// The guest's physical address map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM, ascending; the first begins at 0.
    pub ram: Vec<Range>,
    /// Where 32-bit BARs are.
    pub mmio32: Range,
    /// Where 64-bit BARs are.
    pub mmio64: Range,
    /// PCI configuration space of segment 0, buses 0 to 255.
    pub ecam: Range,
    /// Bits of a guest-physical address.
    pub address_width: u8,
}

/// One line for each part, ascending.
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<(Range, &str)> = self.ram.iter().map(|range| (*range, "RAM")).collect();
        parts.extend([
            (self.ecam, "ECAM"),
            (self.mmio32, "32-bit BARs"),
            (self.mmio64, "64-bit BARs"),
        ]);
        parts.sort();
        for (Range { first, last }, what) in parts {
            writeln!(f, "{first:#014x}-{last:#014x} {what}")?;
        }
        Ok(())
    }
}

/// Why there is no such map.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A reserved range lies where the guest must boot.
    #[error(
        "{what} reserves {range}, where the guest must boot (below {BOOT_AREA}); leave that device out"
    )]
    BootArea {
        /// Whose range.
        what: String,
        /// Which.
        range: Range,
    },
    /// There is no room for a device window below 4 GiB.
    #[error(
        "the reserved ranges leave no room for {what} between 3 GiB and 4 GiB; leave a device out that reserves there: {reserved}"
    )]
    NoWindow {
        /// For what.
        what: &'static str,
        /// All that is reserved there.
        reserved: String,
    },
    /// RAM and the 64-bit aperture do not fit in the address width.
    #[error(
        "memory size={ram} does not fit in {address_width} bits of guest-physical address beside reserved ranges; give less"
    )]
    TooWide {
        /// RAM.
        ram: Size,
        /// Bits.
        address_width: u8,
    },
}

/// A device that comes while the VM runs reserves addresses that the VM uses.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} reserves {region}, where the running VM has RAM ({ram}); start the VM with this device, or with --platform reserve=host to have every device of the host fit"
)]
pub struct Collision {
    /// What reserves.
    pub what: String,
    /// What it reserves, and of which kind.
    pub region: Region,
    /// The RAM that is in the way.
    pub ram: Range,
}

/// Composes the map of `ram` bytes (a multiple of [`RAM_UNIT`]) in `address_width` bits around
/// [`ARCHITECTURAL`] and `reserved`.
///
/// # Errors
/// See [`LayoutError`].
pub fn compose(
    ram: u64,
    address_width: u8,
    reserved: &[HostReserved],
) -> Result<Layout, LayoutError> {
    let of_hosts: Vec<(Range, &str)> = reserved
        .iter()
        .flat_map(|host| {
            let ranges = host.regions.iter().map(|r| Range::new(r.first, r.last));
            ranges.map(|range| (range, host.what.as_str()))
        })
        .collect();
    if let Some((range, what)) = of_hosts.iter().find(|(range, _)| range.overlaps(BOOT_AREA)) {
        return Err(LayoutError::BootArea {
            what: (*what).into(),
            range: *range,
        });
    }
    let mut holes: Vec<Range> = ARCHITECTURAL
        .iter()
        .chain(&of_hosts)
        .map(|(range, _)| *range)
        .collect();
    holes.sort();

    let low_devices = Range::new(LOW_RAM_END, 4 * GIB - 1);
    let (ecam, mmio32) = low_windows(low_devices, &holes).ok_or_else(|| {
        let near = of_hosts.iter().filter(|(r, _)| r.overlaps(low_devices));
        LayoutError::NoWindow {
            what: "a 256 MiB ECAM and a 64 MiB aperture",
            reserved: near
                .map(|(range, what)| format!("{what} {range}"))
                .collect::<Vec<_>>()
                .join(", "),
        }
    })?;

    let too_wide = LayoutError::TooWide {
        ram: Size(ram),
        address_width,
    };
    let top = match address_width {
        33..=63 => (1u64 << address_width) - 1,
        64.. => u64::MAX >> 1,
        // Not enough for RAM above 4 GiB or a 64-bit aperture: no x86-64 is so narrow.
        _ => return Err(too_wide),
    };
    let mut left = ram;
    let mut regions = Vec::new();
    let low = free(Range::new(0, LOW_RAM_END - 1), &holes);
    let high = free(Range::new(4 * GIB, top), &holes);
    for space in low.into_iter().chain(high) {
        if let Some(space) = space.shrink(RAM_UNIT).filter(|_| left != 0) {
            let take = left.min(space.len());
            regions.push(Range::new(space.first, space.first + take - 1));
            left -= take;
        }
    }
    let ram_end = regions.last().map_or(0, |r| r.last);
    if left != 0 || regions.is_empty() {
        return Err(too_wide);
    }
    let above = Range::new(
        (ram_end + 1).max(4 * GIB),
        top.max(4 * GIB).max(ram_end + 1),
    );
    let mmio64 = free(above, &holes)
        .into_iter()
        .filter(|r| r.last <= top)
        .filter_map(|r| r.shrink(APERTURE64_UNIT))
        .max_by_key(|r| r.len())
        .ok_or(too_wide)?;
    Ok(Layout {
        ram: regions,
        mmio32,
        mmio64,
        ecam,
        address_width,
    })
}

/// ECAM and the 32-bit aperture in `space`: the choice with the largest aperture.
fn low_windows(space: Range, holes: &[Range]) -> Option<(Range, Range)> {
    let slots = (space.first..space.last)
        .step_by(ECAM_SIZE as usize)
        .map(|first| Range::new(first, first + ECAM_SIZE - 1))
        .filter(|slot| !holes.iter().any(|hole| hole.overlaps(*slot)));
    slots
        .filter_map(|ecam| {
            let mut holes = holes.to_vec();
            holes.push(ecam);
            holes.sort();
            let aperture = free(space, &holes)
                .into_iter()
                .filter_map(|r| r.shrink(APERTURE32_UNIT))
                .max_by_key(|r| r.len())?;
            (aperture.len() >= APERTURE32_MIN).then_some((ecam, aperture))
        })
        .max_by_key(|(_, aperture)| aperture.len())
}

/// The parts of `space` outside `holes`, which are sorted by first address.
fn free(space: Range, holes: &[Range]) -> Vec<Range> {
    let mut parts = Vec::new();
    let mut next = space.first;
    for hole in holes.iter().filter(|hole| hole.overlaps(space)) {
        if next < hole.first {
            parts.push(Range::new(next, hole.first - 1));
        }
        match hole.last.checked_add(1) {
            Some(after) => next = next.max(after),
            None => return parts,
        }
    }
    if next <= space.last {
        parts.push(Range::new(next, space.last));
    }
    parts
}

impl Layout {
    /// The RAM below 4 GiB, where the boot protocol's structures and the initramfs go: the region
    /// at 0.
    pub fn low_ram(&self) -> Range {
        self.ram.first().copied().unwrap_or(Range::new(0, 0))
    }

    /// Whether `device`, which was not there when the map was composed, can come to a VM that
    /// has it: none of its regions is where RAM is. A region in a device window is no harm, since
    /// the host is never asked to map what others reserve there.
    ///
    /// # Errors
    /// The lowest [`Collision`].
    pub fn admits(&self, device: &HostReserved) -> Result<(), Collision> {
        let hit = self.ram.iter().find_map(|&ram| {
            let region = device.regions.overlapping(ram.first, ram.last)?;
            Some((*region, ram))
        });
        hit.map_or(Ok(()), |(region, ram)| {
            Err(Collision {
                what: device.what.clone(),
                region,
                ram,
            })
        })
    }

    /// RAM in bytes.
    pub fn ram_size(&self) -> u64 {
        self.ram.iter().map(|r| r.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use viommu::reserved::Kind;

    use super::*;

    fn host(first: u64, last: u64) -> HostReserved {
        let mut regions = Regions::new();
        regions.insert(first, last, Kind::Reserved);
        HostReserved {
            what: "0000:01:00.0".into(),
            regions,
        }
    }

    fn check(ram: u64, width: u8, reserved: &[HostReserved], layout: &Layout) {
        assert_eq!(layout.ram_size(), ram, "RAM was lost");
        assert_eq!(layout.ram[0].first, 0);
        let mut parts = layout.ram.clone();
        assert!(parts.is_sorted());
        for region in &parts {
            assert_eq!(region.first % RAM_UNIT, 0);
            assert_eq!(region.len() % RAM_UNIT, 0);
        }
        parts.extend([layout.mmio32, layout.mmio64, layout.ecam]);
        for (n, part) in parts.iter().enumerate() {
            assert!(
                u128::from(part.last) < 1u128 << width,
                "{part} of {width} bits"
            );
            let holes = ARCHITECTURAL.iter().map(|(range, _)| *range);
            let hosts = reserved.iter().flat_map(|host| host.regions.iter());
            for hole in holes.chain(hosts.map(|r| Range::new(r.first, r.last))) {
                assert!(!part.overlaps(hole), "{part} overlaps reserved {hole}");
            }
            for other in &parts[n + 1..] {
                assert!(!part.overlaps(*other), "{part} overlaps {other}");
            }
        }
        assert_eq!(layout.ecam.len(), ECAM_SIZE);
        assert_eq!(layout.ecam.first % ECAM_SIZE, 0);
        assert!(layout.ecam.last < 4 * GIB && layout.mmio32.last < 4 * GIB);
        assert!(layout.mmio64.first >= 4 * GIB);
    }

    #[test]
    fn a_plain_machine_has_ram_below_3_gib_and_from_4_gib_on() {
        let layout = compose(5 * GIB, 40, &[]).unwrap();
        check(5 * GIB, 40, &[], &layout);
        assert_eq!(
            layout.ram,
            [Range::new(0, 3 * GIB - 1), Range::new(4 * GIB, 6 * GIB - 1)]
        );
        assert_eq!(layout.mmio32, Range::new(0xd000_0000, 0xfebf_ffff));
        assert_eq!(layout.ecam, Range::new(0xc000_0000, 0xcfff_ffff));
        assert_eq!(layout.mmio64, Range::new(6 * GIB, 0xfc_ffff_ffff));
    }

    #[test]
    fn ram_flows_around_a_reserved_range() {
        let reserved = [host(0x4000_1000, 0x4000_1fff)];
        let layout = compose(2 * GIB, 46, &reserved).unwrap();
        check(2 * GIB, 46, &reserved, &layout);
        assert_eq!(layout.ram.len(), 2);
        assert_eq!(layout.ram[1].first, 0x4020_0000);
    }

    #[test]
    fn a_device_that_comes_later_must_not_reserve_what_is_ram() {
        let layout = compose(5 * GIB, 40, &[]).unwrap();
        layout.admits(&host(0xc800_0000, 0xc8ff_ffff)).unwrap();
        layout.admits(&host(0xfee0_0000, 0xfeef_ffff)).unwrap();
        let refused = layout.admits(&host(0x7b80_0000, 0x7fff_ffff)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "0000:01:00.0 reserves 0x7b800000-0x7fffffff (reserved), where the running VM has RAM \
             (0x0-0xbfffffff); start the VM with this device, or with --platform reserve=host to \
             have every device of the host fit"
        );
        // With it from the start, it fits.
        let reserved = [host(0x7b80_0000, 0x7fff_ffff)];
        let around = compose(5 * GIB, 40, &reserved).unwrap();
        around.admits(&reserved[0]).unwrap();
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_reason() {
        assert!(matches!(
            compose(1 << 40, 39, &[]),
            Err(LayoutError::TooWide { .. })
        ));
        assert!(compose(GIB, 32, &[]).is_err());
        let at = |first, last| [host(first, last)];
        let error = compose(GIB, 40, &at(0x8_0000, 0x8_0fff)).unwrap_err();
        assert!(error.to_string().contains("0000:01:00.0"), "{error}");
        let error = compose(GIB, 40, &at(0xc000_0000, 0xefff_ffff)).unwrap_err();
        assert!(
            error.to_string().contains("0xc0000000-0xefffffff"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn nothing_overlaps_nothing_is_lost_and_all_is_inside_the_width(
            units in 1u64..600_000,
            width in 34u8..58,
            raw in prop::collection::vec((0u64..1 << 44, 1u64..1 << 36, 0u8..24), 0..8),
        ) {
            let reserved: Vec<HostReserved> = raw
                .into_iter()
                .map(|(first, len, shift)| {
                    let first = (first >> shift).max(BOOT_AREA.last + 1);
                    host(first, first + (len >> shift))
                })
                .collect();
            let ram = units * RAM_UNIT;
            if let Ok(layout) = compose(ram, width, &reserved) {
                check(ram, width, &reserved, &layout);
                for host in &reserved {
                    prop_assert_eq!(layout.admits(host), Ok(()));
                }
            }
        }

        #[test]
        fn without_host_devices_everything_that_can_fit_does(gib in 1u64..900, width in 40u8..53) {
            let layout = compose(gib * GIB, width, &[]).unwrap();
            check(gib * GIB, width, &[], &layout);
        }

        #[test]
        fn any_reserved_range_is_answered(
            ram in 0u64..1 << 50,
            width: u8,
            raw in prop::collection::vec((any::<u64>(), any::<u64>()), 0..6),
        ) {
            let reserved: Vec<HostReserved> = raw
                .into_iter()
                .map(|(a, b)| host(a.min(b), a.max(b)))
                .collect();
            let _ = compose(ram & !(RAM_UNIT - 1), width, &reserved);
        }
    }
}
