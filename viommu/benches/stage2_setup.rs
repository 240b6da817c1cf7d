//! What it takes to have guest RAM ready for DMA, per GiB: ours against the host's own fault and
//! clear, in the same run, interleaved. Printed as ratios; the absolute figures are this machine's.
//!
//! Pinning itself needs a host IOMMU; clearing pages is most of a first map, and the part that can
//! be divided. Where there is `/dev/iommu`, the whole of it is measured.

#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::GuestRam;
use viommu::backend::iommufd::kernel::Linux;
use viommu::backend::iommufd::{HostIommu, prefault};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const LENGTH: usize = 512 << 20;
const ROUNDS: usize = 9;

#[derive(Clone, Copy)]
enum Pages {
    Memfd,
    Anonymous,
    Huge,
}

fn ram(pages: Pages) -> GuestRam {
    let file = match pages {
        Pages::Memfd => {
            // SAFETY: the name is a C string that lives through the call.
            let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
            assert!(fd >= 0);
            // SAFETY: the call made this descriptor for us alone.
            let file = unsafe { File::from_raw_fd(fd) };
            file.set_len(LENGTH as u64).unwrap();
            Some(FileOffset::new(file, 0))
        }
        Pages::Anonymous | Pages::Huge => None,
    };
    let ram = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), LENGTH, file)]).unwrap();
    let advice = match pages {
        Pages::Huge => libc::MADV_HUGEPAGE,
        Pages::Memfd | Pages::Anonymous => libc::MADV_NOHUGEPAGE,
    };
    advise(&ram, advice);
    Arc::new(ram)
}

fn advise(ram: &GuestMemoryMmap<()>, advice: i32) -> bool {
    let address = ram.get_host_address(GuestAddress(0)).unwrap();
    // SAFETY: the range is one mapping that `ram` keeps alive; no advice used here changes
    // contents.
    unsafe { libc::madvise(address.cast(), LENGTH, advice) == 0 }
}

/// One call for all of it: what the kernel does on its own, on one thread.
fn raw(ram: &GuestRam) {
    assert!(
        advise(ram, libc::MADV_POPULATE_WRITE),
        "{}",
        io::Error::last_os_error()
    );
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

type Contender = (&'static str, fn(&GuestRam));

fn main() {
    let contenders: [Contender; 3] = [
        ("raw, 1 thread", raw),
        ("ours, 1 thread", |ram| prefault(ram, 1).unwrap()),
        ("ours, 2 threads", |ram| prefault(ram, 2).unwrap()),
    ];
    let kinds = [
        ("4 KiB anonymous", Pages::Anonymous),
        ("huge anonymous", Pages::Huge),
        ("memfd", Pages::Memfd),
    ];
    for (kind, pages) in kinds {
        let mut times = vec![Vec::new(); contenders.len()];
        for _ in 0..ROUNDS {
            for ((_, work), times) in contenders.iter().zip(&mut times) {
                let ram = ram(pages);
                let start = Instant::now();
                work(&ram);
                times.push(start.elapsed());
            }
        }
        let medians = times.into_iter().map(median).collect::<Vec<_>>();
        for ((name, _), time) in contenders.iter().zip(&medians) {
            let per_gib = time.as_secs_f64() * 1e3 * (1u64 << 30) as f64 / LENGTH as f64;
            let ratio = time.as_secs_f64() / medians[0].as_secs_f64();
            println!("stage-2 set-up, {kind}: {name}: {ratio:.2}x raw ({per_gib:.0} ms/GiB)");
        }
    }
    if !Path::new("/dev/iommu").exists() {
        println!("stage-2 set-up: no /dev/iommu here, so nothing is pinned");
        return;
    }
    for (kind, pages) in kinds {
        let ram = ram(pages);
        prefault(&ram, 2).unwrap();
        let Ok(kernel) = Linux::open(Path::new("/dev/iommu")) else {
            return println!("stage-2 set-up: /dev/iommu may not be opened by this user");
        };
        let start = Instant::now();
        match HostIommu::new(Arc::new(kernel), ram) {
            Ok(_host) => println!("stage-2 set-up, {kind}: mapped in {:?}", start.elapsed()),
            Err(error) => println!("stage-2 set-up, {kind}: {error}"),
        }
    }
}
