//! The back end on the fake kernel: each trap of the host's contract, counts of calls, failure at
//! every call, and random work with the record checked against the kernel after every step.

mod admission;
mod counts;
mod domains;
mod invalidation;
mod mirrored;
mod nothing_left;
mod page_requests;
mod replace;
mod tables;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempfile::TempFile;

use super::fake::{Fake, FakeArea, FakeAttach, FakeDevice, FakeIommu, Object};
use super::hwinfo::VtdHardware;
use super::{AttachDevice, Device, HostIommu, Unfit};
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

    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
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
        let end = Instant::now() + Duration::from_secs(60);
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
        self.add_through(rid, change, |attach| Arc::new(attach))
    }

    /// The same, of a device that is attached through what `through` makes.
    fn add_through(
        &self,
        rid: Rid,
        change: impl FnOnce(&mut FakeDevice),
        through: impl FnOnce(FakeAttach) -> Arc<dyn AttachDevice>,
    ) -> Result<(), Unfit> {
        let mut device = FakeDevice {
            iommu: 0,
            pasid_bits: 20,
            reserved: vec![DOORBELLS],
            pri: true,
            group: None,
            in_reset: 0,
            record: BTreeMap::new(),
            hardware: BTreeMap::new(),
            stopped: false,
            leaked: 0,
        };
        change(&mut device);
        let (page_requests, group) = (device.pri, device.group);
        let id = u32::from(rid.0);
        self.fake.world().devices.insert(id, device);
        let device = Device {
            id,
            attach: through(FakeAttach {
                fake: self.fake.clone(),
                id,
            }),
            page_requests,
            group,
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
        ere: true,
        pwsnp: true,
        fs1gp: true,
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
}
