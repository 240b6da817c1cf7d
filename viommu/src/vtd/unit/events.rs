//! What endpoints did: faults and page requests, on device threads and back ends' own, under the
//! short locks only.

use std::sync::{Arc, Weak};

use super::{Unit, lock};
use crate::backend::{
    EventSink, Fault, FaultCause, PageRequest, PageResponse, ResponseCode, Translation,
};
use crate::spec::vtd::fault::FaultReason;
use crate::spec::vtd::registers::{Rtaddr, TranslationTableMode};
use crate::vtd::capabilities::Offer;
use crate::vtd::context::{self, Context, Problem};
use crate::vtd::fault::{self, Recorded, RequestKind};
use crate::vtd::page_request::Queued;
use crate::vtd::pasid;
use crate::{GuestRam, Iova, Rid, Target};

/// What back ends hold of a unit: nothing that keeps it alive.
pub(super) struct Events(pub(super) Weak<Unit>);

impl EventSink for Events {
    fn fault(&self, fault: Fault) {
        if let Some(unit) = self.0.upgrade() {
            unit.fault(fault);
        }
    }

    fn translation_request(&self, target: Target, iova: Iova) -> bool {
        let unit = self.0.upgrade();
        unit.is_some_and(|unit| unit.translation_request(target, iova))
    }

    fn page_request(&self, request: PageRequest) {
        if let Some(unit) = self.0.upgrade() {
            unit.page_request(request);
        }
    }
}

impl EventSink for Unit {
    fn fault(&self, fault: Fault) {
        // With translation off, hardware has no tables to blame.
        let Some((offer, root)) = self.tables() else {
            return;
        };
        let decoded = pasid::lookup(&self.ram, offer, root, fault.target);
        let fpd = match decoded {
            Ok(entry) => entry.fpd,
            Err(problem) => problem.fpd,
        };
        let reason = match (fault.cause, decoded) {
            (FaultCause::Blocked, Err(problem)) => problem.reason,
            (FaultCause::Blocked, Ok(_)) if lock(&self.faults).refused.contains(&fault.target) => {
                match root.mode() {
                    TranslationTableMode::Legacy => FaultReason::ContextEntryInvalid,
                    _ => FaultReason::PasidEntryInvalid,
                }
            }
            (_, Ok(entry)) => fault::reason(root.mode(), entry.translation, &fault),
            // The tables changed while the access was under way: as they were then.
            (_, Err(_)) => fault::reason(root.mode(), Translation::Blocked, &fault),
        };
        if fpd && reason.is_qualified() {
            return;
        }
        self.record(Recorded {
            target: fault.target,
            iova: fault.iova,
            request: RequestKind::Untranslated,
            write: fault.access.write,
            execute: fault.execute,
            privileged: fault.privileged,
            reason,
        });
    }

    fn translation_request(&self, target: Target, iova: Iova) -> bool {
        // With translation off nobody answers them.
        let Some((offer, root)) = self.tables() else {
            return false;
        };
        let Some((reason, fpd)) = translation_request_fault(&self.ram, offer, root, target) else {
            return true;
        };
        if !(fpd && reason.is_qualified()) {
            self.record(Recorded {
                target,
                iova,
                request: RequestKind::Translation,
                write: false,
                execute: false,
                privileged: false,
                reason,
            });
        }
        false
    }

    fn page_request(&self, request: PageRequest) {
        let target = request.target;
        let refused = self.page_request_fault(target);
        if let Some((reason, fpd)) = refused
            && !(fpd && reason.is_qualified())
        {
            self.record(Recorded {
                target,
                iova: request.iova,
                request: RequestKind::Page,
                write: request.access.write,
                execute: request.execute,
                privileged: request.privileged,
                reason,
            });
        }
        let mut pages = lock(&self.pages);
        // An endpoint that left has its requests answered by its back end.
        let Some(backend) = pages.backends.get(&target.endpoint).cloned() else {
            return;
        };
        let (queued, message) = if refused.is_some() {
            (Queued::No(ResponseCode::Invalid), None)
        } else if request.privileged {
            pages.privileged += 1;
            (Queued::No(ResponseCode::Invalid), None)
        } else {
            pages
                .queue
                .request(&self.ram, &request, Arc::clone(&backend))
        };
        // Earlier requests of the group may be in the guest's queue: it is over for them too.
        if queued != Queued::Yes && request.last {
            pages.queue.book.abandon(target, request.group);
        }
        drop(pages);
        self.send(message);
        if let Queued::No(code) = queued
            && request.last
        {
            backend.respond(PageResponse {
                target,
                group: request.group,
                code,
            });
        }
    }
}

impl Unit {
    /// Records a blocked interrupt request of `rid` with handle `index` for the guest, unless
    /// `fpd` of its entry says not to.
    pub fn interrupt_fault(&self, rid: Rid, index: u16, reason: FaultReason, fpd: bool) {
        if fpd && reason.is_qualified() {
            return;
        }
        let mut faults = lock(&self.faults);
        let recorded = Recorded {
            target: Target::rid(rid),
            iova: Iova(0),
            request: RequestKind::Untranslated,
            write: false,
            execute: false,
            privileged: false,
            reason,
        };
        let message = faults.record_interrupt(recorded, index);
        self.publish_faults(&faults);
        drop(faults);
        self.send(message);
    }

    fn record(&self, fault: Recorded) {
        let mut faults = lock(&self.faults);
        let message = faults.record(fault);
        self.publish_faults(&faults);
        drop(faults);
        self.send(message);
    }

    /// Which tables are in force, and what is offered; none while translation is off.
    fn tables(&self) -> Option<(&Offer, Rtaddr)> {
        let root = lock(&self.faults).root?;
        Some((self.freeze(), root))
    }

    /// Why a page request of `target` is not for the guest, and FPD.
    fn page_request_fault(&self, target: Target) -> Option<(FaultReason, bool)> {
        // With translation off, or not offered, nobody asked for page requests.
        let Some((offer, root)) = self.tables().filter(|(offer, _)| offer.ecap.prs()) else {
            return Some((FaultReason::PageRequestDisabled, true));
        };
        match context::decode(&self.ram, offer, root, target.endpoint) {
            Err(problem) => Some((problem.reason, problem.fpd)),
            Ok(Context::Legacy { .. }) => Some((FaultReason::PageRequestInLegacyMode, false)),
            Ok(Context::Scalable(context)) if !context.pre => {
                Some((FaultReason::PageRequestDisabled, context.fpd))
            }
            // And its PASID entry is one that can be obeyed (7.4.1, "Remapping Table Error").
            Ok(Context::Scalable(_)) => pasid::lookup(&self.ram, offer, root, target)
                .err()
                .map(|problem| (problem.reason, problem.fpd)),
        }
    }
}

/// Why a translation request of `target` is not answered with what is in force (table 30: with
/// Unsupported Request or Completer Abort), and FPD.
fn translation_request_fault(
    ram: &GuestRam,
    offer: &Offer,
    root: Rtaddr,
    target: Target,
) -> Option<(FaultReason, bool)> {
    match context::decode(ram, offer, root, target.endpoint) {
        Err(problem) => return Some((problem.reason, problem.fpd)),
        Ok(Context::Legacy { entry, device_tlb }) if !device_tlb => {
            return Some((FaultReason::RequestBlocked, entry.fpd));
        }
        Ok(Context::Scalable(context)) if !context.dte => {
            return Some((FaultReason::DeviceTlbDisabled, context.fpd));
        }
        Ok(Context::Legacy { .. } | Context::Scalable(_)) => {}
    }
    match pasid::lookup(ram, offer, root, target) {
        // A PASID that is not there has no translations, which is an answer.
        Err(Problem {
            reason: FaultReason::PasidDirectoryNotPresent | FaultReason::PasidEntryNotPresent,
            ..
        })
        | Ok(_) => None,
        Err(problem) => Some((problem.reason, problem.fpd)),
    }
}
