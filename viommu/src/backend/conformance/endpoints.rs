//! What is in force for endpoints and their PASIDs.

use std::sync::Arc;

use super::super::{Invalidation, InvalidationRange, Objects, Refused, Scope, Translation};
use super::{Harness, Heard, all_translations, claim, targets};
use crate::{DomainId, Iova, Rid, Target};

pub(super) fn blocked_at_first(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    claim(harness, endpoint);
    for target in targets(harness, endpoint) {
        assert_eq!(harness.backend().translation(target), Translation::Blocked);
    }
    let objects = harness.backend().objects();
    assert_eq!((objects.endpoints, objects.targets), (1, 0));
}

pub(super) fn one_claim(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let again = backend.claim(endpoint, Arc::new(Heard::default()));
    assert!(matches!(again, Err(Refused::Claimed(rid)) if rid == endpoint));
    claim(harness, other);
    backend.release(endpoint);
    claim(harness, endpoint);
    let unknown = (0..=u16::MAX)
        .map(Rid)
        .find(|rid| ![endpoint, other].contains(rid));
    let unknown = unknown.expect("65536 is more than two");
    let refused = backend.claim(unknown, Arc::new(Heard::default()));
    assert!(matches!(refused, Err(Refused::NoEndpoint(rid)) if rid == unknown));
}

pub(super) fn unclaimed_is_refused(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, other);
    for translation in all_translations(harness) {
        for target in targets(harness, endpoint) {
            let refused = backend.apply(target, translation);
            assert!(matches!(refused, Err(Refused::NoEndpoint(rid)) if rid == endpoint));
            assert_eq!(backend.translation(target), Translation::Blocked);
        }
    }
}

pub(super) fn applied_is_in_force(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let all = all_translations(harness);
    for target in targets(harness, endpoint) {
        // Every change from one to another, and from and to Blocked.
        for &from in &all {
            for &to in all.iter().chain([&Translation::Blocked]) {
                backend.apply(target, from).expect("is accepted");
                assert_eq!(backend.translation(target), from);
                backend.apply(target, to).expect("is accepted");
                assert_eq!(backend.translation(target), to);
            }
        }
        backend
            .apply(target, Translation::Blocked)
            .expect("is accepted");
    }
    assert_eq!(backend.objects().targets, 0);
}

pub(super) fn applying_again_is_no_op(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    for translation in all_translations(harness) {
        for target in targets(harness, endpoint) {
            backend.apply(target, translation).expect("is accepted");
            let objects = backend.objects();
            backend
                .apply(target, translation)
                .expect("is accepted again");
            assert_eq!(backend.objects(), objects);
            assert_eq!(backend.translation(target), translation);
        }
    }
}

pub(super) fn refused_is_blocked(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    for before in all_translations(harness) {
        for bad in harness.refused() {
            for target in targets(harness, endpoint) {
                backend.apply(target, before).expect("is accepted");
                backend.apply(target, bad).expect_err("is refused");
                assert_eq!(backend.translation(target), Translation::Blocked);
                backend.apply(target, before).expect("is accepted again");
                assert_eq!(backend.translation(target), before);
                backend
                    .apply(target, Translation::Blocked)
                    .expect("is accepted");
            }
        }
    }
    assert_eq!(backend.objects().targets, 0);
    assert_eq!(backend.objects().translations, 0);
}

pub(super) fn failed_is_blocked(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let all = all_translations(harness);
    for target in targets(harness, endpoint) {
        for &before in &all {
            for &after in all.iter().filter(|&&after| after != before) {
                backend.apply(target, before).expect("is accepted");
                if !harness.fail_next_apply() {
                    return;
                }
                backend.apply(target, after).expect_err("the host fails");
                assert_eq!(backend.translation(target), Translation::Blocked);
                backend
                    .apply(target, after)
                    .expect("the host does not fail again");
                assert_eq!(backend.translation(target), after);
            }
        }
    }
}

pub(super) fn equal_translations_are_shared(harness: &dyn Harness) {
    let endpoints = harness.endpoints();
    let backend = harness.backend();
    for endpoint in endpoints {
        claim(harness, endpoint);
    }
    let all: Vec<_> = endpoints
        .iter()
        .flat_map(|&e| targets(harness, e))
        .collect();
    for translation in harness.translations() {
        backend.apply(all[0], translation).expect("is accepted");
        let one = backend.objects().translations;
        for &target in &all[1..] {
            backend.apply(target, translation).expect("is accepted");
        }
        let objects = backend.objects();
        assert_eq!(objects.targets, all.len());
        assert_eq!(objects.translations, one, "{translation:?} is shared");
        // The last user takes it along, nobody before.
        for (gone, &target) in all.iter().enumerate() {
            assert_eq!(backend.translation(target), translation);
            assert_eq!(backend.objects().translations, one, "{gone} are gone");
            backend
                .apply(target, Translation::Blocked)
                .expect("is accepted");
        }
        assert_eq!(backend.objects().translations, 0);
    }
}

pub(super) fn pasids_stay_apart(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    claim(harness, other);
    let all = all_translations(harness);
    for &chosen in &targets(harness, endpoint) {
        backend.apply(chosen, all[0]).expect("is accepted");
        for rid in [endpoint, other] {
            for target in targets(harness, rid) {
                let expected = if target == chosen {
                    all[0]
                } else {
                    Translation::Blocked
                };
                assert_eq!(backend.translation(target), expected);
            }
        }
        backend
            .apply(chosen, Translation::Blocked)
            .expect("is accepted");
    }
}

pub(super) fn release_leaves_nothing(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    let all = all_translations(harness);
    claim(harness, other);
    backend
        .apply(Target::rid(other), all[0])
        .expect("is accepted");
    let before = backend.objects();
    for round in 0..3 {
        claim(harness, endpoint);
        for (target, &translation) in targets(harness, endpoint).iter().zip(all.iter().cycle()) {
            backend.apply(*target, translation).expect("is accepted");
        }
        backend.release(endpoint);
        for target in targets(harness, endpoint) {
            assert_eq!(backend.translation(target), Translation::Blocked);
        }
        assert_eq!(backend.objects(), before, "round {round}");
    }
    assert_eq!(backend.translation(Target::rid(other)), all[0]);
    backend.release(other);
    for translation in all {
        if let Translation::Domain(domain) = translation {
            backend.destroy_domain(domain);
        }
    }
    assert_eq!(backend.objects(), Objects::default());
}

pub(super) fn release_of_nothing(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    backend.release(endpoint);
    claim(harness, endpoint);
    backend.release(endpoint);
    backend.release(endpoint);
    backend.destroy_domain(DomainId(u32::MAX));
    assert_eq!(backend.objects(), Objects::default());
}

pub(super) fn invalidations_take_effect(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    let backend = harness.backend();
    claim(harness, endpoint);
    let pages = |first, count, leaf| InvalidationRange::Pages {
        first: Iova(first),
        count,
        leaf,
    };
    let ranges = [
        InvalidationRange::All,
        pages(0, 1, true),
        pages(0x1000, 512, false),
        pages(0, u64::MAX, false),
        pages(!0xfff, u64::MAX, true),
        pages(0x7fff_ffff_f000, 1 << 52, true),
    ];
    let mut scopes = vec![
        Scope::All,
        Scope::Endpoint(endpoint),
        Scope::Endpoint(other),
    ];
    for rid in [endpoint, other] {
        scopes.extend(targets(harness, rid).into_iter().map(Scope::Target));
    }
    let all: Vec<_> = scopes
        .iter()
        .flat_map(|&scope| ranges.map(|range| Invalidation { scope, range }))
        .collect();
    assert_eq!(backend.invalidate(&[]), 0);
    for translation in all_translations(harness) {
        for target in targets(harness, endpoint) {
            backend.apply(target, translation).expect("is accepted");
        }
        assert_eq!(backend.invalidate(&all), all.len());
        for target in targets(harness, endpoint) {
            assert_eq!(backend.translation(target), translation);
        }
    }
}

pub(super) fn capabilities_are_stable(harness: &dyn Harness) {
    let [endpoint, _] = harness.endpoints();
    let backend = harness.backend();
    let capabilities = backend.capabilities();
    assert_eq!(capabilities.and(capabilities), capabilities);
    claim(harness, endpoint);
    backend
        .apply(Target::rid(endpoint), all_translations(harness)[0])
        .expect("is accepted");
    assert_eq!(backend.capabilities(), capabilities);
    assert_ne!(capabilities.page_sizes, 0);
}
