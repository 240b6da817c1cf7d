//! How many calls of the kernel an operation takes.

use super::*;
use crate::HwptId;

#[test]
fn guest_ram_is_mapped_with_one_call_per_region() {
    let bench = Bench::empty();
    let calls = BTreeMap::from([("ioas_alloc", 1), ("allow_iovas", 1), ("map_file", 2)]);
    assert_eq!(bench.fake.calls(), calls);
    bench.add(A, |_| {}).unwrap();
    bench.add(B, |_| {}).unwrap();
    assert_eq!(bench.fake.calls()["map_file"], 2, "not once per device");
}

#[test]
fn a_nested_switch_is_one_alloc_and_one_attach() {
    let bench = Bench::new();
    for (index, root) in [0x1000, 0x2000].into_iter().enumerate() {
        bench.fake.reset_calls();
        bench.host.apply(pasid(A, 5), stage1(root)).unwrap();
        let mut calls = BTreeMap::from([("hwpt_alloc", 1), ("attach", 1)]);
        if index > 0 {
            calls.insert("destroy", 1);
        }
        assert_eq!(bench.fake.calls(), calls);
    }
    bench.check();
}

#[test]
fn asking_again_for_what_is_in_force_makes_no_call() {
    let bench = Bench::new();
    for translation in [stage1(0x1000), Translation::Identity, Translation::Blocked] {
        bench.host.apply(Target::rid(A), translation).unwrap();
        bench.fake.reset_calls();
        bench.host.apply(Target::rid(A), translation).unwrap();
        assert_eq!(bench.fake.calls(), BTreeMap::new());
    }
}

#[test]
fn the_kernels_object_of_a_target_is_told_and_equal_tables_have_one() {
    let bench = Bench::new();
    let told = |target| bench.host.hwpt(target);
    assert_eq!(told(Target::rid(A)), None, "blocked from the start");
    let targets = [Target::rid(A), Target::rid(B), pasid(A, 1)];
    for target in targets {
        bench.host.apply(target, stage1(0x1000)).unwrap();
    }
    let HwptId(id) = told(targets[0]).unwrap();
    assert!(bench.fake.world().objects.contains_key(&id), "{id}");
    assert!(
        targets
            .iter()
            .all(|&target| told(target) == Some(HwptId(id)))
    );
    bench.host.apply(targets[2], stage1(0x2000)).unwrap();
    assert_ne!(told(targets[2]), Some(HwptId(id)));
    bench.host.apply(targets[0], Translation::Blocked).unwrap();
    assert_eq!(told(targets[0]), None);
    assert_eq!(told(Target::rid(Rid::new(9, 9, 1))), None);
}

#[test]
fn equal_tables_are_one_object_and_one_call_per_invalidation() {
    let bench = Bench::new();
    let before = bench.objects();
    let targets = [Target::rid(A), Target::rid(B), pasid(A, 1), pasid(B, 7)];
    for target in targets {
        bench.host.apply(target, stage1(0x1000)).unwrap();
    }
    assert_eq!(bench.objects(), before + 1);
    assert_eq!(bench.host.objects().translations, 1);
    bench.fake.reset_calls();
    let batch = targets.map(|target| pages(Scope::Target(target), 0x5000, 2));
    assert_eq!(bench.host.invalidate(&batch), 4);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("invalidate", 1)]));
    assert_eq!(bench.fake.world().invalidated[0].1.len(), 1);
    bench.check();
}

#[test]
fn one_doorbell_is_one_array_per_table_whatever_its_length() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.host.apply(Target::rid(B), stage1(0x2000)).unwrap();
    bench.fake.reset_calls();
    let batch = (0..10_000)
        .map(|page| pages(Scope::All, page * 0x1000, 1))
        .collect::<Vec<_>>();
    assert_eq!(bench.host.invalidate(&batch), batch.len());
    assert_eq!(bench.fake.calls(), BTreeMap::from([("invalidate", 2)]));
    // Beyond its bound an array says "everything".
    let world = bench.fake.world();
    assert!(
        world
            .invalidated
            .iter()
            .all(|(_, entries)| entries.len() == 1)
    );
}

#[test]
fn a_domain_is_mapped_once_for_all_its_endpoints_and_unmapped_with_one_call() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    for rid in [A, B] {
        bench
            .host
            .apply(Target::rid(rid), Translation::Domain(domain))
            .unwrap();
    }
    bench.fake.reset_calls();
    let mappings = (0..8)
        .map(|n| mapping(0x10_0000 + n * 0x1000, n * 0x2000, 0x1000, Access::READ))
        .collect::<Vec<_>>();
    bench.host.map(domain, &mappings).unwrap();
    assert_eq!(bench.fake.calls(), BTreeMap::from([("copy", 8)]));
    assert_eq!(bench.host.objects().mappings, 8);
    bench.fake.reset_calls();
    let removed = bench.host.unmap(domain, Iova(0), Iova(u64::MAX)).unwrap();
    assert_eq!(removed, 0x8000);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("unmap", 1)]));
    bench.check();
}
