//! What a translation of the software engine costs, against a raw pointer walk of the same tables
//! in the same run.
//!
//! `cargo bench -p viommu --bench translate [-- LEAVES…]`, where LEAVES is how many tables of
//! level 1 there are (4, 128, 2048 and 32768 unless said otherwise). Every figure is nanoseconds per dependent
//! translation: the next address depends on the last result, so nothing overlaps. Samples are
//! short and interleaved with the raw walk's, and each has its thread's time, not the clock's. What
//! is printed is the least of the samples, what others on the machine disturbed least, and the
//! ratio of the two least; behind it the median of the pairs' ratios.
//!
//! The raw walk visits the same pages through the same tables in the same order, with the same
//! loop around it. The loop alone, which is part of every figure, has a line of its own per order.
//!
//! A miss is to miss: 2048 pages would be in the IOTLB, so tables of level 1 that map fewer than
//! 32 times as many are there under several addresses. The IOTLB then finds 1 in 32 at most.

#![expect(
    clippy::unwrap_used,
    reason = "a benchmark stops at what it does not expect"
)]

use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::backend::{
    Access, Backend, EventSink, Fault, Invalidation, InvalidationRange, PageRequest, Scope, Stage1,
    Stage2, Translation,
};
use viommu::dma::{DmaAccess, DmaPort};
use viommu::{Gpa, GuestRam, Iova, Pasid, Rid, Target};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const ROUNDS: usize = 41;
const BASE: u64 = 0x10_0000_0000;
const RID: Rid = Rid(8);
const PASID: Pasid = Pasid(5);
/// P, R/W, U/S, A, D.
const FIRST_STAGE: u64 = 0x67;
/// R, W.
const SECOND_STAGE: u64 = 3;

struct Nobody;

impl EventSink for Nobody {
    fn fault(&self, fault: Fault) {
        eprintln!("a fault in a benchmark: {fault:?}");
    }
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, _: PageRequest) {}
}

/// Pages that are visited at least: 32 times what the IOTLB holds.
const FEWEST_PAGES: u64 = 1 << 16;

/// Tables that map `pages` pages from `BASE`, and the same memory as identity of 4 KiB pages.
struct Tables {
    ram: GuestRam,
    pages: u64,
    stage1: Stage1,
    stage2: Stage2,
}

impl Tables {
    /// `leaves` tables of level 1, a power of two.
    fn new(leaves: u64) -> Self {
        // Level 1 and 2 of both stages, roots, and 1 MiB of pages to be mapped.
        let size = (leaves * 4096 * 2 + (4 << 20)).next_multiple_of(2 << 20);
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap();
        let mut free = 1 << 20;
        let mut table = || {
            free += 4096;
            free - 4096
        };
        let put = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).unwrap();
        // Tables of level 1 come back after `leaves` of them.
        let mut build = |base: u64, pages: u64, leaves: u64, flags, to: &dyn Fn(u64) -> u64| {
            let root = table();
            let mut lowest = vec![];
            let (mut upper, mut middle, mut lower) = (0, 0, 0);
            for page in 0..pages {
                let iova = base + page * 4096;
                let index = |level: u64| (iova >> (12 + 9 * (level - 1)) & 511) * 8;
                if page == 0 || iova & ((1 << 39) - 1) == 0 {
                    upper = table();
                    put(root + index(4), upper | flags);
                }
                if page == 0 || iova & ((1 << 30) - 1) == 0 {
                    middle = table();
                    put(upper + index(3), middle | flags);
                }
                if page == 0 || iova & ((1 << 21) - 1) == 0 {
                    let nth = page / 512 % leaves;
                    if lowest.len() as u64 <= nth {
                        lowest.push(table());
                    }
                    lower = lowest[nth as usize];
                    put(middle + index(2), lower | flags);
                }
                put(lower + index(1), to(page % (leaves * 512)) | flags);
            }
            root
        };
        let pages = (leaves * 512).max(FEWEST_PAGES);
        // Scattered, so that no two neighbours are.
        let root = build(BASE, pages, leaves, FIRST_STAGE, &|page| {
            page.wrapping_mul(0x9e37_79b9) % 256 * 4096
        });
        let outer = build(0, size / 4096, u64::MAX >> 9, SECOND_STAGE, &|page| {
            page * 4096
        });
        Self {
            pages,
            stage1: Stage1 {
                root: Gpa(root),
                width: 48,
                sre: false,
                wpe: false,
                eafe: false,
                ere: true,
                pwsnp: true,
                fs1gp: true,
            },
            stage2: Stage2 {
                root: Gpa(outer),
                width: 48,
                ad: false,
            },
            ram: Arc::new(ram),
        }
    }

    /// Where guest memory begins for the raw walk.
    fn host(&self) -> *const u8 {
        self.ram.get_host_address(GuestAddress(0)).unwrap()
    }
}

/// A walk with nothing around it: no bounds, no rights, no flags.
#[inline]
fn raw_walk(host: *const u8, root: u64, address: u64) -> u64 {
    let mut table = root;
    for shift in [39, 30, 21, 12] {
        let entry = table + (address >> shift & 511) * 8;
        // SAFETY: `Tables` built every entry on the way, inside the RAM at `host`, and the
        // callers' addresses are those it mapped.
        table = unsafe {
            host.wrapping_add(entry as usize)
                .cast::<u64>()
                .read_volatile()
        } & !0xfff;
    }
    table
}

/// The raw walk of both stages: each table and the result through the outer table.
#[inline]
fn raw_walk_2d(host: *const u8, root: u64, outer: u64, address: u64) -> u64 {
    let mut table = raw_walk(host, outer, root);
    for shift in [39, 30, 21, 12] {
        let entry = table + (address >> shift & 511) * 8;
        // SAFETY: as in `raw_walk`; the outer table maps all of RAM to itself.
        let next = unsafe {
            host.wrapping_add(entry as usize)
                .cast::<u64>()
                .read_volatile()
        } & !0xfff;
        table = raw_walk(host, outer, next);
    }
    table
}

/// Which pages are visited, in an order without a pattern.
enum Visit {
    /// Each of the first pages (a power of two) once per turn. The order is worked out on the
    /// way: a list of it would be larger than some caches.
    All(u64),
    /// These addresses (a power of two of them), over and over.
    Hot(Vec<u64>),
}

impl Visit {
    /// 16 buffers of 16 pages, spread over `pages` pages.
    fn hot(pages: u64) -> Self {
        let mut at = 1u64;
        let next = |_| {
            at = step(at);
            let page = (at >> 40 & 15) * (pages / 16) + (at >> 36 & 15);
            BASE + page * 4096
        };
        Self::Hot((0..1 << 10).map(next).collect())
    }
}

/// A full-period generator for any power of two.
#[inline]
fn step(at: u64) -> u64 {
    at.wrapping_mul(0x5851_f42d_4c95_7f2d)
        .wrapping_add(0x1405_7b7e_f767_814f)
}

/// Translates `count` addresses, each depending on the result before, which never has bit 63.
#[inline]
fn chase(count: u64, visit: &Visit, mut translate: impl FnMut(u64) -> u64) -> u64 {
    let mut gpa = 0;
    let mut sum = 0;
    match visit {
        Visit::All(pages) => {
            let mut at = 1u64;
            for _ in 0..count {
                gpa = translate(BASE + (at & (pages - 1)) * 4096);
                sum ^= gpa;
                at = step(at).wrapping_add(gpa >> 63);
            }
        }
        Visit::Hot(list) => {
            for n in 0..count as usize {
                gpa = translate(list[n & (list.len() - 1)] + (gpa >> 63));
                sum ^= gpa;
            }
        }
    }
    sum
}

/// The time this thread has run, in nanoseconds: what others do on the same CPU does not count.
fn thread_time() -> f64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a timespec that lives across the call.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    assert_eq!(result, 0);
    now.tv_sec as f64 * 1e9 + now.tv_nsec as f64
}

fn ns(count: u64, work: impl FnOnce() -> u64) -> f64 {
    let start = thread_time();
    black_box(work());
    (thread_time() - start) / count as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// An engine over `tables` with one port.
fn engine(tables: &Tables, target: Target, translation: Translation) -> (Engine, DmaPort) {
    let engine = Engine::new(Arc::clone(&tables.ram));
    let config = EndpointConfig {
        pasid_bits: 20,
        ..EndpointConfig::default()
    };
    let port = engine.add_endpoint(RID, config).unwrap();
    engine.claim(RID, Arc::new(Nobody)).unwrap();
    engine.apply(target, translation).unwrap();
    let port = match target.pasid {
        None => port,
        Some(pasid) => port.with_pasid(pasid).unwrap(),
    };
    (engine, port)
}

#[inline]
fn translate(access: &DmaAccess<'_>, iova: u64) -> u64 {
    match access.translate(Iova(iova), 64, Access::READ) {
        Ok(found) => found.gpa.0,
        Err(cause) => unreachable!("{cause:?} at {iova:#x}"),
    }
}

/// One line: ours against the raw walk, with one thread and with two.
fn compare(name: &str, count: u64, visit: &Visit, port: &DmaPort, raw: impl Fn(u64) -> u64) {
    let (mut ours, mut theirs, mut ratios, mut scaling) = (vec![], vec![], vec![], vec![]);
    let one = |port: &DmaPort| {
        let access = port.access();
        chase(count, visit, |iova| translate(&access, iova))
    };
    let second = port.clone();
    one(port);
    one(&second);
    for _ in 0..ROUNDS {
        let us = ns(count, || one(port));
        let them = ns(count, || chase(count, visit, &raw));
        ours.push(us);
        theirs.push(them);
        ratios.push(us / them);
        let barrier = Barrier::new(2);
        let both = std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                barrier.wait();
                ns(count, || one(&second))
            });
            barrier.wait();
            let mine = ns(count, || one(port));
            mine.max(other.join().unwrap())
        });
        scaling.push(2.0 * us / both);
    }
    println!(
        "{name:<34} {:>6.2} ns  raw {:>6.2} ns  ratio {:>4.2} ({:>4.2})  two threads {:>4.2}x",
        least(&ours),
        least(&theirs),
        least(&ours) / least(&theirs),
        median(ratios),
        median(scaling)
    );
}

fn main() {
    // Not known to the compiler, which else finds that no result ever has bit 63.
    let pages = black_box(FEWEST_PAGES);
    for (name, visit) in [("hits", Visit::hot(pages)), ("misses", Visit::All(pages))] {
        let alone = || ns(1 << 17, || chase(1 << 17, &visit, |iova| iova));
        let alone: Vec<_> = (0..ROUNDS).map(|_| alone()).collect();
        println!(
            "loop of the {name} alone {:.2} ns (part of every figure below)",
            least(&alone)
        );
    }
    let wanted: Vec<u64> = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .collect();
    for (leaves, count) in [
        (4u64, 1u64 << 17),
        (128, 1 << 19),
        (2048, 1 << 17),
        (32768, 1 << 17),
    ] {
        if !wanted.is_empty() && !wanted.contains(&leaves) {
            continue;
        }
        let tables = Tables::new(leaves);
        let host = tables.host();
        let (root, outer) = (tables.stage1.root.0, tables.stage2.root.0);
        let raw = |iova| raw_walk(host, root, iova);
        let size = leaves * 4;
        let (all, hot) = (&Visit::All(tables.pages), &Visit::hot(tables.pages));
        let stage1 = Translation::Stage1(tables.stage1);
        let nested = Translation::Nested {
            stage1: tables.stage1,
            stage2: tables.stage2,
        };
        let (_engine, port) = engine(&tables, Target::rid(RID), stage1);
        compare(
            &format!("hit, {size} KiB of tables"),
            count,
            hot,
            &port,
            raw,
        );
        compare(
            &format!("1-D miss, {size} KiB of tables"),
            count,
            all,
            &port,
            raw,
        );
        let (_engine, port) = engine(&tables, Target::pasid(RID, PASID), stage1);
        compare(
            &format!("PASID miss, {size} KiB of tables"),
            count,
            all,
            &port,
            raw,
        );
        let raw = |iova| raw_walk_2d(host, root, outer, iova);
        let (_engine, port) = engine(&tables, Target::rid(RID), nested);
        compare(
            &format!("2-D miss, 2 x {size} KiB of tables"),
            count,
            all,
            &port,
            raw,
        );
    }
    invalidation();
}

/// Global invalidation with a full cache, and what the device pays afterwards.
fn invalidation() {
    let tables = Tables::new(128);
    let stage1 = Translation::Stage1(tables.stage1);
    let (engine, port) = engine(&tables, Target::rid(RID), stage1);
    let all = [Invalidation {
        scope: Scope::All,
        range: InvalidationRange::All,
    }];
    let page = [Invalidation {
        scope: Scope::Target(Target::rid(RID)),
        range: InvalidationRange::Pages {
            first: Iova(BASE),
            count: 1,
            leaf: true,
        },
    }];
    for (name, batch) in [("global", all), ("one page", page)] {
        let mut figures = vec![];
        for _ in 0..ROUNDS * 20 {
            let access = port.access();
            chase(4096, &Visit::All(tables.pages), |iova| {
                translate(&access, iova)
            });
            drop(access);
            let start = Instant::now();
            black_box(engine.invalidate(&batch));
            figures.push(start.elapsed().as_secs_f64() * 1e9);
        }
        println!("{name} invalidation, full cache: {:.0} ns", median(figures));
        let many = ns(1 << 16, || {
            (0..1 << 16).map(|_| engine.invalidate(&batch) as u64).sum()
        });
        println!("{name} invalidation, in a row: {many:.0} ns");
    }
    let begin = median(
        (0..ROUNDS)
            .map(|_| {
                ns(1 << 16, || {
                    let work = |_| translate(&port.access(), BASE) & 1;
                    (0..1 << 16).map(work).sum()
                })
            })
            .collect(),
    );
    println!("one access with one translation, begin to end: {begin:.1} ns");
}
