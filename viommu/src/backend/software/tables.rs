//! Guest tables in guest RAM: 64-bit entries, read and updated as a unit that walks them does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileMemory,
};

use super::target::INTERRUPT_RANGE;
use crate::GuestRam;

/// Guest RAM, and its largest region at hand: most pages and tables are there, and what is needs
/// no search.
pub(super) struct Ram {
    all: GuestRam,
    /// `None` without RAM; `length` is 0 then.
    main: Option<Arc<GuestRegionMmap<()>>>,
    first: u64,
    length: u64,
    /// Bytes from `first` on that are whole pages and come before the interrupt range.
    pages: u64,
}

impl Ram {
    pub(super) fn new(all: GuestRam) -> Self {
        let largest = all.iter().max_by_key(|region| region.len());
        let main = largest.and_then(|region| {
            let taken = all.remove_region(region.start_addr(), region.len());
            // Only a copy of the list of regions is without it.
            taken.ok().map(|(_, region)| region)
        });
        let first = main.as_ref().map_or(0, |region| region.start_addr().0);
        let length = main.as_ref().map_or(0, |region| region.len());
        let to_interrupts = INTERRUPT_RANGE.start().saturating_sub(first);
        let before = match length > to_interrupts && first <= *INTERRUPT_RANGE.end() {
            true => to_interrupts,
            false => length,
        };
        Self {
            first,
            length,
            pages: if first % 4096 == 0 {
                before & !0xfff
            } else {
                0
            },
            main,
            all,
        }
    }

    pub(super) fn all(&self) -> &GuestMemoryMmap<()> {
        &self.all
    }

    /// Whether all of the page of 2^`shift` bytes at `base` is RAM in the largest region.
    #[inline]
    pub(super) fn main_has(&self, base: u64, shift: u32) -> bool {
        let offset = base.wrapping_sub(self.first);
        offset < self.length && self.length - offset >= 1 << shift
    }

    /// As [`main_has`](Self::main_has), of the 4 KiB page at `base`; never one that answers for
    /// interrupt messages.
    #[inline]
    pub(super) fn main_has_page(&self, base: u64) -> bool {
        base.wrapping_sub(self.first) < self.pages
    }

    /// Runs `work` on the entry at `gpa`; `None` when there is no RAM or `gpa` is not 8-byte
    /// aligned.
    #[inline]
    fn with_entry<R>(&self, gpa: u64, work: impl FnOnce(&AtomicU64) -> R) -> Option<R> {
        let offset = gpa.wrapping_sub(self.first);
        if offset < self.length
            && let Some(main) = &self.main
        {
            return within(main, MemoryRegionAddress(offset), work);
        }
        self.with_entry_elsewhere(gpa, work)
    }

    #[cold]
    fn with_entry_elsewhere<R>(&self, gpa: u64, work: impl FnOnce(&AtomicU64) -> R) -> Option<R> {
        let (region, offset) = self.all.to_region_addr(GuestAddress(gpa))?;
        within(region, offset, work)
    }

    /// The entry at `gpa`. Acquire: what the guest wrote before it made the entry present is seen.
    #[inline]
    pub(super) fn load(&self, gpa: u64) -> Option<u64> {
        self.with_entry(gpa, |entry| u64::from_le(entry.load(Ordering::Acquire)))
    }

    /// Replaces `old` by `new` at `gpa`; whether the entry still was `old`.
    pub(super) fn replace(&self, gpa: u64, old: u64, new: u64) -> Option<bool> {
        self.with_entry(gpa, |entry| {
            entry
                .compare_exchange(
                    old.to_le(),
                    new.to_le(),
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                )
                .is_ok()
        })
    }
}

#[inline]
fn within<R>(
    region: &GuestRegionMmap<()>,
    offset: MemoryRegionAddress,
    work: impl FnOnce(&AtomicU64) -> R,
) -> Option<R> {
    let slice = region.get_slice(offset, size_of::<u64>()).ok()?;
    slice.get_atomic_ref::<AtomicU64>(0).ok().map(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_every_region_are_found_and_nothing_beside_them() {
        let regions = [(0x1000, 0x1000), (0x10_0000, 0x4000), (0x20_0000, 0x2000)];
        let regions = regions.map(|(first, length)| (GuestAddress(first), length));
        let ram = Ram::new(Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap()));
        for (GuestAddress(first), length) in regions {
            let last = first + length as u64 - 8;
            for gpa in [first, last] {
                assert_eq!(ram.load(gpa), Some(0), "{gpa:#x}");
                assert_eq!(ram.replace(gpa, 0, gpa), Some(true));
                assert_eq!(ram.replace(gpa, 0, 1), Some(false));
                assert_eq!(ram.load(gpa), Some(gpa));
            }
            for gpa in [first - 8, first - 1, first + 4, last + 4, last + 8] {
                assert_eq!(ram.load(gpa), None, "{gpa:#x}");
                assert_eq!(ram.replace(gpa, 0, 1), None, "{gpa:#x}");
            }
        }
        for gpa in [u64::MAX, u64::MAX - 7, 0] {
            assert_eq!(ram.load(gpa), None, "{gpa:#x}");
        }
    }

    #[test]
    fn only_whole_pages_of_the_largest_region_are_in_it() {
        let regions = [
            (GuestAddress(0), 0x1000),
            (GuestAddress(0x20_0000), 0x20_0000),
        ];
        let ram = Ram::new(Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap()));
        assert!(ram.main_has(0x20_0000, 12) && ram.main_has(0x3f_f000, 12));
        assert!(ram.main_has(0x20_0000, 21));
        assert!(!ram.main_has(0, 12) && !ram.main_has(0x40_0000, 12));
        assert!(!ram.main_has(0x20_0000, 30) && !ram.main_has(0x1f_f000, 13));
        assert!(!Ram::new(Arc::new(GuestMemoryMmap::new())).main_has(0, 12));
        assert!(ram.main_has_page(0x20_0000) && ram.main_has_page(0x3f_f000));
        assert!(!ram.main_has_page(0x1f_f000) && !ram.main_has_page(0x40_0000));
    }

    #[test]
    fn no_page_of_the_interrupt_range_is_ram_to_a_short_walk() {
        for first in [0xfed0_0000, 0xfee0_0000, 0xfef0_0000] {
            let region = (GuestAddress(first), 0x40_0000);
            let ram = GuestMemoryMmap::from_ranges(&[region]).unwrap();
            let ram = Ram::new(Arc::new(ram));
            for page in (0xfec0_0000..0xff50_0000).step_by(4096) {
                assert!(!(ram.main_has_page(page) && INTERRUPT_RANGE.contains(&page)));
                assert!(!ram.main_has_page(page) || ram.main_has(page, 12));
            }
        }
    }
}
