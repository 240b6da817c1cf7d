//! A guest in miniature: RAM, interrupts and the driver's side of a split ring, for tests.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use viommu::GuestRam;
use viommu::dma::DmaPort;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) use crate::interrupt::fake::FakeMsi;
use crate::virtio::ring::{Ring, RingConfig};
use crate::virtio::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};

/// How long a test waits for a device thread before it gives up.
const LIMIT: Duration = Duration::from_secs(200);

/// Where a queue's rings are, and where tests put their buffers.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x4000;
pub(crate) const BUFFERS: u64 = 0x10_0000;
pub(crate) const RAM: u64 = 0x80_0000;

pub(crate) const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(crate) const WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(crate) const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// 8 MiB of guest RAM at 0.
pub(crate) fn ram() -> GuestRam {
    let ranges = [(GuestAddress(0), RAM as usize)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// Counts a device's interrupts.
#[derive(Default)]
pub(crate) struct Recorder {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Clone, Default, Debug, PartialEq)]
pub(crate) struct Counts {
    pub(crate) queues: BTreeMap<u16, usize>,
    pub(crate) config: usize,
    pub(crate) needs_reset: usize,
}

impl Recorder {
    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().unwrap().clone()
    }

    /// Waits until `done` says so, looking after every interrupt and now and then.
    pub(crate) fn wait_until(&self, mut done: impl FnMut(&Counts) -> bool) {
        let deadline = Instant::now() + LIMIT;
        let mut counts = self.counts.lock().unwrap();
        while !done(&counts) {
            assert!(
                Instant::now() < deadline,
                "the device did not answer: {counts:?}"
            );
            let tick = Duration::from_millis(20);
            counts = self.changed.wait_timeout(counts, tick).unwrap().0;
        }
    }

    fn note(&self, note: impl FnOnce(&mut Counts)) {
        note(&mut self.counts.lock().unwrap());
        self.changed.notify_all();
    }
}

impl VirtioInterrupt for Recorder {
    fn queue(&self, index: u16) {
        self.note(|counts| *counts.queues.entry(index).or_default() += 1);
    }
    fn config(&self) {
        self.note(|counts| counts.config += 1);
    }
    fn needs_reset(&self) {
        self.note(|counts| counts.needs_reset += 1);
    }
}

/// The driver's side of one split ring.
pub(crate) struct Driver {
    pub(crate) ram: GuestRam,
    pub(crate) config: RingConfig,
    pub(crate) kick: Arc<EventFd>,
    free: u16,
    offered: u16,
    seen: u16,
}

impl Driver {
    pub(crate) fn new(ram: GuestRam, index: u16, size: u16) -> Self {
        let base = RINGS + RING_STRIDE * u64::from(index);
        let config = RingConfig {
            size,
            descriptors: base,
            available: base + 0x2000,
            used: base + 0x3000,
        };
        let zeroes = [0; RING_STRIDE as usize];
        ram.write_slice(&zeroes, GuestAddress(base)).unwrap();
        Self {
            ram,
            config,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            free: 0,
            offered: 0,
            seen: 0,
        }
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(crate) fn describe(
        &self,
        table: u64,
        index: u16,
        (address, length, flags): (u64, u32, u16),
        next: u16,
    ) {
        let low = address.to_le_bytes();
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&low);
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(table + 16 * u64::from(index));
        self.ram.write_slice(&bytes, at).unwrap();
    }

    /// Builds a chain of `(address, length, flags)` in the next free descriptors and offers it.
    pub(crate) fn add(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let size = self.config.size;
        let head = self.free;
        for (place, &(address, length, flags)) in buffers.iter().enumerate() {
            let index = self.free;
            self.free = (self.free + 1) % size;
            let more = if place + 1 < buffers.len() { NEXT } else { 0 };
            self.describe(
                self.config.descriptors,
                index,
                (address, length, flags | more),
                self.free,
            );
        }
        self.offer(head);
        head
    }

    /// The same chain through an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[(u64, u32, u16)]) -> u16 {
        for (index, &(address, length, flags)) in (0..).zip(buffers) {
            let more = if usize::from(index) + 1 < buffers.len() {
                NEXT
            } else {
                0
            };
            self.describe(table, index, (address, length, flags | more), index + 1);
        }
        self.add(&[(table, 16 * buffers.len() as u32, INDIRECT)])
    }

    /// Puts `head` into the available ring.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.config.size);
        let at = GuestAddress(self.config.available + 4 + 2 * slot);
        self.ram.write_obj(head.to_le(), at).unwrap();
        self.offered = self.offered.wrapping_add(1);
        self.set_available(self.offered);
    }

    /// Sets the available index, whatever is behind it.
    pub(crate) fn set_available(&self, index: u16) {
        let at = GuestAddress(self.config.available + 2);
        self.ram
            .store(index.to_le(), at, Ordering::Release)
            .unwrap();
    }

    /// Asks for an interrupt once the used index passes `index`.
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.config.available + 4 + 2 * u64::from(self.config.size);
        self.ram
            .store(index.to_le(), GuestAddress(at), Ordering::Release)
            .unwrap();
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    pub(crate) fn used_index(&self) -> u16 {
        let at = GuestAddress(self.config.used + 2);
        u16::from_le(self.ram.load(at, Ordering::Acquire).unwrap())
    }

    /// What came back since the last call: head and written length.
    pub(crate) fn used(&mut self) -> Vec<(u16, u32)> {
        let mut all = Vec::new();
        while self.seen != self.used_index() {
            let slot = u64::from(self.seen % self.config.size);
            let at = GuestAddress(self.config.used + 4 + 8 * slot);
            let element: u64 = self.ram.read_obj(at).unwrap();
            all.push((
                u64::from_le(element) as u16,
                (u64::from_le(element) >> 32) as u32,
            ));
            self.seen = self.seen.wrapping_add(1);
        }
        all
    }

    /// Waits until `count` chains came back.
    pub(crate) fn wait(&mut self, recorder: &Recorder, count: usize) -> Vec<(u16, u32)> {
        let mut all = Vec::new();
        recorder.wait_until(|_| {
            all.extend(self.used());
            all.len() >= count
        });
        assert_eq!(all.len(), count, "more came back than was offered");
        all
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        self.ram.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.ram
            .read_slice(&mut data, GuestAddress(address))
            .unwrap();
        data
    }
}

/// Activates `device` with every queue, as a transport would, and returns its driver.
pub(crate) fn start(
    device: &dyn VirtioDevice,
    ram: &GuestRam,
    features: u64,
) -> (Vec<Driver>, Arc<Recorder>) {
    start_behind(device, DmaPort::direct(Arc::clone(ram)), 0, ram, features)
}

/// The same through `dma`, to which guest memory is at `offset`.
pub(crate) fn start_behind(
    device: &dyn VirtioDevice,
    dma: DmaPort,
    offset: u64,
    ram: &GuestRam,
    features: u64,
) -> (Vec<Driver>, Arc<Recorder>) {
    let has = |bit: u32| features & 1 << bit != 0;
    let drivers: Vec<Driver> = (0..)
        .zip(device.queue_sizes())
        .map(|(index, &size)| Driver::new(Arc::clone(ram), index, size))
        .collect();
    let queues = drivers
        .iter()
        .map(|driver| {
            let config = RingConfig {
                descriptors: driver.config.descriptors + offset,
                available: driver.config.available + offset,
                used: driver.config.used + offset,
                ..driver.config
            };
            let ring = Ring::new(
                config,
                has(VIRTIO_RING_F_EVENT_IDX),
                has(VIRTIO_RING_F_INDIRECT_DESC),
                &dma.access(),
            );
            Some(ActiveQueue {
                ring: ring.unwrap(),
                kick: Arc::clone(&driver.kick),
            })
        })
        .collect();
    let recorder = Arc::new(Recorder::default());
    device
        .activate(Activation {
            features,
            queues,
            dma,
            interrupt: recorder.clone(),
        })
        .unwrap();
    (drivers, recorder)
}
