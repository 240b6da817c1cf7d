//! The examples do what they say: each ends well.

#[path = "../examples/virtio_iommu.rs"]
mod virtio_iommu;
#[path = "../examples/vtd.rs"]
mod vtd;

#[test]
fn a_vmm_with_a_vtd_unit() {
    vtd::main().unwrap();
}

#[test]
fn a_vmm_with_a_virtio_iommu() {
    virtio_iommu::main().unwrap();
}
