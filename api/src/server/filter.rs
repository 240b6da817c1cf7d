//! `vm.viommu?endpoint=`: the state of vIOMMUs, as far as it is about one endpoint.

use viommu::Rid;
use vmm::vm::{ViommuState, ViommuStates};

/// Keeps what is about `endpoint`, and of vIOMMUs only the one that it is behind.
pub(super) fn by_endpoint(states: &mut ViommuStates, endpoint: Rid) {
    states.viommus.retain_mut(|state| match state {
        ViommuState::Vtd { unit, .. } => {
            unit.endpoints.retain(|e| e.endpoint == endpoint);
            unit.targets.retain(|t| t.target.endpoint == endpoint);
            unit.last_faults.retain(|f| f.target.endpoint == endpoint);
            !unit.endpoints.is_empty()
        }
        ViommuState::Virtio { snapshot, .. } => {
            snapshot.endpoints.retain(|e| e.endpoint == endpoint);
            let domains: Vec<u32> = snapshot.endpoints.iter().filter_map(|e| e.domain).collect();
            snapshot.domains.retain(|d| domains.contains(&d.domain));
            !snapshot.endpoints.is_empty()
        }
    });
}
