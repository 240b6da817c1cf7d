//! One endpoint: its targets, its claim, and the page requests that wait for an answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::target::{TargetState, lock};
use crate::backend::{
    EventSink, Fault, PageRequest, PageResponse, ResponseCode, Scope, Translation,
};
use crate::dma::PageRequestRefused;
use crate::doorbell::Doorbell;
use crate::interrupt::MessageSink;
use crate::page_requests::{PageRequests, Withdrawn};
use crate::{Iova, Pasid, Rid, Target};

/// Takes the answers to an endpoint's page requests. Implemented by the device model.
pub trait PageResponseSink: Send + Sync {
    /// The answer to one group; there is exactly one. Called with no lock of the engine held, on
    /// the thread that answers (a vCPU's, which may hold locks of the front end): it must not
    /// block and not start DMA itself.
    fn page_response(&self, response: PageResponse);
}

/// What the engine has to know about an emulated endpoint.
#[derive(Clone)]
pub struct EndpointConfig {
    /// Bits of PASID the endpoint can send; 0: none.
    pub pasid_bits: u8,
    /// The widest address in bits that the endpoint can put on the bus.
    pub address_width: u8,
    /// Takes page responses; without, the endpoint cannot ask for pages.
    pub page_responses: Option<Arc<dyn PageResponseSink>>,
    /// Takes interrupt messages that are sent as DMA writes.
    pub messages: Option<Arc<dyn MessageSink>>,
    /// How its interrupts reach their doorbell; one that is mapped is the engine's.
    pub doorbell: Doorbell,
}

impl Default for EndpointConfig {
    /// No PASID, 64-bit addresses, no page requests, no messages.
    fn default() -> Self {
        Self {
            pasid_bits: 0,
            address_width: 64,
            page_responses: None,
            messages: None,
            doorbell: Doorbell::Intercepted,
        }
    }
}

/// The front end of an endpoint, and what it owes the endpoint.
#[derive(Default)]
struct Claim {
    sink: Option<Arc<dyn EventSink>>,
    /// Groups that are owed an answer. The endpoint is all that is needed to give it.
    book: PageRequests<()>,
}

/// One endpoint.
pub(super) struct Endpoint {
    pub(super) rid: Rid,
    pub(super) config: EndpointConfig,
    plain: Arc<TargetState>,
    pasids: RwLock<BTreeMap<Pasid, Arc<TargetState>>>,
    claim: Mutex<Claim>,
}

impl Endpoint {
    pub(super) fn new(rid: Rid, config: EndpointConfig) -> Self {
        Self {
            rid,
            config,
            plain: Arc::new(TargetState::new(Target::rid(rid))),
            pasids: RwLock::default(),
            claim: Mutex::default(),
        }
    }

    /// Whether the endpoint can send `pasid`.
    pub(super) fn can_send(&self, pasid: Pasid) -> bool {
        u64::from(pasid.0) < 1 << self.config.pasid_bits && self.config.pasid_bits != 0
    }

    /// The state of one target, if there is any.
    pub(super) fn target(&self, pasid: Option<Pasid>) -> Option<Arc<TargetState>> {
        match pasid {
            None => Some(Arc::clone(&self.plain)),
            Some(pasid) => {
                let pasids = self.pasids.read().unwrap_or_else(PoisonError::into_inner);
                pasids.get(&pasid).cloned()
            }
        }
    }

    /// The state of one target, made when there is none. The PASID is one that
    /// [`can_send`](Self::can_send) allows.
    pub(super) fn target_or_new(&self, pasid: Option<Pasid>) -> Arc<TargetState> {
        let Some(pasid) = pasid else {
            return Arc::clone(&self.plain);
        };
        let mut pasids = self.pasids.write().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(TargetState::new(Target::pasid(self.rid, pasid)));
        Arc::clone(pasids.entry(pasid).or_insert_with(new))
    }

    /// Drops the state of a PASID that is Blocked and has no port.
    pub(super) fn prune(&self, pasid: Option<Pasid>) {
        let Some(pasid) = pasid else { return };
        let mut pasids = self.pasids.write().unwrap_or_else(PoisonError::into_inner);
        let idle = |state: &mut Arc<TargetState>| {
            // The map's own reference is the only one, and nobody can take another meanwhile.
            Arc::get_mut(state).is_some_and(|s| s.translation() == Translation::Blocked)
        };
        if pasids.get_mut(&pasid).is_some_and(idle) {
            pasids.remove(&pasid);
        }
    }

    /// Runs `work` on every target.
    pub(super) fn each_target(&self, mut work: impl FnMut(&Arc<TargetState>)) {
        work(&self.plain);
        let pasids = self.pasids.read().unwrap_or_else(PoisonError::into_inner);
        pasids.values().for_each(work);
    }

    /// Binds the endpoint to a front end; `false` when it has one.
    pub(super) fn claim(&self, sink: Arc<dyn EventSink>) -> bool {
        let mut claim = lock(&self.claim);
        let free = claim.sink.is_none();
        if free {
            claim.sink = Some(sink);
        }
        free
    }

    pub(super) fn is_claimed(&self) -> bool {
        lock(&self.claim).sink.is_some()
    }

    /// Ends the claim; returns the groups that are still owed an [`answer`](Self::answer).
    pub(super) fn unclaim(&self) -> Vec<Withdrawn<()>> {
        let mut claim = std::mem::take(&mut *lock(&self.claim));
        claim.book.withdraw(Scope::All)
    }

    pub(super) fn pending_groups(&self) -> usize {
        lock(&self.claim).book.groups_of(self.rid)
    }

    /// Tells the front end of a fault.
    pub(super) fn fault(&self, fault: Fault) {
        let sink = lock(&self.claim).sink.clone();
        if let Some(sink) = sink {
            sink.fault(fault);
        }
    }

    /// Asks the front end whether a translation request is allowed; without one it is not.
    pub(super) fn translation_request(&self, target: Target, iova: Iova) -> bool {
        let sink = lock(&self.claim).sink.clone();
        sink.is_some_and(|sink| sink.translation_request(target, iova))
    }

    /// Sends a page request of a target whose translation is in force or not (`blocked`).
    pub(super) fn page_request(
        &self,
        request: PageRequest,
        blocked: bool,
    ) -> Result<(), PageRequestRefused> {
        if self.config.page_responses.is_none() {
            return Err(PageRequestRefused::NotOffered);
        }
        let mut claim = lock(&self.claim);
        let sink = claim.sink.clone().ok_or(PageRequestRefused::NotClaimed)?;
        let refused = claim.book.request(&request, ());
        refused.map_err(|refused| PageRequestRefused::Group(refused.why))?;
        if blocked {
            // Nobody can make pages appear where no translation is.
            let owed = claim.book.respond(request.target, request.group);
            drop(claim);
            if owed.is_some() {
                self.answer(request.target, request.group, ResponseCode::Invalid);
            }
            return Ok(());
        }
        drop(claim);
        sink.page_request(request);
        Ok(())
    }

    /// Answers a group, once.
    pub(super) fn respond(&self, response: PageResponse) {
        let owed = lock(&self.claim)
            .book
            .respond(response.target, response.group);
        if owed.is_some() {
            self.answer(response.target, response.group, response.code);
        }
    }

    /// Sends an answer to the device; with no lock held.
    pub(super) fn answer(&self, target: Target, group: u16, code: ResponseCode) {
        if let Some(sink) = &self.config.page_responses {
            sink.page_response(PageResponse {
                target,
                group,
                code,
            });
        }
    }
}
