//! What it takes to have guest RAM ready for DMA, per GiB: faulted in by [`prefault`] and then
//! pinned and mapped in one call, against that call alone, which faults page by page on one thread.
//! In the same run, interleaved; printed as ratios, since the absolute figures are this machine's.
//!
//! Where the kernel's iommufd has its mock devices (`CONFIG_IOMMUFD_TEST`, the lab's host:
//! `cargo lab bench stage2`), the call is `IOMMU_IOAS_MAP` of an address space that a device is
//! attached to. Elsewhere registering the memory with io_uring stands in for it: it pins in the same
//! way, and has no tables to fill.

#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::GuestRam;
use viommu::backend::Access;
use viommu::backend::iommufd::kernel::{Kernel, Linux};
use viommu::backend::iommufd::prefault;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const LENGTH: usize = 256 << 20;
const ROUNDS: usize = 9;

#[derive(Clone, Copy)]
enum Pages {
    Memfd,
    HugeMemfd,
    Anonymous,
    HugeAnonymous,
}

/// Guest RAM that nobody has touched; `None` when the host has no such pages to give.
fn ram(pages: Pages) -> Option<GuestRam> {
    let file = match pages {
        Pages::Memfd | Pages::HugeMemfd => {
            let huge = match pages {
                Pages::HugeMemfd => libc::MFD_HUGETLB,
                _ => 0,
            };
            // SAFETY: the name is a C string that lives through the call.
            let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | huge) };
            if fd < 0 {
                return None;
            }
            // SAFETY: the call made this descriptor for us alone.
            let file = unsafe { File::from_raw_fd(fd) };
            file.set_len(LENGTH as u64).ok()?;
            Some(FileOffset::new(file, 0))
        }
        Pages::Anonymous | Pages::HugeAnonymous => None,
    };
    let place = GuestAddress(0);
    let ram = GuestMemoryMmap::from_ranges_with_files([(place, LENGTH, file)]).ok()?;
    let advice = match pages {
        Pages::HugeAnonymous | Pages::HugeMemfd => libc::MADV_HUGEPAGE,
        Pages::Memfd | Pages::Anonymous => libc::MADV_NOHUGEPAGE,
    };
    let address = ram.get_host_address(place).ok()?;
    // SAFETY: the range is one mapping that `ram` keeps alive; the advice changes no contents.
    // Memory that is huge by its file needs none, and takes none.
    unsafe { libc::madvise(address.cast(), LENGTH, advice) };
    Some(Arc::new(ram))
}

/// What pins memory, made ready before the clock runs.
enum Pinning {
    /// An address space with a mock device.
    Iommufd(Box<Linux>, u32),
    IoUring(OwnedFd),
}

impl Pinning {
    fn is_iommufd() -> bool {
        mock().is_some()
    }

    fn prepare() -> io::Result<Self> {
        if let Some((kernel, ioas)) = mock() {
            return Ok(Self::Iommufd(Box::new(kernel), ioas));
        }
        // `struct io_uring_params`: all zero asks for nothing special.
        let mut parameters = [0u8; 120];
        let entries = 1;
        // SAFETY: the structure is as large as the kernel's, which fills it and keeps nothing of it.
        let fd =
            unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, parameters.as_mut_ptr()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call made this descriptor for us alone.
        Ok(Self::IoUring(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Pins all of `ram`, until this value goes.
    fn pin(&self, ram: &GuestRam) -> io::Result<()> {
        const REGISTER_BUFFERS: u32 = 0;
        let region = ram.iter().next().unwrap();
        let address = ram.get_host_address(GuestAddress(0)).unwrap();
        match self {
            Self::Iommufd(kernel, ioas) => match region.file_offset() {
                Some(file) => {
                    let file = file.file().as_fd();
                    kernel.map_file(*ioas, file, 0, LENGTH as u64, 0, Access::READ_WRITE)
                }
                None => {
                    let at = address as u64;
                    kernel.map(*ioas, at, LENGTH as u64, 0, Access::READ_WRITE)
                }
            },
            Self::IoUring(ring) => {
                let buffer = libc::iovec {
                    iov_base: address.cast(),
                    iov_len: LENGTH,
                };
                // SAFETY: one buffer is passed, in a mapping that `ram` keeps alive until after
                // the ring is closed.
                let done = unsafe {
                    libc::syscall(
                        libc::SYS_io_uring_register,
                        ring.as_raw_fd(),
                        REGISTER_BUFFERS,
                        &raw const buffer,
                        1,
                    )
                };
                if done < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            }
        }
    }
}

/// An address space of the kernel's iommufd with a mock device attached, so that what is mapped is
/// pinned; `None` where there is none.
fn mock() -> Option<(Linux, u32)> {
    /// `_IO(';', 0xa0)`, and its operation that makes a device.
    const TEST: libc::c_ulong = 0x3ba0;
    const MOCK_DOMAIN: u32 = 2;
    let kernel = Linux::from(
        File::options()
            .read(true)
            .write(true)
            .open("/dev/iommu")
            .ok()?,
    );
    let ioas = kernel.ioas_alloc().ok()?;
    // `struct iommu_test_cmd`: its size, the operation, the address space.
    let mut command = [0u32; 18];
    command[..3].copy_from_slice(&[size_of::<[u32; 18]>() as u32, MOCK_DOMAIN, ioas]);
    // SAFETY: the first word is the size of the structure that the kernel reads and writes.
    let done = unsafe { libc::ioctl(kernel.as_fd().as_raw_fd(), TEST, command.as_mut_ptr()) };
    (done == 0).then_some((kernel, ioas))
}

/// Faults in ahead on so many threads, if any, then pins: the time of both.
fn set_up(pages: Pages, threads: Option<usize>) -> Option<Duration> {
    let ram = ram(pages)?;
    let pinning = Pinning::prepare().unwrap();
    let start = Instant::now();
    if let Some(threads) = threads {
        prefault(&ram, threads).ok()?;
    }
    let pinned = pinning.pin(&ram);
    let time = start.elapsed();
    pinned.ok()?;
    Some(time)
}

fn main() {
    let how = match Pinning::is_iommufd() {
        true => "IOMMU_IOAS_MAP",
        false => "io_uring's pinning",
    };
    println!("stage-2 set-up of {} MiB by {how}:", LENGTH >> 20);
    let contenders = [
        ("raw", None),
        ("faulted in ahead, 1 thread", Some(1)),
        ("faulted in ahead, 2 threads", Some(2)),
    ];
    let kinds = [
        ("4 KiB pages of a memfd", Pages::Memfd),
        ("4 KiB pages", Pages::Anonymous),
        ("transparent huge pages", Pages::HugeAnonymous),
        ("huge pages of a memfd", Pages::HugeMemfd),
    ];
    for (kind, pages) in kinds {
        if set_up(pages, None).is_none() {
            println!("{kind}: not to be had here");
            continue;
        }
        // The least of many samples is what others on this machine disturbed least. Who goes first
        // finds more huge pages, so each does in turn.
        let mut best = [Duration::MAX; 3];
        for round in 0..ROUNDS {
            for turn in 0..contenders.len() {
                let n = (turn + round) % contenders.len();
                let (_, threads) = contenders[n];
                best[n] = best[n].min(set_up(pages, threads).unwrap());
            }
        }
        for ((name, _), time) in contenders.iter().zip(best) {
            let per_gib = time.as_secs_f64() * 1e3 * (1u64 << 30) as f64 / LENGTH as f64;
            let faster = best[0].div_duration_f64(time);
            println!("{kind}: {name}: {per_gib:.0} ms/GiB, {faster:.2} times as fast");
        }
    }
}
