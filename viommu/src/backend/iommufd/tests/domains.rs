//! Domains: an address space of their own (`linux.md`, A8).

use super::*;

#[test]
fn a_mapping_without_write_is_read_only_in_the_hardware() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    bench
        .host
        .map(domain, &[mapping(0x1000, 0x2000, 0x1000, Access::READ)])
        .unwrap();
    bench
        .host
        .apply(Target::rid(A), Translation::Domain(domain))
        .unwrap();
    let area = FakeArea {
        last: 0x1fff,
        gpa: 0x2000,
        access: Access::READ,
    };
    assert_eq!(bench.areas(A), [(0x1000, area)]);
    bench.check();
}

#[test]
fn mappings_are_added_all_or_none_whichever_call_fails() {
    for at in 0..3 {
        let bench = Bench::new();
        let domain = bench.host.create_domain().unwrap();
        let count = bench.fake.world().count;
        bench.fake.world().fail_at = Some((count + at, libc::ENOMEM));
        let three = [0u64, 1, 2].map(|n| mapping(n << 20, n << 20, 0x1000, Access::READ_WRITE));
        bench.host.map(domain, &three).unwrap_err();
        assert_eq!(bench.host.objects().mappings, 0);
        bench.fake.world().fail_at = None;
        bench.host.map(domain, &three).unwrap();
    }
}

#[test]
fn what_cannot_be_mapped_is_refused_with_the_reason() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    let map = |iova, gpa, length| {
        let result = bench
            .host
            .map(domain, &[mapping(iova, gpa, length, Access::READ)]);
        result.unwrap_err().to_string()
    };
    assert!(map(0, 16 * MIB, 0x1000).contains("not mappable"));
    assert!(map(0, 15 * MIB, 2 * MIB).contains("not mappable"));
    assert!(map(0xfee0_0000, 0, 0x1000).contains("MSI doorbell"));
    assert!(map(1 << 48, 0, 0x1000).contains("reserved"));
    assert!(map(u64::MAX - 0xfff, 0, 0x2000).contains("wrap"));
    assert!(map(0x800, 0, 0x1000).contains("multiples"));
    assert!(map(0, 0, 0).contains("multiples"));
    assert_eq!(bench.host.objects().mappings, 0);
    bench
        .host
        .map(domain, &[mapping(0, 0, 0x3000, Access::READ)])
        .unwrap();
    assert!(map(0x2000, 0, 0x1000).contains("already mapped"));
}

#[test]
fn unmap_touches_no_mapping_that_reaches_out_of_the_range() {
    let bench = Bench::new();
    let domain = bench.host.create_domain().unwrap();
    let both = [
        mapping(0x1000, 0, 0x2000, Access::READ),
        mapping(0x4000, 0, 0x2000, Access::READ),
    ];
    bench.host.map(domain, &both).unwrap();
    let unmap = |first, last| bench.host.unmap(domain, Iova(first), Iova(last)).unwrap();
    assert_eq!(unmap(0x2000, 0x5fff), 0x2000);
    assert_eq!(unmap(0, 0x1fff), 0);
    assert_eq!(unmap(0x1000, 0x2fff), 0x2000);
    assert!(matches!(
        bench.host.unmap(DomainId(99), Iova(0), Iova(1)),
        Err(Refused::NoDomain(_))
    ));
}

#[test]
fn a_destroyed_domain_blocks_its_users_and_leaves_nothing() {
    let bench = Bench::new();
    let before = bench.objects();
    let domain = bench.host.create_domain().unwrap();
    for target in [Target::rid(A), pasid(B, 2)] {
        bench
            .host
            .apply(target, Translation::Domain(domain))
            .unwrap();
    }
    bench.host.destroy_domain(domain);
    assert_eq!(bench.host.translation(pasid(B, 2)), Translation::Blocked);
    assert_eq!(bench.objects(), before);
    bench.check();
}
