//! The conformance suite that any back end must pass: the promises of [the waist](super), one
//! check each, its name the promise.
//!
//! A back end's tests implement [`Harness`] and call [`run`]. What a back end can only show by
//! its state is checked by [`Backend::translation`] and [`Backend::objects`]; where the harness
//! can do real DMA ([`Harness::dma`]) the same promises are checked by what passes.
//!
//! Built for tests and with the feature `conformance`. A broken promise panics.

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a suite of checks reports by panicking"
)]

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{
    Access, Backend, EventSink, Fault, FaultCause, Invalidation, InvalidationRange, Mapping,
    Objects, PageRequest, PageResponse, Refused, ResponseCode, Scope, Translation,
};
use crate::{DomainId, Gpa, Iova, Pasid, Rid, Target};

/// How long a call is watched that must not return yet. A correct back end passes whatever this
/// is; a wrong one is more likely to be caught the longer it is.
const WATCHED: Duration = Duration::from_millis(30);

/// A back end to be checked, with what it needs around it. Each check gets a fresh one.
pub trait Harness {
    /// The back end.
    fn backend(&self) -> &(dyn Backend + 'static);

    /// Two endpoints that the back end has and nobody has claimed.
    fn endpoints(&self) -> [Rid; 2];

    /// PASIDs that both endpoints can send; may be empty.
    fn pasids(&self) -> Vec<Pasid>;

    /// Different translations that the back end must accept for a target with or without PASID,
    /// at least one, without Blocked and domains. They stay valid as long as the harness.
    fn translations(&self) -> Vec<Translation>;

    /// Translations that it must refuse, without unknown domains.
    fn refused(&self) -> Vec<Translation>;

    /// At least four mappings of one length for one domain, ascending, with gaps, each allowing
    /// reads and writes.
    fn mappings(&self) -> Vec<Mapping>;

    /// Makes the next host call that puts a translation in force fail. `false`: cannot be done.
    fn fail_next_apply(&self) -> bool {
        false
    }

    /// Makes the endpoint ask for a page: one group of one request. `false`: cannot be done.
    fn request_page(&self, _target: Target, _group: u16) -> bool {
        false
    }

    /// Responses that the endpoint got so far. `None`: cannot be seen.
    fn page_responses(&self) -> Option<Vec<PageResponse>> {
        None
    }

    /// Real DMA of the endpoints, when there is a way.
    fn dma(&self) -> Option<&dyn Dma> {
        None
    }
}

/// DMA of the harness's endpoints.
pub trait Dma {
    /// Reads or writes one byte; whether it passed.
    fn access(&self, target: Target, iova: Iova, access: Access) -> bool;

    /// Begins an access to one byte that stays in flight until the result is dropped. The access
    /// must pass.
    fn hold(&self, target: Target, iova: Iova) -> Box<dyn Send>;

    /// Reads a byte of guest memory.
    fn memory(&self, gpa: Gpa) -> u8;

    /// Writes a byte of guest memory.
    fn set_memory(&self, gpa: Gpa, value: u8);

    /// The byte that a read gets, if it passes.
    fn read(&self, target: Target, iova: Iova) -> Option<u8>;
}

/// Runs every check, each on a harness of its own.
///
/// # Panics
/// At the first promise that is not kept. The name of the check is printed before it runs.
pub fn run(new: impl Fn() -> Box<dyn Harness>) {
    for (name, check) in CHECKS {
        eprintln!("conformance: {name}");
        check(&*new());
    }
}

/// One promise.
type Check = fn(&dyn Harness);

/// Every check with its name.
pub const CHECKS: &[(&str, Check)] = &[
    (
        "a claimed endpoint is blocked until something is applied",
        blocked_at_first,
    ),
    (
        "an endpoint has one front end, and another after its release",
        one_claim,
    ),
    (
        "an endpoint that is not claimed gets nothing",
        unclaimed_is_refused,
    ),
    ("what is applied is in force", applied_is_in_force),
    (
        "applying what is in force does nothing",
        applying_again_is_no_op,
    ),
    (
        "a refused translation leaves the target blocked",
        refused_is_blocked,
    ),
    (
        "a failure of the host leaves the target blocked, and asking again succeeds",
        failed_is_blocked,
    ),
    (
        "equal translations are one object",
        equal_translations_are_shared,
    ),
    (
        "requests with and without PASID stay apart",
        pasids_stay_apart,
    ),
    ("a release leaves nothing behind", release_leaves_nothing),
    (
        "releasing what is not there is no error",
        release_of_nothing,
    ),
    (
        "an invalidation of existing and of unknown targets takes effect in full",
        invalidations_take_effect,
    ),
    (
        "a domain that does not exist is refused everywhere",
        unknown_domains,
    ),
    ("mappings are counted and removed", mappings_are_counted),
    ("a map is all or nothing", map_is_atomic),
    (
        "an unmap removes what lies inside and nothing that reaches out",
        unmap_is_exact,
    ),
    (
        "destroying a domain blocks its targets",
        destroyed_domain_blocks,
    ),
    (
        "capabilities do not change and compose with themselves",
        capabilities_are_stable,
    ),
    ("a response to nothing is ignored", response_to_nothing),
    (
        "a page request group has one response",
        one_response_per_group,
    ),
    (
        "what is open at a release is answered invalid",
        release_answers_requests,
    ),
    (
        "no DMA passes a blocked target, and each attempt is a fault",
        blocked_dma_faults,
    ),
    (
        "a domain's mappings carry DMA, by their access, whenever they were made",
        mappings_carry_dma,
    ),
    (
        "DMA under what is removed has ended when the call returns",
        removal_drains,
    ),
    (
        "an unmap does not wait for DMA elsewhere",
        unmap_waits_for_nothing_else,
    ),
];

/// What a front end hears.
#[derive(Default)]
struct Heard {
    faults: Mutex<Vec<Fault>>,
    requests: Mutex<Vec<PageRequest>>,
}

impl Heard {
    fn faults(&self) -> Vec<Fault> {
        std::mem::take(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn requests(&self) -> Vec<PageRequest> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut requests)
    }
}

impl EventSink for Heard {
    fn fault(&self, fault: Fault) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.push(fault);
    }

    fn page_request(&self, request: PageRequest) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.push(request);
    }
}

fn claim(harness: &dyn Harness, endpoint: Rid) -> Arc<Heard> {
    let heard = Arc::new(Heard::default());
    let claimed = harness.backend().claim(endpoint, heard.clone());
    claimed.expect("an endpoint that nobody claimed can be claimed");
    heard
}

/// The targets of `endpoint`: without PASID, and with each PASID there is.
fn targets(harness: &dyn Harness, endpoint: Rid) -> Vec<Target> {
    let pasids = harness.pasids();
    let with = pasids.iter().map(|&p| Target::pasid(endpoint, p));
    std::iter::once(Target::rid(endpoint)).chain(with).collect()
}

/// A domain with `mappings`.
fn domain_of(backend: &dyn Backend, mappings: &[Mapping]) -> DomainId {
    let domain = backend.create_domain().expect("there is room for a domain");
    backend
        .map(domain, mappings)
        .expect("the mappings are good");
    domain
}

/// Everything that a target can be given: the harness's tables, and a new domain.
fn all_translations(harness: &dyn Harness) -> Vec<Translation> {
    let mut all = harness.translations();
    let domain = domain_of(harness.backend(), &harness.mappings()[..1]);
    all.push(Translation::Domain(domain));
    all
}

fn blocked_at_first(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    claim(harness, endpoint);
    for target in targets(harness, endpoint) {
        assert_eq!(harness.backend().translation(target), Translation::Blocked);
    }
    let objects = harness.backend().objects();
    assert_eq!((objects.endpoints, objects.targets), (1, 0));
}

fn one_claim(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let again = backend.claim(endpoint, Arc::new(Heard::default()));
    assert!(matches!(again, Err(Refused::Claimed(rid)) if rid == endpoint));
    claim(harness, other);
    backend.release(endpoint);
    claim(harness, endpoint);
    let unknown = (0..=u16::MAX)
        .map(Rid)
        .find(|rid| ![endpoint, other].contains(rid));
    let unknown = unknown.expect("65536 is more than two");
    let refused = backend.claim(unknown, Arc::new(Heard::default()));
    assert!(matches!(refused, Err(Refused::NoEndpoint(rid)) if rid == unknown));
}

fn unclaimed_is_refused(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, other);
    for translation in all_translations(harness) {
        for target in targets(harness, endpoint) {
            let refused = backend.apply(target, translation);
            assert!(matches!(refused, Err(Refused::NoEndpoint(rid)) if rid == endpoint));
            assert_eq!(backend.translation(target), Translation::Blocked);
        }
    }
}

fn applied_is_in_force(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let all = all_translations(harness);
    for target in targets(harness, endpoint) {
        // Every change from one to another, and from and to Blocked.
        for &from in &all {
            for &to in all.iter().chain([&Translation::Blocked]) {
                backend.apply(target, from).expect("is accepted");
                assert_eq!(backend.translation(target), from);
                backend.apply(target, to).expect("is accepted");
                assert_eq!(backend.translation(target), to);
            }
        }
        backend
            .apply(target, Translation::Blocked)
            .expect("is accepted");
    }
    assert_eq!(backend.objects().targets, 0);
}

fn applying_again_is_no_op(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    for translation in all_translations(harness) {
        for target in targets(harness, endpoint) {
            backend.apply(target, translation).expect("is accepted");
            let objects = backend.objects();
            backend
                .apply(target, translation)
                .expect("is accepted again");
            assert_eq!(backend.objects(), objects);
            assert_eq!(backend.translation(target), translation);
        }
    }
}

fn refused_is_blocked(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    for before in all_translations(harness) {
        for bad in harness.refused() {
            for target in targets(harness, endpoint) {
                backend.apply(target, before).expect("is accepted");
                backend.apply(target, bad).expect_err("is refused");
                assert_eq!(backend.translation(target), Translation::Blocked);
                backend.apply(target, before).expect("is accepted again");
                assert_eq!(backend.translation(target), before);
                backend
                    .apply(target, Translation::Blocked)
                    .expect("is accepted");
            }
        }
    }
    assert_eq!(backend.objects().targets, 0);
    assert_eq!(backend.objects().translations, 0);
}

fn failed_is_blocked(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let all = all_translations(harness);
    for target in targets(harness, endpoint) {
        for &before in &all {
            for &after in all.iter().filter(|&&after| after != before) {
                backend.apply(target, before).expect("is accepted");
                if !harness.fail_next_apply() {
                    return;
                }
                backend.apply(target, after).expect_err("the host fails");
                assert_eq!(backend.translation(target), Translation::Blocked);
                backend
                    .apply(target, after)
                    .expect("the host does not fail again");
                assert_eq!(backend.translation(target), after);
            }
        }
    }
}

fn equal_translations_are_shared(harness: &dyn Harness) {
    let endpoints = harness.endpoints();
    let backend = harness.backend();
    for endpoint in endpoints {
        claim(harness, endpoint);
    }
    let all: Vec<_> = endpoints
        .iter()
        .flat_map(|&e| targets(harness, e))
        .collect();
    for translation in harness.translations() {
        backend.apply(all[0], translation).expect("is accepted");
        let one = backend.objects().translations;
        for &target in &all[1..] {
            backend.apply(target, translation).expect("is accepted");
        }
        let objects = backend.objects();
        assert_eq!(objects.targets, all.len());
        assert_eq!(objects.translations, one, "{translation:?} is shared");
        // The last user takes it along, nobody before.
        for (gone, &target) in all.iter().enumerate() {
            assert_eq!(backend.translation(target), translation);
            assert_eq!(backend.objects().translations, one, "{gone} are gone");
            backend
                .apply(target, Translation::Blocked)
                .expect("is accepted");
        }
        assert_eq!(backend.objects().translations, 0);
    }
}

fn pasids_stay_apart(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    claim(harness, other);
    let all = all_translations(harness);
    for &chosen in &targets(harness, endpoint) {
        backend.apply(chosen, all[0]).expect("is accepted");
        for rid in [endpoint, other] {
            for target in targets(harness, rid) {
                let expected = if target == chosen {
                    all[0]
                } else {
                    Translation::Blocked
                };
                assert_eq!(backend.translation(target), expected);
            }
        }
        backend
            .apply(chosen, Translation::Blocked)
            .expect("is accepted");
    }
}

fn release_leaves_nothing(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    let all = all_translations(harness);
    claim(harness, other);
    backend
        .apply(Target::rid(other), all[0])
        .expect("is accepted");
    let before = backend.objects();
    for round in 0..3 {
        claim(harness, endpoint);
        for (target, &translation) in targets(harness, endpoint).iter().zip(all.iter().cycle()) {
            backend.apply(*target, translation).expect("is accepted");
        }
        backend.release(endpoint);
        for target in targets(harness, endpoint) {
            assert_eq!(backend.translation(target), Translation::Blocked);
        }
        assert_eq!(backend.objects(), before, "round {round}");
    }
    assert_eq!(backend.translation(Target::rid(other)), all[0]);
    backend.release(other);
    for translation in all {
        if let Translation::Domain(domain) = translation {
            backend.destroy_domain(domain);
        }
    }
    assert_eq!(backend.objects(), Objects::default());
}

fn release_of_nothing(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    backend.release(endpoint);
    claim(harness, endpoint);
    backend.release(endpoint);
    backend.release(endpoint);
    backend.destroy_domain(DomainId(u32::MAX));
    assert_eq!(backend.objects(), Objects::default());
}

fn invalidations_take_effect(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let pages = |first, count, leaf| InvalidationRange::Pages {
        first: Iova(first),
        count,
        leaf,
    };
    let ranges = [
        InvalidationRange::All,
        pages(0, 1, true),
        pages(0x1000, 512, false),
        pages(0, u64::MAX, false),
        pages(!0xfff, u64::MAX, true),
        pages(0x7fff_ffff_f000, 1 << 52, true),
    ];
    let mut scopes = vec![
        Scope::All,
        Scope::Endpoint(endpoint),
        Scope::Endpoint(other),
    ];
    for rid in [endpoint, other] {
        scopes.extend(targets(harness, rid).into_iter().map(Scope::Target));
    }
    let all: Vec<_> = scopes
        .iter()
        .flat_map(|&scope| ranges.map(|range| Invalidation { scope, range }))
        .collect();
    assert_eq!(backend.invalidate(&[]), 0);
    for translation in all_translations(harness) {
        for target in targets(harness, endpoint) {
            backend.apply(target, translation).expect("is accepted");
        }
        assert_eq!(backend.invalidate(&all), all.len());
        for target in targets(harness, endpoint) {
            assert_eq!(backend.translation(target), translation);
        }
    }
}

fn unknown_domains(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let target = Target::rid(endpoint);
    let first = harness.mappings()[0];
    let gone = backend.create_domain().expect("there is room");
    backend.destroy_domain(gone);
    for unknown in [gone, DomainId(u32::MAX)] {
        backend
            .apply(target, all_translations(harness)[0])
            .expect("is accepted");
        let refused = backend.apply(target, Translation::Domain(unknown));
        assert!(matches!(refused, Err(Refused::NoDomain(id)) if id == unknown));
        assert_eq!(backend.translation(target), Translation::Blocked);
        let refused = backend.map(unknown, &[first]);
        assert!(matches!(refused, Err(Refused::NoDomain(id)) if id == unknown));
        let refused = backend.unmap(unknown, Iova(0), Iova(u64::MAX));
        assert!(matches!(refused, Err(Refused::NoDomain(id)) if id == unknown));
    }
}

fn mappings_are_counted(harness: &dyn Harness) {
    let backend = harness.backend();
    let mappings = harness.mappings();
    let length = mappings[0].length;
    for attached in [false, true] {
        let domain = backend.create_domain().expect("there is room");
        if attached {
            let [endpoint, _] = harness.endpoints();
            claim(harness, endpoint);
            let target = Target::rid(endpoint);
            let applied = backend.apply(target, Translation::Domain(domain));
            applied.expect("is accepted");
        }
        assert_eq!(backend.objects().domains, 1);
        backend.map(domain, &[]).expect("nothing is always mapped");
        backend
            .map(domain, &mappings)
            .expect("the mappings are good");
        assert_eq!(backend.objects().mappings, mappings.len());
        let Mapping { iova, .. } = mappings[1];
        let one = backend.unmap(domain, iova, Iova(iova.0 + length - 1));
        assert_eq!(one.expect("the domain exists"), length);
        let again = backend.unmap(domain, iova, Iova(iova.0 + length - 1));
        assert_eq!(again.expect("the domain exists"), 0);
        assert_eq!(backend.objects().mappings, mappings.len() - 1);
        backend
            .map(domain, &mappings[1..2])
            .expect("it is free again");
        let all = backend.unmap(domain, Iova(0), Iova(u64::MAX));
        assert_eq!(
            all.expect("the domain exists"),
            length * mappings.len() as u64
        );
        assert_eq!(backend.objects().mappings, 0);
        backend.destroy_domain(domain);
        assert_eq!(backend.objects().domains, 0);
    }
}

fn map_is_atomic(harness: &dyn Harness) {
    let backend = harness.backend();
    let mappings = harness.mappings();
    let domain = domain_of(backend, &mappings[2..3]);
    let refused = backend.map(domain, &mappings);
    assert!(matches!(refused, Err(Refused::Overlap { iova, .. }) if iova == mappings[2].iova));
    assert_eq!(backend.objects().mappings, 1, "none of them was kept");
    let twice = [mappings[0], mappings[0]];
    let refused = backend.map(domain, &twice);
    assert!(matches!(refused, Err(Refused::Overlap { .. })));
    assert_eq!(backend.objects().mappings, 1);
    backend.map(domain, &mappings[..2]).expect("these are free");
    assert_eq!(backend.objects().mappings, 3);
}

fn unmap_is_exact(harness: &dyn Harness) {
    let backend = harness.backend();
    let mappings = harness.mappings();
    let domain = domain_of(backend, &mappings);
    let length = mappings[0].length;
    let unmap = |first: u64, last: u64| {
        let bytes = backend.unmap(domain, Iova(first), Iova(last));
        bytes.expect("the domain exists")
    };
    let (first, last) = (mappings[0].iova.0, mappings[0].iova.0 + length - 1);
    assert_eq!(unmap(first, last - 1), 0);
    assert_eq!(unmap(first + 1, last), 0);
    assert_eq!(unmap(last, first), 0, "an empty range");
    assert_eq!(backend.objects().mappings, mappings.len());
    // From inside the first to inside the last: what is between goes.
    let inner = mappings.len() as u64 - 2;
    let end = mappings[mappings.len() - 1].iova.0;
    assert_eq!(unmap(first + 1, end), inner * length);
    assert_eq!(backend.objects().mappings, 2);
    let rest = backend.map(domain, &mappings[1..mappings.len() - 1]);
    rest.expect("what was removed is free");
}

fn destroyed_domain_blocks(harness: &dyn Harness) {
    let endpoints = harness.endpoints();
    let backend = harness.backend();
    let domain = domain_of(backend, &harness.mappings());
    let all: Vec<_> = endpoints
        .iter()
        .flat_map(|&e| targets(harness, e))
        .collect();
    for endpoint in endpoints {
        claim(harness, endpoint);
    }
    for &target in &all {
        let applied = backend.apply(target, Translation::Domain(domain));
        applied.expect("is accepted");
    }
    backend.destroy_domain(domain);
    for target in all {
        assert_eq!(backend.translation(target), Translation::Blocked);
    }
    let objects = backend.objects();
    assert_eq!(
        (objects.domains, objects.mappings, objects.targets),
        (0, 0, 0)
    );
}

fn capabilities_are_stable(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    let capabilities = backend.capabilities();
    assert_eq!(capabilities.and(capabilities), capabilities);
    claim(harness, endpoint);
    backend
        .apply(Target::rid(endpoint), all_translations(harness)[0])
        .expect("is accepted");
    assert_eq!(backend.capabilities(), capabilities);
    assert_ne!(capabilities.page_sizes, 0);
}

fn response_to_nothing(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    claim(harness, endpoint);
    for rid in [endpoint, other] {
        for target in targets(harness, rid) {
            for code in [
                ResponseCode::Success,
                ResponseCode::Invalid,
                ResponseCode::Failure,
            ] {
                harness.backend().respond(PageResponse {
                    target,
                    group: 511,
                    code,
                });
            }
        }
    }
    assert!(harness.page_responses().unwrap_or_default().is_empty());
}

/// Claims an endpoint, puts a table in force for every target and lets `target` ask for a page.
/// `None`: this harness cannot.
fn with_request(harness: &dyn Harness, group: u16) -> Option<(Target, Arc<Heard>)> {
    let [endpoint, _] = harness.endpoints();
    let heard = claim(harness, endpoint);
    let translation = harness.translations()[0];
    for target in targets(harness, endpoint) {
        harness
            .backend()
            .apply(target, translation)
            .expect("is accepted");
    }
    let target = *targets(harness, endpoint).last()?;
    harness.page_responses()?;
    harness
        .request_page(target, group)
        .then_some((target, heard))
}

fn one_response_per_group(harness: &dyn Harness) {
    let Some((target, heard)) = with_request(harness, 3) else {
        return;
    };
    let backend = harness.backend();
    let requests = heard.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!((requests[0].target, requests[0].last), (target, true));
    assert_eq!(backend.objects().page_requests, 1);
    let response = PageResponse {
        target,
        group: requests[0].group,
        code: ResponseCode::Success,
    };
    backend.respond(response);
    backend.respond(response);
    let responses = harness.page_responses().unwrap_or_default();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].code, ResponseCode::Success);
    assert_eq!(backend.objects().page_requests, 0);
}

fn release_answers_requests(harness: &dyn Harness) {
    let Some((target, _heard)) = with_request(harness, 3) else {
        return;
    };
    harness.backend().release(target.endpoint);
    let responses = harness.page_responses().unwrap_or_default();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].code, ResponseCode::Invalid);
    assert_eq!(harness.backend().objects(), Objects::default());
}

fn blocked_dma_faults(harness: &dyn Harness) {
    let Some(dma) = harness.dma() else { return };
    let [endpoint, _] = harness.endpoints();
    let heard = claim(harness, endpoint);
    let iova = harness.mappings()[0].iova;
    for target in targets(harness, endpoint) {
        for access in [Access::READ, Access::WRITE] {
            assert!(!dma.access(target, iova, access));
            let faults = heard.faults();
            assert_eq!(faults.len(), 1);
            assert_eq!((faults[0].target, faults[0].iova), (target, iova));
            assert_eq!(faults[0].access, access);
            assert_eq!(faults[0].cause, FaultCause::Blocked);
        }
    }
}

fn mappings_carry_dma(harness: &dyn Harness) {
    let Some(dma) = harness.dma() else { return };
    let endpoints = harness.endpoints();
    let backend = harness.backend();
    let mut mappings = harness.mappings();
    mappings[1].access = Access::READ;
    mappings[2].access = Access::WRITE;
    let domain = domain_of(backend, &mappings[..2]);
    let check = |target| {
        for mapping in &mappings {
            let last = Iova(mapping.iova.0 + mapping.length - 1);
            let at = Gpa(mapping.gpa.0 + mapping.length - 1);
            dma.set_memory(at, 0x77);
            let read = dma.read(target, last);
            assert_eq!(read, mapping.access.read.then_some(0x77), "{mapping:?}");
            let written = dma.access(target, last, Access::WRITE);
            assert_eq!(written, mapping.access.write, "{mapping:?}");
            assert_eq!(dma.memory(at) != 0x77, written);
            assert!(!dma.access(target, Iova(last.0 + 1), Access::READ), "a gap");
        }
    };
    for (number, endpoint) in endpoints.into_iter().enumerate() {
        claim(harness, endpoint);
        let target = Target::rid(endpoint);
        let applied = backend.apply(target, Translation::Domain(domain));
        applied.expect("is accepted");
        if number == 0 {
            // Some were there before the first target came, some come later.
            backend.map(domain, &mappings[2..]).expect("they are free");
        }
        check(target);
    }
    let all = backend.unmap(domain, Iova(0), Iova(u64::MAX));
    all.expect("the domain exists");
    for endpoint in endpoints {
        for mapping in &mappings {
            assert!(!dma.access(Target::rid(endpoint), mapping.iova, mapping.access));
        }
    }
}

/// Runs `removal` while DMA at the first mapping is in flight, and checks that it waits for that.
fn drains(harness: &dyn Harness, removal: fn(&dyn Backend, Target, DomainId, Mapping)) {
    let Some(dma) = harness.dma() else { return };
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    let mapping = harness.mappings()[0];
    claim(harness, endpoint);
    let target = Target::rid(endpoint);
    let domain = domain_of(backend, &[mapping]);
    let applied = backend.apply(target, Translation::Domain(domain));
    applied.expect("is accepted");
    let held = dma.hold(target, mapping.iova);
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        scope.spawn(move || {
            removal(backend, target, domain, mapping);
            done.send(()).unwrap();
        });
        let early = is_done.recv_timeout(WATCHED);
        assert!(early.is_err(), "returned with DMA in flight");
        drop(held);
        is_done.recv().expect("returns when the DMA has ended");
    });
    backend.release(endpoint);
    backend.destroy_domain(domain);
}

fn removal_drains(harness: &dyn Harness) {
    drains(harness, |backend, _, domain, mapping| {
        let last = Iova(mapping.iova.0 + mapping.length - 1);
        let bytes = backend.unmap(domain, mapping.iova, last);
        assert_eq!(bytes.expect("the domain exists"), mapping.length);
    });
    drains(harness, |backend, target, _, _| {
        let applied = backend.apply(target, Translation::Blocked);
        applied.expect("is accepted");
    });
    drains(harness, |backend, target, _, _| {
        backend.release(target.endpoint);
    });
    drains(harness, |backend, _, domain, _| {
        backend.destroy_domain(domain);
    });
    drains(harness, |backend, _, _, _| {
        let range = InvalidationRange::All;
        let scope = Scope::All;
        assert_eq!(backend.invalidate(&[Invalidation { scope, range }]), 1);
    });
    drains(harness, |backend, target, _, _| {
        let range = InvalidationRange::All;
        let scope = Scope::Endpoint(target.endpoint);
        assert_eq!(backend.invalidate(&[Invalidation { scope, range }]), 1);
    });
    drains(harness, |backend, target, _, mapping| {
        let scope = Scope::Target(target);
        let range = InvalidationRange::Pages {
            first: mapping.iova,
            count: 1,
            leaf: true,
        };
        assert_eq!(backend.invalidate(&[Invalidation { scope, range }]), 1);
    });
}

fn unmap_waits_for_nothing_else(harness: &dyn Harness) {
    let Some(dma) = harness.dma() else { return };
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    let mappings = harness.mappings();
    claim(harness, endpoint);
    let target = Target::rid(endpoint);
    let domain = domain_of(backend, &mappings);
    let applied = backend.apply(target, Translation::Domain(domain));
    applied.expect("is accepted");
    let held = dma.hold(target, mappings[0].iova);
    let Mapping { iova, length, .. } = mappings[3];
    // Would not return if it waited.
    let bytes = backend.unmap(domain, iova, Iova(iova.0 + length - 1));
    assert_eq!(bytes.expect("the domain exists"), length);
    drop(held);
}
