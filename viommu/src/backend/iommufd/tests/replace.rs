//! Replacing a table, and what a failed one leaves (`linux.md`, A4).

use super::*;

#[test]
fn a_failed_replace_ends_blocked_and_the_record_says_so() {
    for target in [Target::rid(A), pasid(A, 3)] {
        let bench = Bench::new();
        bench.host.apply(target, Translation::Identity).unwrap();
        bench.fake.world().fail_all = Some(("attach", libc::ENOMEM));
        bench.host.apply(target, stage1(0x1000)).unwrap_err();
        assert_eq!(bench.host.translation(target), Translation::Blocked);
        bench.check();
        // iommufd would have taken the old table for attached and done nothing.
        bench.fake.world().fail_all = None;
        bench.host.apply(target, Translation::Identity).unwrap();
        assert!(!bench.device(A).hardware.is_empty());
        bench.check();
    }
}

#[test]
fn a_replace_that_failed_for_want_of_a_domain_id_is_repaired_by_detach_and_attach() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    let count = bench.fake.world().count;
    // alloc, then the replace
    bench.fake.world().fail_at = Some((count + 1, libc::ENOSPC));
    bench.host.apply(pasid(A, 1), stage1(0x1000)).unwrap();
    bench.fake.world().fail_at = None;
    bench
        .host
        .apply(Target::rid(B), Translation::Identity)
        .unwrap();
    let count = bench.fake.world().count;
    bench.fake.world().fail_at = Some((count + 1, libc::ENOSPC));
    bench.fake.reset_calls();
    bench.host.apply(Target::rid(B), stage1(0x2000)).unwrap();
    assert_eq!(
        bench.fake.calls(),
        BTreeMap::from([("hwpt_alloc", 1), ("attach", 2), ("detach", 1)])
    );
    bench.check();
}

#[test]
fn a_target_that_cannot_be_detached_is_blocked_with_its_device_stopped_until_it_can() {
    let bench = Bench::new();
    bench
        .host
        .apply(Target::rid(A), Translation::Identity)
        .unwrap();
    bench.fake.world().fail_all = Some(("detach", libc::EIO));
    bench
        .host
        .apply(Target::rid(A), Translation::Blocked)
        .unwrap_err();
    assert!(bench.device(A).stopped);
    // Not taken for what is in force already: the device is stopped.
    bench
        .host
        .apply(Target::rid(A), Translation::Identity)
        .unwrap_err();
    let blocked = || bench.host.translation(Target::rid(A)) == Translation::Blocked;
    assert!(blocked() && bench.device(A).stopped);
    // Nothing under it is freed while the kernel has it.
    assert_eq!(bench.host.objects().targets, 1);
    bench.host.release(A);
    bench.host.claim(A, bench.sink.clone()).unwrap_err();
    assert!(blocked() && bench.device(A).stopped);
    bench.fake.world().fail_all = None;
    bench.host.claim(A, bench.sink.clone()).unwrap();
    assert!(blocked() && !bench.device(A).stopped);
    bench.check();
}

#[test]
fn switching_between_tables_with_page_requests_leaks_no_reference() {
    let bench = Bench::new();
    for root in 1..6 {
        bench
            .host
            .apply(Target::rid(A), stage1(root << 12))
            .unwrap();
        bench.host.apply(pasid(A, 2), stage1(root << 12)).unwrap();
        bench.check();
    }
}

#[test]
fn an_attach_during_a_reset_waits_for_its_end() {
    let bench = Bench::new();
    let id = u32::from(A.0);
    bench.fake.world().devices.get_mut(&id).unwrap().in_reset = 12;
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.check();
    // But not for ever.
    bench.fake.world().devices.get_mut(&id).unwrap().in_reset = usize::MAX;
    bench
        .host
        .apply(Target::rid(A), stage1(0x2000))
        .unwrap_err();
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
}

#[test]
fn when_domain_ids_run_out_the_target_is_blocked_and_the_rest_goes_on() {
    let bench = Bench::new();
    bench.fake.world().iommus[0].domains = 2;
    bench.host.apply(pasid(A, 1), stage1(0x1000)).unwrap();
    bench.host.apply(pasid(A, 2), stage1(0x2000)).unwrap();
    bench.host.apply(pasid(A, 3), stage1(0x3000)).unwrap_err();
    bench.check();
    bench.host.apply(pasid(A, 1), Translation::Blocked).unwrap();
    bench.host.apply(pasid(A, 3), stage1(0x3000)).unwrap();
    bench.check();
}
