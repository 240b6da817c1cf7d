//! The engine as a device and a front end see it: real tables in guest RAM, DMA through a port.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::*;
use crate::Gpa;
use crate::backend::{Fault, FaultCause, PageRequest};
use crate::interrupt::{MessageSink, Msi};

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
