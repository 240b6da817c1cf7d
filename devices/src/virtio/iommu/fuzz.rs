//! Fuzz harness for the request and event queues: descriptors of any kind, in any order.

#![expect(clippy::unwrap_used, reason = "a fuzz harness reports by panicking")]

use std::sync::Arc;

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::backend::{Backend, Objects};
use viommu::dma::DmaPort;
use viommu::reserved::Regions;
use viommu::virtio::{Config, Iommu};
use viommu::{GuestRam, Rid};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioIommu;
use crate::virtio::device::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use crate::virtio::ring::{Ring, RingConfig};

const RAM: usize = 0x1_0000;
const ENDPOINT: Rid = Rid::new(0, 3, 0);
const REQUESTQ: RingConfig = RingConfig {
    size: 64,
    descriptors: 0,
    available: 0x400,
    used: 0x600,
};
const EVENTQ: RingConfig = RingConfig {
    size: 16,
    descriptors: 0x900,
    available: 0xa00,
    used: 0xb00,
};
/// Indirect tables, then bytes of requests, then what a device may write.
const TABLES: usize = 0x1000;
const REQUESTS: usize = 0x2000;
const WRITABLE: usize = 0x8000;
const NEXT: u8 = 1;
const WRITE: u8 = 2;
const INDIRECT: u8 = 4;

struct Deaf;

impl VirtioInterrupt for Deaf {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {}
}

/// Fills both rings as the bytes say, five for a descriptor, and kicks. The device may write the
/// used rings and what a device-writable descriptor names, and nothing else, whatever it is asked
/// for; and it holds nothing when it is gone.
///
/// # Panics
/// When an invariant does not hold.
pub fn rings(data: &[u8]) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let ram: GuestRam = Arc::new(ram);
    let engine = Arc::new(Engine::new(ram.clone()));
    let port = engine
        .add_endpoint(ENDPOINT, EndpointConfig::default())
        .unwrap();
    let config = Config::compose(&engine.capabilities(), 0).unwrap();
    let unit = Arc::new(Iommu::new(Config {
        probe_size: 64,
        ..config
    }));
    unit.add_endpoint(ENDPOINT, engine.clone(), Regions::new())
        .unwrap();
    let device = VirtioIommu::new(unit.clone());

    let mut image = vec![0; RAM];
    let mut may_write = vec![false; RAM];
    place_requests(&mut image, data);
    let mut input = data.iter().copied();
    let mut table = |image: &mut [u8], may_write: &mut [bool], at: usize, count: usize| {
        for n in 0..count {
            let bytes: [u8; 5] = std::array::from_fn(|_| input.next().unwrap_or(0));
            descriptor(image, may_write, at + 16 * n, n, bytes);
        }
    };
    for config in [REQUESTQ, EVENTQ] {
        let (at, size) = (config.descriptors as usize, usize::from(config.size));
        table(&mut image, &mut may_write, at, size);
    }
    table(&mut image, &mut may_write, TABLES, 32);
    for config in [REQUESTQ, EVENTQ] {
        let at = config.available as usize;
        let count = data.first().copied().unwrap_or(0) % config.size as u8;
        image[at + 2] = count;
        for n in 0..usize::from(count) {
            // Mostly the first half of a request.
            let byte = data.iter().rev().nth(n).copied().unwrap_or(0);
            image[at + 4 + 2 * n] = if byte >= 0xfc {
                byte % 66
            } else {
                byte % 32 * 2
            };
        }
        let used = config.used as usize;
        may_write[used..used + 6 + 8 * usize::from(config.size)].fill(true);
    }
    ram.write_slice(&image, GuestAddress(0)).unwrap();

    let dma = DmaPort::direct(ram.clone());
    let queue = |config| {
        let ring = Ring::new(config, false, true, &dma.access()).unwrap();
        let kick = Arc::new(EventFd::new(0).unwrap());
        Some(ActiveQueue { ring, kick })
    };
    let queues = vec![queue(REQUESTQ), queue(EVENTQ)];
    device
        .activate(Activation {
            features: device.features(),
            queues,
            dma: dma.clone(),
            interrupt: Arc::new(Deaf),
        })
        .unwrap();
    device.notify(0);
    // Something to report.
    for at in [0, 0x1234, u64::MAX - 8] {
        let _ = port.access().read_obj::<u8>(GuestAddress(at));
    }
    device.notify(1);
    device.notify(0);

    let mut after = vec![0; RAM];
    ram.read_slice(&mut after, GuestAddress(0)).unwrap();
    for (at, (now, before)) in after.iter().zip(&image).enumerate() {
        assert!(now == before || may_write[at], "{at:#x} was written");
    }
    device.reset();
    let objects = engine.objects();
    assert_eq!(
        (objects.domains, objects.mappings, objects.targets),
        (0, 0, 0)
    );
    drop((device, unit));
    assert_eq!(engine.objects(), Objects::default());
}

/// Five bytes of input as descriptor `n` of a table: by itself the readable or the writable half
/// of a request, with bytes of 0xe0 and above something else. Device-writable ones point to where
/// nothing else is, or out of memory, so that what a device is told does not change while it
/// works.
fn descriptor(image: &mut [u8], may_write: &mut [bool], at: usize, n: usize, bytes: [u8; 5]) {
    let [address, length, flags, next, far] = bytes;
    let odd = |byte: u8| byte >= 0xe0;
    let flags = match (odd(flags), n % 2) {
        (true, _) => flags % 8,
        (_, 0) => NEXT,
        _ => WRITE,
    };
    let length = match (odd(length), flags & (WRITE | INDIRECT)) {
        (true, 0) => u32::from(length % 80),
        (_, 0) => 72,
        (true, WRITE) => u32::from(length % 16) * 8,
        (_, WRITE) => 4,
        (true, _) => u32::from(length % 13) * 8,
        _ => 32,
    };
    let length = if far == 0xff {
        u32::MAX - length
    } else {
        length
    };
    let place = if flags & INDIRECT != 0 {
        TABLES + usize::from(address % 16) * 32
    } else if flags & WRITE != 0 {
        WRITABLE + usize::from(address) * 0x79
    } else {
        REQUESTS + usize::from(address) * 0x60
    };
    let place = if far == 0xfe {
        u64::MAX - u64::from(address)
    } else {
        place as u64
    };
    image[at..at + 8].copy_from_slice(&place.to_le_bytes());
    image[at + 8..at + 12].copy_from_slice(&length.to_le_bytes());
    image[at + 12] = flags;
    image[at + 14] = if odd(next) { next % 66 } else { n as u8 + 1 };
    if flags & WRITE != 0 && place < RAM as u64 {
        let end = (place + u64::from(length)).min(RAM as u64);
        may_write[place as usize..end as usize].fill(true);
    }
}

/// Requests that are in order, so that some chains do something, with some bytes of the input.
fn place_requests(image: &mut [u8], data: &[u8]) {
    for (n, room) in image[REQUESTS..WRITABLE].chunks_exact_mut(0x60).enumerate() {
        let n = n as u8;
        room[0] = n % 6;
        // Domain 1 for all but PROBE, whose endpoint is here.
        room[4] = if room[0] == 5 { ENDPOINT.0 as u8 } else { 1 };
        match room[0] {
            1 | 2 => room[8] = ENDPOINT.0 as u8,
            3 | 4 => {
                room[9] = 0x10 * (n % 8);
                (room[16], room[17]) = (0xff, 0x0f + 0x10 * (n % 8));
                room[32] = if room[0] == 3 { 3 } else { 0 };
            }
            _ => {}
        }
        if let Some(&byte) = data.get(usize::from(n) * 3)
            && byte >= 0xf0
        {
            room[usize::from(byte) % 36] ^= 1 << (byte % 8);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Mostly what keeps a chain in order.
    fn byte() -> impl Strategy<Value = u8> {
        prop_oneof![20 => 0u8..0xe0, 1 => any::<u8>()]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn a_device_writes_only_where_a_descriptor_lets_it(
            data in prop::collection::vec(byte(), 0..600),
        ) {
            rings(&data);
        }
    }
}
