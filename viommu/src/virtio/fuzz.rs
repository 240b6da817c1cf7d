//! Fuzz harnesses: plain functions over bytes that panic when an invariant breaks.

#![expect(clippy::unwrap_used, reason = "a fuzz harness reports by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::decode::{Attach, Detach, Map, Mode, Request, Unmap, decode};
use super::testing::{self, Recorder};
use super::{Chain, Config, Iommu, Reply};
use crate::backend::{Backend, Mapping, Translation};
use crate::reserved::{Kind, Regions, X86_MSI};
use crate::spec::virtio_iommu::Status;
use crate::{Gpa, Iova, Rid};

const PAGE: u64 = 0x1000;
/// The endpoints; the last is in a back end of its own.
const ENDPOINTS: [Rid; 4] = [
    Rid::new(0, 1, 0),
    Rid::new(0, 2, 0),
    Rid::new(0, 3, 0),
    Rid::new(1, 0, 0),
];
/// What the third endpoint cannot map, in pages.
const HOLE: (u64, u64) = (20, 23);

/// Two back ends and a unit in front.
struct Rig {
    unit: Iommu,
    near: Arc<Recorder>,
    far: Arc<Recorder>,
}

impl Rig {
    fn new() -> Self {
        let (near, far) = (Recorder::new(), Recorder::new());
        let config = Config::compose(&near.capabilities(), 0).unwrap();
        let rig = Self {
            unit: Iommu::new(Config {
                domain_range: (1, 5),
                domain_mappings: 24,
                mappings: 40,
                probe_size: 256,
                ..config
            }),
            near,
            far,
        };
        rig.unit.set_features(u64::MAX);
        ENDPOINTS.into_iter().for_each(|rid| rig.add(rid));
        rig
    }

    fn backend(&self, rid: Rid) -> &Arc<Recorder> {
        if rid == ENDPOINTS[3] {
            &self.far
        } else {
            &self.near
        }
    }

    /// A refusal on demand is no failure of the harness.
    fn add(&self, rid: Rid) {
        let backend: Arc<dyn Backend> = self.backend(rid).clone();
        let _ = self.unit.add_endpoint(rid, backend, reserved(rid));
    }

    fn refusals(&self) -> usize {
        self.near.book().refused + self.far.book().refused
    }

    /// Nothing is left behind, and the back ends were used as the waist says.
    fn finish(self) {
        let (near, far) = (self.near.clone(), self.far.clone());
        drop(self);
        for backend in [near, far] {
            assert_eq!(backend.objects(), crate::backend::Objects::default());
            assert_eq!(backend.book().complaints, [""; 0]);
        }
    }
}

fn reserved(rid: Rid) -> Regions {
    let mut reserved = Regions::new();
    if rid == ENDPOINTS[2] {
        reserved.insert(HOLE.0 * PAGE, HOLE.1 * PAGE + PAGE - 1, Kind::Reserved);
    }
    reserved.insert(X86_MSI.first, X86_MSI.last, X86_MSI.kind);
    reserved
}

/// Chains of arbitrary bytes. Each is one byte of readable length, two of writable length, and
/// the bytes. Whatever is refused changes nothing, and a reply fits where it goes.
///
/// # Panics
/// When an invariant does not hold.
pub fn chains(data: &[u8]) {
    let rig = Rig::new();
    // Something to break.
    for (endpoint, domain) in [(0, 1), (3, 1), (1, 2)] {
        let request = testing::attach(ENDPOINTS[endpoint].0.into(), domain, 0);
        rig.unit.process(&request, 4);
    }
    rig.unit.process(&testing::map(1, (0, PAGE - 1), 0, 3), 4);
    let mut rest = data;
    while let [length, low, high, tail @ ..] = rest {
        let (readable, behind) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = behind;
        let writable = usize::from(u16::from_le_bytes([*low, *high]));
        let before = state(&rig);
        let reply = rig.unit.process(readable, writable);
        assert!(reply.bytes().len() <= writable);
        match reply.status() {
            Some(0) => assert!(decode(readable, u64::MAX).is_ok()),
            Some(code) => {
                assert!(code <= Status::NoMem as u8);
                assert_eq!(state(&rig), before, "a refused request changed something");
            }
            None => {
                assert_eq!(reply, Reply::Nothing);
                assert_eq!(
                    state(&rig),
                    before,
                    "an unanswered request changed something"
                );
            }
        }
    }
    rig.finish();
}

/// Everything that requests can change.
fn state(rig: &Rig) -> impl PartialEq + std::fmt::Debug + use<> {
    let mut snapshot = rig.unit.snapshot();
    snapshot.counters = super::Counters::default();
    let books = [&rig.near, &rig.far].map(|backend| {
        let book = backend.book();
        (book.in_force.clone(), book.domains.clone())
    });
    (snapshot, books)
}

/// Operations that are picked by bytes: requests one by one and in batches, resets, plugging,
/// `bypass`, and back ends that refuse. After every batch the back ends have what a simple
/// reference model has, and every status is the model's.
///
/// # Panics
/// When an invariant does not hold.
pub fn operations(data: &[u8]) {
    let rig = Rig::new();
    let mut model = Model::default();
    // Domains that live long enough to get mappings.
    let mut batch: Vec<_> = [1, 2, 1, 2]
        .iter()
        .zip(ENDPOINTS)
        .map(|(&domain, rid)| testing::attach(rid.0.into(), domain, 0))
        .collect();
    let mut bytes = Bytes(data);
    while let Some(operation) = bytes.next() {
        let request = match operation {
            0..150 => {
                let (first, last) = bytes.range();
                let phys = bytes.take() * PAGE;
                let flags = (bytes.take() as u32 % 57) % 8 + 8 * u32::from(operation == 1);
                let odd = u64::from(operation == 0);
                testing::map(bytes.domain(), (first + odd, last), phys, flags)
            }
            150..208 => {
                let (first, last) = bytes.range();
                testing::unmap(bytes.domain(), first, last)
            }
            208..216 => {
                let flags = u32::from(operation == 208);
                testing::attach(bytes.endpoint(), bytes.domain(), flags)
            }
            216..219 => testing::detach(bytes.endpoint(), bytes.domain()),
            219..222 => testing::probe(bytes.endpoint()),
            other => {
                run(&rig, &mut model, &mut batch);
                change(&rig, &mut model, other, &mut bytes);
                check(&rig, &model);
                continue;
            }
        };
        batch.push(request);
        if batch.len() == 64 || operation % 4 == 0 {
            run(&rig, &mut model, &mut batch);
        }
    }
    run(&rig, &mut model, &mut batch);
    rig.finish();
}

/// Everything that is not a request.
fn change(rig: &Rig, model: &mut Model, operation: u8, bytes: &mut Bytes<'_>) {
    let (near, far) = (&rig.near, &rig.far);
    match operation {
        222..226 => {
            let value = bytes.take() as u8 % 3;
            rig.unit.write_config(36, &[value]);
            if value < 2 {
                model.bypass = value == 1;
            }
        }
        226 => {
            rig.unit.reset();
            rig.unit.set_features(u64::MAX);
            model.domains.clear();
            model.departed.clear();
        }
        227..232 => {
            let rid = ENDPOINTS[bytes.take() as usize % 4];
            let id = u32::from(rid.0);
            if model.gone.contains(&id) {
                rig.add(rid);
                if rig.backend(rid).book().claimed.contains_key(&rid) {
                    model.gone.remove(&id);
                    model.departed.remove(&id);
                    model.leave(id);
                }
            } else {
                rig.unit.remove_endpoint(rid);
                model.gone.insert(id);
                if model.domain_of(id).is_some() {
                    model.departed.insert(id);
                }
            }
        }
        232..246 => {
            let (bits, backend) = (
                bytes.take(),
                if operation.is_multiple_of(3) {
                    far
                } else {
                    near
                },
            );
            backend.book().refuse = (0..8).map(|bit| bits >> bit & 1 != 0).collect();
        }
        _ => {
            near.book().refuse.clear();
            far.book().refuse.clear();
        }
    }
}

/// Sends a batch and compares the statuses.
fn run(rig: &Rig, model: &mut Model, batch: &mut Vec<Vec<u8>>) {
    let before = rig.refusals();
    let mut replies = Vec::new();
    let chains = batch.iter().map(|readable| Chain {
        readable,
        writable: 4,
    });
    rig.unit.serve(chains, &mut replies);
    assert_eq!(replies.len(), batch.len());
    let refused = rig.refusals() > before;
    for (request, reply) in batch.drain(..).zip(&replies) {
        let status = reply.status().unwrap();
        let request = match decode(&request, u64::MAX) {
            Ok(request) => request,
            Err(malformed) => {
                assert_eq!(Some(status), malformed.status().map(|s| s as u8));
                continue;
            }
        };
        // A refusal by a back end, which the model cannot foresee, changes nothing.
        let may_refuse = matches!(request, Request::Map(_) | Request::Attach(_));
        if refused && may_refuse && status == Status::NoMem as u8 {
            continue;
        }
        let expected = model.step(&request);
        assert_eq!(
            status, expected as u8,
            "{request:x?}, the model says {expected:?}"
        );
    }
    check(rig, model);
}

/// Compares what is in force with the model.
fn check(rig: &Rig, model: &Model) {
    let snapshot = rig.unit.snapshot();
    let mut homes = BTreeSet::new();
    for endpoint in &snapshot.endpoints {
        let rid = endpoint.endpoint;
        let id = u32::from(rid.0);
        let domain = model.domain_of(id);
        assert_eq!(endpoint.domain, domain, "{rid}");
        assert_eq!(endpoint.departed, model.departed.contains(&id), "{rid}");
        if endpoint.departed {
            continue;
        }
        let in_force = rig.backend(rid).translation_of(rid);
        if endpoint.refused {
            assert!(rig.refusals() > 0);
            assert_eq!(in_force, Translation::Blocked, "{rid} was refused");
            continue;
        }
        match domain.map(|number| (number, &model.domains[&number])) {
            None if model.bypass => assert_eq!(in_force, Translation::Identity, "{rid}"),
            None => assert_eq!(in_force, Translation::Blocked, "{rid}"),
            Some((_, domain)) if domain.mode == Mode::Bypass => {
                assert_eq!(in_force, Translation::Identity)
            }
            Some((number, domain)) => {
                homes.insert((number, rid == ENDPOINTS[3]));
                let told = domain
                    .mappings
                    .values()
                    .filter(|m| m.access != Default::default());
                let told: Vec<Mapping> = told.copied().collect();
                assert_eq!(rig.backend(rid).mappings_of(rid), Some(told), "{rid}");
            }
        }
    }
    assert_eq!(snapshot.domains.len(), model.domains.len());
    for domain in &snapshot.domains {
        let expected = &model.domains[&domain.domain].mappings;
        assert_eq!(domain.mappings, expected.len());
        let bytes = expected.values().map(|m| m.length).sum::<u64>();
        assert_eq!(domain.mapped_bytes, bytes);
    }
    let there = rig.near.objects().domains + rig.far.objects().domains;
    assert_eq!(there, homes.len(), "domains in back ends");
}

/// The device section as plainly as it can be written, without any regard to cost.
#[derive(Default)]
struct Model {
    bypass: bool,
    /// Endpoints that are not there.
    gone: BTreeSet<u32>,
    /// Those of them that the guest has not detached.
    departed: BTreeSet<u32>,
    domains: BTreeMap<u32, ModelDomain>,
}

#[derive(Default)]
struct ModelDomain {
    mode: Mode,
    endpoints: BTreeSet<u32>,
    mappings: BTreeMap<u64, Mapping>,
}

fn last(mapping: &Mapping) -> u64 {
    mapping.iova.0 + mapping.length - 1
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

impl Model {
    fn domain_of(&self, endpoint: u32) -> Option<u32> {
        let mut domains = self.domains.iter();
        domains
            .find(|(_, d)| d.endpoints.contains(&endpoint))
            .map(|(&number, _)| number)
    }

    fn leave(&mut self, endpoint: u32) {
        for domain in self.domains.values_mut() {
            domain.endpoints.remove(&endpoint);
        }
        self.domains
            .retain(|_, domain| !domain.endpoints.is_empty());
    }

    fn exists(&self, endpoint: u32) -> bool {
        ENDPOINTS.iter().any(|rid| u32::from(rid.0) == endpoint) && !self.gone.contains(&endpoint)
    }

    fn step(&mut self, request: &Request) -> Status {
        match request {
            Request::Attach(request) => self.attach(request),
            Request::Detach(request) => self.detach(request),
            Request::Map(request) => self.map(request),
            Request::Unmap(request) => self.unmap(request),
            // There is no room for properties.
            Request::Probe { .. } => Status::Inval,
            Request::Invalidate(_) => Status::Inval,
        }
    }

    fn attach(&mut self, request: &Attach) -> Status {
        if !self.exists(request.endpoint) {
            return Status::NoEnt;
        }
        if !(1..=5).contains(&request.domain) {
            return Status::Range;
        }
        if let Some(domain) = self.domains.get(&request.domain) {
            if domain.mode != request.mode {
                return Status::Inval;
            }
            let hole = (HOLE.0 * PAGE, HOLE.1 * PAGE + PAGE - 1);
            let mut mappings = domain.mappings.values();
            if request.endpoint == u32::from(ENDPOINTS[2].0)
                && !domain.endpoints.contains(&request.endpoint)
                && mappings.any(|m| overlap((m.iova.0, last(m)), hole))
            {
                return Status::Unsupp;
            }
        }
        if self.domain_of(request.endpoint) != Some(request.domain) {
            self.leave(request.endpoint);
        }
        let domain = self.domains.entry(request.domain).or_default();
        domain.mode = request.mode;
        domain.endpoints.insert(request.endpoint);
        Status::Ok
    }

    fn detach(&mut self, request: &Detach) -> Status {
        if !self.exists(request.endpoint) && !self.departed.contains(&request.endpoint) {
            return Status::NoEnt;
        }
        if self.domain_of(request.endpoint) != Some(request.domain) {
            return Status::Inval;
        }
        self.leave(request.endpoint);
        self.departed.remove(&request.endpoint);
        Status::Ok
    }

    fn map(&mut self, request: &Map) -> Status {
        let all = self
            .domains
            .values()
            .map(|d| d.mappings.len())
            .sum::<usize>();
        let Some(domain) = self.domains.get_mut(&request.domain) else {
            return Status::NoEnt;
        };
        let range = (request.virt_start, request.virt_end);
        let aligned = |n: u64| n.is_multiple_of(PAGE);
        let mut endpoints = domain.endpoints.iter();
        let holed = endpoints.any(|&id| id == u32::from(ENDPOINTS[2].0));
        let reserved = reserved(ENDPOINTS[if holed { 2 } else { 0 }]);
        if domain.mode != Mode::Mapped {
            Status::Inval
        } else if !aligned(range.0)
            || !aligned(range.1.wrapping_add(1))
            || !aligned(request.phys_start)
        {
            Status::Range
        } else if range.1 < range.0 {
            Status::Inval
        } else if range.1 >= 1 << 48
            || u128::from(request.phys_start) + u128::from(range.1 - range.0) >= 1 << 52
        {
            Status::Range
        } else if reserved.iter().any(|r| overlap((r.first, r.last), range))
            || domain
                .mappings
                .values()
                .any(|m| overlap((m.iova.0, last(m)), range))
        {
            Status::Inval
        } else if domain.mappings.len() >= 24 || all >= 40 {
            Status::NoMem
        } else {
            let mapping = Mapping {
                iova: Iova(range.0),
                gpa: Gpa(request.phys_start),
                length: range.1 - range.0 + 1,
                access: request.access,
                mmio: request.mmio,
            };
            domain.mappings.insert(range.0, mapping);
            Status::Ok
        }
    }

    fn unmap(&mut self, request: &Unmap) -> Status {
        let Some(domain) = self.domains.get_mut(&request.domain) else {
            return Status::NoEnt;
        };
        let range = (request.virt_start, request.virt_end);
        if domain.mode != Mode::Mapped || range.1 < range.0 {
            return Status::Inval;
        }
        let hit = |m: &Mapping| overlap((m.iova.0, last(m)), range);
        let covered = |m: &Mapping| range.0 <= m.iova.0 && last(m) <= range.1;
        if domain.mappings.values().any(|m| hit(m) && !covered(m)) {
            return Status::Range;
        }
        domain.mappings.retain(|_, m| !hit(m));
        Status::Ok
    }
}

/// Picks values that meet each other often.
struct Bytes<'b>(&'b [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn take(&mut self) -> u64 {
        self.next().unwrap_or_default().into()
    }

    /// Mostly 1 and 2, of the valid 1 to 5; sometimes out of range.
    fn domain(&mut self) -> u32 {
        match self.take() {
            n @ 0..200 => n as u32 % 2 + 1,
            n @ 200..240 => n as u32 % 3 + 1,
            n @ 240..250 => n as u32 - 240,
            _ => u32::MAX,
        }
    }

    fn endpoint(&mut self) -> u32 {
        match self.take() {
            n @ 0..250 => ENDPOINTS[n as usize % 4].0.into(),
            n => n as u32 * 0x0101_0101,
        }
    }

    /// Pages at the bottom of the address space, and around the MSI window; sometimes all.
    fn range(&mut self) -> (u64, u64) {
        let (at, more) = (self.take(), self.take());
        let page = match at {
            0..200 => at % 56,
            200..240 => 0xfedfc + at % 8,
            240..254 => (1 << 36) - 6 + at % 8,
            _ => return (at % 3 * PAGE, u64::MAX - at % 2),
        };
        let pages = if more < 230 { more % 3 } else { more % 60 };
        let short = u64::from(more == 255);
        (page * PAGE, (page + pages) * PAGE + PAGE - 1 - short)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Requests that are almost right.
    fn chain() -> impl Strategy<Value = Vec<u8>> {
        let endpoint = prop::sample::select(ENDPOINTS.map(|rid| u32::from(rid.0)).to_vec());
        let request = prop_oneof![
            (endpoint.clone(), 0u32..4, 0u32..3).prop_map(|(e, d, f)| testing::attach(e, d, f)),
            (endpoint.clone(), 0u32..4).prop_map(|(e, d)| testing::detach(e, d)),
            (0u32..4, 0u64..8, 0u64..4, 0u32..9).prop_map(|(d, f, n, x)| testing::map(
                d,
                (f * PAGE, (f + n) * PAGE + PAGE - 1),
                0,
                x
            )),
            (0u32..4, 0u64..8, 0u64..4).prop_map(|(d, f, n)| testing::unmap(
                d,
                f * PAGE,
                (f + n) * PAGE + PAGE - 1
            )),
            endpoint.prop_map(testing::probe),
            prop::collection::vec(any::<u8>(), 0..80),
        ];
        let spoil = prop::option::weighted(0.2, (any::<prop::sample::Index>(), any::<u8>()));
        let cut = prop::option::weighted(0.1, any::<prop::sample::Index>());
        let writable =
            prop_oneof![4 => Just(4u16), 2 => 250u16..270, 1 => any::<u16>(), 1 => 0u16..8];
        (request, spoil, cut, writable).prop_map(|(mut request, spoil, cut, writable)| {
            if let (Some((at, with)), false) = (spoil, request.is_empty()) {
                let at = at.index(request.len());
                request[at] = with;
            }
            if let Some(cut) = cut {
                request.truncate(cut.index(request.len() + 1));
            }
            let head = [request.len() as u8, writable as u8, (writable >> 8) as u8];
            [&head[..], &request].concat()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn after_any_operations_the_back_ends_have_what_the_model_has(
            data in prop::collection::vec(any::<u8>(), 0..2000),
        ) {
            operations(&data);
        }

        #[test]
        fn any_chain_is_answered_within_its_buffer_and_a_refused_one_changes_nothing(
            data in prop::collection::vec(chain(), 0..60),
        ) {
            chains(&data.concat());
        }

        #[test]
        fn any_bytes_are_answered_within_their_buffers(
            data in prop::collection::vec(any::<u8>(), 0..500),
        ) {
            chains(&data);
        }
    }
}
