//! Interrupts of an emulated endpoint whose doorbell is mapped (`msi=mapped`): its routes lead
//! where a write of its message would, by the translation that is in force for it.

#![forbid(unsafe_code)]

use std::sync::{Arc, Weak};

use viommu::Rid;
use viommu::backend::software::WeakEngine;
use viommu::interrupt::{MessageSink, Msi, MsiSink};

use super::{Interrupts, Remapper};

/// Between one endpoint of the engine and the VM's interrupt routes.
pub struct MappedDoorbell {
    rid: Rid,
    // The engine holds this as the endpoint's sink of messages.
    engine: WeakEngine,
    interrupts: Weak<Interrupts>,
}

impl MappedDoorbell {
    /// For the endpoint `rid`, which the engine need not have yet.
    pub fn new(rid: Rid, engine: WeakEngine, interrupts: &Arc<Interrupts>) -> Arc<Self> {
        Arc::new(Self {
            rid,
            engine,
            interrupts: Arc::downgrade(interrupts),
        })
    }
}

impl Remapper for MappedDoorbell {
    fn remap(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        self.engine.upgrade()?.message(rid, msi).ok()
    }

    fn send(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        let engine = self.engine.upgrade()?;
        let sent = engine.message(rid, msi);
        sent.inspect_err(|cause| engine.missed(rid, msi, *cause))
            .ok()
    }
}

impl MessageSink for MappedDoorbell {
    /// It was translated already.
    fn message(&self, _endpoint: Rid, msi: Msi) {
        if let Some(interrupts) = self.interrupts.upgrade() {
            interrupts.send(msi);
        }
    }

    fn moved(&self, _endpoint: Rid) {
        if let Some(interrupts) = self.interrupts.upgrade()
            && let Err(why) = interrupts.reevaluate(self, None)
        {
            let rid = self.rid;
            log::error!("interrupt routes of {rid} were lost when its doorbell moved: {why}");
        }
    }
}
