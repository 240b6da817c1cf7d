//! Which parts of a base address register the guest reaches without an exit.
#![forbid(unsafe_code)]

/// Bytes of a page, which is what can be mapped.
pub const PAGE: u64 = 4096;

/// The parts (offset, length) of what is `mappable` that lie outside `trapped` (offset, length),
/// in whole pages, ascending: what the guest uses directly.
///
/// A page with a trapped byte in it is trapped whole: the rest of that page is reached by way of
/// the device's descriptor.
pub fn direct(mappable: &[(u64, u64)], trapped: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut holes = trapped
        .iter()
        .filter(|&&(_, length)| length > 0)
        .map(|&(offset, length)| {
            let end = offset.saturating_add(length);
            (offset & !(PAGE - 1), end.next_multiple_of(PAGE))
        })
        .collect::<Vec<_>>();
    holes.sort_unstable();
    let mut parts = Vec::new();
    for &(offset, length) in mappable {
        let mut at = offset.next_multiple_of(PAGE);
        let end = offset.saturating_add(length) & !(PAGE - 1);
        for &(hole, hole_end) in &holes {
            if hole >= end {
                break;
            }
            if hole > at {
                parts.push((at, hole - at));
            }
            at = at.max(hole_end);
        }
        if end > at {
            parts.push((at, end - at));
        }
    }
    parts.sort_unstable();
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_page_of_an_msix_table_is_trapped_and_the_rest_is_direct() {
        // An NVMe drive: 16 KiB, table at 8 KiB, pending bits at 12 KiB.
        let parts = direct(&[(0, 0x4000)], &[(0x2000, 0x210), (0x3000, 8)]);
        assert_eq!(parts, [(0, 0x2000)]);
        // A table in the middle.
        let parts = direct(&[(0, 0x10000)], &[(0x4100, 0x100)]);
        assert_eq!(parts, [(0, 0x4000), (0x5000, 0xb000)]);
    }

    #[test]
    fn without_a_table_all_of_it_is_direct() {
        assert_eq!(direct(&[(0, 0x4000)], &[]), [(0, 0x4000)]);
        assert_eq!(direct(&[], &[(0, 16)]), []);
    }

    #[test]
    fn less_than_a_page_is_never_mapped() {
        assert_eq!(direct(&[(0, 0x800)], &[]), []);
        assert_eq!(direct(&[(0x800, 0x1000)], &[]), []);
    }

    proptest! {
        #[test]
        fn nothing_trapped_is_direct_and_all_else_is(
            pages in 1u64..64,
            trapped in prop::collection::vec((0u64..0x40000, 0u64..0x3000), 0..5),
        ) {
            let parts = direct(&[(0, pages * PAGE)], &trapped);
            for page in 0..pages {
                let (first, end) = (page * PAGE, (page + 1) * PAGE);
                let hit = trapped.iter().any(|&(offset, length)| {
                    length > 0 && offset < end && offset + length > first
                });
                let inside = parts.iter().filter(|&&(offset, length)| {
                    offset <= first && end <= offset + length
                });
                prop_assert_eq!(inside.count(), usize::from(!hit));
            }
        }
    }
}
