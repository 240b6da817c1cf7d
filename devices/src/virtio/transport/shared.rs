//! How device threads reach their driver: interrupts and DEVICE_NEEDS_RESET.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use super::NO_VECTOR;
use crate::counters::{Counter, Counters};
use crate::pci::msix::Msix;
use crate::virtio::device::VirtioInterrupt;

const ISR_QUEUE: u8 = 1 << 0;
const ISR_CONFIG: u8 = 1 << 1;

/// What device threads use: no lock but MSI-X's own.
pub(super) struct Shared {
    pub(super) msix: Msix,
    pub(super) isr: AtomicU8,
    pub(super) generation: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) needs_reset: AtomicBool,
    pub(super) driver_ok: AtomicBool,
    pub(super) counts: Arc<Counts>,
}

/// What the transport counts.
#[derive(Default)]
pub(super) struct Counts {
    /// Chains that were returned to the driver, by queue.
    pub(super) used: Vec<Arc<Counter>>,
    /// Messages for queues and for the configuration.
    interrupts: Counter,
}

impl Counters for Counts {
    fn read(&self, tell: &mut dyn FnMut(&str, u64)) {
        tell("interrupts", self.interrupts.get());
        for (queue, used) in self.used.iter().enumerate() {
            tell(&format!("queue{queue}_used"), used.get());
        }
    }
}

impl Shared {
    /// The state before a driver came, with `queues` queues.
    pub(super) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            counts: Arc::new(Counts {
                used: (0..queues).map(|_| Arc::default()).collect(),
                ..Counts::default()
            }),
        }
    }

    fn send(&self, vector: &AtomicU16, isr: u8) {
        self.counts.interrupts.add(1);
        if !self.msix.signal(vector.load(Ordering::Relaxed)) {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }

    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
        self.driver_ok.store(false, Ordering::Release);
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
    }
}

impl VirtioInterrupt for Shared {
    fn queue(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.send(vector, ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.send(&self.config_vector, ISR_CONFIG);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        // Before DRIVER_OK there is nobody to tell (2.1.2).
        if self.driver_ok.load(Ordering::Acquire) {
            self.config();
        }
    }
}
