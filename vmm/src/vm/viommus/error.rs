//! Why a vIOMMU, or a device behind it, cannot be had.

use devices::bus::BusError;
use viommu::backend::Refused;
use viommu::pasid;
use viommu::virtio;
use viommu::virtio::viot::TopologyError;
use viommu::vtd::{self, Unsupported};

/// Why a vIOMMU, or a device behind it, cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ViommuError {
    /// What was asked for is not there.
    #[error(transparent)]
    Unsupported(Box<Unsupported>),
    /// A device cannot be behind its VT-d unit.
    #[error(transparent)]
    VtdEndpoint(Box<vtd::AddError>),
    /// A virtio-iommu has nothing to offer.
    #[error(transparent)]
    Virtio(#[from] virtio::ConfigError),
    /// A device cannot be behind its virtio-iommu.
    #[error(transparent)]
    VirtioEndpoint(Box<virtio::AddError>),
    /// The VIOT table.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// The engine does not take the device.
    #[error(transparent)]
    Engine(#[from] Refused),
    /// A register page is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The host has no PASIDs for the VM.
    #[error(transparent)]
    Pasids(#[from] pasid::Error),
    /// A device that came to a unit has taken its PASIDs away.
    #[error(
        "vIOMMU {0} has vcmd=on, but not every device behind it has PASIDs; put the others behind another vIOMMU, or leave vcmd out"
    )]
    NoPasids(String),
    /// A device that came late cannot use the PASIDs that the guest may have already.
    #[error(
        "the device has {has} bits of PASID, but the guest's virtual commands give PASIDs of {offered} bits; restart the VM with this device present, or leave vcmd out"
    )]
    FewPasids {
        /// Its bits.
        has: u8,
        /// The guest's.
        offered: u8,
    },
}

impl From<Unsupported> for ViommuError {
    fn from(error: Unsupported) -> Self {
        Self::Unsupported(Box::new(error))
    }
}

impl From<vtd::AddError> for ViommuError {
    fn from(error: vtd::AddError) -> Self {
        Self::VtdEndpoint(Box::new(error))
    }
}

impl From<virtio::AddError> for ViommuError {
    fn from(error: virtio::AddError) -> Self {
        Self::VirtioEndpoint(Box::new(error))
    }
}
