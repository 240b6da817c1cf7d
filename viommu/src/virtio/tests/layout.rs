//! Features, configuration, initialization and the requests' outline (5.13.3 to 5.13.6).

use super::*;

#[test]
fn should_offer_map_unmap_and_bypass_config_and_not_bypass() {
    assert_ne!(Config::FEATURES & feature::MAP_UNMAP, 0);
    assert_ne!(Config::FEATURES & feature::BYPASS_CONFIG, 0);
    assert_eq!(Config::FEATURES & feature::BYPASS, 0);
}

#[test]
fn must_set_at_least_one_bit_in_page_size_mask() {
    let mut capabilities = Recorder::new().capabilities();
    for sizes in [0x1000, 0x4020_1000, 0x1fff, u64::MAX, 1 << 21] {
        capabilities.page_sizes = sizes;
        let config = Config::compose(&capabilities, 0).unwrap();
        let space = spec::Config::read_from_bytes(&Iommu::new(config).config_space()).unwrap();
        let lowest = space.page_size_mask.get() & space.page_size_mask.get().wrapping_neg();
        assert_eq!(lowest, if sizes == 1 << 21 { 1 << 21 } else { 0x1000 });
    }
    capabilities.page_sizes = 0;
    assert!(Config::compose(&capabilities, 0).is_err());
}

#[test]
fn bypass_should_not_change_on_device_reset_but_be_restored_on_system_reset() {
    let bench = bench();
    let bypass = |bench: &Bench| bench.unit.config_space()[36];
    assert_eq!(bypass(&bench), 0);
    bench.unit.write_config(36, &[1]);
    assert_eq!(bypass(&bench), 1);
    bench.unit.reset();
    assert_eq!(bypass(&bench), 1);
    assert_eq!(bench.backend.translation_of(A), Translation::Identity);
    bench.unit.system_reset();
    assert_eq!(bypass(&bench), 0);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn must_not_present_a_value_other_than_0_or_1_in_bypass() {
    let bench = bench();
    for value in 0..=0xff {
        bench.unit.write_config(36, &[value]);
        assert!(bench.unit.config_space()[36] <= 1);
    }
    bench.unit.write_config(36, &[1]);
    bench.unit.write_config(36, &[0xfe]);
    assert_eq!(bench.unit.config_space()[36], 1);
}

#[test]
fn only_bypass_can_be_written_and_only_when_negotiated() {
    let bench = bench();
    let before = bench.unit.config_space();
    for offset in (0..36).chain(37..60) {
        bench.unit.write_config(offset, &[1]);
    }
    bench.unit.write_config(u64::MAX, &[1; 8]);
    assert_eq!(bench.unit.config_space(), before);
    bench.unit.set_features(!feature::BYPASS_CONFIG);
    bench.unit.write_config(36, &[1]);
    assert_eq!(bench.unit.config_space(), before);
}

#[test]
fn when_the_device_is_reset_endpoints_are_not_attached_and_nothing_is_left() {
    let bench = bench();
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.attach(B, 1), Status::Ok);
    assert_eq!(bench.map(0, 4), Status::Ok);
    bench.unit.reset();
    let objects = bench.backend.objects();
    assert_eq!(
        (objects.domains, objects.mappings, objects.targets),
        (0, 0, 0)
    );
    bench.unit.set_features(u64::MAX);
    assert_eq!(bench.map(0, 4), Status::NoEnt);
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn should_not_write_the_buffer_of_an_unrecognised_type_and_set_the_used_length_to_zero() {
    let bench = bench();
    for r#type in [0, 6, 0x7f, 0xff] {
        let mut request = attach(A.0.into(), 1, 0);
        request[0] = r#type;
        assert_eq!(bench.unit.process(&request, 4), Reply::Nothing);
    }
    assert_eq!(Reply::Nothing.bytes(), [0u8; 0]);
}

#[test]
fn a_request_without_room_for_the_tail_is_returned_unwritten_and_not_done() {
    let bench = bench();
    for writable in 0..4 {
        let reply = bench.unit.process(&attach(A.0.into(), 1, 0), writable);
        assert_eq!(reply, Reply::Nothing);
    }
    assert_eq!(bench.unit.snapshot().domains, []);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn a_truncated_request_is_invalid_and_not_done() {
    let bench = bench();
    bench.attach(A, 1);
    let whole = map(1, (0, PAGE - 1), 0, RW);
    for length in 1..whole.len() {
        let reply = bench.unit.process(&whole[..length], 4);
        assert_eq!(reply.status().is_some(), length >= 4);
        assert_ne!(reply.status(), Some(0));
    }
    assert_eq!(bench.unit.process(&[], 4), Reply::Nothing);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn a_longer_buffer_than_needed_gets_the_tail_at_its_front() {
    let bench = bench();
    let reply = bench.unit.process(&attach(A.0.into(), 1, 0), 4096);
    assert_eq!(reply.bytes(), [0; 4]);
}

#[test]
fn should_not_let_unattached_endpoints_access_memory_unless_in_bypass() {
    let bench = bench();
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    let bypass = bench_with(Config {
        bypass: true,
        ..config()
    });
    assert_eq!(bypass.backend.translation_of(A), Translation::Identity);
    // Even if the driver does not accept BYPASS_CONFIG.
    bypass.unit.set_features(feature::MAP_UNMAP);
    assert_eq!(bypass.unit.config_space()[36], 1);
    assert_eq!(bypass.backend.translation_of(A), Translation::Identity);
}

#[test]
fn bypass_holds_for_every_back_end_as_the_configuration_says_it() {
    let bench = bench();
    bench.attach(A, 1);
    bench.unit.write_config(36, &[1]);
    assert!(matches!(
        bench.backend.translation_of(A),
        Translation::Domain(_)
    ));
    assert_eq!(bench.backend.translation_of(B), Translation::Identity);
    bench.detach(A, 1);
    assert_eq!(bench.backend.translation_of(A), Translation::Identity);
    bench.unit.write_config(36, &[0]);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.backend.translation_of(B), Translation::Blocked);
}

#[test]
fn must_ignore_reserved_of_the_head_and_should_set_that_of_the_tail_to_zero() {
    let bench = bench();
    let requests = [
        attach(A.0.into(), 1, 0),
        map(1, (0, PAGE - 1), PAGE, RW),
        unmap(1, 0, PAGE - 1),
        detach(A.0.into(), 1),
    ];
    for mut request in requests {
        request[1..4].fill(0xff);
        // `send` looks at the tail.
        assert_eq!(bench.send(&request), Status::Ok);
    }
}
