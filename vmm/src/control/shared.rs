//! What everyone may see of the VM, without waiting for whoever works on it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Events;
use crate::config::VmConfig;
use crate::vm::ViommuStates;

/// What the VM is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub enum VmState {
    /// There is a configuration, and nothing runs.
    Created,
    /// The vCPUs run.
    Running,
    /// The vCPUs stand still.
    Paused,
}

/// What a device is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// A virtio-blk disk.
    Disk,
    /// A virtio-net card.
    Net,
    /// A virtio-rng entropy source.
    Rng,
    /// A virtio console.
    Console,
    /// A device of the host.
    Device,
    /// A DMA test engine.
    TestDevice,
    /// A virtio-iommu.
    Viommu,
}

/// A PCI function of the guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceNode {
    /// Its name.
    pub id: String,
    /// Its address in the guest, as `0000:00:05.0`.
    pub pci_bdf: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The vIOMMU that it is behind.
    pub viommu: Option<String>,
    /// Whether it can be removed while the VM runs.
    pub removable: bool,
    /// Whether the guest has been asked to let go of it.
    pub removing: bool,
}

/// What is being done right now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Operation {
    /// The request, for example `vm.add-device`.
    pub name: String,
    /// How far it is.
    pub step: String,
    /// For how long it has been done, in milliseconds.
    pub running_ms: u64,
}

/// The answer to `vm.info`.
#[derive(Clone, Debug, Serialize, utoipa::ToSchema)]
pub struct VmInfo {
    /// As it is now: with the devices that were added, without those that were removed.
    #[schema(value_type = VmConfig)]
    pub config: Arc<VmConfig>,
    /// What the VM is doing.
    pub state: VmState,
    /// Guest memory in bytes.
    pub memory_actual_size: u64,
    /// The guest's PCI functions by name.
    pub device_tree: BTreeMap<String, DeviceNode>,
    /// What is being done right now.
    pub operation: Option<Operation>,
}

/// Counters by device, then by name.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// A VM that is there, to be asked at any time from any thread.
pub trait Inspect: Send + Sync {
    /// The live state of its vIOMMUs.
    fn viommus(&self) -> ViommuStates;

    /// What its devices counted.
    fn counters(&self) -> Counters;
}

/// A VM as it was when it last changed.
#[derive(Clone)]
pub struct VmSnapshot {
    /// Its configuration.
    pub config: Arc<VmConfig>,
    /// What it is doing.
    pub state: VmState,
    /// Its PCI functions by name; none before it is booted.
    pub device_tree: BTreeMap<String, DeviceNode>,
    /// What can be asked while it runs.
    pub inspect: Option<Arc<dyn Inspect>>,
}

impl std::fmt::Debug for VmSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VmSnapshot")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// What is being done, for all to see.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Option<Doing>>>);

#[derive(Clone, Debug)]
struct Doing {
    name: &'static str,
    step: String,
    since: Instant,
}

impl Progress {
    /// Says what the operation that was begun does next.
    pub fn step(&self, step: impl Into<String>) {
        if let Some(doing) = &mut *self.lock() {
            doing.step = step.into();
        }
    }

    /// The step that was said last: where a failure happened.
    pub fn last_step(&self) -> String {
        self.lock()
            .as_ref()
            .map_or_else(String::new, |d| d.step.clone())
    }

    /// Begins the operation `name`; it ends when what is returned is dropped.
    pub(crate) fn begin(&self, name: &'static str) -> Begun {
        *self.lock() = Some(Doing {
            name,
            step: "begun".into(),
            since: Instant::now(),
        });
        Begun(self.clone())
    }

    fn now(&self) -> Option<Operation> {
        self.lock().as_ref().map(|doing| Operation {
            name: doing.name.into(),
            step: doing.step.clone(),
            running_ms: doing.since.elapsed().as_millis() as u64,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Doing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An operation that is being done.
pub(crate) struct Begun(Progress);

impl Drop for Begun {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

/// What the owner of the VM lets everyone see. Its locks are held for as long as it takes to copy
/// a pointer.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    vm: Arc<Mutex<Option<Arc<VmSnapshot>>>>,
    /// What is being done.
    pub progress: Progress,
    /// What happened.
    pub events: Arc<Events>,
}

impl Shared {
    /// Replaces the snapshot; `None` when there is no VM.
    pub fn publish(&self, snapshot: Option<VmSnapshot>) {
        let old = std::mem::replace(&mut *self.lock(), snapshot.map(Arc::new));
        // Not under the lock: it may be the last owner of a great deal.
        drop(old);
    }

    /// Nobody can look into the VM from now on, but who does already.
    pub fn close(&self) {
        let closed = self.vm().map(|vm| VmSnapshot {
            inspect: None,
            ..(*vm).clone()
        });
        self.publish(closed);
    }

    /// The VM, if there is one.
    pub fn vm(&self) -> Option<Arc<VmSnapshot>> {
        self.lock().clone()
    }

    /// The VM and what is being done with it.
    pub fn info(&self) -> Option<VmInfo> {
        let vm = self.vm()?;
        Some(VmInfo {
            config: vm.config.clone(),
            state: vm.state,
            memory_actual_size: vm.config.memory.size.0,
            device_tree: vm.device_tree.clone(),
            operation: self.progress.now(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<VmSnapshot>>> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_being_done_is_told_until_it_is_done() {
        let shared = Shared::default();
        assert!(shared.info().is_none());
        shared.publish(Some(VmSnapshot {
            config: Arc::default(),
            state: VmState::Created,
            device_tree: BTreeMap::new(),
            inspect: None,
        }));
        assert_eq!(shared.info().unwrap().operation, None);
        let begun = shared.progress.begin("vm.boot");
        shared.progress.step("memory");
        let operation = shared.info().unwrap().operation.unwrap();
        assert_eq!((&*operation.name, &*operation.step), ("vm.boot", "memory"));
        assert_eq!(shared.progress.last_step(), "memory");
        drop(begun);
        assert_eq!(shared.info().unwrap().operation, None);
    }
}
