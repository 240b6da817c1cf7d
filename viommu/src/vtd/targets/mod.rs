//! What every endpoint has now, and making it so: the guest's entries are decoded again when an
//! invalidation says that they changed ([`refresh`]), and a back end is asked only for what
//! differs; cached translations are forgotten by domain and PASID ([`iotlb`]).

mod iotlb;
mod live;
mod refresh;
mod scan;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::RandomState;
use std::sync::Arc;

use bitfield_struct::bitfield;
use serde::Serialize;
use vm_memory::GuestMemoryMmap;

use self::live::Live;
pub(super) use self::refresh::Replay;
use self::scan::KnownTables;
use super::capabilities::Offer;
use super::context::{self, Entry, Problem, ScalableContext};
use super::fault::{Recorded, RequestKind};
use super::pasid;
use crate::backend::{Backend, Invalidation, Translation};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::registers::Rtaddr;
use crate::{HwptId, Iova, Pasid, Rid, Target};

/// How many PASIDs of all endpoints of a unit can be live. What the guest has beyond is Blocked.
pub const MAX_LIVE_PASIDS: usize = 1 << 17;
/// How many PASID tables one global invalidation reads over all endpoints: as many as one
/// endpoint's 2^20 PASIDs have. PASIDs of tables beyond are Blocked.
pub const MAX_TABLES_PER_SCAN: u32 = 1 << 14;
/// How many invalidations are collected for a back end before it gets them. More targets than
/// this in one domain are invalidated with everything else, which is cheaper.
const BATCH: usize = 512;
/// How many faults one command leaves for the guest's log. It has room for 8.
const FAULTS_PER_COMMAND: usize = 64;

/// By what IOTLB invalidations name a target. Ordered so that a domain, and a PASID of a domain,
/// are ranges.
#[bitfield(u64)]
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Tag {
    /// Requests without PASID.
    plain: bool,
    rid: u16,
    /// RID_PASID for requests without PASID, 0 in legacy mode.
    #[bits(20)]
    pasid: u32,
    did: u16,
    #[bits(11)]
    __: u16,
}

impl Tag {
    const fn of(target: Target, did: u16, pasid: u32) -> Self {
        Self::new()
            .with_did(did)
            .with_pasid(pasid & Pasid::MAX.0)
            .with_rid(target.endpoint.0)
            .with_plain(target.pasid.is_none())
    }

    const fn target(self) -> Target {
        if self.plain() {
            Target::rid(Rid(self.rid()))
        } else {
            Target::pasid(Rid(self.rid()), Pasid(self.pasid()))
        }
    }
}

/// What an IOTLB invalidation does to a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stages {
    First,
    Second,
    Both,
    None,
}

#[derive(Clone, Copy, Debug)]
struct Tagged {
    /// A place in [`Targets::slots`]: there are no more than endpoints.
    backend: u16,
    stages: Stages,
}

struct Endpoint {
    backend: usize,
    context: Option<ScalableContext>,
    /// The entry that `context` was decoded from.
    context_words: [u64; 4],
    seen: Seen,
    /// Tables of PASID entries that are in force as they are.
    tables: KnownTables,
    /// The number that the tag of requests without PASID has: RID_PASID as it was decoded, 0 in
    /// legacy mode. Others have their PASID's.
    plain: u32,
    /// Targets by PASID, `None` for requests without one. What is not here is Blocked.
    live: BTreeMap<Option<Pasid>, Live>,
}

/// PASID entries that were decoded and are in force: one that is read and is the same again needs
/// nothing else. By PASID, the youngest of those that share a place.
#[derive(Default)]
struct Seen {
    /// Empty, or [`SEEN`](Self::SEEN) of them.
    entries: Vec<SeenEntry>,
}

#[derive(Clone, Copy)]
struct SeenEntry {
    /// [`Self::NONE`], or the PASID.
    pasid: u32,
    /// FPD above the entry.
    fpd: bool,
    words: [u64; 8],
}

impl SeenEntry {
    const NONE: Self = Self {
        pasid: u32::MAX,
        fpd: false,
        words: [0; 8],
    };
}

impl Seen {
    const SEEN: usize = 128;

    fn place(pasid: u32) -> usize {
        pasid as usize % Self::SEEN
    }

    #[inline]
    fn of(&self, pasid: u32) -> Option<&SeenEntry> {
        let known = self.entries.get(Self::place(pasid));
        known.filter(|entry| entry.pasid == pasid)
    }

    fn has(&self, pasid: u32, words: &[u64; 8], fpd: bool) -> bool {
        let known = self.of(pasid);
        known.is_some_and(|entry| entry.fpd == fpd && entry.words == *words)
    }

    fn remember(&mut self, pasid: u32, words: [u64; 8], fpd: bool) {
        self.entries.resize(Self::SEEN, SeenEntry::NONE);
        self.entries[Self::place(pasid)] = SeenEntry { pasid, fpd, words };
    }

    fn forget(&mut self, pasid: u32) {
        if let Some(entry) = self.entries.get_mut(Self::place(pasid))
            && entry.pasid == pasid
        {
            *entry = SeenEntry::NONE;
        }
    }

    fn clear(&mut self) {
        self.entries.fill(SeenEntry::NONE);
    }
}

impl Endpoint {
    /// What a target has changes.
    fn unsee(&mut self, pasid: Option<Pasid>) {
        match (pasid, &self.context) {
            (Some(pasid), _) => {
                self.seen.forget(pasid.0);
                self.tables.forget(pasid);
            }
            (None, Some(context)) => self.seen.forget(context.rid_pasid),
            (None, None) => self.seen.clear(),
        }
    }

    /// What `pasid` is the number of: requests with it, or those without one.
    fn target_of(&self, rid: Rid, pasid: u32) -> Option<Target> {
        let context = self.context.as_ref()?;
        if pasid == context.rid_pasid {
            Some(Target::rid(rid))
        } else {
            let target = Target::pasid(rid, Pasid(pasid));
            context.serves(pasid).then_some(target)
        }
    }

    /// Whether the guest's context entry of this endpoint, `rid`, and its entry of RID_PASID are
    /// what is in force, as far as can be told at once.
    #[inline]
    fn is_context_unchanged(&self, view: View, root: Rtaddr, rid: Rid) -> bool {
        let Some(context) = &self.context else {
            return false;
        };
        let at = context::find_scalable(view.ram, root, rid);
        at.is_ok_and(|at| context::has_words(view.ram, at, &self.context_words))
            && self.is_unchanged(view, context.rid_pasid)
    }

    /// Whether the guest's entry of `pasid` is what is in force, as far as can be told at once.
    #[inline]
    fn is_unchanged(&self, view: View, pasid: u32) -> bool {
        let Some(context) = &self.context else {
            return true;
        };
        if !context.serves(pasid) && pasid != context.rid_pasid {
            return true;
        }
        let Some(seen) = self.seen.of(pasid) else {
            return false;
        };
        let at = pasid::find(view.ram, context, pasid);
        at.is_ok_and(|(at, fpd)| seen.fpd == fpd && context::has_words(view.ram, at, &seen.words))
    }
}

/// A back end and what is collected for it.
struct Slot {
    backend: Arc<dyn Backend>,
    endpoints: usize,
    batch: Vec<Invalidation>,
}

/// What happened meanwhile, for the guest's fault log and the fault path.
#[derive(Default)]
pub(super) struct Outcome {
    /// Faults to record.
    pub(super) faults: Vec<Recorded>,
    /// Targets that a back end refused, or (false) no longer refuses.
    pub(super) refused: Vec<(Target, bool)>,
}

/// Counted for `vm.viommu` and for benchmarks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct TargetCounts {
    /// Calls of [`Backend::apply`].
    pub applies: u64,
    /// Those that were refused.
    pub refusals: u64,
    /// Calls of [`Backend::invalidate`].
    pub batches: u64,
    /// Invalidations in them.
    pub invalidations: u64,
    /// PASID tables read by global invalidations.
    pub tables_scanned: u64,
    /// PASID entries left Blocked because of [`MAX_LIVE_PASIDS`] or [`MAX_TABLES_PER_SCAN`].
    pub over_limit: u64,
}

/// What is in force for one target, for `vm.viommu`.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct TargetState {
    /// Whose requests.
    pub target: Target,
    /// The guest's domain number.
    pub domain: u16,
    /// What the guest's tables say.
    pub translation: Translation,
    /// Whether that is in force; if not, the target is Blocked and the back end is asked again.
    pub in_force: bool,
    /// The host kernel's object that translates, for a device of the host.
    pub hwpt: Option<HwptId>,
    /// What is wrong with the guest's tables.
    pub problem: Option<FaultReason>,
}

/// All endpoints of a unit.
pub(super) struct Targets {
    slots: Vec<Option<Slot>>,
    endpoints: BTreeMap<Rid, Endpoint>,
    tags: BTreeMap<Tag, Tagged>,
    /// The last range of tags that named one target only, and that target. Forgotten with every
    /// change of `tags`.
    recent: Option<((Tag, Tag), Tag, Tagged)>,
    /// Targets that a back end refused.
    failed: BTreeSet<Target>,
    /// Those of them that an invalidation named: they are asked for again, once per run.
    due: BTreeSet<Target>,
    /// The keys of `endpoints`.
    rids: Vec<Rid>,
    live_pasids: usize,
    /// For [`KnownTables`]: of this process, and of no guest's choice.
    sums: RandomState,
    pub(super) outcome: Outcome,
    pub(super) counts: TargetCounts,
    /// Whether a global PASID-cache invalidation is still to be done.
    rescan: bool,
    /// Endpoints with another context entry, whose PASIDs are still to be looked for.
    rescans: BTreeSet<Rid>,
}

/// What decoding needs, while translation is on.
#[derive(Clone, Copy)]
pub(super) struct View<'u> {
    pub(super) ram: &'u GuestMemoryMmap<()>,
    pub(super) offer: &'u Offer,
    /// The root table, if there ever was one.
    pub(super) root: Option<Rtaddr>,
}

impl Targets {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            endpoints: BTreeMap::new(),
            tags: BTreeMap::new(),
            recent: None,
            failed: BTreeSet::new(),
            due: BTreeSet::new(),
            rids: Vec::new(),
            live_pasids: 0,
            sums: RandomState::new(),
            outcome: Outcome::default(),
            counts: TargetCounts::default(),
            rescan: false,
            rescans: BTreeSet::new(),
        }
    }

    /// Adds a claimed endpoint. It is Blocked.
    pub(super) fn add(&mut self, rid: Rid, backend: Arc<dyn Backend>) {
        let known = self
            .slots
            .iter()
            .position(|slot| matches!(slot, Some(slot) if Arc::ptr_eq(&slot.backend, &backend)));
        let index = known.unwrap_or_else(|| {
            let slot = Some(Slot {
                backend,
                endpoints: 0,
                batch: Vec::with_capacity(BATCH),
            });
            match self.slots.iter().position(Option::is_none) {
                Some(free) => {
                    self.slots[free] = slot;
                    free
                }
                None => {
                    self.slots.push(slot);
                    self.slots.len() - 1
                }
            }
        });
        if let Some(slot) = &mut self.slots[index] {
            slot.endpoints += 1;
        }
        let endpoint = Endpoint {
            backend: index,
            context: None,
            context_words: [0; 4],
            seen: Seen::default(),
            tables: KnownTables::default(),
            plain: 0,
            live: BTreeMap::new(),
        };
        self.endpoints.insert(rid, endpoint);
        self.rids = self.endpoints.keys().copied().collect();
    }

    /// Forgets an endpoint; its back end, which the caller releases it from.
    pub(super) fn remove(&mut self, rid: Rid) -> Option<Arc<dyn Backend>> {
        self.flush();
        let keys: Vec<_> = self.endpoints.get(&rid)?.live.keys().copied().collect();
        for pasid in keys {
            self.forget(Target {
                endpoint: rid,
                pasid,
            });
        }
        let endpoint = self.endpoints.remove(&rid)?;
        self.rescans.remove(&rid);
        self.rids.retain(|known| *known != rid);
        let place = self.slots.get_mut(endpoint.backend)?;
        let slot = place.as_mut()?;
        slot.endpoints -= 1;
        let backend = Arc::clone(&slot.backend);
        if slot.endpoints == 0 {
            *place = None;
        }
        Some(backend)
    }

    /// The back end of an endpoint.
    pub(super) fn backend(&self, rid: Rid) -> Option<Arc<dyn Backend>> {
        let endpoint = self.endpoints.get(&rid)?;
        let slot = self.slots.get(endpoint.backend)?.as_ref()?;
        Some(Arc::clone(&slot.backend))
    }

    pub(super) fn contains(&self, rid: Rid) -> bool {
        self.endpoints.contains_key(&rid)
    }

    /// All endpoints, in order.
    pub(super) fn rids(&self) -> &[Rid] {
        &self.rids
    }

    /// Does something for every endpoint.
    fn for_each(&mut self, mut what: impl FnMut(&mut Self, Rid)) {
        let rids = std::mem::take(&mut self.rids);
        for rid in &rids {
            what(self, *rid);
        }
        self.rids = rids;
    }

    /// At most `limit` targets, and how many there are.
    pub(super) fn state(&self, limit: usize) -> (Vec<TargetState>, usize) {
        let all = self.endpoints.iter().flat_map(|(&endpoint, e)| {
            e.live
                .iter()
                .map(move |(&pasid, &live)| (Target { endpoint, pasid }, live, e))
        });
        let total = self.endpoints.values().map(|e| e.live.len()).sum();
        let hwpt = |target, e: &Endpoint| {
            let slot = self.slots.get(e.backend)?.as_ref()?;
            slot.backend.hwpt(target)
        };
        let state = |(target, live, e): (Target, Live, &Endpoint)| {
            let given = live.given();
            TargetState {
                target,
                domain: given.map_or(0, |entry| entry.did),
                translation: given.map_or(Translation::Blocked, |entry| entry.translation),
                in_force: given.is_none() || live.is_applied(),
                hwpt: given.and_then(|_| hwpt(target, e)),
                problem: live.problem().map(|problem| problem.reason),
            }
        };
        (all.take(limit).map(state).collect(), total)
    }

    /// Translation is off: everything is Blocked, or with `bypass` requests without PASID pass.
    pub(super) fn disable(&mut self, bypass: bool) {
        self.for_each(|targets, rid| {
            targets.clear(rid, None);
            targets.default_policy(rid, bypass);
        });
        self.rescan = false;
        self.rescans.clear();
        self.due.clear();
    }

    /// What an endpoint has while translation is off.
    pub(super) fn default_policy(&mut self, rid: Rid, bypass: bool) {
        if bypass {
            let entry = Entry {
                did: 0,
                translation: Translation::Identity,
                fpd: false,
            };
            self.set(Target::rid(rid), 0, Ok(entry));
        }
    }

    /// Blocks all targets of an endpoint, but for `keep`, and forgets its context.
    fn clear(&mut self, rid: Rid, keep: Option<Option<Pasid>>) {
        let Some(endpoint) = self.endpoints.get_mut(&rid) else {
            return;
        };
        endpoint.context = None;
        endpoint.seen.clear();
        endpoint.tables.clear();
        let keys: Vec<_> = endpoint.live.keys().copied().collect();
        for pasid in keys.into_iter().filter(|pasid| Some(*pasid) != keep) {
            self.block(Target {
                endpoint: rid,
                pasid,
            });
        }
    }

    /// Makes what the tables say true for `target`. `pasid` is the number in its tag.
    fn set(&mut self, target: Target, pasid: u32, decoded: Result<Entry, Problem>) {
        let Some(endpoint) = self.endpoints.get_mut(&target.endpoint) else {
            return;
        };
        let backend = endpoint.backend;
        // The number in the tag that there is, if there is one.
        let numbered = target.pasid.map_or(endpoint.plain, |pasid| pasid.0);
        let old = endpoint.live.get(&target.pasid).copied();
        // Most of what an invalidation names did not change.
        if numbered == pasid && old.is_some_and(|live| live.is_still(decoded)) {
            return;
        }
        let entry = match decoded {
            Ok(entry) => entry,
            Err(problem) => return self.set_wrong(target, old, problem),
        };
        if old.is_none() && target.pasid.is_some() && self.live_pasids >= MAX_LIVE_PASIDS {
            self.counts.over_limit += 1;
            return;
        }
        let was = old.filter(Live::is_applied).and_then(|old| old.given());
        let was = was.map_or(Translation::Blocked, |entry| entry.translation);
        let applied = was == entry.translation || self.apply(target, entry.translation);
        let old_tag = old.and_then(|old| old.domain());
        let old_tag = old_tag.map(|did| Tag::of(target, did, numbered));
        let tag = Tag::of(target, entry.did, pasid);
        if let Some(old) = old_tag.filter(|old| *old != tag) {
            self.tags_mut().remove(&old);
        }
        let tagged = Tagged {
            backend: backend as u16,
            stages: stages(entry.translation),
        };
        self.tags_mut().insert(tag, tagged);
        if target.pasid.is_none()
            && let Some(endpoint) = self.endpoints.get_mut(&target.endpoint)
        {
            endpoint.plain = pasid;
        }
        self.insert(target, old, Live::entry(entry, applied));
    }

    fn tags_mut(&mut self) -> &mut BTreeMap<Tag, Tagged> {
        self.recent = None;
        &mut self.tags
    }

    /// The tables give `target` no translation. What is merely not there is no news; what is
    /// there and wrong is, once.
    fn set_wrong(&mut self, target: Target, old: Option<Live>, problem: Problem) {
        if old.is_some_and(|old| old.problem() == Some(problem)) {
            return;
        }
        let full = target.pasid.is_some() && self.live_pasids >= MAX_LIVE_PASIDS;
        if old.is_none() && full {
            self.counts.over_limit += 1;
            return;
        }
        self.block(target);
        if is_absent(problem.reason) {
            return;
        }
        self.insert(target, None, Live::wrong(problem));
        if !(problem.fpd && problem.reason.is_qualified()) {
            self.tell(target, problem.reason);
        }
    }

    fn insert(&mut self, target: Target, old: Option<Live>, live: Live) {
        if let Some(endpoint) = self.endpoints.get_mut(&target.endpoint) {
            endpoint.unsee(target.pasid);
            endpoint.live.insert(target.pasid, live);
            if old.is_none() && target.pasid.is_some() {
                self.live_pasids += 1;
            }
        }
    }

    /// Blocks a target in its back end, if it is not, and forgets it.
    fn block(&mut self, target: Target) {
        if self
            .forget(target)
            .is_some_and(|live| live.domain().is_some())
        {
            // Blocked cannot be refused: after a failure it is in force all the same.
            self.call_apply(target, Translation::Blocked);
        }
    }

    fn forget(&mut self, target: Target) -> Option<Live> {
        let endpoint = self.endpoints.get_mut(&target.endpoint)?;
        endpoint.unsee(target.pasid);
        let live = endpoint.live.remove(&target.pasid)?;
        if target.pasid.is_some() {
            self.live_pasids -= 1;
        }
        let number = target.pasid.map_or(endpoint.plain, |pasid| pasid.0);
        if let Some(did) = live.domain() {
            self.tags_mut().remove(&Tag::of(target, did, number));
        }
        self.refuse(target, false);
        Some(live)
    }

    /// Asks the back end; on refusal the guest is told, and the target is Blocked.
    fn apply(&mut self, target: Target, translation: Translation) -> bool {
        let applied = self.call_apply(target, translation);
        self.refuse(target, !applied);
        if !applied {
            let reason = match target.pasid {
                None if !self.is_scalable(target.endpoint) => FaultReason::ContextEntryInvalid,
                _ => FaultReason::PasidEntryInvalid,
            };
            self.tell(target, reason);
        }
        applied
    }

    /// Something for the guest's fault log.
    fn tell(&mut self, target: Target, reason: FaultReason) {
        if self.outcome.faults.len() < FAULTS_PER_COMMAND {
            self.outcome.faults.push(at_entry(target, reason));
        }
    }

    fn is_scalable(&self, rid: Rid) -> bool {
        self.endpoints
            .get(&rid)
            .is_some_and(|e| e.context.is_some())
    }

    fn call_apply(&mut self, target: Target, translation: Translation) -> bool {
        let Some(backend) = self.backend(target.endpoint) else {
            return false;
        };
        self.counts.applies += 1;
        match backend.apply(target, translation) {
            Ok(()) => true,
            Err(error) => {
                self.counts.refusals += 1;
                log::debug!("{target} is Blocked: {error}");
                false
            }
        }
    }

    fn refuse(&mut self, target: Target, refused: bool) {
        let news = if refused {
            self.failed.insert(target)
        } else {
            self.failed.remove(&target)
        };
        if news {
            self.outcome.refused.push((target, refused));
        }
    }

    /// Asks again for what was refused.
    fn retry(&mut self, target: Target) {
        let Some(endpoint) = self.endpoints.get(&target.endpoint) else {
            return;
        };
        let number = target.pasid.map_or(endpoint.plain, |pasid| pasid.0);
        let live = endpoint.live.get(&target.pasid);
        if let Some(entry) = live.and_then(Live::given) {
            self.set(target, number, Ok(entry));
        }
    }
}

const fn stages(translation: Translation) -> Stages {
    match translation {
        Translation::Stage1(_) => Stages::First,
        Translation::Stage2(_) | Translation::Domain(_) => Stages::Second,
        Translation::Nested { .. } => Stages::Both,
        Translation::Identity | Translation::Blocked => Stages::None,
    }
}

/// Entries that are not present are how the guest says "nothing": no error until something asks.
/// So is a PASID that another endpoint's directory has room for.
const fn is_absent(reason: FaultReason) -> bool {
    matches!(
        reason,
        FaultReason::RootEntryNotPresent
            | FaultReason::ContextEntryNotPresent
            | FaultReason::ScalableRootNotPresent
            | FaultReason::ScalableContextNotPresent
            | FaultReason::PasidDirectoryNotPresent
            | FaultReason::PasidEntryNotPresent
            | FaultReason::PasidBeyondDirectory
            | FaultReason::PasidNotSupported
    )
}

/// A fault that no access caused: the entry itself cannot be obeyed.
const fn at_entry(target: Target, reason: FaultReason) -> Recorded {
    Recorded {
        target,
        iova: Iova(0),
        request: RequestKind::Untranslated,
        write: false,
        execute: false,
        privileged: false,
        reason,
    }
}
