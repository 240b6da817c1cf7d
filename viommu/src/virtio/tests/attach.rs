//! ATTACH requests (5.13.6.3).

use super::*;

#[test]
fn a_device_that_does_not_reject_an_attach_must_attach_the_endpoint() {
    let bench = bench();
    for (domain, flags) in [(0, 0), (0xffff, 0), (1, 1), (2, 0), (1, 1)] {
        assert_eq!(bench.send(&attach(A.0.into(), domain, flags)), Status::Ok);
        let endpoints = bench.unit.snapshot().endpoints;
        assert_eq!(endpoints[0].domain, Some(domain));
        match bench.backend.translation_of(A) {
            Translation::Identity => assert_eq!(flags, 1),
            Translation::Domain(_) => assert_eq!(flags, 0),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn must_reject_attach_with_reserved_or_unknown_flags_with_inval() {
    let bench = bench();
    let mut request = attach(A.0.into(), 1, 0);
    request[16] = 1;
    assert_eq!(bench.send(&request), Status::Inval);
    assert_eq!(bench.send(&attach(A.0.into(), 1, 2)), Status::Inval);
    assert_eq!(bench.send(&attach(A.0.into(), 1, 1 << 31)), Status::Inval);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn must_reject_attach_of_an_endpoint_that_does_not_exist_with_noent() {
    let bench = bench();
    for endpoint in [0, 0xffff, 0x1_0000 | u32::from(A.0), u32::MAX] {
        assert_eq!(bench.send(&attach(endpoint, 1, 0)), Status::NoEnt);
        assert_eq!(bench.send(&detach(endpoint, 1)), Status::NoEnt);
        assert_eq!(bench.unit.process(&probe(endpoint), 4096).status(), Some(6));
    }
    // None of them left anything behind.
    assert_eq!(bench.unit.snapshot().endpoints.len(), 2);
    assert_eq!(bench.unit.snapshot().domains, []);
}

#[test]
fn attach_to_a_domain_out_of_range_is_range() {
    let bench = bench_with(Config {
        domain_range: (1, 100),
        ..config()
    });
    for domain in [0, 101, u32::MAX] {
        assert_eq!(bench.attach(A, domain), Status::Range);
        assert_eq!(bench.detach(A, domain), Status::Inval);
        assert_eq!(
            bench.send(&map(domain, (0, PAGE - 1), 0, RW)),
            Status::NoEnt
        );
        assert_eq!(bench.send(&unmap(domain, 0, PAGE - 1)), Status::NoEnt);
    }
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.attach(B, 100), Status::Ok);
}

#[test]
fn may_attach_another_endpoint_which_shares_the_mappings_and_their_map_call() {
    let bench = bench();
    bench.attach(A, 1);
    assert_eq!(bench.map(0, 4), Status::Ok);
    assert_eq!(bench.attach(B, 1), Status::Ok);
    assert_eq!(bench.pages(B), [(0, 4)]);
    assert_eq!(bench.map(5, 9), Status::Ok);
    assert_eq!(bench.backend.book().map_calls, [1, 1]);
    assert_eq!(bench.pages(A), [(0, 4), (5, 9)]);
    assert_eq!(
        bench.backend.translation_of(A),
        bench.backend.translation_of(B)
    );
}

#[test]
fn a_second_endpoint_in_another_back_end_gets_the_mappings_that_exist() {
    let bench = bench();
    let other = Recorder::new();
    let far = Rid::new(1, 0, 0);
    bench
        .unit
        .add_endpoint(far, other.clone(), Regions::new())
        .unwrap();
    bench.attach(A, 1);
    for n in 0..1000 {
        assert_eq!(bench.map(n * 2, n * 2), Status::Ok);
    }
    assert_eq!(bench.attach(far, 1), Status::Ok);
    assert_eq!(other.mappings_of(far), bench.backend.mappings_of(A));
    assert!(
        other.book().map_calls.iter().all(|&n| n <= 256),
        "not in chunks"
    );
    assert_eq!(bench.map(5000, 5000), Status::Ok);
    assert_eq!(bench.unmap(0, 500), Status::Ok);
    assert_eq!(other.mappings_of(far), bench.backend.mappings_of(A));
    assert_eq!(bench.detach(far, 1), Status::Ok);
    assert_eq!(other.objects().domains, 0);
    bench.unit.remove_endpoint(far);
    assert_eq!(other.book().complaints, [""; 0]);
}

#[test]
fn should_reject_attach_that_is_not_consistent_with_a_bypass_domain_with_inval() {
    let bench = bench();
    assert_eq!(bench.send(&attach(A.0.into(), 1, 1)), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Identity);
    assert_eq!(bench.attach(B, 1), Status::Inval);
    assert_eq!(bench.send(&attach(B.0.into(), 1, 1)), Status::Ok);
    assert_eq!(bench.attach(A, 2), Status::Ok);
    assert_eq!(bench.send(&attach(B.0.into(), 2, 1)), Status::Inval);
    assert_eq!(bench.backend.translation_of(B), Translation::Identity);
}

#[test]
fn should_detach_from_the_old_domain_when_attached_to_another() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    assert_eq!(bench.attach(A, 2), Status::Ok);
    assert_eq!(bench.pages(A), []);
    // The old one has ceased to exist, and its number is free.
    assert_eq!(bench.map(0, 4), Status::NoEnt);
    assert_eq!(bench.backend.objects().domains, 1);
    assert_eq!(bench.attach(B, 1), Status::Ok);
    assert_eq!(bench.pages(B), []);
}

#[test]
fn attach_again_to_the_same_domain_is_ok_and_does_nothing() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.pages(A), [(0, 4)]);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.backend.objects().domains, 0);
}

#[test]
fn should_reject_attach_of_an_endpoint_whose_reserved_regions_are_mapped_with_unsupp() {
    let bench = bench();
    let picky = Rid::new(0, 5, 0);
    let mut reserved = Regions::new();
    reserved.insert(0x10_0000, 0x1f_ffff, Kind::Reserved);
    bench.add(picky, reserved);
    bench.attach(A, 1);
    bench.map(0x100, 0x100);
    assert_eq!(bench.attach(picky, 1), Status::Unsupp);
    assert_eq!(bench.backend.translation_of(picky), Translation::Blocked);
    bench.unmap(0x100, 0x100);
    assert_eq!(bench.attach(picky, 1), Status::Ok);
    // From now on the region is out of bounds for the domain, until the endpoint leaves.
    assert_eq!(bench.map(0x1ff, 0x200), Status::Inval);
    bench.detach(picky, 1);
    assert_eq!(bench.map(0x1ff, 0x200), Status::Ok);
}

#[test]
fn a_failed_attach_changes_nothing() {
    let bench = bench();
    let other = Recorder::new();
    let far = Rid::new(1, 0, 0);
    bench
        .unit
        .add_endpoint(far, other.clone(), Regions::new())
        .unwrap();
    bench.attach(A, 1);
    for n in 0..600 {
        bench.map(n, n);
    }
    assert_eq!(bench.attach(far, 2), Status::Ok);
    assert_eq!(bench.send(&map(2, (0, PAGE - 1), 0, RW)), Status::Ok);
    let before = (other.translation_of(far), other.mappings_of(far));
    // create_domain, three chunks, apply: each of them is refused once.
    for step in 0..5 {
        let refuse = (0..5).map(|n| n == step).collect();
        other.book().refuse = refuse;
        assert_eq!(bench.attach(far, 1), Status::NoMem, "step {step}");
        assert_eq!((other.translation_of(far), other.mappings_of(far)), before);
        assert_eq!(other.objects().domains, 1);
        other.book().refuse.clear();
    }
    assert_eq!(bench.unit.snapshot().domains.len(), 2);
    assert_eq!(bench.attach(far, 1), Status::Ok);
    bench.unit.remove_endpoint(far);
}

#[test]
fn an_endpoint_whose_old_domain_cannot_be_put_back_is_blocked_reported_and_tried_again() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    // create_domain, apply, and apply of the old one.
    bench.backend.book().refuse = [false, true, true].into();
    assert_eq!(bench.attach(A, 2), Status::NoMem);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    let report = bench.unit.next_fault().expect("a report");
    assert_eq!((report.reason, report.endpoint.get()), (0, A.0.into()));
    let refused = |bench: &Bench| bench.unit.snapshot().endpoints[0].refused;
    assert!(refused(&bench));
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert!(!refused(&bench));
    assert_eq!(bench.pages(A), [(0, 4)]);
}
