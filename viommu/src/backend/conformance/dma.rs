//! What DMA passes; for harnesses that can do it.

use std::sync::mpsc;
use std::time::Duration;

use super::super::{
    Access, Backend, FaultCause, Invalidation, InvalidationRange, Mapping, Scope, Translation,
};
use super::{Harness, claim, domain_of, targets};
use crate::{DomainId, Gpa, Iova, Target};

/// How long a call is watched that must not return yet. A correct back end passes whatever this
/// is; a wrong one is more likely to be caught the longer it is.
const WATCHED: Duration = Duration::from_millis(30);

pub(super) fn blocked_dma_faults(harness: &dyn Harness) {
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

pub(super) fn mappings_carry_dma(harness: &dyn Harness) {
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

pub(super) fn removal_drains(harness: &dyn Harness) {
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

pub(super) fn unmap_waits_for_nothing_else(harness: &dyn Harness) {
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
