//! The one ring helper: offsets of the invalidation queue and the page request queue, bounded
//! whatever the guest wrote into head, tail and address registers.

use vm_memory::GuestAddress;

/// A ring in guest memory. Offsets are in bytes from its base.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ring {
    base: u64,
    bytes: u32,
    entry: u32,
}

impl Ring {
    /// A ring of 2^`order` pages of 4 KiB (`order` below 8) at `base`, with entries of `entry`
    /// bytes (a power of two of at most 32).
    pub(super) const fn new(base: u64, order: u8, entry: u32) -> Self {
        Self {
            base,
            bytes: 4096 << (order & 7),
            entry,
        }
    }

    /// Whether `offset` is inside the ring.
    pub(super) const fn contains(self, offset: u32) -> bool {
        offset < self.bytes
    }

    /// Whether `offset` is that of an entry.
    pub(super) const fn is_aligned(self, offset: u32) -> bool {
        offset.is_multiple_of(self.entry)
    }

    /// The offset behind that of an entry.
    pub(super) const fn next(self, offset: u32) -> u32 {
        (offset + self.entry) & (self.bytes - 1)
    }

    /// Whether nothing can be added: one entry is always left free.
    pub(super) const fn is_full(self, head: u32, tail: u32) -> bool {
        self.next(tail) == head
    }

    /// How many bytes lie between `head` and `tail` without wrapping; 0 when they are equal.
    pub(super) const fn contiguous(self, head: u32, tail: u32) -> u32 {
        if head <= tail {
            tail - head
        } else {
            self.bytes - head
        }
    }

    /// Where `offset` is, if the ring does not reach over the end of the address space.
    pub(super) fn address(self, offset: u32) -> Option<GuestAddress> {
        self.base.checked_add(offset.into()).map(GuestAddress)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn walking_from_head_reaches_tail_within_one_round(
            order in 0u8..8, wide: bool, head: u32, tail: u32,
        ) {
            let entry = if wide { 32 } else { 16 };
            let ring = Ring::new(0, order, entry);
            let entries = (4096 << order) / entry;
            let mut at = head % entries * entry;
            let tail = tail % entries * entry;
            let mut steps = 0;
            while at != tail {
                prop_assert!(ring.contains(at) && ring.is_aligned(at));
                prop_assert!(ring.contiguous(at, tail) >= entry);
                prop_assert!(at + ring.contiguous(at, tail) <= 4096 << order);
                at = ring.next(at);
                steps += 1;
                prop_assert!(steps < entries);
            }
            prop_assert_eq!(ring.contiguous(at, tail), 0);
        }
    }

    #[test]
    fn a_ring_over_the_end_of_the_address_space_has_no_address() {
        let ring = Ring::new(u64::MAX - 4095, 7, 16);
        assert_eq!(ring.address(16), Some(GuestAddress(u64::MAX - 4079)));
        assert_eq!(ring.address(4096), None);
    }

    #[test]
    fn a_ring_is_full_with_one_entry_free() {
        let ring = Ring::new(0, 0, 32);
        assert!(ring.is_full(0, 4096 - 32));
        assert!(!ring.is_full(0, 0));
    }
}
