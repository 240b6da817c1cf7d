//! The whole way of shared virtual addressing in one process: the DMA test engine, driven through
//! its registers, behind a VT-d unit, with a guest's tables in guest memory and a guest's page
//! fault handler on the page request queue. The guest here does what Linux does.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Scope;
use std::time::{Duration, Instant};

use devices::interrupt::fake::FakeMsi;
use devices::pci::PciFunction;
use devices::testdev::{Features, TestDevice};
use dma_engine::registers::{Channel, How, Operation, Reason, Registers, Status, checksum};
use viommu::backend::Backend;
use viommu::backend::software::{EndpointConfig, Engine};
use viommu::interrupt::{Msi, MsiSink};
use viommu::pasid::{Config, HostPasids, PasidAllocator};
use viommu::spec::vtd::descriptor::kind;
use viommu::spec::vtd::registers as offset;
use viommu::spec::vtd::vcmd::{VCCAP, VCMD, VCRSP};
use viommu::vtd::{Connections, Unit, UnitConfig};
use viommu::{GuestRam, Rid};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: usize = 64 << 20;
const ROOT: u64 = 0x1000;
const QUEUE: u64 = 0x2000;
const STATUS: u64 = 0x3000;
const PAGE_QUEUE: u64 = 0x4000;
const FIRST_FREE: u64 = 0x10_0000;
const DEVICE: Rid = Rid::new(0, 3, 0);
const PAGE: u64 = 4096;
/// Where every process has its memory.
const PLACE: u64 = 0x7f00_1234_5000;

struct NoInterrupts;

impl MsiSink for NoInterrupts {
    fn send(&self, _: Msi) {}
}

/// The device as its driver sees it.
struct Bar(TestDevice);

impl Registers for Bar {
    fn read(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0.bar_read(0, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn write(&self, at: u64, value: u32) {
        let _ = self.0.bar_write(0, at, &value.to_le_bytes());
    }
}

/// A machine with one unit, one device, and a guest that runs on this thread.
struct Guest {
    ram: GuestRam,
    engine: Engine,
    unit: Arc<Unit>,
    bar: Bar,
    next_page: Mutex<u64>,
    /// Tail of the invalidation queue and the last status that a wait wrote.
    queue: Mutex<(u32, u32)>,
    directory: u64,
}

impl Guest {
    fn new(pasids: Option<Arc<dyn PasidAllocator>>) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let ram = Arc::new(ram);
        let engine = Engine::new(Arc::clone(&ram));
        let device = TestDevice::new(Features::default(), &FakeMsi::default(), |responses| {
            let config = EndpointConfig {
                pasid_bits: 20,
                page_responses: Some(responses),
                ..EndpointConfig::default()
            };
            engine.add_endpoint(DEVICE, config)
        });
        let backend: Arc<dyn Backend> = Arc::new(engine.clone());
        let connections = Connections {
            ram: Arc::clone(&ram),
            msi: Arc::new(NoInterrupts),
            backends: vec![Arc::clone(&backend)],
            remapper: None,
            pasids,
        };
        let unit = Unit::new(UnitConfig::default(), connections).unwrap();
        unit.add_endpoint(DEVICE, backend).unwrap();
        let mut guest = Self {
            ram,
            engine,
            unit,
            bar: Bar(device.unwrap()),
            next_page: Mutex::new(FIRST_FREE),
            queue: Mutex::new((0, 0)),
            directory: 0,
        };
        guest.boot();
        guest
    }

    /// What the IOMMU driver and the PCI core do at boot.
    fn boot(&mut self) {
        self.w64(offset::IQA, QUEUE | 1 << 11);
        self.w32(offset::GCMD, 1 << 26);
        self.w64(offset::RTADDR, ROOT | 1 << 10);
        self.w32(offset::GCMD, 1 << 26 | 1 << 30);
        self.w64(offset::PQA, PAGE_QUEUE);
        self.w32(offset::GCMD, 1 << 26 | 1 << 31);
        // The context of the device: PASIDs, a Device-TLB and page requests are enabled.
        let (context, directory) = (self.page(), self.page());
        self.poke(ROOT, &[context | 1]);
        let entry = context + u64::from(DEVICE.devfn()) * 32;
        self.poke(entry, &[directory | 0x1d | 7 << 9, 0, 0, 0]);
        self.directory = directory;
        let low = u64::from(kind::CONTEXT_CACHE) | 3 << 4 | u64::from(DEVICE.0) << 32;
        self.submit([low, 0]);
        for (offset, value) in self.enables() {
            let _ = self.bar.0.config_write(offset, &value.to_le_bytes());
        }
    }

    /// Writes that enable bus mastering, PASID, ATS and PRI.
    fn enables(&self) -> Vec<(u16, u16)> {
        let word = |at: u16| {
            let mut data = [0; 2];
            self.bar.0.config_read(at, &mut data);
            u16::from_le_bytes(data)
        };
        let find = |id: u16| {
            let mut at = 0x100;
            while word(at) != id {
                at = word(at + 2) >> 4;
                assert_ne!(at, 0, "capability {id:#x}");
            }
            at
        };
        let pri = find(0x13);
        assert_eq!(
            word(pri + 6),
            1 << 15 | 1 << 8,
            "as Linux wants it before it enables PRI"
        );
        vec![
            (0x04, 6),
            (find(0x1b) + 6, 7),
            (find(0x0f) + 6, 1 << 15),
            (pri + 12, 64),
            (pri + 4, 1),
        ]
    }

    fn w32(&self, at: u64, value: u32) {
        self.unit.write(at, &value.to_le_bytes());
    }

    fn w64(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    fn r32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn r64(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    fn peek(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    fn poke(&self, at: u64, words: &[u64]) {
        for (at, word) in (at..).step_by(8).zip(words) {
            self.ram.write_obj(*word, GuestAddress(at)).unwrap();
        }
    }

    /// A fresh page of zeros.
    fn page(&self) -> u64 {
        let mut next = self.next_page.lock().unwrap();
        *next += PAGE;
        assert!(*next < RAM as u64, "the guest is out of memory");
        *next
    }

    /// Submits a descriptor and a wait, and checks that the wait is done when the write returns.
    fn submit(&self, [low, high]: [u64; 2]) {
        let mut queue = self.queue.lock().unwrap();
        let (tail, status) = &mut *queue;
        *status += 1;
        let wait = u64::from(kind::WAIT) | 1 << 5 | u64::from(*status) << 32;
        for words in [[low, high, 0, 0], [wait, STATUS, 0, 0]] {
            self.poke(QUEUE + u64::from(*tail), &words);
            *tail = (*tail + 32) % 4096;
        }
        self.w32(offset::IQT, *tail);
        assert_eq!(self.peek(STATUS) as u32, *status, "the wait is done");
    }

    fn channel(&self, index: u64) -> Channel<'_> {
        Channel::new(&self.bar, index)
    }

    /// Binds a new address space to `pasid`.
    fn bind(&self, pasid: u32) -> Process<'_> {
        let process = Process {
            guest: self,
            pasid,
            table: self.page(),
        };
        process.set_entry(process.table, 1 | 2 << 2 | 1 << 6);
        process
    }

    /// The fault records, as (PASID, address), cleared.
    fn faults(&self) -> Vec<(Option<u32>, u64)> {
        let mut found = Vec::new();
        let status = self.r32(offset::FSTS);
        let first = u64::from(status >> 8 & 0xff);
        for n in 0..if status & 2 != 0 { 8 } else { 0 } {
            let at = offset::FRCD + (first + n) % 8 * 16;
            if self.r32(at + 12) >> 31 == 0 {
                break;
            }
            let pasid = (self.r32(at + 8) >> 31 != 0).then(|| self.r32(at + 12) >> 8 & 0xf_ffff);
            found.push((pasid, self.r64(at)));
            self.w32(at + 12, 1 << 31);
        }
        self.w32(offset::FSTS, 0x83);
        found
    }
}

/// An address space of the guest with a PASID.
struct Process<'g> {
    guest: &'g Guest,
    pasid: u32,
    table: u64,
}

impl Process<'_> {
    /// Writes the PASID entry and invalidates as Linux does.
    fn set_entry(&self, root: u64, low: u64) {
        let guest = self.guest;
        let at = guest.directory + u64::from(self.pasid / 64) * 8;
        if guest.peek(at) == 0 {
            let table = guest.page();
            guest.poke(at, &[table | 1]);
        }
        let entry = (guest.peek(at) & !0xfff) + u64::from(self.pasid % 64) * 64;
        let did = self.did();
        guest.poke(entry, &[low, did | 1 << 23, root, 0, 0, 0, 0, 0]);
        let pasid = u64::from(self.pasid) << 32;
        guest.submit([u64::from(kind::PASID_CACHE) | 1 << 4 | did << 16 | pasid, 0]);
        guest.submit([u64::from(kind::PASID_IOTLB) | 2 << 4 | did << 16 | pasid, 0]);
    }

    fn did(&self) -> u64 {
        2
    }

    /// Ends the address space.
    fn unbind(&self) {
        self.set_entry(0, 0);
        let pasid = u64::from(self.pasid) << 32;
        let low = u64::from(kind::PASID_DEVICE_TLB) | u64::from(DEVICE.0) << 16 | pasid;
        self.guest.submit([low, 1 | 0x7fff_ffff_ffff_f000]);
    }

    /// Where the leaf entry for `iova` is; tables are made on the way.
    fn leaf(&self, iova: u64) -> u64 {
        let mut table = self.table;
        for level in [3, 2, 1] {
            let entry = table + (iova >> (12 + 9 * level) & 0x1ff) * 8;
            if self.guest.peek(entry) == 0 {
                let next = self.guest.page();
                self.guest.poke(entry, &[next | 7]);
            }
            table = self.guest.peek(entry) & !0xfff;
        }
        table + (iova >> 12 & 0x1ff) * 8
    }

    /// The page that `iova` maps to, mapped now if it was not.
    fn touch(&self, iova: u64) -> u64 {
        let leaf = self.leaf(iova);
        if self.guest.peek(leaf) & 1 == 0 {
            let page = self.guest.page();
            self.guest.poke(leaf, &[page | 7]);
        }
        self.guest.peek(leaf) & !0xfff
    }

    /// Unmaps the page at `iova`, and returns it once no device can reach it.
    fn unmap(&self, iova: u64) -> u64 {
        let leaf = self.leaf(iova);
        let page = self.guest.peek(leaf) & !0xfff;
        self.guest.poke(leaf, &[0]);
        let pasid = u64::from(self.pasid) << 32;
        let low = u64::from(kind::PASID_IOTLB) | 3 << 4 | self.did() << 16 | pasid;
        self.guest.submit([low, iova & !0xfff]);
        let low = u64::from(kind::PASID_DEVICE_TLB) | u64::from(DEVICE.0) << 16 | pasid;
        self.guest.submit([low, iova & !0xfff]);
        page
    }

    fn bytes(&self, iova: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        for (n, part) in bytes.chunks_mut(PAGE as usize).enumerate() {
            let page = self.touch(iova + n as u64 * PAGE);
            self.guest.ram.read_slice(part, GuestAddress(page)).unwrap();
        }
        bytes
    }
}

/// The guest's page fault handler, as a thread. Answers requests for the pages of `processes`
/// that lie above [`PLACE`] by mapping them, and all others with Invalid.
struct Handler {
    requests: AtomicU32,
    stop: AtomicBool,
}

impl Handler {
    fn start<'s, 'e>(
        scope: &'s Scope<'s, 'e>,
        guest: &'s Guest,
        processes: &'s BTreeMap<u32, Process<'s>>,
    ) -> Arc<Self> {
        let handler = Arc::new(Self {
            requests: AtomicU32::new(0),
            stop: AtomicBool::new(false),
        });
        let this = Arc::clone(&handler);
        scope.spawn(move || {
            while !this.stop.load(Ordering::Relaxed) {
                if !this.serve(guest, processes) {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
        });
        handler
    }

    fn serve(&self, guest: &Guest, processes: &BTreeMap<u32, Process<'_>>) -> bool {
        let (mut head, tail) = (guest.r32(offset::PQH), guest.r32(offset::PQT));
        let any = head != tail;
        while head != tail {
            let at = PAGE_QUEUE + u64::from(head);
            let (low, high) = (guest.peek(at), guest.peek(at + 8));
            self.requests.fetch_add(1, Ordering::Relaxed);
            let pasid = (low >> 32 & 0xf_ffff) as u32;
            let iova = high & !0xfff;
            let process = processes.get(&pasid).filter(|_| iova >= PLACE);
            if let Some(process) = process {
                process.touch(iova);
            }
            if high & 1 << 2 != 0 {
                let code = if process.is_some() { 0 } else { 1 };
                let mut answer = u64::from(kind::PAGE_GROUP_RESPONSE) | code << 12;
                answer |= low & 0xffff_0000 | u64::from(pasid) << 32 | (low >> 8 & 1) << 4;
                guest.submit([answer, high & 0x1ff << 3]);
            }
            head = (head + 32) % 4096;
            guest.w32(offset::PQH, head);
        }
        guest.w32(offset::PRS, 3);
        any
    }
}

struct Stop(Arc<Handler>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}

fn until(happened: impl Fn() -> bool) {
    let began = Instant::now();
    while !happened() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "it does not happen"
        );
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn processes_share_the_device_each_with_its_own_memory_faulted_in_by_it() {
    const LENGTH: u64 = 5 * PAGE + 100;
    let guest = Guest::new(None);
    let processes: BTreeMap<_, _> = (1..=64).map(|pasid| (pasid, guest.bind(pasid))).collect();
    std::thread::scope(|scope| {
        let handler = Handler::start(scope, &guest, &processes);
        let _stop = Stop(Arc::clone(&handler));
        for &pasid in processes.keys() {
            let channel = guest.channel(u64::from(pasid) - 1);
            channel.set_pattern(u64::from(pasid) * 0x0101_0101_0101_0101);
            channel.start(Operation::Fill, How::sva(pasid), 0, PLACE, LENGTH);
        }
        let mut asked = 0;
        for (&pasid, process) in &processes {
            let channel = guest.channel(u64::from(pasid) - 1);
            let end = channel.end().unwrap().expect_done("a fill").unwrap();
            assert_eq!(end.page_requests, end.page_responses);
            asked += end.page_requests;
            let bytes = process.bytes(PLACE, LENGTH as usize);
            assert!(
                bytes.iter().all(|byte| u32::from(*byte) == pasid),
                "PASID {pasid}"
            );
            let to = PLACE + 100 * PAGE + 7;
            let copied = channel.copy(How::sva(pasid), PLACE, to, LENGTH).unwrap();
            copied.expect_done("a copy").unwrap();
            let sum = channel.checksum(How::sva(pasid), to, LENGTH).unwrap();
            assert_eq!(sum.result, checksum(bytes));
        }
        assert_eq!(asked, 64 * 6, "one request for each page");
        assert_eq!(guest.faults(), []);
        // Seen on both sides.
        let sent = guest.bar.read64(0x18) as u32;
        assert_eq!(handler.requests.load(Ordering::Relaxed), sent);
        assert_eq!(
            (guest.bar.read64(0x20), guest.bar.read64(0x28)),
            (u64::from(sent), 0)
        );
        let state = guest.unit.state();
        assert_eq!(
            (state.page_requests, state.page_requests_refused),
            (sent.into(), 0)
        );
    });
}

#[test]
fn a_page_that_will_never_be_there_ends_the_operation_and_nothing_else() {
    let guest = Guest::new(None);
    let processes = BTreeMap::from([(5, guest.bind(5))]);
    std::thread::scope(|scope| {
        let _stop = Stop(Handler::start(scope, &guest, &processes));
        let channel = guest.channel(0);
        let nowhere = PLACE - 8;
        let end = channel.fill(How::sva(5), 0, nowhere, 16).unwrap();
        end.expect_failure(Reason::PageInvalid, nowhere, "a fill")
            .unwrap();
        channel
            .fill(How::sva(5), 0, PLACE, 16)
            .unwrap()
            .expect_done("a fill")
            .unwrap();
        assert_eq!(guest.faults(), [], "a page request is no fault");
    });
}

#[test]
fn a_privileged_page_request_is_answered_invalid_and_counted() {
    let guest = Guest::new(None);
    let processes = BTreeMap::from([(5, guest.bind(5))]);
    std::thread::scope(|scope| {
        let handler = Handler::start(scope, &guest, &processes);
        let _stop = Stop(Arc::clone(&handler));
        let how = How {
            privileged: true,
            ..How::sva(5)
        };
        let end = guest.channel(0).fill(how, 0, PLACE, 16).unwrap();
        end.expect_failure(Reason::PageInvalid, PLACE, "a privileged fill")
            .unwrap();
        assert_eq!(
            handler.requests.load(Ordering::Relaxed),
            0,
            "the guest never hears of it"
        );
        assert_eq!(guest.unit.state().privileged_page_requests, 1);
    });
}

#[test]
fn requests_without_pasid_and_with_other_pasids_see_nothing_of_a_process() {
    let guest = Guest::new(None);
    let process = guest.bind(7);
    process.touch(PLACE);
    let channel = guest.channel(0);
    channel
        .fill(How::pasid(7), 1, PLACE, 64)
        .unwrap()
        .expect_done("a fill")
        .unwrap();
    assert_eq!(guest.faults(), []);
    for pasid in [None, Some(0), Some(6), Some(8), Some(0xf_ffff)] {
        let how = How {
            pasid,
            ..How::default()
        };
        let end = channel.checksum(how, PLACE, 64).unwrap();
        end.expect_failure(Reason::Fault, PLACE, "another address space")
            .unwrap();
        assert_eq!(guest.faults(), [(pasid, PLACE & !0xfff)]);
    }
}

#[test]
fn data_never_reaches_the_interrupt_range_and_forged_messages_are_not_data() {
    let guest = Guest::new(None);
    let process = guest.bind(0);
    let (msi, channel) = (0xfee0_1000, guest.channel(0));
    // Even where the guest maps it: to requests without PASID the range is interrupts only.
    let page = process.touch(msi);
    for operation in [Operation::Fill, Operation::Checksum] {
        channel.start(operation, How::default(), msi, msi, 64);
        let end = channel.end().unwrap();
        end.expect_failure(Reason::Fault, msi, "data in the interrupt range")
            .unwrap();
    }
    assert_eq!(guest.faults(), [(None, msi), (None, msi)]);
    // Nobody takes messages here, and the page is untouched.
    channel.set_pattern(0x4041);
    channel.start(Operation::Message, How::default(), 0, msi, 0);
    assert_eq!(channel.end().unwrap().result, 0);
    assert_eq!(guest.peek(page), 0);
}

#[test]
fn an_unmap_while_dma_runs_is_complete_when_its_wait_is_done() {
    let guest = Guest::new(None);
    let process = guest.bind(3);
    for round in 0..50u64 {
        let pages: Vec<_> = (0..16).map(|n| process.touch(PLACE + n * PAGE)).collect();
        let channel = guest.channel(round % 64);
        channel.set_pattern(u64::MAX);
        channel.start(Operation::Fill, How::pasid(3), 0, PLACE, 16 * PAGE);
        for (n, page) in pages.into_iter().enumerate().rev() {
            assert_eq!(process.unmap(PLACE + n as u64 * PAGE), page);
            // The guest has the page for something else now.
            guest
                .ram
                .write_slice(&[0x5a; PAGE as usize], GuestAddress(page))
                .unwrap();
            let mut after = [0; PAGE as usize];
            guest
                .ram
                .read_slice(&mut after, GuestAddress(page))
                .unwrap();
            assert!(
                after.iter().all(|byte| *byte == 0x5a),
                "round {round}, page {n}"
            );
        }
        let end = channel.end().unwrap();
        let faulted = end.status == Status::Failed(Reason::Fault);
        assert!(faulted || end.status == Status::Done, "{end:?}");
        guest.faults();
    }
}

#[test]
fn a_pasid_that_is_used_again_never_sees_old_memory() {
    let guest = Guest::new(None);
    for round in 0..100u64 {
        let process = guest.bind(9);
        let page = process.touch(PLACE);
        guest
            .ram
            .write_slice(&[round as u8; 64], GuestAddress(page))
            .unwrap();
        let channel = guest.channel(0);
        let sum = channel
            .checksum(How::pasid(9), PLACE, 64)
            .unwrap()
            .expect_done("a sum");
        assert_eq!(sum.unwrap().result, checksum([round as u8; 64]));
        process.unbind();
        let end = channel.checksum(How::pasid(9), PLACE, 64).unwrap();
        end.expect_failure(Reason::Fault, PLACE, "an address space that ended")
            .unwrap();
    }
}

#[test]
fn a_guest_that_does_not_answer_stalls_only_its_device_until_it_is_reset() {
    let guest = Guest::new(None);
    let _process = guest.bind(1);
    for n in 0..64 {
        guest
            .channel(n)
            .start(Operation::Fill, How::sva(1), 0, PLACE + n * PAGE, 8);
    }
    until(|| guest.unit.state().page_requests == 64);
    assert_eq!(guest.engine.objects().page_requests, 64);
    guest.unit.reset();
    for n in 0..64 {
        let end = guest.channel(n).end().unwrap();
        assert_eq!(end.status, Status::Failed(Reason::PageInvalid));
        assert_eq!(end.page_responses, 1, "answered once");
    }
    assert_eq!(guest.engine.objects().page_requests, 0);
    assert_eq!(guest.bar.read64(0x28), 0, "and nothing twice");
}

#[test]
fn a_flood_overflows_the_queue_and_every_request_is_answered_all_the_same() {
    let guest = Guest::new(None);
    let processes = BTreeMap::from([(1, guest.bind(1))]);
    // 64 channels ask for 64 pages each by hand; the queue has room for 127 requests, and nobody
    // takes them out.
    for n in 0..64 {
        let place = PLACE + n * 64 * PAGE;
        guest
            .channel(n)
            .start(Operation::PageRequest, How::pasid(1), place, 0, 64 * PAGE);
    }
    let waiting = || (0..64).filter(|n| guest.channel(*n).status().unwrap() == Status::Waiting);
    until(|| guest.r32(offset::PRS) & 2 != 0 && guest.bar.read64(0x18) == 64 * 64);
    until(|| waiting().count() == 1);
    std::thread::scope(|scope| {
        let _stop = Stop(Handler::start(scope, &guest, &processes));
        for n in 0..64 {
            guest
                .channel(n)
                .end()
                .unwrap()
                .expect_done("a flood")
                .unwrap();
        }
        let end = guest.channel(0).fill(How::sva(1), 0, PLACE, 8).unwrap();
        end.expect_done("page requests go on").unwrap();
    });
    assert_eq!(guest.bar.read64(0x28), 0);
    assert_eq!(guest.engine.objects().page_requests, 0);
}

#[test]
fn an_unplug_while_pages_are_asked_for_leaves_nothing() {
    let guest = Guest::new(None);
    let _process = guest.bind(1);
    for n in 0..8 {
        guest
            .channel(n)
            .start(Operation::Fill, How::sva(1), 0, PLACE + n * PAGE, 8);
    }
    until(|| guest.unit.state().page_requests == 8);
    guest.unit.remove_endpoint(DEVICE);
    for n in 0..8 {
        assert_eq!(
            guest.channel(n).end().unwrap().status,
            Status::Failed(Reason::PageInvalid)
        );
    }
    guest.engine.remove_endpoint(DEVICE);
    let objects = guest.engine.objects();
    assert_eq!(
        (objects.endpoints, objects.targets, objects.page_requests),
        (0, 0, 0)
    );
}

/// What a guest's VCMD gives: status code and PASID.
fn virtual_command(guest: &Guest, command: u64) -> (u64, u32) {
    guest.w64(VCMD, command);
    let response = guest.r64(VCRSP);
    assert_eq!(response & 1, 0, "IP");
    (response >> 1 & 0x7f, (response >> 16 & 0xf_ffff) as u32)
}

#[test]
fn two_guests_get_disjoint_pasids_from_their_host_and_give_them_back() {
    let directory = std::env::temp_dir().join(format!("nestling-sva-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let open = |name: &str| {
        let config = Config {
            quota: 70,
            ..Config::new(name, 8)
        };
        let host = Arc::new(HostPasids::open(&directory, config).unwrap());
        Guest::new(Some(host))
    };
    let guests = [open("one"), open("two")];
    let mut seen = BTreeMap::new();
    for (n, guest) in guests.iter().enumerate() {
        assert_eq!(guest.r64(offset::ECAP) >> 44 & 1, 1, "VCS");
        assert_eq!(guest.r64(VCCAP), 0b111, "NS, PAS, FPS");
        for _ in 0..70 {
            let (status, pasid) = virtual_command(guest, 1);
            assert_eq!(status, 0);
            assert!((1..256).contains(&pasid) && seen.insert(pasid, n).is_none());
        }
        assert_eq!(virtual_command(guest, 1), (16, 0), "the quota is used up");
    }
    // One can use what it has; the other cannot free it.
    let (&pasid, _) = seen.iter().find(|(_, of)| **of == 0).unwrap();
    guests[0].bind(pasid).touch(PLACE);
    let end = guests[0]
        .channel(0)
        .fill(How::pasid(pasid), 1, PLACE, 8)
        .unwrap();
    end.expect_done("a fill").unwrap();
    assert_eq!(
        virtual_command(&guests[1], u64::from(pasid) << 16 | 2).0,
        16
    );
    assert_eq!(virtual_command(&guests[0], u64::from(pasid) << 16 | 2).0, 0);
    let [one, two] = guests;
    drop(one);
    let holders = viommu::pasid::holders(&directory).unwrap();
    assert_eq!(
        holders.len(),
        1,
        "a guest that ended holds nothing: {holders:?}"
    );
    assert_eq!(holders[0].in_use, 70);
    drop(two);
    std::fs::remove_dir_all(&directory).unwrap();
}
