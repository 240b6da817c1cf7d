//! What Linux does from the DMAR table to the first device, register by register.

use std::sync::Arc;

use super::super::testing::*;
use super::super::{Mode, UnitConfig};
use crate::backend::{Backend, Stage1, Stage2, Translation};
use crate::interrupt::Msi;
use crate::spec::vtd::registers as offset;
use crate::{Gpa, Pasid, Rid, Target};

/// Linux writes GCMD as what it has enabled plus a one-shot bit, and waits for GSTS.
fn command(guest: &Guest, enabled: &mut u32, bit: u32, keep: bool) {
    guest.w32(offset::GCMD, *enabled | bit);
    assert_ne!(
        guest.r32(offset::GSTS) & bit,
        0,
        "Linux would panic after 10 s"
    );
    if keep {
        *enabled |= bit;
    }
}

#[test]
fn linux_brings_up_scalable_mode_and_a_device_with_first_stage_tables() {
    let mut guest = Guest::new(UnitConfig::default());
    let mut gcmd = 0;

    // alloc_iommu: capabilities decide on modes and widths.
    let (cap, ecap) = (guest.r64(offset::CAP), guest.r64(offset::ECAP));
    assert_ne!((cap, ecap), (u64::MAX, u64::MAX));
    assert_eq!(guest.r32(offset::VER) >> 4 & 0xf, 6);
    assert_ne!(
        cap >> 8 & 0x1f,
        0,
        "6.1 and 6.12 ignore a unit without SAGAW"
    );
    assert_eq!(
        (ecap >> 43 & 1, ecap >> 47 & 1, ecap >> 46 & 1),
        (1, 1, 0),
        "first stage only"
    );
    assert_eq!(guest.r32(offset::GSTS), 0);

    // dmar_enable_qi: 256-bit descriptors because SMTS, one page of 2^1.
    guest.w32(offset::FSTS, guest.r32(offset::FSTS));
    guest.w32(offset::IQT, 0);
    guest.w64(offset::IQA, QUEUE | 1 << 11);
    command(&guest, &mut gcmd, 1 << 26, true);

    // init_dmars: root table. CAP.ESRTPS spares the three global invalidations; older kernels
    // send them all the same.
    guest.w64(offset::RTADDR, ROOT | 1 << 10);
    command(&guest, &mut gcmd, 1 << 30, false);
    assert!(guest.submit(&[context_global()]));
    assert!(guest.submit(&[pasid_cache_global()]));
    assert!(guest.submit(&[iotlb_global()]));

    // intel_svm_enable_prq, because of PRS.
    guest.w32(offset::PECTL + 4, 0x4022);
    guest.w32(offset::PECTL + 8, 0xfee0_1000);
    guest.w32(offset::PECTL + 12, 0);
    guest.w32(offset::PECTL, 0);
    guest.w64(offset::PQH, 0);
    guest.w64(offset::PQT, 0);
    guest.w64(offset::PQA, 0x40_0000 | 4);
    assert_eq!(guest.r64(offset::PQA), 0x40_0000 | 4);

    // dmar_set_interrupt.
    guest.w32(offset::FECTL + 4, 0x4021);
    guest.w32(offset::FECTL + 8, 0xfee0_1000);
    guest.w32(offset::FECTL + 12, 0);
    guest.w32(offset::FECTL, 0);
    assert_eq!(guest.r32(offset::FECTL), 0);
    guest.w32(offset::FSTS, guest.r32(offset::FSTS));

    command(&guest, &mut gcmd, 1 << 31, true);
    let nic = Target::rid(NIC);
    assert_eq!(guest.backend.translation(nic), Translation::Blocked);

    // Probe: the PASID table, the context entry (not caching-mode silent), then the DMA domain
    // on RID_PASID 0: entry, PASID cache, PASID IOTLB.
    let directory = guest.context(NIC);
    assert_eq!(guest.backend.translation(nic), Translation::Blocked);
    guest.backend.calls();
    let root = guest.page();
    guest.set_pasid(directory, 0, first_stage(2, root));
    assert!(guest.submit(&[pasid_cache(2, 0)]));
    let stage1 = Translation::Stage1(Stage1 {
        root: Gpa(root),
        width: 48,
        sre: false,
        wpe: false,
        eafe: false,
        ere: false,
        pwsnp: true,
        fs1gp: true,
    });
    assert_eq!(
        guest.backend.calls(),
        [Call::Apply(nic, stage1)],
        "before the wait was done"
    );
    assert!(guest.submit(&[pasid_iotlb_all(2, 0)]));

    // A map of the DMA API writes PTEs and nothing else. An unmap in strict mode is one tail
    // write, done when it returns.
    guest.backend.calls();
    assert!(guest.submit(&[pasid_iotlb_pages(2, 0, 0xffff_f000, 0)]));
    assert_eq!(guest.backend.calls().len(), 1);

    // SVA: another PASID of the same device.
    let mm = guest.page();
    guest.bind(directory, 1, first_stage(3, mm));
    assert!(matches!(
        guest.backend.translation(Target::pasid(NIC, Pasid(1))),
        Translation::Stage1(_)
    ));

    // Teardown: P=0, PASID cache, PASID IOTLB, device TLB, zero.
    guest.bind(directory, 1, Default::default());
    assert_eq!(
        guest.backend.translation(Target::pasid(NIC, Pasid(1))),
        Translation::Blocked
    );
    assert_eq!(
        guest.backend.translation(nic),
        stage1,
        "the other PASID is not touched"
    );
    assert_eq!(guest.faults(), []);
    assert_eq!(guest.mailbox.take(), [], "no interrupt was asked for");
}

#[test]
fn linux_brings_up_legacy_mode_with_second_stage_tables() {
    for (width, aw) in [(39, 1), (48, 2), (57, 3)] {
        let mut guest = Guest::legacy(UnitConfig {
            mode: Mode::Legacy,
            address_width: Some(width),
            ..UnitConfig::default()
        });
        assert_eq!(guest.r64(offset::ECAP) >> 43 & 1, 0);
        assert_eq!(guest.r32(offset::VER), 0x10);
        let root = guest.page();
        guest.set_legacy_context(NIC, [root | 1, 5 << 8 | aw]);
        assert!(guest.submit(&[context_device(NIC), iotlb_domain(5)]));
        assert_eq!(
            guest.backend.translation(Target::rid(NIC)),
            Translation::Stage2(Stage2 {
                root: Gpa(root),
                width,
                ad: false
            })
        );
        // iommu=pt.
        guest.set_legacy_context(NIC, [2 << 2 | 1, 1 << 8 | aw]);
        assert!(guest.submit(&[context_device(NIC), iotlb_domain(1)]));
        assert_eq!(
            guest.backend.translation(Target::rid(NIC)),
            Translation::Identity
        );
    }
}

#[test]
fn a_guest_with_sm_off_uses_legacy_tables_and_wide_descriptors_on_a_scalable_unit() {
    let mut guest = Guest::legacy(UnitConfig::default());
    assert!(guest.wide);
    let root = guest.page();
    guest.set_legacy_context(NIC, [root | 1, 5 << 8 | 2]);
    assert!(guest.submit(&[context_device(NIC), iotlb_pages(5, 0x1000, 0)]));
    assert!(matches!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Stage2(_)
    ));
}

#[test]
fn kexec_finds_a_unit_that_can_be_brought_up_again() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, pass_through(1));
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
    // The next kernel finds translation on, switches it and the queue off, and starts over.
    guest.w32(offset::GCMD, 1 << 26);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Blocked
    );
    guest.w32(offset::GCMD, 0);
    assert_eq!(
        (guest.r32(offset::GSTS) >> 26 & 1, guest.r64(offset::IQH)),
        (0, 0)
    );
    guest.enable_queue();
    guest.w64(offset::RTADDR, ROOT | 1 << 10);
    guest.w32(offset::GCMD, 1 << 26 | 1 << 30);
    guest.w32(offset::GCMD, 1 << 26 | 1 << 31);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
    assert!(guest.submit(&[]));
}

#[test]
fn reset_blocks_everything_and_what_is_offered_stays() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, pass_through(1));
    guest.bind(directory, 5, pass_through(1));
    let cap = guest.r64(offset::CAP);
    guest.unit.reset();
    assert_eq!(guest.backend.objects().targets, 0);
    assert_eq!(
        (guest.r32(offset::GSTS), guest.r32(offset::FECTL)),
        (0, 1 << 31)
    );
    assert_eq!(guest.r64(offset::CAP), cap);
    assert_eq!(guest.unit.state().live_targets, 0);
}

#[test]
fn an_endpoint_is_blocked_from_the_moment_it_exists_and_with_bypass_identity_until_te() {
    let guest = Guest::new(UnitConfig::default());
    assert_eq!(guest.backend.calls(), [Call::Claim(NIC)]);
    let guest = Guest::new(UnitConfig {
        bypass: true,
        ..UnitConfig::default()
    });
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
    guest.w64(offset::RTADDR, ROOT | 1 << 10);
    guest.w32(offset::GCMD, 1 << 30);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
    guest.w32(offset::GCMD, 1 << 31);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Blocked
    );
    guest.w32(offset::GCMD, 0);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
}

#[test]
fn translation_without_a_root_table_blocks() {
    let guest = Guest::new(UnitConfig {
        bypass: true,
        ..UnitConfig::default()
    });
    guest.w32(offset::GCMD, 1 << 31);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Blocked
    );
}

#[test]
fn a_hot_plugged_endpoint_gets_what_the_tables_say_already() {
    let mut guest = Guest::scalable();
    let late = Rid::new(0, 0x1f, 7);
    let directory = guest.page();
    guest.set_context(late, [directory | 9, 0, 0, 0]);
    guest.set_pasid(directory, 0, pass_through(1));
    guest.set_pasid(directory, 77, pass_through(1));
    guest
        .unit
        .add_endpoint(late, Arc::clone(&guest.backend) as _)
        .unwrap();
    assert_eq!(
        guest.backend.translation(Target::rid(late)),
        Translation::Identity
    );
    let pasid = Target::pasid(late, Pasid(77));
    assert_eq!(guest.backend.translation(pasid), Translation::Identity);
    assert!(
        guest
            .unit
            .add_endpoint(late, Arc::clone(&guest.backend) as _)
            .is_err()
    );
    guest.unit.remove_endpoint(late);
    guest.unit.remove_endpoint(late);
    assert_eq!(guest.backend.objects().endpoints, 1);
    assert_eq!(guest.backend.objects().targets, 0);
}

#[test]
fn a_back_end_that_was_there_from_the_start_goes_with_its_last_endpoint() {
    let guest = Guest::scalable();
    assert!(Arc::strong_count(&guest.backend) > 1);
    guest.unit.remove_endpoint(NIC);
    assert_eq!(Arc::strong_count(&guest.backend), 1);
}

#[test]
fn a_back_end_that_came_late_goes_with_its_last_endpoint() {
    let guest = Guest::scalable();
    let late = Recorder::new(CAPABLE);
    let before = Arc::strong_count(&late);
    let rid = Rid::new(0, 9, 0);
    for _ in 0..2 {
        guest
            .unit
            .add_endpoint(rid, Arc::clone(&late) as _)
            .unwrap();
        assert!(Arc::strong_count(&late) > before);
        guest.unit.remove_endpoint(rid);
        assert_eq!(Arc::strong_count(&late), before);
    }
}

#[test]
fn capabilities_freeze_at_the_first_access_of_the_guest() {
    let guest = Guest::new(UnitConfig::default());
    let narrow = Recorder::new(crate::backend::Capabilities {
        address_width: 39,
        ..CAPABLE
    });
    let late = Rid::new(0, 9, 0);
    let error = guest
        .unit
        .add_endpoint(late, Arc::clone(&narrow) as _)
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    for part in ["MGAW", "48", "39"] {
        assert!(source.contains(part), "{source}");
    }
    assert_eq!(narrow.calls(), [], "it was never claimed");
}

#[test]
fn events_are_sent_to_where_the_guest_said_with_all_destination_bits() {
    let guest = Guest::scalable();
    guest.w32(offset::FECTL + 12, 0x100);
    guest.w32(offset::IQT, 0x7_fff0);
    assert_eq!(
        guest.mailbox.take(),
        [Msi {
            address: 0x100_fee0_0000,
            data: offset::FECTL as u32
        }]
    );
}
