//! Second-stage tables, mirrored.

use super::*;

impl Bench {
    /// The tables of [`Bench::tables`], still empty and mirrored for A.
    fn mirrored() -> Self {
        let bench = Self::new();
        bench.tables();
        bench.mirror_for(A);
        bench
    }

    fn mirror_for(&self, rid: Rid) {
        let applied = self
            .host
            .apply(Target::rid(rid), Translation::Stage2(STAGE2));
        applied.unwrap();
    }

    /// (iova, last, gpa, writable) of A's mirror.
    fn mirror(&self) -> Vec<(u64, u64, u64, bool)> {
        let all = self.areas(A).into_iter();
        all.map(|(iova, area)| (iova, area.last, area.gpa, area.access.write))
            .collect()
    }
}

#[test]
fn a_second_stage_table_is_mirrored_with_its_permissions() {
    let bench = Bench::new();
    bench.tables();
    bench.page(0, 0x20_0000 | 3);
    bench.page(1, 0x30_0000 | 1);
    bench.page(3, 0x40_0000); // not present
    bench.mirror_for(A);
    assert_eq!(
        bench.mirror(),
        [
            (0, 0xfff, 0x20_0000, true),
            (0x1000, 0x1fff, 0x30_0000, false)
        ]
    );
    bench.check();
}

#[test]
fn a_mirror_follows_page_selective_invalidations_with_one_call_per_run() {
    let bench = Bench::mirrored();
    for index in 0..64 {
        bench.page(index, (0x20_0000 + index * 0x1000) | 3);
    }
    bench.fake.reset_calls();
    let scope = Scope::Target(Target::rid(A));
    assert_eq!(bench.host.invalidate(&[pages(scope, 0, 64)]), 1);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("copy", 1)]));
    assert_eq!(bench.mirror(), [(0, 0x3_ffff, 0x20_0000, true)]);
    // Again: nothing changed, nothing called.
    bench.fake.reset_calls();
    assert_eq!(bench.host.invalidate(&[everything(scope)]), 1);
    assert_eq!(bench.fake.calls(), BTreeMap::new());
    for index in 0..64 {
        bench.page(index, 0);
    }
    assert_eq!(bench.host.invalidate(&[pages(scope, 0, 64)]), 1);
    assert_eq!(bench.fake.calls(), BTreeMap::from([("unmap", 1)]));
    assert_eq!(bench.mirror(), []);
}

#[test]
fn a_part_of_a_run_that_goes_takes_only_itself_along() {
    let bench = Bench::mirrored();
    for index in 0..4 {
        bench.page(index, (0x20_0000 + index * 0x1000) | 3);
    }
    let scope = Scope::Endpoint(A);
    bench.host.invalidate(&[pages(scope, 0, 4)]);
    bench.page(1, 0);
    assert_eq!(bench.host.invalidate(&[pages(scope, 0x1000, 1)]), 1);
    assert_eq!(
        bench.mirror(),
        [
            (0, 0xfff, 0x20_0000, true),
            (0x2000, 0x3fff, 0x20_2000, true)
        ]
    );
    bench.check();
}

#[test]
fn a_changed_target_or_permission_replaces_the_mapping() {
    let bench = Bench::new();
    bench.tables();
    bench.page(0, 0x20_0000 | 3);
    bench.mirror_for(A);
    let scope = Scope::Endpoint(A);
    for entry in [0x20_0000 | 1, 0x30_0000 | 3, 0x30_0000 | 2] {
        bench.page(0, entry);
        bench.host.invalidate(&[pages(scope, 0, 1)]);
        let area = bench.areas(A)[0].1;
        assert_eq!(area.gpa, entry & !0xfff);
        let access = Access {
            read: entry & 1 != 0,
            write: entry & 2 != 0,
        };
        assert_eq!(area.access, access);
    }
}

#[test]
fn a_large_leaf_is_mirrored_where_there_is_memory_and_not_where_addresses_are_reserved() {
    let bench = Bench::new();
    // 1 GiB leaves: IOVA 0 to GPA 0 (16 MiB of it is RAM); IOVA 3 GiB (it has the MSI window) to
    // GPA 4 GiB, where RAM ends after 16 MiB, before the window.
    bench.poke(0x10_0000, 0x10_1000 | 3);
    bench.poke(0x10_1000, 0x83);
    bench.poke(0x10_1018, (4096 * MIB) | 0x83);
    bench.mirror_for(A);
    assert_eq!(
        bench.mirror(),
        [
            (0, 16 * MIB - 1, 0, true),
            (3072 * MIB, 3088 * MIB - 1, 4096 * MIB, true)
        ]
    );
    // A 2 MiB leaf of RAM right over the window is cut there.
    bench.poke(0x10_1018, 0x10_2000 | 3);
    bench.poke(0x10_2000 + (0xfec0_0000 >> 21 & 511) * 8, 0x20_0000 | 0x83);
    bench.poke(0x10_2000 + (0xfee0_0000 >> 21 & 511) * 8, 0x20_0000 | 0x83);
    bench.host.invalidate(&[everything(Scope::All)]);
    assert_eq!(
        bench.mirror()[1..],
        [
            (0xfec0_0000, 0xfedf_ffff, 0x20_0000, true),
            (0xfef0_0000, 0xfeff_ffff, 0x30_0000, true)
        ]
    );
    bench.check();
}

#[test]
fn a_table_that_points_at_itself_is_bounded_and_blocks_only_its_user() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(B), stage1(0x1000)).unwrap();
    for index in 0..512 {
        bench.poke(0x10_0000 + index * 8, 0x10_0000 | 3);
    }
    let start = Instant::now();
    let refused = bench
        .host
        .apply(Target::rid(A), Translation::Stage2(STAGE2));
    assert!(matches!(refused, Err(Refused::NoRoom { .. })));
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
    assert!(start.elapsed() < Duration::from_secs(600));
    bench.check();
}

#[test]
fn a_mirror_that_cannot_follow_says_so() {
    let bench = Bench::mirrored();
    bench.page(0, 0x20_0000 | 3);
    bench.fake.world().fail_all = Some(("copy", libc::ENOMEM));
    let batch = [
        pages(Scope::Endpoint(B), 0, 1),
        pages(Scope::Endpoint(A), 0, 1),
    ];
    assert_eq!(bench.host.invalidate(&batch), 1);
    bench.fake.world().fail_all = None;
    assert_eq!(bench.host.invalidate(&batch), 2);
    assert_eq!(bench.mirror().len(), 1);
}

#[test]
fn a_mirror_is_shared_by_equal_tables_and_gone_with_its_last_user() {
    let bench = Bench::new();
    let before = bench.objects();
    bench.tables();
    for rid in [A, B] {
        bench.mirror_for(rid);
    }
    assert_eq!(bench.objects(), before + 2, "one address space, one table");
    for rid in [A, B] {
        bench
            .host
            .apply(Target::rid(rid), Translation::Identity)
            .unwrap();
    }
    assert_eq!(bench.objects(), before);
}
