//! IOTLB and device-TLB invalidations: which targets they mean, collected per back end.

use super::{BATCH, Live, Stages, Tag, Targets};
use crate::backend::{Invalidation, InvalidationRange, Scope, Translation};
use crate::spec::vtd::descriptor::{IotlbScope, Range};
use crate::spec::vtd::fault::FaultReason;
use crate::{Iova, Pasid, Target};

impl Targets {
    /// An IOTLB invalidation (6.5.2.3).
    #[inline]
    pub(in crate::vtd) fn invalidate_iotlb(&mut self, scope: IotlbScope) {
        let (did, range) = match scope {
            IotlbScope::Global => return self.invalidate_everything(),
            IotlbScope::Domain(did) => (did, None),
            IotlbScope::Pages { did, range } => (did, Some(range)),
        };
        self.invalidate_tags(did, 0..=Pasid::MAX.0, |stages| match (range, stages) {
            (None, _) => Some(InvalidationRange::All),
            (Some(range), Stages::Second) => Some(to_backend(range)),
            // A page of the second stage is behind any number of first-stage ones.
            (Some(_), Stages::Both) => Some(InvalidationRange::All),
            (Some(_), Stages::First | Stages::None) => None,
        });
    }

    /// A PASID-based IOTLB invalidation (6.5.2.4): first-stage and nested translations.
    #[inline]
    pub(in crate::vtd) fn invalidate_pasid_iotlb(&mut self, did: u16, pasid: u32, range: Range) {
        self.invalidate_tags(did, pasid..=pasid, |stages| match (range, stages) {
            // PASID-selective means all that is cached for it, whatever translates it.
            (Range::All, _) => Some(InvalidationRange::All),
            (_, Stages::First | Stages::Both) => Some(to_backend(range)),
            (_, Stages::Second | Stages::None) => None,
        });
    }

    /// A device-TLB invalidation (6.5.2.5, 6.5.2.6): `None` means all PASIDs, and no PASID.
    #[inline]
    pub(in crate::vtd) fn invalidate_device(&mut self, scope: Scope, range: Range) {
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

    pub(super) fn invalidate_everything(&mut self) {
        if !self.failed.is_empty() {
            self.due.extend(&self.failed);
        }
        self.each_backend(Invalidation {
            scope: Scope::All,
            range: InvalidationRange::All,
        });
    }

    #[inline]
    pub(super) fn each_backend(&mut self, invalidation: Invalidation) {
        for index in 0..self.slots.len() {
            self.collect(index, invalidation);
        }
    }

    /// Invalidates the targets of a domain whose tag has a PASID in `pasids`, with the range that
    /// `how` gives for what translates them.
    #[inline]
    pub(super) fn invalidate_tags(
        &mut self,
        did: u16,
        pasids: std::ops::RangeInclusive<u32>,
        how: impl Fn(Stages) -> Option<InvalidationRange>,
    ) {
        let bound = |pasid| Tag::new().with_did(did).with_pasid(pasid);
        let from = bound(*pasids.start());
        let to = bound(*pasids.end()).with_rid(u16::MAX).with_plain(true);
        // Most invalidations name the one target that the last one did.
        if let Some((known, tag, tagged)) = self.recent
            && known == (from, to)
            && self.failed.is_empty()
        {
            if let Some(range) = how(tagged.stages) {
                let scope = Scope::Target(tag.target());
                self.collect(tagged.backend.into(), Invalidation { scope, range });
            }
            return;
        }
        self.invalidate_all_tags((from, to), how);
    }

    /// As [`invalidate_tags`](Self::invalidate_tags), when the range is not the last one.
    #[inline(never)]
    fn invalidate_all_tags(
        &mut self,
        (from, to): (Tag, Tag),
        how: impl Fn(Stages) -> Option<InvalidationRange>,
    ) {
        // Taken out so that the batches can be filled while the tags are walked.
        let tags = std::mem::take(&mut self.tags);
        let mut named = tags.range(from..=to);
        self.recent = match (named.next(), named.next()) {
            (Some((tag, tagged)), None) => Some(((from, to), *tag, *tagged)),
            _ => None,
        };
        for (count, (tag, tagged)) in tags.range(from..=to).enumerate() {
            let target = tag.target();
            if !self.failed.is_empty() && self.failed.contains(&target) {
                self.due.insert(target);
            } else if count >= BATCH {
                self.each_backend(Invalidation {
                    scope: Scope::All,
                    range: InvalidationRange::All,
                });
                self.due.extend(&self.failed);
                break;
            } else if let Some(range) = how(tagged.stages) {
                let scope = Scope::Target(target);
                self.collect_unflushed(tagged.backend.into(), Invalidation { scope, range });
            }
        }
        self.tags = tags;
        for index in 0..self.slots.len() {
            self.flush_if_full(index);
        }
    }

    #[inline]
    pub(super) fn collect(&mut self, index: usize, invalidation: Invalidation) {
        self.collect_unflushed(index, invalidation);
        self.flush_if_full(index);
    }

    #[inline]
    pub(super) fn collect_unflushed(&mut self, index: usize, invalidation: Invalidation) {
        if let Some(Some(slot)) = self.slots.get_mut(index) {
            // Linux follows an IOTLB invalidation by the device TLB's of the same range.
            if slot.batch.last() != Some(&invalidation) {
                slot.batch.push(invalidation);
            }
        }
    }

    #[inline]
    pub(super) fn flush_if_full(&mut self, index: usize) {
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

    pub(super) fn flush_slot(&mut self, index: usize) {
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
    pub(super) fn fail(&mut self, index: usize, scope: Scope) {
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
            let live = self.endpoints.get_mut(&target.endpoint).and_then(|e| {
                e.unsee(target.pasid);
                e.live.get_mut(&target.pasid)
            });
            if live.is_some_and(Live::lose) {
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
