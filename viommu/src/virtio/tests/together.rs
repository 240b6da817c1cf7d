//! Requests that arrive together.

use super::*;

#[test]
fn maps_that_arrive_together_are_one_call_and_so_are_unmaps() {
    let bench = bench();
    bench.attach(A, 1);
    let page = |n: u64| (n * PAGE, n * PAGE + PAGE - 1);
    let maps: Vec<_> = (0..128).map(|n| map(1, page(n * 2), 0, RW)).collect();
    assert!(bench.send_all(&maps).iter().all(|&s| s == Status::Ok));
    assert_eq!(bench.backend.book().map_calls, [128]);
    let unmaps: Vec<_> = (0..64)
        .map(|n| unmap(1, page(n * 2).0, page(n * 2).1))
        .collect();
    assert!(bench.send_all(&unmaps).iter().all(|&s| s == Status::Ok));
    assert_eq!(bench.backend.book().unmap_calls, 1);
    assert_eq!(bench.pages(A).len(), 64);
    // A mapping that stays between two unmaps parts them.
    let unmaps = [page(200), page(204)].map(|(first, last)| unmap(1, first, last));
    bench.send_all(&unmaps);
    assert_eq!(bench.backend.book().unmap_calls, 3);
    assert_eq!(bench.pages(A).len(), 62);
}

#[test]
fn statuses_of_a_batch_are_those_of_its_requests_one_by_one() {
    let bench = bench();
    let page = |n: u64| (n * PAGE, n * PAGE + PAGE - 1);
    let (a, b) = (A.0.into(), B.0.into());
    let batch = [
        (map(1, page(0), 0, RW), Status::NoEnt),
        (attach(a, 1, 0), Status::Ok),
        (map(1, page(0), 0, RW), Status::Ok),
        (map(1, page(0), 0, RW), Status::Inval),
        (map(1, page(1), 1, RW), Status::Range),
        (map(1, page(1), 0, RW), Status::Ok),
        (map(2, page(0), 0, RW), Status::NoEnt),
        (unmap(1, 0, PAGE - 1), Status::Ok),
        (map(1, page(0), 0, RW), Status::Ok),
        (attach(b, 2, 0), Status::Ok),
        (unmap(1, 0, PAGE), Status::Range),
        (map(2, page(0), 0, RW), Status::Ok),
        (detach(a, 1), Status::Ok),
        (unmap(1, 0, PAGE), Status::NoEnt),
        (detach(a, 1), Status::Inval),
    ];
    let (requests, expected): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    assert_eq!(bench.send_all(&requests), expected);
    assert_eq!(bench.pages(B), [(0, 0)]);
}

#[test]
fn a_refused_batch_is_done_one_by_one_with_exact_statuses() {
    let bench = bench();
    bench.attach(A, 1);
    let page = |n: u64| (n * PAGE, n * PAGE + PAGE - 1);
    let batch = [0, 1, 1, 2].map(|n| map(1, page(n), 0, RW));
    // The batch, then page 0, then page 1 the first time.
    bench.backend.book().refuse = [true, false, true].into();
    let expected = [Status::Ok, Status::NoMem, Status::Ok, Status::Ok];
    assert_eq!(bench.send_all(&batch), expected);
    assert_eq!(bench.pages(A), [(0, 0), (1, 1), (2, 2)]);
}

#[test]
fn a_map_that_one_of_several_back_ends_refuses_is_in_none() {
    let bench = bench();
    let other = Recorder::new();
    let far = Rid::new(1, 0, 0);
    bench
        .unit
        .add_endpoint(far, other.clone(), Regions::new())
        .unwrap();
    bench.attach(A, 1);
    bench.attach(far, 1);
    other.book().refuse = [true, true].into();
    assert_eq!(bench.map(0, 4), Status::NoMem);
    assert_eq!(bench.pages(A), []);
    assert_eq!(other.mappings_of(far), Some(vec![]));
    assert_eq!(bench.map(0, 4), Status::Ok);
    assert_eq!(other.mappings_of(far), bench.backend.mappings_of(A));
    bench.unit.remove_endpoint(far);
}
