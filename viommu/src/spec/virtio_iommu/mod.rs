//! The virtio-iommu wire format (virtio 1.3, 5.13).
