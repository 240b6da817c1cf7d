//! A guest's second-stage table, mirrored into an address space of the kernel's.
//!
//! The host's hardware has one second stage, and it is ours; a guest that runs second-stage tables
//! (VT-d legacy mode) gets them copied, kept up to date by its own invalidations, which caching
//! mode makes it send for every change.
//!
//! What is one area in the kernel can only go as a whole, and while it is replaced a transfer that
//! is under way in another part of it would fault. So an area is never more than one guest
//! operation made: pages become one area only within the range of one page-selective invalidation,
//! and a walk of the whole table makes one area of each leaf.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;

use vm_memory::{Bytes, GuestAddress};

use super::memory::Memory;
use super::space::{AddressSpace, Area, Areas};
use crate::backend::{Access, InvalidationRange, Refused, Stage2};
use crate::reserved::Regions;
use crate::{Gpa, GuestRam};

/// The most areas that one mirrored table may have (1 GiB in pages of 4 KiB).
pub(super) const MAX_AREAS: usize = 1 << 18;

/// The most tables that one walk reads (256 MiB of them): a guest can point every entry of a table
/// at the same next one, and this many entries for each page of RAM it spends.
const MAX_TABLES: usize = 1 << 16;

/// One leaf of a second-stage table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaf {
    pub iova: u64,
    pub last: u64,
    pub gpa: u64,
    pub access: Access,
}

/// The walk met more than it may.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TooMuch;

/// Calls `each` with every leaf that touches `first` to `last`, ascending. `read` fills a part of a
/// table from a guest-physical address, or says that there is no memory.
///
/// What the specification calls a fault (reserved bits, a table outside memory) is no leaf here:
/// the access faults then, as it must.
pub(super) fn walk(
    table: &Stage2,
    first: u64,
    last: u64,
    read: &mut dyn FnMut(Gpa, &mut [u8]) -> bool,
    each: &mut dyn FnMut(Leaf) -> ControlFlow<TooMuch>,
) -> Result<(), TooMuch> {
    let levels = match table.width {
        39 => 3,
        48 => 4,
        57 => 5,
        _ => return Ok(()),
    };
    let end = (1u64 << table.width) - 1;
    if first > end {
        return Ok(());
    }
    let mut walk = Walk {
        first,
        last: last.min(end),
        budget: MAX_TABLES,
        read,
        each,
    };
    walk.table(table.root.0, levels, 0, Access::READ_WRITE)
}

struct Walk<'a> {
    first: u64,
    last: u64,
    budget: usize,
    read: &'a mut dyn FnMut(Gpa, &mut [u8]) -> bool,
    each: &'a mut dyn FnMut(Leaf) -> ControlFlow<TooMuch>,
}

/// Entry bits of VT-d 9.10.
const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const PAGE_SIZE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Walk<'_> {
    /// The table at `address`, of `level`, whose first entry is for `base`.
    fn table(&mut self, address: u64, level: u8, base: u64, access: Access) -> Result<(), TooMuch> {
        self.budget = self.budget.checked_sub(1).ok_or(TooMuch)?;
        let shift = 12 + 9 * u32::from(level - 1);
        // Only the entries that the range needs are read.
        let from = ((self.first.max(base) - base) >> shift) as usize;
        let to = (((self.last - base) >> shift) as usize).min(511);
        let mut bytes = [0; 4096];
        let bytes = &mut bytes[..(to - from + 1) * 8];
        if !(self.read)(Gpa(address + from as u64 * 8), bytes) {
            return Ok(());
        }
        for (index, entry) in (from..=to).zip(bytes.as_chunks().0) {
            let entry = u64::from_le_bytes(*entry);
            let access = Access {
                read: access.read && entry & READ != 0,
                write: access.write && entry & WRITE != 0,
            };
            if access == Access::default() {
                continue;
            }
            let iova = base + ((index as u64) << shift);
            let size = 1u64 << shift;
            let target = entry & ADDRESS;
            if level == 1 || (entry & PAGE_SIZE != 0 && level <= 3) {
                // Address bits below the leaf's size are reserved.
                if target & (size - 1) == 0 {
                    let leaf = Leaf {
                        iova,
                        last: iova + (size - 1),
                        gpa: target,
                        access,
                    };
                    if let ControlFlow::Break(too_much) = (self.each)(leaf) {
                        return Err(too_much);
                    }
                }
            } else if entry & PAGE_SIZE == 0 {
                self.table(target, level - 1, iova, access)?;
            }
        }
        Ok(())
    }
}

/// A guest table and its mirror.
pub(super) struct Shadow {
    table: Stage2,
    pub(super) space: AddressSpace,
}

impl Shadow {
    pub(super) fn new(table: Stage2, space: AddressSpace) -> Self {
        Self { table, space }
    }

    /// Makes the mirror what the guest's table is now, as far as `first` to `last` can tell.
    /// `selective`: the range is what one guest operation changed.
    pub(super) fn refresh(
        &self,
        memory: &Memory,
        ram: &GuestRam,
        (first, last): (u64, u64),
        selective: bool,
    ) -> Result<(), Refused> {
        let mut areas = self.space.areas();
        let (first, last, wanted) = self.wanted(&areas, memory, ram, first, last)?;
        let wanted = if selective { merged(wanted) } else { wanted };

        // Away with what the guest's table no longer says.
        let stale = areas
            .range(first..=last)
            .filter(|&(iova, area)| !is_shown(&wanted, *iova, area))
            .map(|(&iova, area)| (iova, area.last))
            .collect::<Vec<_>>();
        for (iova, last) in runs(stale) {
            self.space
                .remove(&mut areas, iova, last)
                .map_err(|source| failed("IOMMU_IOAS_UNMAP", iova, source))?;
        }

        // Here with what it says and the mirror has not.
        for (&iova, area) in &wanted {
            for (iova, area) in missing(&areas, iova, area) {
                if areas.len() >= MAX_AREAS {
                    return Err(too_many());
                }
                self.space
                    .add(&mut areas, memory.ioas(), iova, area)
                    .map_err(|source| failed("IOMMU_IOAS_COPY", iova, source))?;
            }
        }
        Ok(())
    }

    /// The range, grown until it cuts neither an area nor a leaf, and what there is to be in it.
    fn wanted(
        &self,
        areas: &Areas,
        memory: &Memory,
        ram: &GuestRam,
        mut first: u64,
        mut last: u64,
    ) -> Result<(u64, u64, Areas), Refused> {
        let reserved = memory.reserved().clone();
        let mut read =
            |at: Gpa, bytes: &mut [u8]| ram.read_slice(bytes, GuestAddress(at.0)).is_ok();
        // What grows the range is a leaf larger than the areas it touches, or an area larger than
        // the leaves; leaves have three sizes, so few rounds are needed. After them: everything.
        for round in 0.. {
            if round == 3 {
                (first, last) = (0, u64::MAX);
            }
            let before = areas.range(..=first).next_back();
            let after = areas.range(..=last).next_back();
            let mut low = match before {
                Some((&iova, area)) if area.last >= first => iova,
                _ => first,
            };
            let mut high = after.map_or(last, |(_, area)| area.last.max(last));
            let mut wanted = Areas::new();
            walk(&self.table, low, high, &mut read, &mut |leaf| {
                low = low.min(leaf.iova);
                high = high.max(leaf.last);
                clip(memory, &reserved, leaf, &mut wanted);
                if wanted.len() > MAX_AREAS {
                    return ControlFlow::Break(TooMuch);
                }
                ControlFlow::Continue(())
            })
            .map_err(|TooMuch| too_many())?;
            let complete = (low, high) == (first, last);
            (first, last) = (low, high);
            if complete || round == 3 {
                return Ok((first, last, wanted));
            }
        }
        Err(too_many())
    }
}

fn too_many() -> Refused {
    Refused::NoRoom {
        what: "mapping of a second-stage table",
        limit: MAX_AREAS as u64,
    }
}

/// The parts of `leaf` that lead to guest memory and are not reserved, as areas.
fn clip(memory: &Memory, reserved: &Regions, leaf: Leaf, into: &mut Areas) {
    let mut put = |iova: u64, last: u64| {
        let area = Area {
            last,
            gpa: leaf.gpa + (iova - leaf.iova),
            access: leaf.access,
        };
        into.insert(iova, area);
    };
    memory.pieces(leaf.gpa, leaf.gpa + (leaf.last - leaf.iova), |gpa, end| {
        let (iova, last) = (leaf.iova + (gpa - leaf.gpa), leaf.iova + (end - leaf.gpa));
        if reserved.overlapping(iova, last).is_none() {
            put(iova, last);
        } else {
            for (iova, last) in reserved.gaps(iova, last) {
                put(iova, last);
            }
        }
    });
}

/// Joins areas that continue each other.
fn merged(areas: Areas) -> Areas {
    let mut result = Areas::new();
    let mut open: Option<(u64, Area)> = None;
    for (iova, area) in areas {
        match &mut open {
            Some((start, last))
                if last.last.checked_add(1) == Some(iova)
                    && last.gpa + (iova - *start) == area.gpa
                    && last.access == area.access =>
            {
                last.last = area.last;
            }
            _ => {
                if let Some((start, done)) = open.replace((iova, area)) {
                    result.insert(start, done);
                }
            }
        }
    }
    result.extend(open);
    result
}

/// Whether all of `area` is in `wanted`, wherever that has its borders.
fn is_shown(wanted: &Areas, iova: u64, area: &Area) -> bool {
    let mut next = iova;
    let before = wanted.range(..iova).next_back();
    for (&start, piece) in before.into_iter().chain(wanted.range(iova..=area.last)) {
        if piece.last < next {
            continue;
        }
        let same = start <= next
            && piece.gpa + (next - start) == area.gpa + (next - iova)
            && piece.access == area.access;
        if !same {
            return false;
        }
        if piece.last >= area.last {
            return true;
        }
        next = piece.last + 1;
    }
    false
}

/// The parts of `area` where the mirror has nothing.
fn missing(areas: &Areas, iova: u64, area: &Area) -> Vec<(u64, Area)> {
    let mut parts = Vec::new();
    let mut put = |first: u64, last: u64| {
        let part = Area {
            last,
            gpa: area.gpa + (first - iova),
            ..*area
        };
        parts.push((first, part));
    };
    let mut next = iova;
    let before = areas.range(..iova).next_back();
    for (&start, there) in before.into_iter().chain(areas.range(iova..=area.last)) {
        if there.last < next {
            continue;
        }
        if start > next {
            put(next, start - 1);
        }
        if there.last >= area.last {
            return parts;
        }
        next = there.last + 1;
    }
    put(next, area.last);
    parts
}

/// Joins ranges that touch, so that what lies together goes with one call.
fn runs(ranges: Vec<(u64, u64)>) -> BTreeMap<u64, u64> {
    let mut result = BTreeMap::new();
    let mut open: Option<(u64, u64)> = None;
    for (first, last) in ranges {
        match &mut open {
            Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
            _ => result.extend(open.replace((first, last))),
        }
    }
    result.extend(open);
    result
}

fn failed(call: &'static str, iova: u64, source: io::Error) -> Refused {
    Refused::Host {
        call,
        object: format!("the mirror of a second-stage table at {iova:#x}"),
        source,
    }
}

/// What of a batch is to be done for one mirror: when everything is among it, that and nothing
/// else, once, however often a guest asks for it.
pub(super) fn once(ranges: Vec<(usize, InvalidationRange)>) -> Vec<(usize, InvalidationRange)> {
    let all = ranges
        .iter()
        .any(|(_, range)| *range == InvalidationRange::All);
    match ranges.first() {
        Some(&(index, _)) if all => vec![(index, InvalidationRange::All)],
        _ => ranges,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Iova;

    #[test]
    fn a_mirror_is_made_anew_once_however_often_a_batch_asks_for_everything() {
        let all = |index| (index, InvalidationRange::All);
        let pages = |index| {
            let first = Iova(0x1000);
            let range = InvalidationRange::Pages {
                first,
                count: 1,
                leaf: false,
            };
            (index, range)
        };
        assert_eq!(once(vec![]), []);
        let some = vec![pages(1), pages(4)];
        assert_eq!(once(some.clone()), some);
        // The first to have failed if it fails: none of those after it is done then.
        assert_eq!(once(vec![pages(2), all(3), pages(5), all(9)]), [all(2)]);
    }
}
