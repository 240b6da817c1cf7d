//! Split virtqueues from the device's side: one walker that trusts nothing.
//!
//! The ring's bookkeeping is virtio-queue's. The descriptor walk is ours, since a chain that is
//! cut short without notice would look like a well-formed shorter one: what the specification
//! forbids is an error here, and the device then needs a reset (virtio 1.3, 2.1.2).

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::counters::Counter;

/// The ring features that [`Ring`] implements, for a device to offer.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The most buffers that one chain may have. Linux chains longer than the queue only through
/// indirect tables, and never longer than a device's own segment limits, which are below this.
pub const MAX_BUFFERS: usize = 1024;

/// Why a queue cannot be served any more. The driver broke a MUST, or took the ring's memory away.
#[derive(Error, Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// The ring itself cannot be accessed.
    #[error("the ring is not in memory the device can access")]
    Ring,
    /// The available index ran ahead by more than the queue's size.
    #[error("the available index is more than the queue's size ahead")]
    AvailIndex,
    /// A descriptor index is outside its table.
    #[error("descriptor index {0} is outside its table")]
    Index(u16),
    /// A descriptor cannot be read.
    #[error("the descriptor at {0:#x} is not in memory the device can access")]
    Descriptor(u64),
    /// The chain loops or is longer than [`MAX_BUFFERS`].
    #[error("a chain loops or has more buffers than its table")]
    TooLong,
    /// A buffer for the device to read follows one for it to write.
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
    /// More than 4 GiB in one chain.
    #[error("a chain has more than 2^32 bytes")]
    Overflow,
    /// An indirect table that was not negotiated, has a successor, is inside another, or has a
    /// length that is 0 or not a multiple of 16.
    #[error("an indirect table is malformed or was not negotiated")]
    Indirect,
}

/// One buffer of a chain: `length` bytes at the device's address `address`. Not checked against
/// memory: an access may fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// First address, as the device puts it on the bus.
    pub address: GuestAddress,
    /// Bytes.
    pub length: u32,
}

/// One descriptor chain. Reused from one [`Ring::pop`] to the next, so that a request costs no
/// allocation.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    head: u16,
    /// What the device reads, in order.
    pub readable: Vec<Buffer>,
    /// What the device writes, in order.
    pub writable: Vec<Buffer>,
}

impl Chain {
    /// Its name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device may read. Less than 2^32.
    pub fn readable_length(&self) -> usize {
        self.readable.iter().map(|b| b.length as usize).sum()
    }

    /// Bytes that the device may write. Less than 2^32.
    pub fn writable_length(&self) -> usize {
        self.writable.iter().map(|b| b.length as usize).sum()
    }
}

/// What a driver programmed for one queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RingConfig {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Address of the descriptor table, a multiple of 16.
    pub descriptors: u64,
    /// Address of the available ring (driver area), a multiple of 2.
    pub available: u64,
    /// Address of the used ring (device area), a multiple of 4.
    pub used: u64,
}

/// Where the parts of a [`Ring`] are that the driver writes, when each is in one piece of memory.
#[derive(Clone, Copy, Debug)]
pub struct Areas<'m> {
    descriptors: VolatileSlice<'m>,
    available: VolatileSlice<'m>,
}

/// One enabled split virtqueue.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    indirect: bool,
    /// The available index when it was last read.
    available: u16,
    /// The used index when the driver's wish for an interrupt was last looked at.
    told: u16,
    /// Chains that were returned.
    used: Arc<Counter>,
}

impl Ring {
    /// A ring as `config` says, with no buffer consumed yet. `None` when a size or an address
    /// breaks the specification's alignment, or the ring is not in memory that `memory` gives.
    pub fn new<M: GuestMemory>(
        config: RingConfig,
        event_index: bool,
        indirect: bool,
        memory: &M,
    ) -> Option<Self> {
        let size = u64::from(config.size);
        let area = |address: u64, length: u64, access| {
            // virtio-queue adds offsets to these addresses, so the end must exist as well. What is
            // asked for piece by piece is a fault where a vIOMMU refuses it: a guest whose device
            // does not start is told why.
            address.checked_add(length).is_some()
                && memory
                    .get_slices(GuestAddress(address), length as usize, access)
                    .is_ok_and(|mut pieces| pieces.all(|piece| piece.is_ok()))
        };
        let reachable = area(config.descriptors, 16 * size, Permissions::Read)
            && area(config.available, 6 + 2 * size, Permissions::Read)
            && area(config.used, 6 + 8 * size, Permissions::ReadWrite);
        if !reachable {
            return None;
        }
        let mut queue = Queue::new(config.size).ok()?;
        let at = GuestAddress;
        queue
            .try_set_desc_table_address(at(config.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(at(config.available))
            .ok()?;
        queue.try_set_used_ring_address(at(config.used)).ok()?;
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        Some(Self {
            queue,
            indirect,
            available: 0,
            told: 0,
            used: Arc::default(),
        })
    }

    /// The same ring, which counts in `used` what it returns to the driver. No other ring does at
    /// the same time.
    #[must_use]
    pub fn counting(self, used: Arc<Counter>) -> Self {
        Self { used, ..self }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain into `chain`. `false` when there is none.
    ///
    /// # Errors
    /// The driver broke a rule; nothing more can be taken from this ring.
    pub fn pop<M: GuestMemory>(&mut self, memory: &M, chain: &mut Chain) -> Result<bool, Broken> {
        self.pop_from(None, memory, chain)
    }

    /// Where the ring is, for [`pop_from`](Self::pop_from); `piece` finds bytes that are in one
    /// piece of memory.
    pub fn areas<'m>(
        &self,
        piece: impl Fn(GuestAddress, usize) -> Option<VolatileSlice<'m>>,
    ) -> Option<Areas<'m>> {
        let size = usize::from(self.size());
        Some(Areas {
            descriptors: piece(GuestAddress(self.queue.desc_table()), 16 * size)?,
            available: piece(GuestAddress(self.queue.avail_ring()), 4 + 2 * size)?,
        })
    }

    /// As [`pop`](Self::pop), without a search for the ring each time: `areas` are those of this
    /// ring.
    ///
    /// # Errors
    /// As of [`pop`](Self::pop).
    #[inline]
    pub fn pop_from<M: GuestMemory>(
        &mut self,
        areas: Option<&Areas<'_>>,
        memory: &M,
        chain: &mut Chain,
    ) -> Result<bool, Broken> {
        chain.readable.clear();
        chain.writable.clear();
        let next = self.queue.next_avail();
        if self.available == next {
            // Acquire: what the driver made available before is seen.
            let index = self
                .queue
                .avail_idx(memory, Ordering::Acquire)
                .map_err(|_| Broken::Ring)?;
            if index.0.wrapping_sub(next) > self.size() {
                return Err(Broken::AvailIndex);
            }
            self.available = index.0;
            if index.0 == next {
                return Ok(false);
            }
        }
        let offset = 4 + 2 * self.slot(next);
        let known = areas.map(|areas| areas.available.load(offset as usize, Ordering::Relaxed));
        let head = match known {
            Some(Ok(head)) => head,
            _ => memory
                .load(
                    GuestAddress(self.queue.avail_ring() + offset),
                    Ordering::Relaxed,
                )
                .map_err(|_| Broken::Ring)?,
        };
        chain.head = u16::from_le(head);
        self.queue.set_next_avail(next.wrapping_add(1));
        self.walk(areas, memory, chain)?;
        Ok(true)
    }

    /// The slot of a ring that belongs to an index. The size is a power of two.
    fn slot(&self, index: u16) -> u64 {
        u64::from(index & (self.size() - 1))
    }

    /// Whether there is another chain to pop.
    ///
    /// # Errors
    /// [`Broken::Ring`].
    pub fn has_more<M: GuestMemory>(&self, memory: &M) -> Result<bool, Broken> {
        let available = self
            .queue
            .avail_idx(memory, Ordering::Relaxed)
            .map_err(|_| Broken::Ring)?;
        Ok(available.0 != self.queue.next_avail())
    }

    /// Gives the chain that was popped last back to the ring, to be popped again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    #[inline]
    fn walk<M: GuestMemory>(
        &self,
        areas: Option<&Areas<'_>>,
        memory: &M,
        chain: &mut Chain,
    ) -> Result<(), Broken> {
        let mut near = areas.map(|areas| areas.descriptors);
        let mut table = self.queue.desc_table();
        let mut entries = u32::from(self.queue.size());
        let mut inside_indirect = false;
        let mut index = chain.head;
        let mut seen = 0u32;
        let mut bytes = 0u32;
        loop {
            if u32::from(index) >= entries {
                return Err(Broken::Index(index));
            }
            seen += 1;
            if seen > entries || chain.readable.len() + chain.writable.len() >= MAX_BUFFERS {
                return Err(Broken::TooLong);
            }
            let at = table
                .checked_add(16 * u64::from(index))
                .ok_or(Broken::Descriptor(table))?;
            let known = near.and_then(|near| words(near, 16 * usize::from(index)));
            let descriptor = match known {
                Some(descriptor) => descriptor,
                None => descriptor(memory, at).ok_or(Broken::Descriptor(at))?,
            };
            let has = |flag: u32| u32::from(descriptor.flags()) & flag != 0;
            if has(VRING_DESC_F_INDIRECT) {
                let length = descriptor.len();
                if !self.indirect
                    || inside_indirect
                    || has(VRING_DESC_F_NEXT)
                    || length == 0
                    || !length.is_multiple_of(16)
                {
                    return Err(Broken::Indirect);
                }
                table = descriptor.addr().0;
                near = None;
                entries = length / 16;
                inside_indirect = true;
                index = 0;
                seen = 0;
                continue;
            }
            let buffer = Buffer {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            bytes = bytes.checked_add(buffer.length).ok_or(Broken::Overflow)?;
            if has(VRING_DESC_F_WRITE) {
                chain.writable.push(buffer);
            } else if chain.writable.is_empty() {
                chain.readable.push(buffer);
            } else {
                return Err(Broken::Order);
            }
            if !has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// Returns the chain `head` to the driver, with `written` bytes at the front of its writable
    /// buffers.
    ///
    /// # Errors
    /// [`Broken::Ring`].
    pub fn push<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        written: u32,
    ) -> Result<(), Broken> {
        self.used.add_alone(1);
        self.queue
            .add_used(memory, head, written)
            .map_err(|_| Broken::Ring)
    }

    /// Returns several chains that belong together (a frame in merged buffers): the driver sees
    /// all of them at once or none (5.1.6.4.1).
    ///
    /// # Errors
    /// [`Broken::Ring`].
    pub fn push_all<M: GuestMemory>(
        &mut self,
        memory: &M,
        used: &[(u16, u32)],
    ) -> Result<(), Broken> {
        let Some((&(head, written), before)) = used.split_last() else {
            return Ok(());
        };
        self.used.add_alone(before.len() as u64);
        // The last one publishes the used index; the others are written behind its back.
        let mut before = before;
        while !before.is_empty() {
            let slot = self.slot(self.queue.next_used());
            // To the end of the ring at most.
            let count = before.len().min((u64::from(self.size()) - slot) as usize);
            let (now, later) = before.split_at(count);
            self.write_used(memory, slot, now).ok_or(Broken::Ring)?;
            let next = self.queue.next_used().wrapping_add(count as u16);
            self.queue.set_next_used(next);
            before = later;
        }
        self.push(memory, head, written)
    }

    /// Writes neighbouring elements of the used ring.
    fn write_used<M: GuestMemory>(
        &self,
        memory: &M,
        slot: u64,
        elements: &[(u16, u32)],
    ) -> Option<()> {
        let at = GuestAddress(self.queue.used_ring() + 4 + 8 * slot);
        let length = 8 * elements.len();
        let whole = memory
            .get_slices(at, length, Permissions::Write)
            .ok()?
            .next()?
            .ok()?;
        for (offset, &(head, written)) in (0..).step_by(8).zip(elements) {
            let (head, written) = (u32::from(head).to_le(), written.to_le());
            if whole.len() == length {
                whole.store(head, offset, Ordering::Relaxed).ok()?;
                whole.store(written, offset + 4, Ordering::Relaxed).ok()?;
            } else {
                let at = GuestAddress(at.0 + offset as u64);
                memory.write_obj([head, written], at).ok()?;
            }
        }
        Some(())
    }

    /// Whether the driver wants an interrupt for what was pushed since the last call.
    ///
    /// # Errors
    /// [`Broken::Ring`].
    pub fn wants_interrupt<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        // The used index must be visible before the driver's wish is read (2.7.7.2).
        fence(Ordering::SeqCst);
        let wish = |offset: u64| {
            memory
                .load(
                    GuestAddress(self.queue.avail_ring() + offset),
                    Ordering::Relaxed,
                )
                .map(u16::from_le)
                .map_err(|_| Broken::Ring)
        };
        let (new, old) = (self.queue.next_used(), self.told);
        self.told = new;
        if self.queue.event_idx_enabled() {
            // Whether used_event lies in what was used since the last call.
            let event = wish(4 + 2 * u64::from(self.queue.size()))?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            let flags = u32::from(wish(0)?);
            Ok(new != old && flags & VRING_AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// Asks the driver for notifications. `true`: buffers came in meanwhile, for which there may
    /// be none; look again.
    ///
    /// # Errors
    /// [`Broken::Ring`].
    pub fn enable_kicks<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Broken> {
        self.queue
            .enable_notification(memory)
            .map_err(|_| Broken::Ring)
    }

    /// Tells the driver that notifications are not needed: the device is looking anyway.
    ///
    /// # Errors
    /// [`Broken::Ring`].
    pub fn disable_kicks<M: GuestMemory>(&mut self, memory: &M) -> Result<(), Broken> {
        self.queue
            .disable_notification(memory)
            .map_err(|_| Broken::Ring)
    }
}

/// Reads a descriptor. Tables are aligned, but for indirect ones of strange drivers.
#[inline]
fn descriptor<M: GuestMemory>(memory: &M, at: u64) -> Option<Descriptor> {
    let at = GuestAddress(at);
    let mut slices = memory.get_slices(at, 16, Permissions::Read).ok()?;
    let words = words(slices.next()?.ok()?, 0);
    words.or_else(|| memory.read_obj(at).ok())
}

/// The aligned descriptor at `offset`.
#[inline]
fn words<B: BitmapSlice>(table: VolatileSlice<'_, B>, offset: usize) -> Option<Descriptor> {
    let word = |offset| {
        let word = table.load::<u64>(offset, Ordering::Relaxed);
        word.map(u64::from_le).ok()
    };
    let (address, rest) = (word(offset)?, word(offset + 8)?);
    let (length, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
    Some(Descriptor::new(address, length, flags, next))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use viommu::dma::DmaPort;

    use super::*;
    use crate::testing::{BUFFERS, Driver, INDIRECT, NEXT, RAM, WRITE, ram};

    const SIZE: u16 = 16;

    fn ring(features: u64) -> (Driver, DmaPort, Ring) {
        let ram = ram();
        let driver = Driver::new(ram.clone(), 0, SIZE);
        let port = DmaPort::direct(ram);
        let has = |bit: u32| features & 1 << bit != 0;
        let ring = Ring::new(
            driver.config,
            has(VIRTIO_RING_F_EVENT_IDX),
            has(VIRTIO_RING_F_INDIRECT_DESC),
            &port.access(),
        );
        (driver, port, ring.unwrap())
    }

    /// What popping one chain gives.
    fn pop(ring: &mut Ring, port: &DmaPort) -> Result<Option<Chain>, Broken> {
        let mut chain = Chain::default();
        Ok(ring.pop(&port.access(), &mut chain)?.then_some(chain))
    }

    fn spans(buffers: &[Buffer]) -> Vec<(u64, u32)> {
        buffers.iter().map(|b| (b.address.0, b.length)).collect()
    }

    #[test]
    fn a_chain_is_its_readable_buffers_and_then_its_writable_ones() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        let buffers = [(0x1000, 1, 0), (0x2000, 0, 0), (0x3000, 7, WRITE)];
        let head = driver.add(&buffers);
        let indirect = driver.add_indirect(BUFFERS, &buffers);
        for expected in [head, indirect] {
            let chain = pop(&mut ring, &port).unwrap().unwrap();
            assert_eq!(chain.head(), expected);
            assert_eq!(spans(&chain.readable), [(0x1000, 1), (0x2000, 0)]);
            assert_eq!(spans(&chain.writable), [(0x3000, 7)]);
        }
        assert!(pop(&mut ring, &port).unwrap().is_none());
    }

    #[test]
    fn direct_descriptors_may_lead_to_an_indirect_table() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.describe(BUFFERS, 0, (0x5000, 5, WRITE), 0);
        driver.add(&[(0x1000, 1, 0), (BUFFERS, 16, INDIRECT)]);
        let chain = pop(&mut ring, &port).unwrap().unwrap();
        assert_eq!(spans(&chain.writable), [(0x5000, 5)]);
    }

    #[test]
    fn a_chain_that_loops_breaks_the_ring() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.describe(driver.config.descriptors, 0, (0x1000, 1, NEXT), 1);
        driver.describe(driver.config.descriptors, 1, (0x1000, 1, NEXT), 0);
        driver.offer(0);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::TooLong);
    }

    #[test]
    fn an_indirect_chain_of_more_buffers_than_allowed_breaks_the_ring() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        let many = vec![(0x1000, 1, 0); MAX_BUFFERS];
        driver.add_indirect(BUFFERS, &many);
        assert!(pop(&mut ring, &port).is_ok());
        let too_many = vec![(0x1000, 1, 0); MAX_BUFFERS + 1];
        driver.add_indirect(BUFFERS, &too_many);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::TooLong);
    }

    #[test]
    fn an_index_outside_its_table_breaks_the_ring() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.offer(SIZE);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Index(SIZE));

        let (mut driver, port, mut ring) = self::ring(RING_FEATURES);
        driver.describe(driver.config.descriptors, 0, (0x1000, 1, NEXT), SIZE + 3);
        driver.offer(0);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Index(SIZE + 3));
    }

    #[test]
    fn a_malformed_indirect_table_breaks_the_ring() {
        for (length, flags) in [(0, INDIRECT), (17, INDIRECT), (16, INDIRECT | NEXT)] {
            let (mut driver, port, mut ring) = ring(RING_FEATURES);
            driver.add(&[(BUFFERS, length, flags)]);
            assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Indirect);
        }
        // A table inside a table.
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.add_indirect(BUFFERS, &[(BUFFERS, 16, INDIRECT)]);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Indirect);
        // One that was not negotiated.
        let (mut driver, port, mut ring) = self::ring(0);
        driver.add_indirect(BUFFERS, &[(0x1000, 1, 0)]);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Indirect);
    }

    #[test]
    fn a_descriptor_outside_memory_breaks_the_ring_and_a_buffer_there_does_not() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.add(&[(u64::MAX, 1, 0)]);
        assert!(
            pop(&mut ring, &port).unwrap().is_some(),
            "the device decides"
        );
        driver.add(&[(RAM, 16, INDIRECT)]);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Descriptor(RAM));
        let (mut driver, port, mut ring) = self::ring(RING_FEATURES);
        let table = u64::MAX - 7;
        driver.add(&[(table, 32, INDIRECT)]);
        assert_eq!(
            pop(&mut ring, &port).unwrap_err(),
            Broken::Descriptor(table)
        );
    }

    #[test]
    fn a_readable_buffer_after_a_writable_one_breaks_the_ring() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.add(&[(0x1000, 1, WRITE), (0x1000, 1, 0)]);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Order);
    }

    #[test]
    fn more_than_4_gib_in_a_chain_break_the_ring() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        driver.add(&[(0, u32::MAX, 0), (0, 1, 0)]);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::Overflow);
    }

    #[test]
    fn an_available_index_too_far_ahead_breaks_the_ring() {
        let (driver, port, mut ring) = ring(RING_FEATURES);
        driver.set_available(SIZE + 1);
        assert_eq!(pop(&mut ring, &port).unwrap_err(), Broken::AvailIndex);
    }

    #[test]
    fn a_ring_that_is_not_in_memory_or_misaligned_is_refused() {
        let ram = ram();
        let good = Driver::new(ram.clone(), 0, SIZE).config;
        let port = DmaPort::direct(ram);
        let bad = [
            RingConfig { size: 0, ..good },
            RingConfig { size: 24, ..good },
            RingConfig {
                descriptors: RAM,
                ..good
            },
            RingConfig {
                descriptors: 8,
                ..good
            },
            RingConfig {
                available: RAM - 8,
                ..good
            },
            RingConfig {
                available: 0x2001,
                ..good
            },
            RingConfig {
                used: u64::MAX - 3,
                ..good
            },
            RingConfig {
                used: 0x3002,
                ..good
            },
        ];
        assert!(Ring::new(good, true, true, &port.access()).is_some());
        for config in bad {
            let ring = Ring::new(config, true, true, &port.access());
            assert!(ring.is_none(), "{config:x?}");
        }
    }

    #[test]
    fn interrupts_follow_used_event_when_it_was_negotiated() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        let access = port.access();
        driver.set_used_event(1);
        for _ in 0..3 {
            driver.add(&[(0x1000, 1, WRITE)]);
        }
        ring.push(&access, 0, 1).unwrap();
        assert!(!ring.wants_interrupt(&access).unwrap());
        ring.push(&access, 1, 1).unwrap();
        assert!(ring.wants_interrupt(&access).unwrap());
        ring.push(&access, 2, 1).unwrap();
        assert!(!ring.wants_interrupt(&access).unwrap());
        assert_eq!(driver.used(), [(0, 1), (1, 1), (2, 1)]);
    }

    #[test]
    fn interrupts_follow_the_flag_when_used_event_was_not_negotiated() {
        let (driver, port, mut ring) = ring(0);
        let access = port.access();
        assert!(!ring.wants_interrupt(&access).unwrap(), "nothing was used");
        ring.push(&access, 0, 1).unwrap();
        assert!(ring.wants_interrupt(&access).unwrap());
        driver.write(driver.config.available, &[1, 0]);
        ring.push(&access, 0, 1).unwrap();
        assert!(!ring.wants_interrupt(&access).unwrap());
    }

    #[test]
    fn chains_that_belong_together_come_back_at_once_and_count_for_interrupts() {
        let (mut driver, port, mut ring) = ring(RING_FEATURES);
        let access = port.access();
        driver.set_used_event(1);
        ring.push_all(&access, &[]).unwrap();
        assert_eq!(driver.used(), []);
        ring.push_all(&access, &[(3, 10), (4, 20), (5, 30)])
            .unwrap();
        assert!(ring.wants_interrupt(&access).unwrap());
        assert_eq!(driver.used(), [(3, 10), (4, 20), (5, 30)]);
    }

    proptest! {
        #[test]
        fn whatever_the_rings_hold_a_walk_ends_and_its_chain_keeps_the_rules(
            table in prop::collection::vec(any::<u8>(), 16 * usize::from(SIZE)),
            heads in prop::collection::vec(0..SIZE + 2, usize::from(SIZE)),
            available in 0..SIZE + 2,
            small in any::<bool>(),
        ) {
            let (driver, port, mut ring) = ring(RING_FEATURES);
            let mut table = table;
            for entry in table.chunks_mut(16).filter(|_| small) {
                // Nearly well-formed descriptors go deeper than noise.
                entry[2..8].fill(0);
                entry[9..12].fill(0);
                entry[12] &= 7;
                entry[14] %= SIZE as u8 + 1;
                entry[15] = 0;
            }
            driver.write(driver.config.descriptors, &table);
            for (slot, head) in heads.iter().enumerate() {
                let at = driver.config.available + 4 + 2 * slot as u64;
                driver.write(at, &head.to_le_bytes());
            }
            driver.set_available(available);
            let mut popped = 0;
            while let Ok(Some(chain)) = pop(&mut ring, &port) {
                popped += 1;
                prop_assert!(popped <= SIZE);
                prop_assert!(chain.readable.len() + chain.writable.len() <= MAX_BUFFERS);
                let bytes = chain.readable_length() + chain.writable_length();
                prop_assert!(bytes <= u32::MAX as usize);
            }
        }
    }
}
