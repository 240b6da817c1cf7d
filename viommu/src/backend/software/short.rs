//! The *short* walk: of the one entry that is left to be read when the table of level 1 is cached,
//! which is what most misses are.
//!
//! It knows how to let a request pass to a 4 KiB page, and nothing else: for a fault or for a flag
//! to be set the [walk](super::walk) begins anew. What an entry must look like is worked out once per space, so that it is one comparison.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::iotlb::{IN_RAM, Iotlb, Of};
use super::tables::Ram;
use super::target::INTERRUPT_RANGE;
use super::walk::{Allowed, First, Page, R, W};
use crate::backend::{Stage1, Stage2, Translation};
use crate::spec::vtd::paging::{FirstStageEntry, SecondStageEntry, entry_offset, level_shift};

/// The interrupt range in units of its size.
const INTERRUPTS: u64 = *INTERRUPT_RANGE.start() >> 20;

/// Which walks there are.
const NONE: u8 = 0;
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const NESTED: u8 = 3;

/// What the bits of a leaf entry must be for its page to be used as it is.
#[derive(Default)]
struct Expected {
    checked: AtomicU64,
    set: AtomicU64,
}

impl Expected {
    fn expect(&self, set: u64, clear: u64) {
        self.checked.store(set | clear, Ordering::Relaxed);
        self.set.store(set, Ordering::Relaxed);
    }

    #[inline]
    fn is(&self, entry: u64) -> bool {
        entry & self.checked.load(Ordering::Relaxed) == self.set.load(Ordering::Relaxed)
    }
}

/// How the leaf entries of one space are read. The atomics are for the reason that the
/// [caches](super::iotlb)' are.
#[derive(Default)]
pub(super) struct Leaves {
    walk: AtomicU8,
    /// Requests without PASID: those to the interrupt range are not translated.
    plain: AtomicBool,
    sre: AtomicBool,
    wpe: AtomicBool,
    /// The second stage has accessed and dirty flags.
    ad: AtomicBool,
    first: Expected,
    second: Expected,
}

impl Leaves {
    /// From now on they are those of `translation`.
    pub(super) fn are_of(&self, translation: &Translation, haw: u8, has_pasid: bool) {
        let walk = match translation {
            Translation::Blocked | Translation::Identity | Translation::Domain(_) => NONE,
            Translation::Stage1(stage1) => {
                self.first(stage1, haw);
                FIRST
            }
            Translation::Stage2(stage2) => {
                self.second(stage2, haw);
                SECOND
            }
            Translation::Nested { stage1, stage2 } => {
                self.first(stage1, haw);
                self.second(stage2, haw);
                NESTED
            }
        };
        self.plain.store(!has_pasid, Ordering::Relaxed);
        self.walk.store(walk, Ordering::Relaxed);
    }

    fn first(&self, stage1: &Stage1, haw: u8) {
        let set = FirstStageEntry::new().with_p(true).with_a(true);
        let set = set.with_ea(stage1.eafe).into_bits();
        self.first
            .expect(set, FirstStageEntry::reserved_in_leaf(haw));
        self.sre.store(stage1.sre, Ordering::Relaxed);
        self.wpe.store(stage1.wpe, Ordering::Relaxed);
    }

    fn second(&self, stage2: &Stage2, haw: u8) {
        let set = SecondStageEntry::new().with_a(stage2.ad).into_bits();
        self.second
            .expect(set, SecondStageEntry::reserved_in_leaf(haw));
        self.ad.store(stage2.ad, Ordering::Relaxed);
    }

    /// The page that holds `iova`, if this walk decides it and the page allows what is `needed`.
    /// Its base is as the IOTLB has it, with [`IN_RAM`].
    #[inline]
    pub(super) fn walk(
        &self,
        cache: &Iotlb,
        ram: &Ram,
        iova: u64,
        needed: Allowed,
    ) -> Option<Page> {
        if iova >> 20 == INTERRUPTS && self.plain.load(Ordering::Relaxed) {
            return None;
        }
        let page = match self.walk.load(Ordering::Relaxed) {
            FIRST => self.first_stage(cache, ram, iova)?,
            SECOND => self.second_stage(cache, ram, iova, Of::Input)?,
            NESTED => self.nested(cache, ram, iova)?,
            _ => return None,
        };
        if !page.allowed.has(needed) {
            return None;
        }
        let base = match ram.main_has_page(page.base) {
            true => page.base | IN_RAM,
            false if page.base >> 20 == INTERRUPTS => return None,
            false => page.base,
        };
        Some(Page { base, ..page })
    }

    #[inline]
    fn first_stage(&self, cache: &Iotlb, ram: &Ram, iova: u64) -> Option<Page> {
        // In the cache only if this address was found to be canonical.
        let cached = cache.leaf_table(Of::Input, iova)?;
        let bits = ram.load((cached & !0xfff) + entry_offset(iova, 1))?;
        if !self.first.is(bits) {
            return None;
        }
        let entry = FirstStageEntry::from_bits(bits);
        let privileges = (
            self.sre.load(Ordering::Relaxed),
            self.wpe.load(Ordering::Relaxed),
        );
        let own = Allowed::first_stage(privileges, entry.rw(), entry.us(), entry.xd(), entry.d());
        Some(Page {
            base: entry.page(1).0,
            shift: level_shift(1),
            allowed: First::allowed_of(cached).and(own),
        })
    }

    #[inline]
    fn second_stage(&self, cache: &Iotlb, ram: &Ram, address: u64, of: Of) -> Option<Page> {
        let cached = cache.leaf_table(of, address)?;
        let bits = ram.load((cached & !0xfff) + entry_offset(address, 1))?;
        let entry = SecondStageEntry::from_bits(bits);
        if !self.second.is(bits) || !entry.is_present() {
            return None;
        }
        let dirty = entry.d() | !self.ad.load(Ordering::Relaxed);
        Some(Page {
            base: entry.page(1).0,
            shift: level_shift(1),
            allowed: Allowed::both(
                (cached & R != 0) & entry.r(),
                (cached & W != 0) & entry.w() & dirty,
            ),
        })
    }

    #[inline(never)]
    fn nested(&self, cache: &Iotlb, ram: &Ram, iova: u64) -> Option<Page> {
        let page = self.first_stage(cache, ram, iova)?;
        let outer = self.second_stage(cache, ram, page.base, Of::Second)?;
        Some(Page {
            allowed: outer.allowed.and(page.allowed),
            ..outer
        })
    }
}
