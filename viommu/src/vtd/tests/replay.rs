//! The tables of an endpoint that comes are made true in steps, and the guest goes on meanwhile.

use std::sync::Arc;

use proptest::prelude::*;

use super::super::testing::*;
use crate::backend::{Backend, Translation};
use crate::spec::vtd::registers as offset;
use crate::spec::vtd::tables::{PasidEntry, PasidEntry0};
use crate::{Pasid, Rid, Target};

const LATE: Rid = Rid::new(0, 4, 0);

/// PASIDs of three tables near each other, and of one behind the first page of the directory.
fn pasids() -> impl Strategy<Value = u32> {
    prop_oneof![1u32..192, 64 * 130..64 * 131u32]
}

fn entries() -> impl Strategy<Value = PasidEntry> {
    let reserved = PasidEntry {
        q0: PasidEntry0::new().with_p(true).with_pgtt(1).with_aw(2),
        rest: [1, 0, 0, 0, 0],
        ..PasidEntry::default()
    };
    prop_oneof![
        (1u16..4, 1u64..4).prop_map(|(did, root)| first_stage(did, root << 16)),
        (1u16..4).prop_map(pass_through),
        Just(reserved),
        Just(PasidEntry::default()),
    ]
}

/// What the guest does between two steps.
#[derive(Clone, Debug)]
enum Act {
    /// An entry, and an invalidation that names it.
    Bind(u32, PasidEntry),
    /// Entries, and an invalidation of all.
    BindAll(Vec<(u32, PasidEntry)>),
    /// A whole table goes, and all are invalidated.
    Drop(u32),
    /// A context-cache invalidation, of what it is.
    Context,
    /// Another directory, with these entries.
    Move(Vec<(u32, PasidEntry)>),
    /// Translation off and on.
    Toggle,
}

fn several() -> impl Strategy<Value = Vec<(u32, PasidEntry)>> {
    prop::collection::vec((pasids(), entries()), 0..8)
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => (pasids(), entries()).prop_map(|(pasid, entry)| Act::Bind(pasid, entry)),
        2 => several().prop_map(Act::BindAll),
        1 => pasids().prop_map(Act::Drop),
        1 => Just(Act::Context),
        1 => several().prop_map(Act::Move),
        1 => Just(Act::Toggle),
    ]
}

/// A new directory of `LATE`, large enough for [`pasids`]; the guest does not tell of it.
fn directory(guest: &mut Guest, with: &[(u32, PasidEntry)]) -> u64 {
    let directory = guest.page();
    guest.page();
    for &(pasid, entry) in with {
        guest.set_pasid(directory, pasid, entry);
    }
    // PDTS 1: 256 directory entries. PASIDE, DTE, PRE and P.
    guest.set_context(LATE, [directory | 1 << 9 | 0x1d, 0, 0, 0]);
    directory
}

fn act(guest: &mut Guest, at: &mut u64, act: Act) {
    let done = match act {
        Act::Bind(pasid, entry) => {
            guest.set_pasid(*at, pasid, entry);
            // The domain of the entry before may be another one: Linux names that one.
            guest.submit(&[pasid_cache(entry.q1.did(), pasid)])
        }
        Act::BindAll(entries) => {
            for (pasid, entry) in entries {
                guest.set_pasid(*at, pasid, entry);
            }
            guest.submit(&[pasid_cache_global()])
        }
        Act::Drop(pasid) => {
            guest.poke(*at + u64::from(pasid / 64) * 8, &[0]);
            guest.submit(&[pasid_cache_global()])
        }
        Act::Context => guest.submit(&[context_device(LATE)]),
        Act::Move(entries) => {
            *at = directory(guest, &entries);
            guest.submit(&[context_device(LATE), pasid_cache_global()])
        }
        Act::Toggle => {
            guest.w32(offset::GCMD, 1 << 26);
            guest.w32(offset::GCMD, 1 << 31 | 1 << 26);
            true
        }
    };
    assert!(
        done,
        "an invalidation was not done when the tail was written"
    );
}

proptest! {
    /// The back end has what a replay in one piece would have given it, and what an invalidation
    /// names is true when it is done, whether the replay was there or not.
    #[test]
    fn a_replay_in_steps_loses_nothing_that_happens_between_them(
        first in prop::collection::vec((pasids(), entries()), 0..32),
        between in prop::collection::vec((0usize..3, acts()), 0..12),
    ) {
        let mut guest = Guest::scalable();
        let mut at = directory(&mut guest, &first);
        let backend = Arc::clone(&guest.backend);
        let mut left = guest.unit.begin_endpoint(LATE, backend.clone() as _)?;
        for (steps, what) in between {
            for _ in 0..steps {
                left = left.and_then(|left| guest.unit.replay_step(LATE, left));
            }
            let named = match &what {
                Act::Bind(pasid, entry) => Some((*pasid, *entry)),
                _ => None,
            };
            act(&mut guest, &mut at, what);
            if let Some((pasid, entry)) = named {
                let target = Target::pasid(LATE, Pasid(pasid));
                let right = entry.q0.p() && entry.rest == [0; 5];
                prop_assert_eq!(backend.translation(target) != Translation::Blocked, right);
            }
        }
        while let Some(more) = left {
            left = guest.unit.replay_step(LATE, more);
        }
        let in_steps = backend.targets();
        let live = guest.unit.state().live_targets;
        guest.unit.remove_endpoint(LATE);
        guest.unit.add_endpoint(LATE, backend.clone() as _)?;
        prop_assert_eq!(backend.targets(), in_steps);
        prop_assert_eq!(guest.unit.state().live_targets, live);
    }
}

/// Who waits for the unit waits for one table at most, and an endpoint that leaves meanwhile ends
/// the replay.
#[test]
fn a_step_of_a_replay_reads_one_table() {
    let mut guest = Guest::scalable();
    let entries: Vec<_> = (1..128).map(|pasid| (pasid, pass_through(1))).collect();
    directory(&mut guest, &entries);
    let backend = Arc::clone(&guest.backend);
    let live = |guest: &Guest| guest.unit.state().live_targets;
    let mut left = guest.unit.begin_endpoint(LATE, backend as _).unwrap();
    assert_eq!(live(&guest), 0);
    let mut counts = vec![];
    for _ in 0..2 {
        left = left.and_then(|left| guest.unit.replay_step(LATE, left));
        counts.push(live(&guest));
    }
    // RID_PASID is PASID 0, which has nothing.
    assert_eq!(counts, [63, 127]);
    guest.unit.remove_endpoint(LATE);
    let left = left.and_then(|left| guest.unit.replay_step(LATE, left));
    assert_eq!((left, live(&guest)), (None, 0));
}
