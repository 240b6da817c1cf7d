//! virtio-net (virtio 1.3, 5.1) over a tap interface: one pair of queues, checksum and
//! segmentation offloads both ways, merged receive buffers.
//!
//! One thread serves both directions. A frame to the guest is read into a buffer of ours first:
//! only then is its length known, and guest memory is not held while we wait for the network. A
//! frame from the guest goes from its memory to the tap without a copy.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::dma::{DmaAccess, DmaPort};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};
use vmm_sys_util::epoll::EventSet;

use crate::counters;
use crate::counters::Counters;
use crate::limit::warn_limited;
use crate::virtio::buffers::{self, TransferError};
use crate::virtio::device::{Activation, ActiveQueue, DeviceType, VirtioDevice, VirtioInterrupt};
use crate::virtio::ring::{Broken, Buffer, Chain, RING_FEATURES};
use crate::virtio::tap::{self, HEADER, Tap, TapError, TapSource};
use crate::virtio::worker::{Stop, Waiter, Workers};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// The longest frame either way, header included: 64 KiB of segments with their headers.
const MOST: usize = (1 << 16) + 4096;
/// Frames in one direction before the other has its turn.
const TURN: usize = 64;
/// Offset of num_buffers in the header.
const NUM_BUFFERS: usize = 10;

/// What a network card is made from.
#[derive(Debug)]
pub struct NetConfig {
    /// The interface that is its other end.
    pub tap: TapSource,
    /// Its address.
    pub mac: [u8; 6],
}

/// A virtio network card.
pub struct Net {
    tap: Arc<Tap>,
    mac: [u8; 6],
    counts: Arc<Counts>,
    running: Mutex<Option<Workers>>,
}

counters! {
    /// What a network card counts; frames with the header that virtio gives them.
    struct Counts {
        /// Frames to the guest.
        rx_frames,
        /// Their bytes.
        rx_bytes,
        /// Frames from the guest.
        tx_frames,
        /// Their bytes.
        tx_bytes,
        /// Frames either way that were lost: malformed, or the other end did not take them.
        dropped_frames,
    }
}

impl Net {
    /// Attaches to the tap.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(config: NetConfig) -> Result<Arc<Self>, TapError> {
        let tap = Tap::open(config.tap)?;
        Ok(Arc::new(Self::on(tap, config.mac)))
    }

    fn on(tap: Tap, mac: [u8; 6]) -> Self {
        Self {
            tap: Arc::new(tap),
            mac,
            counts: Arc::default(),
            running: Mutex::new(None),
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Workers>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6;
        let offloads = if self.tap.has_offloads() {
            1 << VIRTIO_NET_F_GUEST_CSUM
                | 1 << VIRTIO_NET_F_GUEST_TSO4
                | 1 << VIRTIO_NET_F_GUEST_TSO6
        } else {
            0
        };
        RING_FEATURES | always | offloads
    }

    fn accepts(&self, features: u64) -> bool {
        // Segmentation needs checksums (5.1.3.1).
        let needs = |bits: [u32; 2], base: u32| {
            bits.iter().all(|bit| features & 1 << bit == 0) || features & 1 << base != 0
        };
        needs(
            [VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6],
            VIRTIO_NET_F_CSUM,
        ) && needs(
            [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6],
            VIRTIO_NET_F_GUEST_CSUM,
        )
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let from = self.mac.iter().skip(offset as usize);
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(self.counts.clone())
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let mut queues = activation.queues.into_iter();
        let receive = queues.next().flatten();
        let transmit = queues.next().flatten();
        let has = |bit: u32| activation.features & 1 << bit != 0;
        if self.tap.has_offloads() {
            let offload = |feature, bit| if has(feature) { bit } else { 0 };
            self.tap.set_offloads(
                offload(VIRTIO_NET_F_GUEST_CSUM, tap::OFFLOAD_CSUM)
                    | offload(VIRTIO_NET_F_GUEST_TSO4, tap::OFFLOAD_TSO4)
                    | offload(VIRTIO_NET_F_GUEST_TSO6, tap::OFFLOAD_TSO6),
            )?;
        }
        let mut workers = Workers::new()?;
        let waiter = Waiter::new()?;
        let stop = workers.stop();
        waiter.add(&*stop, STOP, EventSet::IN)?;
        if let Some(queue) = &receive {
            waiter.add(&*queue.kick, RECEIVE_KICK, EventSet::IN)?;
            waiter.add(&*self.tap, TAP, EventSet::IN)?;
        }
        if let Some(queue) = &transmit {
            waiter.add(&*queue.kick, TRANSMIT_KICK, EventSet::IN)?;
        }
        let service = Service {
            tap: Arc::clone(&self.tap),
            counts: Arc::clone(&self.counts),
            dma: Arc::new(activation.dma),
            interrupt: activation.interrupt,
            stop,
            merge: has(VIRTIO_NET_F_MRG_RXBUF),
            frame: vec![0; MOST],
            length: 0,
            chains: Vec::new(),
            room: 0,
            spare: Vec::new(),
            used: Vec::new(),
            down: false,
            receive,
            transmit,
        };
        workers.spawn("virtio-net", move || service.run(waiter))?;
        *self.running() = Some(workers);
        Ok(())
    }

    fn reset(&self) {
        let workers = self.running().take();
        drop(workers);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}

const STOP: u64 = 0;
const RECEIVE_KICK: u64 = 1;
const TRANSMIT_KICK: u64 = 2;
const TAP: u64 = 3;

/// One activation of the device.
struct Service {
    tap: Arc<Tap>,
    counts: Arc<Counts>,
    dma: Arc<DmaPort>,
    interrupt: Arc<dyn VirtioInterrupt>,
    stop: Arc<Stop>,
    /// A frame may take several receive chains.
    merge: bool,
    receive: Option<ActiveQueue>,
    transmit: Option<ActiveQueue>,
    /// The frame that is on its way to the guest, and how long it is; 0: none.
    frame: Vec<u8>,
    length: usize,
    /// Receive chains taken for it so far, and how many bytes they hold.
    chains: Vec<Chain>,
    room: usize,
    /// Kept so that a frame costs no allocation.
    spare: Vec<Chain>,
    used: Vec<(u16, u32)>,
    /// The tap was down at the last transmission: said once.
    down: bool,
}

/// Why a direction stopped for now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// Nothing more until the queue's kick.
    Queue,
    /// The tap has nothing more.
    Tap,
    /// It was the other direction's turn.
    Turn,
}

impl Service {
    fn run(mut self, mut waiter: Waiter) {
        if let Err(error) = self.serve(&mut waiter) {
            warn_limited!("virtio-net needs a reset by the guest: {error}");
            self.interrupt.needs_reset();
        }
    }

    fn serve(&mut self, waiter: &mut Waiter) -> io::Result<()> {
        let broken = |error: Broken| io::Error::other(error);
        let mut listening = self.receive.is_some();
        let mut chain = Chain::default();
        // What was made available before the device was ready had its kick then.
        let (mut receive, mut transmit) = (true, true);
        loop {
            if receive && !self.stop.is_set() {
                let pause = self.receive().map_err(broken)?;
                // Without room in the queue, a readable tap would only keep us awake.
                let listen = pause != Pause::Queue;
                if listen != listening {
                    if listen {
                        waiter.add(&*self.tap, TAP, EventSet::IN)?;
                    } else {
                        waiter.remove(&*self.tap)?;
                    }
                    listening = listen;
                }
            }
            if transmit && self.transmit(&mut chain).map_err(broken)? == Pause::Turn {
                // Its own kick brings it back after the others had their turn.
                if let Some(queue) = &self.transmit {
                    queue.kick.write(1)?;
                }
            }
            (receive, transmit) = (false, false);
            for (token, _) in waiter.wait()? {
                match token {
                    STOP => return Ok(()),
                    RECEIVE_KICK => {
                        receive = true;
                        clear(self.receive.as_ref());
                    }
                    TRANSMIT_KICK => {
                        transmit = true;
                        clear(self.transmit.as_ref());
                    }
                    _ => receive = true,
                }
            }
        }
    }

    /// Moves frames from the tap to the guest.
    fn receive(&mut self) -> Result<Pause, Broken> {
        let Some(mut queue) = self.receive.take() else {
            return Ok(Pause::Queue);
        };
        let result = self.receive_on(&mut queue);
        self.receive = Some(queue);
        result
    }

    fn receive_on(&mut self, queue: &mut ActiveQueue) -> Result<Pause, Broken> {
        let dma = Arc::clone(&self.dma);
        let mut pause = Pause::Turn;
        let mut delivered = false;
        for _ in 0..TURN {
            if self.length == 0 {
                match self.tap.receive(&mut self.frame) {
                    Ok(length) if length >= HEADER => self.length = length,
                    Ok(length) if length > 0 => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        pause = Pause::Tap;
                        break;
                    }
                    // The interface is gone: listening on would only keep us awake.
                    gone => {
                        log::debug!("tap {}: {gone:?}", self.tap.name());
                        pause = Pause::Queue;
                        break;
                    }
                }
            }
            let access = dma.access();
            if !self.gather(queue, &access)? {
                pause = Pause::Queue;
                break;
            }
            delivered |= self.deliver(queue, &access)?;
        }
        if delivered && queue.ring.wants_interrupt(&dma.access())? {
            self.interrupt.queue(RECEIVE);
        }
        Ok(pause)
    }

    /// Takes chains until the frame fits. `false` when the queue has no more.
    fn gather(&mut self, queue: &mut ActiveQueue, access: &DmaAccess<'_>) -> Result<bool, Broken> {
        loop {
            let enough = if self.merge {
                self.room >= self.length
            } else {
                !self.chains.is_empty()
            };
            if enough {
                queue.ring.disable_kicks(access)?;
                return Ok(true);
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            if queue.ring.pop(access, &mut chain)? {
                self.room += chain.writable_length();
                self.chains.push(chain);
            } else if !queue.ring.enable_kicks(access)? {
                return Ok(false);
            }
        }
    }

    /// Puts the frame into the chains, or drops it when it does not fit or the guest gave memory
    /// that is not there. Returns whether chains were used.
    fn deliver(&mut self, queue: &mut ActiveQueue, access: &DmaAccess<'_>) -> Result<bool, Broken> {
        let Some(frame) = self.frame.get_mut(..std::mem::take(&mut self.length)) else {
            return Ok(false);
        };
        if self.room < frame.len() {
            // Only without merging: the chain is kept for a shorter frame.
            self.counts.dropped_frames.add_alone(1);
            return Ok(false);
        }
        // Always set, whether or not buffers merge (5.1.6.4.1).
        let count = (self.chains.len() as u16).to_le_bytes();
        frame[NUM_BUFFERS..NUM_BUFFERS + 2].copy_from_slice(&count);
        self.counts.rx_frames.add_alone(1);
        self.counts.rx_bytes.add_alone(frame.len() as u64);
        let mut rest = &*frame;
        self.used.clear();
        for chain in &self.chains {
            // A chain that cannot be written counts as empty; the guest broke its own frame.
            let part = rest.len().min(chain.writable_length());
            let (part, after) = rest.split_at(part);
            let written = buffers::copy_out(access, &chain.writable, part).unwrap_or(0);
            self.used.push((chain.head(), written as u32));
            rest = after;
        }
        self.spare.append(&mut self.chains);
        self.room = 0;
        queue.ring.push_all(access, &self.used)?;
        Ok(true)
    }

    /// Moves frames from the guest to the tap.
    fn transmit(&mut self, chain: &mut Chain) -> Result<Pause, Broken> {
        let Some(queue) = &mut self.transmit else {
            return Ok(Pause::Queue);
        };
        let mut pause = Pause::Turn;
        let mut used = false;
        for _ in 0..TURN {
            if self.stop.is_set() {
                break;
            }
            let access = self.dma.access();
            if !queue.ring.pop(&access, chain)? {
                if queue.ring.enable_kicks(&access)? {
                    continue;
                }
                pause = Pause::Queue;
                break;
            }
            queue.ring.disable_kicks(&access)?;
            let sent = send(&self.tap, &access, &chain.readable);
            queue.ring.push(&access, chain.head(), 0)?;
            match &sent {
                Ok(bytes) if *bytes > 0 => {
                    self.counts.tx_frames.add_alone(1);
                    self.counts.tx_bytes.add_alone(*bytes as u64);
                }
                _ => self.counts.dropped_frames.add_alone(1),
            }
            used = true;
            let down = matches!(&sent, Err(TransferError::Host(error))
                if error.raw_os_error() == Some(libc::EIO));
            if down && !self.down {
                let name = self.tap.name();
                warn_limited!(
                    "tap {name} is down: `ip link set dev {name} up` lets frames through"
                );
            }
            self.down = down;
        }
        if used && queue.ring.wants_interrupt(&self.dma.access())? {
            self.interrupt.queue(TRANSMIT);
        }
        Ok(pause)
    }
}

/// A frame that the tap refuses is lost, as on any network.
fn send(tap: &Tap, access: &DmaAccess<'_>, frame: &[Buffer]) -> Result<usize, TransferError> {
    if !(HEADER as u64..=MOST as u64).contains(&buffers::length(frame)) {
        return Ok(0);
    }
    buffers::write_packet(access, frame, tap.as_fd())
}

fn clear(queue: Option<&ActiveQueue>) {
    if let Some(queue) = queue {
        // Another signal that comes in now is not lost: it wakes us again.
        let _ = queue.kick.read();
    }
}

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;
