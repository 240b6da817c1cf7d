//! Endpoints that come and go.

use super::*;

#[test]
fn detach_of_a_departed_endpoint_is_accepted_and_ends_its_domain() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.unit.remove_endpoint(A);
    // The back end holds nothing more; the guest takes its domain apart.
    assert_eq!(bench.backend.objects().domains, 0);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.attach(A, 2), Status::NoEnt);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.detach(A, 1), Status::NoEnt);
    assert_eq!(bench.unit.snapshot().domains, []);
}

#[test]
fn the_next_device_with_the_number_of_a_departed_one_starts_unattached() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.unit.remove_endpoint(A);
    bench.add(A, Regions::new());
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.unit.snapshot().domains, []);
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn an_endpoint_plugged_late_works_as_one_from_the_start() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let late = Rid::new(0, 9, 0);
    bench.add(late, Regions::new());
    assert_eq!(bench.attach(late, 1), Status::Ok);
    assert_eq!(bench.pages(late), [(0, 4)]);
}

#[test]
fn an_endpoint_that_cannot_do_what_was_offered_is_refused_with_the_reason() {
    let late = Rid::new(0, 9, 0);
    let backend = || Recorder::new() as Arc<dyn Backend>;
    let wide = Iommu::new(Config {
        input_range: (0, (1 << 57) - 1),
        ..config()
    });
    let error = wide
        .add_endpoint(late, backend(), Regions::new())
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("00:09.0") && text.contains("before boot"),
        "{text}"
    );
    assert_eq!(wide.snapshot().endpoints, []);

    let bench = bench_with(Config {
        probe_size: 64,
        ..config()
    });
    let reserved = (0..4).map(|n| Region {
        first: n << 20,
        last: n << 20,
        kind: Kind::Reserved,
    });
    let error = bench
        .unit
        .add_endpoint(late, backend(), reserved.collect())
        .unwrap_err();
    assert!(matches!(
        error,
        AddError::Properties {
            needs: 120,
            offered: 64,
            ..
        }
    ));
    let error = bench
        .unit
        .add_endpoint(A, backend(), Regions::new())
        .unwrap_err();
    assert!(matches!(error, AddError::Exists(A)));
}

#[test]
fn an_endpoint_that_its_back_end_refuses_is_not_added() {
    let bench = bench_with(Config {
        bypass: true,
        ..config()
    });
    let late = Rid::new(0, 9, 0);
    for refuse in [vec![true], vec![false, true]] {
        bench.backend.book().refuse = refuse.into();
        let backend: Arc<dyn Backend> = bench.backend.clone();
        let error = bench
            .unit
            .add_endpoint(late, backend, Regions::new())
            .unwrap_err();
        assert!(matches!(error, AddError::Refused { .. }));
        assert_eq!(bench.backend.objects().endpoints, 2);
    }
    bench.add(late, Regions::new());
    assert_eq!(bench.backend.translation_of(late), Translation::Identity);
}

#[test]
fn page_sizes_and_input_range_are_composed_from_the_hosts() {
    let mut wide = Recorder::new().capabilities();
    wide.address_width = 57;
    let mut narrow = wide;
    narrow.address_width = 39;
    narrow.page_sizes = 0x20_1000;
    let config = Config::compose(&wide.and(narrow), 100).unwrap();
    assert_eq!(config.input_range, (0, (1 << 39) - 1));
    assert_eq!(config.page_size_mask, 0x20_1000);
    assert!(config.probe_size >= 2400);
    narrow.address_width = 20;
    assert!(Config::compose(&narrow, 0).is_err());
}

#[test]
fn a_map_may_reach_across_two_regions_of_memory() {
    // 3 GiB to 5 GiB: the hole of a PC is the back end's business, not the state machine's.
    let bench = bench();
    bench.attach(A, 1);
    let request = map(1, (0, (2 << 30) - 1), 3 << 30, RW);
    assert_eq!(bench.send(&request), Status::Ok);
    let mapping = bench.backend.mappings_of(A).unwrap()[0];
    assert_eq!((mapping.gpa, mapping.length), (Gpa(3 << 30), 2 << 30));
}

#[test]
fn live_state_is_a_value() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let json = serde_json::to_value(bench.unit.snapshot()).unwrap();
    assert_eq!(json["endpoints"][0]["endpoint"], "00:03.0");
    assert_eq!(json["endpoints"][0]["domain"], 1);
    assert_eq!(json["domains"][0]["mapped_bytes"], 5 * PAGE);
    assert_eq!(json["counters"]["requests"], 2);
}
