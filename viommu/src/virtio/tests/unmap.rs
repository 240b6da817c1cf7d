//! UNMAP requests: the numbered examples, in pages (5.13.6.6).

use super::*;

#[test]
fn unmap_example_1_succeeds_and_does_not_unmap_anything() {
    let bench = bench();
    bench.attach(A, 1);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.backend.book().unmap_calls, 0);
}

#[test]
fn unmap_example_2_unmaps_a() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 9);
    assert_eq!(bench.unmap(0, 9), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn unmap_example_3_unmaps_a_and_b() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(5, 9);
    assert_eq!(bench.unmap(0, 9), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn unmap_example_4_fails_with_range_and_does_not_unmap_anything() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 9);
    assert_eq!(bench.unmap(0, 4), Status::Range);
    assert_eq!(bench.unmap(5, 20), Status::Range);
    assert_eq!(bench.unmap(2, 3), Status::Range);
    assert_eq!(bench.pages(A), [(0, 9)]);
    // Nor does it when another mapping would be removed whole.
    bench.map(10, 12);
    assert_eq!(bench.unmap(5, 12), Status::Range);
    assert_eq!(bench.unmap(0, 11), Status::Range);
    assert_eq!(bench.pages(A), [(0, 9), (10, 12)]);
}

#[test]
fn unmap_example_5_unmaps_a() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(5, 9);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.pages(A), [(5, 9)]);
}

#[test]
fn unmap_example_6_unmaps_a() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    assert_eq!(bench.unmap(0, 9), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn unmap_example_7_unmaps_a_and_b() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(10, 14);
    assert_eq!(bench.unmap(0, 14), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn an_unmap_of_everything_unmaps_everything() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(1 << 30, 1 << 30);
    assert_eq!(bench.send(&unmap(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn may_reject_unmap_with_reserved_not_zero_with_inval() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let mut request = unmap(1, 0, 5 * PAGE - 1);
    request[24] = 1;
    assert_eq!(bench.send(&request), Status::Inval);
    assert_eq!(bench.pages(A), [(0, 4)]);
}

#[test]
fn what_was_unmapped_is_out_of_reach_even_when_the_back_end_refuses() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(5, 9);
    bench.backend.book().refuse = [true].into();
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.pages(A), [(5, 9)]);
    // When it cannot be made anew either: Blocked, and the next unmap tries again.
    bench.backend.book().refuse = [true, true].into();
    assert_eq!(bench.unmap(5, 9), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.map(0, 4), Status::Ok);
    assert_eq!(bench.map(5, 9), Status::Ok);
    assert_eq!(bench.unmap(5, 9), Status::Ok);
    assert_eq!(bench.pages(A), [(0, 4)]);
}
