//! Whose an endpoint is: a vIOMMU's, or nobody's; and what devices of one group of the host cannot be.

use std::sync::Arc;

use super::host::{Endpoint, HostIommu, lock};
use crate::backend::{Backend, EventSink, Refused, Translation};
use crate::{Rid, Target};

/// Who says what is in force for an endpoint.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// A front end, for its guest.
    Viommu,
    /// Nobody: it reaches all of guest memory.
    Nobody,
}

impl Endpoint {
    /// Whether a vIOMMU stands before it.
    pub(super) fn is_behind_viommu(&self) -> bool {
        self.state().owner == Some(Owner::Viommu)
    }
}

impl HostIommu {
    /// [`Backend::claim`].
    pub(super) fn claim_alone(
        &self,
        endpoint: Rid,
        sink: Arc<dyn EventSink>,
    ) -> Result<(), Refused> {
        // No device of its group comes meanwhile.
        let _admission = lock(&self.admission);
        let found = self.endpoint(endpoint)?;
        if let Some(other) = self.shares_group(endpoint, found.device.group, |_| true) {
            return Err(Refused::SharesGroup { endpoint, other });
        }
        self.give(&found, sink, Owner::Viommu)
    }

    /// Lets a device that no vIOMMU stands before reach all of guest memory, until it is released
    /// or removed. What goes wrong with it is told to `sink`.
    ///
    /// # Errors
    /// As [`Backend::claim`], but for devices of one group, which may all be let through; what the
    /// kernel says.
    pub fn let_through(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        let found = self.endpoint(endpoint)?;
        self.give(&found, sink, Owner::Nobody)?;
        self.apply(Target::rid(endpoint), Translation::Identity)
    }

    fn give(&self, found: &Endpoint, sink: Arc<dyn EventSink>, to: Owner) -> Result<(), Refused> {
        let mut state = found.state();
        if state.owner.is_some() {
            return Err(Refused::Claimed(found.rid));
        }
        // What a release could not detach must go before anybody relies on Blocked.
        self.block_all(found, &mut state)?;
        state.owner = Some(to);
        if let Some(faults) = self.faults() {
            faults.connect(found.device.id, found.rid, sink);
        }
        Ok(())
    }

    /// A device here other than `endpoint` that is in `group`, and of which `counts` holds.
    pub(super) fn shares_group(
        &self,
        endpoint: Rid,
        group: Option<u32>,
        counts: impl Fn(&Endpoint) -> bool,
    ) -> Option<Rid> {
        let group = group?;
        let in_group = |e: &&Arc<Endpoint>| e.rid != endpoint && e.device.group == Some(group);
        // No lock is held while one of them is looked at.
        let others: Vec<_> = self
            .endpoints()
            .values()
            .filter(in_group)
            .cloned()
            .collect();
        others.iter().find(|other| counts(other)).map(|e| e.rid)
    }
}
