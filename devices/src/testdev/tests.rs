//! The engine, driven through its registers as a guest does, over real guest memory and the
//! software back end.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::backend::{
    Access, Backend, EventSink, Fault, Invalidation, InvalidationRange, Mapping, PageRequest,
    PageResponse, ResponseCode, Scope, Translation,
};
use viommu::dma::DmaPort;
use viommu::interrupt::{MessageSink, Msi};
use viommu::{DomainId, Gpa, GuestRam, Iova, Pasid, Rid, Target};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::interrupt::{MsiSource, MsiVector};
use crate::pci::PciFunction;

const RID: Rid = Rid::new(0, 3, 0);
const RAM: usize = 4 << 20;

const CONTROL: u64 = 0x00;
const STATUS: u64 = 0x04;
const OPERATION: u64 = 0x08;
const FLAGS: u64 = 0x0c;
const SOURCE: u64 = 0x10;
const DESTINATION: u64 = 0x18;
const LENGTH: u64 = 0x20;
const PATTERN: u64 = 0x28;
const PASID: u64 = 0x30;
const GROUP: u64 = 0x34;
const VECTOR: u64 = 0x38;
const DONE: u64 = 0x40;
const RESULT: u64 = 0x48;
const FAULT_ADDRESS: u64 = 0x50;

const COPY: u32 = 1;
const FILL: u32 = 2;
const CHECKSUM: u32 = 3;
const TRANSLATE: u32 = 4;
const MESSAGE: u32 = 5;
const PAGE_REQUEST: u32 = 6;

const F_PASID: u32 = 1;
const F_PRIVILEGED: u32 = 2;
const F_EXECUTE: u32 = 4;
const F_ATS: u32 = 8;
const F_PRI: u32 = 16;
const F_WRITE: u32 = 32;
const F_NOT_LAST: u32 = 64;
const F_INTERRUPT: u32 = 128;

const RUNNING: u32 = 1;
const WAITING: u32 = 2;
const IS_DONE: u32 = 3;
const ABORTED: u32 = 5;
const fn failed(reason: u32) -> u32 {
    4 | reason << 8
}
const DISABLED: u32 = failed(2);
const FAULT: u32 = failed(3);

/// A vector that counts in its eventfd, whatever it is routed to.
struct Vector(EventFd);

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.0
    }
    fn route(&self, _: Option<Msi>) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Vectors(Mutex<Vec<Arc<Vector>>>);

impl MsiSource for Vectors {
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Arc::new(Vector(EventFd::new(libc::EFD_NONBLOCK)?));
        self.0.lock().unwrap().push(Arc::clone(&vector));
        Ok(vector)
    }
}

impl Vectors {
    fn count(&self, vector: usize) -> u64 {
        self.0.lock().unwrap()[vector].0.read().unwrap_or(0)
    }
}

/// What a front end is told.
#[derive(Default)]
struct Told {
    faults: Mutex<Vec<Fault>>,
    requests: Mutex<Vec<PageRequest>>,
    messages: Mutex<Vec<Msi>>,
}

impl EventSink for Told {
    fn fault(&self, fault: Fault) {
        self.faults.lock().unwrap().push(fault);
    }
    fn page_request(&self, request: PageRequest) {
        self.requests.lock().unwrap().push(request);
    }
}

impl MessageSink for Told {
    fn message(&self, _: Rid, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
}

fn ram() -> GuestRam {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap())
}

struct Rig {
    device: TestDevice,
    engine: Engine,
    told: Arc<Told>,
    ram: GuestRam,
    vectors: Vectors,
}

impl Rig {
    /// The device behind a vIOMMU, claimed and Blocked, with everything enabled.
    fn new() -> Self {
        let (ram, vectors, told) = (ram(), Vectors::default(), Arc::new(Told::default()));
        let engine = Engine::new(Arc::clone(&ram));
        let messages: Arc<dyn MessageSink> = Arc::clone(&told) as _;
        let device = TestDevice::new(Features::default(), &vectors, |page_responses| {
            let config = EndpointConfig {
                pasid_bits: 20,
                page_responses: Some(page_responses),
                messages: Some(messages),
                ..EndpointConfig::default()
            };
            engine.add_endpoint(RID, config)
        });
        engine.claim(RID, Arc::clone(&told) as _).unwrap();
        let rig = Self {
            device: device.unwrap(),
            engine,
            told,
            ram,
            vectors,
        };
        rig.enable();
        rig
    }

    fn enable(&self) {
        self.config(0x04, 0x6);
        for (id, offset, value) in [
            (0x1b, 6, 7),
            (0x0f, 6, 1 << 15),
            (0x13, 12, 32),
            (0x13, 4, 1),
        ] {
            self.config(self.capability(id) + offset, value);
        }
        // MSI-X enabled, all vectors unmasked.
        let msix = (0x40..0x100)
            .find(|at| self.config_word(*at) & 0xff == 0x11)
            .unwrap();
        self.config(msix + 2, 1 << 15);
        for vector in 0..16 {
            let _ = self.device.bar_write(0, 0x1000 + 16 * vector + 12, &[0; 4]);
        }
    }

    fn config(&self, offset: u16, value: u16) {
        let _ = self.device.config_write(offset, &value.to_le_bytes());
    }

    fn config_word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.device.config_read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Finds an extended capability as a driver does.
    fn capability(&self, id: u16) -> u16 {
        let mut at = 0x100;
        while self.config_word(at) != id {
            at = self.config_word(at + 2) >> 4;
            assert_ne!(at, 0, "no capability {id:#x}");
        }
        at
    }

    fn apply(&self, target: Target, translation: Translation) {
        self.engine.apply(target, translation).unwrap();
    }

    /// A domain with `pages` mapped, applied to `target`.
    fn domain(&self, target: Target, pages: &[(u64, u64, Access)]) -> DomainId {
        let domain = self.engine.create_domain().unwrap();
        self.map(domain, pages);
        self.apply(target, Translation::Domain(domain));
        domain
    }

    fn map(&self, domain: DomainId, pages: &[(u64, u64, Access)]) {
        let mappings = pages.iter().map(|&(iova, gpa, access)| Mapping {
            iova: Iova(iova),
            gpa: Gpa(gpa),
            length: 4096,
            access,
            mmio: false,
        });
        self.engine
            .map(domain, &mappings.collect::<Vec<_>>())
            .unwrap();
    }

    fn channel(&self, index: u64) -> Driver<'_> {
        Driver {
            device: &self.device,
            base: 0x4_0000 + 0x1000 * index,
        }
    }

    fn register(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.device.bar_read(0, at, &mut data);
        u32::from_le_bytes(data)
    }

    fn respond(&self, target: Target, group: u16, code: ResponseCode) {
        let response = PageResponse {
            target,
            group,
            code,
        };
        self.engine.respond(response);
    }

    fn faults(&self) -> Vec<(Target, Iova, Access)> {
        let faults = self.told.faults.lock().unwrap();
        faults
            .iter()
            .map(|fault| (fault.target, fault.iova, fault.access))
            .collect()
    }

    /// The page requests so far, once there are `count`.
    fn requests(&self, count: usize) -> Vec<PageRequest> {
        until(|| self.told.requests.lock().unwrap().len() >= count);
        self.told.requests.lock().unwrap().clone()
    }
}

/// Waits for what must happen soon.
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

/// A driver of one channel.
#[derive(Clone, Copy)]
struct Driver<'d> {
    device: &'d TestDevice,
    base: u64,
}

impl Driver<'_> {
    fn set(self, at: u64, value: u64) -> Self {
        let at = self.base + at;
        let _ = match at & 7 {
            4 => self.device.bar_write(0, at, &(value as u32).to_le_bytes()),
            _ if matches!(at & 0xfff, 0x10..0x30) => {
                self.device.bar_write(0, at, &value.to_le_bytes())
            }
            _ => self.device.bar_write(0, at, &(value as u32).to_le_bytes()),
        };
        self
    }

    fn get(self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.device.bar_read(0, self.base + at, &mut data);
        u64::from_le_bytes(data)
    }

    fn status(self) -> u32 {
        let mut data = [0; 4];
        self.device.bar_read(0, self.base + STATUS, &mut data);
        u32::from_le_bytes(data)
    }

    fn start(self, operation: u32, flags: u32) -> Self {
        self.set(OPERATION, operation.into())
            .set(FLAGS, flags.into())
            .set(CONTROL, 1)
    }

    /// The status once the operation has ended.
    fn end(self) -> u32 {
        until(|| !matches!(self.status(), RUNNING | WAITING));
        self.status()
    }

    fn run(self, operation: u32, flags: u32) -> u32 {
        self.start(operation, flags).end()
    }

    fn range(self, source: u64, destination: u64, length: u64) -> Self {
        self.set(SOURCE, source)
            .set(DESTINATION, destination)
            .set(LENGTH, length)
    }
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[test]
fn a_driver_finds_what_the_document_says() {
    let rig = Rig::new();
    assert_eq!((rig.config_word(0), rig.config_word(2)), (0x1af4, 0x10f0));
    let identity: Vec<_> = (0..5).map(|n| rig.register(4 * n)).collect();
    assert_eq!(identity, [0x414d_444e, 1, 64, 16, 0x3f]);
    let (bar, _) = rig.device.bars()[0];
    assert_eq!((bar.index, bar.length), (0, 512 << 10));
    // Max PASID Width, Execute Permission and Privileged Mode Supported.
    assert_eq!(rig.config_word(rig.capability(0x1b) + 4), 20 << 8 | 0b110);
    assert_eq!(rig.config_word(rig.capability(0x0f) + 4), 1 << 6 | 1 << 5);
}

#[test]
fn before_it_is_enabled_pri_is_stopped_and_wants_pasids_in_responses() {
    let rig = Rig::new();
    let _ = rig.device.reset();
    assert_eq!(rig.config_word(rig.capability(0x13) + 6), 1 << 15 | 1 << 8);
    rig.enable();
    assert_eq!(rig.config_word(rig.capability(0x13) + 6), 1 << 15);
}

#[test]
fn what_was_not_configured_is_not_there() {
    let vectors = Vectors::default();
    let features = Features {
        pasid_bits: 0,
        ats: false,
        pri: false,
    };
    let new =
        |features| TestDevice::new(features, &vectors, |_| Ok::<_, ()>(DmaPort::direct(ram())));
    let device = new(features).unwrap();
    let mut header = [0; 4];
    device.config_read(0x100, &mut header);
    assert_eq!(header, [0; 4]);
    let wrong = [
        Features {
            pri: true,
            ..features
        },
        Features {
            pasid_bits: 21,
            ..features
        },
    ];
    for features in wrong {
        assert!(matches!(new(features), Err(NewError::Features(_))));
    }
}

#[test]
fn copies_fills_and_sums_any_length_at_any_address() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    let data: Vec<u8> = (0..200_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    rig.ram.write_slice(&data, GuestAddress(0x1003)).unwrap();
    for length in [0, 1, 7, 4096, 16384, 16385, 200_000] {
        let channel = rig.channel(5).range(0x1003, 0x10_0001, length as u64);
        assert_eq!(channel.run(COPY, 0), IS_DONE);
        assert_eq!(channel.get(DONE), length as u64);
        let mut copy = vec![0; length];
        rig.ram
            .read_slice(&mut copy, GuestAddress(0x10_0001))
            .unwrap();
        assert!(copy == data[..length]);
        assert_eq!(channel.run(CHECKSUM, 0), IS_DONE);
        assert_eq!(channel.get(RESULT), fnv(&data[..length]));
    }
    let channel = rig.channel(5).range(0, 0x20_0003, 40_003);
    let channel = channel.set(PATTERN, 0x0807_0605_0403_0201);
    assert_eq!(channel.run(FILL, 0), IS_DONE);
    let mut filled = vec![0; 40_005];
    rig.ram
        .read_slice(&mut filled, GuestAddress(0x20_0002))
        .unwrap();
    assert_eq!((filled[0], filled[40_004]), (0, 0), "not a byte more");
    let right = filled[1..40_004]
        .iter()
        .enumerate()
        .all(|(n, byte)| *byte as usize == n % 8 + 1);
    assert!(right);
}

#[test]
fn a_device_with_no_viommu_reaches_guest_memory_and_nothing_else() {
    let (ram, vectors) = (ram(), Vectors::default());
    let port = DmaPort::direct(Arc::clone(&ram));
    let device = TestDevice::new(Features::default(), &vectors, |_| Ok::<_, ()>(port)).unwrap();
    let _ = device.config_write(0x04, &[6, 0]);
    let channel = Driver {
        device: &device,
        base: 0x4_0000,
    };
    assert_eq!(channel.range(0, 0x1000, 64).run(COPY, 0), IS_DONE);
    let end = RAM as u64;
    assert_eq!(channel.range(0, end - 16, 64).run(COPY, 0), FAULT);
    assert_eq!(channel.get(FAULT_ADDRESS), end);
    assert_eq!(channel.get(DONE), 16);
    assert_eq!(channel.range(end, 0, 64).run(CHECKSUM, 0), FAULT);
}

#[test]
fn nothing_passes_while_blocked_and_each_attempt_is_one_fault() {
    let rig = Rig::new();
    let channel = rig.channel(0).range(0x1000, 0x2000, 100_000);
    assert_eq!(channel.run(CHECKSUM, 0), FAULT);
    assert_eq!(channel.get(FAULT_ADDRESS), 0x1000);
    assert_eq!(channel.get(DONE), 0);
    assert_eq!(
        rig.faults(),
        [(Target::rid(RID), Iova(0x1000), Access::READ)]
    );
    assert_eq!(channel.run(FILL, 0), FAULT);
    assert_eq!(rig.faults().len(), 2);
}

#[test]
fn a_fault_says_where_it_hit_and_what_was_done_before() {
    let rig = Rig::new();
    let pages = [
        (0x10_0000, 0x1000, Access::READ_WRITE),
        (0x10_1000, 0x5000, Access::READ),
    ];
    rig.domain(Target::rid(RID), &pages);
    rig.ram
        .write_slice(&[9; 4096], GuestAddress(0x5000))
        .unwrap();
    let channel = rig.channel(1).set(PATTERN, 0);
    assert_eq!(
        channel.range(0, 0x10_0000, 8192).run(FILL, 0),
        FAULT,
        "a read-only page"
    );
    assert_eq!(channel.get(FAULT_ADDRESS), 0x10_1000);
    assert_eq!(channel.get(DONE), 4096);
    assert_eq!(rig.ram.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 9);
    assert_eq!(
        channel.range(0x10_0000, 0, 8192).run(CHECKSUM, 0),
        IS_DONE,
        "reads pass"
    );
    assert_eq!(channel.range(0x10_0800, 0, 8192).run(CHECKSUM, 0), FAULT);
    assert_eq!(channel.get(FAULT_ADDRESS), 0x10_2000);
    let rid = Target::rid(RID);
    let wanted = [
        (rid, Iova(0x10_1000), Access::WRITE),
        (rid, Iova(0x10_2000), Access::READ),
    ];
    assert_eq!(rig.faults(), wanted);
}

#[test]
fn pasids_and_no_pasid_are_different_address_spaces() {
    let rig = Rig::new();
    for (n, pasid) in [None, Some(1), Some(0xf_ffff)].into_iter().enumerate() {
        let target = Target {
            endpoint: RID,
            pasid: pasid.map(Pasid),
        };
        rig.domain(
            target,
            &[(0x1000, 0x1_0000 * (n as u64 + 1), Access::READ_WRITE)],
        );
        rig.ram
            .write_obj(n as u8 + 1, GuestAddress(0x1_0000 * (n as u64 + 1)))
            .unwrap();
    }
    for (n, pasid) in [(1, None), (2, Some(1)), (3, Some(0xf_ffff_u64))] {
        let channel = rig
            .channel(n)
            .set(PASID, pasid.unwrap_or(0))
            .range(0x1000, 0, 1);
        let flags = if pasid.is_some() { F_PASID } else { 0 };
        assert_eq!(channel.run(CHECKSUM, flags), IS_DONE);
        assert_eq!(channel.get(RESULT), fnv(&[n as u8]));
    }
    let other = rig.channel(9).set(PASID, 2).range(0x1000, 0, 1);
    assert_eq!(other.run(CHECKSUM, F_PASID), FAULT);
}

#[test]
fn channels_run_side_by_side_each_with_its_own_pasid() {
    let rig = Rig::new();
    for n in 0..64u64 {
        let target = Target::pasid(RID, Pasid(n as u32 + 1));
        let page = 0x10_0000 + 0x1000 * n;
        rig.domain(target, &[(0x7000, page, Access::READ_WRITE)]);
        rig.channel(n)
            .set(PASID, n + 1)
            .set(PATTERN, n)
            .range(0, 0x7000, 4096)
            .start(FILL, F_PASID | F_INTERRUPT);
    }
    for n in 0..64 {
        assert_eq!(rig.channel(n).end(), IS_DONE);
        let page: [u64; 512] = {
            let mut page = [0; 4096];
            rig.ram
                .read_slice(&mut page, GuestAddress(0x10_0000 + 0x1000 * n))
                .unwrap();
            let (words, _) = page.as_chunks();
            std::array::from_fn(|at| u64::from_le_bytes(words[at]))
        };
        assert_eq!(page, [n; 512]);
    }
    until(|| rig.register(0x14) == 0);
    let interrupts = || (0..16).map(|vector| rig.vectors.count(vector)).sum::<u64>();
    let mut seen = 0;
    until_mut(|| {
        seen += interrupts();
        seen == 64
    });
}

/// As [`until`], for what must be counted.
fn until_mut(mut happened: impl FnMut() -> bool) {
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
fn ats_translates_without_faults() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    rig.domain(rid, &[(0x1000, 0x5000, Access::READ)]);
    let channel = rig.channel(0).range(0x1abc, 0, 0);
    assert_eq!(channel.run(TRANSLATE, 0), IS_DONE);
    assert_eq!(channel.get(RESULT), 0x5abc);
    assert_eq!(
        channel.run(TRANSLATE, F_WRITE),
        failed(4),
        "not for writing"
    );
    assert_eq!(channel.range(0x9000, 0, 8).run(CHECKSUM, F_ATS), failed(4));
    assert_eq!(channel.get(FAULT_ADDRESS), 0x9000);
    assert_eq!(channel.range(0x1ff0, 0, 32).run(CHECKSUM, F_ATS), failed(4));
    assert_eq!(channel.get(DONE), 16, "what has a translation is read");
    assert_eq!(rig.faults(), []);
}

#[test]
fn a_missing_page_is_asked_for_and_the_operation_goes_on_when_it_is_there() {
    let rig = Rig::new();
    let target = Target::pasid(RID, Pasid(7));
    let domain = rig.domain(target, &[]);
    rig.ram
        .write_slice(&[1; 8192], GuestAddress(0x5000))
        .unwrap();
    let channel = rig
        .channel(3)
        .set(PASID, 7)
        .set(GROUP, 0x155)
        .range(0x1ffe, 0x9000, 4);
    let channel = channel.start(COPY, F_PASID | F_ATS | F_PRI);
    // What could be read is written before more is read.
    let wanted = [
        (0x1000, 0x5000, Access::READ),
        (0x9000, 0x7000, Access::WRITE),
        (0x2000, 0x6000, Access::READ),
    ];
    for (n, (iova, gpa, access)) in wanted.into_iter().enumerate() {
        let asked = rig.requests(n + 1)[n];
        assert_eq!(
            (asked.target, asked.group, asked.last),
            (target, 0x155, true)
        );
        assert_eq!((asked.iova, asked.access), (Iova(iova), access));
        until(|| channel.status() == WAITING);
        assert_eq!(rig.register(0x14), 1, "one group is outstanding");
        rig.map(domain, &[(iova, gpa, access)]);
        rig.respond(target, 0x155, ResponseCode::Success);
    }
    assert_eq!(channel.end(), IS_DONE);
    assert_eq!(
        rig.ram.read_obj::<[u8; 4]>(GuestAddress(0x7000)).unwrap(),
        [1; 4]
    );
    assert_eq!(channel.get(0x58), 3 << 32 | 3, "requests and responses");
    assert_eq!(
        (rig.register(0x18), rig.register(0x20), rig.register(0x28)),
        (3, 3, 0)
    );
    assert_eq!(rig.faults(), []);
}

#[test]
fn an_invalid_response_ends_the_operation() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0, 4)
        .start(CHECKSUM, F_ATS | F_PRI | F_INTERRUPT);
    rig.requests(1);
    rig.respond(Target::rid(RID), 0, ResponseCode::Invalid);
    assert_eq!(channel.end(), failed(5));
    let mut seen = 0;
    until_mut(|| {
        seen += rig.vectors.count(0);
        seen > 0
    });
    assert_eq!(seen + rig.vectors.count(0), 1, "one interrupt");
}

#[test]
fn a_failure_response_stops_paging_until_it_is_enabled_anew() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let pri = rig.capability(0x13);
    let channel = rig.channel(0).range(0x1000, 0, 4);
    channel.start(CHECKSUM, F_ATS | F_PRI);
    rig.requests(1);
    rig.respond(Target::rid(RID), 0, ResponseCode::Failure);
    assert_eq!(channel.end(), failed(6));
    assert_eq!(
        rig.config_word(pri + 6),
        1 << 15 | 1 << 8 | 1,
        "Response Failure, Stopped"
    );
    assert_eq!(channel.run(CHECKSUM, F_ATS | F_PRI), DISABLED);
    rig.config(pri + 4, 0);
    rig.config(pri + 6, 1);
    assert_eq!(
        rig.config_word(pri + 6),
        1 << 15 | 1 << 8,
        "cleared by writing 1"
    );
    rig.config(pri + 4, 1);
    channel.start(CHECKSUM, F_ATS | F_PRI);
    assert_eq!(rig.requests(2).len(), 2);
}

#[test]
fn requests_wait_for_their_turn_when_the_allocation_is_used_up() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    rig.config(rig.capability(0x13) + 12, 2);
    for n in 0..4 {
        rig.channel(n)
            .range(0x1000 * n, 0, 4)
            .start(CHECKSUM, F_ATS | F_PRI);
    }
    let first = rig.requests(2);
    until(|| rig.register(0x14) == 2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.requests(2).len(), 2, "no more than allowed");
    for request in first {
        rig.respond(request.target, request.group, ResponseCode::Invalid);
    }
    for request in &rig.requests(4)[2..] {
        rig.respond(request.target, request.group, ResponseCode::Invalid);
    }
    for n in 0..4 {
        assert_eq!(rig.channel(n).end(), failed(5));
    }
}

#[test]
fn page_requests_can_be_sent_by_hand_as_groups() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig.channel(0).set(GROUP, 9).range(0x1fff, 0, 2);
    assert_eq!(channel.run(PAGE_REQUEST, F_NOT_LAST | F_WRITE), IS_DONE);
    let channel = channel.range(0x8000, 0, 0).start(PAGE_REQUEST, 0);
    let requests = rig.requests(3);
    let told: Vec<_> = requests
        .iter()
        .map(|r| (r.iova.0, r.access.write, r.last))
        .collect();
    assert_eq!(
        told,
        [
            (0x1000, true, false),
            (0x2000, true, false),
            (0x8000, false, true)
        ]
    );
    rig.respond(Target::rid(RID), 9, ResponseCode::Success);
    assert_eq!(channel.end(), IS_DONE);
    assert_eq!(channel.get(RESULT), 0);
    // A request for everything is cut.
    let channel = channel
        .range(0x1000, 0, u64::MAX - 0x1000)
        .start(PAGE_REQUEST, 0);
    assert_eq!(rig.requests(3 + 64).len(), 3 + 64);
    rig.respond(Target::rid(RID), 9, ResponseCode::Invalid);
    assert_eq!((channel.end(), channel.get(RESULT)), (IS_DONE, 1));
}

#[test]
fn a_group_that_waits_is_not_used_by_another_channel() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let one = rig.channel(1).set(GROUP, 5).start(PAGE_REQUEST, 0);
    rig.requests(1);
    assert_eq!(rig.channel(2).set(GROUP, 5).run(PAGE_REQUEST, 0), failed(7));
    rig.respond(Target::rid(RID), 5, ResponseCode::Success);
    assert_eq!(one.end(), IS_DONE);
}

#[test]
fn a_page_request_that_nobody_would_hear_is_refused() {
    let rig = Rig::new();
    rig.engine.release(RID);
    assert_eq!(rig.channel(0).run(PAGE_REQUEST, 0), failed(8));
    assert_eq!(rig.register(0x14), 0, "nothing is outstanding");
}

#[test]
fn a_release_answers_what_is_outstanding() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0, 4)
        .start(CHECKSUM, F_ATS | F_PRI);
    rig.requests(1);
    rig.engine.release(RID);
    assert_eq!(channel.end(), failed(5));
}

#[test]
fn privileged_and_execute_requests_say_so() {
    let rig = Rig::new();
    let target = Target::pasid(RID, Pasid(1));
    rig.domain(target, &[]);
    let channel = rig.channel(0).set(PASID, 1).range(0x1000, 0, 4);
    let flags = F_PASID | F_PRIVILEGED | F_EXECUTE;
    channel.start(CHECKSUM, flags | F_ATS | F_PRI);
    let request = rig.requests(1)[0];
    assert!(request.privileged && request.execute);
    rig.respond(target, 0, ResponseCode::Invalid);
    channel.end();
    assert_eq!(channel.run(CHECKSUM, flags), FAULT);
    let fault = rig.told.faults.lock().unwrap()[0];
    assert!(fault.privileged && fault.execute);
}

#[test]
fn what_configuration_space_does_not_allow_is_not_done() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    rig.apply(Target::pasid(RID, Pasid(1)), Translation::Identity);
    let channel = rig.channel(0).set(PASID, 1).range(0x1000, 0x2000, 8);
    let pasid = rig.capability(0x1b) + 6;
    let cases = [
        (0x04, 0x6, 0x2, 0),
        (pasid, 7, 6, F_PASID),
        (pasid, 7, 5, F_PASID | F_EXECUTE),
        (pasid, 7, 3, F_PASID | F_PRIVILEGED),
        (rig.capability(0x0f) + 6, 1 << 15, 0, F_ATS),
        (rig.capability(0x13) + 4, 1, 0, F_ATS | F_PRI),
    ];
    for (offset, on, off, flags) in cases {
        rig.config(offset, off);
        assert_eq!(channel.run(COPY, flags), DISABLED, "{offset:#x}");
        rig.config(offset, on);
        assert_ne!(channel.run(COPY, flags), DISABLED, "{offset:#x}");
    }
}

#[test]
fn a_message_is_an_interrupt_only_without_pasid_and_in_its_range() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    let channel = rig.channel(0).set(PASID, 1).set(PATTERN, 0x4041);
    for (address, flags, taken) in [
        (0xfee0_1000, 0, 1),
        (0xfee0_1000, F_PASID, 0),
        (0xfed0_0000, 0, 0),
        (0x1000, 0, 0),
    ] {
        assert_eq!(
            channel.set(DESTINATION, address).run(MESSAGE, flags),
            IS_DONE
        );
        assert_eq!(channel.get(RESULT), taken);
    }
    let messages = rig.told.messages.lock().unwrap();
    let forged = Msi {
        address: 0xfee0_1000,
        data: 0x4041,
    };
    assert_eq!(*messages, [forged]);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    const BAD: u32 = failed(1);
    let channel = rig.channel(0);
    for (operation, flags) in [
        (0, 0),
        (7, 0),
        (u32::MAX, 0),
        (COPY, 1 << 8),
        (COPY, F_PRIVILEGED),
        (COPY, F_EXECUTE),
        (COPY, F_PRI),
    ] {
        assert_eq!(channel.run(operation, flags), BAD, "{operation} {flags:#x}");
    }
    assert_eq!(channel.set(PASID, 1 << 20).run(COPY, F_PASID), BAD);
    assert_eq!(channel.set(GROUP, 512).run(COPY, 0), BAD);
    channel.set(GROUP, 0);
    assert_eq!(channel.range(u64::MAX, 0, 2).run(CHECKSUM, 0), failed(9));
    assert_eq!(channel.range(0, u64::MAX, 2).run(COPY, 0), failed(9));
}

#[test]
fn abort_ends_an_operation_of_any_length() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    // Copies over itself: every piece passes, until the end of memory, far away in time.
    let long = rig
        .channel(0)
        .range(0, 1, RAM as u64 - 1)
        .start(COPY, F_INTERRUPT);
    long.set(CONTROL, 2);
    assert!(matches!(long.end(), ABORTED | IS_DONE));
    let mut seen = 0;
    until_mut(|| {
        seen += rig.vectors.count(0);
        seen == 1
    });
    assert_eq!(
        long.set(CONTROL, 2).status(),
        long.status(),
        "nothing to abort"
    );
}

#[test]
fn registers_do_not_change_under_an_operation() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0x2000, 8)
        .start(COPY, F_ATS | F_PRI);
    rig.requests(1);
    until(|| channel.status() == WAITING);
    channel
        .range(9, 9, 9)
        .set(VECTOR, 9)
        .set(PASID, 9)
        .start(FILL, F_PASID);
    assert_eq!(
        (
            channel.get(SOURCE),
            channel.get(DESTINATION),
            channel.get(LENGTH)
        ),
        (0x1000, 0x2000, 8)
    );
    assert_eq!(
        channel.get(OPERATION),
        u64::from(F_ATS | F_PRI) << 32 | u64::from(COPY)
    );
    channel.set(CONTROL, 2);
    assert_eq!(channel.end(), ABORTED);
}

#[test]
fn a_response_after_an_abort_is_not_stray_and_answers_nobody() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    rig.domain(rid, &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0, 8)
        .start(CHECKSUM, F_ATS | F_PRI);
    rig.requests(1);
    until(|| channel.status() == WAITING);
    assert_eq!(channel.set(CONTROL, 2).end(), ABORTED);
    assert_eq!(
        channel.run(CHECKSUM, F_ATS | F_PRI),
        failed(7),
        "its group is still out"
    );
    rig.respond(rid, 0, ResponseCode::Success);
    assert_eq!(channel.status(), failed(7));
    assert_eq!((rig.register(0x14), rig.register(0x28)), (0, 0));
}

#[test]
fn function_level_reset_stops_all_dma_and_forgets_everything() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    for n in 0..64 {
        rig.channel(n)
            .range(0, 1, RAM as u64 - 1)
            .start(COPY, F_INTERRUPT);
    }
    let express = (0x40..0x100)
        .find(|at| rig.config_word(*at) & 0xff == 0x10)
        .unwrap();
    rig.device.assign_bar(0, 0x8000_0000);
    rig.config(express + 8, 1 << 15);
    // No DMA is in flight: what is written now stays.
    let mark = vec![0xa5; RAM];
    rig.ram.write_slice(&mark, GuestAddress(0)).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    let mut after = vec![0; RAM];
    rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after == mark);
    for n in 0..64 {
        assert_eq!(rig.channel(n).status(), 0);
        assert_eq!(rig.channel(n).get(LENGTH), 0);
        assert_eq!(rig.channel(n).get(PASID) >> 32, n, "GROUP");
    }
    assert_eq!(rig.register(0x10), 0, "nothing is enabled");
    assert_eq!(rig.device.bars()[0].1, 0);
    rig.enable();
    assert_eq!(rig.channel(0).range(0, 0x1000, 64).run(COPY, 0), IS_DONE);
}

#[test]
fn a_response_after_a_reset_is_unexpected() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    rig.domain(rid, &[]);
    rig.channel(0).start(PAGE_REQUEST, 0);
    rig.requests(1);
    let _ = rig.device.reset();
    rig.enable();
    rig.respond(rid, 0, ResponseCode::Success);
    assert_eq!(rig.register(0x28), 1);
    assert_eq!(rig.channel(0).status(), 0);
    assert_eq!(rig.config_word(rig.capability(0x13) + 6) & 2, 2, "UPRGI");
}

#[test]
fn bus_mastering_that_is_taken_away_stops_dma_before_the_write_returns() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    for n in 0..8 {
        rig.channel(n).range(0, 1, RAM as u64 - 1).start(COPY, 0);
    }
    rig.config(0x04, 0x2);
    let mark = vec![0x5a; RAM];
    rig.ram.write_slice(&mark, GuestAddress(0)).unwrap();
    for n in 0..8 {
        assert!(matches!(rig.channel(n).end(), DISABLED | IS_DONE));
    }
    let mut after = vec![0; RAM];
    rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after == mark);
}

#[test]
fn an_unmap_while_dma_runs_is_complete_when_it_returns() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    let pages: Vec<_> = (0..64)
        .map(|n| (0x1000 * n, 0x1000 * n, Access::READ_WRITE))
        .collect();
    let domain = rig.domain(rid, &pages);
    let channel = rig
        .channel(0)
        .set(PATTERN, u64::MAX)
        .range(0, 0, 0x4_0000)
        .start(FILL, 0);
    rig.engine.unmap(domain, Iova(0), Iova(u64::MAX)).unwrap();
    let all = Invalidation {
        scope: Scope::Target(rid),
        range: InvalidationRange::All,
    };
    assert_eq!(rig.engine.invalidate(&[all]), 1);
    rig.ram
        .write_slice(&[0; 0x4_0000], GuestAddress(0))
        .unwrap();
    assert!(matches!(channel.end(), FAULT | IS_DONE));
    let mut after = vec![1; 0x4_0000];
    rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after.iter().all(|byte| *byte == 0));
}

#[test]
fn an_unplugged_device_leaves_nothing() {
    let rig = Rig::new();
    rig.domain(Target::pasid(RID, Pasid(3)), &[]);
    rig.channel(0)
        .set(PASID, 3)
        .start(CHECKSUM, F_PASID | F_ATS | F_PRI);
    rig.channel(1).set(PASID, 3).start(PAGE_REQUEST, F_PASID);
    rig.requests(1);
    let Rig { device, engine, .. } = rig;
    engine.remove_endpoint(RID);
    drop(device);
    let objects = engine.objects();
    assert_eq!(
        (objects.endpoints, objects.targets, objects.page_requests),
        (0, 0, 0)
    );
}

#[test]
fn odd_accesses_read_ones_and_write_nothing() {
    let rig = Rig::new();
    for (offset, length) in [
        (0, 1),
        (0, 2),
        (2, 4),
        (4, 8),
        (0x4_0001, 4),
        (512 << 10, 4),
        (u64::MAX, 1),
    ] {
        let mut data = vec![0; length];
        rig.device.bar_read(0, offset, &mut data);
        assert!(
            data.iter().all(|byte| *byte == 0xff),
            "{offset:#x} {length}"
        );
        let _ = rig.device.bar_write(0, offset, &data);
    }
    let _ = rig.device.bar_write(0, 0x4_0010, &[1, 2]);
    assert_eq!(rig.channel(0).get(SOURCE), 0);
    let mut data = [0; 4];
    rig.device.bar_read(1, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
}
