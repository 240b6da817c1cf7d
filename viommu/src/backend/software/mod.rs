//! The software engine: walks the guest's tables for emulated and vfio-user devices.
//!
//! From the device's side: `port` translates through the port's own `iotlb`, and on a miss
//! through `walk` (or the `domain`'s mappings). From the front end's side: [`Engine`]
//! implements [`Backend`], changes what is in force for a `target` and waits for the DMA that
//! is `inflight`. The two sides meet in a generation and in the ranges that a port announces;
//! a translation that hits takes no lock.
//!
//! Lock order: `control`, then `endpoints`, then `domains`, then those of an endpoint, a domain
//! and a target, then `slots`. No lock is held while an access is waited for or an [`EventSink`] is called.

#![forbid(unsafe_code)]

mod domain;
mod endpoint;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod inflight;
mod iotlb;
pub(crate) mod port;
mod short;
mod tables;
mod target;
mod walk;

#[cfg(test)]
mod conformance;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod stress;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use self::endpoint::Endpoint;
use self::inflight::{EVERYTHING, Slot};
use self::tables::Ram;
use self::target::{Domain, Drain, Space, TargetState, lock};
use self::walk::Walker;
use super::{
    Access, Backend, Capabilities, EventSink, Fault, FaultCause, Invalidation, InvalidationRange,
    Mapping, Objects, PageResponse, Refused, ResponseCode, Scope, Stage1, Stage2, Translation,
};
use crate::dma::DmaPort;
use crate::doorbell::Doorbell;
use crate::interrupt::Msi;
use crate::{DomainId, Gpa, GuestRam, Iova, Pasid, Rid, Target};

pub use self::endpoint::{EndpointConfig, PageResponseSink};

/// Mappings that one step of an unmap removes with the domain locked, so that devices that use
/// the domain go on meanwhile.
const UNMAP_STEP: usize = 1024;

/// The engine's limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Host address width in bits, 12 to 52: what the DMAR table says. Address bits above are
    /// reserved in paging-structure entries.
    pub host_address_width: u8,
    /// The widest guest address in bits that is translated, 39, 48 or 57: MGAW.
    pub address_width: u8,
    /// Mappings that one domain may have. The guest decides how many there are, so this bounds
    /// the host memory it can use (about 50 bytes each).
    pub mappings: usize,
    /// Domains that there may be.
    pub domains: usize,
    /// Where a doorbell that has to be mapped begins, if there is one: then it can be.
    pub doorbell: Option<Gpa>,
}

impl Config {
    /// Everything the engine can do; as many mappings as `ram` has pages, twice.
    pub fn for_ram(ram: &GuestMemoryMmap<()>) -> Self {
        let pages: u64 = ram.iter().map(|region| region.len() >> 12).sum();
        Self {
            host_address_width: 52,
            address_width: 57,
            mappings: usize::try_from(pages.saturating_mul(2).max(1 << 16)).unwrap_or(usize::MAX),
            domains: 1 << 16,
            doorbell: None,
        }
    }
}

/// The software engine. Cloning shares it.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// An [`Engine`] that may be gone: for what the engine itself holds.
#[derive(Clone)]
pub struct WeakEngine(Weak<Shared>);

impl WeakEngine {
    /// The engine, while there is one.
    pub fn upgrade(&self) -> Option<Engine> {
        let shared = self.0.upgrade()?;
        Some(Engine { shared })
    }
}

/// What the engine's clones and its ports share.
struct Shared {
    ram: Ram,
    config: Config,
    /// How many times everything was invalidated.
    generation: AtomicU64,
    /// Held while claims, translations in force and domains are changed.
    control: Mutex<()>,
    endpoints: RwLock<HashMap<Rid, Arc<Endpoint>>>,
    /// The slots of all ports, for who waits for all of them.
    slots: Mutex<Vec<Arc<Slot>>>,
    domains: RwLock<HashMap<DomainId, Arc<Domain>>>,
    next_domain: AtomicU32,
}

impl Drop for Shared {
    /// A domain and the targets that use it hold each other; whoever drops the engine without
    /// releasing its endpoints must not leave them behind.
    fn drop(&mut self) {
        for domain in read(&self.domains).values() {
            lock(&domain.users).clear();
        }
    }
}

fn read<T>(shared: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    shared.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(shared: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    shared.write().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// An engine for a guest with this RAM, with no endpoints.
    pub fn new(ram: GuestRam) -> Self {
        let config = Config::for_ram(&ram);
        Self::with_config(ram, config)
    }

    /// As [`new`](Self::new), with limits of the caller's.
    pub fn with_config(ram: GuestRam, config: Config) -> Self {
        Self {
            shared: Arc::new(Shared {
                ram: Ram::new(ram),
                config,
                generation: AtomicU64::new(0),
                control: Mutex::default(),
                endpoints: RwLock::default(),
                slots: Mutex::default(),
                domains: RwLock::default(),
                next_domain: AtomicU32::new(0),
            }),
        }
    }

    /// The engine without a hold on it.
    pub fn downgrade(&self) -> WeakEngine {
        WeakEngine(Arc::downgrade(&self.shared))
    }

    /// Adds an emulated endpoint; its DMA goes through the returned port (and clones of it, one
    /// per device thread). It is Blocked until a front end claims it and applies something.
    ///
    /// # Errors
    /// [`Refused::Claimed`] when there is an endpoint with this RID.
    pub fn add_endpoint(&self, rid: Rid, config: EndpointConfig) -> Result<DmaPort, Refused> {
        let mut endpoints = write(&self.shared.endpoints);
        if endpoints.contains_key(&rid) {
            return Err(Refused::Claimed(rid));
        }
        let endpoint = Arc::new(Endpoint::new(rid, config));
        endpoints.insert(rid, Arc::clone(&endpoint));
        let state = endpoint.target_or_new(None);
        let port = port::Port::new(Arc::clone(&self.shared), endpoint, state);
        Ok(DmaPort::translated(port))
    }

    /// Removes an endpoint: releases it, and what goes through its ports from now on is Blocked.
    /// Unknown endpoints are no error.
    pub fn remove_endpoint(&self, rid: Rid) {
        self.release(rid);
        write(&self.shared.endpoints).remove(&rid);
    }

    fn endpoint(&self, rid: Rid) -> Option<Arc<Endpoint>> {
        read(&self.shared.endpoints).get(&rid).cloned()
    }

    fn domain(&self, domain: DomainId) -> Result<Arc<Domain>, Refused> {
        let domains = read(&self.shared.domains);
        domains
            .get(&domain)
            .cloned()
            .ok_or(Refused::NoDomain(domain))
    }

    /// Checks what the front end asks for, and finds what it names.
    fn space(&self, translation: Translation) -> Result<Space, Refused> {
        let domain = match &translation {
            Translation::Blocked | Translation::Identity => None,
            Translation::Stage1(stage1) => {
                self.check_stage1(stage1)?;
                None
            }
            Translation::Stage2(stage2) => {
                self.check_stage2(stage2)?;
                None
            }
            Translation::Nested { stage1, stage2 } => {
                self.check_stage1(stage1)?;
                self.check_stage2(stage2)?;
                None
            }
            Translation::Domain(id) => Some(self.domain(*id)?),
        };
        Ok(Space {
            number: 0,
            translation,
            domain,
        })
    }

    fn check_stage1(&self, stage1: &Stage1) -> Result<(), Refused> {
        let most = self.shared.config.address_width.max(48);
        check_width("first-stage width", stage1.width, &[48, 57], most)?;
        check_root("FSPTPTR", stage1.root.0)
    }

    fn check_stage2(&self, stage2: &Stage2) -> Result<(), Refused> {
        let most = self.shared.config.address_width;
        check_width("second-stage width", stage2.width, &[39, 48, 57], most)?;
        check_root("SSPTPTR", stage2.root.0)
    }

    fn check_mapping(&self, mapping: &Mapping) -> Result<(), Refused> {
        let Mapping {
            iova, gpa, length, ..
        } = *mapping;
        if (iova.0 | gpa.0 | length) & 0xfff != 0 || length == 0 {
            return Err(Refused::NotOffered {
                what: "mapping alignment",
                value: iova.0 | gpa.0 | length,
                limit: "whole pages of 4096 bytes".into(),
            });
        }
        let outside = Refused::NotMemory { gpa, length };
        let is_doorbell = || {
            let doorbell = self.shared.config.doorbell.map(Doorbell::Mapped);
            doorbell.is_some_and(|d| d.covers(gpa.0, gpa.0.saturating_add(length - 1)))
        };
        let in_memory = if is_doorbell() {
            true
        } else if mapping.mmio {
            gpa.0.checked_add(length).is_some()
        } else {
            // Region by region: `length` may be anything.
            let mut at = gpa.0;
            let end = gpa.0.checked_add(length);
            loop {
                if end == Some(at) {
                    break true;
                }
                let region = self.shared.ram.all().find_region(GuestAddress(at));
                match (region, end) {
                    (Some(region), Some(end)) => at = end.min(region.last_addr().0 + 1),
                    _ => break false,
                }
            }
        };
        in_memory.then_some(()).ok_or(outside)
    }

    /// What an interrupt message that `rid` writes now becomes, where the doorbell is mapped: for
    /// an endpoint whose interrupts are routes and not writes.
    ///
    /// # Errors
    /// It does not reach the doorbell.
    pub fn message(&self, rid: Rid, msi: Msi) -> Result<Msi, FaultCause> {
        let endpoint = self.endpoint(rid).ok_or(FaultCause::Blocked)?;
        let doorbell = endpoint.config.doorbell;
        let missed = FaultCause::Doorbell(Gpa(doorbell.region().first));
        let state = endpoint.target(None).ok_or(missed)?;
        let walker = Walker {
            ram: &self.shared.ram,
            haw: self.shared.config.host_address_width,
            cache: None,
        };
        let gpa = state.space.load().doorbell(walker, msi.address);
        let own = gpa.ok().filter(|&gpa| gpa == msi.address);
        let message = own.and_then(|gpa| doorbell.message(gpa, msi.data));
        message.ok_or(missed)
    }

    /// Tells the front end of `rid` that `msi` was sent and did not reach the doorbell.
    pub fn missed(&self, rid: Rid, msi: Msi, cause: FaultCause) {
        if let Some(endpoint) = self.endpoint(rid) {
            endpoint.fault(Fault {
                target: Target::rid(rid),
                iova: Iova(msi.address),
                access: Access::WRITE,
                execute: false,
                privileged: false,
                cause,
            });
        }
    }

    /// Tells those of `endpoints` whose doorbell is mapped that it may be elsewhere now. With no
    /// lock held.
    fn moved(&self, endpoints: impl IntoIterator<Item = Rid>) {
        if self.shared.config.doorbell.is_none() {
            return;
        }
        for endpoint in endpoints.into_iter().filter_map(|rid| self.endpoint(rid)) {
            if let (Doorbell::Mapped(_), Some(sink)) =
                (endpoint.config.doorbell, &endpoint.config.messages)
            {
                sink.moved(endpoint.rid);
            }
        }
    }

    /// Whether `first..=last` has an address of the doorbell, which a guest maps to itself only.
    fn has_doorbell(&self, first: u64, last: u64) -> bool {
        let doorbell = self.shared.config.doorbell.map(Doorbell::Mapped);
        doorbell.is_some_and(|doorbell| doorbell.region().overlaps(first, last))
    }

    /// The endpoints that use `domain`.
    fn users(domain: &Domain) -> Vec<Rid> {
        let users = lock(&domain.users);
        users.iter().map(|state| state.target.endpoint).collect()
    }

    /// Runs `work` on the targets that `scope` means.
    fn each_target(&self, scope: Scope, mut work: impl FnMut(&Arc<TargetState>)) {
        let endpoints = read(&self.shared.endpoints);
        match scope {
            Scope::All => endpoints.values().for_each(|e| e.each_target(&mut work)),
            Scope::Endpoint(rid) => {
                if let Some(endpoint) = endpoints.get(&rid) {
                    endpoint.each_target(work);
                }
            }
            Scope::Target(target) => {
                let endpoint = endpoints.get(&target.endpoint);
                if let Some(state) = endpoint.and_then(|e| e.target(target.pasid)) {
                    work(&state);
                }
            }
        }
    }
}

fn check_width(what: &'static str, width: u8, known: &[u8], most: u8) -> Result<(), Refused> {
    if known.contains(&width) && width <= most {
        return Ok(());
    }
    Err(Refused::NotOffered {
        what,
        value: width.into(),
        limit: format!("{known:?} up to {most}"),
    })
}

fn check_root(what: &'static str, root: u64) -> Result<(), Refused> {
    if root & 0xfff == 0 && root >> 52 == 0 {
        return Ok(());
    }
    Err(Refused::NotOffered {
        what,
        value: root,
        limit: "a 4096-byte aligned address of 52 bits".into(),
    })
}

/// The addresses that `range` means.
fn addresses(range: InvalidationRange) -> inflight::Range {
    match range {
        InvalidationRange::All => EVERYTHING,
        InvalidationRange::Pages { first, count, .. } => {
            let bytes = count.checked_mul(4096).map(|bytes| bytes.wrapping_sub(1));
            let last = bytes.and_then(|more| first.0.checked_add(more));
            first.0..=last.unwrap_or(u64::MAX)
        }
    }
}

impl Backend for Engine {
    fn capabilities(&self) -> Capabilities {
        let endpoints = read(&self.shared.endpoints);
        let widths = endpoints.values().map(|e| e.config.address_width);
        let width = self.shared.config.address_width;
        Capabilities {
            stage1: true,
            stage1_57: width >= 57,
            stage1_1g: true,
            sre: true,
            eafe: true,
            stage2: [true, width >= 48, width >= 57],
            nested: true,
            pasid_bits: Pasid::BITS,
            page_requests: true,
            address_width: widths.fold(width, u8::min),
            page_sizes: !0xfff,
            snoop_control: true,
        }
    }

    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        let _control = lock(&self.shared.control);
        let found = self.endpoint(endpoint);
        let found = found.ok_or(Refused::NoEndpoint(endpoint))?;
        let claimed = found.claim(sink);
        claimed.then_some(()).ok_or(Refused::Claimed(endpoint))
    }

    fn release(&self, endpoint: Rid) {
        let Some(endpoint) = self.endpoint(endpoint) else {
            return;
        };
        let mut drain = Drain::default();
        let owed = {
            let _control = lock(&self.shared.control);
            let mut pasids = Vec::new();
            endpoint.each_target(|state| {
                TargetState::switch(state, Space::default(), &mut drain);
                pasids.push(state.target.pasid);
            });
            pasids.into_iter().for_each(|pasid| endpoint.prune(pasid));
            endpoint.unclaim()
        };
        for owed in owed {
            endpoint.answer(owed.target, owed.group, ResponseCode::Invalid);
        }
        drain.wait();
        self.moved([endpoint.rid]);
    }

    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused> {
        let mut drain = Drain::default();
        let result = {
            let _control = lock(&self.shared.control);
            let endpoint = self.endpoint(target.endpoint);
            let endpoint = endpoint
                .filter(|endpoint| endpoint.is_claimed())
                .ok_or(Refused::NoEndpoint(target.endpoint))?;
            if let Some(pasid) = target.pasid
                && !endpoint.can_send(pasid)
            {
                // There is no such target, so it is Blocked.
                return match translation {
                    Translation::Blocked => Ok(()),
                    _ => Err(Refused::NotOffered {
                        what: "PASID",
                        value: pasid.0.into(),
                        limit: format!("{} bits", endpoint.config.pasid_bits),
                    }),
                };
            }
            let (space, result) = match self.space(translation) {
                Ok(space) => (space, Ok(())),
                Err(refused) => (Space::default(), Err(refused)),
            };
            let state = endpoint.target_or_new(target.pasid);
            if state.translation() != space.translation {
                TargetState::switch(&state, space, &mut drain);
            }
            drop(state);
            endpoint.prune(target.pasid);
            result
        };
        drain.wait();
        self.moved([target.endpoint]);
        result
    }

    fn translation(&self, target: Target) -> Translation {
        let endpoint = self.endpoint(target.endpoint);
        let state = endpoint.and_then(|endpoint| endpoint.target(target.pasid));
        state.map_or(Translation::Blocked, |state| state.translation())
    }

    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        let is_everything = |invalidation: &Invalidation| {
            matches!(
                invalidation,
                Invalidation {
                    scope: Scope::All,
                    range: InvalidationRange::All
                }
            )
        };
        for invalidation @ Invalidation { scope, range } in batch {
            let leaves_only = matches!(range, InvalidationRange::Pages { leaf: true, .. });
            if is_everything(invalidation) {
                self.shared.generation.fetch_add(1, Ordering::SeqCst);
            } else {
                self.each_target(*scope, |state| state.post(addresses(*range), leaves_only));
            }
        }
        let mut drain = Drain::default();
        for invalidation @ Invalidation { scope, range } in batch {
            if is_everything(invalidation) {
                drain.add(&lock(&self.shared.slots), &EVERYTHING);
            } else {
                self.each_target(*scope, |state| state.drain(&addresses(*range), &mut drain));
            }
        }
        drain.wait();
        if self.shared.config.doorbell.is_some() {
            for Invalidation { scope, .. } in batch {
                let mut touched = Vec::new();
                self.each_target(*scope, |state| touched.push(state.target.endpoint));
                self.moved(touched);
            }
        }
        batch.len()
    }

    fn respond(&self, response: PageResponse) {
        if let Some(endpoint) = self.endpoint(response.target.endpoint) {
            endpoint.respond(response);
        }
    }

    fn create_domain(&self) -> Result<DomainId, Refused> {
        let mut domains = write(&self.shared.domains);
        let limit = self.shared.config.domains;
        // A number is never used twice, so that nothing that names a domain that is gone ever
        // names another.
        let number = self.shared.next_domain.load(Ordering::Relaxed);
        if domains.len() >= limit || number == u32::MAX {
            return Err(Refused::NoRoom {
                what: "domain",
                limit: limit as u64,
            });
        }
        self.shared.next_domain.store(number + 1, Ordering::Relaxed);
        domains.insert(DomainId(number), Arc::default());
        Ok(DomainId(number))
    }

    fn destroy_domain(&self, domain: DomainId) {
        let mut drain = Drain::default();
        // Its mappings may be many: they are freed at the end, when no lock is held.
        let gone;
        let left = {
            let _control = lock(&self.shared.control);
            gone = write(&self.shared.domains).remove(&domain);
            let Some(gone) = &gone else { return };
            // `control` keeps targets from joining it.
            let left = Self::users(gone);
            let users = lock(&gone.users).clone();
            for state in users {
                TargetState::switch(&state, Space::default(), &mut drain);
            }
            left
        };
        drain.wait();
        self.moved(left);
    }

    fn map(&self, domain: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        let domain = self.domain(domain)?;
        mappings.iter().try_for_each(|m| self.check_mapping(m))?;
        write(&domain.mappings).map(mappings, self.shared.config.mappings)?;
        if mappings
            .iter()
            .any(|m| self.has_doorbell(m.iova.0, m.iova.0 + (m.length - 1)))
        {
            self.moved(Self::users(&domain));
        }
        Ok(())
    }

    fn unmap(&self, domain: DomainId, first: Iova, last: Iova) -> Result<u64, Refused> {
        let domain = self.domain(domain)?;
        let mut total = 0;
        let mut left = first.0..=last.0;
        loop {
            let step = write(&domain.mappings).unmap(&left, UNMAP_STEP);
            let Some((bytes, removed)) = step else { break };
            total += bytes;
            left = removed.end().saturating_add(1)..=last.0;
            let mut drain = Drain::default();
            for state in lock(&domain.users).iter() {
                state.post(removed.clone(), true);
                state.drain(&removed, &mut drain);
            }
            drain.wait();
        }
        if self.has_doorbell(first.0, last.0) {
            self.moved(Self::users(&domain));
        }
        Ok(total)
    }

    /// A port hands each request on before it returns to its device.
    fn drain_page_requests(&self) {}

    fn doorbell(&self, endpoint: Rid) -> Doorbell {
        let endpoint = self.endpoint(endpoint);
        endpoint.map_or(Doorbell::Intercepted, |endpoint| endpoint.config.doorbell)
    }

    fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        let mut translations = HashSet::new();
        for endpoint in read(&self.shared.endpoints).values() {
            objects.endpoints += usize::from(endpoint.is_claimed());
            objects.page_requests += endpoint.pending_groups();
            endpoint.each_target(|state| {
                let translation = state.translation();
                if translation != Translation::Blocked {
                    objects.targets += 1;
                    translations.insert(translation);
                }
            });
        }
        objects.translations = translations.len();
        for domain in read(&self.shared.domains).values() {
            objects.domains += 1;
            objects.mappings += read(&domain.mappings).len();
        }
        objects
    }
}
