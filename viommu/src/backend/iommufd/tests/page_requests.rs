//! Page requests and their answers (`linux.md`, A6).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};

use super::*;

#[test]
fn a_page_request_group_is_answered_exactly_once() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let cookie = bench
        .fake
        .page_request(A.0.into(), Some(Pasid(5)), 17, 0xabc000);
    let request = bench.sink.take(1)[0];
    assert_eq!((request.target, request.group), (pasid(A, 5), 17));
    assert!(request.last && request.access == Access::READ_WRITE && !request.execute);
    assert_eq!(bench.host.objects().page_requests, 1);
    let response = PageResponse {
        target: request.target,
        group: 17,
        code: ResponseCode::Success,
    };
    // A wrong one first, then the right one twice.
    bench.host.respond(PageResponse {
        group: 18,
        ..response
    });
    bench.host.respond(response);
    bench.host.respond(response);
    assert_eq!(bench.fake.responses(), [(cookie, 0)]);
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[test]
fn after_a_drain_the_front_end_has_every_request_that_was_sent() {
    let bench = Bench::new();
    for number in 1..=100 {
        bench.host.apply(pasid(A, number), stage1(0x1000)).unwrap();
        bench
            .fake
            .page_request(A.0.into(), Some(Pasid(number)), 1, 0);
        bench.host.drain_page_requests();
        assert_eq!(
            bench.sink.count(),
            number as usize,
            "one is still on its way"
        );
    }
}

/// A guest that answers at once, and a device that asks again at once.
struct Again {
    bench: &'static Bench,
    enough: AtomicBool,
}

impl EventSink for Again {
    fn fault(&self, fault: Fault) {
        panic!("the kernel reports no faults: {fault:?}");
    }

    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, request: PageRequest) {
        self.bench.host.respond(PageResponse {
            target: request.target,
            group: request.group,
            code: ResponseCode::Success,
        });
        if !self.enough.load(Ordering::SeqCst) {
            let device = request.target.endpoint.0.into();
            let group = request.group.into();
            let fake = &self.bench.fake;
            fake.page_request(device, request.target.pasid, group, 0);
        }
    }
}

#[test]
fn a_drain_ends_though_a_device_never_stops_to_ask() {
    let bench: &Bench = Box::leak(Box::new(Bench::new()));
    let sink = Arc::new(Again {
        bench,
        enough: AtomicBool::new(false),
    });
    bench.host.release(A);
    bench.host.claim(A, sink.clone()).unwrap();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    bench.fake.page_request(A.0.into(), Some(Pasid(5)), 0, 0);
    bench.host.drain_page_requests();
    sink.enough.store(true, Ordering::SeqCst);
    bench.host.release(A);
}

#[test]
fn a_group_that_waits_keeps_its_index_and_its_answer() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let ask = || {
        let device = A.0.into();
        bench
            .fake
            .page_request(device, Some(Pasid(5)), 17, 0xabc000)
    };
    let first = ask();
    bench.sink.take(1);
    // A device that uses the index again before its answer has its answer now.
    let again = ask();
    assert_eq!(bench.fake.wait_for_responses(1), [(again, 1)]);
    bench.host.respond(PageResponse {
        target: pasid(A, 5),
        group: 17,
        code: ResponseCode::Success,
    });
    assert_eq!(bench.fake.responses(), [(first, 0)]);
}

#[test]
fn a_request_without_pasid_is_not_one_with_pasid_0() {
    let bench = Bench::new();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    bench.fake.page_request(A.0.into(), None, 1, 0);
    assert_eq!(bench.sink.take(1)[0].target, Target::rid(A));
}

#[test]
fn a_cookie_that_the_kernel_took_back_is_never_used() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let old = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 1, 0);
    bench.sink.take(1);
    // Another table: the kernel answers the group itself, and gives its number to B's request.
    bench.host.apply(pasid(A, 5), stage1(0x2000)).unwrap();
    bench.host.apply(pasid(B, 6), stage1(0x2000)).unwrap();
    let new = bench.fake.page_request(B.0.into(), Some(Pasid(6)), 1, 0);
    assert_eq!(old, new);
    bench.sink.take(1);
    bench.host.respond(PageResponse {
        target: pasid(A, 5),
        group: 1,
        code: ResponseCode::Success,
    });
    assert_eq!(bench.fake.responses(), []);
    assert_eq!(bench.host.objects().page_requests, 1);
}

#[test]
fn failure_is_answered_as_invalid_and_nobodys_request_too() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let failure = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 1, 0);
    bench.sink.take(1);
    bench.host.respond(PageResponse {
        target: pasid(A, 5),
        group: 1,
        code: ResponseCode::Failure,
    });
    assert_eq!(bench.fake.responses(), [(failure, 1)]);
    let unknown = bench.fake.page_request(0xdead, None, 1, 0);
    // A group number beyond 9 bits is no request of a PCI device.
    let wild = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 512, 0);
    assert_eq!(bench.fake.wait_for_responses(2), [(unknown, 1), (wild, 1)]);
}

#[test]
fn a_device_without_pri_gets_tables_without_a_fault_queue() {
    let bench = Bench::new();
    let plain = Rid::new(0, 5, 0);
    bench.add(plain, |device| device.pri = false).unwrap();
    bench.host.claim(plain, bench.sink.clone()).unwrap();
    bench
        .host
        .apply(Target::rid(plain), stage1(0x1000))
        .unwrap();
    bench.host.apply(Target::rid(A), stage1(0x1000)).unwrap();
    assert_eq!(
        bench.host.objects().translations,
        2,
        "not shared with one that has"
    );
    bench.check();
}

/// What is done once, after the next attach or detach and before the back end knows that the call
/// has returned.
#[derive(Clone, Default)]
struct Between(Arc<Mutex<Option<Once>>>);

type Once = Box<dyn FnOnce() + Send>;

impl Between {
    fn set(&self, what: impl FnOnce() + Send + 'static) {
        *self.0.lock().unwrap() = Some(Box::new(what));
    }

    fn run(&self) {
        let what = self.0.lock().unwrap().take();
        if let Some(what) = what {
            what();
        }
    }
}

struct AttachAnd(FakeAttach, Between);

impl AttachDevice for AttachAnd {
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        let result = self.0.attach(pasid, hwpt);
        self.1.run();
        result
    }

    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()> {
        let result = self.0.detach(pasid);
        self.1.run();
        result
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn resume(&self) {
        self.0.resume();
    }
}

/// A and B, and what comes between A's calls.
fn with_between() -> (&'static Bench, Between) {
    let bench: &Bench = Box::leak(Box::new(Bench::empty()));
    let between = Between::default();
    let through = |attach| Arc::new(AttachAnd(attach, between.clone())) as Arc<dyn AttachDevice>;
    bench.add_through(A, |_| {}, through).unwrap();
    bench.add(B, |_| {}).unwrap();
    for rid in [A, B] {
        bench.host.claim(rid, bench.sink.clone()).unwrap();
    }
    (bench, between)
}

/// Gives what must not happen yet a chance to.
fn a_moment_or(done: impl Fn() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_request_of_a_new_table_is_not_forgotten_with_those_of_the_old() {
    for (target, old) in [
        (pasid(A, 5), stage1(0x1000)),
        (Target::rid(A), Translation::Identity),
    ] {
        let (bench, between) = with_between();
        bench.host.apply(target, old).unwrap();
        between.set(move || {
            bench.fake.page_request(A.0.into(), target.pasid, 3, 0);
            a_moment_or(|| bench.sink.count() > 0);
        });
        bench.host.apply(target, stage1(0x2000)).unwrap();
        let request = bench.sink.take(1)[0];
        assert_eq!((request.target, request.group), (target, 3));
        bench.host.respond(PageResponse {
            target,
            group: 3,
            code: ResponseCode::Success,
        });
        assert_eq!(bench.fake.responses(), [(0, 0)]);
    }
}

#[test]
fn an_answer_that_comes_while_its_table_goes_answers_nobody_else() {
    for after in [Translation::Blocked, stage1(0x2000), Translation::Identity] {
        let (bench, between) = with_between();
        bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
        bench.host.apply(pasid(B, 6), stage1(0x2000)).unwrap();
        let old = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 1, 0);
        bench.sink.take(1);
        let answering = Arc::new(Mutex::<Option<JoinHandle<()>>>::default());
        let also = answering.clone();
        between.set(move || {
            // The kernel has answered A, and gives the number to B's request.
            let new = bench.fake.page_request(B.0.into(), Some(Pasid(6)), 1, 0);
            assert_eq!(old, new);
            let answer = spawn(|| {
                bench.host.respond(PageResponse {
                    target: pasid(A, 5),
                    group: 1,
                    code: ResponseCode::Success,
                });
            });
            a_moment_or(|| answer.is_finished());
            *also.lock().unwrap() = Some(answer);
        });
        bench.host.apply(pasid(A, 5), after).unwrap();
        answering.lock().unwrap().take().unwrap().join().unwrap();
        assert_eq!(bench.fake.responses(), [], "B has A's answer");
        assert_eq!(bench.sink.take(1)[0].target, pasid(B, 6));
        assert_eq!(bench.host.objects().page_requests, 1);
    }
}

#[test]
fn what_waits_is_answered_when_its_endpoint_is_released_and_cannot_be_detached() {
    let bench = Bench::new();
    bench.host.apply(pasid(A, 5), stage1(0x1000)).unwrap();
    let cookie = bench.fake.page_request(A.0.into(), Some(Pasid(5)), 1, 0);
    bench.sink.take(1);
    bench.fake.world().fail_all = Some(("detach", libc::EIO));
    bench.host.release(A);
    assert_eq!(bench.fake.responses(), [(cookie, 1)]);
    assert_eq!(bench.host.objects().page_requests, 0);
}

#[derive(Clone, Debug)]
enum Step {
    Apply(Target, u8),
    Ask(Target, u16),
    Respond(Target, u16),
    Release(Rid),
}

fn step() -> impl Strategy<Value = Step> {
    let rid = prop_oneof![Just(A), Just(B)];
    let target = (rid.clone(), prop::option::of(1u32..3)).prop_map(|(endpoint, number)| Target {
        endpoint,
        pasid: number.map(Pasid),
    });
    let group = (target.clone(), 0u16..3);
    prop_oneof![
        4 => (target, 0u8..5).prop_map(|(target, what)| Step::Apply(target, what)),
        6 => group.clone().prop_map(|(target, group)| Step::Ask(target, group)),
        4 => group.prop_map(|(target, group)| Step::Respond(target, group)),
        1 => rid.prop_map(Step::Release),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn every_group_is_answered_once_whatever_is_applied_and_whatever_fails(
        steps in prop::collection::vec((step(), prop::option::weighted(0.2, 0usize..4)), 1..60),
    ) {
        let bench = Bench::new();
        // What the front end knows of and has not answered, with the kernel's number.
        let mut owed = BTreeMap::<(Target, u16), u32>::new();
        for (step, fail) in &steps {
            {
                let mut world = bench.fake.world();
                world.fail_at = fail.map(|after| (world.count + after, libc::ENOMEM));
            }
            match *step {
                Step::Apply(target, what) => {
                    let translation = match what {
                        0 => Translation::Blocked,
                        1 => Translation::Identity,
                        root => stage1(u64::from(root) << 12),
                    };
                    let _refused = bench.host.apply(target, translation);
                }
                Step::Ask(target, group) => {
                    let device = u32::from(target.endpoint.0);
                    let asks = {
                        let world = bench.fake.world();
                        let table = world.devices[&device].hardware.get(&target.pasid);
                        let table = table.and_then(|hwpt| world.objects.get(hwpt));
                        matches!(table, Some(Object::Nested { queue: Some(_), .. }))
                    };
                    if asks {
                        let cookie = bench.fake.page_request(device, target.pasid, group.into(), 0);
                        bench.host.drain_page_requests();
                        let told = bench.sink.count();
                        let answered = bench.fake.responses();
                        if told == 1 {
                            bench.sink.take(1);
                            prop_assert_eq!(owed.insert((target, group), cookie), None);
                            prop_assert_eq!(answered, []);
                        } else {
                            prop_assert_eq!(answered, [(cookie, 1)]);
                        }
                    }
                }
                Step::Respond(target, group) => {
                    let code = ResponseCode::Success;
                    bench.host.respond(PageResponse { target, group, code });
                    let wanted = owed.remove(&(target, group)).map(|cookie| (cookie, 0));
                    prop_assert_eq!(bench.fake.responses(), Vec::from_iter(wanted));
                }
                Step::Release(rid) => {
                    bench.host.release(rid);
                    bench.fake.world().fail_at = None;
                    bench.host.claim(rid, bench.sink.clone()).unwrap();
                    for (cookie, code) in bench.fake.responses() {
                        let of = owed.iter().find(|(_, has)| **has == cookie);
                        prop_assert_eq!(of.map(|((target, _), _)| target.endpoint), Some(rid));
                        prop_assert_eq!(code, 1);
                    }
                }
            }
            // What the kernel has answered is off both books.
            let world = bench.fake.world();
            owed.retain(|_, cookie| world.groups.contains_key(cookie));
            prop_assert_eq!(owed.len(), world.groups.len());
            drop(world);
            prop_assert_eq!(owed.len(), bench.host.objects().page_requests);
        }
    }
}
