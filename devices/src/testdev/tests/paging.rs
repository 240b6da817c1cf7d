//! ATS and page requests.

use super::*;

#[test]
fn ats_translates_without_faults() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    rig.domain(rid, &[(0x1000, 0x5000, Access::READ)]);
    let channel = rig.channel(0).range(0x1abc, 0, 0);
    assert_eq!(channel.run(TRANSLATE, 0), IS_DONE);
    assert_eq!(channel.get(RESULT), 0x5abc);
    assert_eq!(
        channel.run(TRANSLATE, F_WRITE),
        failed(4),
        "not for writing"
    );
    assert_eq!(channel.range(0x9000, 0, 8).run(CHECKSUM, F_ATS), failed(4));
    assert_eq!(channel.get(FAULT_ADDRESS), 0x9000);
    assert_eq!(channel.range(0x1ff0, 0, 32).run(CHECKSUM, F_ATS), failed(4));
    assert_eq!(channel.get(DONE), 16, "what has a translation is read");
    assert_eq!(rig.faults(), []);
}

#[test]
fn a_missing_page_is_asked_for_and_the_operation_goes_on_when_it_is_there() {
    let rig = Rig::new();
    let target = Target::pasid(RID, Pasid(7));
    let domain = rig.domain(target, &[]);
    rig.ram
        .write_slice(&[1; 8192], GuestAddress(0x5000))
        .unwrap();
    let channel = rig
        .channel(3)
        .set(PASID, 7)
        .set(GROUP, 0x155)
        .range(0x1ffe, 0x9000, 4);
    let channel = channel.start(COPY, F_PASID | F_ATS | F_PRI);
    // What could be read is written before more is read.
    let wanted = [
        (0x1000, 0x5000, Access::READ),
        (0x9000, 0x7000, Access::WRITE),
        (0x2000, 0x6000, Access::READ),
    ];
    for (n, (iova, gpa, access)) in wanted.into_iter().enumerate() {
        let asked = rig.requests(n + 1)[n];
        assert_eq!(
            (asked.target, asked.group, asked.last),
            (target, 0x155, true)
        );
        assert_eq!((asked.iova, asked.access), (Iova(iova), access));
        until(|| channel.status() == WAITING);
        assert_eq!(rig.register(0x14), 1, "one group is outstanding");
        rig.map(domain, &[(iova, gpa, access)]);
        rig.respond(target, 0x155, ResponseCode::Success);
    }
    assert_eq!(channel.end(), IS_DONE);
    assert_eq!(
        rig.ram.read_obj::<[u8; 4]>(GuestAddress(0x7000)).unwrap(),
        [1; 4]
    );
    assert_eq!(channel.get(0x58), 3 << 32 | 3, "requests and responses");
    assert_eq!(
        (rig.register(0x18), rig.register(0x20), rig.register(0x28)),
        (3, 3, 0)
    );
    assert_eq!(rig.faults(), []);
}

#[test]
fn an_invalid_response_ends_the_operation() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0, 4)
        .start(CHECKSUM, F_ATS | F_PRI | F_INTERRUPT);
    rig.requests(1);
    rig.respond(Target::rid(RID), 0, ResponseCode::Invalid);
    assert_eq!(channel.end(), failed(5));
    let mut seen = 0;
    until_mut(|| {
        seen += rig.msi.get(0).signals();
        seen > 0
    });
    assert_eq!(seen + rig.msi.get(0).signals(), 1, "one interrupt");
}

#[test]
fn a_failure_response_stops_paging_until_it_is_enabled_anew() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let pri = rig.capability(0x13);
    let channel = rig.channel(0).range(0x1000, 0, 4);
    channel.start(CHECKSUM, F_ATS | F_PRI);
    rig.requests(1);
    rig.respond(Target::rid(RID), 0, ResponseCode::Failure);
    assert_eq!(channel.end(), failed(6));
    assert_eq!(
        rig.config_word(pri + 6),
        1 << 15 | 1 << 8 | 1,
        "Response Failure, Stopped"
    );
    assert_eq!(channel.run(CHECKSUM, F_ATS | F_PRI), DISABLED);
    rig.config(pri + 4, 0);
    rig.config(pri + 6, 1);
    assert_eq!(
        rig.config_word(pri + 6),
        1 << 15 | 1 << 8,
        "cleared by writing 1"
    );
    rig.config(pri + 4, 1);
    channel.start(CHECKSUM, F_ATS | F_PRI);
    assert_eq!(rig.requests(2).len(), 2);
}

#[test]
fn requests_wait_for_their_turn_when_the_allocation_is_used_up() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    rig.config(rig.capability(0x13) + 12, 2);
    for n in 0..4 {
        rig.channel(n)
            .range(0x1000 * n, 0, 4)
            .start(CHECKSUM, F_ATS | F_PRI);
    }
    let first = rig.requests(2);
    until(|| rig.register(0x14) == 2);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.requests(2).len(), 2, "no more than allowed");
    for request in first {
        rig.respond(request.target, request.group, ResponseCode::Invalid);
    }
    for request in &rig.requests(4)[2..] {
        rig.respond(request.target, request.group, ResponseCode::Invalid);
    }
    for n in 0..4 {
        assert_eq!(rig.channel(n).end(), failed(5));
    }
}

#[test]
fn page_requests_can_be_sent_by_hand_as_groups() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig.channel(0).set(GROUP, 9).range(0x1fff, 0, 2);
    assert_eq!(channel.run(PAGE_REQUEST, F_NOT_LAST | F_WRITE), IS_DONE);
    let channel = channel.range(0x8000, 0, 0).start(PAGE_REQUEST, 0);
    let requests = rig.requests(3);
    let told: Vec<_> = requests
        .iter()
        .map(|r| (r.iova.0, r.access.write, r.last))
        .collect();
    assert_eq!(
        told,
        [
            (0x1000, true, false),
            (0x2000, true, false),
            (0x8000, false, true)
        ]
    );
    rig.respond(Target::rid(RID), 9, ResponseCode::Success);
    assert_eq!(channel.end(), IS_DONE);
    assert_eq!(channel.get(RESULT), 0);
    // A request for everything is cut.
    let channel = channel
        .range(0x1000, 0, u64::MAX - 0x1000)
        .start(PAGE_REQUEST, 0);
    assert_eq!(rig.requests(3 + 64).len(), 3 + 64);
    rig.respond(Target::rid(RID), 9, ResponseCode::Invalid);
    assert_eq!((channel.end(), channel.get(RESULT)), (IS_DONE, 1));
}

#[test]
fn a_group_that_waits_is_not_used_by_another_channel() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let one = rig.channel(1).set(GROUP, 5).start(PAGE_REQUEST, 0);
    rig.requests(1);
    assert_eq!(rig.channel(2).set(GROUP, 5).run(PAGE_REQUEST, 0), failed(7));
    rig.respond(Target::rid(RID), 5, ResponseCode::Success);
    assert_eq!(one.end(), IS_DONE);
}

#[test]
fn a_page_request_that_nobody_would_hear_is_refused() {
    let rig = Rig::new();
    rig.engine.release(RID);
    assert_eq!(rig.channel(0).run(PAGE_REQUEST, 0), failed(8));
    assert_eq!(rig.register(0x14), 0, "nothing is outstanding");
}

#[test]
fn a_release_answers_what_is_outstanding() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0, 4)
        .start(CHECKSUM, F_ATS | F_PRI);
    rig.requests(1);
    rig.engine.release(RID);
    assert_eq!(channel.end(), failed(5));
}

#[test]
fn privileged_and_execute_requests_say_so() {
    let rig = Rig::new();
    let target = Target::pasid(RID, Pasid(1));
    rig.domain(target, &[]);
    let channel = rig.channel(0).set(PASID, 1).range(0x1000, 0, 4);
    let flags = F_PASID | F_PRIVILEGED | F_EXECUTE;
    channel.start(CHECKSUM, flags | F_ATS | F_PRI);
    let request = rig.requests(1)[0];
    assert!(request.privileged && request.execute);
    rig.respond(target, 0, ResponseCode::Invalid);
    channel.end();
    assert_eq!(channel.run(CHECKSUM, flags), FAULT);
    let fault = rig.told.faults.lock().unwrap()[0];
    assert!(fault.privileged && fault.execute);
}
