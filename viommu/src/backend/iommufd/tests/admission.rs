//! Who is let in: what a device and its IOMMU must be, and what is refused.

use super::*;

#[test]
fn a_device_is_blocked_from_the_moment_it_exists() {
    let bench = Bench::empty();
    bench.add(A, |_| {}).unwrap();
    assert_eq!(bench.device(A).hardware, BTreeMap::new());
    bench.host.claim(A, bench.sink.clone()).unwrap();
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
    bench.check();
}

#[test]
fn a_reserved_region_in_guest_ram_is_refused_before_the_guest_starts() {
    let bench = Bench::empty();
    let refused = bench.add(A, |device| device.reserved.push((8 * MIB, 9 * MIB - 1)));
    assert!(matches!(refused, Err(Unfit::ReservedByDevice(rid)) if rid == A));
    assert_eq!(bench.objects(), 1, "only the guest's memory is left");
}

/// Seed of the rule: a device that goes straight to a nested table gets its doorbell from nowhere,
/// unless the parent has it. `Tables::get` takes a [`Parent`](super::parent::Parent), which only
/// admission makes; here the kernel leaves the doorbell out.
#[test]
fn no_nested_table_is_made_where_the_parent_has_no_doorbell() {
    for half in [None, Some((DOORBELLS.0, DOORBELLS.1 - 0x1000))] {
        let bench = Bench::empty();
        let refused = bench.add(A, |device| device.reserved = half.into_iter().collect());
        let error = refused.unwrap_err();
        assert!(
            matches!(error, Unfit::Doorbell { endpoint: A, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("intremap=on"), "{error}");
        assert!(bench.host.claim(A, bench.sink.clone()).is_err());
        assert!(bench.host.apply(Target::rid(A), stage1(0x1000)).is_err());
        let nested = |object: &Object| matches!(object, Object::Nested { .. });
        assert!(!bench.fake.world().objects.values().any(nested));
        assert_eq!(
            bench.device(A).record,
            BTreeMap::new(),
            "nothing is attached"
        );
    }
}

/// The parent is attached before anything nested, also for a device that its guest puts straight
/// into a nested table; and what was enforced is kept whatever the guest switches to.
#[test]
fn doorbell_and_reserved_regions_are_enforced_before_and_across_every_switch() {
    let bench = Bench::empty();
    bench
        .add(A, |device| device.reserved.push((512 * MIB, 513 * MIB - 1)))
        .unwrap();
    let calls = bench.fake.calls();
    assert_eq!(
        (calls.get("attach"), calls.get("iova_ranges")),
        (Some(&1), Some(&1))
    );
    bench.host.claim(A, bench.sink.clone()).unwrap();
    let domain = bench.host.create_domain().unwrap();
    let at = Target::rid(A);
    let kept = |bench: &Bench| {
        let reserved = bench.host.reserved();
        assert!(reserved.overlapping(DOORBELLS.0, DOORBELLS.1).is_some());
        for (first, _) in [DOORBELLS, (512 * MIB, 0)] {
            let over = mapping(first, 0, 0x1000, Access::READ_WRITE);
            assert!(
                bench.host.map(domain, &[over]).is_err(),
                "{first:#x} was mapped"
            );
        }
    };
    for translation in [
        stage1(0x1000),
        Translation::Domain(domain),
        stage1(0x2000),
        Translation::Identity,
        stage1(0x1000),
        Translation::Blocked,
        Translation::Domain(domain),
    ] {
        bench.host.apply(at, translation).unwrap();
        kept(&bench);
        bench.check();
    }
}

#[test]
fn reserved_regions_hold_while_the_device_is_blocked_and_after_it_is_gone() {
    let bench = Bench::empty();
    bench
        .add(A, |device| device.reserved.push((512 * MIB, 513 * MIB - 1)))
        .unwrap();
    let file = TempFile::new().unwrap();
    let place = |gpa| {
        use std::os::fd::AsFd;
        bench
            .host
            .add_device_memory(gpa, file.as_file().as_fd(), 0, MIB)
    };
    // The kernel would take both: it knows the regions of attached devices only.
    assert!(matches!(place(512 * MIB), Err(Unfit::Reserved(_))));
    bench.host.remove_device(A);
    assert!(matches!(place(512 * MIB), Err(Unfit::Reserved(_))));
    let reserved = bench.host.reserved();
    let first_in = |first, last| reserved.overlapping(first, last).map(|region| region.first);
    assert_eq!(first_in(DOORBELLS.0, DOORBELLS.1), Some(DOORBELLS.0));
    assert_eq!(first_in(1 << 48, u64::MAX), Some(1 << 48));
    assert_eq!(first_in(0, 511 * MIB), None);
    place(514 * MIB).unwrap();
    bench.host.remove_device_memory(514 * MIB).unwrap();
    place(514 * MIB).unwrap();
}

#[test]
fn iommus_that_differ_get_parents_of_their_own_over_one_mapping_of_ram() {
    let bench = Bench::empty();
    bench.fake.world().iommus.push(FakeIommu {
        unit: UNIT,
        domains: 64,
        kind: 1,
    });
    bench.add(A, |_| {}).unwrap();
    bench.add(B, |device| device.iommu = 1).unwrap();
    let parents = |bench: &Bench| {
        let world = bench.fake.world();
        world
            .objects
            .values()
            .filter(|object| matches!(object, Object::Paging { ioas: 1, .. }))
            .count()
    };
    assert_eq!(parents(&bench), 2);
    assert_eq!(bench.fake.calls()["map_file"], 2);
    for rid in [A, B] {
        bench.host.claim(rid, bench.sink.clone()).unwrap();
        bench.host.apply(Target::rid(rid), stage1(0x1000)).unwrap();
    }
    bench.check();
    bench.host.remove_device(B);
    assert_eq!(parents(&bench), 1);
}

#[test]
fn without_nesting_in_the_kernel_guests_first_stage_is_never_offered() {
    let bench = Bench::empty();
    bench.fake.world().iommus[0].unit.ecap &= !(1 << 26);
    bench.add(A, |_| {}).unwrap();
    bench.host.claim(A, bench.sink.clone()).unwrap();
    let has = bench.host.capabilities();
    assert!(!has.stage1 && !has.page_requests && has.stage2 == [true; 3]);
    bench.fake.reset_calls();
    let refused = bench.host.apply(Target::rid(A), stage1(0x1000));
    assert!(matches!(
        refused,
        Err(Refused::NotOffered { what: "stage1", .. })
    ));
    assert_eq!(bench.fake.calls(), BTreeMap::new());
}

#[test]
fn a_parent_has_what_cannot_be_added_later_wherever_the_host_can() {
    let kinds = |ecap: u64| {
        let bench = Bench::empty();
        bench.fake.world().iommus[0].unit.ecap = ecap;
        let with_pasid = ecap & 1 << 40 != 0;
        bench
            .add(A, |device| {
                device.pasid_bits = if with_pasid { 20 } else { 0 }
            })
            .unwrap();
        let world = bench.fake.world();
        let kinds = world.objects.values().filter_map(|object| match object {
            &Object::Paging {
                nest_parent,
                dirty,
                pasid,
                ..
            } => Some((nest_parent, dirty, pasid)),
            _ => None,
        });
        kinds.collect::<Vec<_>>()
    };
    assert_eq!(kinds(UNIT.ecap), [(true, true, true)]);
    assert_eq!(kinds(UNIT.ecap & !(1 << 45)), [(true, false, true)]);
    assert_eq!(kinds(UNIT.ecap & !(1 << 26)), [(false, true, true)]);
    assert_eq!(kinds(UNIT.ecap & !(1 << 40)), [(true, true, false)]);
    assert_eq!(kinds(0), [(false, false, false)]);
}

#[test]
fn the_address_width_is_the_narrowest_of_all_devices() {
    let bench = Bench::empty();
    let mut narrow = UNIT;
    narrow.cap = narrow.cap & !(0x3f << 16) | 46 << 16;
    bench.fake.world().iommus.push(FakeIommu {
        unit: narrow,
        domains: 64,
        kind: 1,
    });
    bench.add(A, |_| {}).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 48);
    bench.add(B, |device| device.iommu = 1).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 47);
}

#[test]
fn the_address_width_is_what_domains_have_too() {
    let bench = Bench::empty();
    // No SLADS: the kernel gives domains first-stage tables, of which half can be used.
    bench.fake.world().iommus[0].unit.ecap &= !(1 << 45);
    bench.add(A, |_| {}).unwrap();
    assert_eq!(bench.host.capabilities().address_width, 47);
}

#[test]
fn a_later_device_that_has_less_than_was_offered_is_refused_with_field_and_values() {
    let bench = Bench::empty();
    bench.add(A, |_| {}).unwrap();
    bench.host.freeze(bench.host.capabilities());
    let mut narrow = UNIT;
    narrow.cap = narrow.cap & !(0x3f << 16) | 38 << 16;
    bench.fake.world().iommus.push(FakeIommu {
        unit: narrow,
        domains: 64,
        kind: 1,
    });
    let refused = bench.add(B, |device| device.iommu = 1).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("address_width") && text.contains("39") && text.contains("48"),
        "{text}"
    );
    assert_eq!(bench.host.objects(), Objects::default());
    bench.check();
}

#[test]
fn the_locked_memory_limit_is_named() {
    let fake = Arc::new(Fake::default());
    fake.world().fail_all = Some(("map_file", libc::ENOMEM));
    let refused = HostIommu::new(fake.clone(), ram()).unwrap_err();
    assert!(matches!(refused, Unfit::LockedMemory { .. }));
    assert_eq!(fake.world().objects.len(), 0);
    // With the first table memory is pinned.
    let bench = Bench::empty();
    bench.fake.world().fail_all = Some(("hwpt_alloc", libc::ENOMEM));
    let refused = bench.add(A, |_| {}).unwrap_err();
    let text = refused.to_string();
    assert!(
        text.contains("locked in memory") && text.contains("ulimit -l"),
        "{text}"
    );
}

#[test]
fn admission_that_fails_at_any_call_leaves_nothing() {
    for at in 0.. {
        let bench = Bench::empty();
        bench.add(A, |_| {}).unwrap();
        let before = bench.objects();
        let (start, end) = {
            let mut world = bench.fake.world();
            world.fail_at = Some((world.count + at, libc::EIO));
            (world.count, world.count + at)
        };
        let result = bench.add(B, |device| device.pri = false);
        let passed = bench.fake.world().count <= end;
        assert!(bench.fake.world().count > start);
        if passed {
            assert!(result.is_ok());
            return;
        }
        assert!(
            result.is_err(),
            "call {at} failed and the device was admitted"
        );
        // A detach that fails leaves the device attached: closing it is the caller's next step.
        let detached = bench.device(B).record.is_empty();
        assert!(detached || result.unwrap_err().to_string().contains("DETACH"));
        assert!(bench.objects() <= before + 1);
    }
}

#[test]
fn a_device_that_cannot_be_detached_after_its_admission_is_stopped() {
    let bench = Bench::empty();
    bench.fake.world().fail_all = Some(("detach", libc::EIO));
    bench.add(A, |_| {}).unwrap_err();
    let device = bench.device(A);
    assert!(device.hardware.is_empty() || device.stopped);
}

#[test]
fn devices_of_one_group_of_the_host_are_not_behind_a_viommu() {
    let bench = Bench::empty();
    let in_group = |number| move |device: &mut FakeDevice| device.group = Some(number);
    bench.add(A, in_group(7)).unwrap();
    // Two that no vIOMMU stands before are no matter: both reach all of guest memory.
    bench.host.let_through(A, bench.sink.clone()).unwrap();
    bench.add(B, in_group(7)).unwrap();
    bench.host.let_through(B, bench.sink.clone()).unwrap();
    for rid in [A, B] {
        assert_eq!(
            bench.host.translation(Target::rid(rid)),
            Translation::Identity
        );
        bench.host.release(rid);
    }
    for (endpoint, other) in [(A, B), (B, A)] {
        let refused = bench.host.claim(endpoint, bench.sink.clone()).unwrap_err();
        let Refused::SharesGroup {
            endpoint: it,
            other: mate,
        } = refused
        else {
            panic!("{refused}");
        };
        assert_eq!((it, mate), (endpoint, other));
        assert!(!bench.device(endpoint).stopped);
    }
    // Alone, or beside one of another group, it may be.
    bench.host.remove_device(B);
    bench.host.claim(A, bench.sink.clone()).unwrap();
    bench.add(B, in_group(8)).unwrap();
    bench.host.claim(B, bench.sink.clone()).unwrap();
    bench.host.remove_device(B);
    // And then none of its group comes to it, until it is in front of nothing again.
    let attached = bench.device(A).hardware;
    let Err(Unfit::SharesGroup { endpoint, other }) = bench.add(B, in_group(7)) else {
        panic!("it was taken");
    };
    assert_eq!((endpoint, other), (B, A));
    assert_eq!(bench.device(A).hardware, attached);
    assert!(bench.device(B).hardware.is_empty());
    bench.host.release(A);
    bench.add(B, in_group(7)).unwrap();
}
