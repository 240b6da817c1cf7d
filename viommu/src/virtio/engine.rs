//! From requests to back ends.
//!
//! The order is always the same: check in the state machine, do it in the back end, commit in the
//! state machine. Only mappings go in first (their check *is* the insertion) and are taken out
//! again when a back end refuses them. Requests that arrive together are collected on the way:
//! MAPs of one domain become one call, and so do UNMAPs with no mapping left between them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::Arc;

use super::config::{AddError, Config};
use super::decode::{Attach, Detach, Invalidate, Malformed, Map, Mode, Request, Unmap, decode};
use super::device::Counters;
use super::domain::{Attaching, Domain, State};
use super::fault::{Faults, Sink};
use super::probe;
use super::reply::{Chain, Reply};
use crate::backend::{Backend, Invalidation, Mapping, Refused, Scope, Translation};
use crate::reserved::Regions;
use crate::spec::virtio_iommu::{self as spec, Status, feature, req_type};
use crate::{DomainId, HwptId, Iova, Rid, Target};

/// Mappings that go to a back end in one call.
const BATCH: usize = 256;
/// Between UNMAPs that may become one call, in bytes.
const GAP: u64 = 1 << 20;
/// Mappings that an UNMAP removes, here and in the back ends, before others have a turn.
const STEP: usize = 4096;

pub(super) struct Engine {
    pub(super) config: Config,
    pub(super) bypass: bool,
    pub(super) features: u64,
    pub(super) state: State,
    /// Where each endpoint is; those that have departed are not here.
    pub(super) ports: BTreeMap<u32, Port>,
    /// The back ends that each domain lives in. A bypass domain lives in none.
    homes: BTreeMap<u32, Vec<Home>>,
    pending: Pending,
    /// MAP requests that wait, and the place of their replies.
    maps: Vec<(usize, Map)>,
    /// What of them the back ends have to be told.
    batch: Vec<Mapping>,
    pub(super) counters: Counters,
    remains: Remains,
    faults: Arc<Faults>,
}

/// What is left of domains that no endpoint is in any more. It may be much, so it is freed when
/// nobody waits for the unit; replies wait for that.
#[derive(Default)]
pub(super) struct Remains {
    domains: Vec<Domain>,
    homes: Vec<Home>,
}

impl Remains {
    /// Frees it, here and in the back ends. To be called without the unit's lock.
    pub(super) fn free(self) {
        for home in self.homes {
            home.backend.destroy_domain(home.id);
        }
        drop(self.domains);
    }
}

/// An endpoint's way to its back end.
pub(super) struct Port {
    rid: Rid,
    backend: Arc<dyn Backend>,
    /// The endpoint is Blocked since the back end refused what the guest asked for.
    pub(super) refused: bool,
}

impl Port {
    /// The host kernel's object that translates for it, if there is one.
    pub(super) fn hwpt(&self) -> Option<HwptId> {
        self.backend.hwpt(Target::rid(self.rid))
    }
}

/// A domain in one back end.
struct Home {
    backend: Arc<dyn Backend>,
    id: DomainId,
}

/// What the back ends have not been told yet.
#[derive(Clone, Copy)]
enum Pending {
    Nothing,
    /// `maps` and `batch`, for this domain.
    Maps(u32),
    /// UNMAPs: no mapping is left in these addresses of this domain.
    Unmaps {
        domain: u32,
        first: u64,
        last: u64,
    },
}

/// Two handles of one back end.
fn same(a: &Arc<dyn Backend>, b: &Arc<dyn Backend>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}

fn status_of(refused: &Refused) -> Status {
    match refused {
        Refused::NoRoom { .. } => Status::NoMem,
        Refused::NotOffered { .. } => Status::Unsupp,
        Refused::NotMemory { .. } => Status::Fault,
        Refused::Overlap { .. } => Status::Inval,
        // ENOSPC: the host's IOMMU has no more domains.
        Refused::Host { source, .. }
            if matches!(
                source.kind(),
                ErrorKind::OutOfMemory | ErrorKind::StorageFull
            ) =>
        {
            Status::NoMem
        }
        _ => Status::DevErr,
    }
}

impl Engine {
    pub(super) fn new(config: Config, faults: Arc<Faults>) -> Self {
        Self {
            config,
            bypass: config.bypass,
            features: 0,
            state: State::new(config.rules()),
            ports: BTreeMap::new(),
            homes: BTreeMap::new(),
            pending: Pending::Nothing,
            maps: Vec::with_capacity(BATCH),
            batch: Vec::with_capacity(BATCH),
            counters: Counters::default(),
            remains: Remains::default(),
            faults,
        }
    }

    pub(super) fn add_endpoint(
        &mut self,
        rid: Rid,
        backend: Arc<dyn Backend>,
        reserved: Regions,
    ) -> Result<(), AddError> {
        let id = u32::from(rid.0);
        if self.ports.contains_key(&id) {
            return Err(AddError::Exists(rid));
        }
        self.config
            .admits(rid, &backend.capabilities(), &reserved)?;
        let refused = |source| AddError::Refused {
            endpoint: rid,
            source,
        };
        let sink = Sink {
            faults: Arc::clone(&self.faults),
            backend: Arc::downgrade(&backend),
        };
        backend.claim(rid, Arc::new(sink)).map_err(refused)?;
        if let Err(error) = backend.apply(Target::rid(rid), self.unattached()) {
            backend.release(rid);
            return Err(refused(error));
        }
        // One that departed with this number: the guest meant that one, not this.
        self.remains.domains.extend(self.state.leave(id));
        self.drop_homes();
        self.state.add_endpoint(id, reserved);
        let port = Port {
            rid,
            backend,
            refused: false,
        };
        self.ports.insert(id, port);
        Ok(())
    }

    pub(super) fn remove_endpoint(&mut self, rid: Rid) {
        let id = u32::from(rid.0);
        if let Some(port) = self.ports.remove(&id) {
            port.backend.release(rid);
            self.state.remove_endpoint(id);
            self.drop_homes();
        }
    }

    /// Only when it was negotiated, and only 0 or 1 (5.13.4).
    pub(super) fn write_bypass(&mut self, value: u8) {
        if value <= 1 && self.features & feature::BYPASS_CONFIG != 0 {
            self.bypass = value == 1;
            self.enforce_unattached();
        }
    }

    pub(super) fn reset(&mut self) {
        self.features = 0;
        self.remains.domains.extend(self.state.reset());
        self.enforce_unattached();
        self.drop_homes();
        self.faults.clear();
    }

    /// Releases all endpoints and domains.
    pub(super) fn release(&mut self) {
        for port in std::mem::take(&mut self.ports).into_values() {
            port.backend.release(port.rid);
        }
        self.remains.domains.extend(self.state.reset());
        self.drop_homes();
    }

    /// What is to be freed, when there is any and nothing is pending: then others may have their
    /// turn first.
    pub(super) fn take_remains(&mut self) -> Option<Remains> {
        let Remains { domains, homes } = &self.remains;
        let none = domains.is_empty() && homes.is_empty();
        let idle = matches!(self.pending, Pending::Nothing);
        (idle && !none).then(|| std::mem::take(&mut self.remains))
    }

    /// What is in force for an endpoint without a domain.
    fn unattached(&self) -> Translation {
        if self.bypass {
            Translation::Identity
        } else {
            Translation::Blocked
        }
    }

    /// Serves one of the requests that arrived together; [`flush`](Self::flush) ends them. What is
    /// returned is left to be done of an UNMAP, by [`unmap`](Self::unmap): nothing is pending then,
    /// and others may have their turn before.
    #[inline]
    pub(super) fn serve_one(
        &mut self,
        chain: Chain<'_>,
        replies: &mut Vec<Reply>,
    ) -> Option<Unmap> {
        self.counters.requests += 1;
        let is_probe = chain.readable.first() == Some(&req_type::PROBE);
        if chain.writable < size_of::<spec::ReqTail>() {
            replies.push(Reply::Nothing);
            return None;
        }
        // Used where it is: copying it at once would wait for its words to be written.
        let status = match &decode(chain.readable, self.features) {
            Err(Malformed::Unrecognised) => {
                replies.push(Reply::Nothing);
                return None;
            }
            Err(Malformed::Invalid) if is_probe => {
                replies.push(self.probe(None, chain.writable));
                return None;
            }
            Err(Malformed::Invalid) => Status::Inval,
            Ok(Request::Probe { endpoint }) => {
                replies.push(self.probe(Some(*endpoint), chain.writable));
                return None;
            }
            Ok(Request::Map(request)) => {
                self.map(request, replies);
                return None;
            }
            Ok(Request::Unmap(request)) => return self.unmap(request, replies),
            Ok(Request::Invalidate(request)) => self.invalidate(request),
            Ok(Request::Attach(request)) => {
                self.flush(replies);
                self.attach(request)
            }
            Ok(Request::Detach(request)) => {
                self.flush(replies);
                self.detach(request)
            }
        };
        replies.push(Reply::tail(status));
        None
    }

    /// Answers a PROBE of `endpoint`; `None` stands for a request that is too short.
    fn probe(&self, endpoint: Option<u32>, writable: usize) -> Reply {
        let room = self.config.probe_size as usize;
        let Some(number) = endpoint.filter(|_| writable >= room + size_of::<spec::ReqTail>())
        else {
            // The list is smaller than `probe_size`: what there is of it gets no property.
            return Reply::probe(
                writable.min(room + size_of::<spec::ReqTail>()),
                Status::Inval,
            );
        };
        let size = room + size_of::<spec::ReqTail>();
        match self.state.endpoint(number) {
            None => Reply::probe(size, Status::NoEnt),
            Some(endpoint) => {
                let mut reply = Reply::probe(size, Status::Ok);
                probe::fill(reply.properties_mut(), &endpoint.reserved);
                if let (true, Some(port)) = (self.config.attach_table, self.ports.get(&number)) {
                    let capabilities = port.backend.capabilities();
                    if capabilities.stage1 {
                        probe::add_tables(reply.properties_mut(), &capabilities);
                    }
                }
                reply
            }
        }
    }

    fn attach(&mut self, request: &Attach) -> Status {
        match self.state.check_attach(request) {
            Err(status) => return status,
            // Nothing to do, unless the back end refused before: then it is tried again.
            Ok(Attaching::Already) => {
                let refused = |port: &Port| port.refused;
                return match self.ports.get(&request.endpoint).is_some_and(refused) {
                    false => Status::Ok,
                    true => self
                        .enforce(request.endpoint)
                        .map_or_else(|refused| status_of(&refused), |()| Status::Ok),
                };
            }
            Ok(Attaching::New) => {}
        }
        let after = self.translation_of(request.mode, request.domain, request.endpoint);
        if let Err(refused) = after.and_then(|after| self.apply(request.endpoint, after)) {
            // What the endpoint had before is put in force again, or it is Blocked.
            let _ = self.enforce(request.endpoint);
            self.drop_homes();
            return status_of(&refused);
        }
        self.remains.domains.extend(self.state.attach(request));
        self.drop_homes();
        Status::Ok
    }

    fn detach(&mut self, request: &Detach) -> Status {
        if let Err(status) = self.state.check_detach(request) {
            return status;
        }
        self.remains
            .domains
            .extend(self.state.leave(request.endpoint));
        // Refused or not: it is out of the domain.
        let _ = self.enforce(request.endpoint);
        self.drop_homes();
        Status::Ok
    }

    fn map(&mut self, request: &Map, replies: &mut Vec<Reply>) {
        match self.pending {
            Pending::Maps(domain) if domain == request.domain && self.maps.len() < BATCH => {}
            _ => {
                self.flush(replies);
                self.pending = Pending::Maps(request.domain);
            }
        }
        let status = match self.state.map(request) {
            Ok(()) => {
                if told(&request.mapping()) {
                    self.batch.push(request.mapping());
                }
                Status::Ok
            }
            Err(status) => status,
        };
        self.maps.push((replies.len(), *request));
        replies.push(Reply::tail(status));
    }

    /// Does an UNMAP, or a part of it: then the rest is returned, and there is no reply yet.
    pub(super) fn unmap(&mut self, request: &Unmap, replies: &mut Vec<Reply>) -> Option<Unmap> {
        if let Pending::Maps(_) = self.pending {
            self.flush(replies);
        }
        let (removed, rest) = match self.state.unmap_some(request, STEP) {
            Err(status) => {
                replies.push(Reply::tail(status));
                return None;
            }
            Ok(done) => done,
        };
        if removed.mappings > 0 {
            let part = Unmap {
                virt_end: rest.map_or(request.virt_end, |rest| rest - 1),
                ..*request
            };
            let (first, last) = match self.joined(&part) {
                Some(both) => both,
                None => {
                    self.flush(replies);
                    (part.virt_start, part.virt_end)
                }
            };
            self.pending = Pending::Unmaps {
                domain: request.domain,
                first,
                last,
            };
        }
        match rest {
            None => {
                replies.push(Reply::tail(Status::Ok));
                None
            }
            Some(virt_start) => {
                self.flush(replies);
                Some(Unmap {
                    virt_start,
                    ..*request
                })
            }
        }
    }

    /// The addresses of the pending UNMAPs and of `request`, when no mapping is left in or
    /// between them. Then one call to a back end does for both. Nobody looks into a wide gap,
    /// since something is likely to be there.
    fn joined(&self, request: &Unmap) -> Option<(u64, u64)> {
        let Pending::Unmaps {
            domain,
            first,
            last,
        } = self.pending
        else {
            return None;
        };
        let (start, end) = (request.virt_start, request.virt_end);
        let gap = start.saturating_sub(last).max(first.saturating_sub(end));
        if domain != request.domain || gap > GAP {
            return None;
        }
        let both = (first.min(start), last.max(end));
        let mappings = &self.state.domain(domain)?.mappings;
        (gap <= 1 || !mappings.any_in(both.0, both.1)).then_some(both)
    }

    /// Tells the back ends what is pending, and corrects the replies by what they say.
    pub(super) fn flush(&mut self, replies: &mut [Reply]) {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Nothing => {}
            Pending::Maps(domain) => {
                if self.tell(domain).is_err() {
                    self.map_one_by_one(replies);
                }
                self.maps.clear();
                self.batch.clear();
            }
            Pending::Unmaps {
                domain,
                first,
                last,
            } => self.tell_unmap(domain, first, last),
        }
    }

    /// Some of the waiting MAPs cannot be done. Which, and what that means for those behind them
    /// (a range that is free after all, a limit that is not reached), comes out by doing them one
    /// after the other.
    fn map_one_by_one(&mut self, replies: &mut [Reply]) {
        for (at, request) in &self.maps {
            if replies[*at] == Reply::tail(Status::Ok) {
                let _ = self.state.unmap(&undo(request));
            }
        }
        if let Some((_, request)) = self.maps.first() {
            self.retry(request.domain);
        }
        for n in 0..self.maps.len() {
            let (at, request) = self.maps[n];
            let status = match self.state.map(&request) {
                Err(status) => status,
                Ok(()) => {
                    self.batch.clear();
                    if told(&request.mapping()) {
                        self.batch.push(request.mapping());
                    }
                    match self.tell(request.domain) {
                        Ok(()) => Status::Ok,
                        Err(refused) => {
                            let _ = self.state.unmap(&undo(&request));
                            status_of(&refused)
                        }
                    }
                }
            };
            replies[at] = Reply::tail(status);
        }
    }

    /// Adds `batch` to all homes of `domain`, or to none.
    fn tell(&mut self, domain: u32) -> Result<(), Refused> {
        let mappings = &self.batch;
        let homes = self.homes.get(&domain).map_or(&[][..], Vec::as_slice);
        if mappings.is_empty() {
            return Ok(());
        }
        let mut failed = None;
        for (n, home) in homes.iter().enumerate() {
            self.counters.map_calls += 1;
            if let Err(refused) = home.backend.map(home.id, mappings) {
                failed = Some((n, refused));
                break;
            }
        }
        let Some((done, refused)) = failed else {
            return Ok(());
        };
        self.counters.refusals += 1;
        let mut broken = Vec::new();
        for (n, home) in homes[..done].iter().enumerate() {
            let undone = mappings.iter().try_for_each(|m| {
                let last = Iova(m.iova.0 + m.length - 1);
                home.backend.unmap(home.id, m.iova, last).map(drop)
            });
            if undone.is_err() {
                broken.push(n);
            }
        }
        if let Refused::Torn { .. } = refused {
            broken.push(done);
        }
        self.break_homes(domain, &broken);
        Err(refused)
    }

    /// Removes addresses from all homes of `domain`. A home that cannot is given up and made
    /// anew, so that what was unmapped is out of reach in any case: UNMAP does not fail here.
    fn tell_unmap(&mut self, domain: u32, first: u64, last: u64) {
        let homes = self.homes.get(&domain).map_or(&[][..], Vec::as_slice);
        let mut broken = Vec::new();
        for (n, home) in homes.iter().enumerate() {
            self.counters.unmap_calls += 1;
            if home
                .backend
                .unmap(home.id, Iova(first), Iova(last))
                .is_err()
            {
                self.counters.refusals += 1;
                broken.push(n);
            }
        }
        self.break_homes(domain, &broken);
        self.retry(domain);
    }

    /// Tries again what was refused to endpoints of `domain`.
    fn retry(&mut self, domain: u32) {
        let endpoints = self.state.domain(domain).map_or(&[][..], |d| &d.endpoints);
        let refused = |id: &&u32| self.ports.get(id).is_some_and(|port| port.refused);
        let refused: Vec<u32> = endpoints.iter().filter(refused).copied().collect();
        for endpoint in refused {
            // What stays Blocked is tried again by the next UNMAP, refused MAP or ATTACH.
            let _ = self.enforce(endpoint);
        }
    }

    /// Gives up homes of `domain` (ascending places): their endpoints are Blocked.
    fn break_homes(&mut self, domain: u32, places: &[usize]) {
        for &place in places.iter().rev() {
            let Some(homes) = self.homes.get_mut(&domain) else {
                return;
            };
            let home = homes.remove(place);
            home.backend.destroy_domain(home.id);
            let endpoints = self.state.domain(domain).map_or(&[][..], |d| &d.endpoints);
            for endpoint in endpoints {
                if let Some(port) = self.ports.get_mut(endpoint)
                    && same(&port.backend, &home.backend)
                {
                    port.refused = true;
                    self.faults.push_internal(port.rid);
                }
            }
        }
    }

    /// Takes down homes that no endpoint uses.
    fn drop_homes(&mut self) {
        let (state, ports, remains) = (&self.state, &self.ports, &mut self.remains);
        self.homes.retain(|&number, homes| {
            let endpoints = state.domain(number).map_or(&[][..], |d| &d.endpoints);
            let used = |home: &mut Home| {
                let mut users = endpoints.iter().filter_map(|id| ports.get(id));
                users.any(|p| !p.refused && same(&p.backend, &home.backend))
            };
            remains
                .homes
                .extend(homes.extract_if(.., |home| !used(home)));
            !homes.is_empty()
        });
    }

    /// `domain` in the back end of `endpoint`: as it is, or new with all its mappings.
    fn home(&mut self, domain: u32, endpoint: u32) -> Result<DomainId, Refused> {
        let Some(port) = self.ports.get(&endpoint) else {
            return Err(Refused::NoEndpoint(Rid(endpoint as u16)));
        };
        let homes = self.homes.entry(domain).or_default();
        if let Some(home) = homes.iter().find(|home| same(&home.backend, &port.backend)) {
            return Ok(home.id);
        }
        let backend = Arc::clone(&port.backend);
        let id = backend.create_domain()?;
        let mut chunk = Vec::with_capacity(BATCH);
        if let Some(domain) = self.state.domain(domain) {
            let mut mappings = domain.mappings.iter().filter(told).peekable();
            while mappings.peek().is_some() {
                chunk.clear();
                chunk.extend(mappings.by_ref().take(BATCH));
                self.counters.map_calls += 1;
                if let Err(refused) = backend.map(id, &chunk) {
                    backend.destroy_domain(id);
                    return Err(refused);
                }
            }
        }
        homes.push(Home { backend, id });
        Ok(id)
    }

    /// What translates for an endpoint in a domain of that mode.
    fn translation_of(
        &mut self,
        mode: Mode,
        domain: u32,
        endpoint: u32,
    ) -> Result<Translation, Refused> {
        match mode {
            Mode::Bypass => Ok(Translation::Identity),
            Mode::Table(table) => Ok(Translation::Stage1(table)),
            Mode::Mapped => self.home(domain, endpoint).map(Translation::Domain),
        }
    }

    /// Forgets what is cached of a table. Where a back end cannot, the endpoint is Blocked.
    fn invalidate(&mut self, request: &Invalidate) -> Status {
        let Some(domain) = self.state.domain(request.domain) else {
            return Status::NoEnt;
        };
        if !matches!(domain.mode, Mode::Table(_)) {
            return Status::Inval;
        }
        let mut status = Status::Ok;
        for endpoint in &domain.endpoints {
            let Some(port) = self.ports.get_mut(endpoint) else {
                continue;
            };
            let target = Target::rid(port.rid);
            let stale = Invalidation {
                scope: Scope::Target(target),
                range: request.range,
            };
            if port.refused || port.backend.invalidate(&[stale]) == 1 {
                continue;
            }
            self.counters.refusals += 1;
            let _ = port.backend.apply(target, Translation::Blocked);
            port.refused = true;
            self.faults.push_internal(port.rid);
            status = Status::DevErr;
        }
        status
    }

    /// Puts a translation in force. On an error the endpoint is Blocked.
    fn apply(&mut self, endpoint: u32, translation: Translation) -> Result<(), Refused> {
        let Some(port) = self.ports.get_mut(&endpoint) else {
            return Err(Refused::NoEndpoint(Rid(endpoint as u16)));
        };
        let outcome = port.backend.apply(Target::rid(port.rid), translation);
        match &outcome {
            Ok(()) => port.refused = false,
            Err(refused) => {
                self.counters.refusals += 1;
                log::debug!("virtio-iommu: {}: {refused}", port.rid);
            }
        }
        outcome
    }

    /// Puts in force what the state machine has for `endpoint`, if it is still there. On an error
    /// it is Blocked, and that is remembered and reported.
    fn enforce(&mut self, endpoint: u32) -> Result<(), Refused> {
        if !self.ports.contains_key(&endpoint) {
            return Ok(());
        }
        let number = self.state.endpoint(endpoint).and_then(|e| e.domain);
        let domain = number.and_then(|n| Some((n, self.state.domain(n)?)));
        let wanted = match domain {
            None => Ok(self.unattached()),
            Some((number, domain)) => self.translation_of(domain.mode, number, endpoint),
        };
        let outcome = match wanted {
            Ok(wanted) => self.apply(endpoint, wanted),
            // The old translation must not stay.
            Err(refused) => self.apply(endpoint, Translation::Blocked).and(Err(refused)),
        };
        if outcome.is_err() {
            if let Some(port) = self.ports.get_mut(&endpoint) {
                port.refused = true;
                self.faults.push_internal(port.rid);
            }
            self.drop_homes();
        }
        outcome
    }

    /// Puts [`unattached`](Self::unattached) in force for all endpoints without a domain.
    fn enforce_unattached(&mut self) {
        let loose = self.state.endpoints().filter(|(_, e)| e.domain.is_none());
        let loose: Vec<u32> = loose.map(|(id, _)| id).collect();
        for id in loose {
            // What is refused is reported as a fault.
            let _ = self.enforce(id);
        }
    }
}

/// Whether a back end is told of a mapping: not if it allows nothing.
fn told(mapping: &Mapping) -> bool {
    mapping.access.read || mapping.access.write
}

/// Takes back a MAP that was done.
fn undo(request: &Map) -> Unmap {
    Unmap {
        domain: request.domain,
        virt_start: request.virt_start,
        virt_end: request.virt_end,
    }
}
