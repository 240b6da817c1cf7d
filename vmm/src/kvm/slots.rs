//! Device memory in the guest: KVM's memory slots beyond those of RAM.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::passthrough::DirectMemory;
use devices::passthrough::hardware::Mapping;
use kvm_bindings::kvm_userspace_memory_region;

use super::Vm;

/// The first slot of device memory: RAM never has as many regions.
const FIRST: u32 = 256;

/// The most mappings at a time: six registers in three parts each, of a full bus.
const MOST: u32 = 32 * 6 * 3;

/// Shows device memory to the guest of one VM.
#[derive(Debug)]
pub struct DeviceSlots {
    vm: Arc<Vm>,
    /// By guest-physical address: the slot, and what is behind it.
    used: Mutex<BTreeMap<u64, (u32, Arc<Mapping>)>>,
}

impl DeviceSlots {
    /// None is used yet.
    pub fn new(vm: Arc<Vm>) -> Self {
        Self {
            vm,
            used: Mutex::default(),
        }
    }

    fn set(&self, slot: u32, gpa: u64, address: u64, length: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: length,
            userspace_addr: address,
        };
        // SAFETY: the range is a whole `Mapping`, which `used` keeps as long as the slot is there
        // (and a length of 0 removes the slot).
        unsafe { self.vm.fd().set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl DirectMemory for DeviceSlots {
    fn add(&self, gpa: u64, mapping: Arc<Mapping>) -> io::Result<()> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = (FIRST..FIRST + MOST)
            .find(|slot| used.values().all(|(other, _)| other != slot))
            .ok_or_else(|| io::Error::other("all memory slots for devices are taken"))?;
        self.set(slot, gpa, mapping.address(), mapping.length())?;
        used.insert(gpa, (slot, mapping));
        Ok(())
    }

    fn remove(&self, gpa: u64) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((slot, mapping)) = used.remove(&gpa) else {
            return;
        };
        if let Err(error) = self.set(slot, gpa, mapping.address(), 0) {
            log::error!("device memory stays in the guest at {gpa:#x}: {error}");
            // As long as the guest reaches it, it must be there.
            used.insert(gpa, (slot, mapping));
        }
    }
}

impl Drop for DeviceSlots {
    fn drop(&mut self) {
        let used = self.used.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (gpa, (slot, mapping)) in std::mem::take(used) {
            if let Err(error) = self.set(slot, gpa, mapping.address(), 0) {
                log::error!("device memory stays in the guest at {gpa:#x}: {error}");
                std::mem::forget(mapping);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn device_memory_comes_goes_and_moves_and_overlaps_are_refused() {
        let Some(host) = super::super::for_test() else {
            return;
        };
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let slots = DeviceSlots::new(Arc::new(host.create_vm(Arc::new(ram), 1).unwrap()));
        let file = TempFile::new().unwrap().into_file();
        file.set_len(0x4000).unwrap();
        let mapping = || Arc::new(Mapping::new(file.as_fd(), 0, 0x4000).unwrap());
        slots.add(0x8000_0000, mapping()).unwrap();
        slots.add(0x8000_4000, mapping()).unwrap();
        slots.add(0x8000_2000, mapping()).unwrap_err();
        slots.remove(0x8000_0000);
        slots.remove(0x8000_0000);
        slots.add(0x8000_0000, mapping()).unwrap();
        for n in 0..MOST as u64 - 2 {
            slots.add(0x9000_0000 + n * 0x4000, mapping()).unwrap();
        }
        slots.add(0xa000_0000, mapping()).unwrap_err();
    }
}
