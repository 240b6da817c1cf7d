//! A port's own translation cache: an IOTLB with one table per page size, and paging-structure
//! caches above it.
//!
//! Only the owner of the port's [`Slot`](super::inflight::Slot) touches it, so a hit takes no
//! lock and shares no cache line with another thread; the atomics are there only because the
//! owner may be a different thread each time, and cost nothing. Invalidations reach it through
//! the target's generation: the owner catches up before it uses anything.
//!
//! Every entry carries an epoch. To forget everything is to begin the next epoch.

use std::hint::select_unpredictable;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::short::Leaves;
use super::tables::Ram;
use super::target::Space;
use super::walk::Allowed;

/// Bits of an entry's key that hold the epoch: those below a page.
const EPOCHS: u64 = 0xfff;

/// In a page's value: all of the page is in the largest region of RAM.
pub(super) const IN_RAM: u64 = Allowed::MASK + 1;

/// With more pages than this to forget, the whole cache is forgotten instead.
const PROBES: u64 = 64;

/// Two entries, the younger first.
#[derive(Default)]
#[repr(align(32))]
struct Set([Entry; 2]);

#[derive(Default)]
struct Entry {
    /// The address with the epoch in its low bits; epoch 0 is "never used".
    key: AtomicU64,
    value: AtomicU64,
}

impl Entry {
    fn has(&self, key: u64) -> bool {
        self.key.load(Ordering::Relaxed) == key
    }

    fn value(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }

    fn set(&self, key: u64, value: u64) {
        self.key.store(key, Ordering::Relaxed);
        self.value.store(value, Ordering::Relaxed);
    }
}

/// Where an address is in a table, when it is there.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    set: &'a [Entry; 2],
    key: u64,
}

impl Place<'_> {
    /// Which of the two entries it is, is chosen without a branch that would have to be guessed.
    #[inline]
    pub(super) fn get(self) -> Option<u64> {
        let [younger, older] = self.set;
        let (first, second) = (younger.has(self.key), older.has(self.key));
        let value = select_unpredictable(first, younger.value(), older.value());
        (first | second).then_some(value)
    }

    /// Puts a value where [`get`](Self::get) has just found none.
    #[inline]
    fn fill(self, value: u64) {
        let [younger, older] = self.set;
        older.set(younger.key.load(Ordering::Relaxed), younger.value());
        younger.set(self.key, value);
    }

    #[inline]
    fn put(self, value: u64) {
        let [younger, _] = self.set;
        if younger.has(self.key) {
            younger.set(self.key, value);
        } else {
            // Also when the older one has the key: it is in the set once.
            self.fill(value);
        }
    }
}

/// A set-associative table of 64-bit values, keyed by addresses of pages of 2^`SHIFT` bytes.
/// `SETS` is a power of two.
///
/// `RUNS` says what it is to hold: runs of neighbours, as many as there are entries, or pages from
/// all over.
struct Table<const SHIFT: u32, const SETS: usize, const RUNS: bool = false> {
    sets: Box<[Set; SETS]>,
}

impl<const SHIFT: u32, const SETS: usize, const RUNS: bool> Table<SHIFT, SETS, RUNS> {
    fn new() -> Self {
        Self {
            sets: Box::new(std::array::from_fn(|_| Set::default())),
        }
    }

    fn key(address: u64, epoch: u64) -> u64 {
        address >> SHIFT << SHIFT | epoch
    }

    fn set(&self, address: u64) -> &[Entry; 2] {
        let page = address >> SHIFT;
        let nth = if RUNS {
            // Neighbours are in sets side by side; runs as long as there are sets, and so buffers
            // at power-of-two distances, each begin elsewhere.
            page ^ page >> SETS.ilog2()
        } else {
            // Multiplied by 2^64 divided by the golden ratio, of which the top bits are taken:
            // neighbours are far apart, and so are buffers at power-of-two distances.
            page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - SETS.ilog2())
        };
        &self.sets[nth as usize % SETS].0
    }

    #[inline]
    fn place(&self, address: u64, epoch: u64) -> Place<'_> {
        Place {
            set: self.set(address),
            key: Self::key(address, epoch),
        }
    }

    #[inline]
    fn get(&self, address: u64, epoch: u64) -> Option<u64> {
        self.place(address, epoch).get()
    }

    #[inline]
    fn put(&self, address: u64, epoch: u64, value: u64) {
        self.place(address, epoch).put(value);
    }

    /// Pages of this table's size in `range`: few, the caller made sure.
    fn remove(&self, range: &RangeInclusive<u64>, epoch: u64) {
        for page in range.start() >> SHIFT..=range.end() >> SHIFT {
            let address = page << SHIFT;
            let key = Self::key(address, epoch);
            for entry in self.set(address).iter().filter(|entry| entry.has(key)) {
                entry.key.store(0, Ordering::Relaxed);
            }
        }
    }

    fn clear(&self) {
        for entry in self.sets.iter().flat_map(|set| &set.0) {
            entry.key.store(0, Ordering::Relaxed);
        }
    }
}

/// Which walk a cached paging structure shortens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Of {
    /// That of an address that the endpoint sends.
    Input,
    /// That of an address that a first stage put out.
    Second,
}

/// The tables of level 1 and 2 that translate an address: each spares a walk the levels above.
struct Structures {
    /// For 4 GiB: the miss that finds its table here reads one entry.
    level1: Table<21, 1024, true>,
    level2: Table<30, 64>,
}

impl Structures {
    fn new() -> Self {
        Self {
            level1: Table::new(),
            level2: Table::new(),
        }
    }

    fn clear(&self) {
        self.level1.clear();
        self.level2.clear();
    }
}

/// The caches of one port. See the module's text.
pub(super) struct Iotlb {
    epoch: AtomicU64,
    pages: Table<12, 1024>,
    pages_2m: Table<21, 64>,
    pages_1g: Table<30, 16>,
    /// Whether the last two have had an entry in this epoch: without, they are not looked at.
    has_large: AtomicBool,
    /// Of the endpoint's own table, by input address.
    input: Structures,
    /// Of the second stage under a first stage, by its own input.
    second: Structures,
    /// The space that all this is of, by its number; 0 is "of none".
    space: AtomicU64,
    /// How its leaf entries are read when their table is cached.
    leaves: Leaves,
}

impl Iotlb {
    pub(super) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            pages: Table::new(),
            pages_2m: Table::new(),
            pages_1g: Table::new(),
            has_large: AtomicBool::new(false),
            input: Structures::new(),
            second: Structures::new(),
            space: AtomicU64::new(0),
            leaves: Leaves::default(),
        }
    }

    /// To be called before a walk of `space` uses or fills the caches: what they hold of another
    /// is forgotten. (A port may see a new space before it sees that something changed.)
    pub(super) fn belongs_to(&self, space: &Space, haw: u8, has_pasid: bool) {
        if self.space.load(Ordering::Relaxed) != space.number {
            self.forget_all();
            self.space.store(space.number, Ordering::Relaxed);
            self.leaves.are_of(&space.translation, haw, has_pasid);
        }
    }

    #[inline]
    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// The value of the page of any size that holds `address`, with its size's shift.
    #[inline]
    pub(super) fn get(&self, address: u64) -> Option<(u64, u32)> {
        let epoch = self.epoch();
        if let Some(value) = self.pages.get(address, epoch) {
            return Some((value, 12));
        }
        if !self.has_large.load(Ordering::Relaxed) {
            return None;
        }
        let large = self.pages_2m.get(address, epoch).map(|value| (value, 21));
        large.or_else(|| Some((self.pages_1g.get(address, epoch)?, 30)))
    }

    /// Where the 4 KiB page that holds `address` is.
    #[inline]
    pub(super) fn place_4k(&self, address: u64) -> Place<'_> {
        self.pages.place(address, self.epoch())
    }

    /// The 4 KiB page that holds `iova`, which is not at its `place`: by a
    /// [short walk](super::short), if that decides it. Put into its place with its rights; the
    /// address that is returned does not wait for them.
    #[inline]
    pub(super) fn walk_short(
        &self,
        ram: &Ram,
        place: Place<'_>,
        iova: u64,
        needed: Allowed,
    ) -> Option<u64> {
        let page = self.leaves.walk(self, ram, iova, needed)?;
        place.fill(page.base | page.allowed.into_bits());
        Some(page.base)
    }

    /// Remembers the page of `shift` (12, 21 or 30) that holds `address`.
    #[inline]
    pub(super) fn put(&self, address: u64, shift: u32, value: u64) {
        let epoch = self.epoch();
        match shift {
            12 => return self.pages.put(address, epoch, value),
            21 => self.pages_2m.put(address, epoch, value),
            _ => self.pages_1g.put(address, epoch, value),
        }
        self.has_large.store(true, Ordering::Relaxed);
    }

    #[inline]
    fn structures(&self, of: Of) -> &Structures {
        match of {
            Of::Input => &self.input,
            Of::Second => &self.second,
        }
    }

    /// The lowest cached table (with flags of the caller's in its low 12 bits) that translates
    /// `address`, and its level.
    #[inline]
    pub(super) fn structure(&self, of: Of, address: u64) -> Option<(u8, u64)> {
        let (structures, epoch) = (self.structures(of), self.epoch());
        if let Some(table) = structures.level1.get(address, epoch) {
            return Some((1, table));
        }
        Some((2, structures.level2.get(address, epoch)?))
    }

    /// The cached table of level 1 that translates `address`, as [`structure`](Self::structure).
    #[inline]
    pub(super) fn leaf_table(&self, of: Of, address: u64) -> Option<u64> {
        self.structures(of).level1.get(address, self.epoch())
    }

    /// Remembers a table, when it is of a level that is worth it.
    #[inline]
    pub(super) fn put_structure(&self, of: Of, level: u8, address: u64, table: u64) {
        let (structures, epoch) = (self.structures(of), self.epoch());
        match level {
            1 => structures.level1.put(address, epoch, table),
            2 => structures.level2.put(address, epoch, table),
            _ => {}
        }
    }

    /// Forgets the pages that have an address in `range`, and unless only leaves changed, the
    /// tables that translate one.
    pub(super) fn forget(&self, range: &RangeInclusive<u64>, leaves_only: bool) {
        if (range.end() >> 12) - (range.start() >> 12) >= PROBES {
            return self.forget_all();
        }
        let epoch = self.epoch();
        self.pages.remove(range, epoch);
        self.pages_2m.remove(range, epoch);
        self.pages_1g.remove(range, epoch);
        if !leaves_only {
            self.input.level1.remove(range, epoch);
            self.input.level2.remove(range, epoch);
        }
    }

    /// Forgets everything, in O(1): 4094 times out of 4095 nothing but the epoch changes.
    pub(super) fn forget_all(&self) {
        let mut epoch = self.epoch() + 1;
        if epoch > EPOCHS {
            self.pages.clear();
            self.pages_2m.clear();
            self.pages_1g.clear();
            self.input.clear();
            self.second.clear();
            epoch = 1;
        }
        self.epoch.store(epoch, Ordering::Relaxed);
        self.has_large.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_size_is_found_from_any_address_inside() {
        let iotlb = Iotlb::new();
        iotlb.put(0x1000, 12, 0xa);
        iotlb.put(0x20_0000, 21, 0xb);
        iotlb.put(0x4000_0000, 30, 0xc);
        assert_eq!(iotlb.get(0x1fff), Some((0xa, 12)));
        assert_eq!(iotlb.get(0x3f_ffff), Some((0xb, 21)));
        assert_eq!(iotlb.get(0x7fff_ffff), Some((0xc, 30)));
        assert_eq!(iotlb.get(0x2000), None);
        assert_eq!(
            iotlb.get(0x1000 | 1 << 63),
            None,
            "the whole address counts"
        );
    }

    #[test]
    fn forgetting_one_page_leaves_the_others_and_takes_the_large_page_around_it() {
        let iotlb = Iotlb::new();
        for page in 1..8 {
            iotlb.put(page << 12, 12, page);
        }
        iotlb.put(0x20_0000, 21, 1);
        iotlb.put_structure(Of::Input, 1, 0, 2);
        iotlb.forget(&(0x3000..=0x3fff), true);
        assert_eq!(iotlb.get(0x3000), None);
        assert_eq!(iotlb.get(0x4000), Some((4, 12)));
        assert_eq!(iotlb.structure(Of::Input, 0), Some((1, 2)));
        iotlb.forget(&(0x23_4000..=0x23_4fff), false);
        assert_eq!(iotlb.get(0x20_0000), None);
        iotlb.forget(&(0x7000..=0x7000), false);
        assert_eq!(iotlb.structure(Of::Input, 0), None);
    }

    #[test]
    fn no_epoch_ever_shows_what_an_earlier_one_held() {
        let iotlb = Iotlb::new();
        for round in 1..3 * EPOCHS {
            assert_eq!(iotlb.get(0x5000), None, "round {round}");
            assert_eq!(iotlb.get(0x4000_0000), None, "round {round}");
            iotlb.put(0x5000, 12, round);
            iotlb.put(0x4000_0000, 30, round);
            assert_eq!(iotlb.get(0x5000), Some((round, 12)));
            iotlb.forget_all();
        }
    }

    #[test]
    fn a_full_set_replaces_and_never_mixes() {
        let iotlb = Iotlb::new();
        for page in 1..=100_000u64 {
            iotlb.put(page << 12, 12, page);
        }
        let mut found = 0;
        for page in 1..=100_000u64 {
            if let Some((value, _)) = iotlb.get(page << 12) {
                assert_eq!(value, page);
                found += 1;
            }
        }
        assert_eq!(found, 2048, "every entry is in use");
    }

    #[test]
    fn a_range_at_the_end_of_the_address_space_can_be_forgotten() {
        let iotlb = Iotlb::new();
        iotlb.put(u64::MAX, 12, 1);
        iotlb.forget(&(u64::MAX - 0xfff..=u64::MAX), true);
        assert_eq!(iotlb.get(u64::MAX), None);
        iotlb.put(u64::MAX, 12, 1);
        iotlb.forget(&(0..=u64::MAX), true);
        assert_eq!(iotlb.get(u64::MAX), None);
    }
}
