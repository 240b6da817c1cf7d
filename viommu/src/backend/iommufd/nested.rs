//! Guests' first-stage tables as nested hardware tables: checked, shared, and invalidated with one
//! array each.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use iommufd_bindings as sys;

use super::hwinfo::HwModel;
use super::object::{FaultQueue, Hwpt};
use super::parent::Parent;
use crate::backend::{Capabilities, InvalidationRange, Refused, Stage1, Stage2};

/// Refuses what the hardware could not run.
///
/// The kernel checks widths and flags only when a table is attached, after it has removed the old
/// one, and does not check the root's address at all: its low bits would be taken for flags of the
/// PASID entry (`linux.md`, A3).
pub(super) fn check(table: &Stage1, host: &Capabilities, model: &HwModel) -> Result<(), Refused> {
    let no = |what, value: u64, limit: String| Err(Refused::NotOffered { what, value, limit });
    if !host.stage1 {
        return no(
            "stage1",
            1,
            "the host's IOMMU has no nested translation".into(),
        );
    }
    match table.width {
        48 => {}
        57 if host.stage1_57 => {}
        width => {
            let widths = if host.stage1_57 { "48 or 57" } else { "48" };
            return no(
                "stage-1 width",
                width.into(),
                format!("the host has {widths} bits"),
            );
        }
    }
    if table.sre && !host.sre {
        return no("SRE", 1, "the host has no supervisor requests (SRS)".into());
    }
    if table.eafe && !host.eafe {
        return no(
            "EAFE",
            1,
            "the host has no extended accessed flag (EAFS)".into(),
        );
    }
    let width = match model {
        HwModel::Vtd(unit) => unit.mgaw(),
        HwModel::Other(_) => host.address_width,
    };
    check_root(table.root.0, width)
}

/// The same for a second-stage table, which is only ever read by us.
pub(super) fn check_stage2(table: &Stage2) -> Result<(), Refused> {
    if !matches!(table.width, 39 | 48 | 57) {
        return Err(Refused::NotOffered {
            what: "stage-2 width",
            value: table.width.into(),
            limit: "39, 48 or 57 bits".into(),
        });
    }
    check_root(table.root.0, 52)
}

fn check_root(root: u64, width: u8) -> Result<(), Refused> {
    if root & 0xfff != 0 || root >> width != 0 {
        return Err(Refused::NotOffered {
            what: "root table address",
            value: root,
            limit: format!("a multiple of 4096 below 2^{width}"),
        });
    }
    Ok(())
}

/// The table as the kernel takes it. The kernel always lets walks snoop, and what sizes leaves have
/// and whether fetches are served is the hardware's, so what the guest's unit lacks of these is
/// not taken away here: it can only spare the guest a fault. WPE is about supervisor requests, so without those it is not
/// set, and two tables that differ in it are one.
fn vtd_s1(table: &Stage1) -> sys::iommu_hwpt_vtd_s1 {
    let mut flags = 0;
    let mut flag = |on, bit: u32| flags |= if on { u64::from(bit) } else { 0 };
    flag(table.sre, sys::iommu_hwpt_vtd_s1_flags_IOMMU_VTD_S1_SRE);
    flag(table.eafe, sys::iommu_hwpt_vtd_s1_flags_IOMMU_VTD_S1_EAFE);
    flag(
        table.wpe && table.sre,
        sys::iommu_hwpt_vtd_s1_flags_IOMMU_VTD_S1_WPE,
    );
    sys::iommu_hwpt_vtd_s1 {
        flags,
        pgtbl_addr: table.root.0,
        addr_width: table.width.into(),
        __reserved: 0,
    }
}

/// What two targets must have in common to share one nested table.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    root: u64,
    width: u32,
    flags: u64,
    parent: u32,
    faults: bool,
}

#[derive(Default)]
struct Shared {
    tables: HashMap<Key, Weak<Hwpt>>,
    /// When to look for dead entries: whenever the number has doubled.
    sweep_at: usize,
}

/// Nested tables by what they are.
#[derive(Default)]
pub(super) struct Tables(Mutex<Shared>);

impl Tables {
    /// The nested table for `table` on `parent`, made for `device` if there is none yet.
    ///
    /// Sharing saves a domain id of each IOMMU, and one call per invalidation.
    pub(super) fn get(
        &self,
        parent: &Parent,
        device: u32,
        table: &Stage1,
        faults: Option<&Arc<FaultQueue>>,
    ) -> io::Result<Arc<Hwpt>> {
        let parent = parent.table();
        let table = vtd_s1(table);
        let key = Key {
            root: table.pgtbl_addr,
            width: table.addr_width,
            flags: table.flags,
            // A table keeps its parent, so the id is not used again while the entry is alive.
            parent: parent.id(),
            faults: faults.is_some(),
        };
        let mut shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = shared.tables.get(&key).and_then(Weak::upgrade) {
            return Ok(table);
        }
        let table = Arc::new(Hwpt::nested(parent, device, &table, faults)?);
        if shared.tables.len() >= shared.sweep_at {
            shared.tables.retain(|_, table| table.strong_count() > 0);
            shared.sweep_at = shared.tables.len() * 2 + 16;
        }
        shared.tables.insert(key, Arc::downgrade(&table));
        Ok(table)
    }

    /// How many there are.
    pub(super) fn live(&self) -> usize {
        let shared = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shared
            .tables
            .values()
            .filter(|table| table.strong_count() > 0)
            .count()
    }
}

/// The most entries of one array: the kernel works through it with interrupts off. Beyond it, "all
/// of them" costs less.
pub(super) const MAX_ENTRIES: usize = 256;

/// The invalidations of one doorbell, by table.
#[derive(Default)]
pub(super) struct Batch(BTreeMap<u32, Work>);

struct Work {
    table: Arc<Hwpt>,
    entries: Vec<sys::iommu_hwpt_vtd_s1_invalidate>,
    /// Which item of the batch each entry is from.
    from: Vec<usize>,
}

/// The entry that means everything.
const EVERYTHING: sys::iommu_hwpt_vtd_s1_invalidate = sys::iommu_hwpt_vtd_s1_invalidate {
    addr: 0,
    npages: u64::MAX,
    flags: 0,
    __reserved: 0,
};

/// `range` as the kernel takes it; `None` for nothing.
///
/// The kernel rounds a range to a power of two that covers it, takes 0 pages at address 0 for
/// everything, and refuses an address that is not aligned (`linux.md`, A5).
fn entry(range: InvalidationRange) -> Option<sys::iommu_hwpt_vtd_s1_invalidate> {
    let InvalidationRange::Pages { first, count, leaf } = range else {
        return Some(EVERYTHING);
    };
    if count == 0 {
        return None;
    }
    let addr = first.0 & !0xfff;
    let to_the_end = (u64::MAX - addr) / 4096 + 1;
    if addr == 0 && count >= to_the_end {
        return Some(EVERYTHING);
    }
    let leaf = if leaf {
        sys::iommu_hwpt_vtd_s1_invalidate_flags_IOMMU_VTD_INV_FLAGS_LEAF
    } else {
        0
    };
    Some(sys::iommu_hwpt_vtd_s1_invalidate {
        addr,
        npages: count.min(to_the_end),
        flags: leaf,
        __reserved: 0,
    })
}

impl Batch {
    /// Adds item `index` of the caller's batch, for `table`.
    pub(super) fn add(&mut self, table: &Arc<Hwpt>, index: usize, range: InvalidationRange) {
        let Some(entry) = entry(range) else {
            return;
        };
        let work = self.0.entry(table.id()).or_insert_with(|| Work {
            table: table.clone(),
            entries: Vec::new(),
            from: Vec::new(),
        });
        // Nothing has been sent yet, so "everything" stands for what was there before it and for
        // what comes after it.
        if work.entries.last() == Some(&EVERYTHING) || work.entries.last() == Some(&entry) {
            return;
        }
        if entry == EVERYTHING || work.entries.len() == MAX_ENTRIES {
            let first = work.from.first().copied().unwrap_or(index);
            work.entries.clear();
            work.from.clear();
            work.entries.push(EVERYTHING);
            work.from.push(first);
        } else {
            work.entries.push(entry);
            work.from.push(index);
        }
    }

    /// Sends one array per table. `Some`: the first item of the batch that did not take effect.
    pub(super) fn run(self) -> Option<usize> {
        let failed = |work: Work| {
            let partial = work.table.invalidate(&work.entries).err()?;
            let index = work.from.get(partial.handled).or(work.from.first());
            log::debug!(
                "invalidation {} of table {} failed: {}",
                partial.handled,
                work.table.id(),
                partial.source
            );
            index.copied()
        };
        self.0.into_values().filter_map(failed).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Iova;

    fn pages(first: u64, count: u64, leaf: bool) -> InvalidationRange {
        InvalidationRange::Pages {
            first: Iova(first),
            count,
            leaf,
        }
    }

    #[test]
    fn a_range_goes_to_the_kernel_as_the_guest_gave_it() {
        let entry = entry(pages(0xffff_8000_0000_1000, 8, true)).unwrap();
        assert_eq!(
            (entry.addr, entry.npages, entry.flags),
            (0xffff_8000_0000_1000, 8, 1)
        );
    }

    #[test]
    fn no_pages_are_not_taken_for_all_pages() {
        assert_eq!(entry(pages(0, 0, false)), None);
        assert_eq!(entry(pages(0x1000, 0, false)), None);
    }

    #[test]
    fn a_range_never_wraps_and_never_says_everything_by_accident() {
        let entry = entry(pages(0xffff_ffff_ffff_f000, u64::MAX, false)).unwrap();
        assert_eq!((entry.addr, entry.npages), (0xffff_ffff_ffff_f000, 1));
        // U64_MAX pages at another address than 0 is EINVAL for the kernel.
        let entry = super::entry(pages(0x1000, u64::MAX, false)).unwrap();
        assert_eq!(entry.npages, (1 << 52) - 1);
    }

    #[test]
    fn the_whole_address_space_is_the_kernels_everything() {
        assert_eq!(entry(InvalidationRange::All), Some(EVERYTHING));
        assert_eq!(entry(pages(0, 1 << 52, true)), Some(EVERYTHING));
    }
}
