//! What the kernel does not check (`linux.md`, A3).

use super::*;

#[test]
fn what_the_kernel_does_not_check_is_refused_here_without_a_call() {
    let bench = Bench::new();
    let table = |root, width, sre, eafe| {
        Translation::Stage1(Stage1 {
            root: Gpa(root),
            width,
            sre,
            wpe: true,
            eafe,
            ere: true,
            pwsnp: true,
            fs1gp: true,
        })
    };
    let bad = [
        table(0x1004, 48, false, false), // would set bits of the PASID entry
        table(1 << 48, 48, false, false),
        table(0x1000, 57, false, false), // no FL5LP
        table(0x1000, 39, false, false),
        table(0x1000, 0, false, false),
        table(0x1000, 48, true, false), // no SRS
        table(0x1000, 48, false, true), // no EAFS
    ];
    for bad in bad {
        bench.host.apply(Target::rid(A), stage1(0x5000)).unwrap();
        bench.fake.reset_calls();
        let refused = bench.host.apply(Target::rid(A), bad);
        assert!(
            matches!(refused, Err(Refused::NotOffered { .. })),
            "{bad:?}"
        );
        // Blocked, and nothing else asked for.
        let calls = bench.fake.calls();
        assert_eq!(calls, BTreeMap::from([("detach", 1), ("destroy", 1)]));
        assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
        bench.check();
    }
}

#[test]
fn pasids_that_the_kernel_would_take_and_ignore_are_refused() {
    let bench = Bench::new();
    let bare = Rid::new(0, 5, 0);
    bench.add(bare, |device| device.pasid_bits = 0).unwrap();
    bench.host.claim(bare, bench.sink.clone()).unwrap();
    // No PASIDs: the kernel would say yes and do nothing (`linux.md`, A9). 0: VFIO's name for no PASID.
    for target in [pasid(bare, 1), pasid(A, 0), pasid(A, 1 << 20)] {
        bench.fake.reset_calls();
        let refused = bench.host.apply(target, stage1(0x1000));
        assert!(matches!(
            refused,
            Err(Refused::NotOffered { what: "PASID", .. })
        ));
        assert_eq!(bench.fake.calls(), BTreeMap::new());
    }
    assert_eq!(bench.host.pasid_bits(bare), 0);
    assert_eq!(bench.host.pasid_bits(A), 20);
    bench.check();
}

#[test]
fn a_guests_own_nesting_needs_three_stages_and_is_refused() {
    let bench = Bench::new();
    let Translation::Stage1(inner) = stage1(0x1000) else {
        unreachable!()
    };
    let nested = Translation::Nested {
        stage1: inner,
        stage2: STAGE2,
    };
    let refused = bench.host.apply(Target::rid(A), nested);
    assert!(matches!(
        refused,
        Err(Refused::NotOffered { what: "nested", .. })
    ));
    assert!(!bench.host.capabilities().nested);
}
