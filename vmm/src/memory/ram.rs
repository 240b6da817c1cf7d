//! What holds guest RAM: one memfd (so that the IOMMU and other processes can map it), or
//! anonymous memory, mapped region by region.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;

use viommu::GuestRam;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::layout::{Layout, Range};
use crate::config::{MemoryConfig, Size};

const HUGE_PAGE: u64 = 2 << 20;

/// Why there is no guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// More than the machine has.
    #[error("memory size={size} is more than this machine has ({has}); give less")]
    TooMuch {
        /// Asked for.
        size: Size,
        /// RAM and swap.
        has: Size,
    },
    /// Not enough huge pages.
    #[error(
        "memory size={size},hugepages=on needs {needed} huge pages of 2 MiB and {free} are free; reserve them with: sysctl vm.nr_hugepages={reserve}"
    )]
    HugePages {
        /// Asked for.
        size: Size,
        /// Pages needed.
        needed: u64,
        /// Pages that are free.
        free: u64,
        /// What to set.
        reserve: u64,
    },
    /// The kernel refused.
    #[error(
        "guest memory of {size} cannot be had ({call}: {source}); give less, or raise the limits of this user"
    )]
    Host {
        /// Asked for.
        size: Size,
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Allocates the RAM of `layout` as `config` says.
///
/// # Errors
/// See [`RamError`]; nothing is kept then.
pub fn allocate(config: &MemoryConfig, layout: &Layout) -> Result<GuestRam, RamError> {
    let size = Size(layout.ram_size());
    let has = machine_memory().map_err(|source| RamError::Host {
        size,
        call: "sysinfo",
        source,
    })?;
    if size > has {
        return Err(RamError::TooMuch { size, has });
    }
    if config.hugepages {
        check_huge_pages(size)?;
    }
    let host = |call| move |source| RamError::Host { size, call, source };
    let file = match config.shared {
        true => {
            let file = memfd(config.hugepages).map_err(host("memfd_create"))?;
            let length = offsets(layout)
                .last()
                .map_or(0, |(offset, range)| offset + range.len());
            file.set_len(length).map_err(host("ftruncate"))?;
            Some(Arc::new(file))
        }
        false => None,
    };
    let mut flags = match &file {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    flags |= match (config.hugepages, file.is_some()) {
        // Without MAP_NORESERVE the pages are reserved here: no SIGBUS later.
        (true, true) => 0,
        (true, false) => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        (false, _) => libc::MAP_NORESERVE,
    };
    let mut regions = Vec::with_capacity(layout.ram.len());
    for (offset, range) in offsets(layout) {
        let mapping = aligned(range.len() as usize, range.first, |length| {
            let at = file.clone().map(|file| FileOffset::from_arc(file, offset));
            MmapRegion::build(at, length, libc::PROT_READ | libc::PROT_WRITE, flags)
        })
        .map_err(|why| host("mmap")(io::Error::other(why)))?;
        if !config.hugepages {
            advise_huge_pages(&mapping);
        }
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.first));
        regions.push(region.ok_or_else(|| {
            host("mmap")(io::Error::other("the region ends beyond the address space"))
        })?);
    }
    let ram = GuestMemoryMmap::from_regions(regions)
        .map_err(|why| host("mmap")(io::Error::other(why)))?;
    Ok(Arc::new(ram))
}

/// Where the file has each region: one after the other, and at the place within a huge page that the
/// guest has it at.
fn offsets(layout: &Layout) -> impl Iterator<Item = (u64, &Range)> {
    layout.ram.iter().scan(0u64, |next, range| {
        let offset = *next + range.first.wrapping_sub(*next) % HUGE_PAGE;
        *next = offset + range.len();
        Some((offset, range))
    })
}

/// Maps so that host and guest addresses are the same within a huge page, where the kernel lets it:
/// otherwise neither the CPU nor an IOMMU can have huge pages there, and the kernel does not mind by
/// itself where it maps a file.
fn aligned<E>(
    length: usize,
    guest: u64,
    map: impl Fn(usize) -> Result<MmapRegion, E>,
) -> Result<MmapRegion, E> {
    const TRIES: usize = 8;
    let off = |end: usize| end.wrapping_sub(guest as usize) % HUGE_PAGE as usize;
    let mut fillers = Vec::new();
    loop {
        let mapping = map(length)?;
        let at = mapping.as_ptr() as usize;
        if off(at) == 0 || fillers.len() == TRIES {
            return Ok(mapping);
        }
        // The kernel maps downwards from the top of the highest place that is large enough. What
        // fills it from there to so much below sends the next mapping to where it should end.
        drop(mapping);
        let fills = length + off(at.wrapping_sub(length));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        match MmapRegion::<()>::build(None, fills, libc::PROT_NONE, flags) {
            Ok(filler) => fillers.push(filler),
            Err(_) => return map(length),
        }
    }
}

fn memfd(huge: bool) -> io::Result<File> {
    let name = CString::from(c"nestling-ram");
    let mut flags = libc::MFD_CLOEXEC;
    if huge {
        flags |= libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    }
    // SAFETY: `name` is a NUL-terminated string that lives across the call; nothing else is passed.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Transparent huge pages make the guest's first touch of memory several times faster. A refusal
/// (a kernel without them) costs nothing but that.
fn advise_huge_pages(mapping: &MmapRegion) {
    // SAFETY: the range is a mapping that we own, and MADV_HUGEPAGE does not change its contents.
    unsafe {
        libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE);
    }
}

fn machine_memory() -> io::Result<Size> {
    // SAFETY: sysinfo is a plain C struct for which all zeroes is a value.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a writable sysinfo.
    if unsafe { libc::sysinfo(&raw mut info) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let unit = u64::from(info.mem_unit.max(1));
    Ok(Size(
        info.totalram
            .saturating_add(info.totalswap)
            .saturating_mul(unit),
    ))
}

fn check_huge_pages(size: Size) -> Result<(), RamError> {
    let read = |name: &str| -> u64 {
        std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    let needed = size.0.div_ceil(HUGE_PAGE);
    let reserved = read("resv_hugepages");
    let free = read("free_hugepages").saturating_sub(reserved);
    let overcommit = read("nr_overcommit_hugepages");
    if free.saturating_add(overcommit) >= needed {
        return Ok(());
    }
    Err(RamError::HugePages {
        size,
        needed,
        free,
        reserve: read("nr_hugepages").saturating_add(needed - free),
    })
}

#[cfg(test)]
mod tests {
    use viommu::reserved::{Kind, Regions};
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::memory::layout::{HostReserved, compose};

    fn two_regions() -> Layout {
        let mut regions = Regions::new();
        regions.insert(32 << 20, (34 << 20) - 1, Kind::Reserved);
        let hole = HostReserved {
            what: "test".into(),
            regions,
        };
        let layout = compose(64 << 20, 40, &[hole]).unwrap();
        assert_eq!(layout.ram.len(), 2);
        layout
    }

    #[test]
    fn every_region_of_the_layout_is_memory_and_nothing_else_is() {
        for shared in [true, false] {
            let config = MemoryConfig {
                shared,
                ..Default::default()
            };
            let ram = allocate(&config, &two_regions()).unwrap();
            ram.write_obj(7u64, GuestAddress(0)).unwrap();
            ram.write_obj(9u64, GuestAddress(34 << 20)).unwrap();
            assert_eq!(ram.read_obj::<u64>(GuestAddress(0)).unwrap(), 7);
            assert!(ram.write_obj(1u8, GuestAddress(33 << 20)).is_err());
            assert!(ram.write_obj(1u8, GuestAddress(66 << 20)).is_err());
        }
    }

    #[test]
    fn shared_regions_lie_one_after_the_other_in_one_file() {
        let ram = allocate(&MemoryConfig::default(), &two_regions()).unwrap();
        let offsets: Vec<u64> = ram
            .iter()
            .map(|region| region.file_offset().unwrap().start())
            .collect();
        assert_eq!(offsets, [0, 32 << 20]);
    }

    #[test]
    fn host_and_guest_addresses_are_the_same_within_a_huge_page() {
        for shared in [true, false] {
            let config = MemoryConfig {
                shared,
                ..Default::default()
            };
            let ram = allocate(&config, &two_regions()).unwrap();
            for region in ram.iter() {
                let host = ram.get_host_address(region.start_addr()).unwrap() as u64;
                assert_eq!(host % HUGE_PAGE, region.start_addr().0 % HUGE_PAGE);
            }
        }
    }

    #[test]
    fn more_than_the_machine_has_is_refused_with_both_sizes() {
        let layout = compose(1 << 46, 52, &[]).unwrap();
        let error = allocate(&MemoryConfig::default(), &layout).unwrap_err();
        assert!(
            error.to_string().contains("size=64T is more than"),
            "{error}"
        );
    }

    #[test]
    fn missing_huge_pages_are_refused_with_the_command_that_reserves_them() {
        let config = MemoryConfig {
            hugepages: true,
            ..Default::default()
        };
        match allocate(&config, &two_regions()) {
            Ok(_) => println!("skipped: this machine has the huge pages"),
            Err(why) => assert!(why.to_string().contains("sysctl vm.nr_hugepages="), "{why}"),
        }
    }
}
