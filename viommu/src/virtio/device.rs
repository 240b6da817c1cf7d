//! The device without its transport: what a VMM and a virtio transport call.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::config::{AddError, Config};
use super::decode::Mode;
use super::engine::{Engine, Port};
use super::fault::{FaultCounters, Faults};
use super::reply::{Chain, Fetched, Reply, Requests};
use crate::backend::{Backend, Stage1};
use crate::reserved::{self, Regions};
use crate::spec::virtio_iommu as spec;
use crate::{HwptId, Rid};

/// A virtio-iommu, without its transport. Shared by the vCPU threads that kick its queue and by
/// whoever plugs devices; one lock, of this unit alone.
pub struct Iommu {
    engine: Mutex<Engine>,
    faults: Arc<Faults>,
    longest_reply: usize,
}

/// What a unit holds, for `vm.viommu`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// Whether endpoints without a domain are in bypass mode.
    pub bypass: bool,
    /// The features that the driver accepted.
    pub features: u64,
    /// The endpoints.
    pub endpoints: Vec<EndpointSnapshot>,
    /// The domains.
    pub domains: Vec<DomainSnapshot>,
    /// What was done.
    pub counters: Counters,
    /// What was reported.
    pub faults: FaultCounters,
}

/// An endpoint in a [`Snapshot`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct EndpointSnapshot {
    /// Which; its number for the guest is the same.
    pub endpoint: Rid,
    /// The domain it is attached to.
    pub domain: Option<u32>,
    /// It was unplugged and the guest has not detached it yet.
    pub departed: bool,
    /// The back end refused what the guest asked for; the endpoint is Blocked.
    pub refused: bool,
    /// The host kernel's object that translates, for a device of the host.
    pub hwpt: Option<HwptId>,
    /// What it cannot map.
    pub reserved: Regions,
}

/// A domain in a [`Snapshot`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DomainSnapshot {
    /// Its number.
    pub domain: u32,
    /// Its endpoints are in bypass mode.
    pub bypass: bool,
    /// The table in guest memory that translates, if one does.
    pub table: Option<Stage1>,
    /// How many mappings it has.
    pub mappings: usize,
    /// How many bytes they are.
    pub mapped_bytes: u64,
}

/// What a unit did since it was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Counters {
    /// Requests, of whatever type.
    pub requests: u64,
    /// Calls to back ends that add mappings.
    pub map_calls: u64,
    /// Calls to back ends that remove mappings.
    pub unmap_calls: u64,
    /// Times that a back end refused something.
    pub refusals: u64,
}

impl Iommu {
    /// A unit without endpoints.
    pub fn new(config: Config) -> Self {
        let faults = Arc::<Faults>::default();
        Self {
            engine: Mutex::new(Engine::new(config, Arc::clone(&faults))),
            faults,
            longest_reply: config.probe_size as usize + size_of::<spec::ReqTail>(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something, and frees what it left of domains when others may have their turn.
    fn change<R>(&self, what: impl FnOnce(&mut Engine) -> R) -> R {
        let mut engine = self.lock();
        let result = what(&mut engine);
        let remains = engine.take_remains();
        drop(engine);
        if let Some(remains) = remains {
            remains.free();
        }
        result
    }

    /// Puts an endpoint behind this unit: it is claimed in `backend` and Blocked, or in bypass
    /// mode when that is in force. Its number for the guest is its RID. `reserved` is what its
    /// host cannot map; its doorbell is added, and the addresses of x86 messages, which are of no
    /// use to a device in any case.
    ///
    /// # Errors
    /// [`AddError`]; nothing is changed then.
    pub fn add_endpoint(
        &self,
        rid: Rid,
        backend: Arc<dyn Backend>,
        mut reserved: Regions,
    ) -> Result<(), AddError> {
        let doorbell = backend.doorbell(rid);
        for region in [reserved::X86_MSI, doorbell.region()] {
            reserved.insert(region.first, region.last, region.kind);
        }
        self.change(|engine| {
            engine.config.admits_doorbell(rid, doorbell)?;
            engine.add_endpoint(rid, backend, reserved)
        })
    }

    /// Takes an endpoint away: its back end forgets it. While the guest has it attached, the
    /// domain stays and DETACH is accepted. Unknown endpoints are no error.
    pub fn remove_endpoint(&self, rid: Rid) {
        self.change(|engine| engine.remove_endpoint(rid));
    }

    /// Sets the features that the driver accepted; the rest of the device acts by them.
    pub fn set_features(&self, features: u64) {
        let mut engine = self.lock();
        engine.features = features & engine.config.features();
    }

    /// The features to offer, without those of the transport.
    pub fn features(&self) -> u64 {
        self.lock().config.features()
    }

    /// The length of the longest reply, in bytes.
    pub fn longest_reply(&self) -> usize {
        self.longest_reply
    }

    /// The configuration space.
    pub fn config_space(&self) -> [u8; size_of::<spec::Config>()] {
        let engine = self.lock();
        zerocopy::transmute!(engine.config.space(engine.bypass))
    }

    /// Writes to the configuration space. Only `bypass` can be written, when BYPASS_CONFIG was
    /// negotiated, and only to 0 or 1; anything else is ignored.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let at = spec::Config::BYPASS_OFFSET.checked_sub(offset);
        let value = at.and_then(|at| data.get(usize::try_from(at).ok()?));
        if let Some(&value) = value {
            self.change(|engine| engine.write_bypass(value));
        }
    }

    /// A device reset: nothing is attached, all domains are gone, nothing is negotiated. `bypass`
    /// stays as it is. Devices must be stopped first where it is 1: what they still do would hit
    /// guest memory.
    pub fn reset(&self) {
        self.change(Engine::reset);
    }

    /// A system reset: a device reset, and `bypass` as it was at the start.
    pub fn system_reset(&self) {
        self.change(|engine| {
            engine.bypass = engine.config.bypass;
            engine.reset();
        });
    }

    /// Serves requests that arrived together, in order. `replies` gets one [`Reply`] for each,
    /// when all of them have taken effect.
    pub fn serve<'r>(
        &self,
        requests: impl IntoIterator<Item = Chain<'r>>,
        replies: &mut Vec<Reply>,
    ) {
        self.serve_each(&mut Fetched::new(requests), replies);
    }

    /// As [`serve`](Self::serve), of requests that are fetched one by one.
    pub fn serve_each(&self, requests: &mut impl Requests, replies: &mut Vec<Reply>) {
        replies.clear();
        let mut engine = self.lock();
        while let Some(chain) = requests.next_chain() {
            let mut left = engine.serve_one(chain, replies);
            while let Some(unmap) = left {
                // Whoever plugs a device or looks at the unit need not wait for all of it.
                drop(engine);
                engine = self.lock();
                left = engine.unmap(&unmap, replies);
            }
            if let Some(remains) = engine.take_remains() {
                drop(engine);
                remains.free();
                engine = self.lock();
            }
        }
        engine.flush(replies);
        let remains = engine.take_remains();
        drop(engine);
        if let Some(remains) = remains {
            remains.free();
        }
    }

    /// Serves one request.
    pub fn process(&self, readable: &[u8], writable: usize) -> Reply {
        let mut replies = Vec::with_capacity(1);
        self.serve([Chain { readable, writable }], &mut replies);
        replies.pop().unwrap_or(Reply::Nothing)
    }

    /// The next fault report for the event queue.
    pub fn next_fault(&self) -> Option<spec::Fault> {
        self.faults.pop()
    }

    /// Calls `wake` whenever there is a report for the event queue, on any thread and perhaps
    /// with locks held: it must not call back or block. The first call counts.
    pub fn on_fault(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.faults.on_fault(Box::new(wake));
    }

    /// What the unit holds now.
    pub fn snapshot(&self) -> Snapshot {
        let engine = self.lock();
        Snapshot {
            bypass: engine.bypass,
            features: engine.features,
            endpoints: engine
                .state
                .endpoints()
                .map(|(id, endpoint)| EndpointSnapshot {
                    endpoint: Rid(id as u16),
                    domain: endpoint.domain,
                    departed: endpoint.departed,
                    refused: engine.ports.get(&id).is_some_and(|port| port.refused),
                    hwpt: engine.ports.get(&id).and_then(Port::hwpt),
                    reserved: endpoint.reserved.clone(),
                })
                .collect(),
            domains: engine
                .state
                .domains()
                .map(|(number, domain)| DomainSnapshot {
                    domain: number,
                    bypass: domain.mode == Mode::Bypass,
                    table: match domain.mode {
                        Mode::Table(table) => Some(table),
                        _ => None,
                    },
                    mappings: domain.mappings.len(),
                    mapped_bytes: domain.mappings.bytes(),
                })
                .collect(),
            counters: engine.counters,
            faults: self.faults.counters(),
        }
    }
}

/// Releases all endpoints and domains.
impl Drop for Iommu {
    fn drop(&mut self) {
        self.change(Engine::release);
    }
}
