//! Which endpoints are behind which virtio-iommu, and how the guest is told: the ACPI table VIOT.
//!
//! A guest reads the table once, at boot. So it names ranges of addresses where a device may be
//! plugged later, not the devices that are there. An endpoint's number is its RID, in every
//! range; it does not depend on what else is in the table.

use std::collections::BTreeSet;

use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};
use acpi_tables::{Aml, AmlSink};

use crate::Rid;

/// The endpoints of one unit, by address: all that are there and all that may be plugged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Topology {
    unit: Rid,
    ranges: Vec<(Rid, Rid)>,
}

/// Why endpoints cannot be behind a unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TopologyError {
    /// The range is empty.
    #[error("the addresses {0} to {1} are no range; name the lower one first")]
    Backwards(Rid, Rid),
    /// An endpoint is behind two units, or named twice.
    #[error("{0} is in two ranges behind virtio-iommus; an endpoint is behind one")]
    Twice(Rid),
    /// A unit is behind a unit.
    #[error("the virtio-iommu {0} cannot be behind a virtio-iommu; leave its address out")]
    Unit(Rid),
    /// More than the table can hold.
    #[error("{0} ranges of endpoints do not fit in the table; the most are {MOST_NODES}")]
    TooMany(usize),
}

/// Offsets in the table have 16 bits, and a range takes 24 bytes.
const MOST_NODES: usize = 2048;

impl Topology {
    /// The endpoints of `unit`: ranges of addresses, inclusive, in any order.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub fn new(unit: Rid, ranges: &[(Rid, Rid)]) -> Result<Self, TopologyError> {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        for &(first, last) in &ranges {
            if last < first {
                return Err(TopologyError::Backwards(first, last));
            }
            if (first..=last).contains(&unit) {
                return Err(TopologyError::Unit(unit));
            }
        }
        for pair in ranges.windows(2) {
            if pair[1].0 <= pair[0].1 {
                return Err(TopologyError::Twice(pair[1].0));
            }
        }
        Ok(Self { unit, ranges })
    }

    /// Everything on the buses `first` to `last` except `outside`: the unit itself, and whatever
    /// is not behind it (bridges, other units, their endpoints).
    ///
    /// # Errors
    /// [`TopologyError`].
    pub fn buses(unit: Rid, first: u8, last: u8, outside: &[Rid]) -> Result<Self, TopologyError> {
        let end = u32::from(Rid::new(last, 31, 7).0);
        let mut from = u32::from(Rid::new(first, 0, 0).0);
        let mut holes: Vec<u32> = outside.iter().map(|rid| u32::from(rid.0)).collect();
        holes.push(u32::from(unit.0));
        holes.sort_unstable();
        let mut ranges = Vec::new();
        for hole in holes.into_iter().filter(|hole| *hole <= end) {
            if from < hole {
                ranges.push((Rid(from as u16), Rid((hole - 1) as u16)));
            }
            from = from.max(hole + 1);
        }
        if from <= end {
            ranges.push((Rid(from as u16), Rid(end as u16)));
        }
        Self::new(unit, &ranges)
    }

    /// Everything at the device numbers of `functions`, whichever function of them; neighbours are
    /// one range.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub fn devices(
        unit: Rid,
        functions: impl IntoIterator<Item = Rid>,
    ) -> Result<Self, TopologyError> {
        let numbers: BTreeSet<u16> = functions.into_iter().map(|rid| rid.0 >> 3).collect();
        let mut ranges: Vec<(Rid, Rid)> = Vec::new();
        for number in numbers {
            let (first, last) = (Rid(number << 3), Rid(number << 3 | 7));
            match ranges.last_mut() {
                Some((_, end)) if end.0 + 1 == first.0 => *end = last,
                _ => ranges.push((first, last)),
            }
        }
        Self::new(unit, &ranges)
    }

    /// Where the unit itself is.
    pub fn unit(&self) -> Rid {
        self.unit
    }

    /// Whether `endpoint` is behind the unit, or would be if it were plugged.
    pub fn covers(&self, endpoint: Rid) -> bool {
        let at = self.ranges.partition_point(|&(_, last)| last < endpoint);
        self.ranges
            .get(at)
            .is_some_and(|&(first, _)| first <= endpoint)
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[(Rid, Rid)] {
        &self.ranges
    }
}

/// The bytes of the table that tells a guest of `units`.
///
/// # Errors
/// [`TopologyError`] when an endpoint is behind two of them or a unit behind another.
pub fn table(units: &[Topology]) -> Result<Vec<u8>, TopologyError> {
    let nodes = units.len() + units.iter().map(|unit| unit.ranges.len()).sum::<usize>();
    if nodes > MOST_NODES {
        return Err(TopologyError::TooMany(nodes));
    }
    let mut all: Vec<_> = units.iter().flat_map(|unit| &unit.ranges).collect();
    all.sort_unstable();
    for pair in all.windows(2) {
        if pair[1].0 <= pair[0].1 {
            return Err(TopologyError::Twice(pair[1].0));
        }
    }
    for unit in units {
        if units.iter().any(|other| other.covers(unit.unit)) {
            return Err(TopologyError::Unit(unit.unit));
        }
    }
    let mut viot = VIOT::new(*b"NESTLG", *b"NESTLING", 1);
    for unit in units {
        let handle = viot.add_virtio_pci_iommu(VirtIoPciIommu::new(device(unit.unit)));
        for &(first, last) in &unit.ranges {
            viot.add_pci_range(PciRange::new(device(first), device(last), &handle));
        }
    }
    let mut bytes = Bytes(Vec::new());
    viot.to_aml_bytes(&mut bytes);
    Ok(bytes.0)
}

fn device(rid: Rid) -> PciDevice {
    PciDevice::new(0, rid.bus(), rid.device(), rid.function())
}

struct Bytes(Vec<u8>);

impl AmlSink for Bytes {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: Rid = Rid::new(0, 1, 0);

    fn word(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    }

    #[test]
    fn the_table_has_a_unit_and_its_ranges_with_endpoint_numbers_that_are_rids() {
        let ranges = [
            (Rid::new(0, 3, 0), Rid::new(0, 31, 7)),
            (Rid(0x100), Rid(0x1ff)),
        ];
        let bytes = table(&[Topology::new(UNIT, &ranges).unwrap()]).unwrap();
        assert_eq!(&bytes[..4], b"VIOT");
        assert_eq!(u32::from(word(&bytes, 4)), bytes.len() as u32);
        assert_eq!(bytes.iter().fold(0u8, |sum, &b| sum.wrapping_add(b)), 0);
        assert_eq!((word(&bytes, 36), word(&bytes, 38)), (3, 48));
        // The unit: a PCI virtio-iommu at 00:01.0.
        assert_eq!((bytes[48], word(&bytes, 50)), (3, 16));
        assert_eq!((word(&bytes, 52), word(&bytes, 54)), (0, UNIT.0));
        for (n, (first, last)) in ranges.into_iter().enumerate() {
            let node = &bytes[64 + 24 * n..][..24];
            assert_eq!((node[0], word(node, 2)), (1, 24));
            assert_eq!(node[4..8], u32::from(first.0).to_le_bytes());
            assert_eq!((word(node, 8), word(node, 10)), (0, 0));
            assert_eq!((word(node, 12), word(node, 14)), (first.0, last.0));
            assert_eq!(word(node, 16), 48, "the unit's node");
        }
    }

    #[test]
    fn buses_are_covered_except_the_unit_and_what_is_outside() {
        let outside = [
            Rid::new(0, 0, 0),
            Rid::new(0, 31, 7),
            Rid::new(9, 0, 0),
            Rid::new(0, 2, 0),
        ];
        let topology = Topology::buses(UNIT, 0, 1, &outside).unwrap();
        for raw in 0..=u16::MAX {
            let rid = Rid(raw);
            let expected = rid.bus() <= 1 && rid != UNIT && !outside.contains(&rid);
            assert_eq!(topology.covers(rid), expected, "{rid}");
        }
        let all = Topology::buses(UNIT, 0, 255, &[]).unwrap();
        assert_eq!(all.ranges(), [(Rid(0), Rid(7)), (Rid(9), Rid(0xffff))]);
        let none = Topology::buses(UNIT, 2, 1, &[]).unwrap();
        assert_eq!(none.ranges(), []);
    }

    #[test]
    fn devices_are_covered_with_all_their_functions_and_neighbours_are_one_range() {
        let functions = [
            Rid::new(0, 5, 0),
            Rid::new(0, 3, 0),
            Rid::new(0, 4, 2),
            Rid::new(0, 31, 0),
            Rid::new(1, 0, 0),
            Rid::new(255, 31, 7),
        ];
        let topology = Topology::devices(UNIT, functions).unwrap();
        let ranges = [
            (Rid::new(0, 3, 0), Rid::new(0, 5, 7)),
            (Rid::new(0, 31, 0), Rid::new(1, 0, 7)),
            (Rid::new(255, 31, 0), Rid::new(255, 31, 7)),
        ];
        assert_eq!(topology.ranges(), ranges);
        let error = Topology::devices(UNIT, [UNIT]);
        assert_eq!(error, Err(TopologyError::Unit(UNIT)));
        assert_eq!(Topology::devices(UNIT, []).unwrap().ranges(), []);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let range = |a, b| (Rid(a), Rid(b));
        let new = |ranges: &[_]| Topology::new(UNIT, ranges);
        let error = new(&[range(9, 5)]);
        assert_eq!(error, Err(TopologyError::Backwards(Rid(9), Rid(5))));
        assert_eq!(new(&[range(0, 0x20)]), Err(TopologyError::Unit(UNIT)));
        let error = new(&[range(0x20, 0x30), range(0x10, 0x20)]);
        assert_eq!(error, Err(TopologyError::Twice(Rid(0x20))));
        let one = new(&[range(0x20, 0x30)]).unwrap();
        let other = Topology::new(Rid(0x10), &[range(0x30, 0x40)]).unwrap();
        let error = table(&[one.clone(), other]);
        assert_eq!(error, Err(TopologyError::Twice(Rid(0x30))));
        let other = Topology::new(Rid(0x28), &[range(0x40, 0x50)]).unwrap();
        assert_eq!(table(&[one, other]), Err(TopologyError::Unit(Rid(0x28))));
    }
}
