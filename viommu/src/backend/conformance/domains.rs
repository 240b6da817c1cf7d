//! Domains and their mappings.

use super::super::{Mapping, Refused, Translation};
use super::{Harness, all_translations, claim, domain_of, targets};
use crate::{DomainId, Iova, Target};

pub(super) fn unknown_domains(harness: &dyn Harness) {
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

pub(super) fn mappings_are_counted(harness: &dyn Harness) {
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

pub(super) fn map_is_atomic(harness: &dyn Harness) {
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

pub(super) fn unmap_is_exact(harness: &dyn Harness) {
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

pub(super) fn destroyed_domain_blocks(harness: &dyn Harness) {
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
