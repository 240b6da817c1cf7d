//! KVM's VFIO device: KVM learns which devices of the host a VM has, and lets the guest write back
//! caches where the DMA of one of them does not snoop.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::DeviceFd;

use super::{KvmError, Vm};

/// The VFIO devices that one VM's KVM knows of. Dropping it lets go of all.
#[derive(Debug)]
pub struct VfioFiles(DeviceFd);

/// A device that KVM knows of, until this is dropped.
#[derive(Debug)]
pub struct KnownFile {
    files: Arc<VfioFiles>,
    file: OwnedFd,
}

impl VfioFiles {
    /// None is known yet.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn new(vm: &Vm) -> Result<Arc<Self>, KvmError> {
        let mut request = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            ..Default::default()
        };
        let device = vm.fd().create_device(&mut request);
        let device = device.map_err(KvmError::call("KVM_CREATE_DEVICE", "VFIO"))?;
        Ok(Arc::new(Self(device)))
    }

    /// KVM keeps a reference to `file`, an open VFIO device, until the value is dropped.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add(self: &Arc<Self>, file: BorrowedFd<'_>) -> Result<KnownFile, KvmError> {
        let file = file
            .try_clone_to_owned()
            .map_err(|source| KvmError::call("dup", "a VFIO device")(source.into()))?;
        self.set(&file, KVM_DEV_VFIO_FILE_ADD)
            .map_err(KvmError::call("KVM_DEV_VFIO_FILE_ADD", "the VM"))?;
        Ok(KnownFile {
            files: self.clone(),
            file,
        })
    }

    fn set(&self, file: &OwnedFd, attribute: u32) -> Result<(), kvm_ioctls::Error> {
        let number = file.as_raw_fd();
        self.0.set_device_attr(&kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: attribute.into(),
            addr: &raw const number as u64,
            flags: 0,
        })
    }
}

impl Drop for KnownFile {
    fn drop(&mut self) {
        if let Err(why) = self.files.set(&self.file, KVM_DEV_VFIO_FILE_DEL) {
            log::error!("KVM does not let go of a VFIO device: {why}");
        }
    }
}
