//! A port's own translation cache: an IOTLB with one table per page size, and paging-structure
//! caches above it.
//!
//! Only the owner of the port's [`Slot`](super::inflight::Slot) touches it, so a hit takes no
//! lock and shares no cache line with another thread; the atomics are there only because the
//! owner may be a different thread each time, and cost nothing. Invalidations reach it through
//! the target's generation: the owner catches up before it uses anything.
//!
//! Every entry carries an epoch. To forget everything is to begin the next epoch.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bits of an entry's key that hold the epoch: those below a page.
const EPOCHS: u64 = 0xfff;

/// With more pages than this to forget, the whole cache is forgotten instead.
const PROBES: u64 = 64;

const WAYS: usize = 4;

/// A set fills one cache line.
#[derive(Default)]
#[repr(align(64))]
struct Set([Entry; WAYS]);

#[derive(Default)]
struct Entry {
    /// The address with the epoch in its low bits; epoch 0 is "never used".
    key: AtomicU64,
    value: AtomicU64,
}

/// A set-associative table of 64-bit values, keyed by addresses of one page size.
struct Table {
    sets: Box<[Set]>,
    shift: u32,
    next_victim: AtomicU64,
}

impl Table {
    /// `sets` is a power of two.
    fn new(shift: u32, sets: usize) -> Self {
        Self {
            sets: (0..sets).map(|_| Set::default()).collect(),
            shift,
            next_victim: AtomicU64::new(0),
        }
    }

    fn key(&self, address: u64, epoch: u64) -> u64 {
        address >> self.shift << self.shift | epoch
    }

    fn set(&self, address: u64) -> &[Entry; WAYS] {
        let page = address >> self.shift;
        // Folded, so that buffers at large power-of-two distances do not share one set.
        let index = (page ^ page >> 9) as usize & (self.sets.len() - 1);
        &self.sets[index].0
    }

    fn get(&self, address: u64, epoch: u64) -> Option<u64> {
        let key = self.key(address, epoch);
        self.set(address)
            .iter()
            .find(|entry| entry.key.load(Ordering::Relaxed) == key)
            .map(|entry| entry.value.load(Ordering::Relaxed))
    }

    fn put(&self, address: u64, epoch: u64, value: u64) {
        let key = self.key(address, epoch);
        let set = self.set(address);
        let same = |entry: &&Entry| entry.key.load(Ordering::Relaxed) == key;
        let stale = |entry: &&Entry| entry.key.load(Ordering::Relaxed) & EPOCHS != epoch;
        let entry = set.iter().find(same).or_else(|| set.iter().find(stale));
        let entry = entry.unwrap_or_else(|| {
            let victim = self.next_victim.load(Ordering::Relaxed);
            self.next_victim
                .store(victim.wrapping_add(1), Ordering::Relaxed);
            &set[victim as usize % WAYS]
        });
        entry.key.store(key, Ordering::Relaxed);
        entry.value.store(value, Ordering::Relaxed);
    }

    fn pages(&self, range: &RangeInclusive<u64>) -> RangeInclusive<u64> {
        range.start() >> self.shift..=range.end() >> self.shift
    }

    fn remove(&self, range: &RangeInclusive<u64>, epoch: u64) {
        for page in self.pages(range) {
            let address = page << self.shift;
            let key = self.key(address, epoch);
            for entry in self.set(address) {
                if entry.key.load(Ordering::Relaxed) == key {
                    entry.key.store(0, Ordering::Relaxed);
                }
            }
        }
    }

    fn clear(&self) {
        for entry in self.sets.iter().flat_map(|set| &set.0) {
            entry.key.store(0, Ordering::Relaxed);
        }
    }
}

/// What a paging-structure cache is keyed by: the address whose walk it shortens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Structure {
    /// The table of level 1 or 2 of the endpoint's own (first) table.
    Input(u8),
    /// The table of level 1 or 2 of the second stage under a first stage.
    Second(u8),
}

/// The caches of one port. See the module's text.
pub(super) struct Iotlb {
    epoch: AtomicU64,
    pages: Table,
    /// 2 MiB and 1 GiB pages.
    large: [Table; 2],
    /// Whether `large` has had an entry in this epoch: without, they are not looked at.
    has_large: [AtomicBool; 2],
    /// Tables of level 1 and 2, by input address.
    input: [Table; 2],
    /// Tables of level 1 and 2 of the second stage, by its input.
    second: [Table; 2],
}

impl Iotlb {
    pub(super) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            pages: Table::new(12, 256),
            large: [Table::new(21, 64), Table::new(30, 16)],
            has_large: Default::default(),
            input: [Table::new(21, 64), Table::new(30, 32)],
            second: [Table::new(21, 64), Table::new(30, 32)],
        }
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// The value of the page of any size that holds `address`, with its size's shift.
    #[inline]
    pub(super) fn get(&self, address: u64) -> Option<(u64, u32)> {
        let epoch = self.epoch();
        if let Some(value) = self.pages.get(address, epoch) {
            return Some((value, self.pages.shift));
        }
        self.get_large(address, epoch)
    }

    fn get_large(&self, address: u64, epoch: u64) -> Option<(u64, u32)> {
        let tables = self.large.iter().zip(&self.has_large);
        tables
            .filter(|(_, used)| used.load(Ordering::Relaxed))
            .find_map(|(table, _)| Some((table.get(address, epoch)?, table.shift)))
    }

    /// Remembers the page of `shift` (12, 21 or 30) that holds `address`.
    pub(super) fn put(&self, address: u64, shift: u32, value: u64) {
        let epoch = self.epoch();
        match shift {
            21 | 30 => {
                let which = usize::from(shift == 30);
                self.large[which].put(address, epoch, value);
                self.has_large[which].store(true, Ordering::Relaxed);
            }
            _ => self.pages.put(address, epoch, value),
        }
    }

    fn structures(&self, structure: Structure) -> &Table {
        match structure {
            Structure::Input(level) => &self.input[usize::from(level == 2)],
            Structure::Second(level) => &self.second[usize::from(level == 2)],
        }
    }

    /// The cached table (with flags of the caller's in its low 12 bits) that translates `address`.
    pub(super) fn structure(&self, structure: Structure, address: u64) -> Option<u64> {
        self.structures(structure).get(address, self.epoch())
    }

    /// Remembers a table.
    pub(super) fn put_structure(&self, structure: Structure, address: u64, value: u64) {
        self.structures(structure).put(address, self.epoch(), value);
    }

    /// Forgets the pages that have an address in `range`, and unless only leaves changed, the
    /// tables that translate one.
    pub(super) fn forget(&self, range: &RangeInclusive<u64>, leaves_only: bool) {
        let pages = self.pages.pages(range);
        if pages.end() - pages.start() >= PROBES {
            return self.forget_all();
        }
        let epoch = self.epoch();
        self.pages.remove(range, epoch);
        for table in &self.large {
            table.remove(range, epoch);
        }
        if !leaves_only {
            for table in &self.input {
                table.remove(range, epoch);
            }
        }
    }

    /// Forgets everything, in O(1): 4094 times out of 4095 nothing but the epoch changes.
    pub(super) fn forget_all(&self) {
        let mut epoch = self.epoch() + 1;
        if epoch > EPOCHS {
            let tables = [&self.pages].into_iter();
            let tables = tables.chain(&self.large).chain(&self.input);
            tables.chain(&self.second).for_each(Table::clear);
            epoch = 1;
        }
        self.epoch.store(epoch, Ordering::Relaxed);
        for used in &self.has_large {
            used.store(false, Ordering::Relaxed);
        }
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
        for page in 0..8 {
            iotlb.put(page << 12, 12, page);
        }
        iotlb.put(0x20_0000, 21, 1);
        iotlb.put_structure(Structure::Input(1), 0, 2);
        iotlb.forget(&(0x3000..=0x3fff), true);
        assert_eq!(iotlb.get(0x3000), None);
        assert_eq!(iotlb.get(0x4000), Some((4, 12)));
        assert_eq!(iotlb.structure(Structure::Input(1), 0), Some(2));
        iotlb.forget(&(0x23_4000..=0x23_4fff), false);
        assert_eq!(iotlb.get(0x20_0000), None);
        iotlb.forget(&(0x7000..=0x7000), false);
        assert_eq!(iotlb.structure(Structure::Input(1), 0), None);
    }

    #[test]
    fn no_epoch_ever_shows_what_an_earlier_one_held() {
        let iotlb = Iotlb::new();
        for round in 0..3 * EPOCHS {
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
        for page in 0..100_000u64 {
            iotlb.put(page << 12, 12, page);
        }
        let mut found = 0;
        for page in 0..100_000u64 {
            if let Some((value, _)) = iotlb.get(page << 12) {
                assert_eq!(value, page);
                found += 1;
            }
        }
        assert_eq!(found, 1024, "every entry is in use");
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
