//! A guest that writes anything anywhere into PCI: the fuzz harness of configuration space, the
//! root complex and virtio's registers.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use viommu::Rid;
use viommu::dma::DmaPort;

use super::root::IoEventRegistry;
use super::{Ecam, IoEvent, PciRoot, Placement, RootConfig, Space};
use crate::bus::{Bus, BusDevice};
use crate::testing::{FakeMsi, ram};
use crate::virtio::ring::RING_FEATURES;
use crate::virtio::{Activation, DeviceType, VirtioDevice, VirtioPci};

const MMIO32: u64 = 0xc000_0000;
const MMIO64: u64 = 0x10_0000_0000;
const DEVICES: u8 = 2;

/// A device that only keeps the rules of its own activation.
#[derive(Default)]
struct Inert(Mutex<bool>);

impl VirtioDevice for Inert {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn features(&self) -> u64 {
        RING_FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 4]
    }
    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }
    fn activate(&self, _activation: Activation) -> io::Result<()> {
        let mut active = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!*active, "activated twice without a reset");
        *active = true;
        Ok(())
    }
    fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

#[derive(Default)]
struct Doorbells(Mutex<BTreeSet<u64>>);

impl Doorbells {
    fn all(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IoEventRegistry for Doorbells {
    fn add(&self, _space: Space, address: u64, _event: &IoEvent) -> io::Result<()> {
        assert!(
            self.all().insert(address),
            "a doorbell was registered twice"
        );
        Ok(())
    }
    fn remove(&self, _space: Space, address: u64, _event: &IoEvent) {
        assert!(self.all().remove(&address), "a doorbell was not registered");
    }
}

/// Performs the accesses that `input` lists, 8 bytes each, and checks after each one that only
/// what may change has changed: identities and capability lists stay, every range on the bus is a
/// decoded register inside its window, and exactly the doorbells of those ranges are registered.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
#[expect(clippy::expect_used, reason = "a fuzz harness reports by panicking")]
pub fn accesses(input: &[u8]) {
    let mmio = Arc::new(Bus::mmio());
    let doorbells = Arc::new(Doorbells::default());
    let root = PciRoot::new(
        RootConfig {
            mmio32: MMIO32..=0xdfff_ffff,
            mmio64: MMIO64..=0x1f_ffff_ffff,
            pio: 0xc000..=0xffff,
        },
        Arc::clone(&mmio),
        Arc::new(Bus::pio()),
        Arc::clone(&doorbells) as Arc<dyn IoEventRegistry>,
    );
    let ram = ram();
    for _ in 0..DEVICES {
        let slot = root.reserve(Placement::Any).expect("there is room");
        let port = DmaPort::direct(Arc::clone(&ram));
        let function = VirtioPci::new(Arc::new(Inert::default()), port, &FakeMsi::default());
        slot.fill(function.expect("it fits"))
            .expect("there is room");
    }
    let ecam = Ecam(Arc::clone(&root));
    let fixed = |rid: Rid| {
        let mut bytes = [0; 0x100];
        for (index, dword) in (0..).zip(bytes.chunks_mut(4)) {
            root.config_read(rid, 4 * index, dword);
        }
        // Identity, then each capability's ID and next pointer.
        let mut kept = [&bytes[0..4], &bytes[8..12], &bytes[0x2c..0x30]].concat();
        let mut at = bytes[0x34];
        while at != 0 && kept.len() < 100 {
            kept.extend([at, bytes[usize::from(at)]]);
            at = bytes[usize::from(at) + 1];
        }
        kept
    };
    let before: Vec<_> = root.rids().into_iter().map(&fixed).collect();

    let (accesses, _) = input.as_chunks::<8>();
    for &[kind, device, low, high, value @ ..] in accesses.iter().take(256) {
        let rid = Rid::new(0, device % (DEVICES + 2), 0);
        let offset = u64::from(u16::from_le_bytes([low, high]));
        let length = 1usize << (kind >> 4 & 3);
        let mut data = [value, value].concat();
        let data = data.get_mut(..length).expect("8 bytes are there");
        match kind & 0xf {
            0..4 => ecam.write(u64::from(rid.0) << 12 | offset & 0xfff, data),
            4 => ecam.read(u64::from(rid.0) << 12 | offset & 0xfff, data),
            // Where the registers were first, and wherever they are now.
            5..8 => drop(mmio.write(MMIO64 + u64::from(device & 1) * 0x8000 + offset, data)),
            8..11 => {
                let ranges = mmio.ranges();
                if let Some(range) = ranges.get(usize::from(device) % ranges.len().max(1)) {
                    mmio.write(range.start() + offset % 0x8000, data);
                }
            }
            11 => drop(mmio.read(MMIO64 + offset, data)),
            12 => ecam.write(u64::from(rid.0) << 12 | 0x04, &[7, 0]),
            13 => {
                let address = (MMIO32 as u32 + 0x8000 * u32::from(low % 4)).to_le_bytes();
                ecam.write(u64::from(rid.0) << 12 | 0x10, &address);
                ecam.write(u64::from(rid.0) << 12 | 0x14, &[0; 4]);
            }
            14 => root.reset(),
            _ => {
                if let Some(function) = root.function(rid) {
                    function
                        .bar_write(0, offset, data)
                        .decode
                        .then(|| root.reset());
                }
            }
        }
        let after: Vec<_> = root.rids().into_iter().map(&fixed).collect();
        assert!(before == after, "a read-only register changed");
        check(&root, &mmio, &doorbells);
    }
    // Nothing is left behind.
    for rid in root.rids() {
        drop(root.remove(rid).expect("it is there"));
    }
    assert!(mmio.ranges().is_empty() && doorbells.all().is_empty());
}

fn check(root: &PciRoot, mmio: &Bus, doorbells: &Doorbells) {
    let mut decoded = BTreeSet::new();
    for function in root.rids().into_iter().filter_map(|rid| root.function(rid)) {
        decoded.extend(function.decoded().iter().map(|d| (d.base, d.length)));
    }
    let mut bells = BTreeSet::new();
    for range in mmio.ranges() {
        let (base, length) = (*range.start(), range.end() - range.start() + 1);
        assert!(decoded.contains(&(base, length)), "a range nobody decodes");
        assert!(
            base >= MMIO32 && *range.end() <= 0x1f_ffff_ffff,
            "outside the windows"
        );
        bells.extend([base + 0x3000, base + 0x3004]);
    }
    assert!(
        bells == *doorbells.all(),
        "doorbells do not follow their registers"
    );
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn a_guest_that_accesses_anything_breaks_no_invariant(
            accesses in prop::collection::vec(any::<[u8; 8]>(), 0..80)
        ) {
            super::accesses(accesses.as_flattened());
        }
    }
}
