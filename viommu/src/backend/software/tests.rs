//! The engine as a device and a front end see it: real tables in guest RAM, DMA through a port.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::*;
use crate::Gpa;
use crate::backend::{Access, Fault, FaultCause, PageRequest, Stage};
use crate::dma::PageRequestRefused;
use crate::interrupt::{MessageSink, Msi};
use crate::page_requests::Refusal;

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;

const RID: Rid = Rid(0x18);
const PLAIN: Target = Target::rid(RID);

#[derive(Default)]
struct Events {
    faults: Mutex<Vec<Fault>>,
    requests: Mutex<Vec<PageRequest>>,
    responses: Mutex<Vec<PageResponse>>,
    messages: Mutex<Vec<(Rid, Msi)>>,
}

impl EventSink for Events {
    fn fault(&self, fault: Fault) {
        self.faults.lock().unwrap().push(fault);
    }
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, request: PageRequest) {
        self.requests.lock().unwrap().push(request);
    }
}

impl PageResponseSink for Events {
    fn page_response(&self, response: PageResponse) {
        self.responses.lock().unwrap().push(response);
    }
}

impl MessageSink for Events {
    fn message(&self, endpoint: Rid, msi: Msi) {
        self.messages.lock().unwrap().push((endpoint, msi));
    }
}

/// An engine over 16 MiB of RAM with one claimed endpoint. Tables lie below 1 MiB, data above.
struct Guest {
    ram: GuestRam,
    engine: Engine,
    port: DmaPort,
    events: Arc<Events>,
    next_table: u64,
}

impl Guest {
    fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
        let ram = Arc::new(ram);
        let engine = Engine::new(Arc::clone(&ram));
        let events = Arc::new(Events::default());
        let config = EndpointConfig {
            pasid_bits: 20,
            page_responses: Some(events.clone()),
            messages: Some(events.clone()),
            ..EndpointConfig::default()
        };
        let port = engine.add_endpoint(RID, config).unwrap();
        engine.claim(RID, events.clone()).unwrap();
        Self {
            ram,
            engine,
            port,
            events,
            next_table: 0x1000,
        }
    }

    fn table(&mut self) -> u64 {
        let table = self.next_table;
        self.next_table += 0x1000;
        table
    }

    fn load(&self, gpa: u64) -> u64 {
        self.ram.read_obj(GuestAddress(gpa)).unwrap()
    }

    fn store(&self, gpa: u64, value: u64) {
        self.ram.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    /// Where the entry of `level` for `iova` is, making tables with `flags` on the way from
    /// `root` at level `from`.
    fn entry(&mut self, root: u64, from: u8, iova: u64, level: u8, flags: u64) -> u64 {
        let mut table = root;
        for at in (level + 1..=from).rev() {
            let entry = table + (iova >> (12 + 9 * (at - 1)) & 0x1ff) * 8;
            if self.load(entry) & 3 == 0 {
                let next = self.table();
                self.store(entry, next | flags);
            }
            table = self.load(entry) & !0xfff & !(1 << 63);
        }
        table + (iova >> (12 + 9 * (level - 1)) & 0x1ff) * 8
    }

    /// Maps one first-stage page of `level`; returns where its entry is.
    fn map(&mut self, root: u64, iova: u64, leaf: u64, level: u8) -> u64 {
        let entry = self.entry(root, 4, iova, level, P | RW | US);
        self.store(entry, leaf);
        entry
    }

    fn faults(&self) -> Vec<Fault> {
        std::mem::take(&mut self.events.faults.lock().unwrap())
    }

    /// What a read at `iova` does: the first byte, or the fault.
    fn read(&self, port: &DmaPort, iova: u64) -> Result<u8, FaultCause> {
        assert_eq!(self.faults(), []);
        let result = port.access().read_obj::<u8>(GuestAddress(iova));
        let faults = self.faults();
        assert_eq!(faults.len(), usize::from(result.is_err()));
        result.map_err(|_| faults[0].cause)
    }

    fn write(&self, port: &DmaPort, iova: u64) -> Result<(), FaultCause> {
        assert_eq!(self.faults(), []);
        let result = port.access().write_obj(0x5au8, GuestAddress(iova));
        let faults = self.faults();
        assert_eq!(faults.len(), usize::from(result.is_err()));
        result.map_err(|_| faults[0].cause)
    }
}

fn stage1(root: u64) -> Stage1 {
    Stage1 {
        root: Gpa(root),
        width: 48,
        sre: false,
        wpe: false,
        eafe: false,
        ere: true,
        pwsnp: true,
        fs1gp: true,
    }
}

#[test]
fn an_endpoint_is_blocked_until_something_is_applied() {
    let guest = Guest::new();
    assert_eq!(guest.read(&guest.port, 0x10_0000), Err(FaultCause::Blocked));
    guest.engine.apply(PLAIN, Translation::Identity).unwrap();
    assert_eq!(guest.read(&guest.port, 0x10_0000), Ok(0));
    guest.engine.release(RID);
    let lost = guest.port.access().read_obj::<u8>(GuestAddress(0x10_0000));
    assert!(lost.is_err());
    assert_eq!(guest.faults(), [], "nobody is told after the release");
    assert_eq!(guest.engine.objects(), Objects::default());
}

#[test]
fn first_stage_pages_of_each_size_translate_and_get_their_flags() {
    let mut guest = Guest::new();
    let root = guest.table();
    let pte = guest.map(root, 0x1_0000_0000, 0x20_0000 | P | RW | US, 1);
    let pde = guest.map(root, 0x2_0000_0000, 0x40_0000 | P | RW | US | PS, 2);
    let pdpe = guest.map(root, 0x40_0000_0000, P | RW | US | PS, 3);
    guest.ram.write_obj(7u8, GuestAddress(0x20_0123)).unwrap();
    guest.ram.write_obj(8u8, GuestAddress(0x41_2345)).unwrap();
    guest.ram.write_obj(9u8, GuestAddress(0xff_ffff)).unwrap();
    let translation = Translation::Stage1(stage1(root));
    guest.engine.apply(PLAIN, translation).unwrap();
    let port = guest.port.clone();
    for _ in 0..2 {
        assert_eq!(guest.read(&port, 0x1_0000_0123), Ok(7));
        assert_eq!(guest.read(&port, 0x2_0001_2345), Ok(8));
        assert_eq!(guest.read(&port, 0x40_00ff_ffff), Ok(9));
    }
    for entry in [pte, pde, pdpe] {
        assert_eq!(guest.load(entry) & (A | D), A);
    }
    assert_eq!(guest.load(root) & A, A);
    for (entry, iova) in [
        (pte, 0x1_0000_0000),
        (pde, 0x2_0000_0000),
        (pdpe, 0x40_0000_1000),
    ] {
        guest.write(&port, iova).unwrap();
        assert_eq!(guest.load(entry) & (A | D), A | D);
    }
    let mapped_beyond = guest.read(&port, 0x40_0100_0000);
    assert_eq!(mapped_beyond, Err(FaultCause::OutsideMemory));
}

#[test]
fn a_range_over_scattered_pages_is_read_and_written_in_order() {
    let mut guest = Guest::new();
    let root = guest.table();
    for (page, at) in [0x30_0000u64, 0x31_0000, 0x31_1000, 0x20_0000]
        .into_iter()
        .enumerate()
    {
        guest.map(root, 0x1000_0000 + page as u64 * 4096, at | P | RW | US, 1);
    }
    guest
        .engine
        .apply(PLAIN, Translation::Stage1(stage1(root)))
        .unwrap();
    let data: Vec<u8> = (0..4 * 4096 - 200).map(|i| (i % 251) as u8).collect();
    let access = guest.port.access();
    access
        .write_slice(&data, GuestAddress(0x1000_0064))
        .unwrap();
    let mut back = vec![0; data.len()];
    access
        .read_slice(&mut back, GuestAddress(0x1000_0064))
        .unwrap();
    assert_eq!(back, data);
    let slices = access
        .get_slices(GuestAddress(0x1000_0000), 4 * 4096, Permissions::Read)
        .unwrap()
        .map(|slice| slice.unwrap().len())
        .collect::<Vec<_>>();
    assert_eq!(slices, [4096, 8192, 4096], "contiguous pages are one slice");
    let mut last = [0; 1];
    guest
        .ram
        .read_slice(&mut last, GuestAddress(0x20_0000 + 4096 - 200 + 100 - 1))
        .unwrap();
    assert_eq!(last[0], data[data.len() - 1]);
    assert!(access.check_range(GuestAddress(0x1000_0000), 4 * 4096, Permissions::Write));
    assert!(!access.check_range(GuestAddress(0x1000_0000), 4 * 4096 + 1, Permissions::Write));
}

#[test]
fn a_write_needs_the_right_at_every_level_and_never_changes_a_read_only_page() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 0x20_0000 | P | US, 1);
    // A writable page under a read-only table.
    let pde = guest.entry(root, 4, 0x4000_0000, 2, P | RW | US);
    let table = guest.table();
    guest.store(pde, table | P | US);
    guest.store(table, 0x20_1000 | P | RW | US);
    let translation = Translation::Stage1(stage1(root));
    guest.engine.apply(PLAIN, translation).unwrap();
    let port = guest.port.clone();
    for iova in [0x1000, 0x4000_0000] {
        // Read first, so that the second attempt finds the page in the cache.
        assert_eq!(guest.read(&port, iova), Ok(0));
        let denied = Err(FaultCause::Permission {
            stage: Stage::First,
            privileged: false,
        });
        assert_eq!(guest.write(&port, iova), denied);
    }
    assert_eq!(guest.load(0x20_0000), 0);
    assert_eq!(guest.load(0x20_1000), 0);
    assert_eq!(
        guest.load(table) & D,
        0,
        "a denied write leaves no dirty flag"
    );
}

#[test]
fn a_fault_names_the_request_and_comes_once_when_the_access_ends() {
    let guest = Guest::new();
    let pasid = Pasid(0x42);
    let target = Target::pasid(RID, pasid);
    let port = guest.port.with_pasid(pasid).unwrap();
    let port = port.with_privileged(true).with_execute(true);
    let translation = Translation::Stage1(stage1(0x1000));
    guest.engine.apply(target, translation).unwrap();
    let access = port.access();
    assert!(access.read_obj::<u32>(GuestAddress(0xabc0)).is_err());
    assert_eq!(guest.faults(), [], "not while the access lives");
    drop(access);
    let fault = Fault {
        target,
        iova: Iova(0xabc0),
        access: Access::READ,
        execute: true,
        privileged: true,
        cause: FaultCause::Supervisor,
    };
    assert_eq!(guest.faults(), [fault]);
    // Asking without touching is no fault: an ATS translation request.
    let asked = port.access().lookup(Iova(0xabc0), 4, Access::READ);
    assert_eq!(asked, Err(FaultCause::Supervisor));
    assert_eq!(guest.faults(), []);
    // The front end may call the engine from its sink.
    guest.engine.apply(target, Translation::Blocked).unwrap();
}

#[test]
fn a_range_faults_at_the_page_that_is_missing_and_what_comes_before_is_done() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 0x20_0000 | P | RW | US, 1);
    guest
        .engine
        .apply(PLAIN, Translation::Stage1(stage1(root)))
        .unwrap();
    let access = guest.port.access();
    let wrote = access.write(&[1; 4096 + 10], GuestAddress(0x1000)).unwrap();
    assert_eq!(wrote, 4096);
    drop(access);
    let faults = guest.faults();
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].iova, Iova(0x2000));
}

#[test]
fn addresses_at_the_very_end_wrap_nowhere() {
    let guest = Guest::new();
    guest.engine.apply(PLAIN, Translation::Identity).unwrap();
    let access = guest.port.access();
    let end = GuestAddress(u64::MAX - 7);
    assert!(access.write_slice(&[0; 8], end).is_err());
    assert!(access.write_slice(&[0; 9], end).is_err());
    assert!(!access.check_range(end, 16, Permissions::Read));
    assert!(access.get_slices(end, 0, Permissions::Read).is_ok());
    drop(access);
    let causes: Vec<_> = guest.faults().iter().map(|fault| fault.cause).collect();
    let (outside, width) = (FaultCause::OutsideMemory, FaultCause::AddressWidth);
    assert_eq!(causes, [outside, width]);
}

#[test]
fn a_message_reaches_its_sink_whatever_is_in_force_and_memory_never() {
    let mut guest = Guest::new();
    let root = guest.table();
    // The guest maps the interrupt range; without PASID that means nothing (VT-d 3.14).
    guest.map(root, 0xfee0_0000, 0x20_0000 | P | RW | US | PS, 2);
    let msi = Msi {
        address: 0xfee0_1004,
        data: 0x4021,
    };
    for translation in [Translation::Blocked, Translation::Stage1(stage1(root))] {
        guest.engine.apply(PLAIN, translation).unwrap();
        assert!(guest.port.message(msi));
        let taken = std::mem::take(&mut *guest.events.messages.lock().unwrap());
        assert_eq!(taken, [(RID, msi)]);
        for iova in [0xfee0_0000, 0xfeef_ffff] {
            let port = guest.port.clone();
            assert_eq!(guest.read(&port, iova), Err(FaultCause::NotAMessage));
            assert_eq!(guest.write(&port, iova), Err(FaultCause::NotAMessage));
        }
    }
    // Beside the range the same large page translates.
    assert_eq!(guest.read(&guest.port, 0xfef0_0000), Ok(0));
    let not_there = Msi {
        address: 0xfef0_0000,
        data: 0,
    };
    assert!(!guest.port.message(not_there));
    let pasid = guest.port.with_pasid(Pasid(1)).unwrap();
    assert!(!pasid.message(msi), "with a PASID it is memory");
}

#[test]
fn with_a_pasid_the_interrupt_range_translates_but_nothing_leads_there() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0xfee0_0000, 0x20_0000 | P | RW | US | PS, 2);
    guest.map(root, 0x8000_0000, 0xfee0_0000 | P | RW | US, 1);
    let target = Target::pasid(RID, Pasid(1));
    let port = guest.port.with_pasid(Pasid(1)).unwrap();
    let translation = Translation::Stage1(stage1(root));
    guest.engine.apply(target, translation).unwrap();
    assert_eq!(guest.read(&port, 0xfee0_0000), Ok(0));
    assert_eq!(
        guest.write(&port, 0x8000_0000),
        Err(FaultCause::InterruptRange)
    );
    guest.engine.apply(target, Translation::Identity).unwrap();
    assert_eq!(
        guest.read(&port, 0xfee0_0000),
        Err(FaultCause::InterruptRange)
    );
}

#[test]
fn a_cached_page_goes_with_its_invalidation_and_not_before() {
    let mut guest = Guest::new();
    let root = guest.table();
    let pages: Vec<u64> = (0..100).map(|page| 0x10_0000_0000 + page * 4096).collect();
    let entries: Vec<u64> = pages
        .iter()
        .map(|&iova| guest.map(root, iova, 0x20_0000 | P | RW | US, 1))
        .collect();
    guest
        .engine
        .apply(PLAIN, Translation::Stage1(stage1(root)))
        .unwrap();
    let port = guest.port.clone();
    let pages_from = |first: u64, count, leaf| InvalidationRange::Pages {
        first: Iova(first),
        count,
        leaf,
    };
    let scopes = [Scope::Target(PLAIN), Scope::Endpoint(RID), Scope::All];
    for (round, scope) in scopes.into_iter().cycle().take(12).enumerate() {
        for &iova in &pages {
            assert_eq!(guest.read(&port, iova), Ok(0));
        }
        for &entry in &entries {
            guest.store(entry, 0);
        }
        for &iova in &pages {
            assert_eq!(guest.read(&port, iova), Ok(0), "still cached");
        }
        let range = match round % 4 {
            0 => pages_from(pages[10], 1, true),
            1 => pages_from(pages[10], 3, false),
            2 => pages_from(pages[0], u64::MAX, true),
            _ => InvalidationRange::All,
        };
        let gone = match round % 4 {
            0 => 10..11,
            1 => 10..13,
            _ => 0..100,
        };
        let batch = [Invalidation { scope, range }];
        assert_eq!(guest.engine.invalidate(&batch), 1);
        for (number, &iova) in pages.iter().enumerate() {
            let read = guest.read(&port, iova);
            assert_eq!(read.is_err(), gone.contains(&number), "{round} {number}");
        }
        for &entry in &entries {
            guest.store(entry, 0x20_0000 | P | RW | US);
        }
    }
}

#[test]
fn a_table_that_is_freed_is_not_read_after_its_invalidation() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x10_0000, 0x20_0000 | P | RW | US, 1);
    guest.map(root, 0x11_0000, 0x21_0000 | P | RW | US, 1);
    let pde = guest.entry(root, 4, 0x10_0000, 2, 0);
    let old = guest.load(pde) & !0xfff;
    guest
        .engine
        .apply(PLAIN, Translation::Stage1(stage1(root)))
        .unwrap();
    let port = guest.port.clone();
    assert_eq!(guest.read(&port, 0x10_0000), Ok(0));
    let new = guest.table();
    guest.store(pde, new | P | RW | US);
    let invalidate = |leaf| {
        let range = InvalidationRange::Pages {
            first: Iova(0x11_0000),
            count: 1,
            leaf,
        };
        let scope = Scope::Target(PLAIN);
        guest.engine.invalidate(&[Invalidation { scope, range }])
    };
    assert_eq!(invalidate(true), 1);
    assert_eq!(guest.read(&port, 0x11_0000), Ok(0), "the hint keeps tables");
    assert_eq!(invalidate(false), 1);
    guest.store(old + 0x111 * 8, 0x21_0000 | P | RW | US);
    let gone = FaultCause::NotMapped {
        stage: Stage::First,
        level: 1,
    };
    assert_eq!(guest.read(&port, 0x11_0000), Err(gone));
}

#[test]
fn a_port_of_a_removed_endpoint_stays_blocked_when_the_rid_is_used_again() {
    let guest = Guest::new();
    let port = guest.port.clone();
    guest.engine.remove_endpoint(RID);
    assert_eq!(guest.engine.objects(), Objects::default());
    let config = EndpointConfig::default();
    let again = guest.engine.add_endpoint(RID, config.clone()).unwrap();
    assert!(guest.engine.add_endpoint(RID, config).is_err());
    guest.engine.claim(RID, guest.events.clone()).unwrap();
    guest.engine.apply(PLAIN, Translation::Identity).unwrap();
    assert_eq!(guest.read(&again, 0x1000), Ok(0));
    let old = port.access();
    assert!(old.read_obj::<u8>(GuestAddress(0x1000)).is_err());
}

#[test]
fn pasids_that_nothing_uses_cost_nothing() {
    let guest = Guest::new();
    for pasid in 0..5000 {
        drop(guest.port.with_pasid(Pasid(pasid)).unwrap());
    }
    let endpoint = guest.engine.endpoint(RID).unwrap();
    let mut targets = 0;
    endpoint.each_target(|_| targets += 1);
    assert_eq!(targets, 1);
    assert_eq!(guest.port.with_pasid(Pasid(1 << 20)).map(|_| ()), None);
}

#[test]
fn accesses_that_live_at_the_same_time_on_one_port_all_drain() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x1000, 0x20_0000 | P | RW | US, 1);
    guest
        .engine
        .apply(PLAIN, Translation::Stage1(stage1(root)))
        .unwrap();
    let first = guest.port.access();
    let second = guest.port.access();
    let third = guest.port.access();
    for access in [&first, &second, &third] {
        assert_eq!(access.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 0);
    }
    let state = guest.engine.endpoint(RID).unwrap().target(None).unwrap();
    let in_flight = || {
        let mut drain = Drain::default();
        state.drain(&(0x1000..=0x1000), &mut drain);
        drain.len()
    };
    assert_eq!(in_flight(), 3);
    drop((first, third));
    assert_eq!(in_flight(), 1);
    drop(second);
    assert_eq!(in_flight(), 0);
}

#[test]
fn page_requests_are_answered_once_per_group_and_bounded() {
    let guest = Guest::new();
    let ask = |port: &DmaPort, group, last| {
        port.page_request(Iova(0x1234), Access::READ_WRITE, group, last)
    };
    let answers = || std::mem::take(&mut *guest.events.responses.lock().unwrap());
    let respond = |group, code| {
        guest.engine.respond(PageResponse {
            target: PLAIN,
            group,
            code,
        });
    };
    // Blocked: nobody else will ever answer.
    assert_eq!(ask(&guest.port, 1, false), Ok(()));
    assert_eq!(answers(), []);
    assert_eq!(ask(&guest.port, 1, true), Ok(()));
    assert_eq!(answers()[0].code, ResponseCode::Invalid);
    let translation = Translation::Stage1(stage1(0x1000));
    guest.engine.apply(PLAIN, translation).unwrap();
    assert_eq!(ask(&guest.port, 5, false), Ok(()));
    respond(5, ResponseCode::Success);
    assert_eq!(answers(), [], "the group is not closed");
    assert_eq!(ask(&guest.port, 5, true), Ok(()));
    let again = ask(&guest.port, 5, true);
    assert_eq!(again, Err(PageRequestRefused::Group(Refusal::Waiting)));
    let requests = std::mem::take(&mut *guest.events.requests.lock().unwrap());
    let seen: Vec<_> = requests.iter().map(|r| (r.group, r.last, r.iova)).collect();
    assert_eq!(seen, [(5, false, Iova(0x1000)), (5, true, Iova(0x1000))]);
    respond(5, ResponseCode::Failure);
    respond(5, ResponseCode::Success);
    let answered = answers();
    assert_eq!(answered.len(), 1);
    assert_eq!(answered[0].code, ResponseCode::Failure);
    let index = ask(&guest.port, 512, true);
    assert_eq!(
        index,
        Err(PageRequestRefused::Group(Refusal::NoSuchGroup(512)))
    );
    for group in 0..512 {
        assert_eq!(ask(&guest.port, group, true), Ok(()));
    }
    let pasid = guest.port.with_pasid(Pasid(3)).unwrap();
    let full = ask(&pasid, 0, true);
    assert_eq!(
        full,
        Err(PageRequestRefused::Group(Refusal::EndpointFull(512)))
    );
    assert_eq!(guest.engine.objects().page_requests, 512);
    guest.engine.release(RID);
    let invalid = answers();
    assert_eq!(invalid.len(), 512);
    assert!(invalid.iter().all(|a| a.code == ResponseCode::Invalid));
    let late = ask(&guest.port, 0, true);
    assert_eq!(late, Err(PageRequestRefused::NotClaimed));
}

#[test]
fn a_large_page_drains_whole() {
    let mut guest = Guest::new();
    let root = guest.table();
    guest.map(root, 0x4000_0000, 0x20_0000 | P | RW | US | PS, 2);
    guest
        .engine
        .apply(PLAIN, Translation::Stage1(stage1(root)))
        .unwrap();
    let access = guest.port.access();
    access.read_obj::<u8>(GuestAddress(0x4000_0000)).unwrap();
    let state = guest.engine.endpoint(RID).unwrap().target(None).unwrap();
    let mut drain = Drain::default();
    state.drain(&(0x401f_f000..=0x401f_ffff), &mut drain);
    assert_eq!(drain.len(), 1);
    let mut drain = Drain::default();
    state.drain(&(0x4020_0000..=0x4020_0fff), &mut drain);
    assert_eq!(drain.len(), 0);
}

#[test]
fn a_mapping_outside_memory_is_refused_unless_it_is_of_a_device() {
    let guest = Guest::new();
    let domain = guest.engine.create_domain().unwrap();
    let good = Mapping {
        iova: Iova(0x1000),
        gpa: Gpa(0xff_f000),
        length: 0x1000,
        access: Access::READ_WRITE,
        mmio: false,
    };
    guest.engine.map(domain, &[good]).unwrap();
    let iova = Iova(0x10_0000);
    for (gpa, length) in [
        (0xff_f000, 0x2000),
        (0x100_0000, 0x1000),
        (!0xfff, 0x1000),
        (!0xfff, 0x2000),
        (0, !0xfff),
    ] {
        let gpa = Gpa(gpa);
        let bad = Mapping {
            iova,
            gpa,
            length,
            ..good
        };
        let refused = guest.engine.map(domain, &[bad]);
        assert!(matches!(refused, Err(Refused::NotMemory { .. })), "{bad:?}");
    }
    for (gpa, length) in [(0x800, 0x1000), (0, 0x800), (0, 0)] {
        let gpa = Gpa(gpa);
        let bad = Mapping {
            iova,
            gpa,
            length,
            ..good
        };
        let refused = guest.engine.map(domain, &[bad]);
        assert!(
            matches!(refused, Err(Refused::NotOffered { .. })),
            "{bad:?}"
        );
    }
    assert_eq!(guest.engine.objects().mappings, 1);
    let device = Mapping {
        iova,
        gpa: Gpa(0xe000_0000),
        mmio: true,
        ..good
    };
    guest.engine.map(domain, &[device]).unwrap();
    guest
        .engine
        .apply(PLAIN, Translation::Domain(domain))
        .unwrap();
    assert_eq!(guest.read(&guest.port, 0x1000), Ok(0));
    let peer = guest.read(&guest.port, iova.0);
    assert_eq!(
        peer,
        Err(FaultCause::OutsideMemory),
        "an emulated device has no peers"
    );
}

#[test]
fn an_engine_that_is_dropped_takes_its_domains_along() {
    let guest = Guest::new();
    let domain = guest.engine.create_domain().unwrap();
    let translation = Translation::Domain(domain);
    guest.engine.apply(PLAIN, translation).unwrap();
    let kept = Arc::downgrade(&guest.engine.domain(domain).unwrap());
    assert!(kept.upgrade().is_some());
    drop(guest);
    assert!(kept.upgrade().is_none());
}
