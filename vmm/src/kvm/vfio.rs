//! KVM's VFIO device: KVM learns which devices of the host a VM has, and lets the guest write back
//! caches where the DMA of one of them does not snoop.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::DeviceFd;

use super::{KvmError, Vm};

/// The VFIO devices that one VM's KVM knows of. Dropping it lets go of all.
#[derive(Debug)]
pub struct VfioFiles {
    device: DeviceFd,
    known: Mutex<Vec<Weak<KnownFile>>>,
}

/// A device, or a group of devices, that KVM knows of until the last one of this is dropped.
#[derive(Debug)]
pub struct KnownFile {
    files: Arc<VfioFiles>,
    file: OwnedFd,
    /// What tells nodes apart. The devices of iommufd have nodes of their own.
    node: (u64, u64),
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
        Ok(Arc::new(Self {
            device,
            known: Mutex::default(),
        }))
    }

    /// KVM keeps a reference to `file`, an open VFIO device or group, until the value is dropped.
    /// It takes each file once, so devices of one group share the value.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn add(self: &Arc<Self>, file: BorrowedFd<'_>) -> Result<Arc<KnownFile>, KvmError> {
        let dup = |source: std::io::Error| KvmError::call("dup", "a VFIO device")(source.into());
        let file = file.try_clone_to_owned().map_err(dup)?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(dup)?;
        let node = (metadata.dev(), metadata.ino());
        let file = OwnedFd::from(file);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|file| file.strong_count() > 0);
        if let Some(same) = known
            .iter()
            .filter_map(Weak::upgrade)
            .find(|k| k.node == node)
        {
            return Ok(same);
        }
        self.set(&file, KVM_DEV_VFIO_FILE_ADD)
            .map_err(KvmError::call("KVM_DEV_VFIO_FILE_ADD", "the VM"))?;
        let added = Arc::new(KnownFile {
            files: self.clone(),
            file,
            node,
        });
        known.push(Arc::downgrade(&added));
        Ok(added)
    }

    fn set(&self, file: &OwnedFd, attribute: u32) -> Result<(), kvm_ioctls::Error> {
        let number = file.as_raw_fd();
        self.device.set_device_attr(&kvm_device_attr {
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
