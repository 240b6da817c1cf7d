//! The two kinds of vIOMMU as one: what a guest sees of it, and the state and the counters that a
//! user sees.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::bus::BusDevice;
use serde::Serialize;
use viommu::Rid;
use viommu::backend::{Backend, Capabilities};
use viommu::reserved::Regions;
use viommu::virtio::{Iommu, Snapshot};
use viommu::vtd::{Unit, UnitState};

use super::ViommuError;
use crate::control::Counters;
use crate::interrupts::Remapper;
use crate::interrupts::remapping::{RemappingState, RemappingUnit};

/// What the guest sees of a vIOMMU.
#[derive(Clone)]
pub(in crate::vm) enum FrontEnd {
    /// A unit, and where its registers are.
    Vtd {
        unit: Arc<Unit>,
        base: u64,
        remapping: Option<Arc<RemappingUnit>>,
    },
    /// A virtio-iommu, and which PCI function it is.
    Virtio {
        id: String,
        unit: Arc<Iommu>,
        rid: Rid,
    },
}

/// The state of one vIOMMU, as a user may ask for it while the VM runs.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ViommuState {
    /// A VT-d unit's.
    Vtd {
        /// What it holds.
        #[serde(flatten)]
        unit: UnitState,
        /// Its interrupt remapping, where it is offered.
        interrupt_remapping: Option<RemappingState>,
    },
    /// A virtio-iommu's.
    Virtio {
        /// Its name.
        id: String,
        /// What it holds.
        #[serde(flatten)]
        snapshot: Snapshot,
    },
}

/// The state of all vIOMMUs of a VM.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct ViommuStates {
    /// Each vIOMMU, in the order of the configuration.
    pub viommus: Vec<ViommuState>,
}

impl FrontEnd {
    pub(super) fn id(&self) -> &str {
        match self {
            Self::Vtd { unit, .. } => &unit.config().id,
            Self::Virtio { id, .. } => id,
        }
    }

    pub(super) fn remapper(&self) -> Option<Arc<dyn Remapper>> {
        match self {
            Self::Vtd { remapping, .. } => remapping.clone().map(|r| r as Arc<dyn Remapper>),
            Self::Virtio { .. } => None,
        }
    }

    /// `reserved` is what a virtio-iommu tells the guest of the endpoint; with VT-d, a guest knows
    /// the interrupt window by itself.
    pub(super) fn add(
        &self,
        rid: Rid,
        backend: Arc<dyn Backend>,
        reserved: Regions,
    ) -> Result<(), ViommuError> {
        match self {
            Self::Vtd { unit, .. } => Ok(unit.add_endpoint(rid, backend)?),
            Self::Virtio { unit, .. } => Ok(unit.add_endpoint(rid, backend, reserved)?),
        }
    }

    pub(super) fn remove(&self, rid: Rid) {
        match self {
            Self::Vtd { unit, .. } => unit.remove_endpoint(rid),
            Self::Virtio { unit, .. } => unit.remove_endpoint(rid),
        }
    }

    /// What the guest is offered for a device's own features, from here on for ever.
    pub(super) fn offered(&self) -> Capabilities {
        match self {
            Self::Vtd { unit, .. } => {
                let offer = unit.freeze();
                Capabilities {
                    stage1: offer.ecap.fsts(),
                    stage1_57: offer.cap.fs5lp(),
                    stage1_1g: offer.cap.fs1gp(),
                    sre: offer.ecap.srs(),
                    pasid_bits: offer.pasid_bits(),
                    page_requests: offer.ecap.prs(),
                    address_width: offer.address_width(),
                    ..Capabilities::NOTHING
                }
            }
            Self::Virtio { .. } => Capabilities::NOTHING,
        }
    }

    pub(super) fn counters(&self) -> BTreeMap<String, u64> {
        let mut counters = BTreeMap::new();
        let mut tell = |name: &str, count: u64| {
            counters.insert(name.to_owned(), count);
        };
        match self {
            Self::Vtd { unit, .. } => {
                let state = unit.state();
                let (queue, asked) = (state.queue, state.back_end);
                tell("context_cache_invalidations", queue.context_cache);
                tell("pasid_cache_invalidations", queue.pasid_cache);
                tell("iotlb_invalidations", queue.iotlb);
                tell("pasid_iotlb_invalidations", queue.pasid_iotlb);
                tell("device_tlb_invalidations", queue.device_tlb);
                let entries = queue.interrupt_entry_cache;
                tell("interrupt_entry_cache_invalidations", entries);
                tell("page_group_responses", queue.page_group_response);
                tell("waits", queue.wait);
                tell("queue_errors", queue.errors);
                tell("applies", asked.applies);
                tell("refusals", asked.refusals);
                tell("back_end_invalidations", asked.invalidations);
                tell("page_requests", state.page_requests);
                tell("page_requests_refused", state.page_requests_refused);
                tell("faults_recorded", state.faults_recorded);
                tell("faults_lost", state.faults_lost);
            }
            Self::Virtio { unit, .. } => {
                let Snapshot {
                    counters, faults, ..
                } = unit.snapshot();
                tell("requests", counters.requests);
                tell("map_calls", counters.map_calls);
                tell("unmap_calls", counters.unmap_calls);
                tell("refusals", counters.refusals);
                tell("faults_recorded", faults.reported);
                tell("faults_lost", faults.dropped);
            }
        }
        counters
    }

    pub(super) fn state(&self) -> ViommuState {
        match self {
            Self::Vtd {
                unit, remapping, ..
            } => ViommuState::Vtd {
                unit: unit.state(),
                interrupt_remapping: remapping.as_ref().map(|remapping| remapping.state()),
            },
            Self::Virtio { id, unit, .. } => ViommuState::Virtio {
                id: id.clone(),
                snapshot: unit.snapshot(),
            },
        }
    }
}

/// The state of all of `front_ends`.
pub(in crate::vm) fn states(front_ends: &[FrontEnd]) -> ViommuStates {
    ViommuStates {
        viommus: front_ends.iter().map(FrontEnd::state).collect(),
    }
}

/// What all of `front_ends` count, by their names.
pub(in crate::vm) fn counters(front_ends: &[FrontEnd]) -> Counters {
    let of = |front: &FrontEnd| (front.id().to_owned(), front.counters());
    front_ends.iter().map(of).collect()
}

/// A unit's register page.
pub(super) struct Registers(pub(super) Arc<Unit>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}
