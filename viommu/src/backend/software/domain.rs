//! A domain: mappings that the front end keeps here, by IOVA.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::backend::{Access, Mapping, Refused};
use crate::{Gpa, Iova};

/// Mappings that never overlap. `map`, `unmap` and `find` take O(log n); `unmap` also what it
/// removes.
#[derive(Debug, Default)]
pub(super) struct Mappings {
    /// By first IOVA.
    by_iova: BTreeMap<u64, To>,
}

/// The rest of a mapping. 24 bytes: a guest decides how many there are.
#[derive(Clone, Copy, Debug)]
struct To {
    /// Last IOVA.
    last: u64,
    gpa: u64,
    access: Access,
    mmio: bool,
}

impl Mappings {
    pub(super) fn len(&self) -> usize {
        self.by_iova.len()
    }

    /// The mapping that holds `iova`.
    pub(super) fn find(&self, iova: u64) -> Option<Mapping> {
        let (&first, to) = self.by_iova.range(..=iova).next_back()?;
        (iova <= to.last).then(|| Mapping {
            iova: Iova(first),
            gpa: Gpa(to.gpa),
            // A mapping of all 2^64 bytes cannot be asked for: its length has no number.
            length: to.last - first + 1,
            access: to.access,
            mmio: to.mmio,
        })
    }

    /// Adds all of `mappings`, or none.
    ///
    /// # Errors
    /// [`Refused::Overlap`] with what is there or among themselves, or [`Refused::NoRoom`].
    pub(super) fn map(&mut self, mappings: &[Mapping], limit: usize) -> Result<(), Refused> {
        if mappings.len() > limit.saturating_sub(self.len()) {
            return Err(Refused::NoRoom {
                what: "mapping",
                limit: limit as u64,
            });
        }
        for (added, mapping) in mappings.iter().enumerate() {
            let first = mapping.iova.0;
            let last = first.checked_add(mapping.length.wrapping_sub(1));
            let free = |last: &u64| {
                let below = self.by_iova.range(..=last).next_back();
                *last >= first && below.is_none_or(|(_, to)| to.last < first)
            };
            let Some(last) = last.filter(free) else {
                for mapping in &mappings[..added] {
                    self.by_iova.remove(&mapping.iova.0);
                }
                return Err(Refused::Overlap {
                    iova: mapping.iova,
                    length: mapping.length,
                });
            };
            let to = To {
                last,
                gpa: mapping.gpa.0,
                access: mapping.access,
                mmio: mapping.mmio,
            };
            self.by_iova.insert(first, to);
        }
        Ok(())
    }

    /// Removes mappings that lie inside `range`, at most `most` of them, from its start. Returns
    /// what was removed: the bytes and the range from the first to the last; `None` when nothing
    /// is left to remove.
    pub(super) fn unmap(
        &mut self,
        range: &RangeInclusive<u64>,
        most: usize,
    ) -> Option<(u64, RangeInclusive<u64>)> {
        if range.is_empty() {
            return None;
        }
        // Only the last mapping that starts inside can reach out of the range: they do not overlap.
        let mut removed: Option<(u64, RangeInclusive<u64>)> = None;
        let inside = |_: &u64, to: &mut To| to.last <= *range.end();
        let gone = self.by_iova.extract_if(range.clone(), inside);
        for (first, To { last, .. }) in gone.take(most) {
            let (bytes, all) = removed.unwrap_or((0, first..=last));
            removed = Some((bytes + (last - first + 1), *all.start()..=last));
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mapping(page: u64, pages: u64) -> Mapping {
        Mapping {
            iova: Iova(page << 12),
            gpa: Gpa((page + 7) << 12),
            length: pages << 12,
            access: Access::READ_WRITE,
            mmio: false,
        }
    }

    #[test]
    fn the_last_page_of_the_address_space_can_be_mapped_and_unmapped() {
        let mut mappings = Mappings::default();
        let top = mapping((1 << 52) - 1, 1);
        mappings.map(&[top], 10).unwrap();
        assert_eq!(mappings.find(u64::MAX), Some(top));
        let (bytes, range) = mappings.unmap(&(0..=u64::MAX), 10).unwrap();
        assert_eq!((bytes, range), (4096, u64::MAX - 4095..=u64::MAX));
        assert_eq!(mappings.find(u64::MAX), None);
    }

    #[test]
    fn the_limit_holds_and_is_named() {
        let mut mappings = Mappings::default();
        mappings.map(&[mapping(0, 1), mapping(1, 1)], 2).unwrap();
        let refused = mappings.map(&[mapping(2, 1)], 2).unwrap_err();
        assert!(refused.to_string().contains("limit is 2"), "{refused}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Map(Vec<(u64, u64)>),
        Unmap(u64, u64, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            prop::collection::vec((0u64..48, 1u64..6), 1..4).prop_map(Step::Map),
            (0u64..48, 0u64..48, 1usize..5).prop_map(|(a, b, most)| Step::Unmap(a, b, most)),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        /// Against the plainest model: one cell per page that says which mapping holds it.
        #[test]
        fn the_store_agrees_with_a_page_array(steps in steps()) {
            let mut store = Mappings::default();
            let mut model: Vec<Option<(u64, u64)>> = vec![None; 64];
            for step in steps {
                match step {
                    Step::Map(wanted) => {
                        let mut next = model.clone();
                        let fits = wanted.iter().all(|&(page, pages)| {
                            let cells = &mut next[page as usize..(page + pages) as usize];
                            let free = cells.iter().all(Option::is_none);
                            cells.fill(Some((page, pages)));
                            free
                        });
                        let mappings: Vec<_> = wanted.iter().map(|&(p, n)| mapping(p, n)).collect();
                        prop_assert_eq!(store.map(&mappings, 1000).is_ok(), fits);
                        if fits {
                            model = next;
                        }
                    }
                    Step::Unmap(first, last, most) => {
                        let inside = |&(page, pages): &(u64, u64)| {
                            first <= page && page + pages - 1 <= last
                        };
                        let mut doomed: Vec<_> = model.iter().flatten().copied().filter(inside).collect();
                        doomed.dedup();
                        doomed.truncate(most);
                        let range = first << 12..=(last << 12 | 0xfff);
                        let removed = store.unmap(&range, most);
                        let bytes = doomed.iter().map(|&(_, pages)| pages << 12).sum::<u64>();
                        prop_assert_eq!(removed.map_or(0, |(bytes, _)| bytes), bytes);
                        for cell in &mut model {
                            if cell.is_some_and(|cell| doomed.contains(&cell)) {
                                *cell = None;
                            }
                        }
                    }
                }
                for (page, cell) in model.iter().enumerate() {
                    let found = store.find((page as u64) << 12 | 0x123);
                    prop_assert_eq!(found, cell.map(|(page, pages)| mapping(page, pages)));
                }
            }
        }
    }
}
