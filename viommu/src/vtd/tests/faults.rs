//! The fault log: what is recorded, overflow, the event; and what the guest is told when a back
//! end refuses.

use super::super::UnitConfig;
use super::super::testing::*;
use crate::backend::{Access, Backend, Fault, FaultCause, PageRequest, Stage, Translation};
use crate::spec::vtd::fault::FaultReason as R;
use crate::spec::vtd::registers as offset;
use crate::{Iova, Pasid, Rid, Target};

fn fault(target: Target, iova: u64, access: Access, cause: FaultCause) -> Fault {
    Fault {
        target,
        iova: Iova(iova),
        access,
        execute: false,
        privileged: false,
        cause,
    }
}

/// NIC with first-stage tables on RID traffic and PASID 5.
fn bound() -> Guest {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    for pasid in [0, 5] {
        let root = guest.page();
        guest.bind(directory, pasid, first_stage(2, root));
    }
    guest
}

const NOT_MAPPED: FaultCause = FaultCause::NotMapped {
    stage: Stage::First,
    level: 1,
};

#[test]
fn a_record_names_the_device_the_address_the_reason_and_the_pasid() {
    let guest = bound();
    let nic = Target::rid(NIC);
    guest
        .backend
        .fault(fault(nic, 0xffff_8000_0000_1234, Access::WRITE, NOT_MAPPED));
    assert_eq!(guest.r32(offset::FSTS), 2);
    let at = offset::FRCD;
    assert_eq!(guest.r64(at), 0xffff_8000_0000_1000);
    assert_eq!(guest.r32(at + 8), u32::from(NIC.0));
    assert_eq!(guest.r32(at + 12), 1 << 31 | 0x71, "T1 is clear: a write");
    guest.w32(at + 12, 1 << 31);
    assert_eq!(guest.r32(offset::FSTS), 0);
    let five = Target::pasid(NIC, Pasid(5));
    let request = Fault {
        execute: true,
        privileged: true,
        ..fault(five, 0x1000, Access::READ, NOT_MAPPED)
    };
    guest.backend.fault(request);
    assert_eq!(guest.r32(offset::FSTS), 1 << 8 | 2, "the second record");
    assert_eq!(guest.r32(at + 16 + 8), 7 << 29 | u32::from(NIC.0));
    assert_eq!(guest.r32(at + 16 + 12), 3 << 30 | 5 << 8 | 0x71);
}

#[test]
fn a_record_tells_dma_page_requests_and_translation_requests_apart() {
    let mut guest = bound();
    let five = Target::pasid(NIC, Pasid(5));
    // P and PASIDE, neither DTE nor PRE.
    let directory = guest.page();
    guest.set_context(NIC, [directory | 9, 0, 0, 0]);
    assert!(guest.submit(&[context_device(NIC)]));
    let types = |guest: &Guest| {
        let at = offset::FRCD + u64::from(guest.r32(offset::FSTS) >> 8) * 16;
        let (t2, top) = (guest.r32(at + 8) >> 28 & 1, guest.r32(at + 12));
        guest.faults();
        (top >> 30 & 1, t2, top >> 28 & 3)
    };
    for access in [Access::READ, Access::WRITE] {
        guest.backend.ask(PageRequest {
            target: five,
            group: 1,
            last: true,
            iova: Iova(0x1000),
            access,
            execute: false,
            privileged: false,
        });
        assert_eq!(types(&guest), (0, 1, 0), "a page request");
    }
    assert!(!guest.backend.asks_translation(five, Iova(0x1000)));
    assert_eq!(types(&guest), (1, 0, 1), "a translation request");
    guest
        .backend
        .fault(fault(five, 0, Access::READ, FaultCause::Blocked));
    assert_eq!(types(&guest), (1, 0, 0));
    guest
        .backend
        .fault(fault(five, 0, Access::WRITE, FaultCause::Blocked));
    assert_eq!(types(&guest), (0, 0, 0));
}

#[test]
fn translation_requests_are_for_devices_that_the_guest_lets_have_a_device_tlb() {
    let mut guest = bound();
    let (plain, five) = (Target::rid(NIC), Target::pasid(NIC, Pasid(5)));
    let asked = |guest: &Guest, target| {
        let allowed = guest.backend.asks_translation(target, Iova(0x7000));
        let faults = guest.faults();
        assert!(!allowed || faults.is_empty());
        (allowed, faults.first().map(|fault| fault.1))
    };
    for target in [plain, five] {
        assert_eq!(asked(&guest, target), (true, None));
    }
    // What has no translation has that as its answer.
    let absent = Target::pasid(NIC, Pasid(9));
    assert_eq!(asked(&guest, absent), (true, None));
    let is = |reason: R| (false, Some(reason.code()));
    let directory = guest.page();
    guest.set_pasid(directory, 0, pass_through(1));
    let mut wrong = pass_through(1);
    wrong.q0.set_pgtt(7);
    guest.set_pasid(directory, 5, wrong);
    guest.set_context(NIC, [directory | 0x1d, 0, 0, 0]);
    assert_eq!(asked(&guest, plain), (true, None));
    assert_eq!(asked(&guest, five), is(R::PasidEntryInvalid));
    guest.set_context(NIC, [directory | 9, 0, 0, 0]);
    assert_eq!(asked(&guest, plain), is(R::DeviceTlbDisabled));
    guest.set_context(NIC, [directory | 9 | 2, 0, 0, 0]);
    assert_eq!(asked(&guest, plain), (false, None), "FPD");
    guest.set_context(NIC, [0; 4]);
    assert_eq!(asked(&guest, plain), is(R::ScalableContextNotPresent));
    guest.w32(offset::GCMD, 1 << 26);
    assert_eq!(asked(&guest, plain), (false, None), "translation is off");

    let mut guest = Guest::legacy(UnitConfig {
        mode: super::super::Mode::Legacy,
        ..UnitConfig::default()
    });
    let root = guest.page();
    for (kind, expected) in [
        (0, is(R::RequestBlocked)),
        (1, is(R::ContextEntryInvalid)),
        (2, is(R::RequestBlocked)),
    ] {
        guest.set_legacy_context(NIC, [root | kind << 2 | 1, 2]);
        assert_eq!(asked(&guest, plain), expected, "TT {kind}");
    }
}

#[test]
fn eight_faults_are_recorded_more_are_reported_as_overflow_and_linux_clears_them_all() {
    let guest = bound();
    for page in 0..11 {
        let request = fault(Target::rid(NIC), page << 12, Access::READ, NOT_MAPPED);
        guest.backend.fault(request);
    }
    assert_eq!(guest.r32(offset::FSTS), 3, "PPF and PFO, FRI 0");
    assert_eq!(guest.mailbox.take().len(), 1, "one event for all of them");
    let addresses: Vec<_> = guest
        .faults()
        .into_iter()
        .map(|(.., at, _)| at >> 12)
        .collect();
    assert_eq!(addresses, [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(guest.r32(offset::FSTS), 0);
    let state = guest.unit.state();
    assert_eq!((state.faults_recorded, state.faults_lost), (8, 3));
    // And on from there, with a new event.
    let request = fault(Target::rid(NIC), 0x9000, Access::READ, NOT_MAPPED);
    guest.backend.fault(request);
    assert_eq!(guest.mailbox.take().len(), 1);
    assert_eq!(guest.faults().len(), 1);
}

#[test]
fn records_are_used_round_robin_and_fri_names_the_oldest() {
    let guest = bound();
    for round in 0..20 {
        let request = fault(Target::rid(NIC), round << 12, Access::READ, NOT_MAPPED);
        guest.backend.fault(request);
        assert_eq!(guest.r32(offset::FSTS) >> 8, round as u32 % 8);
        assert_eq!(guest.faults(), [(NIC.0, 0x71, round << 12, None)]);
    }
}

#[test]
fn recording_begins_at_the_first_register_when_remapping_was_off() {
    let guest = bound();
    let request = fault(Target::rid(NIC), 0, Access::READ, NOT_MAPPED);
    guest.backend.fault(request);
    guest.faults();
    guest.w32(offset::GCMD, 1 << 26);
    guest.w32(offset::GCMD, 1 << 31 | 1 << 26);
    guest.backend.fault(request);
    assert_eq!(guest.r32(offset::FSTS) >> 8, 0);
    assert_eq!(guest.faults().len(), 1);
}

#[test]
fn nothing_is_recorded_while_overflow_is_not_serviced() {
    let guest = bound();
    let request = fault(Target::rid(NIC), 0, Access::READ, NOT_MAPPED);
    for _ in 0..9 {
        guest.backend.fault(request);
    }
    guest.w32(offset::FRCD + 12, 1 << 31);
    guest.backend.fault(request);
    assert_eq!(guest.r32(offset::FRCD + 12) >> 31, 0, "PFO is still set");
    guest.w32(offset::FSTS, 1);
    guest.backend.fault(request);
    assert_eq!(guest.r32(offset::FRCD + 12) >> 31, 1);
}

#[test]
fn a_masked_fault_event_is_pending_and_gone_when_everything_is_cleared() {
    let guest = bound();
    guest.w32(offset::FECTL, 1 << 31);
    let request = fault(Target::rid(NIC), 0, Access::READ, NOT_MAPPED);
    guest.backend.fault(request);
    assert_eq!(guest.r32(offset::FECTL), 3 << 30);
    guest.faults();
    assert_eq!(guest.r32(offset::FECTL), 1 << 31);
    guest.backend.fault(request);
    assert_eq!(guest.mailbox.take(), []);
    guest.w32(offset::FECTL, 0);
    assert_eq!(guest.mailbox.take().len(), 1);
}

#[test]
fn every_cause_has_the_reason_of_its_mode_and_stage() {
    let guest = bound();
    let nic = Target::rid(NIC);
    let (r, w) = (Access::READ, Access::WRITE);
    let permission = |stage| FaultCause::Permission {
        stage,
        privileged: false,
    };
    let cases = [
        (r, NOT_MAPPED, R::FirstStageNotPresent),
        (r, FaultCause::AddressWidth, R::NotCanonical),
        (w, permission(Stage::First), R::ScalableWriteNotPermitted),
        (
            r,
            FaultCause::SupervisorPage,
            R::UserRequestToSupervisorPage,
        ),
        (
            w,
            FaultCause::SupervisorPage,
            R::UserRequestToSupervisorPage,
        ),
        (
            w,
            permission(Stage::SecondForRoot),
            R::FirstStageRootNotReadable,
        ),
        (
            w,
            permission(Stage::SecondForTable),
            R::FirstStageNotReadable,
        ),
        (
            r,
            permission(Stage::SecondForUpdate),
            R::FirstStageNotWritable,
        ),
        (
            r,
            FaultCause::Reserved {
                stage: Stage::First,
                level: 2,
            },
            R::FirstStageReserved,
        ),
        (
            r,
            FaultCause::TableAccess {
                stage: Stage::First,
                level: 4,
            },
            R::FirstStageRootAccess,
        ),
        (
            r,
            FaultCause::TableAccess {
                stage: Stage::First,
                level: 2,
            },
            R::FirstStageAccess,
        ),
        (r, FaultCause::OutsideMemory, R::ScalableReadNotPermitted),
        (r, FaultCause::Supervisor, R::SupervisorDisabled),
        (r, FaultCause::InterruptRange, R::ScalableInterruptRange),
        (r, FaultCause::NotAMessage, R::NotAnInterrupt),
        (r, FaultCause::ExecuteDisabled, R::ExecuteDisabled),
        (r, FaultCause::UpdateNotSnooped, R::FirstStageAccessedDirty),
    ];
    for (access, cause, reason) in cases {
        guest.backend.fault(fault(nic, 0, access, cause));
        assert_eq!(guest.faults()[0].1, reason.code(), "{cause:?}");
    }

    let mut guest = Guest::legacy(UnitConfig {
        mode: super::super::Mode::Legacy,
        ..UnitConfig::default()
    });
    let root = guest.page();
    guest.set_legacy_context(NIC, [root | 1, 2]);
    assert!(guest.submit(&[context_global()]));
    let second = Stage::Second;
    let cases = [
        (
            r,
            FaultCause::NotMapped {
                stage: second,
                level: 1,
            },
            R::ReadNotPermitted,
        ),
        (
            w,
            FaultCause::NotMapped {
                stage: second,
                level: 1,
            },
            R::WriteNotPermitted,
        ),
        (w, permission(second), R::WriteNotPermitted),
        (
            r,
            FaultCause::Reserved {
                stage: second,
                level: 1,
            },
            R::SecondStageReserved,
        ),
        (
            r,
            FaultCause::TableAccess {
                stage: second,
                level: 4,
            },
            R::ContextEntryInvalid,
        ),
        (
            r,
            FaultCause::TableAccess {
                stage: second,
                level: 3,
            },
            R::SecondStageAccess,
        ),
        (r, FaultCause::AddressWidth, R::AddressBeyondWidth),
        (r, FaultCause::InterruptRange, R::InterruptRange),
        (r, FaultCause::NotAMessage, R::NotAnInterrupt),
    ];
    for (access, cause, reason) in cases {
        guest.backend.fault(fault(nic, 0, access, cause));
        assert_eq!(guest.faults()[0].1, reason.code(), "{cause:?}");
    }
}

#[test]
fn nested_and_second_stage_causes_have_the_scalable_reasons() {
    let config = UnitConfig {
        nested: true,
        ..UnitConfig::default()
    };
    let mut guest = Guest::scalable_with(config, CAPABLE);
    let directory = guest.context(NIC);
    let mut entry = first_stage(2, 0x5000);
    entry.q0 = entry.q0.with_pgtt(3).with_ssptptr(7);
    guest.bind(directory, 0, entry);
    let (second, table) = (Stage::Second, Stage::SecondForTable);
    for (cause, reason) in [
        (
            FaultCause::NotMapped {
                stage: second,
                level: 1,
            },
            R::ScalableSecondStageNotPresent,
        ),
        (
            FaultCause::NotMapped {
                stage: table,
                level: 1,
            },
            R::ScalableSecondStageNotPresent,
        ),
        (FaultCause::BeyondSecondStage, R::FirstStageTableBeyondWidth),
        (
            FaultCause::Reserved {
                stage: second,
                level: 1,
            },
            R::ScalableSecondStageReserved,
        ),
        (
            FaultCause::TableAccess {
                stage: second,
                level: 4,
            },
            R::SecondStageRootAccess,
        ),
        (
            FaultCause::TableAccess {
                stage: second,
                level: 3,
            },
            R::ScalableSecondStageAccess,
        ),
    ] {
        guest
            .backend
            .fault(fault(Target::rid(NIC), 0, Access::READ, cause));
        assert_eq!(guest.faults()[0].1, reason.code(), "{cause:?}");
    }
}

#[test]
fn a_refused_translation_is_blocked_told_and_asked_for_again() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    let nic = Target::rid(NIC);
    guest.backend.refuse(3);
    guest.bind(directory, 0, first_stage(2, 0x5000));
    assert_eq!(guest.backend.translation(nic), Translation::Blocked);
    // The bind is a PASID-cache and a PASID IOTLB invalidation: two attempts so far.
    let told = (NIC.0, R::PasidEntryInvalid.code(), 0, None);
    assert_eq!(guest.faults(), [told, told]);
    let target = guest.unit.state().targets[0];
    assert!(!target.in_force && target.problem.is_none());
    // What the device tries meanwhile has that reason too.
    guest
        .backend
        .fault(fault(nic, 0x1000, Access::READ, FaultCause::Blocked));
    assert_eq!(guest.faults()[0].1, R::PasidEntryInvalid.code());
    // Every kind of invalidation that touches it tries again.
    assert!(guest.submit(&[pasid_iotlb_pages(2, 0, 0x1000, 0)]));
    assert_eq!(guest.faults(), [told]);
    assert!(guest.submit(&[iotlb_global()]));
    assert!(matches!(
        guest.backend.translation(nic),
        Translation::Stage1(_)
    ));
    assert_eq!(guest.faults(), []);
    assert!(guest.unit.state().targets[0].in_force);
}

#[test]
fn a_refused_change_never_leaves_the_old_table_in_force() {
    let mut guest = bound();
    let nic = Target::rid(NIC);
    let directory = guest.context(NIC);
    guest.bind(directory, 0, first_stage(2, 0x5000));
    guest.backend.refuse(1);
    guest.set_pasid(directory, 0, first_stage(2, 0x6000));
    assert!(guest.submit(&[pasid_cache(2, 0)]));
    assert_eq!(guest.backend.translation(nic), Translation::Blocked);
    assert!(guest.submit(&[pasid_cache(2, 0)]));
    assert!(matches!(guest.backend.translation(nic), Translation::Stage1(s) if s.root.0 == 0x6000));
}

#[test]
fn an_invalidation_that_fails_blocks_what_may_be_stale_and_the_next_one_restores_it() {
    let mut guest = bound();
    let five = Target::pasid(NIC, Pasid(5));
    guest.backend.cut_short(1);
    assert!(guest.submit(&[
        pasid_iotlb_pages(2, 0, 0x1000, 0),
        pasid_iotlb_pages(2, 5, 0x2000, 0)
    ]));
    assert!(matches!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Stage1(_)
    ));
    assert_eq!(guest.backend.translation(five), Translation::Blocked);
    assert_eq!(
        guest.faults(),
        [(NIC.0, R::PasidEntryInvalid.code(), 0, Some(5))]
    );
    assert!(guest.submit(&[pasid_iotlb_pages(2, 5, 0x2000, 0)]));
    assert!(matches!(
        guest.backend.translation(five),
        Translation::Stage1(_)
    ));
    // A global one that fails blocks everything of that back end.
    guest.backend.cut_short(0);
    assert!(guest.submit(&[iotlb_global()]));
    assert_eq!(guest.backend.objects().targets, 0);
    assert!(guest.submit(&[iotlb_global()]));
    assert_eq!(guest.backend.objects().targets, 2);
}

#[test]
fn a_refusal_in_legacy_mode_is_an_invalid_context_entry() {
    let mut guest = Guest::legacy(UnitConfig {
        mode: super::super::Mode::Legacy,
        ..UnitConfig::default()
    });
    guest.backend.refuse(1);
    guest.set_legacy_context(NIC, [0x5001, 2]);
    assert!(guest.submit(&[context_global()]));
    assert_eq!(
        guest.faults(),
        [(NIC.0, R::ContextEntryInvalid.code(), 0, None)]
    );
    assert!(guest.submit(&[context_global()]));
    let translation = guest.backend.translation(Target::rid(NIC));
    assert!(matches!(translation, Translation::Stage2(_)));
}

#[test]
fn faults_while_translation_is_off_and_of_endpoints_elsewhere_are_not_the_guests() {
    let guest = Guest::new(UnitConfig::default());
    guest.backend.fault(fault(
        Target::rid(NIC),
        0,
        Access::READ,
        FaultCause::Blocked,
    ));
    assert_eq!(guest.r32(offset::FSTS), 0);
    let guest = bound();
    guest.unit.remove_endpoint(NIC);
    guest.backend.fault(fault(
        Target::rid(NIC),
        0,
        Access::READ,
        FaultCause::Blocked,
    ));
    assert_eq!(guest.faults(), []);
}

#[test]
fn a_blocked_interrupt_is_recorded_with_its_index() {
    let guest = bound();
    let rid = Rid::new(0xff, 0, 0);
    guest
        .unit
        .interrupt_fault(rid, 0x1234, R::InterruptSource, false);
    assert_eq!(guest.faults(), [(rid.0, 0x26, 0x1234 << 48, None)]);
    guest
        .unit
        .interrupt_fault(rid, 0x1234, R::InterruptEntryNotPresent, true);
    assert_eq!(guest.faults(), []);
}

#[test]
fn the_last_faults_stay_in_the_state_when_the_guest_clears_them() {
    let guest = bound();
    for page in 0..40 {
        guest.backend.fault(fault(
            Target::rid(NIC),
            page << 12,
            Access::READ,
            NOT_MAPPED,
        ));
        guest.faults();
    }
    let state = guest.unit.state();
    assert_eq!(state.last_faults.len(), 16);
    assert_eq!(state.last_faults[15].iova, Iova(39 << 12));
    let json = serde_json::to_value(&state).unwrap();
    assert_eq!(json["last_faults"][15]["reason"], "first-stage-not-present");
    assert_eq!(json["targets"][0]["translation"]["kind"], "stage1");
}
