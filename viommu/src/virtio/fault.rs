//! Fault reports, from back ends to the event queue (5.13.6.9).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use serde::Serialize;

use crate::backend::{
    self, Backend, EventSink, FaultCause, PageRequest, PageResponse, ResponseCode,
};
use crate::spec::virtio_iommu::{self as spec, fault_flag, fault_reason};
use crate::{Gpa, Iova, Rid};

/// Reports that wait for a buffer of the driver. Further ones are counted and dropped, which
/// 5.13.6.9 allows: an endpoint that faults in a loop must cost the host nothing.
const WAITING: usize = 64;

/// Reports that a unit has for its driver. One mutex of its own: faults come on device threads
/// while requests are served.
#[derive(Default)]
pub(super) struct Faults {
    waiting: Mutex<VecDeque<spec::Fault>>,
    reported: AtomicU64,
    dropped: AtomicU64,
    missed: Mutex<Option<MissedDoorbell>>,
    wake: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// How many fault reports there were.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct FaultCounters {
    /// Kept for the driver.
    pub reported: u64,
    /// Dropped since the driver gave no buffers.
    pub dropped: u64,
    /// Waiting for a buffer now.
    pub waiting: usize,
    /// The last interrupt message that did not reach its doorbell.
    pub missed_doorbell: Option<MissedDoorbell>,
}

/// An interrupt that was lost since the guest had not mapped the doorbell to itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct MissedDoorbell {
    /// Whose.
    pub endpoint: Rid,
    /// Where its message went.
    pub address: Iova,
    /// Where the doorbell begins.
    pub doorbell: Gpa,
}

impl Faults {
    fn waiting(&self) -> std::sync::MutexGuard<'_, VecDeque<spec::Fault>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, fault: spec::Fault) {
        {
            let mut waiting = self.waiting();
            if waiting.len() >= WAITING {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                return;
            }
            waiting.push_back(fault);
        }
        self.reported.fetch_add(1, Ordering::Relaxed);
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }

    /// Says that what is in force for `endpoint` is not what the guest asked for.
    pub(super) fn push_internal(&self, endpoint: Rid) {
        self.push(report(endpoint, fault_reason::UNKNOWN, 0, 0));
    }

    pub(super) fn pop(&self) -> Option<spec::Fault> {
        self.waiting().pop_front()
    }

    pub(super) fn clear(&self) {
        self.waiting().clear();
    }

    /// Calls `wake` for each report from now on. The first call counts.
    pub(super) fn on_fault(&self, wake: Box<dyn Fn() + Send + Sync>) {
        let _ = self.wake.set(wake);
    }

    pub(super) fn counters(&self) -> FaultCounters {
        FaultCounters {
            reported: self.reported.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            waiting: self.waiting().len(),
            missed_doorbell: *self.missed.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

fn report(endpoint: Rid, reason: u8, flags: u32, address: u64) -> spec::Fault {
    spec::Fault {
        reason,
        reserved: [0; 3],
        flags: flags.into(),
        endpoint: u32::from(endpoint.0).into(),
        reserved1: 0.into(),
        address: address.into(),
    }
}

/// What the guest is told of `fault`.
pub(super) fn translate(fault: &backend::Fault) -> spec::Fault {
    let reason = match fault.cause {
        FaultCause::Blocked => fault_reason::DOMAIN,
        FaultCause::AddressWidth
        | FaultCause::BeyondSecondStage
        | FaultCause::NotMapped { .. }
        | FaultCause::SupervisorPage
        | FaultCause::Permission { .. }
        | FaultCause::ExecuteDisabled
        | FaultCause::UpdateNotSnooped
        | FaultCause::NotAMessage
        | FaultCause::InterruptRange
        | FaultCause::Doorbell(_)
        | FaultCause::OutsideMemory
        | FaultCause::DomainAccess
        | FaultCause::DomainUnmapped => fault_reason::MAPPING,
        FaultCause::Reserved { .. } | FaultCause::TableAccess { .. } | FaultCause::Supervisor => {
            fault_reason::UNKNOWN
        }
    };
    let mut flags = fault_flag::ADDRESS;
    if fault.access.read {
        flags |= fault_flag::READ;
    }
    if fault.access.write {
        flags |= fault_flag::WRITE;
    }
    report(fault.target.endpoint, reason, flags, fault.iova.0)
}

/// What a back end is given for one endpoint.
pub(super) struct Sink {
    pub(super) faults: Arc<Faults>,
    pub(super) backend: Weak<dyn Backend>,
}

impl EventSink for Sink {
    fn fault(&self, fault: backend::Fault) {
        if let FaultCause::Doorbell(doorbell) = fault.cause {
            let missed = &self.faults.missed;
            *missed.lock().unwrap_or_else(PoisonError::into_inner) = Some(MissedDoorbell {
                endpoint: fault.target.endpoint,
                address: fault.iova,
                doorbell,
            });
        }
        self.faults.push(translate(&fault));
    }

    /// virtio-iommu does not tell them from other requests: what is in force answers them.
    fn translation_request(&self, _: crate::Target, _: Iova) -> bool {
        true
    }

    /// virtio-iommu has no page requests, but each group must be answered.
    fn page_request(&self, request: PageRequest) {
        if let Some(backend) = self.backend.upgrade().filter(|_| request.last) {
            backend.respond(PageResponse {
                target: request.target,
                group: request.group,
                code: ResponseCode::Invalid,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Access;
    use crate::{Iova, Target};

    fn fault(cause: FaultCause) -> backend::Fault {
        backend::Fault {
            target: Target::rid(Rid(0x0308)),
            iova: Iova(0x1234_5678),
            access: Access::WRITE,
            execute: false,
            privileged: false,
            cause,
        }
    }

    #[test]
    fn a_report_has_the_endpoint_the_address_the_access_and_the_reason() {
        let report = translate(&fault(FaultCause::DomainUnmapped));
        assert_eq!(report.reason, fault_reason::MAPPING);
        assert_eq!(report.flags.get(), fault_flag::WRITE | fault_flag::ADDRESS);
        assert_eq!(report.endpoint.get(), 0x308);
        assert_eq!(report.address.get(), 0x1234_5678);
        let report = translate(&fault(FaultCause::Blocked));
        assert_eq!(report.reason, fault_reason::DOMAIN);
    }

    #[test]
    fn should_set_reserved_and_undefined_flags_of_a_report_to_zero() {
        let report = translate(&fault(FaultCause::Supervisor));
        assert_eq!((report.reserved, report.reserved1.get()), ([0; 3], 0));
        let defined = fault_flag::READ | fault_flag::WRITE | fault_flag::ADDRESS;
        assert_eq!(report.flags.get() & !defined, 0);
    }

    #[test]
    fn a_flood_of_faults_is_bounded_and_counted() {
        let faults = Faults::default();
        for _ in 0..1000 {
            faults.push(translate(&fault(FaultCause::Blocked)));
        }
        let counters = faults.counters();
        assert_eq!(counters.waiting, WAITING);
        assert_eq!(counters.reported + counters.dropped, 1000);
        assert!(faults.pop().is_some());
        faults.clear();
        assert_eq!(faults.pop(), None);
    }
}
