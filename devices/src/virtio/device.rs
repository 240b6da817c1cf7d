//! What a virtio device is to its transport, and the transport to it.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use viommu::dma::DmaPort;
use vmm_sys_util::eventfd::EventFd;

use super::ring::Ring;
use crate::counters::Counters;

/// The virtio device types that nestling has (virtio 1.3, 5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum DeviceType {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// IOMMU.
    Iommu = 23,
}

/// One virtio device, whatever transport carries it. Called on vCPU threads; a device does its
/// own locking, and its threads are its own.
pub trait VirtioDevice: Send + Sync {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// The device's feature bits, and of the ring features those it supports
    /// (`VIRTIO_F_INDIRECT_DESC`, `VIRTIO_F_EVENT_IDX`). The transport adds its own. Fixed for the
    /// life of the device.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two. Fixed for the life of the device.
    fn queue_sizes(&self) -> &[u16];

    /// Whether [`activate`](Self::activate) works with these features. The transport has checked
    /// that all of them were offered.
    fn accepts(&self, features: u64) -> bool {
        let _ = features;
        true
    }

    /// Reads the device's configuration; what does not exist reads as zero.
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Writes the device's configuration; what cannot be written is ignored.
    fn write_config(&self, offset: u32, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Starts work: the driver is ready. Called once, and again only after
    /// [`reset`](Self::reset).
    ///
    /// # Errors
    /// The device did not start (no thread, no file descriptor). It then needs a reset.
    fn activate(&self, activation: Activation) -> io::Result<()>;

    /// Whether queue notifications are to come through [`notify`](Self::notify) on the vCPU's
    /// thread instead of the queue's eventfd. For devices that a driver waits for with interrupts
    /// off.
    fn notifies_inline(&self) -> bool {
        false
    }

    /// The driver notified queue `index`. Only called when
    /// [`notifies_inline`](Self::notifies_inline).
    fn notify(&self, index: u16) {
        let _ = index;
    }

    /// What it counts, beside what the transport does.
    fn counters(&self) -> Option<Arc<dyn Counters>> {
        None
    }

    /// Stops all work and waits for it: when this returns no thread of the device touches guest
    /// memory or interrupts. A device that is not active does nothing.
    fn reset(&self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// The features that were negotiated.
    pub features: u64,
    /// The queues, by index; `None` for those that the driver did not enable.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The way to guest memory, for rings and buffers alike.
    pub dma: DmaPort,
    /// The way to interrupt the guest.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// One queue that the driver enabled.
pub struct ActiveQueue {
    /// The ring.
    pub ring: Ring,
    /// Signalled when the driver notifies the queue. It is non-blocking, and outlives a reset: a
    /// stale signal in it is harmless, since a device looks into the ring to learn what to do.
    pub kick: Arc<EventFd>,
}

/// How a device interrupts its driver. Called on device threads, with locks of the device held.
pub trait VirtioInterrupt: Send + Sync {
    /// Buffers of queue `index` were used, and the driver asked to hear of it.
    fn queue(&self, index: u16);

    /// The device's configuration changed.
    fn config(&self);

    /// The device met something it cannot go on from (a broken ring): sets DEVICE_NEEDS_RESET and
    /// tells the driver. The caller stops serving its queues.
    fn needs_reset(&self);
}
