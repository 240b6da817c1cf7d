//! Address spaces: what may be mapped, what a copy is, what is pinned.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::backend::iommufd::kernel::Kernel;
use viommu::backend::iommufd::object::{Hwpt, Ioas, Paging};
use viommu::backend::{Access, Backend, Mapping, Refused};
use viommu::{Gpa, Iova};

use super::bench::{A, Bench, RAM, memfd};
use super::mock::OP_ADD_RESERVED;

#[test]
fn reserved_addresses_are_refused_with_the_kernels_own_ranges() {
    let Some(bench) = Bench::open() else { return };
    let domain = bench.host.create_domain().unwrap();
    let map = |iova| {
        let mapping = Mapping {
            iova: Iova(iova),
            gpa: Gpa(RAM),
            length: 0x1000,
            access: Access::READ_WRITE,
            mmio: false,
        };
        bench.host.map(domain, &[mapping])
    };
    // The mock's aperture begins at 16 MiB and ends at 2 GiB.
    assert!(matches!(map(0), Err(Refused::NotOffered { .. })));
    assert!(matches!(map(1 << 31), Err(Refused::NotOffered { .. })));
    map(0x100_0000).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 31);
    bench.host.destroy_domain(domain);
}

#[test]
fn a_reserved_region_in_guest_ram_is_refused_at_admission() {
    let Some(bench) = Bench::open() else { return };
    // An address space with a mapping does not take a reservation over it: the same check that
    // refuses a device.
    let kernel: Arc<dyn Kernel> = bench.kernel.clone();
    let ioas = Ioas::new(kernel).unwrap();
    bench
        .kernel
        .test(OP_ADD_RESERVED, ioas.id(), &[0x200_0000, 0x1000])
        .unwrap();
    let file = memfd();
    let map = |iova| ioas.map_file(file.as_fd(), 0, 0x1000, iova, Access::READ_WRITE);
    assert_eq!(
        map(0x200_0000).unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );
    map(0x200_1000).unwrap();
    assert_eq!(
        map(0x200_1000).unwrap_err().raw_os_error(),
        Some(libc::EEXIST)
    );
    // Areas go whole or not at all.
    ioas.map_file(file.as_fd(), 0, 0x4000, 0x300_0000, Access::READ)
        .unwrap();
    assert_eq!(
        ioas.unmap(0x300_0000, 0x1000).unwrap_err().raw_os_error(),
        Some(libc::ENOENT)
    );
    // Several, with a hole between them, go with one call.
    assert_eq!(ioas.unmap(0x200_0000, 0x200_0000).unwrap(), 0x5000);
}

#[test]
fn a_part_of_a_mapping_can_be_copied() {
    let Some(bench) = Bench::open() else { return };
    let kernel: Arc<dyn Kernel> = bench.kernel.clone();
    let (from, to) = (
        Ioas::new(kernel.clone()).unwrap(),
        Ioas::new(kernel).unwrap(),
    );
    let file = memfd();
    from.map_file(file.as_fd(), 0, 0x10_0000, 0x200_0000, Access::READ_WRITE)
        .unwrap();
    to.copy(0x400_0000, &from, 0x204_3000, 0x2000, Access::READ)
        .unwrap();
    assert_eq!(to.unmap(0x400_0000, 0x2000).unwrap(), 0x2000);
}

/// Pages that this process has pinned, in KiB.
fn pinned() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmPin:")).unwrap();
    let value = line.split_whitespace().nth(1).unwrap();
    value.parse().unwrap()
}

/// The two ways to fill a domain, pages of 4 KiB one by one as a guest maps them. Their times are
/// printed; what is checked is that a copy pins nothing, since guest RAM is pinned already.
#[test]
fn a_copy_shares_the_pins_of_guest_memory_and_a_file_pins_anew() {
    const PAGES: u64 = 1024;
    let Some(bench) = Bench::open() else { return };
    let (_, device) = bench.devices[&A].clone();
    let kernel: Arc<dyn Kernel> = bench.kernel.clone();
    let file = memfd();
    let space = || {
        let ioas = Arc::new(Ioas::new(kernel.clone()).unwrap());
        let kind = Paging {
            nest_parent: false,
            dirty: false,
            pasid: false,
        };
        // With a table, or nothing is pinned at all.
        let table = Hwpt::paging(kernel.clone(), device, &ioas, kind).unwrap();
        (table, ioas)
    };
    let (_memory_table, memory) = space();
    let ram = || memory.map_file(file.as_fd(), 0, PAGES << 12, RAM, Access::READ_WRITE);
    ram().unwrap();
    let run = |copies: bool| {
        let (_table, ioas) = space();
        let (before, began) = (pinned(), Instant::now());
        for page in 0..PAGES {
            let (at, from) = (RAM + (page << 13), page << 12);
            match copies {
                true => ioas.copy(at, &memory, RAM + from, 1 << 12, Access::READ_WRITE),
                false => ioas.map_file(file.as_fd(), from, 1 << 12, at, Access::READ_WRITE),
            }
            .unwrap();
        }
        let (mapped, more) = (began.elapsed(), pinned() - before);
        for page in 0..PAGES {
            ioas.unmap(RAM + (page << 13), 1 << 12).unwrap();
        }
        assert_eq!(pinned(), before);
        (mapped, began.elapsed() - mapped, more)
    };
    let mut best = [[Duration::MAX; 2]; 2];
    for _ in 0..5 {
        for (copies, best) in [true, false].into_iter().zip(&mut best) {
            let (map, unmap, more) = run(copies);
            assert_eq!(more, if copies { 0 } else { PAGES << 2 }, "KiB pinned");
            *best = [best[0].min(map), best[1].min(unmap)];
        }
    }
    let [copy, file] = best;
    let ratio = |n: usize| file[n].as_secs_f64() / copy[n].as_secs_f64();
    println!(
        "measured, {PAGES} pages: IOAS_COPY {:?} and its unmap {:?}; MAP_FILE takes {:.2} and {:.2} \
         times as long",
        copy[0],
        copy[1],
        ratio(0),
        ratio(1)
    );
}
