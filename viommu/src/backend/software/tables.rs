//! Guest tables in guest RAM: 64-bit entries, read and updated as a unit that walks them does.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileMemory,
};

/// The largest region of RAM, where most pages are: what lies there is known to be RAM without a
/// search.
pub(super) fn largest_region(ram: &GuestMemoryMmap<()>) -> RangeInclusive<u64> {
    let ranges = ram.iter().map(|r| r.start_addr().0..=r.last_addr().0);
    let largest = ranges.max_by_key(|r| r.end() - r.start());
    // Without RAM: a range that no page fits in.
    largest.unwrap_or(u64::MAX..=u64::MAX)
}

/// Runs `work` on the entry at `gpa`; `None` when there is no RAM or `gpa` is not 8-byte aligned.
#[inline]
fn with_entry<R>(
    ram: &GuestMemoryMmap<()>,
    gpa: u64,
    work: impl FnOnce(&AtomicU64) -> R,
) -> Option<R> {
    let (region, offset) = ram.to_region_addr(GuestAddress(gpa))?;
    let slice = region.get_slice(offset, size_of::<u64>()).ok()?;
    slice.get_atomic_ref::<AtomicU64>(0).ok().map(work)
}

/// The entry at `gpa`. Acquire: what the guest wrote before it made the entry present is seen.
pub(super) fn load(ram: &GuestMemoryMmap<()>, gpa: u64) -> Option<u64> {
    with_entry(ram, gpa, |entry| {
        u64::from_le(entry.load(Ordering::Acquire))
    })
}

/// Replaces `old` by `new` at `gpa`; whether the entry still was `old`.
pub(super) fn replace(ram: &GuestMemoryMmap<()>, gpa: u64, old: u64, new: u64) -> Option<bool> {
    with_entry(ram, gpa, |entry| {
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
