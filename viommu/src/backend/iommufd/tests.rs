//! The back end on the fake kernel: each trap of the host's contract, counts of calls, failure at
//! every call, and random work with the record checked against the kernel after every step.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempfile::TempFile;

use super::fake::{Fake, FakeArea, FakeAttach, FakeDevice, FakeIommu, Object};
use super::hwinfo::VtdHardware;
use super::{Device, HostIommu, Unfit};
use crate::backend::{
    Access, Backend, Capabilities, EventSink, Fault, Invalidation, InvalidationRange, Mapping,
    Objects, PageRequest, PageResponse, Refused, ResponseCode, Scope, Stage1, Stage2, Translation,
};
use crate::{DomainId, Gpa, GuestRam, Iova, Pasid, Rid, Target};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const A: Rid = Rid::new(0, 3, 0);
pub(super) const B: Rid = Rid::new(0, 4, 0);

/// Nesting, PASID 20 bits, page requests, 48-bit MGAW, no 5-level, no SRS, no EAFS.
const UNIT: VtdHardware = VtdHardware {
    errata: VtdHardware::ERRATA_772415,
    cap: 47 << 16 | 1 << 56 | 6,
    ecap: 1 << 2
        | 1 << 7
        | 1 << 26
        | 1 << 29
        | 19 << 35
        | 1 << 40
        | 1 << 42
        | 1 << 43
        | 1 << 45
        | 1 << 46
        | 1 << 47
        | 1 << 48,
};

/// The MSI window, which every x86 device reserves.
const DOORBELLS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

pub(super) struct Bench {
    pub(super) host: HostIommu,
    pub(super) fake: Arc<Fake>,
    ram: GuestRam,
    sink: Arc<Sink>,
}

#[derive(Default)]
pub(super) struct Sink(Mutex<Vec<PageRequest>>);

impl EventSink for Sink {
    fn fault(&self, fault: Fault) {
        panic!("the kernel reports no faults: {fault:?}");
    }

    fn page_request(&self, request: PageRequest) {
        self.0.lock().unwrap().push(request);
    }
}

impl Sink {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Waits for `count` requests and takes them.
    fn take(&self, count: usize) -> Vec<PageRequest> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let mut requests = self.0.lock().unwrap();
            if requests.len() >= count {
                return std::mem::take(&mut requests);
            }
            drop(requests);
            assert!(Instant::now() < end, "no page request");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn ram() -> GuestRam {
    let file = || {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(16 * MIB).unwrap();
        Some(FileOffset::new(file, 0))
    };
    let ranges = [
        (GuestAddress(0), 16 << 20, file()),
        (GuestAddress(4096 * MIB), 16 << 20, file()),
    ];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

impl Bench {
    /// RAM of 16 MiB at 0 and at 4 GiB; nothing else.
    pub(super) fn empty() -> Self {
        let fake = Arc::new(Fake::default());
        fake.world().iommus.push(FakeIommu {
            unit: UNIT,
            domains: 64,
            kind: 0,
        });
        let ram = ram();
        Self {
            host: HostIommu::new(fake.clone(), ram.clone()).unwrap(),
            fake,
            ram,
            sink: Arc::default(),
        }
    }

    /// With two claimed devices, A and B, behind one IOMMU, with PASIDs and page requests.
    fn new() -> Self {
        let bench = Self::empty();
        for rid in [A, B] {
            bench.add(rid, |_| {}).unwrap();
            bench.host.claim(rid, bench.sink.clone()).unwrap();
        }
        bench.fake.reset_calls();
        bench
    }

    pub(super) fn add(&self, rid: Rid, change: impl FnOnce(&mut FakeDevice)) -> Result<(), Unfit> {
        let mut device = FakeDevice {
            iommu: 0,
            pasid_bits: 20,
            reserved: vec![DOORBELLS],
            pri: true,
            in_reset: 0,
            record: BTreeMap::new(),
            hardware: BTreeMap::new(),
            stopped: false,
            leaked: 0,
        };
        change(&mut device);
        let page_requests = device.pri;
        let id = u32::from(rid.0);
        self.fake.world().devices.insert(id, device);
        let device = Device {
            id,
            attach: Arc::new(FakeAttach {
                fake: self.fake.clone(),
                id,
            }),
            page_requests,
        };
        self.host.add_device(rid, device)
    }

    fn device(&self, rid: Rid) -> FakeDevice {
        self.fake.world().devices[&u32::from(rid.0)].clone()
    }

    /// The record is what the kernel has, and what the kernel has is what the hardware does.
    pub(super) fn check(&self) {
        let world = self.fake.world();
        for (&id, device) in &world.devices {
            let endpoint = Rid(id as u16);
            if !device.stopped {
                assert_eq!(
                    device.record, device.hardware,
                    "{endpoint}: kernel and hardware"
                );
            }
            assert_eq!(device.leaked, 0);
            let mut seen = 0;
            for (&pasid, hwpt) in &device.record {
                let target = Target { endpoint, pasid };
                let translation = self.host.translation(target);
                if device.stopped && translation == Translation::Blocked {
                    // The kernel did not let go of it.
                    continue;
                }
                seen += 1;
                match (&world.objects[hwpt], translation) {
                    (Object::Paging { ioas, .. }, Translation::Identity) => {
                        assert_eq!(*ioas, 1, "{target}");
                    }
                    (Object::Nested { table, .. }, Translation::Stage1(stage1)) => {
                        assert_eq!(
                            (table.pgtbl_addr, table.addr_width),
                            (stage1.root.0, stage1.width.into())
                        );
                    }
                    (
                        Object::Paging { ioas, .. },
                        Translation::Domain(_) | Translation::Stage2(_),
                    ) => {
                        assert_ne!(*ioas, 1, "{target}");
                    }
                    other => panic!("{target}: {other:?}"),
                }
            }
            let targets = [None]
                .into_iter()
                .chain((1..16).map(|pasid| Some(Pasid(pasid))))
                .filter(|&pasid| {
                    self.host.translation(Target { endpoint, pasid }) != Translation::Blocked
                })
                .count();
            assert_eq!(
                targets, seen,
                "{endpoint}: targets that the kernel does not have"
            );
        }
    }

    /// The areas of the address space that `rid` is attached to.
    fn areas(&self, rid: Rid) -> Vec<(u64, FakeArea)> {
        let world = self.fake.world();
        let hwpt = world.devices[&u32::from(rid.0)].hardware[&None];
        let ioas = world.ioas_of(hwpt).unwrap();
        let Object::Ioas(areas) = &world.objects[&ioas] else {
            panic!("not an IOAS");
        };
        areas.iter().map(|(&iova, &area)| (iova, area)).collect()
    }

    fn objects(&self) -> usize {
        self.fake.world().objects.len()
    }
}

pub(super) fn stage1(root: u64) -> Translation {
    Translation::Stage1(Stage1 {
        root: Gpa(root),
        width: 48,
        sre: false,
        wpe: false,
        eafe: false,
    })
}

fn pasid(endpoint: Rid, number: u32) -> Target {
    Target::pasid(endpoint, Pasid(number))
}

fn everything(scope: Scope) -> Invalidation {
    Invalidation {
        scope,
        range: InvalidationRange::All,
    }
}

fn pages(scope: Scope, first: u64, count: u64) -> Invalidation {
    Invalidation {
        scope,
        range: InvalidationRange::Pages {
            first: Iova(first),
            count,
            leaf: false,
        },
    }
}

pub(super) fn mapping(iova: u64, gpa: u64, length: u64, access: Access) -> Mapping {
    Mapping {
        iova: Iova(iova),
        gpa: Gpa(gpa),
        length,
        access,
        mmio: false,
    }
}

// Counts.

#[test]
fn guest_ram_is_mapped_with_one_call_per_region() {
    let bench = Bench::empty();
    let calls = BTreeMap::from([("ioas_alloc", 1), ("allow_iovas", 1), ("map_file", 2)]);
    assert_eq!(bench.fake.calls(), calls);
    bench.add(A, |_| {}).unwrap();
    bench.add(B, |_| {}).unwrap();
    assert_eq!(bench.fake.calls()["map_file"], 2, "not once per device");
}

#[test]
fn a_nested_switch_is_one_alloc_and_one_attach() {
    let bench = Bench::new();
    for (index, root) in [0x1000, 0x2000].into_iter().enumerate() {
        bench.fake.reset_calls();
        bench.host.apply(pasid(A, 5), stage1(root)).unwrap();
        let mut calls = BTreeMap::from([("hwpt_alloc", 1), ("attach", 1)]);
        if index > 0 {
            calls.insert("destroy", 1);
        }
        assert_eq!(bench.fake.calls(), calls);
    }
    bench.check();
}

#[test]
fn asking_again_for_what_is_in_force_makes_no_call() {
    let bench = Bench::new();
    for translation in [stage1(0x1000), Translation::Identity, Translation::Blocked] {
        bench.host.apply(Target::rid(A), translation).unwrap();
        bench.fake.reset_calls();
        bench.host.apply(Target::rid(A), translation).unwrap();
        assert_eq!(bench.fake.calls(), BTreeMap::new());
    }
}

#[test]
fn equal_tables_are_one_object_and_one_call_per_invalidation() {
    let bench = Bench::new();
    let before = bench.objects();
    let targets = [Target::rid(A), Target::rid(B), pasid(A, 1), pasid(B, 7)];
    for target in targets {
        bench.host.apply(target, stage1(0x1000)).unwrap();
    }
    assert_eq!(bench.objects(), before + 1);
    assert_eq!(bench.host.objects().translations, 1);
    bench.fake.reset_calls();
    let batch = targets.map(|target| pages(Scope::Target(target), 0x5000, 2));
    assert_eq!(bench.host.invalidate(&batch), 4);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("invalidate", 1)]));
    assert_eq!(bench.fake.world().invalidated[0].1.len(), 1);
    bench.check();
}

#[test]
fn one_doorbell_is_one_array_per_table_whatever_its_length() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.host.apply(Target::rid(B), stage1(0x2000)).unwrap();
    bench.fake.reset_calls();
    let batch = (0..10_000)
        .map(|page| pages(Scope::All, page * 0x1000, 1))
        .collect::<Vec<_>>();
    assert_eq!(bench.host.invalidate(&batch), batch.len());
    assert_eq!(bench.fake.calls(), BTreeMap::from([("invalidate", 2)]));
    // Beyond its bound an array says "everything".
    let world = bench.fake.world();
    assert!(
        world
            .invalidated
            .iter()
            .all(|(_, entries)| entries.len() == 1)
    );
}

#[test]
fn a_domain_is_mapped_once_for_all_its_endpoints_and_unmapped_with_one_call() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    for rid in [A, B] {
        bench
            .host
            .apply(Target::rid(rid), Translation::Domain(domain))
            .unwrap();
    }
    bench.fake.reset_calls();
    let mappings = (0..8)
        .map(|n| mapping(0x10_0000 + n * 0x1000, n * 0x2000, 0x1000, Access::READ))
        .collect::<Vec<_>>();
    bench.host.map(domain, &mappings).unwrap();
    assert_eq!(bench.fake.calls(), BTreeMap::from([("copy", 8)]));
    assert_eq!(bench.host.objects().mappings, 8);
    bench.fake.reset_calls();
    let removed = bench.host.unmap(domain, Iova(0), Iova(u64::MAX)).unwrap();
    assert_eq!(removed, 0x8000);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("unmap", 1)]));
    bench.check();
}

// Admission.

#[test]
fn a_device_is_blocked_from_the_moment_it_exists() {
    let bench = Bench::empty();
    bench.add(A, |_| {}).unwrap();
    assert_eq!(bench.device(A).hardware, BTreeMap::new());
    bench.host.claim(A, bench.sink.clone()).unwrap();
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
    bench.check();
}

#[test]
fn a_reserved_region_in_guest_ram_is_refused_before_the_guest_starts() {
    let bench = Bench::empty();
    let refused = bench.add(A, |device| device.reserved.push((8 * MIB, 9 * MIB - 1)));
    assert!(matches!(refused, Err(Unfit::ReservedByDevice(rid)) if rid == A));
    assert_eq!(bench.objects(), 1, "only the guest's memory is left");
}

/// Seed of the rule: a device that goes straight to a nested table gets its doorbell from nowhere,
/// unless the parent has it. `Tables::get` takes a [`Parent`](super::parent::Parent), which only
/// admission makes; here the kernel leaves the doorbell out.
#[test]
fn no_nested_table_is_made_where_the_parent_has_no_doorbell() {
    for half in [None, Some((DOORBELLS.0, DOORBELLS.1 - 0x1000))] {
        let bench = Bench::empty();
        let refused = bench.add(A, |device| device.reserved = half.into_iter().collect());
        let error = refused.unwrap_err();
        assert!(
            matches!(error, Unfit::Doorbell { endpoint: A, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("intremap=on"), "{error}");
        assert!(bench.host.claim(A, bench.sink.clone()).is_err());
        assert!(bench.host.apply(Target::rid(A), stage1(0x1000)).is_err());
        let nested = |object: &Object| matches!(object, Object::Nested { .. });
        assert!(!bench.fake.world().objects.values().any(nested));
        assert_eq!(
            bench.device(A).record,
            BTreeMap::new(),
            "nothing is attached"
        );
    }
}

/// The parent is attached before anything nested, also for a device that its guest puts straight
/// into a nested table; and what was enforced is kept whatever the guest switches to.
#[test]
fn doorbell_and_reserved_regions_are_enforced_before_and_across_every_switch() {
    let bench = Bench::empty();
    bench
        .add(A, |device| device.reserved.push((512 * MIB, 513 * MIB - 1)))
        .unwrap();
    let calls = bench.fake.calls();
    assert_eq!(
        (calls.get("attach"), calls.get("iova_ranges")),
        (Some(&1), Some(&1))
    );
    bench.host.claim(A, bench.sink.clone()).unwrap();
    let domain = bench.host.create_domain().unwrap();
    let at = Target::rid(A);
    let kept = |bench: &Bench| {
        let reserved = bench.host.reserved();
        assert!(reserved.overlapping(DOORBELLS.0, DOORBELLS.1).is_some());
        for (first, _) in [DOORBELLS, (512 * MIB, 0)] {
            let over = mapping(first, 0, 0x1000, Access::READ_WRITE);
            assert!(
                bench.host.map(domain, &[over]).is_err(),
                "{first:#x} was mapped"
            );
        }
    };
    for translation in [
        stage1(0x1000),
        Translation::Domain(domain),
        stage1(0x2000),
        Translation::Identity,
        stage1(0x1000),
        Translation::Blocked,
        Translation::Domain(domain),
    ] {
        bench.host.apply(at, translation).unwrap();
        kept(&bench);
        bench.check();
    }
}

#[test]
fn reserved_regions_hold_while_the_device_is_blocked_and_after_it_is_gone() {
    let bench = Bench::empty();
    bench
        .add(A, |device| device.reserved.push((512 * MIB, 513 * MIB - 1)))
        .unwrap();
    let file = TempFile::new().unwrap();
    let place = |gpa| {
        use std::os::fd::AsFd;
        bench
            .host
            .add_device_memory(gpa, file.as_file().as_fd(), 0, MIB)
    };
    // The kernel would take both: it knows the regions of attached devices only.
    assert!(matches!(place(512 * MIB), Err(Unfit::Reserved(_))));
    bench.host.remove_device(A);
    assert!(matches!(place(512 * MIB), Err(Unfit::Reserved(_))));
    let reserved = bench.host.reserved();
    let first_in = |first, last| reserved.overlapping(first, last).map(|region| region.first);
    assert_eq!(first_in(DOORBELLS.0, DOORBELLS.1), Some(DOORBELLS.0));
    assert_eq!(first_in(1 << 48, u64::MAX), Some(1 << 48));
    assert_eq!(first_in(0, 511 * MIB), None);
    place(514 * MIB).unwrap();
    bench.host.remove_device_memory(514 * MIB).unwrap();
    place(514 * MIB).unwrap();
}

#[test]
fn iommus_that_differ_get_parents_of_their_own_over_one_mapping_of_ram() {
    let bench = Bench::empty();
    bench.fake.world().iommus.push(FakeIommu {
        unit: UNIT,
        domains: 64,
        kind: 1,
    });
    bench.add(A, |_| {}).unwrap();
    bench.add(B, |device| device.iommu = 1).unwrap();
    let parents = |bench: &Bench| {
        let world = bench.fake.world();
        world
            .objects
            .values()
            .filter(|object| matches!(object, Object::Paging { ioas: 1, .. }))
            .count()
    };
    assert_eq!(parents(&bench), 2);
    assert_eq!(bench.fake.calls()["map_file"], 2);
    for rid in [A, B] {
        bench.host.claim(rid, bench.sink.clone()).unwrap();
        bench.host.apply(Target::rid(rid), stage1(0x1000)).unwrap();
    }
    bench.check();
    bench.host.remove_device(B);
    assert_eq!(parents(&bench), 1);
}

#[test]
fn without_nesting_in_the_kernel_guests_first_stage_is_never_offered() {
    let bench = Bench::empty();
    bench.fake.world().iommus[0].unit.ecap &= !(1 << 26);
    bench.add(A, |_| {}).unwrap();
    bench.host.claim(A, bench.sink.clone()).unwrap();
    let has = bench.host.capabilities();
    assert!(!has.stage1 && !has.page_requests && has.stage2 == [true; 3]);
    bench.fake.reset_calls();
    let refused = bench.host.apply(Target::rid(A), stage1(0x1000));
    assert!(matches!(
        refused,
        Err(Refused::NotOffered { what: "stage1", .. })
    ));
    assert_eq!(bench.fake.calls(), BTreeMap::new());
}

#[test]
fn a_parent_has_what_cannot_be_added_later_wherever_the_host_can() {
    let kinds = |ecap: u64| {
        let bench = Bench::empty();
        bench.fake.world().iommus[0].unit.ecap = ecap;
        let with_pasid = ecap & 1 << 40 != 0;
        bench
            .add(A, |device| {
                device.pasid_bits = if with_pasid { 20 } else { 0 }
            })
            .unwrap();
        let world = bench.fake.world();
        let kinds = world.objects.values().filter_map(|object| match object {
            &Object::Paging {
                nest_parent,
                dirty,
                pasid,
                ..
            } => Some((nest_parent, dirty, pasid)),
            _ => None,
        });
        kinds.collect::<Vec<_>>()
    };
    assert_eq!(kinds(UNIT.ecap), [(true, true, true)]);
    assert_eq!(kinds(UNIT.ecap & !(1 << 45)), [(true, false, true)]);
    assert_eq!(kinds(UNIT.ecap & !(1 << 26)), [(false, true, true)]);
    assert_eq!(kinds(UNIT.ecap & !(1 << 40)), [(true, true, false)]);
    assert_eq!(kinds(0), [(false, false, false)]);
}

#[test]
fn the_address_width_is_the_narrowest_of_all_devices() {
    let bench = Bench::empty();
    let mut narrow = UNIT;
    narrow.cap = narrow.cap & !(0x3f << 16) | 46 << 16;
    bench.fake.world().iommus.push(FakeIommu {
        unit: narrow,
        domains: 64,
        kind: 1,
    });
    bench.add(A, |_| {}).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 48);
    bench.add(B, |device| device.iommu = 1).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 47);
}

#[test]
fn the_address_width_is_what_domains_have_too() {
    let bench = Bench::empty();
    // No SLADS: the kernel gives domains first-stage tables, of which half can be used.
    bench.fake.world().iommus[0].unit.ecap &= !(1 << 45);
    bench.add(A, |_| {}).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 47);
}

#[test]
fn a_later_device_that_has_less_than_was_offered_is_refused_with_field_and_values() {
    let bench = Bench::empty();
    bench.add(A, |_| {}).unwrap();
    bench.host.freeze(bench.host.capabilities());
    let mut narrow = UNIT;
    narrow.cap = narrow.cap & !(0x3f << 16) | 38 << 16;
    bench.fake.world().iommus.push(FakeIommu {
        unit: narrow,
        domains: 64,
        kind: 1,
    });
    let refused = bench.add(B, |device| device.iommu = 1).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("address_width") && text.contains("39") && text.contains("48"),
        "{text}"
    );
    assert_eq!(bench.host.objects(), Objects::default());
    bench.check();
}

#[test]
fn the_locked_memory_limit_is_named() {
    let fake = Arc::new(Fake::default());
    fake.world().fail_all = Some(("map_file", libc::ENOMEM));
    let refused = HostIommu::new(fake.clone(), ram()).unwrap_err();
    assert!(matches!(refused, Unfit::LockedMemory { .. }));
    assert_eq!(fake.world().objects.len(), 0);
    // With the first table memory is pinned.
    let bench = Bench::empty();
    bench.fake.world().fail_all = Some(("hwpt_alloc", libc::ENOMEM));
    let refused = bench.add(A, |_| {}).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("locked in memory") && text.contains("ulimit -l"),
        "{text}"
    );
}

#[test]
fn admission_that_fails_at_any_call_leaves_nothing() {
    for at in 0.. {
        let bench = Bench::empty();
        bench.add(A, |_| {}).unwrap();
        let before = bench.objects();
        let (start, end) = {
            let mut world = bench.fake.world();
            world.fail_at = Some((world.count + at, libc::EIO));
            (world.count, world.count + at)
        };
        let result = bench.add(B, |device| device.pri = false);
        let passed = bench.fake.world().count <= end;
        assert!(bench.fake.world().count > start);
        if passed {
            assert!(result.is_ok());
            return;
        }
        assert!(
            result.is_err(),
            "call {at} failed and the device was admitted"
        );
        // A detach that fails leaves the device attached: closing it is the caller's next step.
        let detached = bench.device(B).record.is_empty();
        assert!(detached || result.unwrap_err().to_string().contains("DETACH"));
        assert!(bench.objects() <= before + 1);
    }
}

// What the kernel does not check (A3).

#[test]
fn what_the_kernel_does_not_check_is_refused_here_without_a_call() {
    let bench = Bench::new();
    let table = |root, width, sre, eafe| {
        Translation::Stage1(Stage1 {
            root: Gpa(root),
            width,
            sre,
            wpe: true,
            eafe,
        })
    };
    let bad = [
        table(0x1004, 48, false, false), // would set bits of the PASID entry
        table(1 << 48, 48, false, false),
        table(0x1000, 57, false, false), // no FL5LP
        table(0x1000, 39, false, false),
        table(0x1000, 0, false, false),
        table(0x1000, 48, true, false), // no SRS
        table(0x1000, 48, false, true), // no EAFS
    ];
    for bad in bad {
        bench.host.apply(Target::rid(A), stage1(0x5000)).unwrap();
        bench.fake.reset_calls();
        let refused = bench.host.apply(Target::rid(A), bad);
        assert!(
            matches!(refused, Err(Refused::NotOffered { .. })),
            "{bad:?}"
        );
        // Blocked, and nothing else asked for.
        let calls = bench.fake.calls();
        assert_eq!(calls, BTreeMap::from([("detach", 1), ("destroy", 1)]));
        assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
        bench.check();
    }
}

#[test]
fn pasids_that_the_kernel_would_take_and_ignore_are_refused() {
    let bench = Bench::new();
    let bare = Rid::new(0, 5, 0);
    bench.add(bare, |device| device.pasid_bits = 0).unwrap();
    bench.host.claim(bare, bench.sink.clone()).unwrap();
    // No PASIDs: the kernel would say yes and do nothing (A9). 0: VFIO's name for no PASID.
    for target in [pasid(bare, 1), pasid(A, 0), pasid(A, 1 << 20)] {
        bench.fake.reset_calls();
        let refused = bench.host.apply(target, stage1(0x1000));
        assert!(matches!(
            refused,
            Err(Refused::NotOffered { what: "PASID", .. })
        ));
        assert_eq!(bench.fake.calls(), BTreeMap::new());
    }
    assert_eq!(bench.host.pasid_bits(bare), 0);
    assert_eq!(bench.host.pasid_bits(A), 20);
    bench.check();
}

#[test]
fn a_guests_own_nesting_needs_three_stages_and_is_refused() {
    let bench = Bench::new();
    let Translation::Stage1(inner) = stage1(0x1000) else {
        unreachable!()
    };
    let nested = Translation::Nested {
        stage1: inner,
        stage2: STAGE2,
    };
    let refused = bench.host.apply(Target::rid(A), nested);
    assert!(matches!(
        refused,
        Err(Refused::NotOffered { what: "nested", .. })
    ));
    assert!(!bench.host.capabilities().nested);
}

// Replace (A4).

#[test]
fn a_failed_replace_ends_blocked_and_the_record_says_so() {
    for target in [Target::rid(A), pasid(A, 3)] {
        let bench = Bench::new();
        bench.host.apply(target, Translation::Identity).unwrap();
        bench.fake.world().fail_all = Some(("attach", libc::ENOMEM));
        bench.host.apply(target, stage1(0x1000)).unwrap_err();
        assert_eq!(bench.host.translation(target), Translation::Blocked);
        bench.check();
        // iommufd would have taken the old table for attached and done nothing.
        bench.fake.world().fail_all = None;
        bench.host.apply(target, Translation::Identity).unwrap();
        assert!(!bench.device(A).hardware.is_empty());
        bench.check();
    }
}

#[test]
fn a_replace_that_failed_for_want_of_a_domain_id_is_repaired_by_detach_and_attach() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    let count = bench.fake.world().count;
    // alloc, then the replace
    bench.fake.world().fail_at = Some((count + 1, libc::ENOSPC));
    bench.host.apply(pasid(A, 1), stage1(0x1000)).unwrap();
    bench.fake.world().fail_at = None;
    bench
        .host
        .apply(Target::rid(B), Translation::Identity)
        .unwrap();
    let count = bench.fake.world().count;
    bench.fake.world().fail_at = Some((count + 1, libc::ENOSPC));
    bench.fake.reset_calls();
    bench.host.apply(Target::rid(B), stage1(0x2000)).unwrap();
    assert_eq!(
        bench.fake.calls(),
        BTreeMap::from([("hwpt_alloc", 1), ("attach", 2), ("detach", 1)])
    );
    bench.check();
}

#[test]
fn a_target_that_cannot_be_detached_is_blocked_with_its_device_stopped_until_it_can() {
    let bench = Bench::new();
    bench
        .host
        .apply(Target::rid(A), Translation::Identity)
        .unwrap();
    bench.fake.world().fail_all = Some(("detach", libc::EIO));
    bench
        .host
        .apply(Target::rid(A), Translation::Blocked)
        .unwrap_err();
    assert!(bench.device(A).stopped);
    // Not taken for what is in force already: the device is stopped.
    bench
        .host
        .apply(Target::rid(A), Translation::Identity)
        .unwrap_err();
    let blocked = || bench.host.translation(Target::rid(A)) == Translation::Blocked;
    assert!(blocked() && bench.device(A).stopped);
    // Nothing under it is freed while the kernel has it.
    assert_eq!(bench.host.objects().targets, 1);
    bench.host.release(A);
    bench.host.claim(A, bench.sink.clone()).unwrap_err();
    assert!(blocked() && bench.device(A).stopped);
    bench.fake.world().fail_all = None;
    bench.host.claim(A, bench.sink.clone()).unwrap();
    assert!(blocked() && !bench.device(A).stopped);
    bench.check();
}

#[test]
fn switching_between_tables_with_page_requests_leaks_no_reference() {
    let bench = Bench::new();
    for root in 1..6 {
        bench
            .host
            .apply(Target::rid(A), stage1(root << 12))
            .unwrap();
        bench.host.apply(pasid(A, 2), stage1(root << 12)).unwrap();
        bench.check();
    }
}

#[test]
fn an_attach_during_a_reset_waits_for_its_end() {
    let bench = Bench::new();
    let id = u32::from(A.0);
    bench.fake.world().devices.get_mut(&id).unwrap().in_reset = 12;
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.check();
    // But not for ever.
    bench.fake.world().devices.get_mut(&id).unwrap().in_reset = usize::MAX;
    bench
        .host
        .apply(Target::rid(A), stage1(0x2000))
        .unwrap_err();
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
}

#[test]
fn when_domain_ids_run_out_the_target_is_blocked_and_the_rest_goes_on() {
    let bench = Bench::new();
    bench.fake.world().iommus[0].domains = 2;
    bench.host.apply(pasid(A, 1), stage1(0x1000)).unwrap();
    bench.host.apply(pasid(A, 2), stage1(0x2000)).unwrap();
    bench.host.apply(pasid(A, 3), stage1(0x3000)).unwrap_err();
    bench.check();
    bench.host.apply(pasid(A, 1), Translation::Blocked).unwrap();
    bench.host.apply(pasid(A, 3), stage1(0x3000)).unwrap();
    bench.check();
}

// Invalidation (A5).

#[test]
fn an_array_that_took_effect_in_part_says_how_much() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.host.apply(Target::rid(B), stage1(0x2000)).unwrap();
    let batch = [
        pages(Scope::Endpoint(B), 0x1000, 1),
        pages(Scope::Endpoint(A), 0x1000, 1),
        pages(Scope::Endpoint(A), 0x3000, 1),
        pages(Scope::Endpoint(B), 0x3000, 1),
    ];
    // The first array is A's: one of its two entries is taken.
    bench.fake.world().take = Some(1);
    assert_eq!(bench.host.invalidate(&batch), 2);
    bench.fake.world().fail_all = Some(("invalidate", libc::EIO));
    assert_eq!(bench.host.invalidate(&batch), 0);
}

#[test]
fn an_invalidation_of_what_needs_none_is_done_at_once() {
    let bench = Bench::new();
    bench
        .host
        .apply(Target::rid(A), Translation::Identity)
        .unwrap();
    bench.fake.reset_calls();
    let batch = [
        everything(Scope::All),
        everything(Scope::Endpoint(Rid(0xffff))),
        everything(Scope::Target(pasid(A, 9))),
    ];
    assert_eq!(bench.host.invalidate(&batch), 3);
    assert_eq!(bench.fake.calls(), BTreeMap::new());
}

// Domains (A8).

#[test]
fn a_mapping_without_write_is_read_only_in_the_hardware() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    bench
        .host
        .map(domain, &[mapping(0x1000, 0x2000, 0x1000, Access::READ)])
        .unwrap();
    bench
        .host
        .apply(Target::rid(A), Translation::Domain(domain))
        .unwrap();
    let area = FakeArea {
        last: 0x1fff,
        gpa: 0x2000,
        access: Access::READ,
    };
    assert_eq!(bench.areas(A), [(0x1000, area)]);
    bench.check();
}

#[test]
fn mappings_are_added_all_or_none_whichever_call_fails() {
    for at in 0..3 {
        let bench = Bench::new();
        let domain = bench.host.create_domain().unwrap();
        let count = bench.fake.world().count;
        bench.fake.world().fail_at = Some((count + at, libc::ENOMEM));
        let three = [0u64, 1, 2].map(|n| mapping(n << 20, n << 20, 0x1000, Access::READ_WRITE));
        bench.host.map(domain, &three).unwrap_err();
        assert_eq!(bench.host.objects().mappings, 0);
        bench.fake.world().fail_at = None;
        bench.host.map(domain, &three).unwrap();
    }
}

#[test]
fn what_cannot_be_mapped_is_refused_with_the_reason() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    let map = |iova, gpa, length| {
        let result = bench
            .host
            .map(domain, &[mapping(iova, gpa, length, Access::READ)]);
        result.unwrap_err().to_string()
    };
    assert!(map(0, 16 * MIB, 0x1000).contains("not mappable"));
    assert!(map(0, 15 * MIB, 2 * MIB).contains("not mappable"));
    assert!(map(0xfee0_0000, 0, 0x1000).contains("MSI doorbell"));
    assert!(map(1 << 48, 0, 0x1000).contains("reserved"));
    assert!(map(u64::MAX - 0xfff, 0, 0x2000).contains("wrap"));
    assert!(map(0x800, 0, 0x1000).contains("multiples"));
    assert!(map(0, 0, 0).contains("multiples"));
    assert_eq!(bench.host.objects().mappings, 0);
    bench
        .host
        .map(domain, &[mapping(0, 0, 0x3000, Access::READ)])
        .unwrap();
    assert!(map(0x2000, 0, 0x1000).contains("already mapped"));
}

#[test]
fn unmap_touches_no_mapping_that_reaches_out_of_the_range() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    let both = [
        mapping(0x1000, 0, 0x2000, Access::READ),
        mapping(0x4000, 0, 0x2000, Access::READ),
    ];
    bench.host.map(domain, &both).unwrap();
    let unmap = |first, last| bench.host.unmap(domain, Iova(first), Iova(last)).unwrap();
    assert_eq!(unmap(0x2000, 0x5fff), 0x2000);
    assert_eq!(unmap(0, 0x1fff), 0);
    assert_eq!(unmap(0x1000, 0x2fff), 0x2000);
    assert!(matches!(
        bench.host.unmap(DomainId(99), Iova(0), Iova(1)),
        Err(Refused::NoDomain(_))
    ));
}

#[test]
fn a_destroyed_domain_blocks_its_users_and_leaves_nothing() {
    let bench = Bench::new();
    let before = bench.objects();
    let domain = bench.host.create_domain().unwrap();
    for target in [Target::rid(A), pasid(B, 2)] {
        bench
            .host
            .apply(target, Translation::Domain(domain))
            .unwrap();
    }
    bench.host.destroy_domain(domain);
    assert_eq!(bench.host.translation(pasid(B, 2)), Translation::Blocked);
    assert_eq!(bench.objects(), before);
    bench.check();
}

// Page requests (A6).

#[test]
fn a_page_request_group_is_answered_exactly_once() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let cookie = bench
        .fake
        .page_request(A.0.into(), Some(Pasid(5)), 17, 0xabc000);
    let request = bench.sink.take(1)[0];
    assert_eq!((request.target, request.group), (pasid(A, 5), 17));
    assert!(request.last && request.access == Access::READ_WRITE && !request.execute);
    assert_eq!(bench.host.objects().page_requests, 1);
    let response = PageResponse {
        target: request.target,
        group: 17,
        code: ResponseCode::Success,
    };
    // A wrong one first, then the right one twice.
    bench.host.respond(PageResponse {
        group: 18,
        ..response
    });
    bench.host.respond(response);
    bench.host.respond(response);
    assert_eq!(bench.fake.responses(), [(cookie, 0)]);
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[test]
fn after_a_drain_the_front_end_has_every_request_that_was_sent() {
    let bench = Bench::new();
    for number in 1..=100 {
        bench.host.apply(pasid(A, number), stage1(0x1000)).unwrap();
        bench
            .fake
            .page_request(A.0.into(), Some(Pasid(number)), 1, 0);
        bench.host.drain_page_requests();
        assert_eq!(
            bench.sink.count(),
            number as usize,
            "one is still on its way"
        );
    }
}

#[test]
fn a_group_that_waits_keeps_its_index_and_its_answer() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let ask = || {
        let device = A.0.into();
        bench
            .fake
            .page_request(device, Some(Pasid(5)), 17, 0xabc000)
    };
    let first = ask();
    bench.sink.take(1);
    // A device that uses the index again before its answer has its answer now.
    let again = ask();
    assert_eq!(bench.fake.wait_for_responses(1), [(again, 1)]);
    bench.host.respond(PageResponse {
        target: pasid(A, 5),
        group: 17,
        code: ResponseCode::Success,
    });
    assert_eq!(bench.fake.responses(), [(first, 0)]);
}

#[test]
fn a_request_without_pasid_is_not_one_with_pasid_0() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.fake.page_request(A.0.into(), None, 1, 0);
    assert_eq!(bench.sink.take(1)[0].target, Target::rid(A));
}

#[test]
fn a_cookie_that_the_kernel_took_back_is_never_used() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let old = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 1, 0);
    bench.sink.take(1);
    // Another table: the kernel answers the group itself, and gives its number to B's request.
    bench.host.apply(pasid(A, 5), stage1(0x2000)).unwrap();
    bench.host.apply(pasid(B, 6), stage1(0x2000)).unwrap();
    let new = bench.fake.page_request(B.0.into(), Some(Pasid(6)), 1, 0);
    assert_eq!(old, new);
    bench.sink.take(1);
    bench.host.respond(PageResponse {
        target: pasid(A, 5),
        group: 1,
        code: ResponseCode::Success,
    });
    assert_eq!(bench.fake.responses(), []);
    assert_eq!(bench.host.objects().page_requests, 1);
}

#[test]
fn failure_is_answered_as_invalid_and_nobodys_request_too() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let failure = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 1, 0);
    bench.sink.take(1);
    bench.host.respond(PageResponse {
        target: pasid(A, 5),
        group: 1,
        code: ResponseCode::Failure,
    });
    assert_eq!(bench.fake.responses(), [(failure, 1)]);
    let unknown = bench.fake.page_request(0xdead, None, 1, 0);
    // A group number beyond 9 bits is no request of a PCI device.
    let wild = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 512, 0);
    assert_eq!(bench.fake.wait_for_responses(2), [(unknown, 1), (wild, 1)]);
}

#[test]
fn a_device_without_pri_gets_tables_without_a_fault_queue() {
    let bench = Bench::new();
    let plain = Rid::new(0, 5, 0);
    bench.add(plain, |device| device.pri = false).unwrap();
    bench.host.claim(plain, bench.sink.clone()).unwrap();
    bench
        .host
        .apply(Target::rid(plain), stage1(0x1000))
        .unwrap();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    assert_eq!(
        bench.host.objects().translations,
        2,
        "not shared with one that has"
    );
    bench.check();
}

// Second-stage tables, mirrored.

pub(super) const STAGE2: Stage2 = Stage2 {
    root: Gpa(0x10_0000),
    width: 48,
    ad: false,
};

impl Bench {
    fn poke(&self, at: u64, entry: u64) {
        self.ram.write_obj(entry, GuestAddress(at)).unwrap();
    }

    /// Tables for IOVA 0 to 2 MiB in pages: 1 MiB level 4, +4K level 3, +8K level 2, +12K level 1.
    pub(super) fn tables(&self) {
        self.poke(0x10_0000, 0x10_1000 | 3);
        self.poke(0x10_1000, 0x10_2000 | 3);
        self.poke(0x10_2000, 0x10_3000 | 3);
    }

    pub(super) fn page(&self, index: u64, entry: u64) {
        self.poke(0x10_3000 + index * 8, entry);
    }

    /// (iova, last, gpa, writable) of A's mirror.
    fn mirror(&self) -> Vec<(u64, u64, u64, bool)> {
        let all = self.areas(A).into_iter();
        all.map(|(iova, area)| (iova, area.last, area.gpa, area.access.write))
            .collect()
    }
}

#[test]
fn a_second_stage_table_is_mirrored_with_its_permissions() {
    let bench = Bench::new();
    bench.tables();
    bench.page(0, 0x20_0000 | 3);
    bench.page(1, 0x30_0000 | 1);
    bench.page(3, 0x40_0000); // not present
    bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2))
        .unwrap();
    assert_eq!(
        bench.mirror(),
        [
            (0, 0xfff, 0x20_0000, true),
            (0x1000, 0x1fff, 0x30_0000, false)
        ]
    );
    bench.check();
}

#[test]
fn a_mirror_follows_page_selective_invalidations_with_one_call_per_run() {
    let bench = Bench::new();
    bench.tables();
    bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2))
        .unwrap();
    for index in 0..64 {
        bench.page(index, (0x20_0000 + index * 0x1000) | 3);
    }
    bench.fake.reset_calls();
    let scope = Scope::Target(Target::rid(A));
    assert_eq!(bench.host.invalidate(&[pages(scope, 0, 64)]), 1);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("copy", 1)]));
    assert_eq!(bench.mirror(), [(0, 0x3_ffff, 0x20_0000, true)]);
    // Again: nothing changed, nothing called.
    bench.fake.reset_calls();
    assert_eq!(bench.host.invalidate(&[everything(scope)]), 1);
    assert_eq!(bench.fake.calls(), BTreeMap::new());
    for index in 0..64 {
        bench.page(index, 0);
    }
    assert_eq!(bench.host.invalidate(&[pages(scope, 0, 64)]), 1);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("unmap", 1)]));
    assert_eq!(bench.mirror(), []);
}

#[test]
fn a_part_of_a_run_that_goes_takes_only_itself_along() {
    let bench = Bench::new();
    bench.tables();
    bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2))
        .unwrap();
    for index in 0..4 {
        bench.page(index, (0x20_0000 + index * 0x1000) | 3);
    }
    let scope = Scope::Endpoint(A);
    bench.host.invalidate(&[pages(scope, 0, 4)]);
    bench.page(1, 0);
    assert_eq!(bench.host.invalidate(&[pages(scope, 0x1000, 1)]), 1);
    assert_eq!(
        bench.mirror(),
        [
            (0, 0xfff, 0x20_0000, true),
            (0x2000, 0x3fff, 0x20_2000, true)
        ]
    );
    bench.check();
}

#[test]
fn a_changed_target_or_permission_replaces_the_mapping() {
    let bench = Bench::new();
    bench.tables();
    bench.page(0, 0x20_0000 | 3);
    bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2))
        .unwrap();
    let scope = Scope::Endpoint(A);
    for entry in [0x20_0000 | 1, 0x30_0000 | 3, 0x30_0000 | 2] {
        bench.page(0, entry);
        bench.host.invalidate(&[pages(scope, 0, 1)]);
        let area = bench.areas(A)[0].1;
        assert_eq!(area.gpa, entry & !0xfff);
        let access = Access {
            read: entry & 1 != 0,
            write: entry & 2 != 0,
        };
        assert_eq!(area.access, access);
    }
}

#[test]
fn a_large_leaf_is_mirrored_where_there_is_memory_and_not_where_addresses_are_reserved() {
    let bench = Bench::new();
    // 1 GiB leaves: IOVA 0 to GPA 0 (16 MiB of it is RAM); IOVA 3 GiB (it has the MSI window) to
    // GPA 4 GiB, where RAM ends after 16 MiB, before the window.
    bench.poke(0x10_0000, 0x10_1000 | 3);
    bench.poke(0x10_1000, 0x83);
    bench.poke(0x10_1018, (4096 * MIB) | 0x83);
    bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2))
        .unwrap();
    assert_eq!(
        bench.mirror(),
        [
            (0, 16 * MIB - 1, 0, true),
            (3072 * MIB, 3088 * MIB - 1, 4096 * MIB, true)
        ]
    );
    // A 2 MiB leaf of RAM right over the window is cut there.
    bench.poke(0x10_1018, 0x10_2000 | 3);
    bench.poke(0x10_2000 + (0xfec0_0000 >> 21 & 511) * 8, 0x20_0000 | 0x83);
    bench.poke(0x10_2000 + (0xfee0_0000 >> 21 & 511) * 8, 0x20_0000 | 0x83);
    bench.host.invalidate(&[everything(Scope::All)]);
    assert_eq!(
        bench.mirror()[1..],
        [
            (0xfec0_0000, 0xfedf_ffff, 0x20_0000, true),
            (0xfef0_0000, 0xfeff_ffff, 0x30_0000, true)
        ]
    );
    bench.check();
}

#[test]
fn a_table_that_points_at_itself_is_bounded_and_blocks_only_its_user() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(B), stage1(0x1000)).unwrap();
    for index in 0..512 {
        bench.poke(0x10_0000 + index * 8, 0x10_0000 | 3);
    }
    let start = Instant::now();
    let refused = bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2));
    assert!(matches!(refused, Err(Refused::NoRoom { .. })));
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
    assert!(start.elapsed() < Duration::from_secs(60));
    bench.check();
}

#[test]
fn a_mirror_that_cannot_follow_says_so() {
    let bench = Bench::new();
    bench.tables();
    bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2))
        .unwrap();
    bench.page(0, 0x20_0000 | 3);
    bench.fake.world().fail_all = Some(("copy", libc::ENOMEM));
    let batch = [
        pages(Scope::Endpoint(B), 0, 1),
        pages(Scope::Endpoint(A), 0, 1),
    ];
    assert_eq!(bench.host.invalidate(&batch), 1);
    bench.fake.world().fail_all = None;
    assert_eq!(bench.host.invalidate(&batch), 2);
    assert_eq!(bench.mirror().len(), 1);
}

#[test]
fn a_mirror_is_shared_by_equal_tables_and_gone_with_its_last_user() {
    let bench = Bench::new();
    let before = bench.objects();
    bench.tables();
    for rid in [A, B] {
        bench
            .host
            .apply(Target::rid(rid), Translation::Stage2(STAGE2))
            .unwrap();
    }
    assert_eq!(bench.objects(), before + 2, "one address space, one table");
    for rid in [A, B] {
        bench
            .host
            .apply(Target::rid(rid), Translation::Identity)
            .unwrap();
    }
    assert_eq!(bench.objects(), before);
}

// Nothing left behind.

#[test]
fn unplug_leaves_no_object_and_drop_leaves_none_at_all() {
    let bench = Bench::new();
    bench.tables();
    let domain = bench.host.create_domain().unwrap();
    bench
        .host
        .map(domain, &[mapping(0, 0, 0x1000, Access::READ)])
        .unwrap();
    for (number, translation) in [
        stage1(0x1000),
        Translation::Identity,
        Translation::Stage2(STAGE2),
        Translation::Domain(domain),
    ]
    .into_iter()
    .enumerate()
    {
        bench
            .host
            .apply(pasid(A, number as u32 + 1), translation)
            .unwrap();
        bench
            .host
            .apply(pasid(B, number as u32 + 1), translation)
            .unwrap();
    }
    bench.host.destroy_domain(domain);
    bench.host.remove_device(A);
    bench.host.remove_device(B);
    assert_eq!(bench.host.objects(), Objects::default());
    assert_eq!(bench.objects(), 2, "guest memory and the fault queue");
    bench.check();
    let fake = bench.fake.clone();
    drop(bench);
    assert_eq!(fake.world().objects.len(), 0);
}

#[test]
fn a_released_endpoint_can_be_claimed_again_and_starts_blocked() {
    let bench = Bench::new();
    assert!(matches!(
        bench.host.claim(A, bench.sink.clone()),
        Err(Refused::Claimed(_))
    ));
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.host.release(A);
    assert!(matches!(
        bench.host.apply(Target::rid(A), Translation::Identity),
        Err(Refused::NoEndpoint(_))
    ));
    bench.host.claim(A, bench.sink.clone()).unwrap();
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
    bench.host.release(Rid(0x7777));
    bench.check();
}

/// One step of random work.
#[derive(Clone, Debug)]
enum Step {
    Apply(Target, u8),
    Invalidate(Target),
    Release(Rid),
    Map(u64),
    Unmap(u64),
    Page(u64, bool),
}

fn run(bench: &Bench, domain: DomainId, step: &Step) {
    match *step {
        Step::Apply(target, what) => {
            let translation = match what {
                0 => Translation::Blocked,
                1 => Translation::Identity,
                2 => Translation::Domain(domain),
                3 => Translation::Stage2(STAGE2),
                4 => stage1(0x123),
                root => stage1(u64::from(root) << 12),
            };
            let before = bench.host.translation(target);
            let result = bench.host.apply(target, translation);
            let after = bench.host.translation(target);
            match result {
                Ok(()) => assert_eq!(after, translation),
                Err(_) => assert_eq!(after, Translation::Blocked, "was {before:?}"),
            }
        }
        Step::Invalidate(target) => {
            let batch = [pages(Scope::Target(target), 0, 512), everything(Scope::All)];
            assert!(bench.host.invalidate(&batch) <= 2);
        }
        Step::Release(rid) => {
            bench.host.release(rid);
            // Fails only while a detach fails.
            let _again = bench.host.claim(rid, bench.sink.clone());
        }
        Step::Map(page) => {
            let before = bench.host.objects().mappings;
            let one = mapping(page << 12, page << 12, 0x1000, Access::READ_WRITE);
            let result = bench.host.map(domain, &[one]);
            let after = bench.host.objects().mappings;
            assert_eq!(after, before + usize::from(result.is_ok()));
        }
        Step::Unmap(page) => {
            let _refused = bench
                .host
                .unmap(domain, Iova(page << 12), Iova((page << 12) + 0xfff));
        }
        Step::Page(index, present) => {
            bench.page(
                index,
                if present {
                    (0x20_0000 + index * 0x1000) | 3
                } else {
                    0
                },
            );
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let rid = prop_oneof![Just(A), Just(B)];
    let target = (rid.clone(), 0u32..4).prop_map(|(endpoint, number)| Target {
        endpoint,
        pasid: (number > 0).then_some(Pasid(number)),
    });
    prop_oneof![
        6 => (target.clone(), 0u8..9).prop_map(|(target, what)| Step::Apply(target, what)),
        3 => target.prop_map(Step::Invalidate),
        1 => rid.prop_map(Step::Release),
        2 => (0u64..8).prop_map(Step::Map),
        2 => (0u64..8).prop_map(Step::Unmap),
        2 => (0u64..8, any::<bool>()).prop_map(|(index, present)| Step::Page(index, present)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_and_whatever_fails_the_record_is_the_kernels(
        steps in prop::collection::vec((step(), prop::option::weighted(0.3, 0usize..6)), 1..40),
    ) {
        let bench = Bench::new();
        bench.tables();
        let domain = bench.host.create_domain().unwrap();
        for (step, fail) in &steps {
            {
                let mut world = bench.fake.world();
                world.fail_at = fail.map(|after| (world.count + after, libc::ENOMEM));
            }
            run(&bench, domain, step);
            bench.check();
        }
        bench.fake.world().fail_at = None;
        // A device that was stopped is made good by the next claim.
        for rid in [A, B] {
            bench.host.release(rid);
            bench.host.claim(rid, bench.sink.clone()).unwrap();
            bench.host.remove_device(rid);
        }
        bench.host.destroy_domain(domain);
        prop_assert_eq!(bench.host.objects(), Objects::default());
        prop_assert_eq!(bench.objects(), 2);
    }
}

#[test]
fn the_capabilities_of_no_device_are_not_a_promise_of_a_third_stage() {
    let bench = Bench::empty();
    let Capabilities { stage1, nested, .. } = bench.host.capabilities();
    assert!(stage1 && !nested);
}
