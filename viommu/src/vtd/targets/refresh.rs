//! Decoding the guest's entries again when it says that they changed.

use super::scan::Scan;
use super::{Live, MAX_TABLES_PER_SCAN, Targets, View};
use crate::spec::vtd::descriptor::{ContextScope, PasidScope};
use crate::spec::vtd::registers::{Rtaddr, TranslationTableMode};
use crate::vtd::context::{self, Context, ScalableContext};
use crate::vtd::pasid;
use crate::{Rid, Target};

/// How far the replay of a new endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::vtd) struct Replay {
    /// Whose tables are read.
    context: Option<ScalableContext>,
    scan: Scan,
}

impl Targets {
    /// Translation is on, or has a new root table: everything is decoded again.
    pub(in crate::vtd) fn refresh_all(&mut self, view: View) {
        self.for_each(|targets, rid| targets.refresh_context(view, rid, false));
        self.rescan = true;
        self.finish(view);
    }

    /// One endpoint came. What the guest's tables say about it already is made true in steps, so
    /// that the unit serves its guest meanwhile: this is the first one, [`replay`](Self::replay)
    /// are the others.
    pub(in crate::vtd) fn refresh_new(&mut self, view: View, rid: Rid) -> Replay {
        self.refresh_context(view, rid, false);
        self.finish(view);
        Replay {
            context: self.endpoints.get(&rid).and_then(|e| e.context),
            scan: Scan::new(MAX_TABLES_PER_SCAN),
        }
    }

    /// A step of a replay: one PASID table. Whether there is more to do.
    ///
    /// Between steps the guest may change its tables and invalidate what it likes. Each entry that
    /// it names is made true at once, whether the replay was there or not; and the replay reads
    /// what is in the tables now, as hardware may at any time. Who changes the endpoint's context
    /// or the root scans all of its tables: then there is nothing left to replay.
    pub(in crate::vtd) fn replay(&mut self, view: View, rid: Rid, replay: &mut Replay) -> bool {
        let context = self.endpoints.get(&rid).and_then(|e| e.context);
        context.is_some()
            && context == replay.context
            && self.scan_some(view, rid, &mut replay.scan, 1)
    }

    /// A context-cache invalidation. With caching mode, entries that were not present have no
    /// domain yet, so a domain-selective one looks at every endpoint.
    pub(in crate::vtd) fn invalidate_contexts(&mut self, view: View, scope: ContextScope) {
        let meant = |rid: Rid| match scope {
            ContextScope::Global | ContextScope::Domain(_) => true,
            ContextScope::Device { sid, mask } => (rid.0 ^ sid) & !u16::from(mask) == 0,
        };
        if let Some(root) = view.root.filter(|root| is_scalable(view, *root)) {
            let mut meant = self.endpoints.iter().filter(|(rid, _)| meant(**rid));
            if meant.all(|(&rid, e)| e.is_context_unchanged(view, root, rid)) {
                return;
            }
        }
        self.for_each(|targets, rid| {
            if meant(rid) {
                targets.refresh_context(view, rid, true);
            }
        });
    }

    pub(super) fn refresh_context(&mut self, view: View, rid: Rid, scan: bool) {
        let Some(root) = view.root else {
            return self.clear(rid, None);
        };
        if is_scalable(view, root) {
            return self.refresh_scalable(view, root, rid, scan);
        }
        match context::decode(view.ram, view.offer, root, rid) {
            Err(problem) => {
                self.clear(rid, None);
                self.set(Target::rid(rid), 0, Err(problem));
            }
            Ok(Context::Legacy { entry, .. }) => {
                self.clear(rid, Some(None));
                self.set(Target::rid(rid), 0, Ok(entry));
            }
            // Only of a root in scalable mode.
            Ok(Context::Scalable(_)) => {}
        }
    }

    fn refresh_scalable(&mut self, view: View, root: Rtaddr, rid: Rid, scan: bool) {
        let Some(endpoint) = self.endpoints.get_mut(&rid) else {
            return;
        };
        let words = context::find_scalable(view.ram, root, rid)
            .and_then(|at| context::read_scalable(view.ram, at));
        if let (Ok(words), Some(context)) = (words, endpoint.context)
            && words == endpoint.context_words
        {
            return self.refresh_pasid(view, rid, context.rid_pasid);
        }
        match words.and_then(|words| Ok((words, context::scalable(view.offer, words)?))) {
            Err(problem) => {
                self.clear(rid, None);
                self.set(Target::rid(rid), 0, Err(problem));
            }
            Ok((words, context)) => {
                endpoint.context_words = words;
                let was = endpoint.context.replace(context);
                if was != Some(context) {
                    endpoint.seen.clear();
                    endpoint.tables.clear();
                }
                self.refresh_pasid(view, rid, context.rid_pasid);
                // Once per run of the queue, however often the guest changes the entry meanwhile.
                if scan && was != Some(context) {
                    self.rescans.insert(rid);
                }
            }
        }
    }

    /// A PASID-cache invalidation. Global ones of one run of the queue become one scan, which
    /// [`finish`](Self::finish) does before anything is reported as done.
    pub(in crate::vtd) fn invalidate_pasids(&mut self, view: View, scope: PasidScope) {
        match scope {
            PasidScope::Global | PasidScope::Domain(_) => self.rescan = true,
            PasidScope::Pasid { pasid, .. } => {
                // An entry that was not present has no domain yet: every endpoint may have it.
                if self.endpoints.values().all(|e| e.is_unchanged(view, pasid)) {
                    return;
                }
                self.for_each(|targets, rid| targets.refresh_pasid(view, rid, pasid));
            }
        }
    }

    pub(super) fn refresh_pasid(&mut self, view: View, rid: Rid, pasid: u32) {
        let Some(endpoint) = self.endpoints.get(&rid) else {
            return;
        };
        let (Some(context), Some(target)) = (&endpoint.context, endpoint.target_of(rid, pasid))
        else {
            return;
        };
        let read = pasid::read(view.ram, context, pasid);
        if matches!(read, Ok((words, fpd)) if endpoint.seen.has(pasid, &words, fpd)) {
            return;
        }
        let decoded = read.and_then(|(words, fpd)| pasid::entry(view.offer, words, fpd));
        self.set(target, pasid, decoded);
        if let Ok((words, fpd)) = read
            && let Some(endpoint) = self.endpoints.get_mut(&rid)
            && endpoint
                .live
                .get(&target.pasid)
                .is_some_and(Live::is_applied)
        {
            endpoint.seen.remember(pasid, words, fpd);
        }
    }

    /// Does what was put off to be done once: the scan for PASIDs, asking again for what was
    /// refused, and the batches.
    pub(in crate::vtd) fn finish(&mut self, view: View) {
        let mut tables = MAX_TABLES_PER_SCAN;
        let changed = std::mem::take(&mut self.rescans);
        if std::mem::take(&mut self.rescan) {
            self.for_each(|targets, rid| {
                if let Some(context) = targets.endpoints.get(&rid).and_then(|e| e.context) {
                    targets.refresh_pasid(view, rid, context.rid_pasid);
                    targets.scan_pasids(view, rid, &mut tables);
                }
            });
        } else {
            for rid in changed {
                self.scan_pasids(view, rid, &mut tables);
            }
        }
        while let Some(target) = self.due.pop_first() {
            self.retry(target);
        }
        self.flush();
    }
}

fn is_scalable(view: View, root: Rtaddr) -> bool {
    root.mode() == TranslationTableMode::Scalable && view.offer.ecap.smts()
}
