//! A guest's hands on a unit, and a back end that remembers and fails on demand.

#![expect(
    clippy::unwrap_used,
    reason = "test harness: memory it writes is RAM it made"
)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Connections, Unit, UnitConfig};
use crate::backend::{
    Backend, Capabilities, EventSink, Fault, Invalidation, Mapping, Objects, PageRequest,
    PageResponse, Refused, Translation,
};
use crate::doorbell::Doorbell;
use crate::interrupt::{Msi, MsiSink};
use crate::spec::vtd::descriptor::{Words, kind};
use crate::spec::vtd::registers as offset;
use crate::spec::vtd::tables::{PasidEntry, PasidEntry0, PasidEntry1, PasidEntry2};
use crate::{DomainId, GuestRam, Iova, Rid, Target};

/// What a back end was asked.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Call {
    Claim(Rid),
    Release(Rid),
    Apply(Target, Translation),
    Invalidate(Vec<Invalidation>),
    Respond(PageResponse),
    DrainPageRequests,
}

type Probe = Box<dyn Fn() -> u32 + Send>;

#[derive(Default)]
struct Inner {
    sinks: BTreeMap<Rid, Arc<dyn EventSink>>,
    targets: BTreeMap<Target, Translation>,
    calls: Vec<Call>,
    /// Outcomes of the next `apply` of something other than Blocked; `false` refuses.
    applies: VecDeque<bool>,
    /// How many of the next batch take effect.
    short: Option<usize>,
    /// Looked at in every call; see [`Recorder::probe`].
    probe: Option<Probe>,
    seen: Vec<u32>,
    unanswered: usize,
}

/// A back end that does nothing, remembers everything and fails when told to.
pub(crate) struct Recorder {
    capabilities: Capabilities,
    inner: Mutex<Inner>,
}

pub(crate) const CAPABLE: Capabilities = Capabilities {
    stage1: true,
    stage1_57: true,
    stage1_1g: true,
    sre: false,
    eafe: false,
    stage2: [true; 3],
    nested: true,
    pasid_bits: 20,
    page_requests: true,
    address_width: 57,
    page_sizes: !0xfff,
    snoop_control: true,
};

impl Recorder {
    pub(crate) fn new(capabilities: Capabilities) -> Arc<Self> {
        Arc::new(Self {
            capabilities,
            inner: Mutex::default(),
        })
    }

    fn with<T>(&self, what: impl FnOnce(&mut Inner) -> T) -> T {
        what(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn call(&self, call: Call) {
        self.with(|inner| {
            let seen = inner.probe.as_ref().map(|probe| probe());
            inner.seen.extend(seen);
            inner.calls.push(call);
        });
    }

    /// What was asked since the last time.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.with(|inner| std::mem::take(&mut inner.calls))
    }

    /// The batches among [`calls`](Self::calls).
    pub(crate) fn batches(&self) -> Vec<Vec<Invalidation>> {
        let batch = |call| match call {
            Call::Invalidate(batch) => Some(batch),
            _ => None,
        };
        self.calls().into_iter().filter_map(batch).collect()
    }

    /// What is in force, where it is not Blocked.
    pub(crate) fn targets(&self) -> BTreeMap<Target, Translation> {
        self.with(|inner| inner.targets.clone())
    }

    /// The next `count` translations are refused.
    pub(crate) fn refuse(&self, count: usize) {
        self.with(|inner| inner.applies.extend(std::iter::repeat_n(false, count)));
    }

    /// Of the next batch only `count` take effect.
    pub(crate) fn cut_short(&self, count: usize) {
        self.with(|inner| inner.short = Some(count));
    }

    /// From now on `probe` is looked at in every call; [`seen`](Self::seen) says what it saw.
    pub(crate) fn probe(&self, probe: impl Fn() -> u32 + Send + 'static) {
        self.with(|inner| inner.probe = Some(Box::new(probe)));
    }

    pub(crate) fn seen(&self) -> Vec<u32> {
        self.with(|inner| std::mem::take(&mut inner.seen))
    }

    /// A device's access did not pass.
    pub(crate) fn fault(&self, fault: Fault) {
        let sink = self.with(|inner| inner.sinks.get(&fault.target.endpoint).cloned());
        if let Some(sink) = sink {
            sink.fault(fault);
        }
    }

    /// A device asks for a translation; whether the guest lets it.
    pub(crate) fn asks_translation(&self, target: Target, iova: Iova) -> bool {
        let sink = self.with(|inner| inner.sinks.get(&target.endpoint).cloned());
        sink.is_some_and(|sink| sink.translation_request(target, iova))
    }

    /// A device asks for a page.
    pub(crate) fn ask(&self, request: PageRequest) {
        let sink = self.with(|inner| {
            inner.unanswered += usize::from(request.last);
            inner.sinks.get(&request.target.endpoint).cloned()
        });
        if let Some(sink) = sink {
            sink.page_request(request);
        }
    }
}

impl Backend for Recorder {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        self.call(Call::Claim(endpoint));
        self.with(|inner| match inner.sinks.insert(endpoint, sink) {
            None => Ok(()),
            Some(_) => Err(Refused::Claimed(endpoint)),
        })
    }

    fn release(&self, endpoint: Rid) {
        self.call(Call::Release(endpoint));
        self.with(|inner| {
            inner.sinks.remove(&endpoint);
            inner
                .targets
                .retain(|target, _| target.endpoint != endpoint);
        });
    }

    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused> {
        self.call(Call::Apply(target, translation));
        self.with(|inner| {
            inner.targets.remove(&target);
            if translation == Translation::Blocked {
                return Ok(());
            }
            if inner.applies.pop_front() == Some(false) {
                return Err(Refused::NoRoom {
                    what: "translation",
                    limit: 0,
                });
            }
            inner.targets.insert(target, translation);
            Ok(())
        })
    }

    fn translation(&self, target: Target) -> Translation {
        self.with(|inner| inner.targets.get(&target).copied().unwrap_or_default())
    }

    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        self.call(Call::Invalidate(batch.to_vec()));
        self.with(|inner| inner.short.take().unwrap_or(batch.len()))
    }

    fn drain_page_requests(&self) {
        self.call(Call::DrainPageRequests);
    }

    fn doorbell(&self, _: Rid) -> Doorbell {
        Doorbell::Intercepted
    }

    fn respond(&self, response: PageResponse) {
        self.call(Call::Respond(response));
        self.with(|inner| inner.unanswered = inner.unanswered.wrapping_sub(1));
    }

    fn create_domain(&self) -> Result<DomainId, Refused> {
        Err(Refused::NoRoom {
            what: "domain",
            limit: 0,
        })
    }

    fn destroy_domain(&self, _: DomainId) {}

    fn map(&self, domain: DomainId, _: &[Mapping]) -> Result<(), Refused> {
        Err(Refused::NoDomain(domain))
    }

    fn unmap(&self, domain: DomainId, _: Iova, _: Iova) -> Result<u64, Refused> {
        Err(Refused::NoDomain(domain))
    }

    fn objects(&self) -> Objects {
        self.with(|inner| Objects {
            endpoints: inner.sinks.len(),
            targets: inner.targets.len(),
            page_requests: inner.unanswered,
            ..Objects::default()
        })
    }
}

/// Keeps the interrupts that a unit sends.
#[derive(Default)]
pub(crate) struct Mailbox(Mutex<Vec<Msi>>);

impl Mailbox {
    /// What came since the last time.
    pub(crate) fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl MsiSink for Mailbox {
    fn send(&self, msi: Msi) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(msi);
    }
}

/// Bytes of RAM that a [`Guest`] has.
pub(crate) const RAM: u64 = 16 << 20;
/// Where the root table is.
pub(crate) const ROOT: u64 = 0x1000;
/// Where the invalidation queue is, of one page.
pub(crate) const QUEUE: u64 = 0x2000;
/// Where waits write their status.
pub(crate) const STATUS: u64 = 0x3000;
/// Where the page request queue is, of one page.
pub(crate) const PAGE_QUEUE: u64 = 0x4000;
/// The endpoint that a guest has.
pub(crate) const NIC: Rid = Rid::new(0, 3, 0);

/// A guest with one unit and one endpoint, [`NIC`].
pub(crate) struct Guest {
    pub(crate) unit: Arc<Unit>,
    pub(crate) ram: GuestRam,
    pub(crate) backend: Arc<Recorder>,
    pub(crate) mailbox: Arc<Mailbox>,
    next_page: u64,
    tail: u32,
    /// Descriptors are 256 bits wide.
    pub(crate) wide: bool,
    status: u32,
}

impl Guest {
    pub(crate) fn new(config: UnitConfig) -> Self {
        Self::with(config, CAPABLE)
    }

    pub(crate) fn with(config: UnitConfig, capabilities: Capabilities) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let ram = Arc::new(ram);
        let backend = Recorder::new(capabilities);
        let mailbox = Arc::new(Mailbox::default());
        let connections = Connections {
            ram: Arc::clone(&ram),
            msi: Arc::clone(&mailbox) as _,
            backends: vec![Arc::clone(&backend) as _],
            remapper: None,
            pasids: None,
        };
        let unit = Unit::new(config, connections).unwrap();
        unit.add_endpoint(NIC, Arc::clone(&backend) as _).unwrap();
        let wide = unit.freeze().ecap.smts();
        Self {
            unit,
            ram,
            backend,
            mailbox,
            next_page: 0x10_0000,
            tail: 0,
            wide,
            status: 0,
        }
    }

    /// A scalable-mode guest with the queue, the page request queue and translation enabled.
    pub(crate) fn scalable() -> Self {
        Self::scalable_with(UnitConfig::default(), CAPABLE)
    }

    pub(crate) fn scalable_with(config: UnitConfig, capabilities: Capabilities) -> Self {
        let mut guest = Self::with(config, capabilities);
        guest.enable_queue();
        guest.w64(offset::RTADDR, ROOT | 1 << 10);
        guest.w32(offset::GCMD, 1 << 26 | 1 << 30);
        guest.w64(offset::PQA, PAGE_QUEUE);
        for event in [offset::FECTL, offset::PECTL, offset::IECTL] {
            guest.w32(event + 4, event as u32);
            guest.w32(event + 8, 0xfee0_0000);
            guest.w32(event, 0);
        }
        guest.w32(offset::GCMD, 1 << 26 | 1 << 31);
        guest
    }

    /// A legacy-mode guest with the queue and translation enabled.
    pub(crate) fn legacy(config: UnitConfig) -> Self {
        let mut guest = Self::new(config);
        guest.enable_queue();
        guest.w64(offset::RTADDR, ROOT);
        guest.w32(offset::GCMD, 1 << 26 | 1 << 30);
        guest.w32(offset::FECTL, 0);
        guest.w32(offset::GCMD, 1 << 26 | 1 << 31);
        guest
    }

    pub(crate) fn enable_queue(&mut self) {
        self.w64(offset::IQT, 0);
        self.w64(offset::IQA, QUEUE | u64::from(self.wide) << 11);
        self.w32(offset::GCMD, 1 << 26);
        self.tail = 0;
    }

    /// The queue begins at its start again, as after a reset.
    pub(crate) fn tail_reset(&mut self) {
        self.tail = 0;
    }

    pub(crate) fn r32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn r64(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    pub(crate) fn w32(&self, at: u64, value: u32) {
        self.unit.write(at, &value.to_le_bytes());
    }

    pub(crate) fn w64(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    pub(crate) fn peek(&self, at: u64) -> u64 {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn poke(&self, at: u64, words: &[u64]) {
        for (at, word) in (at..).step_by(8).zip(words) {
            self.ram.write_obj(*word, GuestAddress(at)).unwrap();
        }
    }

    /// A fresh page of zeros.
    pub(crate) fn page(&mut self) -> u64 {
        self.next_page += 0x1000;
        self.next_page
    }

    const fn descriptor_size(&self) -> u32 {
        if self.wide { 32 } else { 16 }
    }

    /// Puts descriptors into the queue, without telling the unit.
    pub(crate) fn enqueue(&mut self, descriptors: &[Words]) {
        for words in descriptors {
            let size = self.descriptor_size();
            self.poke(QUEUE + u64::from(self.tail), &words[..size as usize / 8]);
            self.tail = (self.tail + size) % 4096;
        }
    }

    /// Tells the unit the tail.
    pub(crate) fn ring(&self) {
        self.w32(offset::IQT, self.tail);
    }

    /// Puts descriptors and a wait into the queue, tells the unit, and says whether the wait was
    /// done when the write of the tail returned.
    pub(crate) fn submit(&mut self, descriptors: &[Words]) -> bool {
        self.enqueue(descriptors);
        self.status += 1;
        let wait = self.wait(0);
        self.enqueue(&[wait]);
        self.ring();
        self.peek(STATUS) as u32 == self.status
    }

    /// A wait descriptor that writes the current status; `flags` are added to it.
    pub(crate) fn wait(&self, flags: u64) -> Words {
        let low = u64::from(kind::WAIT) | 1 << 5 | flags | u64::from(self.status) << 32;
        [low, STATUS, 0, 0]
    }

    /// Makes a scalable context entry for `rid` with an empty PASID directory, PASIDE, DTE and
    /// PRE, tells the unit, and returns the directory.
    pub(crate) fn context(&mut self, rid: Rid) -> u64 {
        let directory = self.page();
        self.set_context(rid, [directory | 0x1d, 0, 0, 0]);
        assert!(self.submit(&[context_device(rid)]));
        directory
    }

    /// Writes a scalable context entry, without telling the unit.
    pub(crate) fn set_context(&mut self, rid: Rid, words: [u64; 4]) {
        let half = u64::from(rid.devfn() >= 0x80);
        let root = ROOT + u64::from(rid.bus()) * 16 + half * 8;
        if self.peek(root) == 0 {
            let table = self.page();
            self.poke(root, &[table | 1]);
        }
        let table = self.peek(root) & !0xfff;
        self.poke(table + u64::from(rid.devfn() & 0x7f) * 32, &words);
    }

    /// Writes a legacy context entry, without telling the unit.
    pub(crate) fn set_legacy_context(&mut self, rid: Rid, words: [u64; 2]) {
        let root = ROOT + u64::from(rid.bus()) * 16;
        if self.peek(root) == 0 {
            let table = self.page();
            self.poke(root, &[table | 1]);
        }
        let table = self.peek(root) & !0xfff;
        self.poke(table + u64::from(rid.devfn()) * 16, &words);
    }

    /// Writes a PASID entry under `directory`, without telling the unit.
    pub(crate) fn set_pasid(&mut self, directory: u64, pasid: u32, entry: PasidEntry) {
        let at = directory + u64::from(pasid / 64) * 8;
        if self.peek(at) == 0 {
            let table = self.page();
            self.poke(at, &[table | 1]);
        }
        let table = self.peek(at) & !0xfff;
        self.poke(table + u64::from(pasid % 64) * 64, &entry.into_words());
    }

    /// Writes a PASID entry and tells the unit as Linux does.
    pub(crate) fn bind(&mut self, directory: u64, pasid: u32, entry: PasidEntry) {
        self.set_pasid(directory, pasid, entry);
        let did = entry.q1.did();
        assert!(self.submit(&[pasid_cache(did, pasid), pasid_iotlb_all(did, pasid)]));
    }

    /// The fault records in use, oldest first, as (SID, FR, FI, PASID), cleared as Linux does.
    pub(crate) fn faults(&self) -> Vec<(u16, u8, u64, Option<u32>)> {
        let mut faults = vec![];
        let status = self.r32(offset::FSTS);
        let mut index = u64::from(status >> 8 & 0xff);
        for _ in 0..if status & 2 != 0 { 8 } else { 0 } {
            let at = offset::FRCD + index * 16;
            let top = self.r32(at + 12);
            if top >> 31 == 0 {
                break;
            }
            let middle = self.r32(at + 8);
            let pasid = (middle >> 31 != 0).then_some(top >> 8 & 0xf_ffff);
            faults.push((middle as u16, top as u8, self.r64(at), pasid));
            self.w32(at + 12, 1 << 31);
            index = (index + 1) % 8;
        }
        self.w32(offset::FSTS, 0x83);
        faults
    }
}

/// A PASID entry for a first-stage table, 4 levels.
pub(crate) fn first_stage(did: u16, root: u64) -> PasidEntry {
    PasidEntry {
        q0: PasidEntry0::new().with_p(true).with_pgtt(1).with_aw(2),
        q1: PasidEntry1::new().with_did(did).with_pwsnp(true),
        q2: PasidEntry2::new().with_fsptptr(root >> 12),
        rest: [0; 5],
    }
}

/// A PASID entry for pass-through.
pub(crate) fn pass_through(did: u16) -> PasidEntry {
    PasidEntry {
        q0: PasidEntry0::new().with_p(true).with_pgtt(4).with_aw(2),
        q1: PasidEntry1::new().with_did(did),
        ..PasidEntry::default()
    }
}

pub(crate) fn context_global() -> Words {
    [u64::from(kind::CONTEXT_CACHE) | 1 << 4, 0, 0, 0]
}

pub(crate) fn context_device(rid: Rid) -> Words {
    [
        u64::from(kind::CONTEXT_CACHE) | 3 << 4 | u64::from(rid.0) << 32,
        0,
        0,
        0,
    ]
}

pub(crate) fn pasid_cache(did: u16, pasid: u32) -> Words {
    let low = u64::from(kind::PASID_CACHE) | 1 << 4 | u64::from(did) << 16;
    [low | u64::from(pasid) << 32, 0, 0, 0]
}

pub(crate) fn pasid_cache_global() -> Words {
    [u64::from(kind::PASID_CACHE) | 3 << 4, 0, 0, 0]
}

pub(crate) fn pasid_iotlb_all(did: u16, pasid: u32) -> Words {
    let low = u64::from(kind::PASID_IOTLB) | 2 << 4 | u64::from(did) << 16;
    [low | u64::from(pasid) << 32, 0, 0, 0]
}

pub(crate) fn pasid_iotlb_pages(did: u16, pasid: u32, first: u64, am: u64) -> Words {
    let low = u64::from(kind::PASID_IOTLB) | 3 << 4 | u64::from(did) << 16;
    [low | u64::from(pasid) << 32, first | am, 0, 0]
}

pub(crate) fn iotlb_global() -> Words {
    [u64::from(kind::IOTLB) | 1 << 4 | 3 << 6, 0, 0, 0]
}

pub(crate) fn iotlb_domain(did: u16) -> Words {
    [
        u64::from(kind::IOTLB) | 2 << 4 | 3 << 6 | u64::from(did) << 16,
        0,
        0,
        0,
    ]
}

pub(crate) fn iotlb_pages(did: u16, first: u64, am: u64) -> Words {
    let low = u64::from(kind::IOTLB) | 3 << 4 | 3 << 6 | u64::from(did) << 16;
    [low, first | am, 0, 0]
}

pub(crate) fn device_tlb(rid: Rid, first: u64) -> Words {
    [
        u64::from(kind::DEVICE_TLB) | u64::from(rid.0) << 32,
        first,
        0,
        0,
    ]
}

pub(crate) fn pasid_device_tlb(rid: Rid, pasid: u32, first: u64) -> Words {
    let low = u64::from(kind::PASID_DEVICE_TLB) | u64::from(rid.0) << 16;
    [low | u64::from(pasid) << 32, first, 0, 0]
}

pub(crate) fn page_response(target: Target, group: u16, code: u64) -> Words {
    let mut low = u64::from(kind::PAGE_GROUP_RESPONSE) | code << 12;
    low |= u64::from(target.endpoint.0) << 16;
    if let Some(pasid) = target.pasid {
        low |= 1 << 4 | u64::from(pasid.0) << 32;
    }
    [low, u64::from(group) << 3, 0, 0]
}
