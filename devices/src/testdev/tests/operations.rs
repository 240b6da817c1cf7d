//! Operations, and what is refused.

use super::*;

#[test]
fn copies_fills_and_sums_any_length_at_any_address() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    let data: Vec<u8> = (0..200_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    rig.ram.write_slice(&data, GuestAddress(0x1003)).unwrap();
    for length in [0, 1, 7, 4096, 16384, 16385, 200_000] {
        let channel = rig.channel(5).range(0x1003, 0x10_0001, length as u64);
        assert_eq!(channel.run(COPY, 0), IS_DONE);
        assert_eq!(channel.get(DONE), length as u64);
        let mut copy = vec![0; length];
        rig.ram
            .read_slice(&mut copy, GuestAddress(0x10_0001))
            .unwrap();
        assert!(copy == data[..length]);
        assert_eq!(channel.run(CHECKSUM, 0), IS_DONE);
        assert_eq!(channel.get(RESULT), fnv(&data[..length]));
    }
    let channel = rig.channel(5).range(0, 0x20_0003, 40_003);
    let channel = channel.set(PATTERN, 0x0807_0605_0403_0201);
    assert_eq!(channel.run(FILL, 0), IS_DONE);
    let mut filled = vec![0; 40_005];
    rig.ram
        .read_slice(&mut filled, GuestAddress(0x20_0002))
        .unwrap();
    assert_eq!((filled[0], filled[40_004]), (0, 0), "not a byte more");
    let right = filled[1..40_004]
        .iter()
        .enumerate()
        .all(|(n, byte)| *byte as usize == n % 8 + 1);
    assert!(right);
}

#[test]
fn a_device_with_no_viommu_reaches_guest_memory_and_nothing_else() {
    let (ram, msi) = (ram(), FakeMsi::default());
    let port = DmaPort::direct(Arc::clone(&ram));
    let device = TestDevice::new(Features::default(), &msi, |_| Ok::<_, ()>(port)).unwrap();
    let _ = device.config_write(0x04, &[6, 0]);
    let channel = Driver {
        device: &device,
        base: 0x4_0000,
    };
    assert_eq!(channel.range(0, 0x1000, 64).run(COPY, 0), IS_DONE);
    let end = RAM as u64;
    assert_eq!(channel.range(0, end - 16, 64).run(COPY, 0), FAULT);
    assert_eq!(channel.get(FAULT_ADDRESS), end);
    assert_eq!(channel.get(DONE), 16);
    assert_eq!(channel.range(end, 0, 64).run(CHECKSUM, 0), FAULT);
}

#[test]
fn what_configuration_space_does_not_allow_is_not_done() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    rig.apply(Target::pasid(RID, Pasid(1)), Translation::Identity);
    let channel = rig.channel(0).set(PASID, 1).range(0x1000, 0x2000, 8);
    let pasid = rig.capability(0x1b) + 6;
    let cases = [
        (0x04, 0x6, 0x2, 0),
        (pasid, 7, 6, F_PASID),
        (pasid, 7, 5, F_PASID | F_EXECUTE),
        (pasid, 7, 3, F_PASID | F_PRIVILEGED),
        (rig.capability(0x0f) + 6, 1 << 15, 0, F_ATS),
        (rig.capability(0x13) + 4, 1, 0, F_ATS | F_PRI),
    ];
    for (offset, on, off, flags) in cases {
        rig.config(offset, off);
        assert_eq!(channel.run(COPY, flags), DISABLED, "{offset:#x}");
        rig.config(offset, on);
        assert_ne!(channel.run(COPY, flags), DISABLED, "{offset:#x}");
    }
}

#[test]
fn a_message_is_an_interrupt_only_without_pasid_and_in_its_range() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    let channel = rig.channel(0).set(PASID, 1).set(PATTERN, 0x4041);
    for (address, flags, taken) in [
        (0xfee0_1000, 0, 1),
        (0xfee0_1000, F_PASID, 0),
        (0xfed0_0000, 0, 0),
        (0x1000, 0, 0),
    ] {
        assert_eq!(
            channel.set(DESTINATION, address).run(MESSAGE, flags),
            IS_DONE
        );
        assert_eq!(channel.get(RESULT), taken);
    }
    let messages = rig.told.messages.lock().unwrap();
    let forged = Msi {
        address: 0xfee0_1000,
        data: 0x4041,
    };
    assert_eq!(*messages, [forged]);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    let rig = Rig::new();
    rig.apply(Target::rid(RID), Translation::Identity);
    const BAD: u32 = failed(1);
    let channel = rig.channel(0);
    for (operation, flags) in [
        (0, 0),
        (7, 0),
        (u32::MAX, 0),
        (COPY, 1 << 8),
        (COPY, F_PRIVILEGED),
        (COPY, F_EXECUTE),
        (COPY, F_PRI),
    ] {
        assert_eq!(channel.run(operation, flags), BAD, "{operation} {flags:#x}");
    }
    assert_eq!(channel.set(PASID, 1 << 20).run(COPY, F_PASID), BAD);
    assert_eq!(channel.set(GROUP, 512).run(COPY, 0), BAD);
    channel.set(GROUP, 0);
    assert_eq!(channel.range(u64::MAX, 0, 2).run(CHECKSUM, 0), failed(9));
    assert_eq!(channel.range(0, u64::MAX, 2).run(COPY, 0), failed(9));
}
