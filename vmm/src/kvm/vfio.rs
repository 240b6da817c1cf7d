//! KVM's VFIO device: KVM learns which devices of the host a VM has, and lets the guest write back
//! caches where the DMA of one of them does not snoop.

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::DeviceFd;

use super::{KvmError, Vm};

/// The VFIO devices that one VM's KVM knows of. Dropping it lets go of all.
#[derive(Debug)]
pub struct VfioFiles(DeviceFd);

impl VfioFiles {
    /// None is known yet.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(vm: &Vm) -> Result<Self, KvmError> {
        let mut request = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let device = vm.fd().create_device(&mut request);
        let device = device.map_err(KvmError::call("KVM_CREATE_DEVICE", "VFIO"))?;
        Ok(Self(device))
    }

    /// KVM keeps a reference to `file`, an open VFIO device, until `self` is dropped.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add(&self, file: BorrowedFd<'_>) -> Result<(), KvmError> {
        let number = file.as_raw_fd();
        let attribute = kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: KVM_DEV_VFIO_FILE_ADD.into(),
            addr: &raw const number as u64,
            flags: 0,
        };
        self.0
            .set_device_attr(&attribute)
            .map_err(KvmError::call("KVM_DEV_VFIO_FILE_ADD", "the VM"))
    }
}
