//! DETACH requests (5.13.6.4).

use super::*;

#[test]
fn must_ignore_reserved_of_a_detach() {
    let bench = bench();
    bench.attach(A, 1);
    let mut request = detach(A.0.into(), 1);
    request[12..].fill(0xff);
    assert_eq!(bench.send(&request), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn must_reject_detach_of_an_endpoint_that_does_not_exist_with_noent() {
    let bench = bench();
    bench.attach(A, 1);
    for endpoint in [0, 0xffff, 0x1_0000 | u32::from(A.0), u32::MAX] {
        assert_eq!(bench.send(&detach(endpoint, 1)), Status::NoEnt);
    }
    assert_eq!(bench.pages(A), []);
}

#[test]
fn must_ensure_that_a_detached_endpoint_cannot_access_the_domain() {
    let bench = bench();
    bench.attach(A, 1);
    bench.attach(B, 1);
    bench.map(0, 4);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.pages(B), [(0, 4)]);
}

#[test]
fn may_reject_detach_from_the_wrong_domain_with_inval_and_then_changes_nothing() {
    let bench = bench();
    bench.attach(A, 1);
    bench.attach(B, 2);
    bench.map(0, 4);
    assert_eq!(bench.detach(A, 2), Status::Inval);
    assert_eq!(bench.detach(A, 77), Status::Inval);
    assert_eq!(bench.pages(A), [(0, 4)]);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.detach(A, 1), Status::Inval);
}

#[test]
fn after_all_endpoints_are_detached_the_domain_ceases_to_exist() {
    let bench = bench();
    bench.attach(A, 1);
    bench.attach(B, 1);
    bench.map(0, 4);
    bench.detach(A, 1);
    bench.detach(B, 1);
    assert_eq!(bench.unit.snapshot().domains, []);
    assert_eq!(bench.backend.objects().domains, 0);
    bench.attach(A, 1);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn a_domain_that_ceases_is_freed_while_others_use_the_unit_and_before_the_reply() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let (tell, destroying) = std::sync::mpsc::channel();
    let (go, may_go) = std::sync::mpsc::channel::<()>();
    bench.backend.book().on_destroy = Some(Box::new(move || {
        tell.send(()).unwrap();
        may_go.recv().unwrap();
    }));
    std::thread::scope(|scope| {
        let detaching = scope.spawn(|| bench.detach(A, 1));
        destroying.recv().unwrap();
        assert_eq!(bench.unit.snapshot().domains, []);
        assert_eq!(bench.attach(B, 1), Status::Ok);
        assert_eq!(bench.pages(B), []);
        assert!(!detaching.is_finished());
        go.send(()).unwrap();
        assert_eq!(detaching.join().unwrap(), Status::Ok);
    });
    assert_eq!(bench.backend.objects().domains, 1);
}
