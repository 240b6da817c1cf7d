//! [`HostIommu`]: what is in force for each target, and how it is switched.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use super::admission::Unfit;
use super::attach::AttachDevice;
use super::faults::{Faults, Reader};
use super::hwinfo::{self, HwInfo};
use super::kernel::Kernel;
use super::memory::Memory;
use super::nested::{self, Tables};
use super::object::Hwpt;
use super::owner::Owner;
use super::parent::Parent;
use super::shadow::{self, Shadow};
use super::space::{AddressSpace, Area, Areas};
use crate::backend::{
    Backend, Capabilities, EventSink, Invalidation, InvalidationRange, Mapping, Objects,
    PageResponse, Refused, Scope, Stage2, Translation,
};
use crate::doorbell::Doorbell;
use crate::reserved::Regions;
use crate::{DomainId, GuestRam, HwptId, Iova, Pasid, Rid, Target};

/// The most PASIDs of one endpoint that can have a translation at a time. Each is an object of the
/// host kernel.
pub const MAX_PASIDS: usize = 4096;

/// The most mappings of one domain.
pub const MAX_MAPPINGS: usize = 1 << 20;

/// How often a call is tried while the device is being reset, 10 ms apart: a function-level reset
/// takes 100 ms.
const RESET_TRIES: u32 = 30;

/// A device that is bound to the iommufd.
pub struct Device {
    /// The bind id (`out_devid`).
    pub id: u32,
    /// How it is attached.
    pub attach: Arc<dyn AttachDevice>,
    /// It has ATS and PRI capabilities and is no virtual function (those cannot have a fault
    /// queue).
    pub page_requests: bool,
    /// Its IOMMU group on the host, if known. The kernel attaches a group to one table, and takes
    /// it away with the last of its devices: those of a group are never Blocked, nor behind tables
    /// of their own, each by itself.
    pub group: Option<u32>,
}

/// What is in force for one target.
struct Attachment {
    translation: Translation,
    /// What the kernel has attached.
    hwpt: Arc<Hwpt>,
    keep: Keep,
    /// A detach failed: the kernel still has it, so it is kept alive here; the device is stopped,
    /// so that the target is Blocked all the same.
    stuck: bool,
}

/// What an attachment keeps alive beside its table.
enum Keep {
    Nothing,
    Shadow(Arc<Shadow>),
    Domain(
        DomainId,
        #[expect(dead_code, reason = "kept alive")] Arc<AddressSpace>,
    ),
}

pub(super) struct Endpoint {
    pub(super) rid: Rid,
    pub(super) device: Device,
    pub(super) info: HwInfo,
    /// The table of Identity, and what stands for the device's kind of IOMMU.
    pub(super) parent: Parent,
    pub(super) capabilities: Capabilities,
    pub(super) pasid_bits: u8,
    /// Its page requests go to the fault queue.
    pub(super) page_requests: bool,
    pub(super) state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) owner: Option<Owner>,
    targets: BTreeMap<Option<Pasid>, Attachment>,
}

impl Endpoint {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn target(&self, pasid: Option<Pasid>) -> Target {
        Target {
            endpoint: self.rid,
            pasid,
        }
    }
}

type Endpoints = BTreeMap<Rid, Arc<Endpoint>>;
type Domains = BTreeMap<DomainId, Arc<AddressSpace>>;

/// The host's iommufd as a [`Backend`], with the guest's memory in it.
pub struct HostIommu {
    // Dropped first: the reader thread ends before what it reads.
    pub(super) reader: Mutex<Option<Reader>>,
    pub(super) faults: Mutex<Option<Arc<Faults>>>,
    endpoints: RwLock<Endpoints>,
    tables: Tables,
    shadows: Mutex<HashMap<Stage2, Weak<Shadow>>>,
    domains: RwLock<Domains>,
    next_domain: Mutex<u32>,
    /// One per kind of host IOMMU; alive while a device needs it.
    pub(super) parents: Mutex<Vec<Weak<Hwpt>>>,
    pub(super) admission: Mutex<()>,
    pub(super) frozen: Mutex<Option<Capabilities>>,
    pub(super) memory: Memory,
    ram: GuestRam,
    pub(super) kernel: Arc<dyn Kernel>,
}

impl fmt::Debug for HostIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostIommu")
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostIommu {
    /// Maps all of `ram` for devices to come: one call per region.
    ///
    /// # Errors
    /// [`Unfit::LockedMemory`], or what the kernel says.
    pub fn new(kernel: Arc<dyn Kernel>, ram: GuestRam) -> Result<Self, Unfit> {
        Ok(Self {
            reader: Mutex::default(),
            faults: Mutex::default(),
            endpoints: RwLock::default(),
            tables: Tables::default(),
            shadows: Mutex::default(),
            domains: RwLock::default(),
            next_domain: Mutex::new(1),
            parents: Mutex::default(),
            admission: Mutex::default(),
            frozen: Mutex::default(),
            memory: Memory::new(kernel.clone(), &ram)?,
            ram,
            kernel,
        })
    }

    /// Removes a device: its claim ends, and nothing is kept for it.
    pub fn remove_device(&self, rid: Rid) {
        self.release(rid);
        self.endpoints_mut().remove(&rid);
        for domain in self.domains().values() {
            domain.sweep();
        }
        let shadows = lock(&self.shadows);
        for shadow in shadows.values().filter_map(Weak::upgrade) {
            shadow.space.sweep();
        }
    }

    /// The guest has been offered `offered`: from now on a device that has less is refused.
    pub fn freeze(&self, offered: Capabilities) {
        *lock(&self.frozen) = Some(offered);
    }

    /// Bits of PASID that `rid` has on this host; 0 for none, or for an unknown endpoint. (A
    /// unit's capability says what its IOMMUs can do, this what the device can.)
    pub fn pasid_bits(&self, rid: Rid) -> u8 {
        self.endpoint(rid).map_or(0, |endpoint| endpoint.pasid_bits)
    }

    /// Whether page requests of `rid` reach its front end.
    pub fn page_requests(&self, rid: Rid) -> bool {
        self.endpoint(rid)
            .is_ok_and(|endpoint| endpoint.page_requests)
    }

    /// What the host says of `rid`.
    pub fn hw_info(&self, rid: Rid) -> Option<HwInfo> {
        self.endpoint(rid).ok().map(|endpoint| endpoint.info)
    }

    /// The addresses that some device's DMA cannot use, of every device that was ever here: what
    /// front ends tell their guests, and keep mappings out of.
    pub fn reserved(&self) -> Regions {
        self.memory.reserved().clone()
    }

    /// Lets devices reach `length` bytes of another device's memory (a dma-buf of its BAR) at
    /// `gpa`.
    ///
    /// # Errors
    /// What the kernel says: hosts without P2P refuse, and the VM works without.
    pub fn add_device_memory(
        &self,
        gpa: u64,
        buffer: BorrowedFd<'_>,
        offset: u64,
        length: u64,
    ) -> Result<(), Unfit> {
        self.memory.add(gpa, buffer, offset, length)
    }

    /// Takes back what [`add_device_memory`](Self::add_device_memory) gave.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_device_memory(&self, gpa: u64) -> Result<(), Unfit> {
        self.memory.remove(gpa)
    }

    pub(super) fn endpoints(&self) -> RwLockReadGuard<'_, Endpoints> {
        self.endpoints
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn endpoints_mut(&self) -> RwLockWriteGuard<'_, Endpoints> {
        self.endpoints
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn domains(&self) -> RwLockReadGuard<'_, Domains> {
        self.domains.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn endpoint(&self, rid: Rid) -> Result<Arc<Endpoint>, Refused> {
        let endpoints = self.endpoints();
        endpoints.get(&rid).cloned().ok_or(Refused::NoEndpoint(rid))
    }

    fn domain(&self, id: DomainId) -> Result<Arc<AddressSpace>, Refused> {
        self.domains()
            .get(&id)
            .cloned()
            .ok_or(Refused::NoDomain(id))
    }

    pub(super) fn faults(&self) -> Option<Arc<Faults>> {
        lock(&self.faults).clone()
    }

    /// Calls `attach` again while the device is being reset.
    pub(super) fn while_in_reset(&self, attach: impl Fn() -> io::Result<()>) -> io::Result<()> {
        for _ in 1..RESET_TRIES {
            match attach() {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => self.kernel.pause(),
                result => return result,
            }
        }
        attach()
    }

    /// What `translation` needs, made and not attached. `None` for Blocked.
    fn prepare(
        &self,
        endpoint: &Endpoint,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<Option<Attachment>, Refused> {
        if translation == Translation::Blocked {
            return Ok(None);
        }
        if let Some(Pasid(number)) = pasid {
            // PASID 0 is the kernel's own for requests without PASID; a device without PASIDs
            // would accept any and do nothing (`linux.md`, A9).
            if number == 0 || u64::from(number) >> endpoint.pasid_bits != 0 {
                return Err(Refused::NotOffered {
                    what: "PASID",
                    value: number.into(),
                    limit: format!(
                        "{} has {} bits of PASID, and 0 is not for tables",
                        endpoint.rid, endpoint.pasid_bits
                    ),
                });
            }
        }
        let id = endpoint.device.id;
        let host = |call, source| Refused::Host {
            call,
            object: endpoint.target(pasid).to_string(),
            source,
        };
        let (hwpt, keep) = match translation {
            Translation::Blocked => return Ok(None),
            Translation::Identity => (endpoint.parent.table().clone(), Keep::Nothing),
            Translation::Stage1(stage1) => {
                nested::check(&stage1, &endpoint.capabilities, &endpoint.info.model)?;
                let faults = self.faults().filter(|_| endpoint.page_requests);
                let queue = faults.as_ref().map(|faults| faults.queue());
                let hwpt = self
                    .tables
                    .get(&endpoint.parent, id, &stage1, queue)
                    .map_err(|e| host("IOMMU_HWPT_ALLOC", e))?;
                (hwpt, Keep::Nothing)
            }
            Translation::Stage2(stage2) => {
                nested::check_stage2(&stage2)?;
                let shadow = self
                    .shadow(stage2)
                    .map_err(|e| host("IOMMU_IOAS_ALLOC", e))?;
                shadow.refresh(&self.memory, &self.ram, (0, u64::MAX), false)?;
                let hwpt = shadow
                    .space
                    .table(endpoint.parent.table(), id)
                    .map_err(|e| host("IOMMU_HWPT_ALLOC", e))?;
                (hwpt, Keep::Shadow(shadow))
            }
            Translation::Domain(domain) => {
                let space = self.domain(domain)?;
                let hwpt = space
                    .table(endpoint.parent.table(), id)
                    .map_err(|e| host("IOMMU_HWPT_ALLOC", e))?;
                (hwpt, Keep::Domain(domain, space))
            }
            Translation::Nested { .. } => {
                return Err(Refused::NotOffered {
                    what: "nested",
                    value: 1,
                    limit: "the host's hardware has two stages, and the second is the VM's own"
                        .into(),
                });
            }
        };
        Ok(Some(Attachment {
            translation,
            hwpt,
            keep,
            stuck: false,
        }))
    }

    fn shadow(&self, table: Stage2) -> io::Result<Arc<Shadow>> {
        let mut shadows = lock(&self.shadows);
        if let Some(shadow) = shadows.get(&table).and_then(Weak::upgrade) {
            return Ok(shadow);
        }
        shadows.retain(|_, shadow| shadow.strong_count() > 0);
        let space = AddressSpace::new(self.kernel.clone())?;
        let shadow = Arc::new(Shadow::new(table, space));
        shadows.insert(table, Arc::downgrade(&shadow));
        Ok(shadow)
    }

    /// Makes the target Blocked. It is on an error, too, by other means: the kernel still has the
    /// old table, and the device is stopped until a later call detaches it.
    fn block(
        &self,
        endpoint: &Endpoint,
        state: &mut State,
        pasid: Option<Pasid>,
    ) -> Result<(), Refused> {
        let Some(attachment) = state.targets.get_mut(&pasid) else {
            return Ok(());
        };
        let detach = || endpoint.device.attach.detach(pasid);
        let target = endpoint.target(pasid);
        let asks = attachment.hwpt.has_faults();
        if let Err(source) = self.take_away(target, asks, detach) {
            attachment.stuck = true;
            endpoint.device.attach.stop();
            log::error!("{target} cannot be detached ({source}); all DMA of the device is stopped");
            return Err(Refused::Host {
                call: "VFIO_DEVICE_DETACH_IOMMUFD_PT",
                object: target.to_string(),
                source,
            });
        }
        let was_stuck = state.targets.remove(&pasid).is_some_and(|old| old.stuck);
        if was_stuck && state.targets.values().all(|other| !other.stuck) {
            endpoint.device.attach.resume();
        }
        Ok(())
    }

    /// Does the call that takes the table of `target` away, and its page requests with it if it
    /// `asks` for pages.
    fn take_away(
        &self,
        target: Target,
        asks: bool,
        call: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        match self.faults().filter(|_| asks) {
            Some(faults) => faults.with_table(target, call),
            None => call(),
        }
    }

    /// Puts `new` in force in place of what is.
    fn switch(
        &self,
        endpoint: &Endpoint,
        state: &mut State,
        pasid: Option<Pasid>,
        new: Attachment,
    ) -> Result<(), Refused> {
        if state.targets.len() > MAX_PASIDS && !state.targets.contains_key(&pasid) {
            return Err(Refused::NoRoom {
                what: "PASID with a translation",
                limit: MAX_PASIDS as u64,
            });
        }
        if let Some(old) = state.targets.get_mut(&pasid) {
            if !old.stuck && Arc::ptr_eq(&old.hwpt, &new.hwpt) {
                // Two ways to write the same table: no call, which would empty the IOTLB.
                *old = new;
                return Ok(());
            }
            let leaks = pasid.is_none() && old.hwpt.has_faults() && new.hwpt.has_faults();
            if old.stuck || leaks {
                self.block(endpoint, state, pasid)?;
            }
        }
        let old = state.targets.get(&pasid);
        let asks = old.is_some_and(|old| old.hwpt.has_faults());
        let attach = || {
            let attach = || endpoint.device.attach.attach(pasid, new.hwpt.id());
            self.take_away(endpoint.target(pasid), asks, attach)
        };
        let mut result = self.while_in_reset(attach);
        if result.is_err() && state.targets.contains_key(&pasid) {
            // The hardware has nothing now and iommufd the old table. Detached, they agree; and
            // from there the new one may fit (the old one's domain id is free).
            self.block(endpoint, state, pasid)?;
            result = attach();
        }
        match result {
            Ok(()) => {
                state.targets.insert(pasid, new);
                Ok(())
            }
            Err(source) => Err(Refused::Host {
                call: "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
                object: endpoint.target(pasid).to_string(),
                source,
            }),
        }
    }

    /// Every target of `endpoint` Blocked; returns the first error.
    pub(super) fn block_all(&self, endpoint: &Endpoint, state: &mut State) -> Result<(), Refused> {
        let pasids = state.targets.keys().copied().collect::<Vec<_>>();
        // PASIDs before requests without one: those may have brought the PASIDs up.
        pasids
            .into_iter()
            .rev()
            .map(|pasid| self.block(endpoint, state, pasid))
            .fold(Ok(()), Result::and)
    }

    /// Calls `each` with what is in force for every target in `scope`.
    fn in_force(&self, scope: Scope, mut each: impl FnMut(&Attachment)) {
        let endpoints = self.endpoints();
        let mut of = |endpoint: &Endpoint, pasid: Option<Option<Pasid>>| {
            let state = endpoint.state();
            match pasid {
                Some(pasid) => state.targets.get(&pasid).into_iter().for_each(&mut each),
                None => state.targets.values().for_each(&mut each),
            }
        };
        match scope {
            Scope::All => endpoints.values().for_each(|endpoint| of(endpoint, None)),
            Scope::Endpoint(rid) => {
                if let Some(endpoint) = endpoints.get(&rid) {
                    of(endpoint, None);
                }
            }
            Scope::Target(target) => {
                if let Some(endpoint) = endpoints.get(&target.endpoint) {
                    of(endpoint, Some(target.pasid));
                }
            }
        }
    }
}

impl Backend for HostIommu {
    fn capabilities(&self) -> Capabilities {
        self.endpoints()
            .values()
            .map(|endpoint| endpoint.capabilities)
            .fold(hwinfo::ANYTHING, Capabilities::and)
    }

    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        self.claim_alone(endpoint, sink)
    }

    fn release(&self, endpoint: Rid) {
        let Ok(found) = self.endpoint(endpoint) else {
            return;
        };
        let mut state = found.state();
        if let Some(faults) = self.faults() {
            faults.disconnect(found.device.id);
        }
        state.owner = None;
        if let Err(error) = self.block_all(&found, &mut state) {
            log::error!("{endpoint} is released with its DMA stopped: {error}");
            if let Some(faults) = self.faults() {
                faults.abandon(endpoint);
            }
        }
    }

    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused> {
        let endpoint = self.endpoint(target.endpoint)?;
        let mut state = endpoint.state();
        if state.owner.is_none() {
            return Err(Refused::NoEndpoint(target.endpoint));
        }
        if let Some(now) = state.targets.get(&target.pasid)
            && now.translation == translation
            && !now.stuck
        {
            return Ok(());
        }
        let switched = match self.prepare(&endpoint, target.pasid, translation) {
            Ok(None) => return self.block(&endpoint, &mut state, target.pasid),
            Ok(Some(new)) => self.switch(&endpoint, &mut state, target.pasid, new),
            Err(refused) => Err(refused),
        };
        if switched.is_err() {
            self.block(&endpoint, &mut state, target.pasid)?;
        }
        switched
    }

    fn translation(&self, target: Target) -> Translation {
        let Ok(endpoint) = self.endpoint(target.endpoint) else {
            return Translation::Blocked;
        };
        let state = endpoint.state();
        let attachment = state.targets.get(&target.pasid).filter(|a| !a.stuck);
        attachment.map_or(Translation::Blocked, |attachment| attachment.translation)
    }

    fn hwpt(&self, target: Target) -> Option<HwptId> {
        let endpoint = self.endpoint(target.endpoint).ok()?;
        let state = endpoint.state();
        let attachment = state.targets.get(&target.pasid)?;
        Some(HwptId(attachment.hwpt.id()))
    }

    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        let mut work = nested::Batch::default();
        let mut mirrors = BTreeMap::<usize, (Arc<Shadow>, Vec<(usize, InvalidationRange)>)>::new();
        for (index, item) in batch.iter().enumerate() {
            self.in_force(item.scope, |attachment| match &attachment.keep {
                Keep::Shadow(shadow) => {
                    let (_, ranges) = mirrors
                        .entry(Arc::as_ptr(shadow) as usize)
                        .or_insert_with(|| (shadow.clone(), Vec::new()));
                    // Two targets with the same table: once.
                    if ranges.last().is_none_or(|&(last, _)| last != index) {
                        ranges.push((index, item.range));
                    }
                }
                Keep::Nothing if matches!(attachment.translation, Translation::Stage1(_)) => {
                    work.add(&attachment.hwpt, index, item.range);
                }
                // Identity has nothing to forget, and of a domain `unmap` has forgotten it.
                Keep::Nothing | Keep::Domain(..) => {}
            });
        }
        let mut took_effect = work.run().unwrap_or(batch.len());
        for (shadow, ranges) in mirrors.into_values() {
            for (index, range) in shadow::once(ranges) {
                let (range, selective) = match range {
                    InvalidationRange::All => ((0, u64::MAX), false),
                    InvalidationRange::Pages { count: 0, .. } => continue,
                    InvalidationRange::Pages { first, count, .. } => {
                        let bytes = (count - 1).saturating_mul(4096).saturating_add(4095);
                        ((first.0, first.0.saturating_add(bytes)), true)
                    }
                };
                let result = shadow.refresh(&self.memory, &self.ram, range, selective);
                if let Err(refused) = result {
                    log::debug!("a mirror is out of date: {refused}");
                    took_effect = took_effect.min(index);
                    break;
                }
            }
        }
        took_effect
    }

    fn doorbell(&self, _: Rid) -> Doorbell {
        // An IOMMU of x86 does not translate them.
        Doorbell::Intercepted
    }

    fn drain_page_requests(&self) {
        if let Some(faults) = self.faults()
            && let Err(error) = faults.drain()
        {
            // Its thread has said so and ended.
            log::debug!("page requests cannot be read: {error}");
        }
    }

    fn respond(&self, response: PageResponse) {
        if let Some(faults) = self.faults() {
            faults.respond(response);
        }
    }

    fn create_domain(&self) -> Result<DomainId, Refused> {
        let space = AddressSpace::new(self.kernel.clone()).map_err(|source| Refused::Host {
            call: "IOMMU_IOAS_ALLOC",
            object: "a domain".into(),
            source,
        })?;
        let mut next = lock(&self.next_domain);
        let mut domains = self.domains.write().unwrap_or_else(PoisonError::into_inner);
        while domains.contains_key(&DomainId(*next)) {
            *next = next.wrapping_add(1);
        }
        let id = DomainId(*next);
        *next = next.wrapping_add(1);
        domains.insert(id, Arc::new(space));
        Ok(id)
    }

    fn destroy_domain(&self, domain: DomainId) {
        // Out of reach first: an `apply` that has it already holds its endpoint's lock, and is
        // found below; a later one is refused. The mappings stay until nobody uses them.
        let gone = self
            .domains
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&domain);
        for endpoint in self.endpoints().values() {
            let mut state = endpoint.state();
            let users = state
                .targets
                .iter()
                .filter(|(_, attachment)| matches!(attachment.keep, Keep::Domain(id, _) if id == domain))
                .map(|(&pasid, _)| pasid)
                .collect::<Vec<_>>();
            for pasid in users {
                // On an error the device was stopped, and the attachment keeps the space alive.
                let _stopped = self.block(endpoint, &mut state, pasid);
            }
        }
        drop(gone);
    }

    fn map(&self, domain: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        let space = self.domain(domain)?;
        let mut areas = space.areas();
        let mut done = Vec::new();
        let mut result = Ok(());
        for mapping in mappings {
            let added = self.checked(mapping, &areas).and_then(|area| {
                space
                    .add(&mut areas, self.memory.ioas(), mapping.iova.0, area)
                    .map_err(|source| Refused::Host {
                        call: "IOMMU_IOAS_COPY",
                        object: format!("domain {} at {}", domain.0, mapping.iova),
                        source,
                    })
            });
            match added {
                Ok(()) => done.push(mapping),
                Err(refused) => {
                    result = Err(refused);
                    break;
                }
            }
        }
        if result.is_err() {
            for mapping in done {
                let last = mapping.iova.0 + (mapping.length - 1);
                if let Err(source) = space.remove(&mut areas, mapping.iova.0, last) {
                    // On record still, so that record and kernel agree.
                    result = Err(Refused::Torn { domain, source });
                }
            }
        }
        result
    }

    fn unmap(&self, domain: DomainId, first: Iova, last: Iova) -> Result<u64, Refused> {
        let space = self.domain(domain)?;
        let mut areas = space.areas();
        if first > last {
            return Ok(0);
        }
        space
            .remove(&mut areas, first.0, last.0)
            .map_err(|source| Refused::Host {
                call: "IOMMU_IOAS_UNMAP",
                object: format!("domain {} at {first}", domain.0),
                source,
            })
    }

    fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for endpoint in self.endpoints().values() {
            let state = endpoint.state();
            objects.endpoints += usize::from(state.owner.is_some());
            objects.targets += state.targets.len();
        }
        objects.translations = self.tables.live()
            + lock(&self.shadows)
                .values()
                .filter(|shadow| shadow.strong_count() > 0)
                .count();
        let domains = self.domains();
        objects.domains = domains.len();
        objects.mappings = domains.values().map(|space| space.areas().len()).sum();
        objects.page_requests = self.faults().map_or(0, |faults| faults.unanswered());
        objects
    }
}

impl HostIommu {
    /// `mapping` as an area, if it can be one beside `areas`.
    fn checked(&self, mapping: &Mapping, areas: &Areas) -> Result<Area, Refused> {
        let &Mapping {
            iova: Iova(iova),
            gpa,
            length,
            access,
            mmio: _,
        } = mapping;
        let unaligned = (iova | gpa.0 | length) & 0xfff;
        let ends = length
            .checked_sub(1)
            .and_then(|rest| Some((iova.checked_add(rest)?, gpa.0.checked_add(rest)?)));
        let (Some((last, gpa_last)), 0) = (ends, unaligned) else {
            return Err(Refused::NotOffered {
                what: "mapping length",
                value: length,
                limit: "addresses and length are multiples of 4096 bytes that do not wrap".into(),
            });
        };
        if !self.memory.covers(gpa.0, gpa_last) {
            return Err(Refused::NotMemory { gpa, length });
        }
        if let Some(region) = self.memory.reserved().overlapping(iova, last) {
            return Err(Refused::NotOffered {
                what: "mapping IOVA",
                value: iova,
                limit: format!("{region} is kept by a device"),
            });
        }
        let before = areas.range(..=last).next_back();
        if before.is_some_and(|(_, area)| area.last >= iova) {
            return Err(Refused::Overlap {
                iova: Iova(iova),
                length,
            });
        }
        if areas.len() >= MAX_MAPPINGS {
            return Err(Refused::NoRoom {
                what: "mapping of a domain",
                limit: MAX_MAPPINGS as u64,
            });
        }
        Ok(Area {
            last,
            gpa: gpa.0,
            access,
        })
    }
}
