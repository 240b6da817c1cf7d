//! Every check of root, context and PASID entries has its fault reason, and blocks.

use proptest::prelude::*;

use super::super::pasid::{entry, lookup};
use super::super::testing::*;
use super::super::{Mode, Offer, UnitConfig};
use crate::backend::{
    Access, Backend, Capabilities, Fault, FaultCause, Stage1, Stage2, Translation,
};
use crate::spec::vtd::fault::FaultReason as R;
use crate::spec::vtd::registers as offset;
use crate::spec::vtd::registers::Rtaddr;
use crate::spec::vtd::tables::{PasidEntry, PasidEntry0, PasidEntry1, PasidEntry2};
use crate::{Gpa, Iova, Pasid, Rid, Target};

/// A device tries a read; the reason that the guest's log has for it.
fn reason_of(guest: &Guest, target: Target) -> u8 {
    guest.faults();
    guest.backend.fault(Fault {
        target,
        iova: Iova(0x1234_5678),
        access: Access::READ,
        execute: false,
        privileged: false,
        cause: FaultCause::Blocked,
    });
    let faults = guest.faults();
    assert_eq!(faults.len(), 1, "{faults:x?}");
    let (sid, reason, address, pasid) = faults[0];
    assert_eq!((sid, address), (target.endpoint.0, 0x1234_5000));
    assert_eq!(pasid, target.pasid.map(|pasid| pasid.0));
    reason
}

/// Invalidates everything; nothing is translated then, and `target`'s reason is this.
fn assert_blocked(guest: &mut Guest, target: Target, reason: R) {
    let scalable = guest.wide;
    assert!(guest.submit(&[context_global(), pasid_cache_global()][..1 + usize::from(scalable)]));
    assert_eq!(
        guest.backend.translation(target),
        Translation::Blocked,
        "{reason:?}"
    );
    assert_eq!(reason_of(guest, target), reason.code(), "{reason:?}");
}

#[test]
fn every_legacy_check_has_its_reason() {
    let config = UnitConfig {
        mode: Mode::Legacy,
        ..UnitConfig::default()
    };
    let nic = Target::rid(NIC);
    let mut guest = Guest::legacy(config);
    assert_blocked(&mut guest, nic, R::RootEntryNotPresent);
    for bits in [[0x3, 0], [1 << 52 | 1, 0], [1, 1]] {
        guest.poke(ROOT, &bits);
        assert_blocked(&mut guest, nic, R::RootEntryReserved);
    }
    guest.poke(ROOT, &[RAM | 1, 0]);
    assert_blocked(&mut guest, nic, R::ContextTableAccess);
    guest.poke(ROOT, &[0, 0]);
    guest.set_legacy_context(NIC, [0, 2]);
    assert_blocked(&mut guest, nic, R::ContextEntryNotPresent);
    for (low, high) in [
        (0x11, 2),
        (1 << 52 | 1, 2),
        (1, 2 | 1 << 7),
        (1, 2 | 1 << 24),
    ] {
        guest.set_legacy_context(NIC, [low, high]);
        assert_blocked(&mut guest, nic, R::ContextEntryReserved);
    }
    // AW 0, 4 and (beyond 48 bits) 3; TT 1 without device TLBs, and 3.
    for (low, high) in [
        (1, 0),
        (1, 4),
        (1, 3),
        (1, 7),
        (1 | 1 << 2, 2),
        (1 | 3 << 2, 2),
    ] {
        guest.set_legacy_context(NIC, [low, high]);
        assert_blocked(&mut guest, nic, R::ContextEntryInvalid);
    }
    let pasid = Target::pasid(NIC, Pasid(1));
    assert_eq!(reason_of(&guest, pasid), R::PasidInLegacyMode.code());
    // A root table where there is no RAM.
    guest.w64(offset::RTADDR, RAM);
    guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
    assert_blocked(&mut guest, nic, R::RootTableAccess);
    // Modes that are not there.
    for mode in [1, 2, 3] {
        guest.w64(offset::RTADDR, ROOT | mode << 10);
        guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
        assert_eq!(guest.backend.translation(nic), Translation::Blocked);
        assert_eq!(reason_of(&guest, nic), R::RootTableAddressInvalid.code());
    }
}

#[test]
fn every_scalable_check_has_its_reason() {
    let (nic, five) = (Target::rid(NIC), Target::pasid(NIC, Pasid(5)));
    let mut guest = Guest::scalable();
    assert_blocked(&mut guest, nic, R::ScalableRootNotPresent);
    for bits in [0x3, 1 << 52 | 1] {
        guest.poke(ROOT, &[bits]);
        assert_blocked(&mut guest, nic, R::ScalableRootReserved);
    }
    guest.poke(ROOT, &[RAM | 1]);
    assert_blocked(&mut guest, nic, R::ScalableContextTableAccess);
    guest.poke(ROOT, &[0]);
    guest.set_context(NIC, [0; 4]);
    assert_blocked(&mut guest, nic, R::ScalableContextNotPresent);
    for words in [
        [0x21, 0, 0, 0],
        [1 << 52 | 1, 0, 0, 0],
        [1, 1 << 21, 0, 0],
        [1, 1 << 20, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1 << 63],
    ] {
        guest.set_context(NIC, words);
        assert_blocked(&mut guest, nic, R::ScalableContextReserved);
    }
    // RID_PASID beyond the directory; PRE without DTE.
    for words in [[1, 1 << 13, 0, 0], [0x11, 0, 0, 0]] {
        guest.set_context(NIC, words);
        assert_blocked(&mut guest, nic, R::ScalableContextInvalid);
    }
    guest.set_context(NIC, [RAM | 9, 0, 0, 0]);
    assert_blocked(&mut guest, nic, R::PasidDirectoryAccess);

    let directory = guest.page();
    guest.set_context(NIC, [directory | 9, 0, 0, 0]);
    for target in [nic, five] {
        guest.poke(directory, &[0]);
        assert_blocked(&mut guest, target, R::PasidDirectoryNotPresent);
        for bits in [5, 1 << 52 | 1] {
            guest.poke(directory, &[bits]);
            assert_blocked(&mut guest, target, R::PasidDirectoryReserved);
        }
        guest.poke(directory, &[RAM | 1]);
        assert_blocked(&mut guest, target, R::PasidTableAccess);
    }
    guest.poke(directory, &[0]);
    guest.set_pasid(directory, 0, PasidEntry::default());
    assert_blocked(&mut guest, nic, R::PasidEntryNotPresent);
    assert_blocked(&mut guest, five, R::PasidEntryNotPresent);
    let zero = Target::pasid(NIC, Pasid(0));
    assert_blocked(&mut guest, zero, R::PasidIsRidPasid);
    let beyond = Target::pasid(NIC, Pasid(1 << 13));
    assert_blocked(&mut guest, beyond, R::PasidBeyondDirectory);
    guest.set_context(NIC, [directory | 1, 0, 0, 0]);
    assert_blocked(&mut guest, five, R::PasidDisabled);
    // A root table where there is no RAM.
    guest.w64(offset::RTADDR, RAM | 1 << 10);
    guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
    assert_blocked(&mut guest, nic, R::ScalableRootTableAccess);
}

/// An offer with everything that PASID entries can name.
fn full() -> Offer {
    let config = UnitConfig {
        nested: true,
        ..UnitConfig::default()
    };
    let everything = Capabilities {
        sre: true,
        eafe: true,
        ..CAPABLE
    };
    Offer::compose(&config, [everything], Default::default()).unwrap()
}

fn reason(offer: &Offer, entry_: PasidEntry) -> Result<Translation, R> {
    let decoded = entry(offer, entry_.into_words(), false);
    decoded
        .map(|e| e.translation)
        .map_err(|problem| problem.reason)
}

#[test]
fn every_reserved_bit_of_a_pasid_entry_is_refused() {
    let offer = full();
    let valid = first_stage(1, 0x5000);
    assert!(reason(&offer, valid).is_ok());
    let reserved = [
        PasidEntry0::RESERVED,
        PasidEntry1::RESERVED,
        PasidEntry2::RESERVED,
    ];
    for word in 0..8 {
        let mask = reserved.get(word).copied().unwrap_or(u64::MAX);
        for bit in (0..64).filter(|bit| mask & 1 << bit != 0) {
            let mut words = valid.into_words();
            words[word] |= 1 << bit;
            let result = reason(&offer, PasidEntry::from_words(words));
            assert_eq!(result, Err(R::PasidEntryReserved), "word {word} bit {bit}");
        }
    }
}

#[test]
fn a_field_of_a_capability_that_is_not_offered_is_a_reserved_field() {
    let full = full();
    let less = Capabilities {
        snoop_control: false,
        ..CAPABLE
    };
    let plain = Offer::compose(&UnitConfig::default(), [less], Default::default()).unwrap();
    let valid = first_stage(1, 0x5000);
    let with = |change: fn(&mut PasidEntry)| {
        let mut changed = valid;
        change(&mut changed);
        changed
    };
    let fields = [
        with(|e| e.q2.set_sre(true)),
        with(|e| e.q2.set_wpe(true)),
        with(|e| e.q2.set_eafe(true)),
        with(|e| e.q1.set_pgsnp(true)),
    ];
    for changed in fields {
        assert!(reason(&full, changed).is_ok(), "{changed:?}");
        assert_eq!(
            reason(&plain, changed),
            Err(R::PasidEntryReserved),
            "{changed:?}"
        );
    }
    // Never offered: second-stage A/D and memory types.
    let never = [
        with(|e| e.q0.set_ssade(true)),
        with(|e| e.q1.set_cd(true)),
        with(|e| e.q1.set_emte(true)),
        with(|e| e.q1.set_pat(1)),
    ];
    for changed in never {
        assert_eq!(
            reason(&full, changed),
            Err(R::PasidEntryReserved),
            "{changed:?}"
        );
    }
}

#[test]
fn translation_types_widths_and_modes_are_those_offered() {
    let full = full();
    let plain = Offer::compose(&UnitConfig::default(), [CAPABLE], Default::default()).unwrap();
    let with = |pgtt, aw, fspm| PasidEntry {
        q0: PasidEntry0::new()
            .with_p(true)
            .with_pgtt(pgtt)
            .with_aw(aw)
            .with_ssptptr(0x7),
        q1: PasidEntry1::new(),
        q2: PasidEntry2::new().with_fspm(fspm).with_fsptptr(0x5),
        rest: [0; 5],
    };
    let stage1 = |width| Stage1 {
        root: Gpa(0x5000),
        width,
        sre: false,
        wpe: false,
        eafe: false,
        ere: false,
        pwsnp: false,
        fs1gp: true,
    };
    let stage2 = |width| Stage2 {
        root: Gpa(0x7000),
        width,
        ad: false,
    };
    let invalid = Err(R::PasidEntryInvalid);
    for (pgtt, aw, fspm, in_full, in_plain) in [
        (0, 2, 0, invalid, invalid),
        (
            1,
            0,
            0,
            Ok(Translation::Stage1(stage1(48))),
            Ok(Translation::Stage1(stage1(48))),
        ),
        (
            1,
            0,
            1,
            Ok(Translation::Stage1(stage1(57))),
            Ok(Translation::Stage1(stage1(57))),
        ),
        (1, 0, 2, invalid, invalid),
        (1, 0, 3, invalid, invalid),
        (2, 1, 0, Ok(Translation::Stage2(stage2(39))), invalid),
        (2, 2, 3, Ok(Translation::Stage2(stage2(48))), invalid),
        (2, 0, 0, invalid, invalid),
        (2, 3, 0, invalid, invalid),
        (2, 5, 0, invalid, invalid),
        (
            3,
            2,
            1,
            Ok(Translation::Nested {
                stage1: stage1(57),
                stage2: stage2(48),
            }),
            invalid,
        ),
        (3, 2, 2, invalid, invalid),
        (3, 7, 0, invalid, invalid),
        (
            4,
            7,
            3,
            Ok(Translation::Identity),
            Ok(Translation::Identity),
        ),
        (5, 2, 0, invalid, invalid),
        (7, 2, 0, invalid, invalid),
    ] {
        assert_eq!(
            reason(&full, with(pgtt, aw, fspm)),
            in_full,
            "PGTT {pgtt} AW {aw} {fspm}"
        );
        assert_eq!(
            reason(&plain, with(pgtt, aw, fspm)),
            in_plain,
            "PGTT {pgtt} AW {aw} {fspm}"
        );
    }
    let four_levels = Capabilities {
        stage1_57: false,
        ..CAPABLE
    };
    let narrow = Offer::compose(&UnitConfig::default(), [four_levels], Default::default());
    assert_eq!(reason(&narrow.unwrap(), with(1, 0, 1)), invalid);
}

#[test]
fn a_wrong_entry_is_told_once_and_a_missing_one_only_when_it_is_used() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    assert_eq!(guest.faults(), []);
    let mut wrong = first_stage(2, 0x5000);
    wrong.q0.set_pgtt(7);
    guest.bind(directory, 5, wrong);
    assert_eq!(
        guest.faults(),
        [(NIC.0, R::PasidEntryInvalid.code(), 0, Some(5))]
    );
    assert!(guest.submit(&[pasid_cache_global(), pasid_cache(2, 5), context_global()]));
    assert_eq!(guest.faults(), []);
    // Put right, it takes effect; made wrong in another way, it is told again.
    guest.bind(directory, 5, pass_through(2));
    let five = Target::pasid(NIC, Pasid(5));
    assert_eq!(guest.backend.translation(five), Translation::Identity);
    wrong.q1 = PasidEntry1::from_bits(1 << 31);
    guest.set_pasid(directory, 5, wrong);
    assert!(guest.submit(&[pasid_cache(2, 5)]));
    assert_eq!(guest.backend.translation(five), Translation::Blocked);
    assert_eq!(
        guest.faults(),
        [(NIC.0, R::PasidEntryReserved.code(), 0, Some(5))]
    );
}

#[test]
fn a_pasid_that_only_another_endpoint_has_room_for_is_no_fault_of_this_one() {
    let mut guest = Guest::scalable();
    let large = Rid::new(0, 4, 0);
    guest
        .unit
        .add_endpoint(large, guest.backend.clone())
        .unwrap();
    guest.context(NIC);
    let directory = 0x80_0000;
    guest.set_context(large, [directory | 7 << 9 | 9, 0, 0, 0]);
    assert!(guest.submit(&[context_device(large)]));
    guest.bind(directory, 0xf_ffff, pass_through(1));
    let last = Target::pasid(large, Pasid::MAX);
    assert_eq!(guest.backend.translation(last), Translation::Identity);
    assert_eq!(guest.faults(), []);
    assert_eq!(guest.unit.state().live_targets, 1);
}

#[test]
fn a_pasid_that_is_not_offered_is_refused_whatever_the_tables_say() {
    let config = UnitConfig {
        pasid_bits: Some(5),
        ..UnitConfig::default()
    };
    let mut guest = Guest::scalable_with(config, CAPABLE);
    let directory = guest.context(NIC);
    for pasid in [31, 32, 33, 300] {
        guest.bind(directory, pasid, pass_through(2));
    }
    assert!(guest.submit(&[pasid_cache_global()]));
    let of = |guest: &Guest, pasid| guest.backend.translation(Target::pasid(NIC, Pasid(pasid)));
    assert_eq!(of(&guest, 31), Translation::Identity);
    for pasid in [32, 33, 300] {
        assert_eq!(of(&guest, pasid), Translation::Blocked, "{pasid}");
        let target = Target::pasid(NIC, Pasid(pasid));
        assert_eq!(reason_of(&guest, target), R::PasidNotSupported.code());
    }
    assert_eq!(guest.faults(), []);
    // A request without PASID never has one, whatever RID_PASID is.
    guest.set_context(NIC, [directory | 0x1d, 33, 0, 0]);
    assert!(guest.submit(&[context_device(NIC)]));
    let plain = guest.backend.translation(Target::rid(NIC));
    assert_eq!(plain, Translation::Identity);
}

#[test]
fn fpd_at_any_level_keeps_qualified_faults_out_of_the_log() {
    let mut guest = Guest::scalable();
    let five = Target::pasid(NIC, Pasid(5));
    let attempt = |guest: &Guest| {
        guest.backend.fault(Fault {
            target: five,
            iova: Iova(0),
            access: Access::WRITE,
            execute: false,
            privileged: false,
            cause: FaultCause::Blocked,
        });
        guest.faults().len()
    };
    let directory = guest.context(NIC);
    guest.set_pasid(directory, 5, PasidEntry::default());
    assert_eq!(attempt(&guest), 1);
    let mut quiet = PasidEntry::default();
    quiet.q0.set_fpd(true);
    guest.set_pasid(directory, 5, quiet);
    assert_eq!(attempt(&guest), 0);
    guest.set_pasid(directory, 5, PasidEntry::default());
    let pde = guest.peek(directory);
    guest.poke(directory, &[pde | 2]);
    assert_eq!(attempt(&guest), 0);
    guest.poke(directory, &[pde]);
    guest.set_context(NIC, [directory | 0xb, 0, 0, 0]);
    assert_eq!(attempt(&guest), 0);
    // Also on a context that is not present, but not what is wrong with the root.
    guest.set_context(NIC, [2, 0, 0, 0]);
    assert_eq!(attempt(&guest), 0);
    guest.poke(ROOT, &[0]);
    assert_eq!(attempt(&guest), 1);
    // A directory and a table that cannot be read are no fault of an entry's.
    let mut guest = Guest::scalable();
    guest.context(NIC);
    guest.set_context(NIC, [RAM | 0xb, 0, 0, 0]);
    assert_eq!(attempt(&guest), 1);
    let directory = guest.page();
    guest.set_context(NIC, [directory | 0xb, 0, 0, 0]);
    guest.poke(directory, &[RAM | 3]);
    assert_eq!(attempt(&guest), 1);
}

#[test]
fn devices_16_to_31_use_the_upper_half_and_each_half_stands_alone() {
    let mut guest = Guest::scalable();
    let high = Rid::new(0, 16, 0);
    guest
        .unit
        .add_endpoint(high, guest.backend.clone())
        .unwrap();
    let directory = guest.context(high);
    guest.bind(directory, 0, pass_through(1));
    // Rubbish in the lower half.
    guest.poke(ROOT, &[0xfff]);
    assert!(guest.submit(&[context_global()]));
    assert_eq!(
        guest.backend.translation(Target::rid(high)),
        Translation::Identity
    );
    assert_eq!(
        reason_of(&guest, Target::rid(NIC)),
        R::ScalableRootReserved.code()
    );
}

#[test]
fn tables_that_point_at_themselves_are_bounded_and_at_mmio_are_faults() {
    let mut guest = Guest::scalable();
    // A directory of 2^14 entries that all name the directory itself as their PASID table.
    let directory = 0x80_0000;
    let own = directory | 1;
    for at in (0..1 << 17).step_by(8) {
        guest.poke(directory + at, &[own]);
    }
    guest.set_context(NIC, [directory | 7 << 9 | 9, 0, 0, 0]);
    assert!(guest.submit(&[context_device(NIC), pasid_cache_global()]));
    let state = guest.unit.state();
    assert!(state.back_end.tables_scanned <= 2 << 14);
    assert_eq!(guest.backend.objects().targets, 0);
    assert!(state.live_targets <= super::super::MAX_LIVE_PASIDS + 1);
    assert!(state.back_end.over_limit > 0);
    // The log says why, without being flooded.
    assert!(guest.faults().len() <= 8);
    for mmio in [0xfee0_0000u64, 0xfed9_0000, (1 << 52) - 0x1000] {
        guest.set_context(NIC, [mmio | 9, 0, 0, 0]);
        assert_blocked(&mut guest, Target::rid(NIC), R::PasidDirectoryAccess);
    }
}

#[test]
fn what_is_beyond_the_table_limit_of_a_scan_is_blocked_not_forgotten() {
    let mut guest = Guest::scalable();
    let second = Rid::new(0, 4, 0);
    guest
        .unit
        .add_endpoint(second, guest.backend.clone())
        .unwrap();
    // The second endpoint has a PASID; the first then gets a directory that uses up the scan.
    let small = guest.context(second);
    guest.bind(small, 5, pass_through(1));
    let five = Target::pasid(second, Pasid(5));
    assert_eq!(guest.backend.translation(five), Translation::Identity);
    let (directory, empty) = (0x80_0000, guest.page());
    for at in (0..1 << 17).step_by(8) {
        guest.poke(directory + at, &[empty | 1]);
    }
    guest.set_context(NIC, [directory | 7 << 9 | 9, 0, 0, 0]);
    assert!(guest.submit(&[context_device(NIC), pasid_cache_global()]));
    assert_eq!(guest.backend.translation(five), Translation::Blocked);
    assert!(guest.unit.state().back_end.over_limit > 0);
    // A selective invalidation is not limited by that.
    assert!(guest.submit(&[pasid_cache(1, 5)]));
    assert_eq!(guest.backend.translation(five), Translation::Identity);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Garbage in every table: the decoders are total, and what they accept has only what was
    /// offered.
    #[test]
    fn decoding_is_total_and_gives_only_what_was_offered(
        words in any::<[u64; 8]>(),
        clear in any::<[u64; 8]>(),
        nested: bool,
    ) {
        let config = UnitConfig { nested, ..UnitConfig::default() };
        let offer = Offer::compose(&config, [CAPABLE], Default::default()).unwrap();
        let words: [u64; 8] = std::array::from_fn(|i| match i {
            3.. if clear[3] & 1 == 0 => 0,
            _ => words[i] & clear[i] & 0x000f_ffff_ffff_ffff & !0xf87f_0c22 | u64::from(i == 0),
        });
        if let Ok(entry) = entry(&offer, words, false) {
            match entry.translation {
                Translation::Stage1(stage1) => {
                    prop_assert!([48, 57].contains(&stage1.width));
                    prop_assert!(!stage1.sre && !stage1.wpe && !stage1.eafe);
                    prop_assert_eq!(stage1.root.0 & 0xfff, 0);
                }
                Translation::Stage2(stage2) | Translation::Nested { stage2, .. } => {
                    prop_assert!(nested && stage2.width <= 48 && !stage2.ad);
                }
                Translation::Identity => {}
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }

    #[test]
    fn looking_up_in_random_memory_ends(
        words in prop::collection::vec(any::<u64>(), 64),
        root in any::<u64>(), rid: u16, pasid in prop::option::of(0u32..1 << 20),
    ) {
        let guest = Guest::new(UnitConfig::default());
        // Words that mostly name places in RAM, over and over.
        let page: Vec<_> = words.iter().map(|word| word & 0xf01f | 1).cycle().take(512).collect();
        for at in (0..0x1_0000).step_by(4096) {
            guest.poke(at, &page);
        }
        let target = Target { endpoint: Rid(rid), pasid: pasid.map(Pasid) };
        let offer = guest.unit.freeze();
        let _ = lookup(&guest.ram, offer, Rtaddr::from_bits(root & 0xfc00), target);
        let _ = lookup(&guest.ram, offer, Rtaddr::from_bits(root), target);
    }
}
