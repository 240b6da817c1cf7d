//! Cost of virtio-iommu requests, from the bytes of a request to a back end that does nothing.
//!
//! `cargo bench -p viommu --bench virtio_iommu`. Each line is measured beside its floor: a plain
//! `BTreeMap` that does the same insertions (with the check for overlaps) and removals, without
//! requests, statuses or a back end. Figures are medians over rounds; read the ratios, since a
//! machine's own speed is in both. *near* is a batch of neighbouring pages (one buffer of a
//! driver), *far* is each page in a place of its own. At random places every store waits for
//! memory: what one wait takes is measured too, in as much memory as the mappings take.

#[path = "common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::backend::Backend;
use viommu::backend::software::{self, EndpointConfig, Engine};
use viommu::reserved::Regions;
use viommu::virtio::{Chain, Config, Iommu, Reply};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use common::{ENDPOINT, Nothing, RUN, Random, attach, detach, map, map_to, median, place, unmap};

/// A unit with `live` mappings of `page` bytes.
fn unit(live: u64, page: u64) -> Iommu {
    let unit = unit_with(Arc::new(Nothing));
    fill(&unit, live, page);
    unit
}

/// A unit with its endpoint attached.
fn unit_with(backend: Arc<dyn Backend>) -> Iommu {
    let Ok(config) = Config::compose(&Nothing.capabilities(), 0) else {
        unreachable!("the capabilities are fixed");
    };
    let unit = Iommu::new(Config {
        domain_mappings: 1 << 22,
        mappings: 1 << 22,
        ..config
    });
    unit.set_features(u64::MAX);
    if let Err(error) = unit.add_endpoint(ENDPOINT, backend, Regions::new()) {
        unreachable!("{error}");
    }
    serve(&unit, &[attach()], &mut Vec::new());
    unit
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

/// Nanoseconds that a load takes which needs the one before, at random places of `bytes`.
fn memory_latency(bytes: u64) -> f64 {
    const LINE: usize = 8;
    let lines = ((bytes / 64) as usize).max(64);
    let mut order: Vec<usize> = (0..lines).collect();
    let mut random = Random(3);
    for n in (1..lines).rev() {
        order.swap(n, random.below(n as u64 + 1) as usize);
    }
    let mut chain = vec![0usize; lines * LINE];
    for (n, &at) in order.iter().enumerate() {
        chain[at * LINE] = order[(n + 1) % lines] * LINE;
    }
    let loads = 20_000;
    let mut at = 0;
    let times = (0..41).map(|_| {
        let start = Instant::now();
        for _ in 0..loads {
            at = std::hint::black_box(chain[at]);
        }
        start.elapsed()
    });
    common::each(median(times.collect()), loads)
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
        let before = common::allocations();
        let t0 = Instant::now();
        serve(&unit, &maps, &mut replies);
        let t1 = Instant::now();
        serve(&unit, &unmaps, &mut replies);
        let t2 = Instant::now();
        if round > rounds / 2 {
            allocations += common::allocations() - before;
        }
        for &p in &places {
            floor.map(p, page);
        }
        let t3 = Instant::now();
        for &p in &places {
            floor.unmap(p);
        }
        let t4 = Instant::now();
        let took = [t1 - t0, t2 - t1, t3 - t2, t4 - t3];
        for (times, time) in times.iter_mut().zip(took) {
            times.push(time);
        }
    }
    let clock = common::clock() / 2;
    let [map, unmap, floor_map, floor_unmap] =
        times.map(|times| common::each(median(times).saturating_sub(clock), batch));
    println!(
        "{:>8} live {:>4} KiB  batch {batch:>3} {:<4}  map {map:>6.1} ns ({:.2} of floor)  unmap {unmap:>6.1} ns ({:.2} of floor)  {:.3} allocations per request",
        live,
        page >> 10,
        if near { "near" } else { "far" },
        map / floor_map,
        unmap / floor_unmap,
        allocations as f64 / (rounds / 2 * batch * 2) as f64,
    );
}

/// A full domain: bytes per mapping, and how long it takes to take it down.
fn teardown(live: u64) {
    for by_detach in [false, true] {
        let before = common::live_bytes();
        let unit = unit(0, 4096);
        let empty = common::live_bytes();
        let mut at = Random(7);
        let mut order: Vec<u64> = (0..live).collect();
        for n in (1..order.len()).rev() {
            order.swap(n, at.below(n as u64 + 1) as usize);
        }
        let with_order = common::live_bytes();
        for chunk in order.chunks(128) {
            let batch: Vec<_> = chunk.iter().map(|&n| map(place(n, 4096), 4096)).collect();
            serve(&unit, &batch, &mut Vec::new());
        }
        let random = common::live_bytes() - with_order;
        serve(&unit, &[unmap(0, 1 << 57)], &mut Vec::new());
        drop(order);
        let left = common::live_bytes().saturating_sub(empty);
        fill(&unit, live, 4096);
        let ordered = common::live_bytes() - empty;
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
        assert!(common::live_bytes() <= before, "memory was lost");
    }
}

/// The same with the software engine behind it.
fn teardown_with_engine(live: u64) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]);
    let Ok(ram) = ram else {
        unreachable!("two MiB can be had")
    };
    for by_detach in [false, true] {
        let limits = software::Config {
            mappings: 1 << 22,
            ..software::Config::for_ram(&ram)
        };
        let engine = Engine::with_config(Arc::new(ram.clone()), limits);
        let _port = engine.add_endpoint(ENDPOINT, EndpointConfig::default());
        let unit = unit_with(Arc::new(engine));
        // All of them lead to the same page: only their number counts.
        let requests: Vec<_> = (0..live).map(|n| map_to(place(n, 4096), 4096, 0)).collect();
        for batch in requests.chunks(128) {
            serve(&unit, batch, &mut Vec::new());
        }
        let (name, request) = match by_detach {
            true => ("DETACH", detach()),
            false => ("UNMAP of everything", unmap(0, 1 << 57)),
        };
        let start = common::cpu_time();
        serve(&unit, &[request], &mut Vec::new());
        let took = common::cpu_time() - start;
        println!(
            "{live} live, software engine: {name} in {:.2} ms of the thread's own time",
            took.as_secs_f64() * 1e3,
        );
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
        println!(
            "{live:>8} live: a load at a random place of their {} KiB takes {:.1} ns",
            (live * 16) >> 10,
            memory_latency(live * 16)
        );
        for page in [4096, 2 << 20] {
            for batch in [1, 16, 128] {
                for near in [true, false] {
                    line(live, page, batch, near);
                }
            }
        }
    }
    let live = if quick { 1 << 12 } else { 1 << 20 };
    teardown(live);
    teardown_with_engine(live);
}
