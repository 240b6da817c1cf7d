//! Ends: abort, reset, bus mastering taken away, unplug.

use super::*;

#[test]
fn abort_ends_an_operation_of_any_length() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    // Copies over itself: every piece passes, until the end of memory, far away in time.
    let long = rig
        .channel(0)
        .range(0, 1, RAM as u64 - 1)
        .start(COPY, F_INTERRUPT);
    long.set(CONTROL, 2);
    assert!(matches!(long.end(), ABORTED | IS_DONE));
    let mut seen = 0;
    until_mut(|| {
        seen += rig.msi.get(0).signals();
        seen == 1
    });
    assert_eq!(
        long.set(CONTROL, 2).status(),
        long.status(),
        "nothing to abort"
    );
}

#[test]
fn registers_do_not_change_under_an_operation() {
    let rig = Rig::new();
    rig.domain(Target::rid(RID), &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0x2000, 8)
        .start(COPY, F_ATS | F_PRI);
    rig.requests(1);
    until(|| channel.status() == WAITING);
    channel
        .range(9, 9, 9)
        .set(VECTOR, 9)
        .set(PASID, 9)
        .start(FILL, F_PASID);
    assert_eq!(
        (
            channel.get(SOURCE),
            channel.get(DESTINATION),
            channel.get(LENGTH)
        ),
        (0x1000, 0x2000, 8)
    );
    assert_eq!(
        channel.get(OPERATION),
        u64::from(F_ATS | F_PRI) << 32 | u64::from(COPY)
    );
    channel.set(CONTROL, 2);
    assert_eq!(channel.end(), ABORTED);
}

#[test]
fn a_response_after_an_abort_is_not_stray_and_answers_nobody() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    rig.domain(rid, &[]);
    let channel = rig
        .channel(0)
        .range(0x1000, 0, 8)
        .start(CHECKSUM, F_ATS | F_PRI);
    rig.requests(1);
    until(|| channel.status() == WAITING);
    assert_eq!(channel.set(CONTROL, 2).end(), ABORTED);
    assert_eq!(
        channel.run(CHECKSUM, F_ATS | F_PRI),
        failed(7),
        "its group is still out"
    );
    rig.respond(rid, 0, ResponseCode::Success);
    assert_eq!(channel.status(), failed(7));
    assert_eq!((rig.register(0x14), rig.register(0x28)), (0, 0));
}

#[test]
fn function_level_reset_stops_all_dma_and_forgets_everything() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    for n in 0..64 {
        rig.channel(n)
            .range(0, 1, RAM as u64 - 1)
            .start(COPY, F_INTERRUPT);
    }
    let express = (0x40..0x100)
        .find(|at| rig.config_word(*at) & 0xff == 0x10)
        .unwrap();
    rig.device.assign_bar(0, 0x8000_0000);
    rig.config(express + 8, 1 << 15);
    // No DMA is in flight: what is written now stays.
    let mark = vec![0xa5; RAM];
    rig.ram.write_slice(&mark, GuestAddress(0)).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    let mut after = vec![0; RAM];
    rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after == mark);
    for n in 0..64 {
        assert_eq!(rig.channel(n).status(), 0);
        assert_eq!(rig.channel(n).get(LENGTH), 0);
        assert_eq!(rig.channel(n).get(PASID) >> 32, n, "GROUP");
    }
    assert_eq!(rig.register(0x10), 0, "nothing is enabled");
    assert_eq!(rig.device.bars()[0].1, 0);
    rig.enable();
    assert_eq!(rig.channel(0).range(0, 0x1000, 64).run(COPY, 0), IS_DONE);
}

#[test]
fn a_response_after_a_reset_is_unexpected() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    rig.domain(rid, &[]);
    rig.channel(0).start(PAGE_REQUEST, 0);
    rig.requests(1);
    let _ = rig.device.reset();
    rig.enable();
    rig.respond(rid, 0, ResponseCode::Success);
    assert_eq!(rig.register(0x28), 1);
    assert_eq!(rig.channel(0).status(), 0);
    assert_eq!(rig.config_word(rig.capability(0x13) + 6) & 2, 2, "UPRGI");
}

#[test]
fn bus_mastering_that_is_taken_away_stops_dma_before_the_write_returns() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    for n in 0..8 {
        rig.channel(n).range(0, 1, RAM as u64 - 1).start(COPY, 0);
    }
    rig.config(0x04, 0x2);
    let mark = vec![0x5a; RAM];
    rig.ram.write_slice(&mark, GuestAddress(0)).unwrap();
    for n in 0..8 {
        assert!(matches!(rig.channel(n).end(), DISABLED | IS_DONE));
    }
    let mut after = vec![0; RAM];
    rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after == mark);
}

#[test]
fn an_unmap_while_dma_runs_is_complete_when_it_returns() {
    let rig = Rig::new();
    let rid = Target::rid(RID);
    let pages: Vec<_> = (0..64)
        .map(|n| (0x1000 * n, 0x1000 * n, Access::READ_WRITE))
        .collect();
    let domain = rig.domain(rid, &pages);
    let channel = rig
        .channel(0)
        .set(PATTERN, u64::MAX)
        .range(0, 0, 0x4_0000)
        .start(FILL, 0);
    rig.engine.unmap(domain, Iova(0), Iova(u64::MAX)).unwrap();
    let all = Invalidation {
        scope: Scope::Target(rid),
        range: InvalidationRange::All,
    };
    assert_eq!(rig.engine.invalidate(&[all]), 1);
    rig.ram
        .write_slice(&[0; 0x4_0000], GuestAddress(0))
        .unwrap();
    assert!(matches!(channel.end(), FAULT | IS_DONE));
    let mut after = vec![1; 0x4_0000];
    rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(after.iter().all(|byte| *byte == 0));
}

#[test]
fn an_unplugged_device_leaves_nothing() {
    let rig = Rig::new();
    rig.domain(Target::pasid(RID, Pasid(3)), &[]);
    rig.channel(0)
        .set(PASID, 3)
        .start(CHECKSUM, F_PASID | F_ATS | F_PRI);
    rig.channel(1).set(PASID, 3).start(PAGE_REQUEST, F_PASID);
    rig.requests(1);
    let Rig { device, engine, .. } = rig;
    engine.remove_endpoint(RID);
    drop(device);
    let objects = engine.objects();
    assert_eq!(
        (objects.endpoints, objects.targets, objects.page_requests),
        (0, 0, 0)
    );
}
