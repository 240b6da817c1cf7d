//! Cost of virtio-iommu requests through split rings in guest memory: from the kick to the used
//! ring, with a back end that does nothing.
//!
//! `cargo bench -p devices --bench virtio_iommu`. Each line is beside the same requests given to
//! the unit as bytes, without rings (`viommu`'s own bench splits that further); read the ratios.
//! Pages of a batch are neighbours, as those of one buffer of a driver are.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use devices::virtio::ring::{Ring, RingConfig};
use devices::virtio::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt, VirtioIommu};
use viommu::backend::{
    Backend, Capabilities, EventSink, Invalidation, Mapping, Objects, PageResponse, Refused,
    Translation,
};
use viommu::dma::DmaPort;
use viommu::reserved::Regions;
use viommu::spec::virtio_iommu::{ReqAttach, ReqHead, ReqMap, ReqUnmap, req_type};
use viommu::virtio::{Chain, Config, Iommu};
use viommu::{DomainId, GuestRam, Iova, Rid, Target};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

/// Counts what is allocated.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call to the system's allocator as it is; the counter allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A back end that does nothing.
struct Nothing;

impl Backend for Nothing {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            stage1: false,
            stage1_57: false,
            stage1_1g: false,
            sre: false,
            eafe: false,
            stage2: [false; 3],
            nested: false,
            pasid_bits: 0,
            page_requests: false,
            address_width: 57,
            page_sizes: 0x4020_1000,
            snoop_control: false,
        }
    }
    fn claim(&self, _: Rid, _: Arc<dyn EventSink>) -> Result<(), Refused> {
        Ok(())
    }
    fn release(&self, _: Rid) {}
    fn apply(&self, _: Target, _: Translation) -> Result<(), Refused> {
        Ok(())
    }
    fn translation(&self, _: Target) -> Translation {
        Translation::Blocked
    }
    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        batch.len()
    }
    fn respond(&self, _: PageResponse) {}
    fn create_domain(&self) -> Result<DomainId, Refused> {
        Ok(DomainId(1))
    }
    fn destroy_domain(&self, _: DomainId) {}
    fn map(&self, _: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        black_box(mappings);
        Ok(())
    }
    fn unmap(&self, _: DomainId, _: Iova, _: Iova) -> Result<u64, Refused> {
        Ok(0)
    }
    fn objects(&self) -> Objects {
        Objects::default()
    }
}

/// Interrupts that nobody hears.
struct Deaf;

impl VirtioInterrupt for Deaf {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self) {
        unreachable!("the driver is right");
    }
}

const ENDPOINT: Rid = Rid::new(0, 1, 0);
const QUEUE: u16 = 256;
const RING: RingConfig = RingConfig {
    size: QUEUE,
    descriptors: 0x1000,
    available: 0x3000,
    used: 0x4000,
};
/// Where the requests of a batch are, 128 bytes for each.
const BUFFERS: u64 = 0x1_0000;
/// Live mappings lie in runs of this many pages, with as long a hole behind each.
const RUN: u64 = 128;

fn head(r#type: u8) -> ReqHead {
    ReqHead {
        r#type,
        reserved: [0; 3],
    }
}

fn map(first: u64, length: u64) -> Vec<u8> {
    let request = ReqMap {
        head: head(req_type::MAP),
        domain: 1.into(),
        virt_start: first.into(),
        virt_end: (first + length - 1).into(),
        phys_start: (1 << 32).into(),
        flags: 3.into(),
    };
    request.as_bytes().to_vec()
}

fn unmap(first: u64, length: u64) -> Vec<u8> {
    let request = ReqUnmap {
        head: head(req_type::UNMAP),
        domain: 1.into(),
        virt_start: first.into(),
        virt_end: (first + length - 1).into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

/// A unit in a VM, and its driver.
struct Machine {
    ram: GuestRam,
    unit: Arc<Iommu>,
    device: Arc<VirtioIommu>,
    available: u16,
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
        };
        // Descriptors never change: request n has 2n and 2n + 1.
        for n in 0..u64::from(QUEUE / 2) {
            let at = BUFFERS + n * 128;
            machine.descriptor(2 * n, at, 36, 1)?;
            machine.descriptor(2 * n + 1, at + 64, 4, 2)?;
        }
        let attach = ReqAttach {
            head: head(req_type::ATTACH),
            domain: 1.into(),
            endpoint: u32::from(ENDPOINT.0).into(),
            flags: 0.into(),
            reserved: [0; 4],
        };
        machine.prepare(&[attach.as_bytes().to_vec()])?;
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
        let start = Instant::now();
        self.device.notify(0);
        let took = start.elapsed();
        self.check(requests.len())?;
        Ok(took / requests.len() as u32)
    }

    fn direct(&self, requests: &[Vec<u8>]) -> Duration {
        let mut replies = Vec::with_capacity(128);
        let start = Instant::now();
        self.unit.serve(
            requests.iter().map(|readable| Chain {
                readable,
                writable: 4,
            }),
            &mut replies,
        );
        start.elapsed() / requests.len() as u32
    }
}

/// Addresses of the live mappings: from 4 GiB, above the interrupt window.
fn place(n: u64, page: u64) -> u64 {
    (1 << 32) + (n / RUN * 2 * RUN + n % RUN) * page
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64
}

fn line(live: u64, page: u64, batch: u64) -> Result<(), Failure> {
    let mut machine = Machine::new(live, page)?;
    let runs = (live / RUN).max(1);
    let mut random = 1u64;
    let mut times: [Vec<Duration>; 4] = Default::default();
    let rounds = (40_000 / batch).clamp(300, 4000);
    let mut allocations = 0;
    for round in 0..rounds {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let start = (1 << 32) + ((random >> 33) % runs * 2 + 1) * RUN * page;
        let pages = (0..batch).map(|n| start + n * page);
        let maps: Vec<_> = pages.clone().map(|first| map(first, page)).collect();
        let unmaps: Vec<_> = pages.map(|first| unmap(first, page)).collect();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let ring = (machine.kick(&maps)?, machine.kick(&unmaps)?);
        if round > rounds / 2 {
            allocations += ALLOCATIONS.load(Ordering::Relaxed) - before;
        }
        let direct = (machine.direct(&maps), machine.direct(&unmaps));
        for (times, time) in times.iter_mut().zip([ring.0, ring.1, direct.0, direct.1]) {
            times.push(time);
        }
    }
    let [map, unmap, direct_map, direct_unmap] = times.map(median);
    println!(
        "{live:>8} live {:>4} KiB  batch {batch:>3}  map {map:>5.0} ns ({:.2} of direct)  unmap {unmap:>5.0} ns ({:.2} of direct)  {:.3} allocations per request",
        page >> 10,
        map / direct_map.max(1.0),
        unmap / direct_unmap.max(1.0),
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
