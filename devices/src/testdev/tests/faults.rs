//! Faults.

use super::*;

#[test]
fn nothing_passes_while_blocked_and_each_attempt_is_one_fault() {
    let rig = Rig::new();
    let channel = rig.channel(0).range(0x1000, 0x2000, 100_000);
    assert_eq!(channel.run(CHECKSUM, 0), FAULT);
    assert_eq!(channel.get(FAULT_ADDRESS), 0x1000);
    assert_eq!(channel.get(DONE), 0);
    assert_eq!(
        rig.faults(),
        [(Target::rid(RID), Iova(0x1000), Access::READ)]
    );
    assert_eq!(channel.run(FILL, 0), FAULT);
    assert_eq!(rig.faults().len(), 2);
}

#[test]
fn a_fault_says_where_it_hit_and_what_was_done_before() {
    let rig = Rig::new();
    let pages = [
        (0x10_0000, 0x1000, Access::READ_WRITE),
        (0x10_1000, 0x5000, Access::READ),
    ];
    rig.domain(Target::rid(RID), &pages);
    rig.ram
        .write_slice(&[9; 4096], GuestAddress(0x5000))
        .unwrap();
    let channel = rig.channel(1).set(PATTERN, 0);
    assert_eq!(
        channel.range(0, 0x10_0000, 8192).run(FILL, 0),
        FAULT,
        "a read-only page"
    );
    assert_eq!(channel.get(FAULT_ADDRESS), 0x10_1000);
    assert_eq!(channel.get(DONE), 4096);
    assert_eq!(rig.ram.read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 9);
    assert_eq!(
        channel.range(0x10_0000, 0, 8192).run(CHECKSUM, 0),
        IS_DONE,
        "reads pass"
    );
    assert_eq!(channel.range(0x10_0800, 0, 8192).run(CHECKSUM, 0), FAULT);
    assert_eq!(channel.get(FAULT_ADDRESS), 0x10_2000);
    let rid = Target::rid(RID);
    let wanted = [
        (rid, Iova(0x10_1000), Access::WRITE),
        (rid, Iova(0x10_2000), Access::READ),
    ];
    assert_eq!(rig.faults(), wanted);
}
