//! Decoding, of what Linux writes and of anything else.

use proptest::prelude::*;

use super::*;

const EVERYTHING: Offered = Offered {
    mamv: 18,
    scalable: true,
    device_tlb: true,
    page_requests: true,
    interrupt_remapping: true,
    mhmv: 15,
};

fn all(low: u64, high: u64) -> Result<Descriptor, QueueError> {
    decode([low, high, 0, 0], EVERYTHING)
}

#[test]
fn what_linux_writes_is_understood() {
    assert_eq!(
        all(0x1 | (1 << 4), 0),
        Ok(Descriptor::ContextCache(ContextScope::Global))
    );
    assert_eq!(
        all(0x1 | (3 << 4) | (7 << 16) | (0x18 << 32) | (3 << 48), 0),
        Ok(Descriptor::ContextCache(ContextScope::Device {
            sid: 0x18,
            mask: 7
        }))
    );
    assert_eq!(
        all(0x7 | (1 << 4) | (9 << 16) | (5 << 32), 0),
        Ok(Descriptor::PasidCache(PasidScope::Pasid {
            did: 9,
            pasid: 5
        }))
    );
    // IOTLB, page-selective, both drains, 4 pages.
    assert_eq!(
        all(
            0x2 | (3 << 4) | (3 << 6) | (9 << 16),
            0x1234_7000 | (1 << 6) | 2
        ),
        Ok(Descriptor::Iotlb(IotlbScope::Pages {
            did: 9,
            range: Range::Pages {
                first: 0x1234_4000,
                pages: 4,
                leaf: true
            }
        }))
    );
    // Wait: status write and drain.
    assert_eq!(
        all(0x5 | (1 << 5) | (1 << 7) | (2 << 32), 0x1000_0004),
        Ok(Descriptor::Wait {
            status: Some((0x1000_0004, 2)),
            interrupt: false,
            fence: false,
            drain: true
        })
    );
    // Page group response with PASID.
    assert_eq!(
        all(
            0x9 | (1 << 4) | (1 << 12) | (0x18 << 16) | (5 << 32),
            (3 << 3) | 4
        ),
        Ok(Descriptor::PageGroupResponse {
            rid: 0x18,
            pasid: Some(5),
            prgi: 3,
            code: 1
        })
    );
    // Device-TLB of everything: address all ones but the top, S.
    assert_eq!(
        all(0x3 | (0x18 << 32), 0x7fff_ffff_ffff_f001),
        Ok(Descriptor::DeviceTlb {
            sid: 0x18,
            range: Range::All
        })
    );
    assert_eq!(
        all(0x8 | (0x18 << 16) | (5 << 32), 0x1_3000 | (1 << 11)),
        Ok(Descriptor::PasidDeviceTlb {
            sid: 0x18,
            pasid: Some(5),
            range: Range::Pages {
                first: 0x1_0000,
                pages: 8,
                leaf: false
            }
        })
    );
    assert_eq!(
        all(0x4 | (1 << 4) | (3 << 27) | (0x13 << 32), 0),
        Ok(Descriptor::InterruptEntryCache {
            entries: Some((0x10, 8))
        })
    );
}

#[test]
fn a_pasid_iotlb_mask_above_mamv_is_no_error() {
    for am in 0..64 {
        let decoded = all(0x6 | (3 << 4), am).unwrap();
        let Descriptor::PasidIotlb { range, .. } = decoded else {
            panic!("{decoded:?}")
        };
        assert_eq!(range == Range::All, am >= 52);
    }
    assert_eq!(all(0x2 | (3 << 4), 18).map(|_| ()), Ok(()));
    assert_eq!(all(0x2 | (3 << 4), 19), Err(QueueError::Reserved));
}

#[test]
fn a_type_that_was_not_offered_is_an_unknown_type() {
    let none = Offered {
        scalable: false,
        device_tlb: false,
        page_requests: false,
        interrupt_remapping: false,
        ..EVERYTHING
    };
    for kind in 0..128u64 {
        let words = [kind & 15 | (kind >> 4) << 9 | (1 << 4), 0, 0, 0];
        let known = decode(words, none) != Err(QueueError::Type);
        assert_eq!(known, matches!(kind, 1 | 2 | 5), "type {kind}");
        let known = decode(words, EVERYTHING) != Err(QueueError::Type);
        assert_eq!(known, (1..=9).contains(&kind), "type {kind}");
    }
}

#[test]
fn every_reserved_bit_is_refused() {
    // One valid descriptor of each type; each bit outside its fields must be refused.
    let valid = [
        (1, 1u64 << 4),
        (2, 1 << 4),
        (3, 0),
        (4, 0),
        (5, 0),
        (6, 2 << 4),
        (7, 3 << 4),
        (8, 0),
        (9, 0),
    ];
    for (kind, extra) in valid {
        let low = kind | extra;
        assert!(all(low, 0).is_ok(), "type {kind}");
        let (low_fields, high_fields) = fields(kind as u8);
        for bit in 0..64 {
            let refused = all(low | 1 << bit, 0).is_err();
            assert!(
                refused || low_fields & (1 << bit) != 0,
                "type {kind} bit {bit}"
            );
            if low_fields & (1 << bit) == 0 {
                assert_eq!(all(low | 1 << bit, 0), Err(QueueError::Reserved));
            }
            if high_fields & (1 << bit) == 0 {
                assert_eq!(all(low, 1 << bit), Err(QueueError::Reserved));
            }
            for word in 2..4 {
                let mut words = [low, 0, 0, 0];
                words[word] = 1 << bit;
                assert_eq!(decode(words, EVERYTHING), Err(QueueError::Reserved));
            }
        }
    }
}

proptest! {
    #[test]
    fn decoding_is_total_and_ranges_are_aligned(words: [u64; 4], scalable: bool) {
        let offered = Offered { scalable, ..EVERYTHING };
        let range = match decode(words, offered) {
            Ok(Descriptor::PasidIotlb { range, .. }
                | Descriptor::DeviceTlb { range, .. }
                | Descriptor::PasidDeviceTlb { range, .. }
                | Descriptor::Iotlb(IotlbScope::Pages { range, .. })) => range,
            _ => Range::All,
        };
        if let Range::Pages { first, pages, .. } = range {
            prop_assert!(pages.is_power_of_two());
            prop_assert_eq!((first >> 12) % pages, 0);
        }
    }

    #[test]
    fn a_sized_range_contains_its_address(page in 0u64..1 << 52, s: bool) {
        if let Range::Pages { first, pages, .. } = sized_range(page, s) {
            prop_assert!(first >> 12 <= page && page < (first >> 12) + pages);
        }
    }
}
