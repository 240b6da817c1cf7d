//! Page requests: into the guest's queue, overflow, answers, and exactly one for each group.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::testing::*;
use crate::backend::{Access, Backend, PageRequest, PageResponse, ResponseCode};
use crate::spec::vtd::descriptor::kind;
use crate::spec::vtd::fault::FaultReason as R;
use crate::spec::vtd::registers as offset;
use crate::spec::vtd::tables::PasidEntry;
use crate::{Iova, Pasid, Rid, Target};

const FIVE: Target = Target::pasid(NIC, Pasid(5));

fn ask(target: Target, group: u16, last: bool) -> PageRequest {
    PageRequest {
        target,
        group,
        last,
        iova: Iova(0x7fff_1234_5678),
        access: Access::READ_WRITE,
        execute: false,
        privileged: false,
    }
}

fn answer(target: Target, group: u16, code: ResponseCode) -> Call {
    Call::Respond(PageResponse {
        target,
        group,
        code,
    })
}

/// NIC with PASID 5 and page requests.
fn bound() -> Guest {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    for pasid in [0, 5] {
        guest.bind(directory, pasid, first_stage(3, 0x5000));
    }
    guest.backend.calls();
    guest
}

#[test]
fn a_request_is_in_the_queue_as_linux_reads_it_and_its_answer_reaches_the_device() {
    let mut guest = bound();
    guest.backend.ask(ask(FIVE, 3, false));
    let sent = guest.mailbox.take();
    assert_eq!(sent.len(), 1);
    guest.backend.ask(ask(FIVE, 3, true));
    assert_eq!(guest.mailbox.take(), [], "PPR is set still");
    assert_eq!(u64::from(sent[0].data), offset::PECTL);
    assert_eq!((guest.r64(offset::PQH), guest.r64(offset::PQT)), (0, 64));
    assert_eq!(guest.r32(offset::PRS), 1);
    let low = 1 | 1 << 8 | u64::from(NIC.0) << 16 | 5 << 32;
    assert_eq!(guest.peek(PAGE_QUEUE), low);
    assert_eq!(guest.peek(PAGE_QUEUE + 8), 0x7fff_1234_5000 | 3 << 3 | 3);
    assert_eq!(
        guest.peek(PAGE_QUEUE + 32 + 8),
        0x7fff_1234_5000 | 3 << 3 | 7
    );
    // Linux clears PPR, moves the head, and answers with the last one's numbers.
    guest.w32(offset::PRS, 1);
    guest.w64(offset::PQH, 64);
    assert_eq!(guest.r32(offset::PRS), 0);
    assert!(guest.submit(&[page_response(FIVE, 3, 0)]));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 3, ResponseCode::Success)]
    );
    assert!(guest.submit(&[page_response(FIVE, 3, 0)]));
    assert_eq!(guest.backend.calls(), [], "answered once");
}

#[test]
fn an_answer_is_for_the_requester_pasid_and_group_it_names() {
    let mut guest = bound();
    let plain = Target::rid(NIC);
    guest.backend.ask(ask(FIVE, 3, true));
    guest.backend.ask(ask(plain, 3, true));
    guest.backend.ask(ask(FIVE, 4, true));
    assert!(guest.submit(&[
        page_response(Target::pasid(NIC, Pasid(6)), 3, 0),
        page_response(FIVE, 5, 0),
        page_response(Target::pasid(Rid(1), Pasid(5)), 3, 0),
    ]));
    assert_eq!(guest.backend.calls(), []);
    assert!(guest.submit(&[
        page_response(plain, 3, 1),
        page_response(FIVE, 4, 15),
        page_response(FIVE, 3, 0)
    ]));
    assert_eq!(
        guest.backend.calls(),
        [
            answer(plain, 3, ResponseCode::Invalid),
            answer(FIVE, 4, ResponseCode::Failure),
            answer(FIVE, 3, ResponseCode::Success),
        ]
    );
}

#[test]
fn what_was_invalidated_before_an_answer_is_done_before_the_device_hears_it() {
    let mut guest = bound();
    guest.backend.ask(ask(FIVE, 3, true));
    assert!(guest.submit(&[pasid_iotlb_all(3, 5), page_response(FIVE, 3, 0)]));
    let calls = guest.backend.calls();
    assert!(matches!(calls[0], Call::Invalidate(_)) && matches!(calls[1], Call::Respond(_)));
}

#[test]
fn a_full_queue_overflows_answers_the_device_and_works_again_when_cleared() {
    let guest = bound();
    // One page has 128 descriptors, one of which stays free.
    for group in 0..127 {
        guest.backend.ask(ask(FIVE, group, true));
    }
    assert_eq!(guest.backend.calls(), []);
    assert_eq!(guest.r32(offset::PRS), 1);
    guest.backend.ask(ask(FIVE, 200, true));
    assert_eq!(guest.r32(offset::PRS), 3);
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 200, ResponseCode::Success)]
    );
    // With PRO set nothing is queued, even where there is room again.
    guest.w64(offset::PQH, guest.r64(offset::PQT));
    guest.backend.ask(ask(FIVE, 201, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 201, ResponseCode::Success)]
    );
    guest.w32(offset::PRS, 3);
    guest.backend.ask(ask(FIVE, 202, true));
    assert_eq!(guest.backend.calls(), []);
    assert_eq!(guest.r64(offset::PQT), 0, "wrapped");
}

#[test]
fn a_group_whose_last_request_is_refused_leaves_nothing_on_the_book() {
    let guest = bound();
    let open = |guest: &Guest| {
        let mut endpoints = guest.unit.state().endpoints.into_iter();
        let nic = endpoints.find(|state| state.endpoint == NIC).unwrap();
        nic.page_requests_waiting
    };
    guest.backend.ask(ask(FIVE, 3, false));
    guest.backend.ask(ask(FIVE, 4, false));
    guest.backend.ask(ask(FIVE, 5, false));
    assert_eq!(open(&guest), 3);
    // Not for the guest, because of what it is.
    guest.backend.ask(PageRequest {
        privileged: true,
        ..ask(FIVE, 3, true)
    });
    assert_eq!(open(&guest), 2);
    // No room: the head is where the queue does not reach.
    guest.w64(offset::PQH, 0x7_0000);
    guest.backend.ask(ask(FIVE, 4, true));
    assert_eq!((guest.r32(offset::PRS), open(&guest)), (3, 1));
    // Overflown before.
    guest.backend.ask(ask(FIVE, 5, true));
    assert_eq!(open(&guest), 0);
    assert_eq!(
        guest.backend.calls(),
        [
            answer(FIVE, 3, ResponseCode::Invalid),
            answer(FIVE, 4, ResponseCode::Success),
            answer(FIVE, 5, ResponseCode::Success),
        ]
    );
}

#[test]
fn an_event_is_sent_once_until_it_is_serviced_and_pending_while_masked() {
    let guest = bound();
    guest.backend.ask(ask(FIVE, 1, true));
    guest.backend.ask(ask(FIVE, 2, true));
    assert_eq!(guest.mailbox.take().len(), 1);
    guest.w32(offset::PRS, 1);
    guest.w32(offset::PECTL, 1 << 31);
    guest.backend.ask(ask(FIVE, 3, true));
    assert_eq!(
        (guest.mailbox.take().len(), guest.r32(offset::PECTL)),
        (0, 3 << 30)
    );
    guest.w32(offset::PECTL, 0);
    assert_eq!(guest.mailbox.take().len(), 1);
}

#[test]
fn privileged_requests_are_answered_invalid_and_counted() {
    let guest = bound();
    guest.backend.ask(PageRequest {
        privileged: true,
        ..ask(FIVE, 3, true)
    });
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 3, ResponseCode::Invalid)]
    );
    assert_eq!(guest.unit.state().privileged_page_requests, 1);
    assert_eq!(guest.r64(offset::PQT), 0);
}

#[test]
fn requests_that_nobody_enabled_are_answered_invalid_with_a_fault() {
    let mut guest = bound();
    let directory = guest.page();
    guest.set_context(NIC, [directory | 0xd, 0, 0, 0]);
    assert!(guest.submit(&[context_device(NIC)]));
    guest.backend.calls();
    guest.backend.ask(ask(FIVE, 3, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 3, ResponseCode::Invalid)]
    );
    assert_eq!(guest.faults()[0].1, R::PageRequestDisabled.code());
    // No PASIDs.
    guest.set_context(NIC, [directory | 0x15, 0, 0, 0]);
    guest.backend.ask(ask(FIVE, 4, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 4, ResponseCode::Invalid)]
    );
    assert_eq!(guest.faults()[0].1, R::PasidDisabled.code());
    // A PASID that has nothing, one that cannot be obeyed, and the one of requests without any.
    guest.set_context(NIC, [directory | 0x1d, 0, 0, 0]);
    let mut wrong = first_stage(2, 0x5000);
    wrong.q0.set_pgtt(7);
    for (pasid, entry, reason) in [
        (5, PasidEntry::default(), R::PasidEntryNotPresent),
        (5, wrong, R::PasidEntryInvalid),
        (0, pass_through(2), R::PasidIsRidPasid),
    ] {
        guest.set_pasid(directory, pasid, entry);
        let target = Target::pasid(NIC, Pasid(pasid));
        guest.backend.ask(ask(target, 4, true));
        assert_eq!(
            guest.backend.calls(),
            [answer(target, 4, ResponseCode::Invalid)]
        );
        assert_eq!(guest.faults()[0].1, reason.code());
    }
    // Legacy mode.
    guest.w64(offset::RTADDR, ROOT);
    guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
    guest.set_legacy_context(NIC, [2 << 2 | 1, 2]);
    guest.poke(ROOT, &[guest.peek(ROOT), 0]);
    guest.backend.calls();
    guest.backend.ask(ask(FIVE, 5, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 5, ResponseCode::Invalid)]
    );
    guest.faults();
    // Translation off.
    guest.w32(offset::GCMD, 1 << 26);
    guest.backend.calls();
    guest.backend.ask(ask(FIVE, 6, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 6, ResponseCode::Invalid)]
    );
    assert_eq!(guest.faults(), []);
}

#[test]
fn a_queue_where_there_is_no_ram_overflows() {
    let guest = bound();
    guest.w64(offset::PQA, RAM);
    guest.backend.ask(ask(FIVE, 3, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 3, ResponseCode::Success)]
    );
    assert_eq!(guest.r32(offset::PRS), 2);
    // Head and tail beyond the size.
    let guest = bound();
    guest.w64(offset::PQT, u64::MAX);
    guest.backend.ask(ask(FIVE, 3, true));
    assert_eq!(
        guest.backend.calls(),
        [answer(FIVE, 3, ResponseCode::Success)]
    );
}

#[test]
fn reset_and_unplug_answer_what_waits() {
    let guest = bound();
    for group in 0..3 {
        guest.backend.ask(ask(FIVE, group, true));
    }
    guest.backend.calls();
    guest.unit.reset();
    let answers = guest
        .backend
        .calls()
        .into_iter()
        .filter(|c| matches!(c, Call::Respond(_)));
    assert_eq!(answers.count(), 3);
    assert_eq!(guest.backend.objects().page_requests, 0);

    let mut guest = bound();
    guest.backend.ask(ask(FIVE, 3, true));
    guest.unit.remove_endpoint(NIC);
    guest.backend.calls();
    assert!(guest.submit(&[page_response(FIVE, 3, 0)]));
    assert_eq!(
        guest.backend.calls(),
        [],
        "its back end answered when it was released"
    );
}

#[test]
fn a_drain_is_done_when_requests_from_before_are_in_the_queue() {
    let mut guest = bound();
    let unit = Arc::clone(&guest.unit);
    let backend = Arc::clone(&guest.backend);
    let device = std::thread::spawn(move || {
        for group in 0..100 {
            backend.ask(ask(FIVE, group, true));
        }
        drop(unit);
    });
    for _ in 0..50 {
        assert!(guest.submit(&[[u64::from(kind::WAIT) | 1 << 7, 0, 0, 0]]));
    }
    device.join().unwrap();
    assert_eq!(guest.r64(offset::PQT), 100 * 32);
}

#[test]
fn a_drain_asks_each_back_end_once_also_one_that_came_late() {
    let mut guest = bound();
    let late = Recorder::new(CAPABLE);
    for device in [9, 10] {
        let rid = Rid::new(0, device, 0);
        guest.unit.add_endpoint(rid, late.clone() as _).unwrap();
    }
    for backend in [&guest.backend, &late] {
        backend.calls();
    }
    assert!(guest.submit(&[[u64::from(kind::WAIT) | 1 << 7, 0, 0, 0]]));
    for backend in [&guest.backend, &late] {
        assert_eq!(backend.calls(), [Call::DrainPageRequests]);
    }
}

#[test]
fn page_request_registers_are_not_there_when_not_offered() {
    let capabilities = crate::backend::Capabilities {
        page_requests: false,
        ..CAPABLE
    };
    let guest = Guest::scalable_with(Default::default(), capabilities);
    guest.w64(offset::PQA, 0x5004);
    assert_eq!((guest.r64(offset::PQA), guest.r32(offset::PECTL)), (0, 0));
    guest.backend.ask(ask(Target::rid(NIC), 3, true));
    let expected = answer(Target::rid(NIC), 3, ResponseCode::Invalid);
    assert_eq!(guest.backend.calls().pop(), Some(expected));
}

#[derive(Clone, Debug)]
enum Step {
    Ask(u16, bool, bool),
    Answer(u16, bool),
    Head,
    ClearStatus,
    Unplug,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u16..6, any::<bool>(), any::<bool>()).prop_map(|(g, l, p)| Step::Ask(g, l, p)),
        6 => (0u16..6, any::<bool>()).prop_map(|(g, p)| Step::Answer(g, p)),
        2 => Just(Step::Head),
        2 => Just(Step::ClearStatus),
        1 => Just(Step::Unplug),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A device asks only with groups that do not wait; every group is answered exactly once,
    /// whatever guest and VMM do.
    #[test]
    fn every_group_is_answered_exactly_once(steps in prop::collection::vec(step(), 1..80)) {
        let mut guest = bound();
        let mut waiting = std::collections::BTreeSet::new();
        let mut present = true;
        for step in steps {
            let target = |pasid: bool| if pasid { FIVE } else { Target::rid(NIC) };
            match step {
                Step::Ask(group, last, pasid) if present => {
                    let key = (target(pasid), group);
                    if !waiting.contains(&key) {
                        if last {
                            waiting.insert(key);
                        }
                        guest.backend.ask(ask(target(pasid), group, last));
                    }
                }
                Step::Answer(group, pasid) => {
                    guest.submit(&[page_response(target(pasid), group, 0)]);
                }
                Step::Head => guest.w64(offset::PQH, guest.r64(offset::PQT)),
                Step::ClearStatus => guest.w32(offset::PRS, 3),
                Step::Unplug if present => {
                    present = false;
                    guest.unit.remove_endpoint(NIC);
                    // The contract of `release`.
                    waiting.clear();
                }
                Step::Reset => guest.unit.reset(),
                _ => {}
            }
            for call in guest.backend.calls() {
                if let Call::Respond(response) = call {
                    prop_assert!(waiting.remove(&(response.target, response.group)));
                }
            }
        }
        guest.unit.reset();
        for call in guest.backend.calls() {
            if let Call::Respond(response) = call {
                prop_assert!(waiting.remove(&(response.target, response.group)));
            }
        }
        prop_assert!(waiting.is_empty(), "{waiting:?}");
    }
}
