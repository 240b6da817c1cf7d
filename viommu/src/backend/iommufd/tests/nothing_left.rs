//! Nothing is left behind, whatever is asked and whatever fails.

use super::*;

#[test]
fn unplug_leaves_no_object_and_drop_leaves_none_at_all() {
    let bench = Bench::new();
    bench.tables();
    let domain = bench.host.create_domain().unwrap();
    bench
        .host
        .map(domain, &[mapping(0, 0, 0x1000, Access::READ)])
        .unwrap();
    for (number, translation) in [
        stage1(0x1000),
        Translation::Identity,
        Translation::Stage2(STAGE2),
        Translation::Domain(domain),
    ]
    .into_iter()
    .enumerate()
    {
        bench
            .host
            .apply(pasid(A, number as u32 + 1), translation)
            .unwrap();
        bench
            .host
            .apply(pasid(B, number as u32 + 1), translation)
            .unwrap();
    }
    bench.host.destroy_domain(domain);
    bench.host.remove_device(A);
    bench.host.remove_device(B);
    assert_eq!(bench.host.objects(), Objects::default());
    assert_eq!(bench.objects(), 2, "guest memory and the fault queue");
    bench.check();
    let fake = bench.fake.clone();
    drop(bench);
    assert_eq!(fake.world().objects.len(), 0);
}

#[test]
fn a_released_endpoint_can_be_claimed_again_and_starts_blocked() {
    let bench = Bench::new();
    assert!(matches!(
        bench.host.claim(A, bench.sink.clone()),
        Err(Refused::Claimed(_))
    ));
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.host.release(A);
    assert!(matches!(
        bench.host.apply(Target::rid(A), Translation::Identity),
        Err(Refused::NoEndpoint(_))
    ));
    bench.host.claim(A, bench.sink.clone()).unwrap();
    assert_eq!(bench.host.translation(Target::rid(A)), Translation::Blocked);
    bench.host.release(Rid(0x7777));
    bench.check();
}

/// One step of random work.
#[derive(Clone, Debug)]
enum Step {
    Apply(Target, u8),
    Invalidate(Target),
    Release(Rid),
    Map(u64),
    Unmap(u64),
    Page(u64, bool),
}

fn run(bench: &Bench, domain: DomainId, step: &Step) {
    match *step {
        Step::Apply(target, what) => {
            let translation = match what {
                0 => Translation::Blocked,
                1 => Translation::Identity,
                2 => Translation::Domain(domain),
                3 => Translation::Stage2(STAGE2),
                4 => stage1(0x123),
                root => stage1(u64::from(root) << 12),
            };
            let before = bench.host.translation(target);
            let result = bench.host.apply(target, translation);
            let after = bench.host.translation(target);
            match result {
                Ok(()) => assert_eq!(after, translation),
                Err(_) => assert_eq!(after, Translation::Blocked, "was {before:?}"),
            }
        }
        Step::Invalidate(target) => {
            let batch = [pages(Scope::Target(target), 0, 512), everything(Scope::All)];
            assert!(bench.host.invalidate(&batch) <= 2);
        }
        Step::Release(rid) => {
            bench.host.release(rid);
            // Fails only while a detach fails.
            let _again = bench.host.claim(rid, bench.sink.clone());
        }
        Step::Map(page) => {
            let before = bench.host.objects().mappings;
            let one = mapping(page << 12, page << 12, 0x1000, Access::READ_WRITE);
            let result = bench.host.map(domain, &[one]);
            let after = bench.host.objects().mappings;
            assert_eq!(after, before + usize::from(result.is_ok()));
        }
        Step::Unmap(page) => {
            let _refused = bench
                .host
                .unmap(domain, Iova(page << 12), Iova((page << 12) + 0xfff));
        }
        Step::Page(index, present) => {
            bench.page(
                index,
                if present {
                    (0x20_0000 + index * 0x1000) | 3
                } else {
                    0
                },
            );
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let rid = prop_oneof![Just(A), Just(B)];
    let target = (rid.clone(), 0u32..4).prop_map(|(endpoint, number)| Target {
        endpoint,
        pasid: (number > 0).then_some(Pasid(number)),
    });
    prop_oneof![
        6 => (target.clone(), 0u8..9).prop_map(|(target, what)| Step::Apply(target, what)),
        3 => target.prop_map(Step::Invalidate),
        1 => rid.prop_map(Step::Release),
        2 => (0u64..8).prop_map(Step::Map),
        2 => (0u64..8).prop_map(Step::Unmap),
        2 => (0u64..8, any::<bool>()).prop_map(|(index, present)| Step::Page(index, present)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_asked_and_whatever_fails_the_record_is_the_kernels(
        steps in prop::collection::vec((step(), prop::option::weighted(0.3, 0usize..6)), 1..40),
    ) {
        let bench = Bench::new();
        bench.tables();
        let domain = bench.host.create_domain().unwrap();
        for (step, fail) in &steps {
            {
                let mut world = bench.fake.world();
                world.fail_at = fail.map(|after| (world.count + after, libc::ENOMEM));
            }
            run(&bench, domain, step);
            bench.check();
        }
        bench.fake.world().fail_at = None;
        // A device that was stopped is made good by the next claim.
        for rid in [A, B] {
            bench.host.release(rid);
            bench.host.claim(rid, bench.sink.clone()).unwrap();
            bench.host.remove_device(rid);
        }
        bench.host.destroy_domain(domain);
        prop_assert_eq!(bench.host.objects(), Objects::default());
        prop_assert_eq!(bench.objects(), 2);
    }
}

#[test]
fn the_capabilities_of_no_device_are_not_a_promise_of_a_third_stage() {
    let bench = Bench::empty();
    let Capabilities { stage1, nested, .. } = bench.host.capabilities();
    assert!(stage1 && !nested);
}
