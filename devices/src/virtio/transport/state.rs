//! What a driver programmed into the common configuration structure (virtio 1.3, 4.1.4.3).

#![forbid(unsafe_code)]

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK};

use crate::virtio::ring::RingConfig;

/// What the driver programmed.
#[derive(Default)]
pub(super) struct State {
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) status: u8,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueState>,
    pub(super) active: bool,
}

#[derive(Clone, Copy, Default)]
pub(super) struct QueueState {
    pub(super) ring: RingConfig,
    pub(super) enabled: bool,
}

impl State {
    pub(super) fn new(sizes: &[u16]) -> Self {
        let queue = |size: &u16| QueueState {
            ring: RingConfig {
                size: *size,
                ..RingConfig::default()
            },
            enabled: false,
        };
        Self {
            queues: sizes.iter().map(queue).collect(),
            ..Self::default()
        }
    }

    pub(super) fn write_driver_features(&mut self, half: u32) {
        // Negotiation is over once FEATURES_OK is set (3.1.1).
        if self.status & VIRTIO_CONFIG_S_FEATURES_OK as u8 != 0 {
            return;
        }
        let (keep, new) = match self.driver_feature_select {
            0 => (u64::MAX << 32, u64::from(half)),
            1 => (u64::from(u32::MAX), u64::from(half) << 32),
            _ => return,
        };
        self.driver_features = self.driver_features & keep | new;
    }

    /// queue_size, queue_enable or one of the addresses, of the selected queue. A queue is frozen
    /// once it is enabled or the driver is ready (4.1.4.3.2).
    pub(super) fn write_queue(&mut self, offset: u64, value: u64, length: usize, sizes: &[u16]) {
        let index = usize::from(self.queue_select);
        let frozen = self.status & VIRTIO_CONFIG_S_DRIVER_OK as u8 != 0;
        let (Some(queue), Some(&most)) = (self.queues.get_mut(index), sizes.get(index)) else {
            return;
        };
        if frozen || queue.enabled {
            return;
        }
        let set = |address: &mut u64, high: bool| {
            *address = match (length, high) {
                (8, false) => value,
                (4, false) => *address & !u64::from(u32::MAX) | value,
                (4, true) => *address & u64::from(u32::MAX) | value << 32,
                _ => *address,
            };
        };
        let ring = &mut queue.ring;
        match offset {
            24 if value.is_power_of_two() && value <= u64::from(most) => ring.size = value as u16,
            28 => queue.enabled = value == 1,
            32 | 36 => set(&mut ring.descriptors, offset == 36),
            40 | 44 => set(&mut ring.available, offset == 44),
            48 | 52 => set(&mut ring.used, offset == 52),
            _ => {}
        }
    }
}
