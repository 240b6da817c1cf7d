//! Invalidations are one array per HWPT (`linux.md`, A5).

use super::*;

#[test]
fn an_array_that_took_effect_in_part_says_how_much() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.host.apply(Target::rid(B), stage1(0x2000)).unwrap();
    let batch = [
        pages(Scope::Endpoint(B), 0x1000, 1),
        pages(Scope::Endpoint(A), 0x1000, 1),
        pages(Scope::Endpoint(A), 0x3000, 1),
        pages(Scope::Endpoint(B), 0x3000, 1),
    ];
    // The first array is A's: one of its two entries is taken.
    bench.fake.world().take = Some(1);
    assert_eq!(bench.host.invalidate(&batch), 2);
    bench.fake.world().fail_all = Some(("invalidate", libc::EIO));
    assert_eq!(bench.host.invalidate(&batch), 0);
}

#[test]
fn an_invalidation_of_what_needs_none_is_done_at_once() {
    let bench = Bench::new();
    bench
        .host
        .apply(Target::rid(A), Translation::Identity)
        .unwrap();
    bench.fake.reset_calls();
    let batch = [
        everything(Scope::All),
        everything(Scope::Endpoint(Rid(0xffff))),
        everything(Scope::Target(pasid(A, 9))),
    ];
    assert_eq!(bench.host.invalidate(&batch), 3);
    assert_eq!(bench.fake.calls(), BTreeMap::new());
}
