//! The engine, driven through its registers as a guest does, over real guest memory and the
//! software back end.

mod ends;
mod faults;
mod operations;
mod paging;
mod pasids;
mod registers;

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

use super::*;
use crate::interrupt::fake::FakeMsi;
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
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
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
    msi: FakeMsi,
}

impl Rig {
    /// The device behind a vIOMMU, claimed and Blocked, with everything enabled.
    fn new() -> Self {
        let (ram, msi, told) = (ram(), FakeMsi::default(), Arc::new(Told::default()));
        let engine = Engine::new(Arc::clone(&ram));
        let messages: Arc<dyn MessageSink> = Arc::clone(&told) as _;
        let device = TestDevice::new(Features::default(), &msi, |page_responses| {
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
            msi,
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
            began.elapsed() < Duration::from_secs(200),
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

/// As [`until`], for what must be counted.
fn until_mut(mut happened: impl FnMut() -> bool) {
    let began = Instant::now();
    while !happened() {
        assert!(
            began.elapsed() < Duration::from_secs(200),
            "it does not happen"
        );
        std::thread::sleep(Duration::from_micros(100));
    }
}
