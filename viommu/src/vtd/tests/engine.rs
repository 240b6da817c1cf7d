//! A unit with the software engine behind it: real tables, real DMA, the guest's real log.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};

use super::super::testing::*;
use super::super::{Mode, UnitConfig};
use crate::backend::software::{EndpointConfig, Engine, PageResponseSink};
use crate::backend::{Access, Backend, PageResponse, ResponseCode};
use crate::dma::DmaPort;
use crate::spec::vtd::fault::FaultReason as R;
use crate::spec::vtd::registers as offset;
use crate::{Iova, Pasid, Rid, Target};

const DISK: Rid = Rid::new(0, 4, 0);
/// What the tests' tables map.
const IOVA: u64 = 0xffff_f000;

#[derive(Default)]
struct Answers(Mutex<Vec<PageResponse>>);

impl PageResponseSink for Answers {
    fn page_response(&self, response: PageResponse) {
        self.0.lock().unwrap().push(response);
    }
}

struct Machine {
    guest: Guest,
    engine: Engine,
    port: DmaPort,
    answers: Arc<Answers>,
}

/// A guest whose disk is behind the unit, through the engine.
fn machine(config: UnitConfig) -> Machine {
    let scratch = Guest::new(UnitConfig::default());
    let capabilities = Engine::new(Arc::clone(&scratch.ram)).capabilities();
    let guest = match config.mode {
        Mode::Scalable => Guest::scalable_with(config, capabilities),
        Mode::Legacy => Guest::legacy(config),
    };
    let engine = Engine::new(Arc::clone(&guest.ram));
    let answers = Arc::new(Answers::default());
    let endpoint = EndpointConfig {
        pasid_bits: 20,
        page_responses: Some(Arc::clone(&answers) as _),
        ..EndpointConfig::default()
    };
    let port = engine.add_endpoint(DISK, endpoint).unwrap();
    guest
        .unit
        .add_endpoint(DISK, Arc::new(engine.clone()))
        .unwrap();
    Machine {
        guest,
        engine,
        port,
        answers,
    }
}

impl Machine {
    /// Maps `page` at [`IOVA`] with 4 levels whose entries have `flags`; the place of the leaf.
    fn map(&mut self, root: u64, page: u64, flags: u64) -> u64 {
        let mut table = root;
        for shift in [39, 30, 21] {
            let at = table + (IOVA >> shift & 511) * 8;
            if self.guest.peek(at) == 0 {
                let next = self.guest.page();
                self.guest.poke(at, &[next | flags]);
            }
            table = self.guest.peek(at) & !0xfff;
        }
        let leaf = table + (IOVA >> 12 & 511) * 8;
        self.guest.poke(leaf, &[page | flags]);
        leaf
    }
}

fn write(port: &DmaPort, at: u64, value: u32) -> bool {
    port.access().write_obj(value, GuestAddress(at)).is_ok()
}

fn read(port: &DmaPort, at: u64) -> Option<u32> {
    port.access().read_obj(GuestAddress(at)).ok()
}

#[test]
fn a_disk_behind_first_stage_tables_reaches_what_is_mapped_and_nothing_else() {
    let mut machine = machine(UnitConfig::default());
    assert!(
        !write(&machine.port, 0x5000, 1),
        "Blocked before the guest programs anything"
    );
    assert_eq!(
        machine.guest.faults()[0].1,
        R::ScalableRootNotPresent.code()
    );

    let directory = machine.guest.context(DISK);
    let (root, page) = (machine.guest.page(), machine.guest.page());
    machine.guest.bind(directory, 0, first_stage(2, root));
    assert_eq!(read(&machine.port, IOVA), None);
    let faults = machine.guest.faults();
    assert_eq!(
        faults[0],
        (DISK.0, R::FirstStageNotPresent.code(), IOVA, None)
    );

    // A map needs nothing of the unit.
    let leaf = machine.map(root, page, 7);
    assert!(write(&machine.port, IOVA + 0x10, 0x1234_5678));
    assert_eq!(machine.guest.peek(page + 0x10) as u32, 0x1234_5678);
    assert!(!write(&machine.port, IOVA + 0x1000, 1));
    assert_eq!(machine.guest.faults()[0].2, IOVA + 0x1000);

    // After an unmap and its invalidation nothing gets through.
    machine.guest.poke(leaf, &[0]);
    assert!(machine.guest.submit(&[pasid_iotlb_pages(2, 0, IOVA, 0)]));
    assert!(!write(&machine.port, IOVA, 1));
    assert_eq!(machine.guest.faults()[0].1, R::FirstStageNotPresent.code());

    // Read-only: reads pass, writes are refused with their reason.
    machine.map(root, page, 5);
    assert!(read(&machine.port, IOVA).is_some() && !write(&machine.port, IOVA, 1));
    assert_eq!(
        machine.guest.faults()[0].1,
        R::ScalableWriteNotPermitted.code()
    );
    // Not canonical.
    assert!(!write(&machine.port, 1 << 47, 1));
    assert_eq!(machine.guest.faults()[0].1, R::NotCanonical.code());

    // Away with the domain.
    machine.guest.bind(directory, 0, Default::default());
    assert_eq!(read(&machine.port, IOVA), None);
    assert_eq!(machine.guest.faults()[0].1, R::PasidEntryNotPresent.code());
    machine.guest.unit.remove_endpoint(DISK);
    assert_eq!(machine.engine.objects(), Default::default());
}

#[test]
fn pasids_and_requests_without_one_have_their_own_tables() {
    let mut machine = machine(UnitConfig::default());
    let directory = machine.guest.context(DISK);
    let (plain, mine) = (machine.guest.page(), machine.guest.page());
    let (a, b) = (machine.guest.page(), machine.guest.page());
    machine.map(plain, a, 7);
    machine.map(mine, b, 7);
    machine.guest.bind(directory, 0, first_stage(2, plain));
    machine.guest.bind(directory, 5, first_stage(3, mine));
    let five = machine.port.with_pasid(Pasid(5)).unwrap();
    let six = machine.port.with_pasid(Pasid(6)).unwrap();
    assert!(write(&machine.port, IOVA, 1) && write(&five, IOVA, 5) && !write(&six, IOVA, 6));
    assert_eq!(
        (machine.guest.peek(a) as u32, machine.guest.peek(b) as u32),
        (1, 5)
    );
    let faults = machine.guest.faults();
    assert_eq!(
        faults,
        [(DISK.0, R::PasidEntryNotPresent.code(), IOVA, Some(6))]
    );
    // An invalidation of the one is not one of the other, and teardown of the one neither.
    machine.guest.bind(directory, 5, Default::default());
    assert!(write(&machine.port, IOVA, 2) && !write(&five, IOVA, 7));
    assert_eq!(machine.guest.peek(b) as u32, 5);
    // The PASID is used again, by another process: nothing of the old one is left.
    let (other, page) = (machine.guest.page(), machine.guest.page());
    machine.map(other, page, 7);
    machine.guest.bind(directory, 5, first_stage(9, other));
    assert!(write(&five, IOVA, 8));
    assert_eq!(
        (
            machine.guest.peek(b) as u32,
            machine.guest.peek(page) as u32
        ),
        (5, 8)
    );
}

#[test]
fn legacy_second_stage_tables_and_pass_through_translate_too() {
    let mut machine = machine(UnitConfig {
        mode: Mode::Legacy,
        ..UnitConfig::default()
    });
    let (root, page) = (machine.guest.page(), machine.guest.page());
    machine
        .guest
        .set_legacy_context(DISK, [root | 1, 5 << 8 | 2]);
    assert!(machine.guest.submit(&[context_device(DISK)]));
    assert!(!write(&machine.port, IOVA, 1));
    assert_eq!(machine.guest.faults()[0].1, R::WriteNotPermitted.code());
    // With caching mode Linux invalidates after a map.
    let leaf = machine.map(root, page, 3);
    assert!(machine.guest.submit(&[iotlb_pages(5, IOVA, 0)]));
    assert!(write(&machine.port, IOVA, 7));
    assert_eq!(machine.guest.peek(page) as u32, 7);
    machine.guest.poke(leaf, &[page | 1]);
    assert!(machine.guest.submit(&[iotlb_domain(5)]));
    assert!(read(&machine.port, IOVA).is_some() && !write(&machine.port, IOVA, 1));
    assert_eq!(machine.guest.faults()[0].1, R::WriteNotPermitted.code());
    machine
        .guest
        .set_legacy_context(DISK, [2 << 2 | 1, 1 << 8 | 2]);
    assert!(
        machine
            .guest
            .submit(&[context_device(DISK), iotlb_domain(1)])
    );
    assert!(write(&machine.port, page, 9));
    assert_eq!(machine.guest.peek(page) as u32, 9);
    assert!(!write(&machine.port, RAM, 9), "there is no RAM");
}

#[test]
fn a_page_request_goes_to_the_guest_and_its_answer_to_the_device() {
    let mut machine = machine(UnitConfig::default());
    let directory = machine.guest.context(DISK);
    let (root, page) = (machine.guest.page(), machine.guest.page());
    machine.guest.bind(directory, 5, first_stage(3, root));
    let five = machine.port.with_pasid(Pasid(5)).unwrap();
    assert!(
        five.page_request(Iova(IOVA), Access::READ_WRITE, 9, true)
            .is_ok()
    );
    assert_eq!(machine.guest.r64(offset::PQT), 32);
    machine.map(root, page, 7);
    let target = Target::pasid(DISK, Pasid(5));
    assert!(machine.guest.submit(&[page_response(target, 9, 0)]));
    let answers = std::mem::take(&mut *machine.answers.0.lock().unwrap());
    assert_eq!(answers.len(), 1);
    assert_eq!(
        (answers[0].group, answers[0].code),
        (9, ResponseCode::Success)
    );
    assert!(write(&five, IOVA, 1));
}

#[test]
fn rights_that_a_page_request_was_for_are_seen_without_an_invalidation() {
    for nested in [false, true] {
        let mut machine = machine(UnitConfig {
            nested,
            ..UnitConfig::default()
        });
        let directory = machine.guest.context(DISK);
        let (root, page) = (machine.guest.page(), machine.guest.page());
        let leaf = machine.map(root, page, 5);
        let mut entry = first_stage(3, root);
        if nested {
            // A second stage that maps the first GiB to itself.
            let (outer, below) = (machine.guest.page(), machine.guest.page());
            machine.guest.poke(outer, &[below | 3]);
            machine.guest.poke(below, &[0x83]);
            entry.q0 = entry.q0.with_pgtt(3).with_ssptptr(outer >> 12);
        }
        machine.guest.bind(directory, 5, entry);
        let five = machine.port.with_pasid(Pasid(5)).unwrap();
        assert!(read(&five, IOVA).is_some() && !write(&five, IOVA, 1));
        // The guest makes all of it writable, which needs no invalidation, and answers.
        let mut table = root;
        for shift in [39, 30, 21] {
            let at = table + (IOVA >> shift & 511) * 8;
            let entry = machine.guest.peek(at);
            machine.guest.poke(at, &[entry | 2]);
            table = entry & !0xfff;
        }
        machine.guest.poke(leaf, &[page | 7]);
        five.page_request(Iova(IOVA), Access::WRITE, 9, true)
            .unwrap();
        let target = Target::pasid(DISK, Pasid(5));
        assert!(machine.guest.submit(&[page_response(target, 9, 0)]));
        assert!(write(&five, IOVA, 1), "nested: {nested}");
    }
}

#[test]
fn what_a_first_stage_does_not_offer_is_a_fault_of_its_own() {
    let mut machine = machine(UnitConfig::default());
    let directory = machine.guest.context(DISK);
    let (root, page) = (machine.guest.page(), machine.guest.page());
    let leaf = machine.map(root, page, 7);
    let mut entry = first_stage(3, root);
    entry.q1.set_pwsnp(false);
    machine.guest.bind(directory, 5, entry);
    let five = machine.port.with_pasid(Pasid(5)).unwrap();
    let last = |machine: &Machine| machine.guest.faults().first().map(|fault| fault.1);
    // Accessed flags that are not set cannot be set without snooping.
    assert!(read(&five, IOVA).is_none());
    let reason = last(&machine);
    assert_eq!(reason, Some(R::FirstStageAccessedDirty.code()));
    assert_eq!(machine.guest.peek(leaf), page | 7);
    // Where they are set already nothing is needed, until a write needs the dirty flag.
    let mut table = root;
    for shift in [39, 30, 21] {
        let at = table + (IOVA >> shift & 511) * 8;
        let entry = machine.guest.peek(at);
        machine.guest.poke(at, &[entry | 0x20]);
        table = entry & !0xfff;
    }
    machine.guest.poke(leaf, &[page | 0x27]);
    assert!(read(&five, IOVA).is_some() && !write(&five, IOVA, 1));
    let reason = last(&machine);
    assert_eq!(reason, Some(R::FirstStageAccessedDirty.code()));
    machine.guest.bind(directory, 5, first_stage(3, root));
    assert!(write(&five, IOVA, 1));
    // Execute requests are not offered, whatever translates.
    let five = five.with_execute(true);
    for entry in [first_stage(3, root), pass_through(3)] {
        machine.guest.bind(directory, 5, entry);
        assert!(read(&five, page).is_none());
        assert_eq!(last(&machine), Some(R::ExecuteDisabled.code()));
    }
    // A request to the interrupt range that is no message.
    machine.guest.bind(directory, 0, pass_through(1));
    assert!(read(&machine.port, 0xfee0_0000).is_none());
    assert_eq!(last(&machine), Some(R::NotAnInterrupt.code()));
}

#[test]
fn no_dma_starts_after_the_wait_of_its_unmap_and_faults_meanwhile_do_not_deadlock() {
    let mut machine = machine(UnitConfig::default());
    let directory = machine.guest.context(DISK);
    let (root, page) = (machine.guest.page(), machine.guest.page());
    machine.guest.bind(directory, 0, first_stage(2, root));
    let leaf = machine.map(root, page, 7);
    let stop = Arc::new(AtomicBool::new(false));
    let passed = Arc::new(AtomicU32::new(0));
    let devices: Vec<_> = (0..2)
        .map(|_| {
            let (port, stop, passed) = (machine.port.clone(), stop.clone(), passed.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    passed.fetch_add(u32::from(write(&port, IOVA, u32::MAX)), Ordering::Relaxed);
                }
            })
        })
        .collect();
    for round in 0..500 {
        machine.guest.poke(leaf, &[0]);
        let descriptor = match round % 4 {
            0 => pasid_iotlb_pages(2, 0, IOVA, 0),
            1 => pasid_iotlb_all(2, 0),
            2 => iotlb_domain(2),
            _ => iotlb_global(),
        };
        assert!(machine.guest.submit(&[descriptor]));
        // The page is someone else's now.
        machine.guest.poke(page, &[0]);
        std::thread::yield_now();
        assert_eq!(machine.guest.peek(page), 0, "round {round}");
        machine.guest.poke(leaf, &[page | 7]);
        machine.guest.faults();
    }
    stop.store(true, Ordering::Relaxed);
    for device in devices {
        device.join().unwrap();
    }
    let state = machine.guest.unit.state();
    assert!(state.faults_recorded + state.faults_lost > 0 || passed.load(Ordering::Relaxed) > 0);
}
