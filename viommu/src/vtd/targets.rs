//! What every endpoint has now, and making it so: the guest's entries are decoded again when an
//! invalidation says that they changed, and a back end is asked only for what differs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Serialize;
use vm_memory::GuestMemoryMmap;

use super::capabilities::Offer;
use super::context::{self, Context, Entry, Problem, ScalableContext, read_words};
use super::fault::Recorded;
use super::pasid;
use crate::backend::{Backend, Invalidation, InvalidationRange, Scope, Translation};
use crate::spec::vtd::descriptor::{ContextScope, IotlbScope, PasidScope, Range};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::registers::{Rtaddr, TranslationTableMode};
use crate::spec::vtd::tables::{PASID_DIRECTORY_ENTRY_SIZE, PASID_TABLE_ENTRIES};
use crate::{Iova, Pasid, Rid, Target};

/// How many PASIDs of all endpoints of a unit can be live. What the guest has beyond is Blocked.
pub const MAX_LIVE_PASIDS: usize = 1 << 17;
/// How many PASID tables one global invalidation reads over all endpoints: as many as one
/// endpoint's 2^20 PASIDs have. PASIDs of tables beyond are Blocked.
pub const MAX_TABLES_PER_SCAN: u32 = 1 << 14;
/// How many invalidations are collected for a back end before it gets them. More targets than
/// this in one domain are invalidated with everything else, which is cheaper.
const BATCH: usize = 512;
/// Entries of a PASID directory that are read at a time: as many as the smallest one has.
const DIRECTORY_CHUNK: usize = 128;
/// How many faults one command leaves for the guest's log. It has room for 8.
const FAULTS_PER_COMMAND: usize = 64;

/// By what IOTLB invalidations name a target. Ordered so that a domain, and a PASID of a domain,
/// are ranges.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Tag {
    did: u16,
    /// RID_PASID for requests without PASID, 0 in legacy mode.
    pasid: u32,
    rid: Rid,
    plain: bool,
}

impl Tag {
    const fn target(self) -> Target {
        if self.plain {
            Target::rid(self.rid)
        } else {
            Target::pasid(self.rid, Pasid(self.pasid))
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
    backend: usize,
    stages: Stages,
}

/// What a target has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Live {
    /// The tables give this translation. `pasid` is the number its tag has.
    Entry {
        entry: Entry,
        pasid: u32,
        /// The back end has it; else the target is Blocked, and it is asked again.
        applied: bool,
        scan: u32,
    },
    /// The tables are wrong. The guest was told.
    Wrong { problem: Problem, scan: u32 },
}

struct Endpoint {
    backend: usize,
    context: Option<ScalableContext>,
    /// Targets by PASID, `None` for requests without one. What is not here is Blocked.
    live: BTreeMap<Option<Pasid>, Live>,
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
pub struct TargetState {
    /// Whose requests.
    pub target: Target,
    /// The guest's domain number.
    pub domain: u16,
    /// What the guest's tables say.
    pub translation: Translation,
    /// Whether that is in force; if not, the target is Blocked and the back end is asked again.
    pub in_force: bool,
    /// What is wrong with the guest's tables.
    pub problem: Option<FaultReason>,
}

/// All endpoints of a unit.
pub(super) struct Targets {
    slots: Vec<Option<Slot>>,
    endpoints: BTreeMap<Rid, Endpoint>,
    tags: BTreeMap<Tag, Tagged>,
    /// Targets that a back end refused.
    failed: BTreeSet<Target>,
    live_pasids: usize,
    /// Number of the current scan of PASID tables.
    scan: u32,
    pub(super) outcome: Outcome,
    pub(super) counts: TargetCounts,
    /// Whether a global PASID-cache invalidation is still to be done.
    rescan: bool,
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
            failed: BTreeSet::new(),
            live_pasids: 0,
            scan: 0,
            outcome: Outcome::default(),
            counts: TargetCounts::default(),
            rescan: false,
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
            live: BTreeMap::new(),
        };
        self.endpoints.insert(rid, endpoint);
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

    pub(super) fn rids(&self) -> Vec<Rid> {
        self.endpoints.keys().copied().collect()
    }

    /// At most `limit` targets, and how many there are.
    pub(super) fn state(&self, limit: usize) -> (Vec<TargetState>, usize) {
        let all = self.endpoints.iter().flat_map(|(&endpoint, e)| {
            e.live
                .iter()
                .map(move |(&pasid, &live)| (Target { endpoint, pasid }, live))
        });
        let total = self.endpoints.values().map(|e| e.live.len()).sum();
        let state = |(target, live)| match live {
            Live::Entry { entry, applied, .. } => TargetState {
                target,
                domain: entry.did,
                translation: entry.translation,
                in_force: applied,
                problem: None,
            },
            Live::Wrong { problem, .. } => TargetState {
                target,
                domain: 0,
                translation: Translation::Blocked,
                in_force: true,
                problem: Some(problem.reason),
            },
        };
        (all.take(limit).map(state).collect(), total)
    }

    /// Translation is off: everything is Blocked, or with `bypass` requests without PASID pass.
    pub(super) fn disable(&mut self, bypass: bool) {
        for rid in self.rids() {
            self.clear(rid, None);
            self.default_policy(rid, bypass);
        }
        self.rescan = false;
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

    /// Translation is on, or has a new root table: everything is decoded again.
    pub(super) fn refresh_all(&mut self, view: View) {
        for rid in self.rids() {
            self.refresh_context(view, rid, false);
        }
        self.rescan = true;
        self.finish_rescan(view);
    }

    /// One endpoint came: what the guest's tables say about it already.
    pub(super) fn refresh_new(&mut self, view: View, rid: Rid) {
        self.refresh_context(view, rid, true);
    }

    /// A context-cache invalidation. With caching mode, entries that were not present have no
    /// domain yet, so a domain-selective one looks at every endpoint.
    pub(super) fn invalidate_contexts(&mut self, view: View, scope: ContextScope) {
        for rid in self.rids() {
            let meant = match scope {
                ContextScope::Global | ContextScope::Domain(_) => true,
                ContextScope::Device { sid, mask } => (rid.0 ^ sid) & !u16::from(mask) == 0,
            };
            if meant {
                self.refresh_context(view, rid, true);
            }
        }
    }

    fn refresh_context(&mut self, view: View, rid: Rid, scan: bool) {
        let Some(root) = view.root else {
            return self.clear(rid, None);
        };
        match context::decode(view.ram, view.offer, root, rid) {
            Err(problem) => {
                self.clear(rid, None);
                self.set(Target::rid(rid), 0, Err(problem));
            }
            Ok(Context::Legacy(entry)) => {
                self.clear(rid, Some(None));
                self.set(Target::rid(rid), 0, Ok(entry));
            }
            Ok(Context::Scalable(context)) => {
                let Some(endpoint) = self.endpoints.get_mut(&rid) else {
                    return;
                };
                let was = endpoint.context.replace(context);
                let decoded = pasid::decode(view.ram, view.offer, &context, context.rid_pasid);
                self.set(Target::rid(rid), context.rid_pasid, decoded);
                if scan && was != Some(context) {
                    let mut tables = MAX_TABLES_PER_SCAN;
                    self.scan_pasids(view, rid, &mut tables);
                }
            }
        }
    }

    /// A PASID-cache invalidation. Global ones of one run of the queue become one scan, which
    /// [`finish_rescan`](Self::finish_rescan) does before anything is reported as done.
    pub(super) fn invalidate_pasids(&mut self, view: View, scope: PasidScope) {
        match scope {
            PasidScope::Global | PasidScope::Domain(_) => self.rescan = true,
            PasidScope::Pasid { pasid, .. } => {
                // An entry that was not present has no domain yet: every endpoint may have it.
                for rid in self.rids() {
                    self.refresh_pasid(view, rid, pasid);
                }
            }
        }
    }

    fn refresh_pasid(&mut self, view: View, rid: Rid, pasid: u32) {
        let Some(context) = self.endpoints.get(&rid).and_then(|e| e.context) else {
            return;
        };
        let target = if pasid == context.rid_pasid {
            Target::rid(rid)
        } else if context.paside {
            Target::pasid(rid, Pasid(pasid))
        } else {
            return;
        };
        let decoded = pasid::decode(view.ram, view.offer, &context, pasid);
        self.set(target, pasid, decoded);
    }

    /// Does the scan that is due.
    pub(super) fn finish_rescan(&mut self, view: View) {
        if !std::mem::take(&mut self.rescan) {
            return;
        }
        let mut tables = MAX_TABLES_PER_SCAN;
        for rid in self.rids() {
            if let Some(context) = self.endpoints.get(&rid).and_then(|e| e.context) {
                self.refresh_pasid(view, rid, context.rid_pasid);
                self.scan_pasids(view, rid, &mut tables);
            }
        }
    }

    /// Decodes every present PASID entry of an endpoint but RID_PASID's: page by page of the
    /// directory, present tables only, at most `tables` of them.
    fn scan_pasids(&mut self, view: View, rid: Rid, tables: &mut u32) {
        self.scan = self.scan.wrapping_add(1);
        let Some(context) = self.endpoints.get(&rid).and_then(|e| e.context) else {
            return;
        };
        let entries = context.pasids / PASID_TABLE_ENTRIES;
        let mut chunk_at = 0;
        while context.paside && chunk_at < entries {
            let at = context.directory.0 + u64::from(chunk_at) * PASID_DIRECTORY_ENTRY_SIZE;
            let chunk = read_words::<DIRECTORY_CHUNK>(view.ram, at);
            for (i, bits) in chunk.into_iter().flatten().enumerate() {
                let Ok((table, fpd)) = pasid::directory_entry(bits, context.fpd) else {
                    continue;
                };
                if *tables == 0 {
                    self.counts.over_limit += 1;
                    continue;
                }
                *tables -= 1;
                self.counts.tables_scanned += 1;
                let Some(table) = pasid::table(view.ram, table) else {
                    continue;
                };
                let first = (chunk_at + i as u32) * PASID_TABLE_ENTRIES;
                for (pasid, words) in (first..).zip(table) {
                    // Bit 0 of the first word is P.
                    if words[0] & 1 != 0 && pasid != context.rid_pasid {
                        let decoded = pasid::entry(view.offer, words, fpd);
                        self.set(Target::pasid(rid, Pasid(pasid)), pasid, decoded);
                    }
                }
            }
            chunk_at += DIRECTORY_CHUNK as u32;
        }
        self.sweep(rid);
    }

    /// Blocks the PASIDs that the last scan did not see.
    fn sweep(&mut self, rid: Rid) {
        let scan = self.scan;
        let Some(endpoint) = self.endpoints.get(&rid) else {
            return;
        };
        let gone: Vec<_> = endpoint
            .live
            .iter()
            .filter(|(pasid, live)| pasid.is_some() && live.scan() != scan)
            .map(|(pasid, _)| *pasid)
            .collect();
        for pasid in gone {
            self.block(Target {
                endpoint: rid,
                pasid,
            });
        }
    }

    /// Blocks all targets of an endpoint, but for `keep`, and forgets its context.
    fn clear(&mut self, rid: Rid, keep: Option<Option<Pasid>>) {
        let Some(endpoint) = self.endpoints.get_mut(&rid) else {
            return;
        };
        endpoint.context = None;
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
        let (backend, scan) = (endpoint.backend, self.scan);
        let old = endpoint.live.get(&target.pasid).copied();
        let entry = match decoded {
            Ok(entry) => entry,
            Err(problem) => return self.set_wrong(target, old, problem),
        };
        if old.is_none() && target.pasid.is_some() && self.live_pasids >= MAX_LIVE_PASIDS {
            self.counts.over_limit += 1;
            return;
        }
        let was = match old {
            Some(Live::Entry {
                entry,
                applied: true,
                ..
            }) => entry.translation,
            _ => Translation::Blocked,
        };
        let old_entry = match old {
            Some(Live::Entry { entry, pasid, .. }) => Some((entry.did, pasid)),
            _ => None,
        };
        let applied = was == entry.translation || self.apply(target, entry.translation);
        if old_entry != Some((entry.did, pasid))
            && let Some((did, pasid)) = old_entry
        {
            self.tags.remove(&tag(target, did, pasid));
        }
        let tagged = Tagged {
            backend,
            stages: stages(entry.translation),
        };
        self.tags.insert(tag(target, entry.did, pasid), tagged);
        let live = Live::Entry {
            entry,
            pasid,
            applied,
            scan,
        };
        self.insert(target, old, live);
    }

    /// The tables give `target` no translation. What is merely not there is no news; what is
    /// there and wrong is, once.
    fn set_wrong(&mut self, target: Target, old: Option<Live>, problem: Problem) {
        if let Some(Live::Wrong { problem: known, .. }) = old
            && known == problem
        {
            let scan = self.scan;
            self.insert(target, old, Live::Wrong { problem, scan });
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
        let scan = self.scan;
        self.insert(target, None, Live::Wrong { problem, scan });
        if !(problem.fpd && problem.reason.is_qualified()) {
            self.tell(target, problem.reason);
        }
    }

    fn insert(&mut self, target: Target, old: Option<Live>, live: Live) {
        if let Some(endpoint) = self.endpoints.get_mut(&target.endpoint) {
            endpoint.live.insert(target.pasid, live);
            if old.is_none() && target.pasid.is_some() {
                self.live_pasids += 1;
            }
        }
    }

    /// Blocks a target in its back end, if it is not, and forgets it.
    fn block(&mut self, target: Target) {
        if let Some(Live::Entry { .. }) = self.forget(target) {
            // Blocked cannot be refused: after a failure it is in force all the same.
            self.call_apply(target, Translation::Blocked);
        }
    }

    fn forget(&mut self, target: Target) -> Option<Live> {
        let endpoint = self.endpoints.get_mut(&target.endpoint)?;
        let live = endpoint.live.remove(&target.pasid)?;
        if target.pasid.is_some() {
            self.live_pasids -= 1;
        }
        if let Live::Entry { entry, pasid, .. } = live {
            self.tags.remove(&tag(target, entry.did, pasid));
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
        let Some(Live::Entry { entry, pasid, .. }) = self
            .endpoints
            .get(&target.endpoint)
            .and_then(|e| e.live.get(&target.pasid))
            .copied()
        else {
            return;
        };
        self.set(target, pasid, Ok(entry));
    }

    /// An IOTLB invalidation (6.5.2.3).
    pub(super) fn invalidate_iotlb(&mut self, scope: IotlbScope) {
        let (did, range) = match scope {
            IotlbScope::Global => return self.invalidate_everything(),
            IotlbScope::Domain(did) => (did, None),
            IotlbScope::Pages { did, range } => (did, Some(range)),
        };
        self.invalidate_tags(did, 0..=u32::MAX, |stages| match (range, stages) {
            (None, _) => Some(InvalidationRange::All),
            (Some(range), Stages::Second) => Some(to_backend(range)),
            // A page of the second stage is behind any number of first-stage ones.
            (Some(_), Stages::Both) => Some(InvalidationRange::All),
            (Some(_), Stages::First | Stages::None) => None,
        });
    }

    /// A PASID-based IOTLB invalidation (6.5.2.4): first-stage and nested translations.
    pub(super) fn invalidate_pasid_iotlb(&mut self, did: u16, pasid: u32, range: Range) {
        self.invalidate_tags(did, pasid..=pasid, |stages| match (range, stages) {
            // PASID-selective means all that is cached for it, whatever translates it.
            (Range::All, _) => Some(InvalidationRange::All),
            (_, Stages::First | Stages::Both) => Some(to_backend(range)),
            (_, Stages::Second | Stages::None) => None,
        });
    }

    /// A device-TLB invalidation (6.5.2.5, 6.5.2.6): `None` means all PASIDs, and no PASID.
    pub(super) fn invalidate_device(&mut self, scope: Scope, range: Range) {
        let (Scope::Endpoint(rid) | Scope::Target(Target { endpoint: rid, .. })) = scope else {
            return;
        };
        if let Some(endpoint) = self.endpoints.get(&rid) {
            let invalidation = Invalidation {
                scope,
                range: to_backend(range),
            };
            self.collect(endpoint.backend, invalidation);
        }
    }

    fn invalidate_everything(&mut self) {
        for target in self.failed.iter().copied().collect::<Vec<_>>() {
            self.retry(target);
        }
        self.each_backend(Invalidation {
            scope: Scope::All,
            range: InvalidationRange::All,
        });
    }

    fn each_backend(&mut self, invalidation: Invalidation) {
        for index in 0..self.slots.len() {
            self.collect(index, invalidation);
        }
    }

    /// Invalidates the targets of a domain whose tag has a PASID in `pasids`, with the range that
    /// `how` gives for what translates them.
    fn invalidate_tags(
        &mut self,
        did: u16,
        pasids: std::ops::RangeInclusive<u32>,
        how: impl Fn(Stages) -> Option<InvalidationRange>,
    ) {
        let bound = |pasid, rid, plain| Tag {
            did,
            pasid,
            rid: Rid(rid),
            plain,
        };
        let from = bound(*pasids.start(), 0, false);
        let to = bound(*pasids.end(), u16::MAX, true);
        let mut retries = Vec::new();
        // Taken out so that the batches can be filled while the tags are walked.
        let tags = std::mem::take(&mut self.tags);
        for (count, (tag, tagged)) in tags.range(from..=to).enumerate() {
            let target = tag.target();
            if !self.failed.is_empty() && self.failed.contains(&target) {
                retries.push(target);
            } else if count >= BATCH {
                self.each_backend(Invalidation {
                    scope: Scope::All,
                    range: InvalidationRange::All,
                });
                retries.extend(&self.failed);
                break;
            } else if let Some(range) = how(tagged.stages) {
                let scope = Scope::Target(target);
                self.collect_unflushed(tagged.backend, Invalidation { scope, range });
            }
        }
        self.tags = tags;
        for index in 0..self.slots.len() {
            self.flush_if_full(index);
        }
        for target in retries {
            self.retry(target);
        }
    }

    fn collect(&mut self, index: usize, invalidation: Invalidation) {
        self.collect_unflushed(index, invalidation);
        self.flush_if_full(index);
    }

    fn collect_unflushed(&mut self, index: usize, invalidation: Invalidation) {
        if let Some(Some(slot)) = self.slots.get_mut(index) {
            // Linux follows an IOTLB invalidation by the device TLB's of the same range.
            if slot.batch.last() != Some(&invalidation) {
                slot.batch.push(invalidation);
            }
        }
    }

    fn flush_if_full(&mut self, index: usize) {
        if matches!(self.slots.get(index), Some(Some(slot)) if slot.batch.len() >= BATCH) {
            self.flush_slot(index);
        }
    }

    /// Gives the back ends all that is collected.
    pub(super) fn flush(&mut self) {
        for index in 0..self.slots.len() {
            self.flush_slot(index);
        }
    }

    fn flush_slot(&mut self, index: usize) {
        let Some(Some(slot)) = self.slots.get_mut(index) else {
            return;
        };
        if slot.batch.is_empty() {
            return;
        }
        self.counts.batches += 1;
        self.counts.invalidations += slot.batch.len() as u64;
        let mut batch = std::mem::take(&mut slot.batch);
        let done = slot.backend.invalidate(&batch);
        for invalidation in batch.iter().skip(done) {
            self.fail(index, invalidation.scope);
        }
        batch.clear();
        if let Some(Some(slot)) = self.slots.get_mut(index) {
            slot.batch = batch;
        }
    }

    /// An invalidation did not take effect: what it was for may be stale, and is Blocked.
    fn fail(&mut self, index: usize, scope: Scope) {
        let stale: Vec<Target> = self
            .endpoints
            .iter()
            .filter(|(rid, endpoint)| {
                endpoint.backend == index
                    && match scope {
                        Scope::All => true,
                        Scope::Endpoint(of) => of == **rid,
                        Scope::Target(target) => target.endpoint == **rid,
                    }
            })
            .flat_map(|(&endpoint, e)| e.live.keys().map(move |&pasid| Target { endpoint, pasid }))
            .filter(|target| !matches!(scope, Scope::Target(of) if of != *target))
            .collect();
        for target in stale {
            let live = self
                .endpoints
                .get_mut(&target.endpoint)
                .and_then(|e| e.live.get_mut(&target.pasid));
            if let Some(Live::Entry { applied, .. }) = live
                && std::mem::replace(applied, false)
            {
                self.call_apply(target, Translation::Blocked);
                self.refuse(target, true);
                let reason = match self.is_scalable(target.endpoint) {
                    true => FaultReason::PasidEntryInvalid,
                    false => FaultReason::ContextEntryInvalid,
                };
                self.tell(target, reason);
            }
        }
    }
}

impl Live {
    const fn scan(&self) -> u32 {
        match self {
            Self::Entry { scan, .. } | Self::Wrong { scan, .. } => *scan,
        }
    }
}

const fn tag(target: Target, did: u16, pasid: u32) -> Tag {
    Tag {
        did,
        pasid,
        rid: target.endpoint,
        plain: target.pasid.is_none(),
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
const fn is_absent(reason: FaultReason) -> bool {
    matches!(
        reason,
        FaultReason::RootEntryNotPresent
            | FaultReason::ContextEntryNotPresent
            | FaultReason::ScalableRootNotPresent
            | FaultReason::ScalableContextNotPresent
            | FaultReason::PasidDirectoryNotPresent
            | FaultReason::PasidEntryNotPresent
    )
}

/// A fault that no access caused: the entry itself cannot be obeyed.
const fn at_entry(target: Target, reason: FaultReason) -> Recorded {
    Recorded {
        target,
        iova: Iova(0),
        write: false,
        execute: false,
        privileged: false,
        reason,
    }
}

const fn to_backend(range: Range) -> InvalidationRange {
    match range {
        Range::All => InvalidationRange::All,
        Range::Pages { first, pages, leaf } => InvalidationRange::Pages {
            first: Iova(first),
            count: pages,
            leaf,
        },
    }
}

/// The mode that `root` names, legacy when there is none.
pub(super) fn mode(root: Option<Rtaddr>) -> TranslationTableMode {
    root.map_or(TranslationTableMode::Legacy, Rtaddr::mode)
}
