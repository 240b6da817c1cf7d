//! Queued invalidation through the register file: nanoseconds per descriptor by type, with a back
//! end that does nothing, against reading and decoding the same descriptors alone; and a lone
//! doorbell, with the software engine too, whose cache is full each time.
//!
//! What reading the clock takes is measured in the same run and taken off. Ratios are what to
//! compare; a figure by itself says as much about the machine. What takes milliseconds is told in
//! the thread's own time, without what others ran meanwhile.

#[path = "common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::backend::{Access, Backend};
use viommu::dma::DmaPort;
use viommu::interrupt::{Msi, MsiSink};
use viommu::spec::vtd::descriptor::{Offered, decode};
use viommu::spec::vtd::registers as offset;
use viommu::vtd::{Connections, Unit, UnitConfig};
use viommu::{GuestRam, Iova, Rid};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use common::Nothing;

const RAM: usize = 64 << 20;
const ROOT: u64 = 0x1000;
const CONTEXTS: u64 = 0x2000;
const STATUS: u64 = 0x3000;
/// The queue: 2^3 pages of 256-bit descriptors.
const QUEUE: u64 = 0x1_0000;
const QUEUE_SIZE: u64 = 8 << 12;
const DIRECTORY: u64 = 0x10_0000;
const TABLES: u64 = 0x20_0000;
const NIC: Rid = Rid::new(0, 3, 0);
/// First-stage tables for [`PAGES`] pages: root, one table per level below, and the leaves.
const STAGE1: u64 = 0x200_0000;
/// Twice what the software engine's cache holds.
const PAGES: u64 = 4096;
const ROUNDS: usize = 15;
/// How long a figure is measured, when it has had [`ROUNDS`] samples.
const LONGEST: Duration = Duration::from_secs(1);

/// Interrupts that nobody hears.
struct Deaf;

impl MsiSink for Deaf {
    fn send(&self, _: Msi) {}
}

struct Guest {
    unit: Arc<Unit>,
    ram: GuestRam,
    tail: u64,
    /// Doorbells so far.
    rung: u32,
    /// Nanoseconds that reading the clock twice takes.
    clock: f64,
}

/// The two quadwords of the descriptor with a number.
type Make = Box<dyn Fn(u64) -> (u64, u64)>;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

impl Guest {
    /// A scalable-mode guest whose NIC has `pasids` PASIDs from 0 up, each in its own domain.
    fn new(pasids: u64) -> Outcome<Self> {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)])?);
        Self::with_backend(pasids, ram, Arc::new(Nothing))
    }

    fn with_backend(pasids: u64, ram: GuestRam, backend: Arc<dyn Backend>) -> Outcome<Self> {
        let connections = Connections {
            ram: Arc::clone(&ram),
            msi: Arc::new(Deaf),
            backends: vec![],
            remapper: None,
            pasids: None,
        };
        let unit = Unit::new(UnitConfig::default(), connections)?;
        unit.add_endpoint(NIC, backend)?;
        let clock = (0..ROUNDS * 64).map(|_| Instant::now().elapsed().as_nanos() as f64);
        let guest = Self {
            unit,
            ram,
            tail: 0,
            rung: 0,
            clock: median(clock.collect()),
        };
        for level in 0..3 {
            guest.poke(STAGE1 + level * 4096, (STAGE1 + (level + 1) * 4096) | 0x67)?;
        }
        for page in 0..PAGES {
            let leaves = STAGE1 + 3 * 4096;
            guest.poke(
                STAGE1 + 2 * 4096 + page / 512 * 8,
                (leaves + page / 512 * 4096) | 0x67,
            )?;
            guest.poke(leaves + page * 8, page << 12 | 0x67)?;
        }
        guest.poke(ROOT, CONTEXTS | 1)?;
        // 2^14 directory entries, PASIDE, present.
        guest.poke(
            CONTEXTS + u64::from(NIC.devfn()) * 32,
            DIRECTORY | 7 << 9 | 9,
        )?;
        for pasid in 0..pasids {
            guest.entry(pasid, true)?;
        }
        guest.w64(offset::RTADDR, ROOT | 1 << 10);
        guest.w64(offset::IQA, QUEUE | 1 << 11 | 3);
        guest.w32(offset::GCMD, 1 << 26);
        guest.w32(offset::GCMD, 1 << 26 | 1 << 30);
        guest.w32(offset::GCMD, 1 << 26 | 1 << 31);
        Ok(guest)
    }

    fn poke(&self, at: u64, word: u64) -> Outcome {
        Ok(self.ram.write_obj(word, GuestAddress(at))?)
    }

    fn w32(&self, at: u64, value: u32) {
        self.unit.write(at, &value.to_le_bytes());
    }

    fn w64(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    fn enqueue(&mut self, low: u64, high: u64) -> Outcome {
        self.poke(QUEUE + self.tail, low)?;
        self.poke(QUEUE + self.tail + 8, high)?;
        self.tail = (self.tail + 32) % QUEUE_SIZE;
        Ok(())
    }

    /// Nanoseconds for one doorbell of `count` descriptors and a wait: the median of rounds.
    fn doorbell(&mut self, count: u64, descriptor: impl Fn(u64) -> (u64, u64)) -> Outcome<f64> {
        self.doorbell_after(|| {}, count, descriptor)
    }

    /// As [`doorbell`](Self::doorbell), with something that is done before each.
    fn doorbell_after(
        &mut self,
        mut before: impl FnMut(),
        count: u64,
        descriptor: impl Fn(u64) -> (u64, u64),
    ) -> Outcome<f64> {
        let mut times = Vec::new();
        let end = Instant::now() + LONGEST;
        while times.len() < ROUNDS * 64 && (times.len() < ROUNDS || Instant::now() < end) {
            before();
            times.push(self.once(count, &descriptor)?);
        }
        Ok(median(times))
    }

    /// Nanoseconds for one doorbell.
    fn once(&mut self, count: u64, descriptor: impl Fn(u64) -> (u64, u64)) -> Outcome<f64> {
        for index in 0..count {
            let (low, high) = descriptor(index);
            self.enqueue(low, high)?;
        }
        self.rung += 1;
        self.enqueue(5 | 1 << 5 | u64::from(self.rung) << 32, STATUS)?;
        let start = Instant::now();
        self.w32(offset::IQT, self.tail as u32);
        let took = start.elapsed().as_nanos() as f64;
        let status: u32 = self.ram.read_obj(GuestAddress(STATUS))?;
        assert_eq!(status, self.rung, "the wait is done when the write returns");
        Ok(took - self.clock)
    }

    /// Writes the entry of a PASID, each in its own domain, or takes it away.
    fn entry(&self, pasid: u64, present: bool) -> Outcome {
        let table = TABLES + pasid / 64 * 4096;
        self.poke(DIRECTORY + pasid / 64 * 8, table | 1)?;
        let entry = table + pasid % 64 * 64;
        self.poke(entry + 8, (pasid & 0xffff) | 1 << 23)?;
        self.poke(entry + 16, STAGE1)?;
        self.poke(entry, if present { 1 << 6 | 2 << 2 | 1 } else { 0 })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The software engine, with the NIC.
fn engine(ram: &GuestRam) -> Outcome<(Engine, DmaPort)> {
    let engine = Engine::new(Arc::clone(ram));
    let config = EndpointConfig {
        pasid_bits: 20,
        ..EndpointConfig::default()
    };
    let port = engine.add_endpoint(NIC, config)?;
    Ok((engine, port))
}

/// What PASIDs cost that are live: one line per back end.
fn live_pasids(pasids: u64) -> Outcome {
    for software in [false, true] {
        let guest = |pasids| -> Outcome<(Guest, Arc<dyn Backend>)> {
            let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)])?);
            let backend: Arc<dyn Backend> = match software {
                true => Arc::new(engine(&ram)?.0),
                false => Arc::new(Nothing),
            };
            let guest = Guest::with_backend(pasids, ram, Arc::clone(&backend))?;
            Ok((guest, backend))
        };
        let held = |pasids| -> Outcome<usize> {
            let before = common::live_bytes();
            let held = guest(pasids)?;
            let bytes = common::live_bytes() - before;
            drop(held);
            Ok(bytes)
        };
        // PASID 0 is that of requests without PASID.
        let bytes = (held(pasids + 1)? - held(1)?) as f64 / pasids as f64;
        let (mut guest, backend) = guest(pasids + 1)?;
        let one = |pasid: u64| (7 | 1 << 4 | (pasid & 0xffff) << 16 | pasid << 32, 0);
        let new = pasids + 1;
        let (mut bind, mut unbind) = (vec![], vec![]);
        for _ in 0..ROUNDS * 64 {
            guest.entry(new, true)?;
            bind.push(guest.once(1, |_| one(new))?);
            guest.entry(new, false)?;
            unbind.push(guest.once(1, |_| one(new))?);
        }
        let selective = guest.doorbell(1, |_| one(pasids))?;
        let mut global = vec![];
        for _ in 0..ROUNDS {
            let before = common::cpu_time();
            guest.once(1, |_| (7 | 3 << 4, 0))?;
            global.push((common::cpu_time() - before).as_nanos() as f64 / pasids as f64);
        }
        let global = median(global);
        let mut replay = vec![];
        for _ in 0..ROUNDS {
            guest.unit.remove_endpoint(NIC);
            let before = common::cpu_time();
            guest.unit.add_endpoint(NIC, Arc::clone(&backend))?;
            replay.push((common::cpu_time() - before).as_nanos() as f64 / pasids as f64);
        }
        println!(
            "{pasids:>6} live PASIDs, {:<15}  bind {:>6.0} ns  unbind {:>6.0} ns  selective \
             {selective:>5.0} ns  global {global:>7.1} ns/PASID  replay {:>7.1} ns/PASID  \
             {bytes:>6.0} bytes/PASID",
            if software {
                "software engine"
            } else {
                "unit alone"
            },
            median(bind),
            median(unbind),
            median(replay),
        );
    }
    Ok(())
}

/// A lone doorbell for the software engine, after a device filled its cache.
fn full_cache() -> Outcome {
    let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)])?);
    let (engine, port) = engine(&ram)?;
    let mut guest = Guest::with_backend(1, ram, Arc::new(engine))?;
    let fill = || {
        let access = port.access();
        for page in 0..PAGES {
            let found = access.translate(Iova(page << 12), 64, Access::READ);
            assert!(std::hint::black_box(found).is_ok(), "page {page}");
        }
    };
    for (name, low, high) in [("global", 2 | 1 << 4, 0), ("one page", 6 | 3 << 4, 0x5000)] {
        let full = guest.doorbell_after(fill, 1, |_| (low, high))?;
        println!("doorbell: {name} and wait, software engine with a full cache: {full:.1} ns");
    }
    Ok(())
}

/// Nanoseconds to read and decode `count` descriptors, and nothing else.
fn decode_alone(guest: &Guest, count: usize) -> Outcome<f64> {
    let offered = Offered {
        mamv: 18,
        scalable: true,
        device_tlb: true,
        page_requests: true,
        interrupt_remapping: false,
        mhmv: 15,
    };
    let mut times = Vec::new();
    let mut bytes = vec![0u8; count * 32];
    for _ in 0..ROUNDS * 64 {
        let start = Instant::now();
        guest.ram.read_slice(&mut bytes, GuestAddress(QUEUE))?;
        for descriptor in bytes.as_chunks::<8>().0.as_chunks::<4>().0 {
            let words = descriptor.map(u64::from_le_bytes);
            std::hint::black_box(decode(words, offered)).ok();
        }
        times.push(start.elapsed().as_nanos() as f64);
    }
    Ok(median(times) - guest.clock)
}

fn main() -> Outcome {
    const COUNT: u64 = 127;
    let nic = u64::from(NIC.0);
    println!(
        "{:>37} {:>12} {:>14} {:>8}",
        "descriptor", "live PASIDs", "ns/descriptor", "ratio"
    );
    for pasids in [1, 1 << 10, 1 << 16] {
        let mut guest = Guest::new(pasids)?;
        let last = pasids - 1;
        let did = last & 0xffff;
        guest.doorbell(COUNT, |page| {
            (6 | 3 << 4 | did << 16 | last << 32, page << 12)
        })?;
        let base = decode_alone(&guest, COUNT as usize)? / COUNT as f64;
        println!(
            "{:>37} {pasids:>12} {base:>14.1} {:>8}",
            "read and decode alone", "1.0"
        );
        let kinds: [(&str, Make); 9] = [
            (
                "PASID IOTLB, page",
                Box::new(move |page| (6 | 3 << 4 | did << 16 | last << 32, page << 12)),
            ),
            (
                "PASID IOTLB, PASID",
                Box::new(move |_| (6 | 2 << 4 | did << 16 | last << 32, 0)),
            ),
            (
                "IOTLB, domain",
                Box::new(move |_| (2 | 2 << 4 | did << 16, 0)),
            ),
            ("IOTLB, global", Box::new(|_| (2 | 1 << 4, 0))),
            (
                "device TLB, PASID",
                Box::new(move |page| (8 | nic << 16 | last << 32, page << 12)),
            ),
            (
                "PASID cache, PASID (unchanged)",
                Box::new(move |_| (7 | 1 << 4 | did << 16 | last << 32, 0)),
            ),
            (
                "PASID cache, each another (unchanged)",
                Box::new(move |n| {
                    let pasid = last - n % pasids;
                    (7 | 1 << 4 | (pasid & 0xffff) << 16 | pasid << 32, 0)
                }),
            ),
            (
                "context cache, device (unchanged)",
                Box::new(move |_| (1 | 3 << 4 | nic << 32, 0)),
            ),
            ("wait", Box::new(|_| (5 | 1 << 5, STATUS + 8))),
        ];
        for (name, kind) in kinds {
            let each = guest.doorbell(COUNT, kind)? / (COUNT + 1) as f64;
            println!("{name:>37} {pasids:>12} {each:>14.1} {:>8.1}", each / base);
        }
        let one = guest.doorbell(1, |_| (2 | 1 << 4, 0))?;
        println!(
            "{:>37} {pasids:>12} {one:>14.1} {:>8}",
            "doorbell: global and wait", ""
        );
        let one = guest.doorbell(1, |page| (6 | 3 << 4 | did << 16 | last << 32, page << 12))?;
        println!(
            "{:>37} {pasids:>12} {one:>14.1} {:>8}",
            "doorbell: one page and wait", ""
        );
    }
    full_cache()?;
    [1, 1 << 10, 1 << 16].into_iter().try_for_each(live_pasids)
}
