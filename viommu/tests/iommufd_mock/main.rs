//! The host back end on the kernel's own iommufd, with its mock devices (`CONFIG_IOMMUFD_TEST`):
//! the real ioctls, objects, fault queues and PASID attaches, without hardware.
//!
//! Runs where `/dev/iommu` takes the mock's command (the lab's host, as root); elsewhere each test
//! says why it does nothing.
//!
//! The mock is not VT-d: its nested tables have a format of their own, its devices are never
//! detached, and a failed replace leaves the old table in force. What differs is translated here,
//! in [`mock`], and VT-d's own behaviour is tested on the back end's fake.
//!
//! `cargo lab test kernel::` runs it on the lab's host.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's helpers fail as the test does"
)]

mod address_spaces;
mod bench;
mod mock;
mod page_requests;

use std::path::Path;

use viommu::backend::conformance;
use viommu::backend::iommufd::kernel::{Kernel, Linux};
use viommu::backend::{
    Access, Backend, Invalidation, InvalidationRange, Mapping, Objects, Scope, Translation,
};
use viommu::{Gpa, Iova, Pasid, Target};
use vm_memory::{Bytes, GuestAddress};

use self::bench::{A, B, Bench, RAM, pasid, stage1};
use self::mock::{IOTLB_DEFAULT, OP_MD_CHECK_MAP};

#[test]
fn guest_ram_is_what_the_device_sees() {
    let Some(bench) = Bench::open() else { return };
    bench
        .ram
        .write_slice(b"through the mock", GuestAddress(RAM + 0x5000))
        .unwrap();
    let domain = bench.host.create_domain().unwrap();
    let mapping = Mapping {
        iova: Iova(0x4000_0000),
        gpa: Gpa(RAM + 0x5000),
        length: 0x3000,
        access: Access::READ,
        mmio: false,
    };
    bench
        .host
        .apply(pasid(A, 1), Translation::Domain(domain))
        .unwrap();
    bench.host.map(domain, &[mapping]).unwrap();
    // The mock compares its page table with the pages of an address of ours.
    let address = {
        use vm_memory::GuestMemoryBackend;
        bench
            .ram
            .get_host_address(GuestAddress(RAM + 0x5000))
            .unwrap() as u64
    };
    let check = || {
        let words = [0x4000_0000, 0x3000, address];
        bench.kernel.test(OP_MD_CHECK_MAP, bench.hwpt(A, 1), &words)
    };
    check().unwrap();
    assert_eq!(
        bench.host.unmap(domain, Iova(0), Iova(u64::MAX)).unwrap(),
        0x3000
    );
    bench.host.destroy_domain(domain);
}

#[test]
fn targets_switch_between_all_translations_and_the_kernel_agrees() {
    let Some(bench) = Bench::open() else { return };
    let domain = bench.host.create_domain().unwrap();
    let all = [
        stage1(RAM),
        Translation::Identity,
        Translation::Domain(domain),
        stage1(RAM + 0x1000),
    ];
    for first in all {
        for second in all {
            for target in [Target::rid(A), pasid(A, 7), pasid(B, 7)] {
                bench.host.apply(target, first).unwrap();
                bench.host.apply(target, second).unwrap();
                assert_eq!(bench.host.translation(target), second);
                if let Some(Pasid(number)) = target.pasid {
                    let hwpt = bench.hwpt(target.endpoint, number);
                    assert!(bench.has(target.endpoint, number, hwpt));
                }
            }
        }
    }
    for rid in [A, B] {
        bench
            .host
            .apply(pasid(rid, 7), Translation::Blocked)
            .unwrap();
        assert!(bench.has(rid, 7, 0));
    }
    bench.host.destroy_domain(domain);
}

#[test]
fn invalidations_reach_the_shared_table_and_an_error_says_how_far() {
    let Some(bench) = Bench::open() else { return };
    bench.host.apply(Target::rid(A), stage1(RAM)).unwrap();
    bench.host.apply(pasid(B, 3), stage1(RAM)).unwrap();
    assert_eq!(bench.host.objects().translations, 1);
    let hwpt = bench.hwpt(B, 3);
    assert!((0..4).all(|entry| bench.iotlb(hwpt, entry, IOTLB_DEFAULT)));
    let page = |entry: u64| Invalidation {
        scope: Scope::Target(Target::rid(A)),
        range: InvalidationRange::Pages {
            first: Iova(entry << 12),
            count: 1,
            leaf: true,
        },
    };
    assert_eq!(bench.host.invalidate(&[page(2)]), 1);
    assert!(bench.iotlb(hwpt, 2, 0) && bench.iotlb(hwpt, 1, IOTLB_DEFAULT));
    // The mock has entries 0 to 3: 9 is refused, after 1 took effect.
    assert_eq!(bench.host.invalidate(&[page(1), page(9), page(0)]), 1);
    assert!(bench.iotlb(hwpt, 1, 0) && bench.iotlb(hwpt, 0, IOTLB_DEFAULT));
    let all = Invalidation {
        scope: Scope::All,
        range: InvalidationRange::All,
    };
    assert_eq!(bench.host.invalidate(&[all]), 1);
    assert!((0..4).all(|entry| bench.iotlb(hwpt, entry, 0)));
}

#[test]
fn nothing_is_left_behind() {
    let Some(bench) = Bench::open() else { return };
    let domain = bench.host.create_domain().unwrap();
    for number in 1..64 {
        let translation = match number % 3 {
            0 => stage1(RAM + (u64::from(number) << 12)),
            1 => Translation::Identity,
            _ => Translation::Domain(domain),
        };
        bench.host.apply(pasid(A, number), translation).unwrap();
        bench.host.apply(pasid(B, number), translation).unwrap();
    }
    for rid in [A, B] {
        bench.host.release(rid);
        assert!((1..64).all(|number| bench.has(rid, number, 0)));
        bench.host.claim(rid, bench.sink.clone()).unwrap();
        bench.host.remove_device(rid);
    }
    bench.host.destroy_domain(domain);
    assert_eq!(bench.host.objects(), Objects::default());
    // Every object that the back end had has an id that is free again: destroying any fails with
    // ENOENT, except those of the mock's devices and our own.
    drop(bench.host);
    let live = (1..1024)
        .filter(|&id| match bench.kernel.destroy(id) {
            Ok(()) => true,
            Err(error) => error.raw_os_error() == Some(libc::EBUSY),
        })
        .count();
    // For each of the two devices: an address space, its two tables, the device and its binding.
    assert!(live <= 10, "{live} objects are left");
}

#[test]
fn the_host_back_end_conforms_on_the_kernel() {
    if Bench::unclaimed().is_none() {
        return;
    }
    for (name, check) in conformance::CHECKS {
        // The mock has four cache entries where VT-d has an address space.
        if name.contains("invalidation of existing") {
            continue;
        }
        eprintln!("conformance: {name}");
        check(&Bench::unclaimed().unwrap());
    }
}

#[test]
fn where_there_is_no_iommufd_the_file_is_named() {
    assert!(Linux::open(Path::new("/nonexistent")).is_err());
}
