//! Reserved regions: I/O virtual addresses that must not be mapped.
//!
//! One type for everything that has to keep out of them: the layout of guest memory, what a
//! virtio-iommu tells about an endpoint and refuses to map, and what the host's IOMMU cannot
//! translate.

#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where x86 endpoints write their message-signalled interrupts (Intel SDM 3A, 11.11.1).
pub const X86_MSI: Region = Region {
    first: 0xfee0_0000,
    last: 0xfeef_ffff,
    kind: Kind::Msi,
};

/// What a region is. Where regions overlap, the greater kind is what counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub enum Kind {
    /// Not translated: outside the host IOMMU's aperture, or used by the platform.
    Reserved,
    /// The firmware does DMA there and has it mapped to itself (RMRR, IVMD).
    Direct,
    /// The doorbell of message-signalled interrupts. A host lists it as unusable as well, so it
    /// counts more than [`Kind::Reserved`].
    Msi,
    /// The same, translated like any other address: a guest maps it to itself, and nothing else
    /// there.
    MappedMsi,
}

impl Kind {
    /// The kind that the host's kernel means by a word of `reserved_regions` in sysfs. `None` for
    /// a region that it gives up with the device (`direct-relaxable`); what is unknown is kept out
    /// of.
    pub fn of_host(word: &str) -> Option<Self> {
        match word {
            "msi" => Some(Self::Msi),
            "direct" => Some(Self::Direct),
            "direct-relaxable" => None,
            _ => Some(Self::Reserved),
        }
    }
}

/// Addresses from `first` to `last`, both inclusive so that the end of the address space can be
/// named.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Region {
    /// First address.
    pub first: u64,
    /// Last address, not below `first`.
    pub last: u64,
    /// What it is.
    pub kind: Kind,
}

impl Region {
    /// Whether an address of `first..=last` is in the region.
    pub const fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Reserved => "reserved",
            Kind::Direct => "direct, kept by the firmware",
            Kind::Msi => "MSI doorbell",
            Kind::MappedMsi => "MSI doorbell, to be mapped to itself",
        };
        write!(f, "{:#x}-{:#x} ({kind})", self.first, self.last)
    }
}

/// A set of regions: sorted, without overlaps, neighbours of one kind merged.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(from = "Vec<Region>", into = "Vec<Region>")]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Regions(Vec<Region>);

impl Regions {
    /// What `reserved_regions` of a group says in sysfs: lines of `FIRST LAST KIND`. Lines that are
    /// not so are left out.
    pub fn of_host(text: &str) -> Self {
        let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let (first, last) = (number(words.next()?)?, number(words.next()?)?);
            let kind = Kind::of_host(words.next()?)?;
            Some(Region { first, last, kind })
        };
        text.lines().filter_map(line).collect()
    }

    /// No regions.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Everything outside of `usable`, which is a list of inclusive ranges in any order: the
    /// form in which the kernel tells the aperture of an IOAS.
    pub fn outside(usable: &[(u64, u64)]) -> Self {
        let mut usable: Vec<_> = usable.iter().filter(|(f, l)| f <= l).collect();
        usable.sort_unstable();
        let mut regions = Self::new();
        // The first address that no range has covered yet; `None` when there is none.
        let mut next = Some(0);
        for &&(first, last) in &usable {
            let Some(from) = next else { break };
            if first > from {
                regions.insert(from, first - 1, Kind::Reserved);
            }
            if last >= from {
                next = last.checked_add(1);
            }
        }
        if let Some(from) = next {
            regions.insert(from, u64::MAX, Kind::Reserved);
        }
        regions
    }

    /// Adds `first..=last`; an empty range (`last < first`) adds nothing.
    pub fn insert(&mut self, first: u64, last: u64, kind: Kind) {
        if last < first {
            return;
        }
        let mut pieces = Vec::with_capacity(self.0.len() + 2);
        // What of the new region no greater one has taken.
        let mut rest = Some((first, last));
        for &old in &self.0 {
            if !old.overlaps(first, last) {
                pieces.push(old);
            } else if old.kind >= kind {
                pieces.push(old);
                if let Some((from, to)) = rest {
                    if from < old.first {
                        pieces.push(Region {
                            first: from,
                            last: old.first - 1,
                            kind,
                        });
                    }
                    rest = old
                        .last
                        .checked_add(1)
                        .filter(|&n| n <= to)
                        .map(|n| (n, to));
                }
            } else {
                if old.first < first {
                    pieces.push(Region {
                        last: first - 1,
                        ..old
                    });
                }
                if old.last > last {
                    pieces.push(Region {
                        first: last + 1,
                        ..old
                    });
                }
            }
        }
        if let Some((first, last)) = rest {
            pieces.push(Region { first, last, kind });
        }
        pieces.sort_unstable_by_key(|r| r.first);
        self.0.clear();
        for piece in pieces {
            match self.0.last_mut() {
                Some(before)
                    if before.kind == piece.kind
                        && before.last.checked_add(1) == Some(piece.first) =>
                {
                    before.last = piece.last;
                }
                _ => self.0.push(piece),
            }
        }
    }

    /// Adds all regions of `other`.
    pub fn merge(&mut self, other: &Self) {
        for region in &other.0 {
            self.insert(region.first, region.last, region.kind);
        }
    }

    /// The regions in ascending order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Region> {
        self.0.iter()
    }

    /// The lowest region that has an address of `first..=last`.
    pub fn overlapping(&self, first: u64, last: u64) -> Option<&Region> {
        let at = self.0.partition_point(|r| r.last < first);
        self.0.get(at).filter(|r| r.overlaps(first, last))
    }

    /// All regions that have an address of `first..=last`, ascending.
    pub fn all_overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = &Region> {
        let at = self.0.partition_point(|r| r.last < first);
        let from = self.0.get(at..).unwrap_or_default().iter();
        from.take_while(move |r| r.overlaps(first, last))
    }

    /// The parts of `first..=last` that are not reserved, ascending, as inclusive ranges.
    pub fn gaps(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut next = Some(first);
        for region in self.0.iter().filter(|r| r.overlaps(first, last)) {
            let Some(from) = next else { break };
            if region.first > from {
                gaps.push((from, region.first - 1));
            }
            next = region.last.checked_add(1);
        }
        if let Some(from) = next.filter(|&from| from <= last) {
            gaps.push((from, last));
        }
        gaps
    }

    /// How many regions there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Vec<Region>> for Regions {
    fn from(list: Vec<Region>) -> Self {
        list.into_iter().collect()
    }
}

impl From<Regions> for Vec<Region> {
    fn from(regions: Regions) -> Self {
        regions.0
    }
}

impl FromIterator<Region> for Regions {
    fn from_iter<I: IntoIterator<Item = Region>>(list: I) -> Self {
        let mut regions = Self::new();
        for region in list {
            regions.insert(region.first, region.last, region.kind);
        }
        regions
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A small universe at the top of the address space, so that its end is part of the tests.
    const BASE: u64 = u64::MAX - 63;

    fn kind() -> impl Strategy<Value = Kind> {
        prop_oneof![
            Just(Kind::Reserved),
            Just(Kind::Direct),
            Just(Kind::Msi),
            Just(Kind::MappedMsi)
        ]
    }

    fn at(regions: &Regions, address: u64) -> Option<Kind> {
        regions
            .iter()
            .find(|r| r.overlaps(address, address))
            .map(|r| r.kind)
    }

    proptest! {
        #[test]
        fn a_set_says_of_each_address_the_greatest_kind_that_was_inserted(
            list in prop::collection::vec((0u64..64, 0u64..64, kind()), 0..12),
        ) {
            let mut model = [None; 64];
            let mut regions = Regions::new();
            for (first, last, kind) in list {
                regions.insert(BASE + first, BASE + last, kind);
                for (n, cell) in model.iter_mut().enumerate() {
                    if (first..=last).contains(&(n as u64)) {
                        *cell = (*cell).max(Some(kind));
                    }
                }
            }
            for (n, &cell) in model.iter().enumerate() {
                prop_assert_eq!(at(&regions, BASE + n as u64), cell);
            }
            let list: Vec<_> = regions.clone().into();
            for pair in list.windows(2) {
                prop_assert!(pair[0].last < pair[1].first);
                prop_assert!(pair[0].kind != pair[1].kind || pair[0].last + 1 < pair[1].first);
            }
        }

        #[test]
        fn gaps_and_overlaps_agree_with_the_addresses(
            list in prop::collection::vec((0u64..64, 0u64..64, kind()), 0..12),
            first in 0u64..64,
            more in 0u64..64,
        ) {
            let regions: Regions = list
                .into_iter()
                .filter(|(first, last, _)| first <= last)
                .map(|(f, l, kind)| Region { first: BASE + f, last: BASE + l, kind })
                .collect();
            let (first, last) = (BASE + first, BASE.saturating_add(first.saturating_add(more).min(63)));
            let gaps = regions.gaps(first, last);
            for address in first..=last {
                let free = gaps.iter().any(|&(f, l)| f <= address && address <= l);
                prop_assert_eq!(free, at(&regions, address).is_none());
            }
            prop_assert!(gaps.iter().all(|&(f, l)| first <= f && f <= l && l <= last));
            let hit = (first..=last).find_map(|a| at(&regions, a));
            prop_assert_eq!(regions.overlapping(first, last).map(|r| r.kind), hit);
            let all: Vec<_> = regions.all_overlapping(first, last).copied().collect();
            let overlaps = |region: &&Region| region.overlaps(first, last);
            prop_assert_eq!(all, regions.iter().filter(overlaps).copied().collect::<Vec<_>>());
        }

        #[test]
        fn what_is_outside_of_the_usable_ranges_is_reserved(
            usable in prop::collection::vec((0u64..64, 0u64..64), 0..6),
        ) {
            let usable: Vec<_> = usable.into_iter().map(|(f, l)| (BASE + f, BASE + l)).collect();
            let regions = Regions::outside(&usable);
            for address in BASE..=u64::MAX {
                let inside = usable.iter().any(|&(f, l)| f <= address && address <= l);
                prop_assert_eq!(at(&regions, address).is_none(), inside);
            }
            prop_assert_eq!(at(&regions, 0), Some(Kind::Reserved));
        }
    }

    #[test]
    fn the_msi_window_stays_an_msi_window_inside_a_hole_of_the_aperture() {
        let mut regions = Regions::outside(&[(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX)]);
        regions.insert(X86_MSI.first, X86_MSI.last, X86_MSI.kind);
        assert_eq!(Vec::from(regions), [X86_MSI]);
    }

    #[test]
    fn a_region_prints_its_ends_and_kind() {
        assert_eq!(X86_MSI.to_string(), "0xfee00000-0xfeefffff (MSI doorbell)");
    }
}
