//! What a PASID costs: `cargo bench -p viommu --bench pasid`.
//!
//! Everything is told as a ratio to one kernel call (the cheapest lock operation there is), so
//! that figures of different machines can be compared. Nothing is asserted.

#![expect(clippy::unwrap_used, reason = "a benchmark ends where it fails")]

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use viommu::backend::{Access, PageRequest};
use viommu::page_requests::{Limits, PageRequests};
use viommu::pasid::{Config, HostPasids, PasidAllocator, holders};
use viommu::{Iova, Pasid, Rid, Target};

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
    show("a page request and its response, 256 waiting", time);
}
