//! What it takes to have guest RAM ready for DMA, per GiB: faulted in by [`prefault`] and then
//! pinned and mapped in one call, against that call alone, which faults page by page on one thread.
//! What two threads can gain at most on this machine is beside it: memory written to by two threads,
//! with nothing of ours, and the same call then.
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
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use viommu::GuestRam;
use viommu::backend::Access;
use viommu::backend::iommufd::kernel::{Kernel, Linux};
use viommu::backend::iommufd::prefault;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

const LENGTH: usize = 128 << 20;
const ROUNDS: usize = 7;
/// Where the memory is mapped: the kernel's mock devices reach from 16 MiB to 2 GiB.
const IOVA: u64 = 16 << 20;

#[derive(Clone, Copy)]
enum Pages {
    Memfd,
    /// As guest memory is: of ordinary pages, unless huge ones are asked for.
    GuestMemfd,
    HugeMemfd,
    Anonymous,
    HugeAnonymous,
}

/// Guest RAM that nobody has touched; `None` when the host has no such pages to give.
fn ram(pages: Pages) -> Option<GuestRam> {
    const HUGE_PAGE: usize = 2 << 20;
    let huge = match pages {
        Pages::HugeMemfd => libc::MFD_HUGETLB,
        _ => 0,
    };
    let ram = match pages {
        Pages::Memfd | Pages::GuestMemfd | Pages::HugeMemfd => {
            // SAFETY: the name is a C string that lives through the call.
            let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | huge) };
            if fd < 0 {
                return None;
            }
            // SAFETY: the call made this descriptor for us alone.
            let file = unsafe { File::from_raw_fd(fd) };
            file.set_len((LENGTH + HUGE_PAGE) as u64).ok()?;
            // Huge pages want the same place within one in the file and in memory. The second
            // mapping comes where the first one was.
            let first = mapping(Some(FileOffset::new(file.try_clone().ok()?, 0)))?;
            let at = first.get_host_address(GuestAddress(0)).ok()? as usize;
            drop(first);
            mapping(Some(FileOffset::new(file, (at % HUGE_PAGE) as u64)))?
        }
        Pages::Anonymous | Pages::HugeAnonymous => mapping(None)?,
    };
    let advice = match pages {
        Pages::HugeAnonymous | Pages::HugeMemfd | Pages::GuestMemfd => libc::MADV_HUGEPAGE,
        Pages::Memfd | Pages::Anonymous => libc::MADV_NOHUGEPAGE,
    };
    let address = ram.get_host_address(GuestAddress(0)).ok()?;
    // SAFETY: the range is one mapping that `ram` keeps alive; the advice changes no contents.
    // Memory that is huge by its file needs none, and takes none.
    unsafe { libc::madvise(address.cast(), LENGTH, advice) };
    Some(ram)
}

fn mapping(file: Option<FileOffset>) -> Option<GuestRam> {
    let ranges = [(GuestAddress(0), LENGTH, file)];
    GuestMemoryMmap::from_ranges_with_files(ranges)
        .ok()
        .map(Arc::new)
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
                    let (fd, from) = (file.file().as_fd(), file.start());
                    kernel.map_file(*ioas, fd, from, LENGTH as u64, IOVA, Access::READ_WRITE)
                }
                None => {
                    let at = address as u64;
                    kernel.map(*ioas, at, LENGTH as u64, IOVA, Access::READ_WRITE)
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

/// What is done before the memory is pinned.
#[derive(Clone, Copy)]
enum Ahead {
    Nothing,
    /// A byte of each page is written, by two threads.
    TouchedByTwo,
    /// [`prefault`] on so many threads.
    Prefault(usize),
}

/// The time of both.
fn set_up(pages: Pages, ahead: Ahead) -> Option<Duration> {
    // Writing to huge pages of which the host has none left is a bus error.
    if let (Pages::HugeMemfd, Ahead::TouchedByTwo) = (pages, ahead) {
        return None;
    }
    let ram = ram(pages)?;
    let pinning = Pinning::prepare().unwrap();
    let start = Instant::now();
    match ahead {
        Ahead::Nothing => {}
        Ahead::TouchedByTwo => touch(&ram),
        Ahead::Prefault(threads) => prefault(&ram, threads).ok()?,
    }
    let pinned = pinning.pin(&ram);
    let time = start.elapsed();
    if let Err(error) = pinned {
        println!("not pinned: {error}");
        return None;
    }
    Some(time)
}

/// Small pieces for whoever is free, so that one slow thread is not waited for.
fn touch(ram: &GuestRam) {
    const PIECE: usize = 2 << 20;
    const PAGE: usize = 4 << 10;
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let at = next.fetch_add(PIECE, Ordering::Relaxed);
            if at >= LENGTH {
                return;
            }
            for page in (at..at + PIECE).step_by(PAGE) {
                ram.write_obj(0u8, GuestAddress(page as u64)).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
}

fn main() {
    let how = match Pinning::is_iommufd() {
        true => "IOMMU_IOAS_MAP",
        false => "io_uring's pinning",
    };
    println!("stage-2 set-up of {} MiB by {how}:", LENGTH >> 20);
    let contenders = [
        ("raw", Ahead::Nothing),
        (
            "written to by 2 threads, nothing of ours",
            Ahead::TouchedByTwo,
        ),
        ("faulted in ahead, 1 thread", Ahead::Prefault(1)),
        ("faulted in ahead, 2 threads", Ahead::Prefault(2)),
    ];
    let kinds = [
        ("a memfd as guest memory is", Pages::GuestMemfd),
        ("4 KiB pages of a memfd", Pages::Memfd),
        ("4 KiB pages", Pages::Anonymous),
        ("transparent huge pages", Pages::HugeAnonymous),
        ("huge pages of a memfd", Pages::HugeMemfd),
    ];
    for (kind, pages) in kinds {
        if set_up(pages, Ahead::Nothing).is_none() {
            println!("{kind}: not to be had here");
            continue;
        }
        // The least of many samples is what others on this machine disturbed least. Who goes first
        // finds more huge pages, so each does in turn.
        let mut best = [Duration::MAX; 4];
        for round in 0..ROUNDS {
            for turn in 0..contenders.len() {
                let n = (turn + round) % contenders.len();
                let (_, ahead) = contenders[n];
                // What pinned the last one may still hold on to the last huge pages.
                if let Some(time) = set_up(pages, ahead) {
                    best[n] = best[n].min(time);
                }
            }
        }
        let two = best[1];
        for ((name, ahead), time) in contenders.iter().zip(best) {
            if time == Duration::MAX {
                continue;
            }
            let per_gib = time.as_secs_f64() * 1e3 * (1u64 << 30) as f64 / LENGTH as f64;
            let faster = best[0].div_duration_f64(time);
            let beside = match ahead {
                Ahead::Prefault(2) if two < Duration::MAX => {
                    let ratio = two.div_duration_f64(time);
                    format!(", {ratio:.2} of the two threads with nothing of ours")
                }
                _ => String::new(),
            };
            println!("{kind}: {name}: {per_gib:.0} ms/GiB, {faster:.2} times as fast{beside}");
        }
    }
}
