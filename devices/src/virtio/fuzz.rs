//! What the fuzz harnesses of virtio devices share: guest memory that an attacker filled, with
//! rings in it, and the promise that a device writes only where it was allowed to.

use std::sync::Arc;

use viommu::GuestRam;
use viommu::dma::DmaPort;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::ring::{Buffer, Ring, RingConfig};

/// Bytes of guest memory.
const RAM: usize = 0x1_0000;
const PIECE: usize = 256;
/// Bytes between two queues' rings, and descriptors in each.
const STRIDE: u64 = 0x1000;
const SIZE: u16 = 16;

/// Guest memory as an attacker left it.
pub(super) struct Attack {
    pub(super) ram: GuestRam,
    pub(super) dma: DmaPort,
    pub(super) rings: Vec<Ring>,
}

impl Attack {
    /// Fills memory from `input`, whose first byte chooses features and whether descriptors are
    /// bent to be nearly well-formed, which gets deeper than noise. `None` without a first byte.
    pub(super) fn new(input: &[u8], queues: u64) -> Option<Self> {
        let (&flags, image) = input.split_first()?;
        let ranges = [(GuestAddress(0), RAM)];
        let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&ranges).ok()?);
        let image = image.get(..RAM).unwrap_or(image);
        ram.write_slice(image, GuestAddress(0)).ok()?;
        let dma = DmaPort::direct(Arc::clone(&ram));
        let mut rings = Vec::new();
        for base in (0..queues).map(|index| index * STRIDE) {
            if flags & 1 != 0 {
                bend(&ram, base)?;
            }
            let config = RingConfig {
                size: SIZE,
                descriptors: base,
                available: base + 0x400,
                used: base + 0x800,
            };
            let ring = Ring::new(config, flags & 2 != 0, flags & 4 != 0, &dma.access());
            rings.push(ring?);
        }
        Some(Self { ram, dma, rings })
    }

    /// All of guest memory.
    pub(super) fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM];
        if self.ram.read_slice(&mut bytes, GuestAddress(0)).is_err() {
            bytes.clear();
        }
        bytes
    }

    /// Checks that since `before` only bytes inside `writable` changed.
    ///
    /// # Panics
    /// When another one did.
    pub(super) fn check(&self, before: &[u8], writable: &[Buffer]) {
        let after = self.snapshot();
        // By pieces first: nearly all are the same, and a fuzzer traces every comparison.
        let pieces = (0u64..).zip(before.chunks(PIECE).zip(after.chunks(PIECE)));
        for (piece, (before, after)) in pieces.filter(|(_, (before, after))| before != after) {
            let first = piece * PIECE as u64;
            for (at, _) in (first..)
                .zip(before.iter().zip(after))
                .filter(|(_, (b, a))| b != a)
            {
                let inside = |buffer: &Buffer| {
                    let offset = at.checked_sub(buffer.address.0);
                    offset.is_some_and(|offset| offset < u64::from(buffer.length))
                };
                assert!(writable.iter().any(inside), "the device wrote to {at:#x}");
            }
        }
    }
}

/// Makes the ring at `base` nearly well-formed.
fn bend(ram: &GuestRam, base: u64) -> Option<()> {
    for index in 0..u64::from(SIZE) {
        let at = GuestAddress(base + 16 * index);
        let mut entry = [0; 16];
        ram.read_slice(&mut entry, at).ok()?;
        entry[2..8].fill(0);
        entry[9..12].fill(0);
        entry[8] &= 0x7f;
        entry[9] = entry[13] & 3;
        entry[12] &= 7;
        entry[13] = 0;
        entry[14] %= SIZE as u8 + 1;
        entry[15] = 0;
        ram.write_slice(&entry, at).ok()?;
        let head = GuestAddress(base + 0x404 + 2 * index);
        let value: u16 = ram.read_obj(head).ok()?;
        ram.write_obj(value % SIZE, head).ok()?;
    }
    let available = GuestAddress(base + 0x402);
    let value: u16 = ram.read_obj(available).ok()?;
    ram.write_obj(value % (SIZE + 1), available).ok()
}
