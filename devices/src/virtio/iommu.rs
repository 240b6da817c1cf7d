//! virtio-iommu (virtio 1.3, 5.13): the rings around [`viommu::virtio::Iommu`].
//!
//! Linux waits for a request with interrupts off, so requests are served on the vCPU thread that
//! kicks, all that are there together: popped, served, and only then answered. Fault reports go
//! to the event queue on whatever thread the fault happens.
//!
//! A reset of the function is a device reset. After a system reset the VMM also calls
//! [`Iommu::system_reset`].

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::GuestRam;
use viommu::spec::virtio_iommu as spec;
use viommu::virtio::decode::MAX_READABLE;
use viommu::virtio::{Chain as Request, Iommu, Reply};
use vm_memory::{GuestMemory, Permissions};

use super::buffers;
use super::device::{Activation, DeviceType, VirtioDevice, VirtioInterrupt};
use super::flat::Flat;
use super::ring::{Areas, Broken, Buffer, Chain, RING_FEATURES, Ring};

/// Room for many unsynchronised MAPs of the driver before it has to wait.
const REQUESTS: u16 = 1024;
/// As many reports as the driver cares to have buffers for.
const EVENTS: u16 = 64;
/// Requests that are served together.
const BATCH: usize = 128;
/// Batches per kick. Only a driver that adds requests without end, from another vCPU, gets here;
/// what is left waits for its next kick, so that no vCPU thread is held for ever.
const MOST_BATCHES: usize = 1024;

/// The device.
///
/// Locks: `requests`, then the unit's own, then `events`.
pub struct VirtioIommu {
    unit: Arc<Iommu>,
    requests: Mutex<Option<Requests>>,
    events: Mutex<Option<Events>>,
}

/// The request queue of an active device, and room for what is in work.
struct Requests {
    ring: Ring,
    ram: GuestRam,
    interrupt: Arc<dyn VirtioInterrupt>,
    chain: Chain,
    batch: Vec<Fetched>,
    /// Where the replies of `batch` go.
    writable: Vec<Buffer>,
    replies: Vec<Reply>,
    used: Vec<(u16, u32)>,
}

/// A request that was fetched, and is not answered yet.
struct Fetched {
    head: u16,
    /// Where the buffers of its reply end in `writable`; those of the request before end where
    /// they begin.
    end: usize,
}

/// The requests of one batch, fetched when the unit asks for them.
struct Source<'a> {
    ring: &'a mut Ring,
    memory: Flat<'a>,
    areas: Option<Areas<'a>>,
    chain: &'a mut Chain,
    batch: &'a mut Vec<Fetched>,
    writable: &'a mut Vec<Buffer>,
    readable: [u8; MAX_READABLE],
    /// The longest reply.
    most: usize,
    /// Why nothing more comes.
    broken: Option<Broken>,
}

/// The event queue of an active device.
struct Events {
    ring: Ring,
    ram: GuestRam,
    interrupt: Arc<dyn VirtioInterrupt>,
    chain: Chain,
}

impl VirtioIommu {
    /// The device of `unit`. There is one for a unit.
    pub fn new(unit: Arc<Iommu>) -> Arc<Self> {
        let device = Arc::new(Self {
            unit: Arc::clone(&unit),
            requests: Mutex::new(None),
            events: Mutex::new(None),
        });
        let weak = Arc::downgrade(&device);
        unit.on_fault(move || {
            if let Some(device) = weak.upgrade() {
                device.report();
            }
        });
        device
    }

    fn requests(&self) -> MutexGuard<'_, Option<Requests>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self) -> MutexGuard<'_, Option<Events>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the request queue.
    fn serve(&self) {
        let mut requests = self.requests();
        if let Some(active) = &mut *requests
            && let Err(broken) = active.serve(&self.unit)
        {
            log::warn!("virtio-iommu needs a reset by the guest: {broken}");
            active.interrupt.needs_reset();
            *requests = None;
        }
    }

    /// Brings fault reports to the event queue, as long as there are reports and buffers.
    fn report(&self) {
        let mut events = self.events();
        if let Some(active) = &mut *events
            && let Err(broken) = active.report(&self.unit)
        {
            log::warn!("virtio-iommu needs a reset by the guest: {broken}");
            active.interrupt.needs_reset();
            *events = None;
        }
    }
}

impl VirtioDevice for VirtioIommu {
    fn device_type(&self) -> DeviceType {
        DeviceType::Iommu
    }

    fn features(&self) -> u64 {
        self.unit.features() | RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[REQUESTS, EVENTS]
    }

    /// The driver may write the configuration from now on, before it is ready.
    fn accepts(&self, features: u64) -> bool {
        self.unit.set_features(features);
        true
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let space = self.unit.config_space();
        let from = space.get(offset as usize..).unwrap_or_default();
        for (n, byte) in data.iter_mut().enumerate() {
            *byte = from.get(n).copied().unwrap_or(0);
        }
    }

    fn write_config(&self, offset: u32, data: &[u8]) {
        self.unit.write_config(offset.into(), data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let ram = activation.dma.direct_ram().ok_or_else(|| {
            io::Error::other("a virtio-iommu is behind a vIOMMU itself; put it behind none")
        })?;
        self.unit.set_features(activation.features);
        let mut queues = activation.queues.into_iter();
        let mut next = || Some(queues.next().flatten()?.ring);
        let (requestq, eventq) = (next(), next());
        *self.requests() = requestq.map(|ring| Requests {
            ring,
            ram: ram.clone(),
            interrupt: Arc::clone(&activation.interrupt),
            chain: Chain::default(),
            batch: Vec::with_capacity(BATCH),
            writable: Vec::with_capacity(BATCH),
            replies: Vec::with_capacity(BATCH),
            used: Vec::with_capacity(BATCH),
        });
        *self.events() = eventq.map(|ring| Events {
            ring,
            ram: ram.clone(),
            interrupt: activation.interrupt,
            chain: Chain::default(),
        });
        Ok(())
    }

    fn notifies_inline(&self) -> bool {
        true
    }

    fn notify(&self, index: u16) {
        match index {
            spec::REQUESTQ => self.serve(),
            spec::EVENTQ => self.report(),
            _ => {}
        }
    }

    fn reset(&self) {
        *self.requests() = None;
        *self.events() = None;
        self.unit.reset();
    }
}

impl Requests {
    fn serve(&mut self, unit: &Iommu) -> Result<(), Broken> {
        for _ in 0..MOST_BATCHES {
            self.batch.clear();
            self.writable.clear();
            let memory = Flat::new(&self.ram);
            let mut source = Source {
                areas: self.ring.areas(|address, count| memory.one(address, count)),
                ring: &mut self.ring,
                memory,
                chain: &mut self.chain,
                batch: &mut self.batch,
                writable: &mut self.writable,
                readable: [0; MAX_READABLE],
                most: unit.longest_reply(),
                broken: None,
            };
            unit.serve_each(&mut source, &mut self.replies);
            let broken = source.broken;
            self.answer()?;
            if let Some(broken) = broken {
                return Err(broken);
            }
            if self.batch.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<(), Broken> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let memory = Flat::new(&self.ram);
        self.used.clear();
        let mut start = 0;
        for (fetched, reply) in self.batch.iter().zip(&self.replies) {
            let buffers = &self.writable[start..fetched.end];
            start = fetched.end;
            // It could be written a moment ago.
            let used = memory.copy_out(buffers, reply.bytes()).unwrap_or(0);
            self.used.push((fetched.head, used as u32));
        }
        self.ring.push_all(&memory, &self.used)?;
        if self.ring.wants_interrupt(&memory)? {
            self.interrupt.queue(spec::REQUESTQ);
        }
        Ok(())
    }
}

impl Source<'_> {
    /// Pops a chain. None left means that the driver will kick.
    #[inline]
    fn pop(&mut self) -> Result<bool, Broken> {
        while self.batch.len() < BATCH {
            let areas = self.areas.as_ref();
            if self.ring.pop_from(areas, &self.memory, self.chain)? {
                return Ok(true);
            }
            if !self.batch.is_empty() || !self.ring.enable_kicks(&self.memory)? {
                break;
            }
        }
        Ok(false)
    }
}

impl viommu::virtio::Requests for Source<'_> {
    /// Copies what the device may read, and sees how much of a reply can be written. What cannot
    /// be accessed is as if it were not there.
    #[inline]
    fn next_chain(&mut self) -> Option<Request<'_>> {
        match self.pop() {
            Ok(true) => {}
            Ok(false) => return None,
            Err(broken) => {
                self.broken = Some(broken);
                return None;
            }
        }
        let length = self.chain.readable_length().min(MAX_READABLE);
        let readable = &mut self.readable[..length];
        let fetched = self.memory.copy_in(&self.chain.readable, readable);
        self.writable.extend_from_slice(&self.chain.writable);
        self.batch.push(Fetched {
            head: self.chain.head(),
            end: self.writable.len(),
        });
        Some(Request {
            readable: if fetched { readable } else { &[] },
            writable: writable(&self.memory, &self.chain.writable, self.most),
        })
    }
}

/// How many bytes at the front of `buffers` can be written, if that matters: at most `most`, else
/// their whole length.
fn writable<M: GuestMemory>(memory: &M, buffers: &[Buffer], most: usize) -> usize {
    let mut length = 0;
    for buffer in buffers {
        let count = buffer.length as usize;
        let needed = count.min(most.saturating_sub(length));
        let wraps = buffer.address.0.checked_add(needed as u64).is_none();
        if needed > 0 && (wraps || !memory.check_range(buffer.address, needed, Permissions::Write))
        {
            break;
        }
        length += count;
    }
    length
}

impl Events {
    fn report(&mut self, unit: &Iommu) -> Result<(), Broken> {
        let access = Flat::new(&self.ram);
        let mut told = false;
        // A buffer that is too small is given back empty (5.13.6.9); there are at most as many as
        // the ring has.
        for _ in 0..u32::from(self.ring.size()) * 2 {
            if !self.ring.pop(&access, &mut self.chain)? {
                if self.ring.enable_kicks(&access)? {
                    continue;
                }
                break;
            }
            let room = writable(&access, &self.chain.writable, size_of::<spec::Fault>());
            let mut used = 0;
            if room >= size_of::<spec::Fault>() {
                let Some(fault) = unit.next_fault() else {
                    self.ring.unpop();
                    break;
                };
                let bytes: [u8; size_of::<spec::Fault>()] = zerocopy::transmute!(fault);
                used = buffers::copy_out(&access, &self.chain.writable, &bytes).unwrap_or(0);
            }
            self.ring.push(&access, self.chain.head(), used as u32)?;
            told = true;
        }
        if told && self.ring.wants_interrupt(&access)? {
            self.interrupt.queue(spec::EVENTQ);
        }
        Ok(())
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;
