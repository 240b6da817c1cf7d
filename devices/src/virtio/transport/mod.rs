//! The PCI transport of a virtio device (virtio 1.3, 4.1), modern only.
//!
//! One 64-bit BAR holds every structure, each on pages of its own, so that a doorbell can be
//! registered with the host's kernel and nothing else shares its page.

#![forbid(unsafe_code)]

mod shared;
mod state;

use std::io;
use std::iter;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use viommu::dma::DmaPort;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::shared::Shared;
use self::state::State;
use crate::counters::Counters;
use crate::interrupt::MsiSource;
use crate::limit::warn_limited;
use crate::pci::config::{ConfigError, Express, Identity};
use crate::pci::msix::{Msix, Place};
use crate::pci::{Bar, ConfigSpace, Decoded, Delivery, Effect, IoEvent, PciFunction};
use crate::virtio::device::{Activation, ActiveQueue, DeviceType, VirtioDevice, VirtioInterrupt};
use crate::virtio::ring::Ring;

/// The only BAR, and where the structures are in it (bytes).
const BAR: u8 = 0;
const BAR_LENGTH: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PBA: u64 = 0x6000;

/// Bytes of the common configuration structure, up to queue_device (4.1.4.3).
const COMMON_LENGTH: usize = 56;
/// Bytes between two queues' notification addresses.
const NOTIFY_MULTIPLIER: u32 = 4;
/// So many that the MSI-X table, with one vector for the configuration, ends before its PBA.
const MAX_QUEUES: usize = 511;

const NO_VECTOR: u16 = 0xffff;

/// cfg_type of the vendor-specific capabilities (4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
const CAP_VENDOR: u8 = 0x09;
/// Bytes of a vendor-specific capability before what some of them add.
const CAP_LENGTH: u8 = 16;

/// Why a virtio device got no PCI function.
#[derive(Error, Debug)]
pub enum VirtioPciError {
    /// Too many queues.
    #[error("a virtio device with {0} queues: at most 511 fit the transport")]
    Queues(usize),
    /// The capabilities do not fit.
    #[error("the configuration space of a virtio device was not built")]
    Config(#[from] ConfigError),
    /// The host has no more file descriptors or interrupt routes.
    #[error("no eventfd or interrupt route for a virtio device: raise the limit of open files")]
    Host(#[source] io::Error),
}

/// The PCI function around a virtio device.
///
/// Locks: `config` before `state`; neither is taken by `Shared`, which device threads call.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    dma: DmaPort,
    /// Bus Master Enable. Written with `state` locked, so that a device is never active without.
    bus_master: AtomicBool,
    offered: u64,
    kicks: Vec<Arc<EventFd>>,
    shared: Arc<Shared>,
    msix_capability: u16,
    pci_capability: u16,
    pristine: ConfigSpace,
    config: Mutex<ConfigSpace>,
    state: Mutex<State>,
}

impl VirtioPci {
    /// The function of `device`, whose DMA goes through `dma` and whose interrupts come from
    /// `msi`.
    ///
    /// # Errors
    /// See [`VirtioPciError`].
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        dma: DmaPort,
        msi: &dyn MsiSource,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::Queues(queues));
        }
        let vectors = queues as u16 + 1;
        let msix = Msix::new(vectors, Delivery::Emulated, msi).map_err(VirtioPciError::Host)?;
        let kicks = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(VirtioPciError::Host)?;

        let mut config = ConfigSpace::new(identity(device.device_type()));
        config.add_bar(Bar::memory64(BAR, BAR_LENGTH))?;
        config.add_express_endpoint(Express::default())?;
        let place = |offset: u64| Place {
            bar: BAR,
            offset: offset as u32,
        };
        let msix_capability =
            msix.add_capability(&mut config, place(MSIX_TABLE), place(MSIX_PBA))?;
        let mut add = |kind, offset, length: u32, more: &[u8]| {
            add_structure(&mut config, kind, offset, length, more)
        };
        add(CAP_COMMON, COMMON, COMMON_LENGTH as u32, &[])?;
        add(CAP_ISR, ISR, 1, &[])?;
        add(CAP_DEVICE, DEVICE, 0x1000, &[])?;
        let doorbells = NOTIFY_MULTIPLIER * queues.max(1) as u32;
        add(
            CAP_NOTIFY,
            NOTIFY,
            doorbells,
            &NOTIFY_MULTIPLIER.to_le_bytes(),
        )?;
        let pci_capability = add(CAP_PCI, 0, 0, &[0; 4])?;
        // bar, offset, length and data are the driver's (4.1.4.9).
        config.allow(pci_capability + 4, &[0xff]);
        config.allow(pci_capability + 8, &[0xff; 12]);

        let mut offered = device.features() | 1 << VIRTIO_F_VERSION_1;
        if dma.is_translated() {
            offered |= 1 << VIRTIO_F_ACCESS_PLATFORM;
        }
        msix.set_bus_master(false);
        let shared = Arc::new(Shared::new(msix, queues));
        let state = State::new(device.queue_sizes());
        Ok(Arc::new(Self {
            device,
            dma,
            bus_master: AtomicBool::new(false),
            offered,
            kicks,
            shared,
            msix_capability,
            pci_capability,
            pristine: config.clone(),
            config: Mutex::new(config),
            state: Mutex::new(state),
        }))
    }

    /// The device inside.
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The common configuration structure as the driver reads it (4.1.4.3).
    fn common(&self) -> [u8; COMMON_LENGTH] {
        let state = self.state();
        let mut image = [0; COMMON_LENGTH];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0, &state.device_feature_select.to_le_bytes());
        put(
            4,
            &half(self.offered, state.device_feature_select).to_le_bytes(),
        );
        put(8, &state.driver_feature_select.to_le_bytes());
        put(
            12,
            &half(state.driver_features, state.driver_feature_select).to_le_bytes(),
        );
        let vector = self.shared.config_vector.load(Ordering::Relaxed);
        put(16, &vector.to_le_bytes());
        put(18, &(state.queues.len() as u16).to_le_bytes());
        let needs_reset = self.shared.needs_reset.load(Ordering::Acquire);
        let broken = VIRTIO_CONFIG_S_NEEDS_RESET as u8 * u8::from(needs_reset);
        put(20, &[state.status | broken]);
        put(21, &[self.shared.generation.load(Ordering::Acquire)]);
        put(22, &state.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (4.1.4.3.1).
        let index = usize::from(state.queue_select);
        if let Some(queue) = state.queues.get(index) {
            put(24, &queue.ring.size.to_le_bytes());
            let vector = self.shared.queue_vectors[index].load(Ordering::Relaxed);
            put(26, &vector.to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &state.queue_select.to_le_bytes());
            put(32, &queue.ring.descriptors.to_le_bytes());
            put(40, &queue.ring.available.to_le_bytes());
            put(48, &queue.ring.used.to_le_bytes());
        } else {
            put(26, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// A driver's write to the common configuration structure. What is not a whole field, or must
    /// not be written now, is ignored.
    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len().min(8)].copy_from_slice(&data[..data.len().min(8)]);
        let value = u64::from_le_bytes(bytes);
        let mut state = self.state();
        match (offset, data.len()) {
            (0, 4) => state.device_feature_select = value as u32,
            (8, 4) => state.driver_feature_select = value as u32,
            (12, 4) => state.write_driver_features(value as u32),
            (16, 2) => self
                .shared
                .config_vector
                .store(self.valid_vector(value as u16), Ordering::Relaxed),
            (20, 1) => self.write_status(&mut state, value as u8),
            (22, 2) => state.queue_select = value as u16,
            (26, 2) => {
                if let Some(vector) = self
                    .shared
                    .queue_vectors
                    .get(usize::from(state.queue_select))
                {
                    vector.store(self.valid_vector(value as u16), Ordering::Relaxed);
                }
            }
            (24, 2) | (28, 2) | (32..56, 4 | 8) => {
                let sizes = self.device.queue_sizes();
                state.write_queue(offset, value, data.len(), sizes);
            }
            _ => {}
        }
    }

    /// A vector that does not exist reads back as NO_VECTOR (4.1.5.1.2.1).
    fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.shared.queue_vectors.len() as u16 + 1 {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn write_status(&self, state: &mut State, written: u8) {
        let features_ok = VIRTIO_CONFIG_S_FEATURES_OK as u8;
        let driver_ok = VIRTIO_CONFIG_S_DRIVER_OK as u8;
        if written == 0 {
            self.reset_device(state);
            return;
        }
        // A driver never clears a bit except by reset, and NEEDS_RESET is the device's own.
        let mut added = written & !state.status & !(VIRTIO_CONFIG_S_NEEDS_RESET as u8);
        if added & features_ok != 0 && !self.acceptable(state.driver_features) {
            added &= !features_ok;
        }
        state.status |= added;
        if added & driver_ok != 0 {
            self.shared.driver_ok.store(true, Ordering::Release);
            if state.status & features_ok == 0 || !self.activate(state) {
                self.shared.needs_reset();
            }
        }
    }

    /// Whether the device works with what the driver chose. A driver that ignores
    /// ACCESS_PLATFORM would hand out addresses that mean nothing behind the vIOMMU (6.1).
    fn acceptable(&self, features: u64) -> bool {
        let must = self.offered & (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM);
        features & !self.offered == 0 && features & must == must && self.device.accepts(features)
    }

    /// Bus Master Enable is `enabled` now. Without it a device sends no messages, and one that is
    /// active stops before this returns: what was under way has ended. It needs a reset then, as
    /// it would if it had lost its rings, so nothing of what a driver left behind is touched when
    /// another one enables bus mastering again.
    fn set_bus_master(&self, enabled: bool) {
        self.shared.msix.set_bus_master(enabled);
        let mut state = self.state();
        self.bus_master.store(enabled, Ordering::Relaxed);
        if !enabled && state.active {
            self.device.reset();
            state.active = false;
            self.shared.needs_reset();
        }
    }

    fn kick(&self, index: usize) {
        if self.device.notifies_inline() {
            self.device.notify(index as u16);
        } else if let Some(kick) = self.kicks.get(index) {
            // A counter at its limit is signalled already.
            let _ = kick.write(1);
        }
    }

    fn activate(&self, state: &mut State) -> bool {
        if !self.bus_master.load(Ordering::Relaxed) {
            warn_limited!("a virtio device was started without bus mastering");
            return false;
        }
        let features = state.driver_features;
        let has = |bit: u32| features & 1 << bit != 0;
        let mut queues = Vec::with_capacity(state.queues.len());
        for (index, (queue, kick)) in state.queues.iter().zip(&self.kicks).enumerate() {
            if !queue.enabled {
                queues.push(None);
                continue;
            }
            let Some(ring) = Ring::new(
                queue.ring,
                has(VIRTIO_RING_F_EVENT_IDX),
                has(VIRTIO_RING_F_INDIRECT_DESC),
                &self.dma.access(),
            ) else {
                warn_limited!("virtio queue {index} is not in memory: {:x?}", queue.ring);
                return false;
            };
            let used = Arc::clone(&self.shared.counts.used[index]);
            queues.push(Some(ActiveQueue {
                ring: ring.counting(used),
                kick: Arc::clone(kick),
            }));
        }
        let started = self.device.activate(Activation {
            features,
            queues,
            dma: self.dma.clone(),
            interrupt: Arc::clone(&self.shared) as Arc<dyn VirtioInterrupt>,
        });
        state.active = started.is_ok();
        if let Err(error) = started {
            warn_limited!("a virtio device did not start: {error}");
        }
        state.active
    }

    fn reset_device(&self, state: &mut State) {
        if state.active {
            self.device.reset();
        }
        *state = State::new(self.device.queue_sizes());
        // After the device is quiet: nothing sets these again.
        self.shared.reset();
    }

    /// The driver's window into the BAR through configuration space (4.1.4.9), if `offset` is its
    /// data register: which bytes of the BAR it shows.
    fn pci_window(&self, offset: u16) -> Option<(u64, usize)> {
        if offset & !3 != self.pci_capability + 16 {
            return None;
        }
        let config = self.config();
        let mut bar = [0];
        config.read(self.pci_capability + 4, &mut bar);
        let at = u64::from(config.dword(self.pci_capability + 8));
        let length = config.dword(self.pci_capability + 12) as usize;
        let fits = matches!(length, 1 | 2 | 4)
            && at.is_multiple_of(length as u64)
            && at + length as u64 <= BAR_LENGTH;
        (bar == [BAR] && fits).then_some((at, length))
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if let Some((at, length)) = self.pci_window(offset) {
            let mut window = [0; 4];
            self.bar_read(BAR, at, &mut window[..length]);
            self.config().set(self.pci_capability + 16, &window);
        }
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let (effect, window) = {
            let mut config = self.config();
            let effect = config.write(offset, data);
            self.shared
                .msix
                .set_control(config.word(self.msix_capability + 2));
            // With the configuration locked, so that the last write is the last to take effect.
            self.set_bus_master(config.bus_master());
            (effect, config.dword(self.pci_capability + 16).to_le_bytes())
        };
        if let Some((at, length)) = self.pci_window(offset) {
            return self.bar_write(BAR, at, &window[..length]);
        }
        effect
    }

    fn decoded(&self) -> Vec<Decoded> {
        self.config().decoded()
    }

    fn bars(&self) -> Vec<(Bar, u64)> {
        self.config().bars()
    }

    fn assign_bar(&self, bar: u8, address: u64) {
        self.config().assign_bar(bar, address);
    }

    fn bar_read(&self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                let image = self.common();
                for (to, from) in data.iter_mut().zip(image.iter().skip(offset as usize)) {
                    *to = *from;
                }
            }
            ISR => {
                // Reading clears it (4.1.4.5.1).
                if let Some(byte) = data.first_mut() {
                    *byte = self.shared.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE..NOTIFY => self.device.read_config((offset - DEVICE) as u32, data),
            MSIX_TABLE..MSIX_PBA => self.shared.msix.table_read(offset - MSIX_TABLE, data),
            MSIX_PBA..BAR_LENGTH => self.shared.msix.pba_read(offset - MSIX_PBA, data),
            _ => {}
        }
    }

    fn bar_write(&self, _bar: u8, offset: u64, data: &[u8]) -> Effect {
        match offset {
            COMMON..ISR => self.write_common(offset - COMMON, data),
            DEVICE..NOTIFY => self.device.write_config((offset - DEVICE) as u32, data),
            NOTIFY..MSIX_TABLE => {
                let index = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if index < self.kicks.len() as u64 {
                    self.kick(index as usize);
                }
            }
            MSIX_TABLE..MSIX_PBA => self.shared.msix.table_write(offset - MSIX_TABLE, data),
            _ => {}
        }
        Effect::default()
    }

    fn io_events(&self) -> Vec<IoEvent> {
        if self.device.notifies_inline() {
            return Vec::new();
        }
        (0..)
            .map(|index| NOTIFY + index * u64::from(NOTIFY_MULTIPLIER))
            .zip(&self.kicks)
            .map(|(offset, kick)| IoEvent {
                bar: BAR,
                offset,
                length: 0,
                eventfd: Arc::clone(kick),
            })
            .collect()
    }

    fn counters(&self) -> Vec<Arc<dyn Counters>> {
        let own: Arc<dyn Counters> = self.shared.counts.clone();
        iter::once(own).chain(self.device.counters()).collect()
    }

    fn reset(&self) -> Effect {
        let mut config = self.config();
        self.reset_device(&mut self.state());
        self.shared.msix.reset();
        *config = self.pristine.clone();
        self.set_bus_master(false);
        Effect { decode: true }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut state = self.state();
        self.reset_device(&mut state);
    }
}

/// The PCI identity of a virtio device (4.1.2): revision 1 and up is modern only.
fn identity(device: DeviceType) -> Identity {
    let class = match device {
        DeviceType::Net => 0x02_00_00,
        DeviceType::Block => 0x01_80_00,
        DeviceType::Console => 0x07_80_00,
        DeviceType::Rng => 0x00_ff_00,
        DeviceType::Iommu => 0x08_80_00,
    };
    Identity {
        vendor: 0x1af4,
        device: 0x1040 + device as u16,
        revision: 1,
        class,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    }
}

/// Appends one vendor-specific capability (4.1.4); `more` follows its 16 bytes.
fn add_structure(
    config: &mut ConfigSpace,
    kind: u8,
    offset: u64,
    length: u32,
    more: &[u8],
) -> Result<u16, ConfigError> {
    let mut body = vec![CAP_LENGTH + more.len() as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    config.add_capability(CAP_VENDOR, &body, &[])
}

#[cfg(test)]
mod tests;
