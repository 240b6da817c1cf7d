//! Queued invalidation through the register file, with a back end that does nothing: nanoseconds
//! per descriptor by type, against reading and decoding the same descriptors alone.
//!
//! Ratios are what to compare; a figure by itself says as much about the machine.

use std::sync::Arc;
use std::time::Instant;

use viommu::backend::{
    Backend, Capabilities, EventSink, Invalidation, Mapping, Objects, PageResponse, Refused,
    Translation,
};
use viommu::interrupt::{Msi, MsiSink};
use viommu::spec::vtd::descriptor::{Offered, decode};
use viommu::spec::vtd::registers as offset;
use viommu::vtd::{Connections, Unit, UnitConfig};
use viommu::{DomainId, GuestRam, Iova, Rid, Target};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

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
const ROUNDS: usize = 15;

/// Does nothing, successfully.
struct Nothing;

impl Backend for Nothing {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            stage1: true,
            stage1_57: true,
            stage1_1g: true,
            sre: false,
            eafe: false,
            stage2: [true; 3],
            nested: true,
            pasid_bits: 20,
            page_requests: true,
            address_width: 57,
            page_sizes: !0xfff,
            snoop_control: true,
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
        std::hint::black_box(batch).len()
    }
    fn respond(&self, _: PageResponse) {}
    fn create_domain(&self) -> Result<DomainId, Refused> {
        Ok(DomainId(0))
    }
    fn destroy_domain(&self, _: DomainId) {}
    fn map(&self, _: DomainId, _: &[Mapping]) -> Result<(), Refused> {
        Ok(())
    }
    fn unmap(&self, _: DomainId, _: Iova, _: Iova) -> Result<u64, Refused> {
        Ok(0)
    }
    fn objects(&self) -> Objects {
        Objects::default()
    }
}

impl MsiSink for Nothing {
    fn send(&self, _: Msi) {}
}

struct Guest {
    unit: Arc<Unit>,
    ram: GuestRam,
    tail: u64,
}

/// The two quadwords of the descriptor with a number.
type Make = Box<dyn Fn(u64) -> (u64, u64)>;

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

impl Guest {
    /// A scalable-mode guest whose NIC has `pasids` PASIDs from 0 up, each in its own domain.
    fn new(pasids: u64) -> Outcome<Self> {
        let ram = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)])?);
        let connections = Connections {
            ram: Arc::clone(&ram),
            msi: Arc::new(Nothing),
            backends: vec![],
            remapper: None,
            pasids: None,
        };
        let unit = Unit::new(UnitConfig::default(), connections)?;
        unit.add_endpoint(NIC, Arc::new(Nothing))?;
        let guest = Self { unit, ram, tail: 0 };
        guest.poke(ROOT, CONTEXTS | 1)?;
        // 2^14 directory entries, PASIDE, present.
        guest.poke(
            CONTEXTS + u64::from(NIC.devfn()) * 32,
            DIRECTORY | 7 << 9 | 9,
        )?;
        for pasid in 0..pasids {
            let table = TABLES + pasid / 64 * 4096;
            guest.poke(DIRECTORY + pasid / 64 * 8, table | 1)?;
            let entry = table + pasid % 64 * 64;
            guest.poke(entry + 8, (pasid & 0xffff) | 1 << 23)?;
            guest.poke(entry + 16, 0x5000)?;
            guest.poke(entry, 1 << 6 | 2 << 2 | 1)?;
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
        let mut times = Vec::new();
        for round in 0..ROUNDS * 64 {
            for index in 0..count {
                let (low, high) = descriptor(index);
                self.enqueue(low, high)?;
            }
            self.enqueue(5 | 1 << 5 | (round as u64) << 32, STATUS)?;
            let start = Instant::now();
            self.w32(offset::IQT, self.tail as u32);
            times.push(start.elapsed().as_nanos() as f64);
            let status: u32 = self.ram.read_obj(GuestAddress(STATUS))?;
            assert_eq!(
                status, round as u32,
                "the wait is done when the write returns"
            );
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }
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
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn main() -> Outcome {
    const COUNT: u64 = 127;
    let nic = u64::from(NIC.0);
    println!(
        "{:>34} {:>12} {:>14} {:>8}",
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
            "{:>34} {pasids:>12} {base:>14.1} {:>8}",
            "read and decode alone", "1.0"
        );
        let kinds: [(&str, Make); 8] = [
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
                "context cache, device (unchanged)",
                Box::new(move |_| (1 | 3 << 4 | nic << 32, 0)),
            ),
            ("wait", Box::new(|_| (5 | 1 << 5, STATUS + 8))),
        ];
        for (name, kind) in kinds {
            let each = guest.doorbell(COUNT, kind)? / (COUNT + 1) as f64;
            println!("{name:>34} {pasids:>12} {each:>14.1} {:>8.1}", each / base);
        }
        let one = guest.doorbell(1, |_| (2 | 1 << 4, 0))?;
        println!(
            "{:>34} {pasids:>12} {one:>14.1} {:>8}",
            "doorbell: global and wait", ""
        );
        let one = guest.doorbell(1, |page| (6 | 3 << 4 | did << 16 | last << 32, page << 12))?;
        println!(
            "{:>34} {pasids:>12} {one:>14.1} {:>8}",
            "doorbell: one page and wait", ""
        );
        let scan = guest.doorbell(1, |_| (7 | 3 << 4, 0))?;
        println!(
            "{:>34} {pasids:>12} {:>14.1} {:>8}",
            "global PASID cache, per PASID",
            scan / pasids as f64,
            ""
        );
    }
    Ok(())
}
