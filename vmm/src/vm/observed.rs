//! A back end whose faults and refusals are told to those who follow the VM's events.
//!
//! It stands between one vIOMMU and one back end, and changes nothing: what the front end asks for
//! is asked of the back end, and what the back end reports reaches the front end first.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use viommu::backend::{
    Backend, Capabilities, EventSink, Fault, Invalidation, Mapping, Objects, PageRequest,
    PageResponse, Refused, Translation,
};
use viommu::doorbell::Doorbell;
use viommu::{DomainId, HwptId, Iova, Pasid, Rid, Target};

use crate::control::{Event, Events};

/// How many refused targets are remembered, to tell when the back end takes them; a guest chooses
/// their number.
const MOST_REFUSED: usize = 1024;

/// Where it is told: set once, before a vCPU runs.
pub(super) type Told = Arc<OnceLock<Arc<Events>>>;

/// See the module's text.
pub(super) struct Observed {
    back_end: Arc<dyn Backend>,
    viommu: String,
    told: Told,
    refused: Mutex<BTreeSet<Target>>,
}

impl Observed {
    /// `back_end`, for the vIOMMU of this name.
    pub(super) fn new(back_end: Arc<dyn Backend>, viommu: &str, told: &Told) -> Arc<Self> {
        Arc::new(Self {
            back_end,
            viommu: viommu.into(),
            told: told.clone(),
            refused: Mutex::default(),
        })
    }

    fn tell(&self, event: impl FnOnce() -> Event) {
        if let Some(events) = self.told.get() {
            events.emit(event());
        }
    }

    /// Notes what came of an `apply`.
    fn note(&self, target: Target, result: &Result<(), Refused>) {
        let endpoint = address(target.endpoint);
        let pasid = target.pasid.map(|Pasid(pasid)| pasid);
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Err(why) => {
                let first = !refused.contains(&target);
                if refused.len() < MOST_REFUSED {
                    refused.insert(target);
                }
                drop(refused);
                if first {
                    self.tell(|| Event::AttachFailed {
                        viommu: self.viommu.clone(),
                        endpoint,
                        pasid,
                        reason: crate::control::sentence(why),
                    });
                }
            }
            Ok(()) => {
                let was_refused = refused.remove(&target);
                drop(refused);
                if was_refused {
                    self.tell(|| Event::AttachRecovered {
                        viommu: self.viommu.clone(),
                        endpoint,
                        pasid,
                    });
                }
            }
        }
    }
}

fn address(endpoint: Rid) -> String {
    format!("0000:{endpoint}")
}

impl Backend for Observed {
    fn capabilities(&self) -> Capabilities {
        self.back_end.capabilities()
    }

    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        let sink = Arc::new(Telling {
            sink,
            viommu: self.viommu.clone(),
            told: self.told.clone(),
        });
        self.back_end.claim(endpoint, sink)
    }

    fn release(&self, endpoint: Rid) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|target| target.endpoint != endpoint);
        drop(refused);
        self.back_end.release(endpoint);
    }

    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused> {
        let result = self.back_end.apply(target, translation);
        self.note(target, &result);
        result
    }

    fn translation(&self, target: Target) -> Translation {
        self.back_end.translation(target)
    }

    fn hwpt(&self, target: Target) -> Option<HwptId> {
        self.back_end.hwpt(target)
    }

    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        self.back_end.invalidate(batch)
    }

    fn drain_page_requests(&self) {
        self.back_end.drain_page_requests();
    }

    fn respond(&self, response: PageResponse) {
        self.back_end.respond(response);
    }

    fn create_domain(&self) -> Result<DomainId, Refused> {
        self.back_end.create_domain()
    }

    fn destroy_domain(&self, domain: DomainId) {
        self.back_end.destroy_domain(domain);
    }

    fn map(&self, domain: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        self.back_end.map(domain, mappings)
    }

    fn unmap(&self, domain: DomainId, first: Iova, last: Iova) -> Result<u64, Refused> {
        self.back_end.unmap(domain, first, last)
    }

    fn doorbell(&self, endpoint: Rid) -> Doorbell {
        self.back_end.doorbell(endpoint)
    }

    fn objects(&self) -> Objects {
        self.back_end.objects()
    }
}

/// A front end's sink whose faults are told.
struct Telling {
    sink: Arc<dyn EventSink>,
    viommu: String,
    told: Told,
}

impl EventSink for Telling {
    fn fault(&self, fault: Fault) {
        self.sink.fault(fault);
        if let Some(events) = self.told.get() {
            events.emit(Event::ViommuFault {
                viommu: self.viommu.clone(),
                endpoint: address(fault.target.endpoint),
                pasid: fault.target.pasid.map(|Pasid(pasid)| pasid),
                address: fault.iova.to_string(),
                reason: format!("{:?}", fault.cause),
                suppressed: 0,
            });
        }
    }

    fn translation_request(&self, target: Target, iova: Iova) -> bool {
        self.sink.translation_request(target, iova)
    }

    fn page_request(&self, request: PageRequest) {
        self.sink.page_request(request);
    }
}

#[cfg(test)]
mod tests {
    use viommu::backend::FaultCause;
    use viommu::backend::software::{Config, EndpointConfig, Engine};
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    struct Quiet;

    impl EventSink for Quiet {
        fn fault(&self, _fault: Fault) {}
        fn translation_request(&self, target: Target, iova: Iova) -> bool {
            target.pasid.is_none() && iova == Iova(0x1000)
        }

        fn page_request(&self, _request: PageRequest) {}
    }

    #[test]
    fn a_refusal_is_told_once_and_so_is_its_end_and_faults_are_told() {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap());
        let engine = Engine::with_config(ram.clone(), Config::for_ram(&ram));
        let rid = Rid::new(0, 5, 0);
        let _port = engine.add_endpoint(rid, EndpointConfig::default()).unwrap();
        let told = Told::default();
        let events = Arc::new(Events::default());
        told.set(events.clone()).unwrap();
        let observed = Observed::new(Arc::new(engine), "unit", &told);
        let target = Target::rid(rid);
        let refusal = Err(Refused::NoEndpoint(rid));
        observed.note(target, &refusal);
        observed.note(target, &refusal);
        observed.note(target, &Ok(()));
        observed.note(target, &Ok(()));
        let telling = Telling {
            sink: Arc::new(Quiet),
            viommu: "unit".into(),
            told,
        };
        // What the front end says of a translation request is what the device hears.
        assert!(telling.translation_request(target, Iova(0x1000)));
        assert!(!telling.translation_request(target, Iova(0x2000)));
        telling.fault(Fault {
            target,
            iova: Iova(0x1000),
            access: viommu::backend::Access::READ,
            execute: false,
            privileged: false,
            cause: FaultCause::Blocked,
        });
        let names: Vec<String> = events
            .after(0)
            .records
            .iter()
            .map(|r| serde_json::to_value(&**r).unwrap()["event"].to_string())
            .collect();
        assert_eq!(
            names,
            [
                "\"attach-failed\"",
                "\"attach-recovered\"",
                "\"viommu-fault\""
            ]
        );
    }
}
