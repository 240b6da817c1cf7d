//! What a PASID costs: `cargo bench -p viommu --bench pasid`.
//!
//! Everything is told as a ratio to one kernel call (the cheapest lock operation there is), so
//! that figures of different machines can be compared. Nothing is asserted.

#![expect(clippy::unwrap_used, reason = "a benchmark ends where it fails")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use viommu::backend::software::{EndpointConfig, Engine, PageResponseSink};
use viommu::backend::{Access, Backend, PageRequest, PageResponse};
use viommu::interrupt::{Msi, MsiSink};
use viommu::page_requests::{Limits, PageRequests};
use viommu::pasid::{Config, HostPasids, PasidAllocator, holders};
use viommu::spec::vtd::descriptor::kind;
use viommu::spec::vtd::registers;
use viommu::vtd::{Connections, Unit, UnitConfig};
use viommu::{Iova, Pasid, Rid, Target};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The median of 15 rounds, per operation.
fn median(count: u32, mut round: impl FnMut()) -> Duration {
    let mut times: Vec<_> = (0..15)
        .map(|_| {
            let began = Instant::now();
            round();
            began.elapsed() / count
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn vm(directory: &Path, quota: u32) -> HostPasids {
    let config = Config {
        quota,
        ..Config::new("bench", 20)
    };
    HostPasids::open(directory, config).unwrap()
}

/// Counts page responses.
#[derive(Default)]
struct Answers(AtomicU32);

impl PageResponseSink for Answers {
    fn page_response(&self, _: PageResponse) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct NoInterrupts;

impl MsiSink for NoInterrupts {
    fn send(&self, _: Msi) {}
}

/// A page request of a device through engine and unit into the guest's queue, and the guest's
/// response descriptor back to the device: everything that nestling does, on one thread.
fn round_trip() -> Duration {
    const DEVICE: Rid = Rid::new(0, 3, 0);
    const COUNT: u32 = 1000;
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let ram = Arc::new(ram);
    let engine = Engine::new(Arc::clone(&ram));
    let answers = Arc::new(Answers::default());
    let endpoint = EndpointConfig {
        pasid_bits: 20,
        page_responses: Some(Arc::clone(&answers) as _),
        ..EndpointConfig::default()
    };
    let port = engine.add_endpoint(DEVICE, endpoint).unwrap();
    let backend: Arc<dyn Backend> = Arc::new(engine);
    let connections = Connections {
        ram: Arc::clone(&ram),
        msi: Arc::new(NoInterrupts),
        backends: vec![Arc::clone(&backend)],
        remapper: None,
        pasids: None,
    };
    let unit = Unit::new(UnitConfig::default(), connections).unwrap();
    unit.add_endpoint(DEVICE, backend).unwrap();
    let poke = |at: u64, words: &[u64]| {
        for (at, word) in (at..).step_by(8).zip(words) {
            ram.write_obj(*word, GuestAddress(at)).unwrap();
        }
    };
    let w64 = |at: u64, value: u64| unit.write(at, &value.to_le_bytes());
    let w32 = |at: u64, value: u32| unit.write(at, &value.to_le_bytes());
    // Root, context, PASID directory, PASID table with PASID 1, an empty first-stage table.
    poke(0x1000, &[0x5001]);
    poke(0x5000 + u64::from(DEVICE.devfn()) * 32, &[0x601d]);
    poke(0x6000, &[0x7001]);
    poke(0x7000 + 64, &[1 | 2 << 2 | 1 << 6, 2 | 1 << 23, 0x8000]);
    w64(registers::IQA, 0x2000 | 1 << 11);
    w32(registers::GCMD, 1 << 26);
    w64(registers::RTADDR, 0x1000 | 1 << 10);
    w32(registers::GCMD, 1 << 26 | 1 << 30);
    w64(registers::PQA, 0x4000);
    w32(registers::GCMD, 1 << 26 | 1 << 31);
    let port = port.with_pasid(Pasid(1)).unwrap();
    let mut tail = 0;
    median(COUNT, || {
        for n in 0..COUNT {
            let group = (n % 512) as u16;
            port.page_request(Iova(0x1000), Access::READ, group, true)
                .unwrap();
            w32(registers::PQH, (n + 1) % 128 * 32);
            let low = u64::from(kind::PAGE_GROUP_RESPONSE) | 1 << 4;
            let low = low | u64::from(DEVICE.0) << 16 | 1 << 32;
            poke(
                0x2000 + u64::from(tail),
                &[low, u64::from(group) << 3, 0, 0],
            );
            tail = (tail + 32) % 4096;
            w32(registers::IQT, tail);
        }
        w64(registers::PQT, 0);
        w64(registers::PQH, 0);
        assert_eq!(
            answers.0.swap(0, Ordering::Relaxed),
            COUNT,
            "each is answered"
        );
    })
}

fn main() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pasids");
    std::fs::create_dir_all(&directory).unwrap();
    let directory = directory.as_path();

    let file = std::fs::File::create(directory.join("call")).unwrap();
    let call = median(10_000, || {
        for _ in 0..10_000 {
            black_box(file.metadata().unwrap());
        }
    });
    let show = |what: &str, time: Duration| {
        let ratio = time.as_secs_f64() / call.as_secs_f64();
        println!("{what:55} {time:>10.2?}  {ratio:>8.2} kernel calls");
    };
    show("a kernel call (fstat)", call);

    let one = vm(directory, 1024);
    let pair = median(10_000, || {
        for _ in 0..10_000 {
            one.free(one.allocate().unwrap()).unwrap();
        }
    });
    show("allocate and free", pair);
    for live in [1, 1 << 10, 1 << 16] {
        let many = vm(directory, 1 << 17);
        for _ in 0..live {
            many.allocate().unwrap();
        }
        let time = median(1000, || {
            let pasids: Vec<_> = (0..1000).map(|_| many.allocate().unwrap()).collect();
            pasids
                .into_iter()
                .for_each(|pasid| many.free(pasid).unwrap());
        });
        show(&format!("allocate and free 1000 more, {live} live"), time);
        let time = median(1, || {
            black_box(holders(directory).unwrap());
        });
        show(&format!("list all holders, {live} live"), time);
    }
    let all = vm(directory, 1 << 20);
    while all.allocate().is_ok() {}
    one.free_all();
    while one.allocate().is_ok() {}
    let time = median(1, || {
        black_box(one.allocate().unwrap_err());
    });
    show("find that the host is full", time);
    let time = median(1, || {
        black_box(HostPasids::open(directory, Config::new("late", 20)).unwrap_err());
    });
    show("start a VM on a host that is full", time);

    let mut book = PageRequests::new(Limits::default());
    let request = |group: u16| PageRequest {
        target: Target::pasid(Rid(8), Pasid(1)),
        group,
        last: true,
        iova: Iova(0),
        access: Access::READ,
        execute: false,
        privileged: false,
    };
    for group in 256..512 {
        book.request(&request(group), ()).unwrap();
    }
    let time = median(256, || {
        for group in 0..256 {
            book.request(&request(group), ()).unwrap();
        }
        for group in 0..256 {
            book.respond(request(group).target, group).unwrap();
        }
    });
    show(
        "the book of a page request and its response, 256 waiting",
        time,
    );
    show(
        "a page request and its response, device to device",
        round_trip(),
    );
}
