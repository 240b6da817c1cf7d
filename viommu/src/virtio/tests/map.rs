//! MAP requests (5.13.6.5).

use super::*;

#[test]
fn should_reject_a_map_that_is_not_aligned_with_range() {
    let bench = bench();
    bench.attach(A, 1);
    for (virt, phys) in [
        ((1, PAGE - 1), 0),
        ((0, PAGE), 0),
        ((0, PAGE - 2), 0),
        ((0, PAGE - 1), 1),
        ((0, 0), 0),
        ((PAGE / 2, PAGE / 2 * 3 - 1), PAGE / 2),
    ] {
        assert_eq!(
            bench.send(&map(1, virt, phys, RW)),
            Status::Range,
            "{virt:x?}"
        );
    }
    assert_eq!(bench.pages(A), []);
}

#[test]
fn the_granularity_of_a_host_with_larger_pages_holds() {
    let bench = bench_with(Config {
        page_size_mask: 1 << 14 | 1 << 21,
        ..config()
    });
    bench.attach(A, 1);
    assert_eq!(bench.map(1, 4), Status::Range);
    assert_eq!(bench.map(4, 7), Status::Ok);
}

#[test]
fn should_reject_a_map_over_a_mapping_with_inval() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(4, 7);
    for (first, last) in [(4, 7), (0, 4), (7, 9), (5, 6), (0, 100)] {
        assert_eq!(bench.map(first, last), Status::Inval);
    }
    assert_eq!(bench.map(0, 3), Status::Ok);
    assert_eq!(bench.map(8, 9), Status::Ok);
    assert_eq!(bench.pages(A), [(0, 3), (4, 7), (8, 9)]);
}

#[test]
fn must_reject_a_map_with_unknown_flags_with_inval() {
    let bench = bench();
    bench.attach(A, 1);
    for bit in 3..32 {
        assert_eq!(
            bench.send(&map(1, (0, PAGE - 1), 0, RW | 1 << bit)),
            Status::Inval
        );
    }
    bench.unit.set_features(!feature::MMIO);
    let mmio = RW | map_flag::MMIO;
    assert_eq!(bench.send(&map(1, (0, PAGE - 1), 0, mmio)), Status::Inval);
}

#[test]
fn should_reject_map_and_unmap_of_a_domain_that_does_not_exist_with_noent() {
    let bench = bench();
    assert_eq!(bench.map(0, 4), Status::NoEnt);
    assert_eq!(bench.unmap(0, 4), Status::NoEnt);
}

#[test]
fn should_reject_map_and_unmap_of_a_bypass_domain_with_inval() {
    let bench = bench();
    bench.send(&attach(A.0.into(), 1, 1));
    assert_eq!(bench.map(0, 4), Status::Inval);
    assert_eq!(bench.unmap(0, 4), Status::Inval);
}

#[test]
fn must_not_allow_writes_to_a_range_mapped_without_write() {
    let bench = bench();
    bench.attach(A, 1);
    let all = [0, map_flag::READ, map_flag::WRITE, RW, RW | map_flag::MMIO];
    for (n, flags) in (0..).zip(all) {
        let virt = (n * PAGE, n * PAGE + PAGE - 1);
        assert_eq!(bench.send(&map(1, virt, 0, flags)), Status::Ok);
    }
    let told: Vec<_> = bench
        .backend
        .mappings_of(A)
        .unwrap()
        .iter()
        .map(|m| (m.iova.0 / PAGE, m.access, m.mmio))
        .collect();
    // What allows nothing is kept, but there is nothing to tell a back end.
    let expected = [
        (1, Access::READ, false),
        (2, Access::WRITE, false),
        (3, Access::READ_WRITE, false),
        (4, Access::READ_WRITE, true),
    ];
    assert_eq!(told, expected);
    assert_eq!(bench.map(0, 0), Status::Inval);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.map(0, 0), Status::Ok);
}

#[test]
fn a_map_outside_of_the_input_range_or_of_guest_physical_memory_is_range() {
    let bench = bench_with(Config {
        input_range: (0x10 * PAGE, (1 << 40) - 1),
        gpa_bits: 39,
        ..config()
    });
    bench.attach(A, 1);
    let page = |start| (start, start + (PAGE - 1));
    for (virt, phys) in [
        (page(0xf * PAGE), 0),
        (page(1 << 40), 0),
        (page(u64::MAX - (PAGE - 1)), 0),
        ((0, u64::MAX), 0),
        (page(0x10 * PAGE), 1 << 39),
        (page(0x10 * PAGE), u64::MAX - (PAGE - 1)),
        ((0x10 * PAGE, 0x12 * PAGE - 1), (1 << 39) - PAGE),
        ((0x10 * PAGE, 0x12 * PAGE - 1), u64::MAX - (PAGE - 1)),
    ] {
        assert_eq!(
            bench.send(&map(1, virt, phys, RW)),
            Status::Range,
            "{virt:x?}"
        );
    }
    assert_eq!(
        bench.send(&map(1, page((1 << 40) - PAGE), (1 << 39) - PAGE, RW)),
        Status::Ok
    );
    assert_eq!(bench.pages(A).len(), 1);
}

#[test]
fn a_map_or_unmap_that_ends_before_it_begins_is_inval() {
    let bench = bench();
    bench.attach(A, 1);
    assert_eq!(
        bench.send(&map(1, (2 * PAGE, PAGE - 1), 0, RW)),
        Status::Inval
    );
    assert_eq!(bench.send(&map(1, (PAGE, PAGE - 1), 0, RW)), Status::Inval);
    assert_eq!(bench.send(&unmap(1, 2 * PAGE, PAGE - 1)), Status::Inval);
}

#[test]
fn mappings_are_bounded_per_domain_and_per_device_and_more_are_nomem() {
    let bench = bench_with(Config {
        domain_mappings: 8,
        mappings: 12,
        ..config()
    });
    bench.attach(A, 1);
    bench.attach(B, 2);
    for n in 0..8 {
        assert_eq!(bench.map(n, n), Status::Ok);
    }
    assert_eq!(bench.map(8, 8), Status::NoMem);
    assert_eq!(bench.map(7, 7), Status::Inval);
    let in_b = |n: u64| bench.send(&map(2, (n * PAGE, n * PAGE + PAGE - 1), 0, RW));
    for n in 0..4 {
        assert_eq!(in_b(n), Status::Ok);
    }
    assert_eq!(in_b(4), Status::NoMem);
    bench.unmap(0, 0);
    assert_eq!(in_b(4), Status::Ok);
    bench.detach(A, 1);
    assert_eq!(in_b(5), Status::Ok);
}

#[test]
fn what_a_back_end_refuses_reaches_the_guest_as_its_own_status() {
    let bench = bench();
    bench.attach(A, 1);
    bench.backend.book().refuse = [true, true].into();
    assert_eq!(bench.map(0, 4), Status::NoMem);
    assert_eq!(bench.pages(A), []);
    assert_eq!(bench.map(0, 4), Status::Ok);
}
