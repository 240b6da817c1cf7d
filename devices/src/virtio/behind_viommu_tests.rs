//! virtio devices behind a vIOMMU: the same devices, with guest memory where the guest's tables
//! put it.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::backend::{Access, Backend, EventSink, Fault, Mapping, PageRequest, Translation};
use viommu::dma::DmaPort;
use viommu::{DomainId, Gpa, Iova, Rid, Target};
use vmm_sys_util::tempfile::TempFile;

use crate::testing::{BUFFERS, RAM, WRITE, ram, start_behind};
use crate::virtio::ring::{Ring, RingConfig};
use crate::virtio::{Block, BlockConfig, Rng, VirtioDevice};

const RID: Rid = Rid::new(0, 3, 0);
/// Where the guest maps all of its memory for the device.
const OFFSET: u64 = 0x7000_0000;

#[derive(Default)]
struct Faults(Mutex<Vec<(u64, Access)>>);

impl EventSink for Faults {
    fn fault(&self, fault: Fault) {
        self.0.lock().unwrap().push((fault.iova.0, fault.access));
    }
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, _request: PageRequest) {}
}

struct Unit {
    engine: Engine,
    faults: Arc<Faults>,
    domain: DomainId,
}

/// An engine whose one endpoint sees memory at [`OFFSET`]: the upper half read-only.
fn unit(ram: &viommu::GuestRam) -> (Unit, DmaPort) {
    let engine = Engine::new(Arc::clone(ram));
    let port = engine.add_endpoint(RID, EndpointConfig::default()).unwrap();
    let faults = Arc::new(Faults::default());
    engine.claim(RID, Arc::clone(&faults) as _).unwrap();
    let domain = engine.create_domain().unwrap();
    let half = |n: u64, access| Mapping {
        iova: Iova(OFFSET + n * RAM / 2),
        gpa: Gpa(n * RAM / 2),
        length: RAM / 2,
        access,
        mmio: false,
    };
    let mappings = [half(0, Access::READ_WRITE), half(1, Access::READ)];
    engine.map(domain, &mappings).unwrap();
    let translation = Translation::Domain(domain);
    engine.apply(Target::rid(RID), translation).unwrap();
    let unit = Unit {
        engine,
        faults,
        domain,
    };
    (unit, port)
}

fn disk() -> (TempFile, Arc<Block>) {
    let file = TempFile::new().unwrap();
    file.as_file().write_all_at(&[0x11; 8192], 0).unwrap();
    let block = Block::open(&BlockConfig {
        path: file.as_path().into(),
        ..BlockConfig::default()
    });
    (file, block.unwrap())
}

#[test]
fn a_disk_reads_and_writes_through_the_guests_mappings() {
    let ram = ram();
    let (unit, port) = unit(&ram);
    let (file, block) = disk();
    let (mut drivers, recorder) = start_behind(&*block, port, OFFSET, &ram, block.features());
    let driver = &mut drivers[0];
    let at = |address: u64| BUFFERS + OFFSET + address;

    // Write two sectors to sector 1, with data across a page boundary.
    driver.write(BUFFERS, &[1, 0, 0, 0, 0, 0, 0, 0, 1]);
    driver.write(BUFFERS + 0xf00, &[0x22; 1024]);
    driver.add(&[(at(0), 16, 0), (at(0xf00), 1024, 0), (at(0x800), 1, WRITE)]);
    driver.kick();
    driver.wait(&recorder, 1);
    assert_eq!(driver.read(BUFFERS + 0x800, 1), [0]);
    let mut image = [0; 2048];
    file.as_file().read_exact_at(&mut image, 0).unwrap();
    assert_eq!(image[512..1536], [0x22; 1024]);

    // Read them back from the whole disk.
    driver.write(BUFFERS, &[0; 16]);
    driver.add(&[
        (at(0), 16, 0),
        (at(0x2e00), 2048, WRITE),
        (at(0x800), 1, WRITE),
    ]);
    driver.kick();
    driver.wait(&recorder, 1);
    assert_eq!(driver.read(BUFFERS + 0x2e00, 2048), image);
    assert!(unit.faults.0.lock().unwrap().is_empty());
}

#[test]
fn what_the_guest_did_not_map_fails_its_request_with_a_fault_and_the_disk_goes_on() {
    let ram = ram();
    let (unit, port) = unit(&ram);
    let (file, block) = disk();
    let (mut drivers, recorder) = start_behind(&*block, port, OFFSET, &ram, block.features());
    let driver = &mut drivers[0];
    let at = |address: u64| BUFFERS + OFFSET + address;
    let read_only = OFFSET + RAM / 2;
    for (data, outcome) in [
        (BUFFERS, 1),      // a guest-physical address means nothing here
        (read_only, 1),    // a read of the disk writes to memory
        (OFFSET + RAM, 1), // beyond the mappings
        (at(0x1000), 0),
    ] {
        driver.write(BUFFERS + 0x800, &[0xaa]);
        driver.add(&[(at(0), 16, 0), (data, 512, WRITE), (at(0x800), 1, WRITE)]);
        driver.kick();
        driver.wait(&recorder, 1);
        assert_eq!(driver.read(BUFFERS + 0x800, 1), [outcome], "{data:#x}");
    }
    let faults = unit.faults.0.lock().unwrap().clone();
    let places: Vec<u64> = faults.iter().map(|(iova, _)| *iova).collect();
    assert_eq!(places, [BUFFERS, read_only, OFFSET + RAM]);
    assert!(faults.iter().all(|(_, access)| access.write));
    drop(file);
}

#[test]
fn a_ring_that_is_unmapped_while_it_is_used_asks_for_a_reset() {
    let ram = ram();
    let (unit, port) = unit(&ram);
    let rng = Rng::open(Path::new("/dev/urandom")).unwrap();
    let (mut drivers, recorder) = start_behind(&*rng, port, OFFSET, &ram, rng.features());
    drivers[0].add(&[(BUFFERS + OFFSET, 32, WRITE)]);
    drivers[0].kick();
    drivers[0].wait(&recorder, 1);
    unit.engine
        .unmap(unit.domain, Iova(OFFSET), Iova(OFFSET + RAM - 1))
        .unwrap();
    let before = drivers[0].used_index();
    drivers[0].add(&[(BUFFERS + OFFSET, 32, WRITE)]);
    drivers[0].kick();
    recorder.wait_until(|counts| counts.needs_reset == 1);
    assert_eq!(
        drivers[0].used_index(),
        before,
        "nothing is written after unmap"
    );
}

#[test]
fn a_ring_that_is_not_mapped_is_a_fault_at_its_address() {
    let ram = ram();
    let (unit, port) = unit(&ram);
    let config = |used| RingConfig {
        size: 256,
        descriptors: OFFSET,
        available: OFFSET + 0x2000,
        used,
    };
    let ring = |used| Ring::new(config(used), false, true, &port.access());
    assert!(ring(OFFSET + 0x3000).is_some());
    // Half of it, and memory that is mapped for reading only.
    let (half, read_only) = (OFFSET + RAM / 2 - 0x400, OFFSET + RAM / 2);
    for used in [half, read_only] {
        assert!(ring(used).is_none());
        let faults = std::mem::take(&mut *unit.faults.0.lock().unwrap());
        assert_eq!(faults, [(read_only, Access::READ_WRITE)]);
    }
}
