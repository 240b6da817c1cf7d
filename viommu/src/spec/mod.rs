//! Bit layouts and numbers only, one file per table or register group.

pub mod virtio_iommu;
pub mod vtd;
