//! Cost of virtio-iommu requests, from the bytes of a request to a back end that does nothing.
//!
//! `cargo bench -p viommu --bench virtio_iommu`. Each line is measured beside its floor: a plain
//! `BTreeMap` that does the same insertions (with the check for overlaps) and removals, without
//! requests, statuses or a back end. Figures are medians over rounds; read the ratios, since a
//! machine's own speed is in both. *near* is a batch of neighbouring pages (one buffer of a
//! driver), *far* is each page in a place of its own.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use viommu::backend::{
    Backend, Capabilities, EventSink, Invalidation, Mapping, Objects, PageResponse, Refused,
    Translation,
};
use viommu::reserved::Regions;
use viommu::spec::virtio_iommu::{ReqAttach, ReqDetach, ReqHead, ReqMap, ReqUnmap, req_type};
use viommu::virtio::{Chain, Config, Iommu, Reply};
use viommu::{DomainId, Iova, Rid, Target};
use zerocopy::IntoBytes;

/// Counts what is allocated.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call to the system's allocator as it is; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
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

const ENDPOINT: Rid = Rid::new(0, 1, 0);
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

fn attach() -> Vec<u8> {
    let request = ReqAttach {
        head: head(req_type::ATTACH),
        domain: 1.into(),
        endpoint: u32::from(ENDPOINT.0).into(),
        flags: 0.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

fn detach() -> Vec<u8> {
    let request = ReqDetach {
        head: head(req_type::DETACH),
        domain: 1.into(),
        endpoint: u32::from(ENDPOINT.0).into(),
        reserved: [0; 8],
    };
    request.as_bytes().to_vec()
}

/// A unit with `live` mappings of `page` bytes.
fn unit(live: u64, page: u64) -> Iommu {
    let Ok(config) = Config::compose(&Nothing.capabilities(), 0) else {
        unreachable!("the capabilities are fixed");
    };
    let unit = Iommu::new(Config {
        domain_mappings: 1 << 22,
        mappings: 1 << 22,
        ..config
    });
    unit.set_features(u64::MAX);
    if let Err(error) = unit.add_endpoint(ENDPOINT, Arc::new(Nothing), Regions::new()) {
        unreachable!("{error}");
    }
    serve(&unit, &[attach()], &mut Vec::new());
    fill(&unit, live, page);
    unit
}

/// Addresses of the live mappings: from 4 GiB, above the interrupt window.
fn place(n: u64, page: u64) -> u64 {
    (1 << 32) + (n / RUN * 2 * RUN + n % RUN) * page
}

fn fill(unit: &Iommu, live: u64, page: u64) {
    let requests: Vec<_> = (0..live).map(|n| map(place(n, page), page)).collect();
    for batch in requests.chunks(128) {
        serve(unit, batch, &mut Vec::new());
    }
}

fn serve(unit: &Iommu, requests: &[Vec<u8>], replies: &mut Vec<Reply>) {
    unit.serve(
        requests.iter().map(|readable| Chain {
            readable,
            writable: 4,
        }),
        replies,
    );
    assert!(
        replies.iter().all(|reply| reply.status() == Some(0)),
        "a request failed"
    );
}

/// The floor: what a plain map takes for the same.
#[derive(Default)]
struct Floor(BTreeMap<u64, (u64, u64)>);

impl Floor {
    fn map(&mut self, first: u64, length: u64) {
        let last = first + length - 1;
        let before = self.0.range(..=last).next_back();
        if before.is_none_or(|(_, &(end, _))| end < first) {
            self.0.insert(first, (last, 1 << 32));
        }
    }

    fn unmap(&mut self, first: u64) {
        self.0.remove(&first);
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit.max(1)
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64
}

/// One line: `batch` MAPs and then their UNMAPs, over and over in different places.
fn line(live: u64, page: u64, batch: u64, near: bool) {
    let unit = unit(live, page);
    let mut floor = Floor::default();
    for n in 0..live {
        floor.map(place(n, page), page);
    }
    let runs = (live / RUN).max(1);
    let hole = |random: &mut Random| (1 << 32) + (random.below(runs) * 2 + 1) * RUN * page;
    let mut random = Random(1);
    let mut times: [Vec<Duration>; 4] = Default::default();
    let mut allocations = 0;
    let mut replies = Vec::with_capacity(batch as usize);
    let rounds = (40_000 / batch).clamp(300, 4000);
    for round in 0..rounds {
        let start = hole(&mut random);
        let mut places: Vec<u64> = match near {
            true => (0..batch).map(|n| start + n * page).collect(),
            false => (0..batch)
                .map(|_| hole(&mut random) + random.below(RUN) * page)
                .collect(),
        };
        if !near {
            places.sort_unstable();
            places.dedup();
            // In no order.
            for n in (1..places.len()).rev() {
                places.swap(n, random.below(n as u64 + 1) as usize);
            }
        }
        let maps: Vec<_> = places.iter().map(|&p| map(p, page)).collect();
        let unmaps: Vec<_> = places.iter().map(|&p| unmap(p, page)).collect();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let t0 = Instant::now();
        serve(&unit, &maps, &mut replies);
        let t1 = Instant::now();
        serve(&unit, &unmaps, &mut replies);
        let t2 = Instant::now();
        if round > rounds / 2 {
            allocations += ALLOCATIONS.load(Ordering::Relaxed) - before;
        }
        for &p in &places {
            floor.map(p, page);
        }
        let t3 = Instant::now();
        for &p in &places {
            floor.unmap(p);
        }
        let t4 = Instant::now();
        let count = places.len() as u32;
        for (times, time) in times.iter_mut().zip([t1 - t0, t2 - t1, t3 - t2, t4 - t3]) {
            times.push(time / count);
        }
    }
    let [map, unmap, floor_map, floor_unmap] = times.map(median);
    println!(
        "{:>8} live {:>4} KiB  batch {batch:>3} {:<4}  map {map:>5.0} ns ({:.2} of floor)  unmap {unmap:>5.0} ns ({:.2} of floor)  {:.3} allocations per request",
        live,
        page >> 10,
        if near { "near" } else { "far" },
        map / floor_map.max(1.0),
        unmap / floor_unmap.max(1.0),
        allocations as f64 / (rounds / 2 * batch * 2) as f64,
    );
}

/// A full domain: bytes per mapping, and how long it takes to take it down.
fn teardown(live: u64) {
    for by_detach in [false, true] {
        let before = LIVE.load(Ordering::Relaxed);
        let unit = unit(0, 4096);
        let empty = LIVE.load(Ordering::Relaxed);
        let mut at = Random(7);
        let mut order: Vec<u64> = (0..live).collect();
        for n in (1..order.len()).rev() {
            order.swap(n, at.below(n as u64 + 1) as usize);
        }
        let with_order = LIVE.load(Ordering::Relaxed);
        for chunk in order.chunks(128) {
            let batch: Vec<_> = chunk.iter().map(|&n| map(place(n, 4096), 4096)).collect();
            serve(&unit, &batch, &mut Vec::new());
        }
        let random = LIVE.load(Ordering::Relaxed) - with_order;
        serve(&unit, &[unmap(0, 1 << 57)], &mut Vec::new());
        drop(order);
        let left = LIVE.load(Ordering::Relaxed).saturating_sub(empty);
        fill(&unit, live, 4096);
        let ordered = LIVE.load(Ordering::Relaxed) - empty;
        let request = if by_detach {
            detach()
        } else {
            unmap(0, 1 << 57)
        };
        let start = Instant::now();
        serve(&unit, &[request], &mut Vec::new());
        let took = start.elapsed();
        println!(
            "{live} live: {} in {:.2} ms; bytes per mapping {:.1} in order, {:.1} at random; {left} bytes kept after removal",
            if by_detach {
                "DETACH"
            } else {
                "UNMAP of everything"
            },
            took.as_secs_f64() * 1e3,
            ordered as f64 / live as f64,
            random as f64 / live as f64,
        );
        drop(unit);
        assert!(LIVE.load(Ordering::Relaxed) <= before, "memory was lost");
    }
}

fn main() {
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
                for near in [true, false] {
                    line(live, page, batch, near);
                }
            }
        }
    }
    teardown(if quick { 1 << 12 } else { 1 << 20 });
}
