//! The queue: what each descriptor does, in which order, how much, and what stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::UnitConfig;
use super::super::testing::*;
use crate::backend::{Backend, Invalidation, InvalidationRange, Scope, Translation};
use crate::spec::vtd::descriptor::{Words, kind};
use crate::spec::vtd::registers::{self as offset, QueueError};
use crate::{Iova, Pasid, Rid, Target};

const ALL: InvalidationRange = InvalidationRange::All;

fn of(target: Target, range: InvalidationRange) -> Invalidation {
    Invalidation {
        scope: Scope::Target(target),
        range,
    }
}

fn pages(first: u64, count: u64, leaf: bool) -> InvalidationRange {
    InvalidationRange::Pages {
        first: Iova(first),
        count,
        leaf,
    }
}

/// NIC with first-stage RID traffic in domain 2 and PASIDs 5 (domain 3) and 6 (domain 3).
fn bound() -> Guest {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    for (did, pasid) in [(2, 0), (3, 5), (3, 6)] {
        let root = guest.page();
        guest.bind(directory, pasid, first_stage(did, root));
    }
    guest.backend.calls();
    guest
}

#[test]
fn each_invalidation_reaches_exactly_the_targets_it_names() {
    let mut guest = bound();
    let (nic, five) = (Target::rid(NIC), Target::pasid(NIC, Pasid(5)));
    let six = Target::pasid(NIC, Pasid(6));
    let everything = Invalidation {
        scope: Scope::All,
        range: ALL,
    };
    let cases: [(Words, Vec<Invalidation>); 11] = [
        (iotlb_global(), vec![everything]),
        (iotlb_domain(3), vec![of(five, ALL), of(six, ALL)]),
        (iotlb_domain(9), vec![]),
        // Page-selective IOTLB invalidations are of second-stage translations.
        (iotlb_pages(3, 0x1000, 0), vec![]),
        (pasid_iotlb_all(3, 5), vec![of(five, ALL)]),
        (pasid_iotlb_all(2, 5), vec![]),
        (
            pasid_iotlb_pages(2, 0, 0x5000, 2),
            vec![of(nic, pages(0x4000, 4, false))],
        ),
        (
            pasid_iotlb_pages(3, 6, 0x5040, 0),
            vec![of(six, pages(0x5000, 1, true))],
        ),
        (
            device_tlb(NIC, 0x5000),
            vec![of(nic, pages(0x5000, 1, false))],
        ),
        (
            pasid_device_tlb(NIC, 6, 0x5000),
            vec![of(six, pages(0x5000, 1, false))],
        ),
        (
            pasid_device_tlb(NIC, 6, 1),
            vec![Invalidation {
                scope: Scope::Endpoint(NIC),
                range: pages(0, 1, false),
            }],
        ),
    ];
    for (descriptor, expected) in cases {
        assert!(guest.submit(&[descriptor]), "{descriptor:x?}");
        let batches = guest.backend.batches();
        assert_eq!(batches.concat(), expected, "{descriptor:x?}");
    }
}

#[test]
fn a_device_that_is_not_behind_the_unit_is_nobodys() {
    let mut guest = bound();
    let other = Rid::new(3, 0, 0);
    assert!(guest.submit(&[
        device_tlb(other, 0),
        pasid_device_tlb(other, 1, 0),
        context_device(other),
        page_response(Target::rid(other), 1, 0),
    ]));
    assert_eq!(guest.backend.calls(), []);
}

#[test]
fn one_doorbell_is_one_batch_whatever_is_in_the_queue() {
    let mut guest = bound();
    let mut descriptors = vec![];
    for page in 0..20 {
        descriptors.push(pasid_iotlb_pages(2, 0, page << 12, 0));
        descriptors.push(pasid_iotlb_pages(3, 5, page << 12, 0));
        // Other vCPUs wait in between.
        descriptors.push(guest.wait(0));
    }
    assert!(guest.submit(&descriptors));
    let batches = guest.backend.batches();
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].len(), 40);
}

#[test]
fn a_device_tlb_invalidation_of_the_same_range_is_not_done_twice() {
    let mut guest = bound();
    assert!(guest.submit(&[
        pasid_iotlb_pages(3, 5, 0x7000, 0),
        pasid_device_tlb(NIC, 5, 0x7000)
    ]));
    assert_eq!(guest.backend.batches().concat().len(), 1);
}

#[test]
fn a_wait_is_done_only_after_every_effect_before_it() {
    let mut guest = bound();
    let ram = Arc::clone(&guest.ram);
    guest
        .backend
        .probe(move || ram.read_obj(GuestAddress(STATUS)).unwrap());
    let before = guest.peek(STATUS) as u32;
    assert!(guest.submit(&[
        pasid_iotlb_all(3, 5),
        pasid_cache_global(),
        iotlb_global(),
        context_global(),
    ]));
    let seen = guest.backend.seen();
    assert!(!seen.is_empty());
    assert!(seen.iter().all(|status| *status == before), "{seen:?}");
}

#[test]
fn a_fence_an_interrupt_and_a_drain_complete_too() {
    let mut guest = bound();
    let wait = |flags: u64| [u64::from(kind::WAIT) | flags, 0, 0, 0];
    assert!(guest.submit(&[wait(1 << 4), wait(1 << 6), wait(1 << 7)]));
    assert_eq!(guest.mailbox.take().len(), 1);
    assert_eq!(guest.r32(offset::ICS), 1);
    assert!(guest.submit(&[wait(1 << 4)]));
    assert_eq!(guest.mailbox.take(), [], "the last is not serviced");
    guest.w32(offset::ICS, 1);
    assert!(guest.submit(&[wait(1 << 4)]));
    assert_eq!(guest.mailbox.take().len(), 1);
}

#[test]
fn a_masked_completion_interrupt_is_pending() {
    let mut guest = bound();
    guest.w32(offset::IECTL, 1 << 31);
    assert!(guest.submit(&[[u64::from(kind::WAIT) | 1 << 4, 0, 0, 0]]));
    assert_eq!(
        (guest.mailbox.take().len(), guest.r32(offset::IECTL)),
        (0, 3 << 30)
    );
    guest.w32(offset::IECTL, 0);
    assert_eq!(guest.mailbox.take().len(), 1);
}

#[test]
fn a_status_address_outside_ram_is_lost_and_nothing_else_is() {
    let mut guest = bound();
    let wait = |at| [u64::from(kind::WAIT) | 1 << 5, at, 0, 0];
    assert!(guest.submit(&[
        wait(0xfee0_0000),
        wait(u64::MAX - 3),
        wait(RAM - 4),
        wait(RAM - 8)
    ]));
    assert_eq!(guest.unit.state().queue.lost_status, 2);
}

/// Stops the queue with `bad` and returns the reason.
fn stopped_by(guest: &mut Guest, bad: Words) -> u32 {
    assert!(!guest.submit(&[bad]));
    let reason = guest.r32(offset::IQERCD) & 0xf;
    assert_eq!(guest.r32(offset::FSTS) >> 4 & 1, u32::from(reason != 0));
    reason
}

#[test]
fn a_bad_descriptor_stops_the_queue_at_it_and_clearing_the_error_goes_on_there() {
    let mut guest = bound();
    assert!(guest.submit(&[]));
    let at = guest.r64(offset::IQH);
    let reason = stopped_by(&mut guest, [0x1f, 0, 0, 0]);
    assert_eq!(reason, QueueError::Type as u32);
    assert_eq!(guest.r64(offset::IQH), at);
    assert_eq!(guest.mailbox.take().len(), 1, "the fault event");
    // Nothing more is obeyed.
    guest.backend.calls();
    assert!(!guest.submit(&[iotlb_global()]));
    assert_eq!(guest.backend.calls(), []);
    // Linux writes a wait over the bad descriptor and clears IQE.
    let wait = guest.wait(0);
    guest.poke(QUEUE + at, &wait);
    guest.w32(offset::FSTS, 1 << 4);
    assert_eq!(guest.r32(offset::FSTS), 0);
    assert_eq!(guest.r32(offset::IQERCD), 0);
    assert_eq!(guest.r64(offset::IQH), guest.r64(offset::IQT));
    assert_eq!(guest.backend.batches().len(), 1);
}

#[test]
fn what_came_before_a_bad_descriptor_is_done_and_reported() {
    let mut guest = bound();
    let wait = [
        u64::from(kind::WAIT) | 1 << 5 | 0x77 << 32,
        STATUS + 8,
        0,
        0,
    ];
    assert!(!guest.submit(&[iotlb_global(), wait, [0, 0, 0, 0], iotlb_global()]));
    assert_eq!(guest.peek(STATUS + 8), 0x77);
    assert_eq!(guest.backend.batches().concat().len(), 1);
}

#[test]
fn every_queue_error_has_its_reason() {
    let mut guest = bound();
    assert_eq!(
        stopped_by(&mut guest, [1, 0, 0, 0]),
        QueueError::Reserved as u32
    );

    let guest = bound();
    guest.w32(offset::IQT, 4096);
    assert_eq!(guest.r32(offset::IQERCD), QueueError::Tail as u32);

    let guest = bound();
    guest.w32(offset::IQT, guest.r32(offset::IQT) ^ 16);
    assert_eq!(guest.r32(offset::IQERCD), QueueError::Alignment as u32);

    let guest = bound();
    guest.w64(offset::IQA, RAM | 1 << 11);
    guest.w32(offset::IQT, 0);
    assert_eq!(guest.r32(offset::IQERCD), QueueError::Fetch as u32);

    let guest = bound();
    guest.w64(offset::IQA, QUEUE);
    guest.w32(offset::IQT, 0);
    assert_eq!(
        guest.r32(offset::IQERCD),
        QueueError::Width as u32,
        "128 bits in scalable mode"
    );

    let guest = Guest::legacy(UnitConfig {
        mode: super::super::Mode::Legacy,
        ..UnitConfig::default()
    });
    guest.w64(offset::IQA, QUEUE | 1 << 11);
    guest.w32(offset::IQT, 32);
    assert_eq!(
        guest.r32(offset::IQERCD),
        QueueError::Width as u32,
        "256 bits in legacy mode"
    );

    let guest = bound();
    guest.w64(offset::RTADDR, ROOT | 2 << 10);
    guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
    guest.w32(offset::IQT, 0);
    assert_eq!(guest.r32(offset::IQERCD), QueueError::TableMode as u32);
    assert_eq!(
        guest.backend.objects().targets,
        0,
        "and nothing is translated"
    );
}

#[test]
fn a_wrapped_queue_is_walked_over_its_end() {
    let mut guest = bound();
    for round in 0..300 {
        assert!(
            guest.submit(&[pasid_iotlb_pages(2, 0, 0x1000, 0)]),
            "round {round}"
        );
    }
    assert_eq!(
        guest.unit.state().queue.wait,
        304,
        "with the ones that set it up"
    );
}

#[test]
fn a_disabled_queue_is_not_walked_and_an_enabled_one_begins_at_its_start() {
    let mut guest = Guest::new(UnitConfig::default());
    assert!(!guest.submit(&[]));
    assert_eq!(guest.r64(offset::IQH), 0);
    // What is in the queue when it is enabled is obeyed then.
    guest.w64(offset::IQA, QUEUE | 1 << 11);
    guest.w32(offset::GCMD, 1 << 26);
    assert_eq!(guest.peek(STATUS) as u32, 1);
}

#[test]
fn global_pasid_cache_invalidation_finds_new_changed_and_gone_entries() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    let (root, other) = (guest.page(), guest.page());
    guest.bind(directory, 70, first_stage(2, root));
    guest.bind(directory, 71, first_stage(2, root));
    guest.bind(directory, 72, first_stage(2, root));
    guest.set_pasid(directory, 70, Default::default());
    guest.set_pasid(directory, 71, first_stage(2, other));
    guest.set_pasid(directory, 0x1fff, first_stage(4, root));
    guest.set_pasid(directory, 0, pass_through(1));
    guest.backend.calls();
    assert!(guest.submit(&[pasid_cache_global()]));
    let mut applied = vec![];
    for call in guest.backend.calls() {
        match call {
            Call::Apply(target, translation) => applied.push((target.pasid, translation)),
            other => panic!("{other:?}"),
        }
    }
    applied.sort_by_key(|(pasid, _)| *pasid);
    assert_eq!(applied.len(), 4, "72 did not change: {applied:?}");
    assert_eq!(applied[0], (None, Translation::Identity));
    assert_eq!(applied[1], (Some(Pasid(70)), Translation::Blocked));
    assert_eq!(applied[2].0, Some(Pasid(71)));
    assert_eq!(applied[3].0, Some(Pasid(0x1fff)));
    // Asking again asks the back end for nothing.
    assert!(guest.submit(&[pasid_cache_global(), context_global()]));
    assert_eq!(guest.backend.calls(), []);
}

#[test]
fn a_domain_selective_pasid_cache_invalidation_finds_new_entries_too() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.set_pasid(directory, 9, pass_through(7));
    assert!(guest.submit(&[[u64::from(kind::PASID_CACHE) | 7 << 16, 0, 0, 0]]));
    let nine = Target::pasid(NIC, Pasid(9));
    assert_eq!(guest.backend.translation(nine), Translation::Identity);
}

#[test]
fn many_global_invalidations_in_one_run_scan_the_tables_once() {
    let mut guest = bound();
    let scanned = guest.unit.state().back_end.tables_scanned;
    let many = [pasid_cache_global(); 100];
    assert!(guest.submit(&many));
    assert_eq!(guest.unit.state().back_end.tables_scanned - scanned, 1);
}

#[test]
fn a_context_entry_that_changes_under_a_run_of_the_queue_costs_one_scan() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    for pasid in 0..64 {
        guest.set_pasid(
            directory,
            pasid,
            first_stage(2, 0x5000 + u64::from(pasid) * 4096),
        );
    }
    assert!(guest.submit(&[pasid_cache_global()]));
    let before = guest.unit.state().back_end.tables_scanned;
    // With whatever the unit does, another vCPU writes another RID_PASID.
    let (ram, entry) = (Arc::clone(&guest.ram), guest.peek(ROOT) & !0xfff);
    let entry = entry + u64::from(NIC.devfn()) * 32;
    let written = AtomicU64::new(0);
    guest.backend.probe(move || {
        let next = written.fetch_add(1, Ordering::Relaxed) % 64;
        ram.write_obj(next, GuestAddress(entry + 8)).unwrap();
        0
    });
    guest.poke(entry + 8, &[63]);
    let run = [context_device(NIC); 30];
    assert!(guest.submit(&run));
    assert!(guest.backend.seen().len() > run.len(), "it did change");
    let scanned = guest.unit.state().back_end.tables_scanned - before;
    assert_eq!(scanned, 1);
}

#[test]
fn a_context_that_changes_takes_its_pasids_with_it() {
    let mut guest = bound();
    guest.set_context(NIC, [0; 4]);
    assert!(guest.submit(&[context_device(NIC)]));
    assert_eq!(guest.backend.objects().targets, 0);
    assert_eq!(guest.unit.state().live_targets, 0);
}

#[test]
fn clearing_paside_blocks_pasids_and_leaves_requests_without_pasid() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, pass_through(1));
    guest.bind(directory, 5, pass_through(1));
    guest.set_context(NIC, [directory | 0x5, 0, 0, 0]);
    assert!(guest.submit(&[context_device(NIC)]));
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
    let five = Target::pasid(NIC, Pasid(5));
    assert_eq!(guest.backend.translation(five), Translation::Blocked);
}

#[test]
fn rid_pasid_is_for_requests_without_pasid_only() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.set_context(NIC, [directory | 0x1d, 9, 0, 0]);
    assert!(guest.submit(&[context_device(NIC)]));
    guest.bind(directory, 9, pass_through(1));
    guest.bind(directory, 0, pass_through(1));
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
    let nine = Target::pasid(NIC, Pasid(9));
    assert_eq!(guest.backend.translation(nine), Translation::Blocked);
    guest.backend.calls();
    assert!(guest.submit(&[pasid_iotlb_all(1, 9)]));
    assert_eq!(
        guest.backend.batches().concat(),
        [of(Target::rid(NIC), ALL)]
    );
}

#[test]
fn function_masks_select_the_functions_of_a_device() {
    let mut guest = Guest::scalable();
    let functions: Vec<_> = (0..8).map(|f| Rid::new(0, 5, f)).collect();
    for rid in &functions {
        guest
            .unit
            .add_endpoint(*rid, Arc::clone(&guest.backend) as _)
            .unwrap();
    }
    for (fm, expected) in [(0, 1), (1, 2), (2, 4), (3, 8)] {
        let directory = guest.page();
        guest.set_pasid(directory, 0, pass_through(1));
        for rid in &functions {
            guest.set_context(*rid, [directory | 1, 0, 0, 0]);
        }
        let device = context_device(functions[0])[0];
        assert!(guest.submit(&[[device | fm << 48, 0, 0, 0]]));
        assert_eq!(guest.backend.objects().targets, expected);
        for rid in &functions {
            guest.set_context(*rid, [0; 4]);
        }
        assert!(guest.submit(&[context_global()]));
    }
}

#[test]
fn registers_invalidate_in_legacy_mode_and_say_in_scalable_mode_that_they_did_not() {
    let guest = bound();
    guest.backend.calls();
    guest.w64(offset::IOTLB, 1 << 63 | 1 << 60);
    guest.w64(offset::CCMD, 1 << 63 | 1 << 61);
    assert_eq!(guest.r64(offset::IOTLB) >> 57 & 0x43, 0, "IVT, IAIG");
    assert_eq!(guest.r64(offset::CCMD) >> 59 & 0x13, 0, "ICC, CAIG");
    assert_eq!(guest.backend.calls(), []);

    let mut guest = Guest::legacy(UnitConfig {
        mode: super::super::Mode::Legacy,
        ..UnitConfig::default()
    });
    let root = guest.page();
    guest.set_legacy_context(NIC, [root | 1, 3 << 8 | 2]);
    assert!(guest.submit(&[context_device(NIC)]));
    guest.backend.calls();
    guest.w64(offset::IOTLB, 1 << 63 | 2 << 60 | 3 << 32);
    assert_eq!(guest.backend.batches().concat().len(), 1);
    assert_eq!(
        guest.r64(offset::IOTLB) >> 57,
        2 | 2 << 3,
        "IVT is clear, IAIG says domain"
    );
    guest.w64(offset::IVA, 0x1000 | 63);
    guest.w64(offset::IOTLB, 1 << 63 | 3 << 60 | 3 << 32);
    assert_eq!(
        guest.r64(offset::IOTLB) >> 57 & 3,
        2,
        "too large a mask became the domain"
    );
    guest.set_legacy_context(NIC, [0; 2]);
    guest.w64(offset::CCMD, 1 << 63 | 1 << 61);
    assert_eq!(guest.r64(offset::CCMD) >> 59, 1 | 1 << 2);
    assert_eq!(guest.backend.objects().targets, 0);
}

#[test]
fn second_stage_pages_are_invalidated_by_domain_and_nested_ones_wholly() {
    let mut guest = Guest::legacy(UnitConfig {
        mode: super::super::Mode::Legacy,
        ..UnitConfig::default()
    });
    let root = guest.page();
    guest.set_legacy_context(NIC, [root | 1, 5 << 8 | 2]);
    assert!(guest.submit(&[context_device(NIC)]));
    guest.backend.calls();
    assert!(guest.submit(&[iotlb_pages(5, 0x7040, 1)]));
    let expected = of(Target::rid(NIC), pages(0x6000, 2, true));
    assert_eq!(guest.backend.batches().concat(), [expected]);

    let config = UnitConfig {
        nested: true,
        ..UnitConfig::default()
    };
    let mut guest = Guest::scalable_with(config, CAPABLE);
    let directory = guest.context(NIC);
    let (first, second) = (guest.page(), guest.page());
    let mut entry = first_stage(5, first);
    entry.q0 = entry.q0.with_pgtt(3).with_ssptptr(second >> 12);
    guest.bind(directory, 0, entry);
    let nic = Target::rid(NIC);
    assert!(matches!(
        guest.backend.translation(nic),
        Translation::Nested { .. }
    ));
    guest.backend.calls();
    assert!(guest.submit(&[
        iotlb_pages(5, 0x7000, 0),
        pasid_iotlb_pages(5, 0, 0x7000, 0)
    ]));
    assert_eq!(
        guest.backend.batches().concat(),
        [of(nic, ALL), of(nic, pages(0x7000, 1, false))]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_queue_of_garbage_stops_or_ends_and_never_reaches_beyond_the_tail(
        queue in prop::collection::vec(any::<[u64; 4]>(), 128),
        small in any::<bool>(),
        tail in any::<u32>(),
    ) {
        let mut guest = bound();
        for (at, words) in queue.into_iter().enumerate() {
            // Half the cases have plausible types.
            let words = if small { [words[0] & 0x3f_ffff_003f, words[1] & !0xfff, 0, 0] } else { words };
            guest.poke(QUEUE + at as u64 * 32, &words);
        }
        guest.w32(offset::IQT, tail);
        let stopped = guest.r32(offset::FSTS) & 1 << 4 != 0;
        let (head, tail) = (guest.r64(offset::IQH), guest.r64(offset::IQT));
        prop_assert!(head < 4096);
        prop_assert!(stopped || head == tail);
        guest.w32(offset::FSTS, u32::MAX);
        guest.unit.reset();
        guest.tail_reset();
        prop_assert_eq!(guest.backend.objects().targets, 0);
    }
}
