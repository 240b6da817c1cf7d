//! What MSI and MSI-X share: one vector with its mask and its pending bit.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use viommu::interrupt::Msi;

use crate::interrupt::{MsiSource, MsiVector};
use crate::limit::warn_limited;

/// Who signals a function's vectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// The device model, through `signal`. A masked vector stays connected, so that masking and
    /// unmasking (which Linux does for each change of affinity) costs no change of routes.
    Emulated,
    /// The host's kernel, which writes the eventfd itself (VFIO). A masked vector is
    /// disconnected, and its eventfd keeps what comes in meanwhile.
    Kernel,
}

/// Whether a vector may deliver now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Gate {
    /// The capability is disabled: interrupts are lost, as on hardware.
    Disabled,
    /// Masked: interrupts become pending.
    Masked,
    /// Interrupts are delivered.
    Open,
}

pub(super) struct Vector {
    vector: Arc<dyn MsiVector>,
    delivery: Delivery,
    /// What the vector is connected to now.
    routed: Option<Msi>,
    pending: bool,
}

impl Vector {
    pub(super) fn many(
        count: u16,
        delivery: Delivery,
        source: &dyn MsiSource,
    ) -> io::Result<Vec<Self>> {
        (0..count)
            .map(|_| {
                Ok(Self {
                    vector: source.vector()?,
                    delivery,
                    routed: None,
                    pending: false,
                })
            })
            .collect()
    }

    pub(super) fn handle(&self) -> &Arc<dyn MsiVector> {
        &self.vector
    }

    /// The gate or the message may have changed.
    pub(super) fn update(&mut self, gate: Gate, msi: Msi) {
        match gate {
            Gate::Disabled => {
                self.connect(None);
                self.pending = false;
            }
            Gate::Masked if self.delivery == Delivery::Kernel => self.connect(None),
            Gate::Masked => {}
            Gate::Open => {
                self.connect(Some(msi));
                if std::mem::take(&mut self.pending) {
                    self.fire();
                }
            }
        }
    }

    fn connect(&mut self, msi: Option<Msi>) {
        if self.routed == msi {
            return;
        }
        self.routed = match self.vector.route(msi) {
            Ok(()) => msi,
            Err(error) => {
                warn_limited!("an interrupt is not delivered: no route for {msi:x?}: {error}");
                None
            }
        };
    }

    pub(super) fn signal(&mut self, gate: Gate) {
        match gate {
            Gate::Disabled => {}
            Gate::Masked => self.pending = true,
            Gate::Open => self.fire(),
        }
    }

    /// The pending bit as the guest reads it.
    pub(super) fn is_pending(&mut self, gate: Gate) -> bool {
        // While masked, the kernel's signals are in the eventfd. Taking them out is no loss: the
        // bit delivers them at unmask.
        if gate == Gate::Masked
            && self.delivery == Delivery::Kernel
            && self.vector.eventfd().read().is_ok()
        {
            self.pending = true;
        }
        self.pending && gate == Gate::Masked
    }

    fn fire(&self) {
        // Only a counter at its limit fails, and then the signal is there already.
        let _ = self.vector.eventfd().write(1);
    }
}
