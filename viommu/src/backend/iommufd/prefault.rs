//! Guest RAM made ready before it is mapped for DMA: its pages are there, and huge where they can be.
//!
//! A first map of memory spends its time on getting pages, one by one and on one thread. That part can
//! be divided among threads. And huge pages are several times cheaper to get, to pin and to map, but
//! the files that guest memory is made of have them only if the host's administrator said so for all
//! such files (`shmem_enabled`); asked for each range, the kernel gives them all the same.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{RwLock, mpsc};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::GuestRam;

/// How much one thread makes huge at a time, at most: enough that what the kernel does once for each
/// call (it has every CPU empty its lists of pages, and waits for them) is no matter.
const MOST: usize = 64 << 20;
/// And at least.
const LEAST: usize = 32 << 20;
/// Pieces for each thread, so that the last one at work is not long alone.
const PIECES: usize = 4;
const HUGE_PAGE: usize = 2 << 20;
const PAGE: usize = 4 << 10;

/// Faults all of `ram` in, on `threads` threads, as huge pages where host and guest addresses allow
/// them and the host has them, so that mapping it finds its pages there. One thread leaves small
/// pages to the mapping.
///
/// Contents stay what they are, so it can run while a kernel is being loaded into `ram`.
///
/// # Errors
/// `ENOMEM` when the host has no such memory; `EINVAL` before Linux 5.14, where mapping does it.
pub fn prefault(ram: &GuestRam, threads: usize) -> io::Result<()> {
    let total = ram
        .iter()
        .map(|region| region.len() as usize)
        .sum::<usize>();
    let much = (total / threads.max(1) / PIECES)
        .clamp(LEAST, MOST)
        .next_multiple_of(HUGE_PAGE);
    let mut chunks = Vec::new();
    for region in ram.iter() {
        let start = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(io::Error::other)? as usize;
        let end = start + region.len() as usize;
        if collapses(start, end)? {
            chunks.extend(divide(start, end, much).map(|range| (range, true)));
        } else if threads > 1 {
            // On one thread mapping does it as well, and looks at each page once.
            chunks.extend(divide(start, end, HUGE_PAGE).map(|range| (range, false)));
        }
    }
    let next = AtomicUsize::new(0);
    let work = |there: &mut Vec<u8>| -> io::Result<()> {
        while let Some(&(range, huge)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if huge && touch(range, there)? {
                // Where the host has not enough in a row, small pages do.
                let _ = advise(range, libc::MADV_COLLAPSE);
            }
            advise(range, libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    };
    let gate = RwLock::new(());
    std::thread::scope(|scope| {
        // A thread maps memory of its own when it begins. While others populate, the kernel lets it
        // wait for milliseconds each time: so nobody starts before all are there.
        let closed = gate.write();
        let (beginning, begun) = mpsc::channel::<()>();
        let helpers = (1..threads.min(chunks.len()))
            .map_while(|_| {
                let beginning = beginning.clone();
                let (gate, work) = (&gate, &work);
                let helper = move || {
                    crate::thread::begin("prefault");
                    let mut there = room();
                    drop(beginning);
                    drop(gate.read());
                    work(&mut there)
                };
                std::thread::Builder::new().spawn_scoped(scope, helper).ok()
            })
            .collect::<Vec<_>>();
        let mut there = room();
        drop(beginning);
        // It fails when the last of them let go of its end.
        let _ = begun.recv();
        drop(closed);
        let mine = work(&mut there);
        helpers.into_iter().fold(mine, |result, helper| {
            let its = helper
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a prefault thread panicked")));
            result.and(its)
        })
    })
}

/// A byte for each page that one thread looks at.
fn room() -> Vec<u8> {
    Vec::with_capacity(MOST / PAGE)
}

/// Part of a mapping of guest RAM: its host address and length.
type Range = (usize, usize);

/// The pieces from `start` to `end`, of `most` bytes (whole huge pages), which end where huge pages do.
fn divide(start: usize, end: usize, most: usize) -> impl Iterator<Item = Range> {
    let mut next = start;
    std::iter::from_fn(move || {
        let at = next;
        next = (at - at % HUGE_PAGE).saturating_add(most).min(end);
        (at < end).then(|| (at, next - at))
    })
}

/// Whether the kernel makes pages from `start` to `end` huge when it is told to, and does not do so by
/// itself. Tried at the end, since a guest begins to be loaded elsewhere. Memory of another kind or
/// that lies unevenly has none, and so has all before Linux 6.1.
///
/// # Errors
/// See [`touch`].
fn collapses(start: usize, end: usize) -> io::Result<bool> {
    let last = (end - end % HUGE_PAGE).saturating_sub(HUGE_PAGE);
    let range = (last, HUGE_PAGE);
    Ok(last >= start && touch(range, &mut room())? && advise(range, libc::MADV_COLLAPSE).is_ok())
}

/// Has a page where each huge one could be, which the kernel wants before it puts one there; whether
/// that left any page out. Where none is left out there are huge ones already, or a guest's small
/// ones in use, which nobody should copy.
///
/// # Errors
/// There is no memory, or the kernel cannot populate.
fn touch((start, length): Range, there: &mut Vec<u8>) -> io::Result<bool> {
    let end = start + length;
    let mut at = start.next_multiple_of(HUGE_PAGE);
    while at + HUGE_PAGE <= end {
        advise((at, PAGE), libc::MADV_POPULATE_WRITE)?;
        at += HUGE_PAGE;
    }
    there.resize(length.div_ceil(PAGE), 0);
    // SAFETY: the range is part of a mapping that the caller of `prefault` keeps alive, and the
    // vector has a byte for each of its pages.
    match unsafe { libc::mincore(start as *mut libc::c_void, length, there.as_mut_ptr()) } {
        0 => Ok(there.iter().any(|page| page & 1 == 0)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn advise((start, length): Range, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: ranges are parts of mappings that the caller of `prefault` keeps alive, and neither
    // advice that is given here changes their contents.
    match unsafe { libc::madvise(start as *mut libc::c_void, length, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    proptest! {
        #[test]
        fn the_pieces_are_the_whole_and_no_huge_page_is_in_two(
            start in 1usize..1 << 20,
            pages in 0usize..1 << 16,
            most in 4usize..33,
        ) {
            let most = most * HUGE_PAGE;
            let start = start * PAGE;
            let mut next = start;
            for (at, length) in divide(start, start + pages * PAGE, most) {
                prop_assert_eq!(at, next);
                prop_assert!(at == start || at.is_multiple_of(HUGE_PAGE));
                prop_assert!(0 < length && length <= most);
                next = at + length;
            }
            prop_assert_eq!(next, start + pages * PAGE);
        }
    }

    #[test]
    fn contents_stay_and_every_page_is_there() {
        let length = 5 * HUGE_PAGE + 3 * PAGE;
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), length)]).unwrap();
        let ram: GuestRam = Arc::new(ram);
        for at in [0, 3 * HUGE_PAGE + 123, length - 1] {
            ram.write_obj(7u8, GuestAddress(at as u64)).unwrap();
        }
        prefault(&ram, 3).unwrap();
        for at in [0, 3 * HUGE_PAGE + 123, length - 1] {
            assert_eq!(ram.read_obj::<u8>(GuestAddress(at as u64)).unwrap(), 7);
        }
        let mut there = vec![0u8; length / PAGE];
        let address = ram.get_host_address(GuestAddress(0)).unwrap();
        // SAFETY: the range is one mapping, and the vector has a byte for each of its pages.
        let done = unsafe { libc::mincore(address.cast(), length, there.as_mut_ptr()) };
        assert_eq!(done, 0);
        assert!(there.iter().all(|page| page & 1 == 1));
    }
}
