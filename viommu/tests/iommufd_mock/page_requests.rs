//! Page requests, from the device to the front end and back.

use std::sync::atomic::Ordering;
use std::time::Duration;

use viommu::backend::{Access, Backend, Translation};
use viommu::{Iova, Rid};

use super::bench::{A, B, Bench, RAM, pasid, stage1};
use super::mock::PASID_THAT_FAILS;

/// How long a page request may take before the test gives up; a correct back end passes whatever
/// this is.
const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_page_request_goes_to_the_front_end_and_its_answer_back() {
    let Some(bench) = Bench::open() else { return };
    bench.host.apply(pasid(A, 5), stage1(RAM)).unwrap();
    for group in [1u32, 2, 3] {
        bench.ask(A, 5, group);
        let request = bench.requests.recv_timeout(LONG).unwrap();
        assert_eq!(request.target, pasid(A, 5));
        assert_eq!((request.group, request.last), (group as u16, true));
        assert_eq!(request.iova, Iova(0xdead_b000));
        assert_eq!(request.access, Access::READ_WRITE);
        assert_eq!(bench.host.objects().page_requests, 1);
        if group < 3 {
            bench.answer(request);
            assert_eq!(bench.host.objects().page_requests, 0);
        }
    }
    // The last is not answered: the kernel does it when the table goes.
    bench.host.apply(pasid(A, 5), Translation::Blocked).unwrap();
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[test]
fn an_index_that_waits_is_refused_and_what_waits_is_still_answered() {
    let Some(bench) = Bench::open() else { return };
    bench.host.apply(pasid(A, 5), stage1(RAM)).unwrap();
    bench.ask(A, 5, 1);
    let first = bench.requests.recv_timeout(LONG).unwrap();
    // The device uses the index again: it has its answer from us, and the front end hears nothing.
    bench.ask(A, 5, 1);
    bench.ask(A, 5, 2);
    let second = bench.requests.recv_timeout(LONG).unwrap();
    assert_eq!((first.group, second.group), (1, 2));
    assert_eq!(bench.host.objects().page_requests, 2);
    for request in [second, first] {
        bench.answer(request);
    }
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[test]
fn requests_of_many_pasids_are_answered_in_any_order_while_tables_are_replaced() {
    let Some(bench) = Bench::open() else { return };
    let targets = [A, B].map(|rid| (1..=8).map(move |number| (rid, number)));
    let targets: Vec<(Rid, u32)> = targets.into_iter().flatten().collect();
    for &(rid, number) in &targets {
        bench.host.apply(pasid(rid, number), stage1(RAM)).unwrap();
    }
    for round in 0..8u64 {
        let mut waiting = Vec::new();
        for group in 0..16 {
            for &(rid, number) in &targets {
                bench.ask(rid, number, group);
                waiting.push(bench.requests.recv_timeout(LONG).unwrap());
            }
        }
        assert_eq!(bench.host.objects().page_requests, waiting.len());
        // A replaced table takes its requests with it: the kernel answers them.
        let root = stage1(RAM + ((round + 1) << 12));
        for &(rid, number) in targets.iter().step_by(3) {
            bench.host.apply(pasid(rid, number), root).unwrap();
        }
        let gone = 16 * targets.len().div_ceil(3);
        assert_eq!(bench.host.objects().page_requests, waiting.len() - gone);
        // The rest from both ends, and then all once more: nothing is answered twice.
        let half = waiting.len() / 2;
        let (front, back) = waiting.split_at(half);
        for request in back.iter().rev().chain(front).chain(&waiting) {
            bench.answer(*request);
        }
        assert_eq!(bench.host.objects().page_requests, 0);
    }
    assert!(bench.requests.try_recv().is_err(), "a request came twice");
}

#[test]
fn a_replace_that_fails_ends_with_the_new_table_or_none() {
    let Some(bench) = Bench::open() else { return };
    let target = pasid(A, PASID_THAT_FAILS);
    bench.host.apply(target, stage1(RAM)).unwrap();
    for round in 1..4u64 {
        bench.ask(A, PASID_THAT_FAILS, 1);
        bench.requests.recv_timeout(LONG).unwrap();
        let old = bench.hwpt(A, PASID_THAT_FAILS);
        let new = stage1(RAM + (round << 12));
        // The mock fails the replace; from detached the attach works, and nothing of the old
        // table is left: not in the kernel, and no page request of its.
        bench.host.apply(target, new).unwrap();
        assert_eq!(bench.host.translation(target), new);
        assert!(!bench.has(A, PASID_THAT_FAILS, old));
        assert!(bench.has(A, PASID_THAT_FAILS, bench.hwpt(A, PASID_THAT_FAILS)));
        assert_eq!(bench.host.objects().page_requests, 0);
        assert_eq!(bench.host.objects().translations, 1);
    }
    assert_eq!(bench.devices[&A].0.refusals.load(Ordering::Relaxed), 3);
}
