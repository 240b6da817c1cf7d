//! A virtio-iommu in front of the host back end, on the fake kernel: what other implementations
//! get wrong for passed-through devices, line by line.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use vmm_sys_util::tempfile::TempFile;
use zerocopy::IntoBytes;

use super::HostIommu;
use super::fake::{Fake, FakeArea, FakeDevice, Object};
use super::tests::{A, B, Bench, MIB};
use crate::backend::{Access, Backend, Objects, Translation};
use crate::reserved::Regions;
use crate::spec::virtio_iommu::{
    ReqAttachPgtVtd, ReqHead, ReqInvalidate, Status, attach_flag, fault_reason, inval_granularity,
    map_flag, req_type, table_format,
};
use crate::virtio::testing::{attach, detach, map, probe, unmap};
use crate::virtio::{Chain, Config, Iommu};
use crate::{Rid, Target};

const RW: u32 = map_flag::READ | map_flag::WRITE;
const PAGE: u64 = 0x1000;
/// Where a peer's registers are: right behind RAM.
const BAR: u64 = 16 * MIB;

struct Guest {
    unit: Iommu,
    host: Arc<HostIommu>,
    fake: Arc<Fake>,
    /// What the kernel had before the unit was there.
    before: usize,
}

/// A guest with A and B passed through behind a unit that was composed from their host.
fn guest() -> Guest {
    guest_with(|config| config)
}

fn guest_with(change: impl FnOnce(Config) -> Config) -> Guest {
    let bench = Bench::empty();
    for rid in [A, B] {
        bench.add(rid, |_| {}).unwrap();
    }
    let Bench { host, fake, .. } = bench;
    let regions = host.reserved();
    let config = Config::compose(&host.capabilities(), regions.len()).unwrap();
    let before = fake.world().objects.len();
    let guest = Guest {
        unit: Iommu::new(change(config)),
        before,
        host: Arc::new(host),
        fake,
    };
    guest.unit.set_features(u64::MAX);
    for rid in [A, B] {
        guest.add(rid, regions.clone());
    }
    guest.fake.reset_calls();
    guest
}

impl Guest {
    fn add(&self, rid: Rid, regions: Regions) {
        let backend: Arc<dyn Backend> = self.host.clone();
        self.unit.add_endpoint(rid, backend, regions).unwrap();
    }

    fn send(&self, request: &[u8]) -> Status {
        use Status::*;
        let reply = self.unit.process(request, 4);
        let status = reply.status().expect("a status");
        [Ok, IoErr, Unsupp, DevErr, Inval, Range, NoEnt, Fault, NoMem][usize::from(status)]
    }

    fn attach(&self, endpoint: Rid, domain: u32) -> Status {
        self.send(&attach(endpoint.0.into(), domain, 0))
    }

    /// Maps pages `first..=last` of domain 1 to themselves plus 1 MiB.
    fn map(&self, first: u64, last: u64) -> Status {
        let virt = (first * PAGE, last * PAGE + PAGE - 1);
        self.send(&map(1, virt, MIB + first * PAGE, RW))
    }

    fn unmap(&self, first: u64, last: u64) -> Status {
        self.send(&unmap(1, first * PAGE, last * PAGE + PAGE - 1))
    }

    /// What the kernel maps for an endpoint, if anything is attached.
    fn areas(&self, endpoint: Rid) -> Option<Vec<(u64, FakeArea)>> {
        let world = self.fake.world();
        let device: &FakeDevice = &world.devices[&u32::from(endpoint.0)];
        assert_eq!(device.record, device.hardware, "kernel and hardware");
        let hwpt = device.hardware.get(&None)?;
        let Some(Object::Ioas(areas)) = world.objects.get(&world.ioas_of(*hwpt)?) else {
            panic!("not an IOAS");
        };
        Some(areas.iter().map(|(&iova, &area)| (iova, area)).collect())
    }

    /// First and last pages of them.
    fn pages(&self, endpoint: Rid) -> Vec<(u64, u64)> {
        let areas = self.areas(endpoint).expect("attached");
        let pages = |(iova, area): &(u64, FakeArea)| (iova / PAGE, area.last / PAGE);
        areas.iter().map(pages).collect()
    }

    fn translation(&self, endpoint: Rid) -> Translation {
        self.host.translation(Target::rid(endpoint))
    }

    /// The kernel has what it had before the guest did anything.
    fn nothing_is_left(&self) {
        assert_eq!(self.fake.world().objects.len(), self.before);
        let objects = Objects {
            endpoints: 2,
            ..Objects::default()
        };
        let now = self.host.objects();
        assert_eq!(Objects { targets: 0, ..now }, objects);
    }
}

#[test]
fn read_and_write_of_a_map_reach_the_hardware() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    for (n, (flags, access)) in [
        (map_flag::READ, Access::READ),
        (map_flag::WRITE, Access::WRITE),
        (RW, Access::READ_WRITE),
    ]
    .into_iter()
    .enumerate()
    {
        let iova = n as u64 * PAGE;
        let request = map(1, (iova, iova + PAGE - 1), MIB, flags);
        assert_eq!(guest.send(&request), Status::Ok);
        assert_eq!(guest.areas(A).unwrap()[n].1.access, access);
    }
    // A map that allows nothing is one for UNMAP's rules, and nothing for the hardware.
    let nothing = map(1, (8 * PAGE, 9 * PAGE - 1), MIB, 0);
    assert_eq!(guest.send(&nothing), Status::Ok);
    assert_eq!(guest.areas(A).unwrap().len(), 3);
    assert_eq!(guest.send(&nothing), Status::Inval);
}

#[test]
fn a_sparse_unmap_of_a_passed_through_endpoint_succeeds_and_leaves_no_phantom() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    // Examples 1, 6 and 7 of the specification.
    assert_eq!(guest.unmap(0, 4), Status::Ok);
    assert_eq!(guest.map(0, 4), Status::Ok);
    assert_eq!(guest.unmap(0, 9), Status::Ok);
    assert_eq!(guest.pages(A), []);
    assert_eq!(
        (guest.map(0, 4), guest.map(10, 14)),
        (Status::Ok, Status::Ok)
    );
    assert_eq!(guest.unmap(0, 14), Status::Ok);
    assert_eq!(guest.pages(A), []);
    // What is gone can be mapped again, in other pieces.
    assert_eq!(guest.map(3, 11), Status::Ok);
    assert_eq!(guest.pages(A), [(3, 11)]);
}

#[test]
fn a_partial_unmap_is_range_and_changes_nothing() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    assert_eq!(
        (guest.map(0, 9), guest.map(20, 29)),
        (Status::Ok, Status::Ok)
    );
    for (first, last) in [(0, 4), (5, 9), (3, 6), (0, 24), (5, 40)] {
        assert_eq!(guest.unmap(first, last), Status::Range);
        assert_eq!(guest.pages(A), [(0, 9), (20, 29)]);
    }
}

#[test]
fn endpoints_of_a_domain_share_one_address_space_and_one_call() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    assert_eq!(guest.map(0, 4), Status::Ok);
    assert_eq!(guest.attach(B, 1), Status::Ok);
    assert_eq!(guest.pages(B), [(0, 4)], "what exists is there for B");
    guest.fake.reset_calls();
    assert_eq!(guest.map(8, 8), Status::Ok);
    assert_eq!(guest.fake.calls(), BTreeMap::from([("copy", 1)]));
    assert_eq!(guest.pages(A), guest.pages(B));
    assert_eq!(guest.attach(B, 1), Status::Ok, "again");
    assert_eq!(guest.unmap(0, 8), Status::Ok);
    assert_eq!((guest.pages(A), guest.pages(B)), (vec![], vec![]));
}

#[test]
fn an_attach_that_fails_at_any_call_leaves_the_old_domain_or_nothing() {
    let calls = {
        let guest = guest();
        assert_eq!(
            (guest.attach(A, 1), guest.map(0, 4)),
            (Status::Ok, Status::Ok)
        );
        let from = guest.fake.world().count;
        assert_eq!(guest.attach(A, 2), Status::Ok);
        guest.fake.world().count - from
    };
    assert!(calls > 2);
    for at in 0..calls {
        let guest = guest();
        assert_eq!(
            (guest.attach(A, 1), guest.map(0, 4)),
            (Status::Ok, Status::Ok)
        );
        let before = guest.fake.world().objects.len();
        {
            let mut world = guest.fake.world();
            world.fail_at = Some((world.count + at, libc::ENOMEM));
        }
        let status = guest.attach(A, 2);
        guest.fake.world().fail_at = None;
        if status == Status::Ok {
            // A replace that failed is made good by a detach and another attach.
            assert_eq!(guest.pages(A), [], "call {at}");
        } else {
            assert_eq!(status, Status::NoMem, "call {at}");
            assert_eq!(guest.pages(A), [(0, 4)], "call {at}");
            assert_eq!(guest.fake.world().objects.len(), before, "call {at}");
            assert_eq!(guest.attach(A, 2), Status::Ok, "call {at}");
        }
        // The old domain is no more.
        assert_eq!(guest.unmap(0, 4), Status::NoEnt);
        assert_eq!(guest.send(&detach(A.0.into(), 2)), Status::Ok);
        guest.nothing_is_left();
    }
}

#[test]
fn bypass_is_real_for_passed_through_endpoints_and_the_configuration_says_so() {
    let guest = guest_with(|config| Config {
        bypass: true,
        ..config
    });
    let said = || guest.unit.config_space()[36];
    assert_eq!((said(), guest.translation(A)), (1, Translation::Identity));
    guest.unit.write_config(36, &[0]);
    assert_eq!((said(), guest.translation(A)), (0, Translation::Blocked));
    // A domain in bypass mode, while those in none are blocked.
    let request = attach(A.0.into(), 1, attach_flag::BYPASS);
    assert_eq!(guest.send(&request), Status::Ok);
    assert_eq!(guest.translation(A), Translation::Identity);
    assert_eq!(guest.translation(B), Translation::Blocked);
    guest.unit.reset();
    assert_eq!((said(), guest.translation(A)), (0, Translation::Blocked));
    guest.unit.system_reset();
    assert_eq!((said(), guest.translation(A)), (1, Translation::Identity));
    guest.nothing_is_left();
}

#[test]
fn a_reset_of_the_device_or_the_system_leaves_nothing_in_the_kernel() {
    for system in [false, true] {
        let guest = guest();
        assert_eq!(guest.attach(A, 1), Status::Ok);
        assert_eq!(guest.attach(B, 2), Status::Ok);
        for n in 0..300 {
            assert_eq!(guest.map(2 * n, 2 * n), Status::Ok);
        }
        match system {
            false => guest.unit.reset(),
            true => guest.unit.system_reset(),
        }
        assert_eq!(guest.areas(A), None);
        assert_eq!(guest.areas(B), None);
        guest.nothing_is_left();
        // The next driver finds what the first found.
        guest.unit.set_features(u64::MAX);
        assert_eq!(
            (guest.attach(A, 1), guest.map(0, 0)),
            (Status::Ok, Status::Ok)
        );
        assert_eq!(guest.pages(A), [(0, 0)]);
    }
}

#[test]
fn the_hosts_reserved_regions_are_told_and_maps_over_them_are_refused() {
    let guest = guest();
    let reply = guest
        .unit
        .process(&probe(A.0.into()), guest.unit.longest_reply());
    let bytes = reply.bytes();
    // Type RESV_MEM, length 20, subtype MSI, the interrupt window.
    assert_eq!(bytes[..5], [1, 0, 20, 0, 1]);
    assert_eq!(bytes[8..16], 0xfee0_0000u64.to_le_bytes());
    assert_eq!(bytes[16..24], 0xfeef_ffffu64.to_le_bytes());
    assert_eq!(guest.attach(A, 1), Status::Ok);
    guest.fake.reset_calls();
    let over = map(1, (0xfedf_f000, 0xfee0_0fff), MIB, RW);
    assert_eq!(guest.send(&over), Status::Inval);
    let beyond = map(1, (1 << 48, (1 << 48) + PAGE - 1), MIB, RW);
    assert_eq!(guest.send(&beyond), Status::Range, "the host has 48 bits");
    assert_eq!(guest.fake.calls(), BTreeMap::new());
}

#[test]
fn maps_of_a_peers_registers_reach_the_host_also_across_the_end_of_ram() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    let flags = RW | map_flag::MMIO;
    let registers = map(1, (0, PAGE - 1), BAR, flags);
    assert_eq!(
        guest.send(&registers),
        Status::Fault,
        "there is no peer yet"
    );
    let buffer = TempFile::new().unwrap().into_file();
    let add = || guest.host.add_device_memory(BAR, buffer.as_fd(), 0, MIB);
    add().unwrap();
    assert_eq!(guest.send(&registers), Status::Ok);
    assert_eq!(guest.areas(A).unwrap()[0].1.gpa, BAR);
    let across = map(1, (MIB, 2 * MIB - 1), BAR - MIB / 2, RW);
    assert_eq!(guest.send(&across), Status::Ok);
    assert_eq!(guest.areas(A).unwrap()[1].1.gpa, BAR - MIB / 2);
    // The peer goes: what is mapped goes with the guest's UNMAP, and no more is mapped.
    guest.host.remove_device_memory(BAR).unwrap();
    assert_eq!(guest.unmap(0, 2 * MIB / PAGE), Status::Ok);
    assert_eq!(guest.send(&registers), Status::Fault);
    assert_eq!(guest.pages(A), []);
}

#[test]
fn what_the_kernel_says_of_a_map_reaches_the_guest() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    for (number, status) in [
        (libc::ENOMEM, Status::NoMem),
        (libc::ENOSPC, Status::NoMem),
        (libc::EIO, Status::DevErr),
        (libc::EFAULT, Status::DevErr),
    ] {
        guest.fake.world().fail_all = Some(("copy", number));
        assert_eq!(guest.map(0, 4), status);
        guest.fake.world().fail_all = None;
        assert_eq!(guest.pages(A), []);
    }
    let nowhere = map(1, (0, PAGE - 1), 64 * MIB, RW);
    assert_eq!(guest.send(&nowhere), Status::Fault);
    assert_eq!(guest.map(0, 4), Status::Ok, "the VM goes on");
}

#[test]
fn what_the_kernel_does_not_unmap_is_out_of_reach_all_the_same() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    assert_eq!((guest.map(0, 4), guest.map(8, 8)), (Status::Ok, Status::Ok));
    guest.fake.world().fail_all = Some(("unmap", libc::EIO));
    assert_eq!(guest.unmap(0, 4), Status::Ok);
    guest.fake.world().fail_all = None;
    // The domain was made anew without it.
    assert_eq!(guest.pages(A), [(8, 8)]);
    let report = guest.unit.next_fault().expect("a report");
    assert_eq!(report.reason, fault_reason::UNKNOWN);
}

#[test]
fn what_the_kernel_does_not_take_back_of_a_refused_map_is_out_of_reach_all_the_same() {
    let guest = guest();
    assert_eq!(guest.attach(A, 1), Status::Ok);
    assert_eq!(guest.map(8, 8), Status::Ok);
    guest.fake.world().fail_all = Some(("unmap", libc::EIO));
    // The second is no memory, so the first is taken out again before it is tried alone.
    let requests = [0, BAR].map(|phys| map(1, (phys, phys + PAGE - 1), phys, RW));
    let chains = requests.iter().map(|readable| Chain {
        readable,
        writable: 4,
    });
    let mut replies = Vec::new();
    guest.unit.serve(chains, &mut replies);
    let statuses: Vec<_> = replies.iter().map(|reply| reply.status()).collect();
    assert_eq!(
        (&statuses[..], &guest.pages(A)[..]),
        (
            &[Some(Status::Ok as u8), Some(Status::Fault as u8)][..],
            &[(0, 0), (8, 8)][..]
        )
    );
}

#[test]
fn the_domain_of_a_device_that_left_is_not_the_next_ones() {
    let guest = guest();
    assert_eq!(
        (guest.attach(A, 1), guest.map(0, 4)),
        (Status::Ok, Status::Ok)
    );
    guest.unit.remove_endpoint(A);
    guest.add(A, guest.host.reserved());
    assert_eq!(guest.translation(A), Translation::Blocked);
    assert_eq!(guest.areas(A), None);
    assert_eq!(guest.unmap(0, 4), Status::NoEnt);
    guest.nothing_is_left();
}

#[test]
fn what_is_offered_is_what_the_host_can_do() {
    let guest = guest();
    let space = guest.unit.config_space();
    let word = |at: usize| u64::from_le_bytes(space[at..at + 8].try_into().unwrap());
    assert_eq!(word(0), guest.host.capabilities().page_sizes & 0x7fff_f000);
    assert_eq!((word(8), word(16)), (0, (1 << 48) - 1));
}

/// ATTACH_TABLE of the experimental extension.
fn attach_table(endpoint: Rid, domain: u32, root: u64) -> Vec<u8> {
    let head = ReqHead {
        r#type: req_type::ATTACH_TABLE,
        reserved: [0; 3],
    };
    let request = ReqAttachPgtVtd {
        head,
        domain: domain.into(),
        endpoint: u32::from(endpoint.0).into(),
        flags: 0.into(),
        format: table_format::PGTF_VTD.into(),
        reserved: [0; 2],
        pasid: 0.into(),
        pgd: root.into(),
        fl_flags: 0.into(),
        addr_width: 48.into(),
        reserved2: [0; 36],
    };
    request.as_bytes().to_vec()
}

fn invalidate(domain: u32, first: u64, pages: u64) -> Vec<u8> {
    let head = ReqHead {
        r#type: req_type::INVALIDATE,
        reserved: [0; 3],
    };
    let request = ReqInvalidate {
        head,
        inv_gran: inval_granularity::VA.into(),
        inv_type: 1.into(),
        flags: 0.into(),
        reserved1: [0; 2],
        domain: domain.into(),
        pasid: 0.into(),
        reserved2: [0; 4],
        archid: 0.into(),
        virt_start: first.into(),
        nr_pages: pages.into(),
        granule: 12,
        reserved3: [0; 11],
    };
    request.as_bytes().to_vec()
}

#[test]
fn a_guests_own_table_is_a_nested_table_of_the_host_and_an_invalidation_one_array() {
    let guest = guest_with(|config| Config {
        attach_table: true,
        ..config
    });
    for rid in [A, B] {
        assert_eq!(guest.send(&attach_table(rid, 1, 0x5000)), Status::Ok);
        assert!(matches!(guest.translation(rid), Translation::Stage1(t) if t.root.0 == 0x5000));
    }
    assert_eq!(guest.fake.calls()["hwpt_alloc"], 1, "one table for both");
    guest.fake.reset_calls();
    assert_eq!(guest.send(&invalidate(1, 0x7000, 3)), Status::Ok);
    let invalidated = guest.fake.world().invalidated.clone();
    assert!(!invalidated.is_empty());
    assert!(invalidated.iter().all(|(_, entries)| {
        entries.len() == 1 && entries[0].addr == 0x7000 && entries[0].npages == 3
    }));
    // To mappings and back.
    assert_eq!(
        (guest.attach(A, 2), guest.translation(B)),
        (Status::Ok, guest.translation(B))
    );
    assert_eq!(guest.pages(A), []);
    assert_eq!(guest.send(&attach_table(A, 1, 0x5000)), Status::Ok);
    guest.unit.reset();
    guest.nothing_is_left();
}

#[test]
fn a_table_that_the_host_refuses_leaves_the_endpoint_as_it_was() {
    let guest = guest_with(|config| Config {
        attach_table: true,
        ..config
    });
    assert_eq!(
        (guest.attach(A, 1), guest.map(0, 4)),
        (Status::Ok, Status::Ok)
    );
    // 2^48 is above the host's width.
    assert_eq!(guest.send(&attach_table(A, 2, 1 << 48)), Status::Unsupp);
    assert_eq!(guest.pages(A), [(0, 4)]);
    guest.fake.world().fail_all = Some(("hwpt_alloc", libc::ENOSPC));
    assert_eq!(guest.send(&attach_table(A, 2, 0x5000)), Status::NoMem);
    guest.fake.world().fail_all = None;
    assert_eq!(guest.pages(A), [(0, 4)]);
    assert_eq!(guest.send(&attach_table(A, 2, 0x5000)), Status::Ok);
}
