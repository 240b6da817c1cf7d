//! How an emulated device reaches guest memory.
//!
//! A device is given one [`DmaPort`] and never learns whether a vIOMMU stands in it. Each piece of
//! work (a descriptor chain, a batch of packets) is done through one [`DmaAccess`], which is a
//! [`GuestMemory`] for virtio-queue and everything else built on vm-memory:
//!
//! ```
//! use std::sync::Arc;
//! use viommu::dma::DmaPort;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)])?;
//! let port = DmaPort::direct(Arc::new(ram));
//! let access = port.access();
//! access.write_slice(b"hello", GuestAddress(0x1000))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! While a `DmaAccess` lives, an invalidation that removes what it may have translated waits for
//! it. So: take one per piece of work, drop it before waiting for anything that depends on the
//! guest or on the network, and never keep one across `epoll_wait`. A thread that holds one must
//! not call a back end or a front end (it would wait for itself; debug builds panic there).
//!
//! Faults are reported when the `DmaAccess` is dropped, one for each failed access and at most 16:
//! the front end may take its lock then, which an invalidation that waits for this very
//! `DmaAccess` may hold.

#![forbid(unsafe_code)]

use std::fmt;
use std::iter::FusedIterator;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{
    Error, GuestMemoryBackendSliceIterator, GuestMemorySliceIterator, Result,
};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress, Permissions, VolatileSlice,
};

use crate::backend::software::port;
use crate::backend::{Access, FaultCause};
use crate::interrupt::Msi;
use crate::{Gpa, GuestRam, Iova, Pasid, Target};

pub use port::PageRequestRefused;

/// The longest run of physically contiguous pages that becomes one slice, in bytes: a bound on
/// the work per slice, whatever length the guest wrote in a descriptor.
const LONGEST_RUN: u64 = 1 << 20;

/// One device's way to guest memory. Cheap to clone; each device thread has one of its own.
///
/// A translated port has its own translation cache, and remembers what its current access has
/// translated. One port may be used by several threads, but all except one of the accesses that
/// live at the same time go without the cache.
#[derive(Clone)]
pub struct DmaPort {
    route: Route,
}

#[derive(Clone)]
enum Route {
    Direct(GuestRam),
    Translated(port::Port),
}

impl DmaPort {
    /// A port with no vIOMMU in it: what the device says is a guest-physical address.
    pub fn direct(ram: GuestRam) -> Self {
        Self {
            route: Route::Direct(ram),
        }
    }

    pub(crate) fn translated(port: port::Port) -> Self {
        Self {
            route: Route::Translated(port),
        }
    }

    /// Whether a vIOMMU translates what goes through here (a virtio device offers
    /// `VIRTIO_F_ACCESS_PLATFORM` then).
    pub fn is_translated(&self) -> bool {
        matches!(self.route, Route::Translated(_))
    }

    /// Guest RAM itself, when no vIOMMU is in the way.
    pub fn direct_ram(&self) -> Option<&GuestRam> {
        match &self.route {
            Route::Direct(ram) => Some(ram),
            Route::Translated(_) => None,
        }
    }

    /// Who the port's requests come from; `None` for a direct port.
    pub fn target(&self) -> Option<Target> {
        match &self.route {
            Route::Direct(_) => None,
            Route::Translated(port) => Some(port.target()),
        }
    }

    /// The same endpoint's port for requests that carry `pasid`. `None` when the endpoint has no
    /// such PASID, or when no vIOMMU is there: PASIDs mean nothing then.
    pub fn with_pasid(&self, pasid: Pasid) -> Option<Self> {
        match &self.route {
            Route::Direct(_) => None,
            Route::Translated(port) => port.with_pasid(pasid).map(Self::translated),
        }
    }

    /// The same port for privileged requests (the Privileged Mode Requested bit of the PASID TLP
    /// prefix, so it has an effect only with a PASID).
    #[must_use]
    pub fn with_privileged(mut self, privileged: bool) -> Self {
        if let Route::Translated(port) = &mut self.route {
            port.set_privileged(privileged);
        }
        self
    }

    /// The same port for execute requests (the Execute Requested bit of the PASID TLP prefix):
    /// its reads are instruction fetches.
    #[must_use]
    pub fn with_execute(mut self, execute: bool) -> Self {
        if let Route::Translated(port) = &mut self.route {
            port.set_execute(execute);
        }
        self
    }

    /// Begins one piece of DMA work.
    pub fn access(&self) -> DmaAccess<'_> {
        let route = match &self.route {
            Route::Direct(ram) => AccessRoute::Direct(ram),
            Route::Translated(port) => AccessRoute::Translated(port.access()),
        };
        DmaAccess { route }
    }

    /// Writes `msi.data` to the doorbell `msi.address` as a DMA write of four bytes, the way a
    /// device that is not told its interrupts by a [`Msi`] route would. Returns whether somebody
    /// took it: only requests without PASID to 0xfee0_0000-0xfeef_ffff are interrupt messages
    /// (VT-d 3.14), and a direct port has nobody behind it.
    pub fn message(&self, msi: Msi) -> bool {
        match &self.route {
            Route::Direct(_) => false,
            Route::Translated(port) => port.message(msi),
        }
    }

    /// Sends a translation request (ATS) for `iova`. Whether it is supported: if so,
    /// [`DmaAccess::lookup`] has the translation. To be called with no access of this thread begun.
    pub fn translation_request(&self, iova: Iova) -> bool {
        match &self.route {
            Route::Direct(_) => true,
            Route::Translated(port) => port.translation_request(iova),
        }
    }

    /// Asks for a page (PRI). The answer comes to the endpoint's
    /// [`PageResponseSink`](crate::backend::software::PageResponseSink), once per `group` whose
    /// `last` request was sent.
    ///
    /// # Errors
    /// The request was not sent, and no response will come for it.
    pub fn page_request(
        &self,
        iova: Iova,
        access: Access,
        group: u16,
        last: bool,
    ) -> std::result::Result<(), PageRequestRefused> {
        match &self.route {
            Route::Direct(_) => Err(PageRequestRefused::NotOffered),
            Route::Translated(port) => port.page_request(iova, access, group, last),
        }
    }
}

impl fmt::Debug for DmaPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.target() {
            None => f.write_str("DmaPort(direct)"),
            Some(target) => write!(f, "DmaPort({target})"),
        }
    }
}

/// Guest memory for the length of one piece of DMA work. See the module's text.
pub struct DmaAccess<'p> {
    route: AccessRoute<'p>,
}

enum AccessRoute<'p> {
    Direct(&'p GuestRam),
    Translated(port::Access<'p>),
}

/// One contiguous piece of a translated range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translated {
    /// Where it lies in guest RAM.
    pub gpa: Gpa,
    /// How many bytes from there on, not 0.
    pub length: u64,
}

impl DmaAccess<'_> {
    /// Translates the beginning of the range of `length` bytes (not 0) at `iova`: to the end of
    /// the range, of the page or of RAM, whichever comes first. The result may be used as long as
    /// `self` lives.
    ///
    /// # Errors
    /// Why the access does not pass; the front end is told.
    #[inline]
    pub fn translate(
        &self,
        iova: Iova,
        length: u64,
        access: Access,
    ) -> std::result::Result<Translated, FaultCause> {
        self.lookup(iova, length, access).inspect_err(|&cause| {
            if let AccessRoute::Translated(translated) = &self.route {
                translated.report(iova, access, cause);
            }
        })
    }

    /// As [`translate`](Self::translate), but nobody is told of a failure: an ATS translation
    /// request, which answers "no access" instead of faulting.
    ///
    /// # Errors
    /// Why the access would not pass.
    #[inline]
    pub fn lookup(
        &self,
        iova: Iova,
        length: u64,
        access: Access,
    ) -> std::result::Result<Translated, FaultCause> {
        let (ram, gpa, length) = match &self.route {
            AccessRoute::Direct(ram) => (&***ram, iova.0, length),
            AccessRoute::Translated(translated) => {
                translated.announce(iova.0, length)?;
                let found = translated.page(iova.0, translated.request(access))?;
                let length = length.min(found.rest);
                if found.in_ram {
                    let gpa = Gpa(found.gpa);
                    return Ok(Translated { gpa, length });
                }
                (translated.ram(), found.gpa, length)
            }
        };
        let (region, offset) = ram
            .to_region_addr(GuestAddress(gpa))
            .ok_or(FaultCause::OutsideMemory)?;
        Ok(Translated {
            gpa: Gpa(gpa),
            length: length.min(region.len() - offset.0),
        })
    }
}

impl fmt::Debug for DmaAccess<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.route {
            AccessRoute::Direct(_) => f.write_str("DmaAccess(direct)"),
            AccessRoute::Translated(access) => write!(f, "DmaAccess({})", access.target()),
        }
    }
}

/// What vm-memory's permissions mean as an access.
fn access_of(permissions: Permissions) -> Access {
    Access {
        read: permissions.allow(Permissions::Read),
        write: permissions.allow(Permissions::Write),
    }
}

impl GuestMemory for DmaAccess<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let access = access_of(access);
        match &self.route {
            AccessRoute::Direct(ram) => GuestMemoryBackend::check_range(&***ram, addr, count),
            AccessRoute::Translated(_) => {
                let mut done = 0;
                while done < count as u64 {
                    let Some(iova) = addr.0.checked_add(done) else {
                        return false;
                    };
                    match self.lookup(Iova(iova), count as u64 - done, access) {
                        Ok(piece) => done += piece.length,
                        Err(_) => return false,
                    }
                }
                true
            }
        }
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        Ok(match &self.route {
            AccessRoute::Direct(ram) => {
                Slices::Direct(GuestMemoryBackend::get_slices(&***ram, addr, count))
            }
            AccessRoute::Translated(translated) => {
                let access = access_of(access);
                if count > 0
                    && let Err(cause) = translated.announce(addr.0, count as u64)
                {
                    translated.report(Iova(addr.0), access, cause);
                    return Err(Error::InvalidGuestAddress(addr));
                }
                Slices::Translated(TranslatedSlices {
                    access: translated,
                    what: access,
                    iova: addr.0,
                    left: count as u64,
                })
            }
        })
    }
}

/// The slices of a range, translated as they are asked for.
enum Slices<'a> {
    Direct(GuestMemoryBackendSliceIterator<'a, GuestMemoryMmap<()>>),
    Translated(TranslatedSlices<'a>),
}

struct TranslatedSlices<'a> {
    access: &'a port::Access<'a>,
    what: Access,
    iova: u64,
    left: u64,
}

impl<'a> TranslatedSlices<'a> {
    /// Where the next piece lies: as many physically contiguous pages as there are.
    fn run(&self) -> std::result::Result<(u64, u64), FaultCause> {
        let request = self.access.request(self.what);
        let most = self.left.min(LONGEST_RUN);
        let first = self.access.page(self.iova, request)?;
        let mut length = first.rest;
        while length < most {
            match self.access.page(self.iova + length, request) {
                Ok(next) if first.gpa.checked_add(length) == Some(next.gpa) => length += next.rest,
                // What does not fit here, or faults, is the next piece's first page.
                _ => break,
            }
        }
        Ok((first.gpa, length.min(most)))
    }

    fn slice(&self) -> std::result::Result<VolatileSlice<'a, ()>, FaultCause> {
        let (gpa, length) = self.run()?;
        let (region, MemoryRegionAddress(offset)) = self
            .access
            .ram()
            .to_region_addr(GuestAddress(gpa))
            .ok_or(FaultCause::OutsideMemory)?;
        let length = length.min(region.len() - offset);
        region
            .get_slice(MemoryRegionAddress(offset), length as usize)
            .map_err(|_| FaultCause::OutsideMemory)
    }
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a, ()>>;

    fn next(&mut self) -> Option<Self::Item> {
        let translated = match self {
            Self::Direct(slices) => return slices.next(),
            Self::Translated(translated) => translated,
        };
        if translated.left == 0 {
            return None;
        }
        Some(match translated.slice() {
            Ok(slice) => {
                // The last byte of the address space may be part of the range.
                translated.iova = translated.iova.wrapping_add(slice.len() as u64);
                translated.left -= slice.len() as u64;
                Ok(slice)
            }
            Err(cause) => {
                let at = translated.iova;
                translated.left = 0;
                translated.access.report(Iova(at), translated.what, cause);
                Err(Error::InvalidGuestAddress(GuestAddress(at)))
            }
        })
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}
