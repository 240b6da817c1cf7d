//! What a driver finds in the registers.

use super::*;

#[test]
fn a_driver_finds_what_the_document_says() {
    let rig = Rig::new();
    assert_eq!((rig.config_word(0), rig.config_word(2)), (0x1af4, 0x10f0));
    let identity: Vec<_> = (0..5).map(|n| rig.register(4 * n)).collect();
    assert_eq!(identity, [0x414d_444e, 1, 64, 16, 0x3f]);
    let (bar, _) = rig.device.bars()[0];
    assert_eq!((bar.index, bar.length), (0, 512 << 10));
    // Max PASID Width, Execute Permission and Privileged Mode Supported.
    assert_eq!(rig.config_word(rig.capability(0x1b) + 4), 20 << 8 | 0b110);
    assert_eq!(rig.config_word(rig.capability(0x0f) + 4), 1 << 6 | 1 << 5);
}

#[test]
fn before_it_is_enabled_pri_is_stopped_and_wants_pasids_in_responses() {
    let rig = Rig::new();
    let _ = rig.device.reset();
    assert_eq!(rig.config_word(rig.capability(0x13) + 6), 1 << 15 | 1 << 8);
    rig.enable();
    assert_eq!(rig.config_word(rig.capability(0x13) + 6), 1 << 15);
}

#[test]
fn what_was_not_configured_is_not_there() {
    let msi = FakeMsi::default();
    let features = Features {
        pasid_bits: 0,
        ats: false,
        pri: false,
    };
    let new = |features| TestDevice::new(features, &msi, |_| Ok::<_, ()>(DmaPort::direct(ram())));
    let device = new(features).unwrap();
    let mut header = [0; 4];
    device.config_read(0x100, &mut header);
    assert_eq!(header, [0; 4]);
    let wrong = [
        Features {
            pri: true,
            ..features
        },
        Features {
            pasid_bits: 21,
            ..features
        },
    ];
    for features in wrong {
        assert!(matches!(new(features), Err(NewError::Features(_))));
    }
}

#[test]
fn odd_accesses_read_ones_and_write_nothing() {
    let rig = Rig::new();
    for (offset, length) in [
        (0, 1),
        (0, 2),
        (2, 4),
        (4, 8),
        (0x4_0001, 4),
        (512 << 10, 4),
        (u64::MAX, 1),
    ] {
        let mut data = vec![0; length];
        rig.device.bar_read(0, offset, &mut data);
        assert!(
            data.iter().all(|byte| *byte == 0xff),
            "{offset:#x} {length}"
        );
        let _ = rig.device.bar_write(0, offset, &data);
    }
    let _ = rig.device.bar_write(0, 0x4_0010, &[1, 2]);
    assert_eq!(rig.channel(0).get(SOURCE), 0);
    let mut data = [0; 4];
    rig.device.bar_read(1, 0, &mut data);
    assert_eq!(data, [0xff; 4]);
}
