//! What today's systems get wrong, where it is not the whole of another file. Where the rest is:
//!
//! | what goes wrong elsewhere | tests |
//! |---|---|
//! | nested first stage over iommufd is missing | `backend/iommufd/tests/`, from `a_nested_switch_is_one_alloc_and_one_attach` on |
//! | a refused attach leaves the old table, and nobody hears of it | `faults.rs`, from `a_refused_translation_is_blocked_told_and_asked_for_again` on; iommufd's `a_failed_replace_ends_blocked_and_the_record_says_so` |
//! | one kernel call for each invalidation | `invalidation.rs`: `one_doorbell_is_one_batch_whatever_is_in_the_queue`; iommufd's `one_doorbell_is_one_array_per_table_whatever_its_length`, `equal_tables_are_one_object_and_one_call_per_invalidation` |
//! | descriptor types without an effect | `invalidation.rs`: `each_invalidation_reaches_exactly_the_targets_it_names`, `second_stage_pages_are_invalidated_by_domain_and_nested_ones_wholly` |
//! | no page requests of real devices | `page_requests.rs`; iommufd's `a_page_request_group_is_answered_exactly_once` |
//! | unplug leaves objects behind | here; iommufd's `unplug_leaves_no_object_and_drop_leaves_none_at_all` |
//! | a failed map ends the VM | iommufd's `mappings_are_added_all_or_none_whichever_call_fails`, `a_mirror_that_cannot_follow_says_so` |
//! | caching mode, several units, the tail of the queue, interrupt routes, virtual commands | here |
//! | address widths | here; `capabilities.rs`: `widths_are_composed_from_the_hosts` |
//! | one fault record | `faults.rs`: `eight_faults_are_recorded_more_are_reported_as_overflow_and_linux_clears_them_all` |
//! | no irqfd behind remapping | `vmm/src/interrupts/tests.rs` |

use std::sync::{Arc, Mutex};

use super::super::testing::*;
use super::super::{
    Connections, InterruptRemapper, Mode, Remapping, RemappingTable, Unit, UnitConfig,
};
use crate::backend::{Backend, Capabilities, Translation};
use crate::spec::vtd::registers as offset;
use crate::{Gpa, Pasid, Rid, Target};

#[test]
fn caching_mode_is_right_without_being_asked() {
    for mode in [Mode::Scalable, Mode::Legacy] {
        let guest = Guest::new(UnitConfig {
            mode,
            ..UnitConfig::default()
        });
        assert_eq!(guest.r64(offset::CAP) >> 7 & 1, 1);
    }
}

#[test]
fn a_39_bit_guest_cannot_use_a_wider_context() {
    let mut guest = Guest::legacy(UnitConfig {
        mode: Mode::Legacy,
        address_width: Some(39),
        ..UnitConfig::default()
    });
    assert_eq!(guest.r64(offset::CAP) >> 16 & 0x3f, 38);
    guest.set_legacy_context(NIC, [0x5001, 2]);
    assert!(guest.submit(&[context_global()]));
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Blocked
    );
    assert_eq!(guest.faults(), [(NIC.0, 3, 0, None)]);
}

#[test]
fn a_tail_beyond_the_queue_is_an_error_and_no_endless_loop() {
    for tail in [4096, 0x7_ffe0, 0x1_0000] {
        let guest = Guest::scalable();
        guest.w32(offset::IQT, tail);
        assert_eq!(guest.r32(offset::FSTS), 1 << 4);
        // It is still there, and the error stays until software puts the tail right.
        guest.w32(offset::FSTS, 1 << 4);
        assert_eq!(guest.r32(offset::FSTS), 1 << 4);
        guest.w32(offset::IQT, 0);
        guest.w32(offset::FSTS, 1 << 4);
        assert_eq!(guest.r32(offset::FSTS), 0);
    }
}

#[test]
fn several_units_stand_side_by_side_each_with_its_endpoints() {
    let backend = Recorder::new(CAPABLE);
    let mut guest = Guest::scalable();
    let other = Unit::new(
        UnitConfig {
            id: "viommu1".into(),
            bypass: true,
            ..UnitConfig::default()
        },
        Connections {
            ram: Arc::clone(&guest.ram),
            msi: Arc::clone(&guest.mailbox) as _,
            backends: vec![],
            remapper: None,
            pasids: None,
        },
    )
    .unwrap();
    let disk = Rid::new(0, 4, 0);
    other.add_endpoint(disk, Arc::clone(&backend) as _).unwrap();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, pass_through(1));
    assert!(guest.submit(&[context_global(), pasid_cache_global(), iotlb_global()]));
    assert_eq!(
        backend.translation(Target::rid(disk)),
        Translation::Identity
    );
    assert_eq!(
        backend.calls().len(),
        2,
        "a claim and the bypass, nothing of the other unit"
    );
    // One back end can serve both, and an endpoint is behind one of them only.
    let error = other
        .add_endpoint(NIC, Arc::clone(&guest.backend) as _)
        .unwrap_err();
    assert!(error.to_string().contains("00:03.0"), "{error}");
}

#[test]
fn an_endpoint_of_an_uncooperative_guest_leaves_nothing_behind() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    for pasid in 0..200 {
        guest.bind(directory, pasid, pass_through(1));
    }
    assert_eq!(guest.backend.objects().targets, 200);
    guest.unit.remove_endpoint(NIC);
    assert_eq!(guest.backend.objects(), Default::default());
    assert_eq!(guest.unit.state().live_targets, 0);
    // What the guest still says about it has no effect, and a new device starts Blocked.
    assert!(guest.submit(&[pasid_cache_global(), iotlb_domain(1)]));
    for pasid in 0..200 {
        guest.set_pasid(directory, pasid, Default::default());
    }
    guest
        .unit
        .add_endpoint(NIC, Arc::clone(&guest.backend) as _)
        .unwrap();
    assert_eq!(guest.backend.objects().targets, 0);
}

#[test]
fn pasids_in_force_cost_nothing_when_something_else_changes() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    for pasid in 0..1000 {
        guest.bind(directory, pasid, first_stage(1 + pasid as u16, 0x5000));
    }
    guest.backend.calls();
    guest.bind(directory, 77, first_stage(78, 0x6000));
    let applies = guest
        .backend
        .calls()
        .into_iter()
        .filter(|c| matches!(c, Call::Apply(..)));
    assert_eq!(applies.count(), 1);
    assert!(guest.submit(&[pasid_cache_global()]));
    assert_eq!(guest.backend.calls(), []);
}

#[test]
fn a_set_root_table_pointer_forgets_everything_by_itself() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, first_stage(2, 0x5000));
    guest.backend.calls();
    guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
    assert_eq!(guest.backend.batches().concat().len(), 1);
    // And what the new root says is in force.
    let copy = guest.page();
    guest.w64(offset::RTADDR, copy | 1 << 10);
    guest.w32(offset::GCMD, 1 << 31 | 1 << 30 | 1 << 26);
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Blocked
    );
}

#[derive(Default)]
struct Routes(Mutex<Vec<String>>);

impl InterruptRemapper for Routes {
    fn update(&self, remapping: Remapping) {
        self.0.lock().unwrap().push(format!("{remapping:?}"));
    }

    fn invalidate(&self, entries: Option<&[(u16, u32)]>) {
        self.0.lock().unwrap().push(format!("{entries:?}"));
    }
}

#[test]
fn interrupt_routes_are_rewritten_before_a_wait_is_done() {
    let mut guest = Guest::new(UnitConfig::default());
    let routes = Arc::new(Routes::default());
    guest.unit = Unit::new(
        UnitConfig {
            interrupt_remapping: true,
            ..UnitConfig::default()
        },
        Connections {
            ram: Arc::clone(&guest.ram),
            msi: Arc::clone(&guest.mailbox) as _,
            backends: vec![],
            remapper: Some(Arc::clone(&routes) as _),
            pasids: None,
        },
    )
    .unwrap();
    assert_eq!(guest.r64(offset::ECAP) >> 3 & 3, 3, "IR and EIM");
    guest.enable_queue();
    guest.w64(offset::IRTA, 0x8000 | 0x80f);
    guest.w32(offset::GCMD, 1 << 26 | 1 << 24);
    guest.w32(offset::GCMD, 1 << 26 | 1 << 25);
    assert_eq!(guest.r32(offset::GSTS), 7 << 24);
    let table = RemappingTable {
        base: Gpa(0x8000),
        entries: 65536,
        extended: true,
    };
    let on = Remapping {
        table: Some(table),
        compatibility: false,
    };
    assert_eq!(routes.0.lock().unwrap().pop(), Some(format!("{on:?}")));
    let entries = |first: u64, mask: u64| [4 | 1 << 4 | mask << 27 | first << 32, 0, 0, 0];
    assert!(guest.submit(&[entries(0x17, 2), entries(0x30, 0)]));
    assert!(guest.submit(&[entries(0x17, 2), [4, 0, 0, 0]]));
    let calls = std::mem::take(&mut *routes.0.lock().unwrap());
    let named = "Some([(20, 4), (48, 1)])";
    assert_eq!(calls[1..], [named, "None"], "one call per run");
    guest.unit.reset();
    let off = format!("{:?}", Remapping::default());
    assert_eq!(routes.0.lock().unwrap().pop(), Some(off));
}

#[test]
fn an_interrupt_table_takes_effect_with_its_command_only() {
    let mut guest = Guest::new(UnitConfig::default());
    let routes = Arc::new(Routes::default());
    guest.unit = Unit::new(
        UnitConfig {
            interrupt_remapping: true,
            ..UnitConfig::default()
        },
        Connections {
            ram: Arc::clone(&guest.ram),
            msi: Arc::clone(&guest.mailbox) as _,
            backends: vec![],
            remapper: Some(Arc::clone(&routes) as _),
            pasids: None,
        },
    )
    .unwrap();
    let base = |routes: &Routes| {
        let updates = routes.0.lock().unwrap();
        updates.last().is_some_and(|last| last.contains("0x8000"))
    };
    guest.w64(offset::IRTA, 0x8000 | 0x80f);
    guest.w32(offset::GCMD, 1 << 24);
    guest.w64(offset::IRTA, 0x9000 | 0x80f);
    guest.w32(offset::GCMD, 1 << 25);
    assert!(base(&routes), "{:?}", routes.0.lock().unwrap());
    assert_eq!(guest.r64(offset::IRTA), 0x9000 | 0x80f, "as written");
    guest.w32(offset::GCMD, 1 << 25 | 1 << 24);
    assert!(!base(&routes));
}

#[test]
fn an_interrupt_entry_cache_descriptor_is_unknown_where_remapping_is_not_offered() {
    let mut guest = Guest::scalable();
    assert!(!guest.submit(&[[4, 0, 0, 0]]));
    assert_eq!(guest.r32(offset::IQERCD), 3);
}

#[test]
fn virtual_commands_are_offered_with_an_allocator_and_hand_out_its_pasids() {
    use crate::pasid::{Error, PasidAllocator};

    #[derive(Default)]
    struct Counter(Mutex<u32>);
    impl PasidAllocator for Counter {
        fn allocate(&self) -> Result<Pasid, Error> {
            let mut next = self.0.lock().unwrap();
            *next += 1;
            Ok(Pasid(*next))
        }
        fn free(&self, _: Pasid) -> Result<(), Error> {
            Ok(())
        }
        fn free_all(&self) {}
    }

    let mut guest = Guest::new(UnitConfig::default());
    guest.w64(0xe00, 1);
    assert_eq!((guest.r64(0xe10), guest.r64(0xe30)), (0, 0), "not offered");
    guest.unit = Unit::new(
        UnitConfig::default(),
        Connections {
            ram: Arc::clone(&guest.ram),
            msi: Arc::clone(&guest.mailbox) as _,
            backends: vec![],
            remapper: None,
            pasids: Some(Arc::new(Counter::default())),
        },
    )
    .unwrap();
    assert_eq!(guest.r64(offset::ECAP) >> 44 & 1, 1);
    assert_eq!(guest.r64(0xe30), 7, "null commands, allocate and free");
    guest.w64(0xe00, 1);
    assert_eq!(guest.r64(0xe10), 1 << 16);
    guest.w32(0xe00, 1);
    assert_eq!(guest.r64(0xe10), 2 << 16);
    guest.w64(0xe00, 1 << 16 | 2);
    assert_eq!(guest.r64(0xe10), 0);
}

#[test]
fn polling_a_status_register_does_not_wait_for_a_running_command() {
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 0, pass_through(1));
    // While the back end works on a batch, other vCPUs read what Linux spins on.
    let unit = Arc::downgrade(&guest.unit);
    guest.backend.probe(move || {
        let unit = unit.upgrade().unwrap();
        for at in [offset::FSTS, offset::GSTS, offset::IQH] {
            unit.read(at, &mut [0; 4]);
        }
        0
    });
    assert!(guest.submit(&[iotlb_global()]));
    assert_eq!(guest.backend.seen().len(), 1);
}

#[test]
fn faults_and_page_requests_come_in_while_a_command_runs() {
    // A back end that waits for its devices must get their reports through meanwhile.
    let mut guest = Guest::scalable();
    let directory = guest.context(NIC);
    guest.bind(directory, 5, pass_through(1));
    let backend = Arc::downgrade(&guest.backend);
    let unit = Arc::downgrade(&guest.unit);
    guest.backend.probe(move || {
        drop(backend.upgrade());
        let unit = unit.upgrade().unwrap();
        std::thread::spawn(move || {
            use crate::Iova;
            use crate::backend::{Access, EventSink, Fault, FaultCause, PageRequest};
            unit.fault(Fault {
                target: Target::rid(NIC),
                iova: Iova(0),
                access: Access::READ,
                execute: false,
                privileged: false,
                cause: FaultCause::Blocked,
            });
            unit.page_request(PageRequest {
                target: Target::pasid(NIC, Pasid(5)),
                group: 1,
                last: true,
                iova: Iova(0),
                access: Access::READ,
                execute: false,
                privileged: false,
            });
        })
        .join()
        .unwrap();
        0
    });
    assert!(guest.submit(&[iotlb_global()]));
    assert_eq!(guest.faults().len(), 1);
    assert_eq!(guest.r64(offset::PQT), 32);
}

#[test]
fn accesses_of_odd_sizes_and_places_do_nothing_and_read_what_is_there() {
    let guest = Guest::scalable();
    let gsts = guest.r32(offset::GSTS);
    for at in 0..0x1008 {
        for size in [1, 2, 3, 5, 8] {
            if size == 8 && at % 8 == 0 {
                continue;
            }
            guest.unit.write(at, &vec![0xff; size]);
        }
    }
    guest.unit.write(u64::MAX, &[0; 4]);
    guest.unit.read(u64::MAX - 2, &mut [0; 8]);
    assert_eq!(guest.r32(offset::GSTS), gsts);
    let mut byte = [0];
    guest.unit.read(offset::CAP + 7, &mut byte);
    assert_eq!(u64::from(byte[0]), guest.r64(offset::CAP) >> 56);
    assert_eq!(guest.r32(0x1000), 0);
}

#[test]
fn a_host_without_pasids_gets_none_offered_and_no_entry_accepted() {
    let capabilities = Capabilities {
        pasid_bits: 0,
        page_requests: false,
        ..CAPABLE
    };
    let mut guest = Guest::scalable_with(UnitConfig::default(), capabilities);
    assert_eq!(guest.r64(offset::ECAP) >> 40 & 1, 0);
    let directory = guest.page();
    guest.set_context(NIC, [directory | 9, 0, 0, 0]);
    guest.set_pasid(directory, 0, pass_through(1));
    assert!(guest.submit(&[context_device(NIC)]));
    assert_eq!(
        guest.faults(),
        [(NIC.0, 0x42, 0, None)],
        "PASIDE is a reserved bit"
    );
    guest.set_context(NIC, [directory | 1, 0, 0, 0]);
    assert!(guest.submit(&[context_device(NIC)]));
    assert_eq!(
        guest.backend.translation(Target::rid(NIC)),
        Translation::Identity
    );
}

#[test]
fn the_endpoints_of_one_bus_do_not_see_each_others_entries() {
    let mut guest = Guest::scalable();
    let neighbour = Rid::new(0, 3, 1);
    guest
        .unit
        .add_endpoint(neighbour, Arc::clone(&guest.backend) as _)
        .unwrap();
    let (mine, theirs) = (guest.context(NIC), guest.context(neighbour));
    guest.bind(mine, 5, first_stage(2, 0x5000));
    guest.bind(theirs, 5, first_stage(3, 0x6000));
    let root = |guest: &Guest, rid| match guest.backend.translation(Target::pasid(rid, Pasid(5))) {
        Translation::Stage1(stage1) => stage1.root,
        other => panic!("{other:?}"),
    };
    assert_eq!(root(&guest, NIC), Gpa(0x5000));
    assert_eq!(root(&guest, neighbour), Gpa(0x6000));
    guest.bind(mine, 5, Default::default());
    assert_eq!(root(&guest, neighbour), Gpa(0x6000));
}
