//! The mappings of one domain: an ordered store of 16 bytes per mapping.
//!
//! x86 allows a start of 45 bits (57-bit virtual addresses in 4 KiB pages), a length of 40 bits
//! and a target of 40 bits (52-bit physical addresses), which with three flags are 128 bits. So a
//! mapping *is* two words, and the store is one level of a B+ tree: leaves of up to
//! `LEAF` mappings, and a directory from a leaf's lower bound to the leaf. MAP and UNMAP of one
//! mapping are O(log n); a wide UNMAP costs what it removes. Work close to the last work (the
//! pages of one buffer) finds its leaf without the directory.

use std::collections::BTreeMap;

use crate::backend::{Access, Mapping};
use crate::{Gpa, Iova};

/// Bits of a byte offset in a page, the granularity of mappings.
pub const PAGE_SHIFT: u32 = 12;
/// Bits of a virtual address; mappings end below.
pub const IOVA_BITS: u32 = 57;
/// Bits of a guest-physical address; what is mapped to ends below.
pub const GPA_BITS: u32 = 52;

/// Mappings in a full leaf: 1 KiB.
const LEAF: usize = 64;
/// Neighbouring leaves become one when that has room for some more mappings.
const MERGED: usize = LEAF - 8;

/// Leaves whose room is kept for the next, at least; and for each of so many leaves there are.
const ROOMS: usize = 4;
const LEAVES_PER_ROOM: usize = 8;
/// No more than that: as many as the requests that come together can split.
const MOST_ROOMS: usize = 256;

const LENGTH_LOW: u32 = 21;
const LENGTH_HIGH: u32 = 19;
const READ: u64 = 1;
const WRITE: u64 = 2;
const MMIO: u64 = 4;

/// One mapping, in pages.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// First page (45 bits), upper part of the length less one (19 bits).
    key: u64,
    /// Lower part of the length less one (21 bits), target page (40 bits), flags (3 bits).
    value: u64,
}

impl Entry {
    fn new(m: &Mapping) -> Self {
        let more = (m.length >> PAGE_SHIFT) - 1;
        let mut flags = 0;
        for (set, bit) in [
            (m.access.read, READ),
            (m.access.write, WRITE),
            (m.mmio, MMIO),
        ] {
            flags |= if set { bit } else { 0 };
        }
        Self {
            key: m.iova.0 >> PAGE_SHIFT << LENGTH_HIGH | more >> LENGTH_LOW,
            value: more << (64 - LENGTH_LOW) | m.gpa.0 >> PAGE_SHIFT << 3 | flags,
        }
    }

    /// First page.
    fn page(self) -> u64 {
        self.key >> LENGTH_HIGH
    }

    /// Pages less one.
    fn more(self) -> u64 {
        (self.key & ((1 << LENGTH_HIGH) - 1)) << LENGTH_LOW | self.value >> (64 - LENGTH_LOW)
    }

    /// First address.
    fn first(self) -> u64 {
        self.page() << PAGE_SHIFT
    }

    /// Last address.
    fn last(self) -> u64 {
        self.first() + self.length() - 1
    }

    /// Bytes.
    fn length(self) -> u64 {
        (self.more() + 1) << PAGE_SHIFT
    }

    fn mapping(self) -> Mapping {
        Mapping {
            iova: Iova(self.first()),
            gpa: Gpa((self.value & ((1 << (64 - LENGTH_LOW)) - 1)) >> 3 << PAGE_SHIFT),
            length: self.length(),
            access: Access {
                read: self.value & READ != 0,
                write: self.value & WRITE != 0,
            },
            mmio: self.value & MMIO != 0,
        }
    }
}

/// No leaf.
const NONE: u32 = u32::MAX;

/// The mappings whose first page is in `from..to`, ascending.
#[derive(Debug)]
struct Leaf {
    from: u64,
    to: u64,
    /// The leaves before and behind this one.
    left: u32,
    right: u32,
    entries: Vec<Entry>,
}

impl Default for Leaf {
    fn default() -> Self {
        Self {
            from: 0,
            to: 0,
            left: NONE,
            right: NONE,
            entries: Vec::new(),
        }
    }
}

impl Leaf {
    fn holds(&self, page: u64) -> bool {
        self.from <= page && page < self.to
    }

    /// How many entries begin before `page`.
    fn before(&self, page: u64) -> usize {
        let limit = page.saturating_mul(1 << LENGTH_HIGH);
        self.entries.partition_point(|e| e.key < limit)
    }

    /// As [`before`](Self::before), and quick when that is `likely`.
    #[inline]
    fn before_likely(&self, page: u64, likely: usize) -> usize {
        let limit = page.saturating_mul(1 << LENGTH_HIGH);
        if let Some((below, above)) = self.entries.split_at_checked(likely)
            && below.last().is_none_or(|e| e.key < limit)
            && above.first().is_none_or(|e| e.key >= limit)
        {
            return likely;
        }
        self.before(page)
    }
}

/// A mapping exists in the range that was to be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Overlap;

/// A mapping reaches out of the range that was to be unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Split;

/// What an unmap removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Removed {
    /// Mappings.
    pub mappings: usize,
    /// Bytes.
    pub bytes: u64,
}

/// The store. See the module's text.
///
/// No leaf is empty unless it is the only one, and together the leaves cover all pages.
#[derive(Debug, Default)]
pub struct Mappings {
    directory: BTreeMap<u64, usize>,
    leaves: Vec<Leaf>,
    /// Leaves not in use; their room is freed or in `rooms`.
    spare: Vec<usize>,
    /// Room for the entries of a few leaves, so that work at a bound between two leaves does not
    /// allocate each time.
    rooms: Vec<Vec<Entry>>,
    /// The leaf that was used last, and the place in it where a neighbour would be.
    finger: usize,
    likely: usize,
    len: usize,
    bytes: u64,
}

impl Mappings {
    /// How many mappings there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All mappings, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Mapping> {
        self.directory
            .values()
            .flat_map(|&leaf| self.leaves[leaf].entries.iter().map(|e| e.mapping()))
    }

    /// Whether a mapping has an address of `first..=last`.
    pub fn any_in(&self, first: u64, last: u64) -> bool {
        self.last_at(last).is_some_and(|e| e.last() >= first)
    }

    /// Whether every mapping that has an address of `first..=last` is `right`.
    pub fn all_in(&self, first: u64, last: u64, right: impl Fn(&Mapping) -> bool) -> bool {
        let mut end = Some(last);
        while let Some(entry) = end.and_then(|end| self.last_at(end))
            && entry.last() >= first
        {
            if !right(&entry.mapping()) {
                return false;
            }
            end = entry.first().checked_sub(1);
        }
        true
    }

    /// Adds a mapping: page-aligned, not empty, within [`IOVA_BITS`] and [`GPA_BITS`].
    ///
    /// # Errors
    /// [`Overlap`]; nothing is changed then.
    pub fn insert(&mut self, mapping: &Mapping) -> Result<(), Overlap> {
        debug_assert!(mapping.length > 0 && mapping.length >> GPA_BITS <= 1);
        debug_assert!((mapping.iova.0 + mapping.length - 1) >> IOVA_BITS == 0);
        debug_assert!((mapping.gpa.0 + mapping.length - 1) >> GPA_BITS == 0);
        let entry = Entry::new(mapping);
        if self.leaves.is_empty() {
            let first = self.add_leaf((0, u64::MAX), (NONE, NONE));
            self.directory.insert(0, first);
        }
        let at_leaf = self.seek(entry.page());
        let leaf = &self.leaves[at_leaf];
        let at = leaf.before_likely(entry.page(), self.likely);
        let next = match leaf.entries.get(at) {
            Some(&next) => Some(next),
            None if entry.last() >> PAGE_SHIFT < leaf.to => None,
            None => self.first_of(leaf.right),
        };
        let previous = match at.checked_sub(1) {
            Some(at) => Some(leaf.entries[at]),
            None => self.last_of(leaf.left),
        };
        if next.is_some_and(|e| e.first() <= entry.last())
            || previous.is_some_and(|e| e.last() >= entry.first())
        {
            return Err(Overlap);
        }
        self.len += 1;
        self.bytes += mapping.length;
        self.likely = at + 1;
        if leaf.entries.len() < LEAF {
            self.leaves[at_leaf].entries.insert(at, entry);
        } else {
            self.insert_into_full(at_leaf, at, entry);
        }
        Ok(())
    }

    /// Removes all mappings in `first..=last`, any addresses.
    ///
    /// # Errors
    /// [`Split`] when a mapping is only partly in the range; nothing is changed then.
    pub fn remove(&mut self, first: u64, last: u64) -> Result<Removed, Split> {
        self.remove_some(first, last, usize::MAX)
            .map(|(removed, _)| removed)
    }

    /// As [`remove`](Self::remove), but for about `most` mappings (a whole leaf of them more at
    /// most), from the lowest on. With them: where to go on, when there are more. What is checked
    /// is the whole range.
    ///
    /// # Errors
    /// As of [`remove`](Self::remove).
    pub fn remove_some(
        &mut self,
        first: u64,
        last: u64,
        most: usize,
    ) -> Result<(Removed, Option<u64>), Split> {
        let mut removed = Removed::default();
        if self.leaves.is_empty() || last < first {
            return Ok((removed, None));
        }
        // Only the mappings at both ends can reach out.
        let mut from = first.div_ceil(1 << PAGE_SHIFT);
        let at_leaf = self.seek(from);
        let leaf = &self.leaves[at_leaf];
        let at = leaf.before_likely(from, self.likely);
        let previous = match at.checked_sub(1) {
            Some(at) => Some(leaf.entries[at]),
            None => self.last_of(leaf.left),
        };
        if previous.is_some_and(|e| e.last() >= first) {
            return Err(Split);
        }
        // The common case: exactly one mapping, as it was made.
        if let Some(&entry) = leaf.entries.get(at)
            && (entry.first(), entry.last()) == (first, last)
        {
            let had = leaf.entries.len();
            self.leaves[at_leaf].entries.remove(at);
            self.likely = at;
            self.settle(at_leaf, had);
            self.len -= 1;
            self.bytes -= entry.length();
            removed.mappings = 1;
            removed.bytes = entry.length();
            return Ok((removed, None));
        }
        let end = match self.last_at(last) {
            Some(e) if e.first() < first => return Ok((removed, None)),
            Some(e) if e.last() > last => return Err(Split),
            Some(e) => e.page(),
            None => return Ok((removed, None)),
        };
        let rest = loop {
            let at_leaf = self.seek(from);
            let leaf = &mut self.leaves[at_leaf];
            let (low, high) = (leaf.before(from), leaf.before(end + 1));
            let had = leaf.entries.len();
            let mut reached = 0;
            for entry in leaf.entries.drain(low..high) {
                removed.bytes += entry.length();
                reached = entry.last() + 1;
            }
            removed.mappings += high - low;
            let next = leaf.to;
            self.settle(at_leaf, had);
            if next > end {
                break None;
            }
            from = next;
            if removed.mappings >= most {
                // A mapping may reach into the addresses of the next leaf.
                break Some(reached.max(from << PAGE_SHIFT));
            }
        };
        self.len -= removed.mappings;
        self.bytes -= removed.bytes;
        Ok((removed, rest))
    }

    /// The leaf that `page` belongs to. There is one.
    fn find(&self, page: u64) -> usize {
        match self.leaves.get(self.finger) {
            Some(leaf) if leaf.holds(page) => self.finger,
            _ => self
                .directory
                .range(..=page)
                .next_back()
                .map_or(0, |(_, &leaf)| leaf),
        }
    }

    /// As [`find`](Self::find), and remembers it.
    fn seek(&mut self, page: u64) -> usize {
        self.finger = self.find(page);
        self.finger
    }

    /// The last mapping that begins at or before `address`.
    fn last_at(&self, address: u64) -> Option<Entry> {
        let page = address >> PAGE_SHIFT;
        let leaf = self.leaves.get(self.find(page))?;
        match leaf.before(page + 1).checked_sub(1) {
            Some(at) => Some(leaf.entries[at]),
            None => self.last_of(leaf.left),
        }
    }

    fn last_of(&self, leaf: u32) -> Option<Entry> {
        self.leaves.get(leaf as usize)?.entries.last().copied()
    }

    fn first_of(&self, leaf: u32) -> Option<Entry> {
        self.leaves.get(leaf as usize)?.entries.first().copied()
    }

    /// A new leaf between two, which is still to be put into the directory.
    fn add_leaf(&mut self, (from, to): (u64, u64), (left, right): (u32, u32)) -> usize {
        let room = self.rooms.pop();
        let leaf = Leaf {
            from,
            to,
            left,
            right,
            entries: room.unwrap_or_else(|| Vec::with_capacity(LEAF)),
        };
        let at = match self.spare.pop() {
            Some(at) => {
                self.leaves[at] = leaf;
                at
            }
            None => {
                self.leaves.push(leaf);
                self.leaves.len() - 1
            }
        };
        self.link(left, at as u32);
        self.link(at as u32, right);
        at
    }

    /// Makes two leaves neighbours; one of them may be [`NONE`].
    fn link(&mut self, left: u32, right: u32) {
        if let Some(leaf) = self.leaves.get_mut(left as usize) {
            leaf.right = right;
        }
        if let Some(leaf) = self.leaves.get_mut(right as usize) {
            leaf.left = left;
        }
    }

    /// Makes room in a full leaf and inserts. At its ends a new leaf is begun, so that ascending
    /// and descending mappings leave full leaves behind; elsewhere the next leaf takes some, or a
    /// new one half.
    fn insert_into_full(&mut self, at_leaf: usize, at: usize, entry: Entry) {
        let leaf = &mut self.leaves[at_leaf];
        let (from, to) = (leaf.from, leaf.to);
        let (before, this, behind) = (leaf.left, at_leaf as u32, leaf.right);
        if at == 0 {
            let bound = leaf.entries[0].page();
            leaf.from = bound;
            self.directory.insert(bound, at_leaf);
            self.finger = self.add_leaf((from, bound), (before, this));
            self.directory.insert(from, self.finger);
            self.leaves[self.finger].entries.push(entry);
            return;
        }
        if at == LEAF {
            leaf.to = entry.page();
            self.finger = self.add_leaf((entry.page(), to), (this, behind));
            self.likely = 1;
            self.directory.insert(entry.page(), self.finger);
            self.leaves[self.finger].entries.push(entry);
            return;
        }
        let next = self.leaves.get(behind as usize);
        let right = match next.is_some_and(|next| next.entries.len() <= LEAF * 3 / 4) {
            true => {
                self.directory.remove(&to);
                behind as usize
            }
            false => self.add_leaf((to, to), (this, behind)),
        };
        let Ok([left, right_leaf]) = self.leaves.get_disjoint_mut([at_leaf, right]) else {
            return;
        };
        let both = left.entries.len() + right_leaf.entries.len();
        let bound = left.entries[both / 2].page();
        right_leaf
            .entries
            .splice(..0, left.entries.drain(both / 2..));
        left.to = bound;
        right_leaf.from = bound;
        if entry.page() < bound {
            left.entries.insert(at, entry);
        } else {
            right_leaf.entries.insert(at - left.entries.len(), entry);
            self.finger = right;
        }
        self.directory.insert(bound, right);
    }

    /// After a removal from a leaf that had `had` mappings: joins it with a neighbour when both
    /// fit in one. Looked at once per eight mappings removed, since it costs a search.
    fn settle(&mut self, at_leaf: usize, had: usize) {
        let leaf = &self.leaves[at_leaf];
        let (has, left, right) = (leaf.entries.len(), leaf.left, leaf.right);
        if has > LEAF / 2 || (has > 0 && had / 8 == has / 8) {
            return;
        }
        let fits = |other: u32| {
            let other = self.leaves.get(other as usize);
            other.is_some_and(|other| has == 0 || has + other.entries.len() <= MERGED)
        };
        if fits(left) {
            self.join(left as usize, at_leaf);
        } else if fits(right) {
            self.join(at_leaf, right as usize);
        }
    }

    fn join(&mut self, left: usize, right: usize) {
        let mut gone = std::mem::take(&mut self.leaves[right]);
        self.directory.remove(&gone.from);
        self.spare.push(right);
        let leaf = &mut self.leaves[left];
        // The place of what was removed from the right one, now here.
        if self.finger == right {
            self.likely += leaf.entries.len();
        }
        leaf.entries.extend_from_slice(&gone.entries);
        leaf.to = gone.to;
        self.link(left as u32, gone.right);
        self.finger = left;
        let rooms = (self.directory.len() / LEAVES_PER_ROOM).clamp(ROOMS, MOST_ROOMS);
        self.rooms.truncate(rooms);
        if self.rooms.len() < rooms {
            gone.entries.clear();
            self.rooms.push(gone.entries);
        }
        if self.directory.len() == 1 && self.leaves.len() > LEAF {
            // After many mappings, nothing is kept of them.
            let only = std::mem::take(&mut self.leaves[left]);
            self.directory.insert(only.from, 0);
            self.leaves = vec![only];
            self.spare = Vec::new();
            self.finger = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = 1 << PAGE_SHIFT;

    fn pages(first: u64, count: u64) -> Mapping {
        Mapping {
            iova: Iova(first * PAGE),
            gpa: Gpa((first * 7 + 3) % (1 << 30) * PAGE),
            length: count * PAGE,
            access: Access {
                read: first.is_multiple_of(2),
                write: first.is_multiple_of(3),
            },
            mmio: first.is_multiple_of(5),
        }
    }

    /// What every operation must keep.
    fn check(store: &Mappings) {
        let all: Vec<_> = store.iter().collect();
        assert_eq!(all.len(), store.len());
        assert_eq!(all.iter().map(|m| m.length).sum::<u64>(), store.bytes());
        for pair in all.windows(2) {
            assert!(pair[0].iova.0 + pair[0].length <= pair[1].iova.0);
        }
        let mut from = 0;
        let mut before = NONE;
        for (&key, &at) in &store.directory {
            let leaf = &store.leaves[at];
            assert_eq!(leaf.left, before);
            before = at as u32;
            assert_eq!(store.directory.contains_key(&leaf.to), leaf.right != NONE);
            assert!(leaf.right == NONE || store.leaves[leaf.right as usize].left == before);
            assert_eq!((key, key), (from, leaf.from));
            assert!(leaf.entries.iter().all(|e| leaf.holds(e.page())));
            assert!(!leaf.entries.is_empty() || store.directory.len() == 1);
            assert!(leaf.entries.len() <= LEAF && leaf.entries.capacity() <= LEAF);
            from = leaf.to;
        }
        assert!(store.directory.is_empty() || from == u64::MAX);
        assert_eq!(
            store.leaves.len(),
            store.directory.len() + store.spare.len()
        );
    }

    #[test]
    fn a_mapping_with_its_key_is_16_bytes() {
        assert_eq!(size_of::<Entry>(), 16);
    }

    #[test]
    fn the_largest_values_of_all_fields_are_kept() {
        let largest = Mapping {
            iova: Iova((1 << 57) - (1 << 52)),
            gpa: Gpa(0),
            length: 1 << 52,
            access: Access::READ_WRITE,
            mmio: true,
        };
        let highest = Mapping {
            iova: Iova((1 << 57) - PAGE),
            gpa: Gpa((1 << 52) - PAGE),
            length: PAGE,
            access: Access::default(),
            mmio: false,
        };
        for mapping in [largest, highest] {
            let mut store = Mappings::default();
            store.insert(&mapping).unwrap();
            assert_eq!(store.iter().collect::<Vec<_>>(), [mapping]);
            assert!(store.any_in(mapping.iova.0, u64::MAX));
            store.remove(0, u64::MAX).unwrap();
            check(&store);
        }
    }

    #[test]
    fn ascending_and_descending_mappings_fill_their_leaves() {
        for descending in [false, true] {
            let mut store = Mappings::default();
            for n in 0..10_000 {
                let page = if descending { 10_000 - n } else { n };
                store.insert(&pages(page, 1)).unwrap();
            }
            check(&store);
            assert!(store.directory.len() <= 10_000 / LEAF + 1);
        }
    }

    #[test]
    fn leaves_stay_filled_after_churn_and_nothing_is_left_after_removal() {
        let mut store = Mappings::default();
        let mut random = 1u64;
        let mut next = || {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            random >> 33
        };
        for _ in 0..200_000 {
            let page = next() % 40_000;
            if store.insert(&pages(page, 1)).is_err() {
                store.remove(page * PAGE, page * PAGE + PAGE - 1).unwrap();
            }
        }
        check(&store);
        assert!(
            store.directory.len() <= store.len() / (LEAF / 2),
            "less than half full"
        );
        store.remove(0, u64::MAX).unwrap();
        check(&store);
        assert_eq!(
            (store.len(), store.bytes(), store.directory.len()),
            (0, 0, 1)
        );
    }

    #[test]
    fn a_wide_removal_can_be_done_in_steps_and_is_checked_before_the_first() {
        let mut store = Mappings::default();
        for page in 0..1000 {
            store.insert(&pages(page * 2, 2)).unwrap();
        }
        let (first, last) = (100 * PAGE, 1500 * PAGE - 1);
        assert!(store.remove_some(first, last + PAGE, 100).is_err());
        assert_eq!(store.len(), 1000);
        let (mut from, mut steps, mut removed) = (Some(first), 0, 0);
        while let Some(first) = from {
            let (some, rest) = store.remove_some(first, last, 100).unwrap();
            assert!(some.mappings < 100 + LEAF);
            removed += some.mappings;
            assert!(
                rest.is_none_or(|rest| rest % (2 * PAGE) == 0),
                "between mappings"
            );
            from = rest;
            steps += 1;
            check(&store);
        }
        assert_eq!((removed, store.len()), (700, 300));
        assert!(steps > 4, "{steps}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Map(u64, u64),
        Unmap(u64, u64),
        UnmapOne(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0u64..3000, 1u64..4).prop_map(|(f, n)| Step::Map(f, n)),
            1 => (0u64..3000, 1u64..300).prop_map(|(f, n)| Step::Map(f, n)),
            2 => (0u64..3000 * PAGE, 0u64..200 * PAGE).prop_map(|(f, n)| Step::Unmap(f, f + n)),
            1 => (0u64..3000, 0u64..3000)
                .prop_map(|(f, n)| Step::Unmap(f * PAGE, (f + n) * PAGE + PAGE - 1)),
            3 => any::<usize>().prop_map(Step::UnmapOne),
        ];
        prop::collection::vec(step, 0..800)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_store_behaves_as_a_plain_list(steps in steps()) {
            let mut store = Mappings::default();
            let mut model: BTreeMap<u64, Mapping> = BTreeMap::new();
            let last = |m: &Mapping| m.iova.0 + m.length - 1;
            for step in steps {
                match step {
                    Step::Map(page, count) => {
                        let new = pages(page, count);
                        let free = model.values().all(|m| last(m) < new.iova.0 || m.iova.0 > last(&new));
                        prop_assert_eq!(store.any_in(new.iova.0, last(&new)), !free);
                        prop_assert_eq!(store.all_in(new.iova.0, last(&new), |_| false), free);
                        let in_model = |m: &Mapping| model.get(&(m.iova.0 / PAGE)) == Some(m);
                        prop_assert!(store.all_in(new.iova.0, last(&new), in_model));
                        prop_assert_eq!(store.insert(&new).is_ok(), free);
                        if free {
                            model.insert(page, new);
                        }
                    }
                    Step::Unmap(from, to) => unmap(&mut store, &mut model, from, to)?,
                    Step::UnmapOne(n) => {
                        if let Some(m) = model.values().nth(n % model.len().max(1)).copied() {
                            unmap(&mut store, &mut model, m.iova.0, last(&m))?;
                        }
                    }
                }
            }
            check(&store);
            prop_assert!(store.iter().eq(model.values().copied()));
        }
    }

    fn unmap(
        store: &mut Mappings,
        model: &mut BTreeMap<u64, Mapping>,
        from: u64,
        to: u64,
    ) -> Result<(), TestCaseError> {
        let last = |m: &Mapping| m.iova.0 + m.length - 1;
        let hit: Vec<_> = model
            .iter()
            .filter(|(_, m)| m.iova.0 <= to && last(m) >= from)
            .map(|(&page, &m)| (page, m))
            .collect();
        let whole = hit.iter().all(|(_, m)| m.iova.0 >= from && last(m) <= to);
        let expected = whole.then(|| Removed {
            mappings: hit.len(),
            bytes: hit.iter().map(|(_, m)| m.length).sum(),
        });
        prop_assert_eq!(store.remove(from, to).ok(), expected);
        if whole {
            for (page, _) in hit {
                model.remove(&page);
            }
        }
        Ok(())
    }
}
