//! Guest RAM for a device that no vIOMMU translates, quick for many small accesses: it remembers
//! the region that it used last.

#![forbid(unsafe_code)]

use std::cell::Cell;
use std::iter::FusedIterator;
use std::sync::atomic::Ordering;

use vm_memory::guest_memory::{GuestMemoryBackendSliceIterator, GuestMemorySliceIterator, Result};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    Permissions, VolatileSlice,
};

use super::buffers;
use super::ring::Buffer;

/// See the module's text. For one thread, for one piece of work.
pub(super) struct Flat<'r> {
    ram: &'r GuestMemoryMmap<()>,
    /// Where the region begins that was used last, and all of it.
    start: Cell<GuestAddress>,
    region: Cell<Option<VolatileSlice<'r>>>,
}

impl<'r> Flat<'r> {
    pub(super) fn new(ram: &'r GuestMemoryMmap<()>) -> Self {
        Self {
            ram,
            start: Cell::new(GuestAddress(0)),
            region: Cell::new(None),
        }
    }

    /// The bytes, if they are in one region.
    #[inline]
    pub(super) fn one(&self, address: GuestAddress, count: usize) -> Option<VolatileSlice<'r>> {
        let near = self.near(address, count);
        if near.is_some() {
            return near;
        }
        self.find(address);
        self.near(address, count)
    }

    /// As [`copy_in`](buffers::copy_in).
    #[inline]
    pub(super) fn copy_in(&self, buffers: &[Buffer], data: &mut [u8]) -> bool {
        if let [only] = buffers
            && only.length as usize >= data.len()
            && let Some(slice) = self.one(only.address, data.len())
        {
            slice.copy_to(data);
            return true;
        }
        buffers::copy_in(self, buffers, data)
    }

    /// As [`copy_out`](buffers::copy_out).
    #[inline]
    pub(super) fn copy_out(&self, buffers: &[Buffer], data: &[u8]) -> Option<usize> {
        if let [only] = buffers
            && only.length as usize >= data.len()
            && let Some(slice) = self.one(only.address, data.len())
        {
            // Most are one aligned word.
            let word = <[u8; 4]>::try_from(data).map(u32::from_ne_bytes);
            let stored = word.is_ok_and(|word| slice.store(word, 0, Ordering::Relaxed).is_ok());
            if !stored {
                slice.copy_from(data);
            }
            return Some(data.len());
        }
        buffers::copy_out(self, buffers, data)
    }

    /// As [`one`](Self::one), of the region that was used last.
    #[inline]
    fn near(&self, address: GuestAddress, count: usize) -> Option<VolatileSlice<'r>> {
        // An address before the region's is an offset that no region reaches.
        let offset = address.0.wrapping_sub(self.start.get().0);
        self.region.get()?.subslice(offset as usize, count).ok()
    }

    /// Remembers the region of `address`. Returns nothing: a piece that two places make would be
    /// handed over in memory.
    #[cold]
    fn find(&self, address: GuestAddress) {
        let region = self.ram.find_region(address);
        if let Some((region, slice)) = region.and_then(|r| Some((r, r.as_volatile_slice().ok()?))) {
            self.start.set(region.start_addr());
            self.region.set(Some(slice));
        }
    }
}

impl GuestMemory for Flat<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    #[inline]
    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        self.one(addr, count).is_some() || GuestMemoryBackend::check_range(self.ram, addr, count)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        Ok(match self.one(addr, count) {
            Some(_) if count == 0 => Slices::One(None),
            Some(slice) => Slices::One(Some(slice)),
            None => {
                let slices = GuestMemoryBackend::get_slices(self.ram, addr, count);
                // Rare, and boxed to keep the rest small.
                Slices::Several(Box::new(slices))
            }
        })
    }
}

enum Slices<'a> {
    One(Option<VolatileSlice<'a>>),
    Several(Box<GuestMemoryBackendSliceIterator<'a, GuestMemoryMmap<()>>>),
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::One(slice) => slice.take().map(Ok),
            Self::Several(slices) => slices.next(),
        }
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn accesses_are_those_of_the_memory_itself(
            accesses in prop::collection::vec((0u64..0x5000, 0usize..0x1800, any::<u8>()), 0..20),
        ) {
            // Two regions that touch, a hole, and one more.
            let regions = [(0, 0x1000), (0x1000, 0x1000), (0x3000, 0x1000)];
            let regions = regions.map(|(start, length)| (GuestAddress(start), length));
            let plain = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
            let ram = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
            let flat = Flat::new(&ram);
            for (at, count, byte) in accesses {
                let at = GuestAddress(at);
                let expected = GuestMemory::check_range(&plain, at, count, Permissions::Read);
                prop_assert_eq!(flat.check_range(at, count, Permissions::Read), expected);
                let bytes = vec![byte; count];
                let wrote = flat.write(&bytes, at).ok();
                prop_assert_eq!(wrote, plain.write(&bytes, at).ok());
                let (mut a, mut b) = (vec![0; count], vec![0; count]);
                prop_assert_eq!(flat.read(&mut a, at).ok(), plain.read(&mut b, at).ok());
                prop_assert_eq!(&a, &b);
                let buffers = [Buffer { address: at, length: count as u32 }];
                prop_assert_eq!(
                    flat.copy_in(&buffers, &mut a),
                    buffers::copy_in(&plain, &buffers, &mut b)
                );
                prop_assert_eq!(&a, &b);
                let bytes = vec![byte ^ 0x55; count.min(5)];
                prop_assert_eq!(
                    flat.copy_out(&buffers, &bytes),
                    buffers::copy_out(&plain, &buffers, &bytes)
                );
            }
        }
    }
}
