//! Cost of virtio-iommu requests through split rings in guest memory: from the kick to the used
//! ring, with a back end that does nothing.
//!
//! `cargo bench -p devices --bench virtio_iommu`. Each line is beside the same requests given to
//! the unit as bytes, without rings (`viommu`'s own bench splits that further); read the ratios.
//! What reading the clock takes is measured in the same run and taken off.
//! Pages of a batch are neighbours, as those of one buffer of a driver are.

#[path = "../../viommu/benches/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::Duration;

use devices::virtio::ring::{Ring, RingConfig};
use devices::virtio::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt, VirtioIommu};
use viommu::GuestRam;
use viommu::backend::Backend;
use viommu::dma::DmaPort;
use viommu::reserved::Regions;
use viommu::virtio::{Chain, Config, Iommu, Reply};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use common::{ENDPOINT, Nothing, RUN, Random, attach, each, map, median, place, unmap};

/// Interrupts that nobody hears.
struct Deaf;

impl VirtioInterrupt for Deaf {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {
        unreachable!("the driver is right");
    }
}

const QUEUE: u16 = 256;
const RING: RingConfig = RingConfig {
    size: QUEUE,
    descriptors: 0x1000,
    available: 0x3000,
    used: 0x4000,
};
/// Where the requests of a batch are, 128 bytes for each.
const BUFFERS: u64 = 0x1_0000;
/// A unit in a VM, and its driver.
struct Machine {
    ram: GuestRam,
    unit: Arc<Iommu>,
    device: Arc<VirtioIommu>,
    available: u16,
    clock: Duration,
    replies: Vec<Reply>,
}

type Failure = Box<dyn std::error::Error>;

impl Machine {
    fn new(live: u64, page: u64) -> Result<Self, Failure> {
        let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
        let config = Config::compose(&Nothing.capabilities(), 0)?;
        let unit = Arc::new(Iommu::new(Config {
            domain_mappings: 1 << 22,
            mappings: 1 << 22,
            ..config
        }));
        unit.add_endpoint(ENDPOINT, Arc::new(Nothing), Regions::new())?;
        let device = VirtioIommu::new(unit.clone());
        let dma = DmaPort::direct(ram.clone());
        let ring = Ring::new(RING, false, false, &dma.access()).ok_or("no ring")?;
        let kick = Arc::new(EventFd::new(0)?);
        device.activate(Activation {
            features: device.features(),
            queues: vec![Some(ActiveQueue { ring, kick }), None],
            dma,
            interrupt: Arc::new(Deaf),
        })?;
        let mut machine = Self {
            ram,
            unit,
            device,
            available: 0,
            clock: common::clock(),
            replies: Vec::with_capacity(128),
        };
        // Descriptors never change: request n has 2n and 2n + 1.
        for n in 0..u64::from(QUEUE / 2) {
            let at = BUFFERS + n * 128;
            machine.descriptor(2 * n, at, 36, 1)?;
            machine.descriptor(2 * n + 1, at + 64, 4, 2)?;
        }
        machine.prepare(&[attach()])?;
        machine.device.notify(0);
        machine.check(1)?;
        let requests: Vec<_> = (0..live).map(|n| map(place(n, page), page)).collect();
        for batch in requests.chunks(128) {
            machine.prepare(batch)?;
            machine.device.notify(0);
            machine.check(batch.len())?;
        }
        Ok(machine)
    }

    fn descriptor(&self, index: u64, at: u64, length: u32, flags: u16) -> Result<(), Failure> {
        let bytes = [
            &at.to_le_bytes()[..],
            &length.to_le_bytes(),
            &flags.to_le_bytes(),
            &(index as u16 + 1).to_le_bytes(),
        ];
        let entry = GuestAddress(RING.descriptors + 16 * index);
        Ok(self.ram.write_slice(&bytes.concat(), entry)?)
    }

    /// Makes requests available, without a kick.
    fn prepare(&mut self, requests: &[Vec<u8>]) -> Result<(), Failure> {
        for (n, request) in (0u16..).zip(requests) {
            let at = BUFFERS + u64::from(n) * 128;
            self.ram.write_slice(request, GuestAddress(at))?;
            self.ram.write_obj(!0u32, GuestAddress(at + 64))?;
            let slot = u64::from(self.available % QUEUE);
            let entry = GuestAddress(RING.available + 4 + 2 * slot);
            self.ram.write_obj(2 * n, entry)?;
            self.available = self.available.wrapping_add(1);
        }
        let index = GuestAddress(RING.available + 2);
        Ok(self.ram.write_obj(self.available, index)?)
    }

    /// All of a batch has to be answered with OK.
    fn check(&self, count: usize) -> Result<(), Failure> {
        for n in 0..count as u64 {
            let tail: u32 = self.ram.read_obj(GuestAddress(BUFFERS + n * 128 + 64))?;
            if tail != 0 {
                return Err(format!("request {n} was answered with {tail:#x}").into());
            }
        }
        Ok(())
    }

    fn kick(&mut self, requests: &[Vec<u8>]) -> Result<Duration, Failure> {
        self.prepare(requests)?;
        let took = common::time(self.clock, || self.device.notify(0));
        self.check(requests.len())?;
        Ok(took)
    }

    fn direct(&mut self, requests: &[Vec<u8>]) -> Duration {
        let chains = requests.iter().map(|readable| Chain {
            readable,
            writable: 4,
        });
        common::time(self.clock, || self.unit.serve(chains, &mut self.replies))
    }
}

fn line(live: u64, page: u64, batch: u64) -> Result<(), Failure> {
    let mut machine = Machine::new(live, page)?;
    let runs = (live / RUN).max(1);
    let mut random = Random(1);
    let mut times: [Vec<Duration>; 4] = Default::default();
    let rounds = (40_000 / batch).clamp(300, 4000);
    let mut allocations = 0;
    for round in 0..rounds {
        let start = (1 << 32) + (random.below(runs) * 2 + 1) * RUN * page;
        let pages = (0..batch).map(|n| start + n * page);
        let maps: Vec<_> = pages.clone().map(|first| map(first, page)).collect();
        let unmaps: Vec<_> = pages.map(|first| unmap(first, page)).collect();
        let before = common::allocations();
        let ring = (machine.kick(&maps)?, machine.kick(&unmaps)?);
        if round > rounds / 2 {
            allocations += common::allocations() - before;
        }
        let direct = (machine.direct(&maps), machine.direct(&unmaps));
        for (times, time) in times.iter_mut().zip([ring.0, ring.1, direct.0, direct.1]) {
            times.push(time);
        }
    }
    let [map, unmap, direct_map, direct_unmap] = times.map(|times| each(median(times), batch));
    println!(
        "{live:>8} live {:>4} KiB  batch {batch:>3}  map {map:>6.1} ns ({:.2} of direct)  unmap {unmap:>6.1} ns ({:.2} of direct)  {:.3} allocations per request",
        page >> 10,
        map / direct_map,
        unmap / direct_unmap,
        allocations as f64 / (rounds / 2 * batch * 2) as f64,
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    // `cargo test --benches` only has to know that it runs.
    let quick = std::env::args().any(|argument| argument == "--test");
    let live: &[u64] = if quick {
        &[0, 1 << 12]
    } else {
        &[0, 1 << 16, 1 << 20]
    };
    for &live in live {
        for page in [4096, 2 << 20] {
            for batch in [1, 16, 128] {
                line(live, page, batch)?;
            }
        }
    }
    Ok(())
}
