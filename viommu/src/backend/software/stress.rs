//! Real threads against the promise that matters most: when a removal has returned, no DMA
//! touches what was removed.
//!
//! Devices translate and write, as fast as they can, to pages that a front end moves: it changes
//! the mapping, has the back end forget the old one, and then writes a mark where the page was.
//! Before the place is used again the mark must still be there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use super::{EndpointConfig, Engine};
use crate::backend::{
    Access, Backend, EventSink, Fault, Invalidation, InvalidationRange, Mapping, PageRequest,
    Scope, Stage1, Stage2, Translation,
};
use crate::dma::DmaPort;
use crate::{DomainId, Gpa, GuestRam, Iova, Rid, Target};

const RID: Rid = Rid(0x28);
const PLAIN: Target = Target::rid(RID);
/// Pages that move, each between two places.
const PAGES: u64 = 6;
const FIRST_IOVA: u64 = 0x7000_0000;
const FIRST_PLACE: u64 = 0x10_0000;
/// Root, PDPT, PD and PT.
const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];
const MARK: u64 = 0x6d61_726b_6d61_726b;
/// How long each way of removal is tried.
const TRIED: Duration = Duration::from_millis(400);
/// And how often at least, on a machine that is busy otherwise.
const MOVES: u64 = 200;

struct Nobody;

impl EventSink for Nobody {
    fn fault(&self, _: Fault) {}
    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, _: PageRequest) {}
}

struct Setup {
    ram: GuestRam,
    engine: Engine,
    port: DmaPort,
    stop: AtomicBool,
}

fn iova(page: u64) -> u64 {
    FIRST_IOVA + page * 4096
}

fn place(page: u64, side: u64) -> u64 {
    FIRST_PLACE + (page * 2 + side) * 4096
}

impl Setup {
    fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let ram: GuestRam = Arc::new(ram);
        for (level, table) in TABLES.iter().enumerate().take(3) {
            let index = FIRST_IOVA >> (39 - 9 * level) & 511;
            let at = GuestAddress(table + index * 8);
            ram.write_obj(TABLES[level + 1] | 7, at).unwrap();
        }
        let engine = Engine::new(Arc::clone(&ram));
        let port = engine.add_endpoint(RID, EndpointConfig::default()).unwrap();
        engine.claim(RID, Arc::new(Nobody)).unwrap();
        Self {
            ram,
            engine,
            port,
            stop: AtomicBool::new(false),
        }
    }

    fn set_entry(&self, page: u64, place: u64) {
        let at = TABLES[3] + (iova(page) >> 12 & 511) * 8;
        self.ram
            .store(place | 0x67, GuestAddress(at), Ordering::Release)
            .unwrap();
    }

    /// A device: one access after the other, each to a few pages, with some time between
    /// translation and write.
    fn device(&self, seed: u64) {
        let port = self.port.clone();
        let mut random = seed;
        let mut next = |most: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % most
        };
        while !self.stop.load(Ordering::Relaxed) {
            let access = port.access();
            for _ in 0..=next(3) {
                let at = GuestAddress(iova(next(PAGES)));
                let slices = access.get_slices(at, 8, Permissions::Write).unwrap();
                for slice in slices {
                    for _ in 0..next(60) {
                        std::hint::spin_loop();
                    }
                    // While the page is nowhere, the write does not pass.
                    if let Ok(slice) = slice {
                        slice.write_obj(next(1 << 60), 0).unwrap();
                    }
                }
            }
        }
    }

    /// Moves pages by `remap(page, old place, new place)` for a while.
    fn run(&self, remap: impl Fn(u64, u64, u64)) {
        std::thread::scope(|scope| {
            for seed in [0x1234_5678_9abc, 0xfedc_ba98_7654] {
                scope.spawn(move || self.device(seed));
            }
            let begin = Instant::now();
            let mut side = [0; PAGES as usize];
            let mut moves = 0u64;
            while begin.elapsed() < TRIED || moves < MOVES {
                let page = moves % PAGES;
                let now = &mut side[page as usize];
                let (old, new) = (place(page, *now), place(page, 1 - *now));
                let marked: u64 = self.ram.read_obj(GuestAddress(new)).unwrap();
                if moves >= PAGES && marked != MARK {
                    self.stop.store(true, Ordering::Relaxed);
                    panic!("DMA to {new:#x} after its removal, at move {moves}: {marked:#x}");
                }
                remap(page, old, new);
                self.ram.write_obj(MARK, GuestAddress(old)).unwrap();
                *now = 1 - *now;
                moves += 1;
            }
            self.stop.store(true, Ordering::Relaxed);
        });
    }

    fn by_tables(&self, invalidation: impl Fn(u64) -> Invalidation) {
        let stage1 = Stage1 {
            root: Gpa(TABLES[0]),
            width: 48,
            sre: false,
            wpe: false,
            eafe: false,
            ere: true,
            pwsnp: true,
            fs1gp: true,
        };
        for page in 0..PAGES {
            self.set_entry(page, place(page, 0));
        }
        let translation = Translation::Stage1(stage1);
        self.engine.apply(PLAIN, translation).unwrap();
        self.run(|page, _, new| {
            self.set_entry(page, new);
            let batch = [invalidation(page)];
            assert_eq!(self.engine.invalidate(&batch), 1);
        });
    }
}

fn one_page(page: u64) -> InvalidationRange {
    InvalidationRange::Pages {
        first: Iova(iova(page)),
        count: 1,
        leaf: true,
    }
}

#[test]
fn no_dma_after_a_page_selective_invalidation() {
    Setup::new().by_tables(|page| Invalidation {
        scope: Scope::Target(PLAIN),
        range: one_page(page),
    });
}

#[test]
fn no_dma_after_an_invalidation_of_the_endpoint() {
    Setup::new().by_tables(|_| Invalidation {
        scope: Scope::Endpoint(RID),
        range: InvalidationRange::All,
    });
}

#[test]
fn no_dma_after_a_global_invalidation() {
    Setup::new().by_tables(|_| Invalidation {
        scope: Scope::All,
        range: InvalidationRange::All,
    });
}

fn mapping(page: u64, place: u64) -> Mapping {
    Mapping {
        iova: Iova(iova(page)),
        gpa: Gpa(place),
        length: 4096,
        access: Access::READ_WRITE,
        mmio: false,
    }
}

#[test]
fn no_dma_after_an_unmap() {
    let setup = Setup::new();
    let engine = &setup.engine;
    let domain = engine.create_domain().unwrap();
    for page in 0..PAGES {
        engine
            .map(domain, &[mapping(page, place(page, 0))])
            .unwrap();
    }
    engine.apply(PLAIN, Translation::Domain(domain)).unwrap();
    setup.run(|page, _, new| {
        let last = Iova(iova(page) + 4095);
        assert_eq!(engine.unmap(domain, Iova(iova(page)), last).unwrap(), 4096);
        engine.map(domain, &[mapping(page, new)]).unwrap();
    });
}

#[test]
fn no_dma_after_another_translation_is_applied() {
    let setup = Setup::new();
    let engine = &setup.engine;
    let domain_with = |side: u64| -> DomainId {
        let domain = engine.create_domain().unwrap();
        for page in 0..PAGES {
            engine
                .map(domain, &[mapping(page, place(page, side))])
                .unwrap();
        }
        domain
    };
    let domains = [0, 1].map(domain_with);
    engine
        .apply(PLAIN, Translation::Domain(domains[0]))
        .unwrap();
    // All pages move at once; one of them is looked at per round of `PAGES` moves.
    let side = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let setup = &setup;
        for seed in [77, 7777] {
            scope.spawn(move || setup.device(seed));
        }
        let begin = Instant::now();
        let mut moves = 0;
        while begin.elapsed() < TRIED || moves < MOVES {
            let old = side.fetch_xor(1, Ordering::Relaxed);
            let translation = Translation::Domain(domains[1 - old as usize]);
            engine.apply(PLAIN, translation).unwrap();
            for page in 0..PAGES {
                let at = GuestAddress(place(page, old));
                setup.ram.write_obj(MARK, at).unwrap();
            }
            for _ in 0..200 {
                std::hint::spin_loop();
            }
            for page in 0..PAGES {
                let left: u64 = setup.ram.read_obj(GuestAddress(place(page, old))).unwrap();
                if left != MARK {
                    setup.stop.store(true, Ordering::Relaxed);
                    panic!("DMA after its removal, at move {moves}");
                }
            }
            moves += 1;
        }
        setup.stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn tables_that_change_under_the_walk_lead_nowhere_but_to_ram() {
    let setup = Setup::new();
    let size: u64 = 2 << 20;
    let stage1 = Stage1 {
        root: Gpa(TABLES[0]),
        width: 48,
        sre: false,
        wpe: false,
        eafe: true,
        ere: true,
        pwsnp: true,
        fs1gp: true,
    };
    let stage2 = Stage2 {
        root: Gpa(TABLES[0]),
        width: 48,
        ad: true,
    };
    std::thread::scope(|scope| {
        let setup = &setup;
        // The guest: every table points to itself, to the others and beyond, all the time.
        scope.spawn(move || {
            let mut random = 0x9e37_79b9_7f4a_7c15u64;
            while !setup.stop.load(Ordering::Relaxed) {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = TABLES[random as usize & 3] + (random >> 8 & 1) * 8;
                let entry = match random >> 60 {
                    0..12 => TABLES[(random >> 16) as usize & 3] | 7,
                    12 => size | 7,
                    13 => 0,
                    14 => random >> 8 | 1,
                    _ => 0x87,
                };
                let at = GuestAddress(at);
                setup.ram.store(entry, at, Ordering::Relaxed).unwrap();
            }
        });
        let begin = Instant::now();
        let (mut passed, mut tried) = (0u64, 0u64);
        let translations = [
            Translation::Stage1(stage1),
            Translation::Nested { stage1, stage2 },
            Translation::Stage2(stage2),
        ];
        for translation in translations.into_iter().cycle() {
            setup.engine.apply(PLAIN, translation).unwrap();
            let access = setup.port.access();
            for number in 0..500u64 {
                let bits = (0..4).map(|level| (number >> level & 1) << (12 + 9 * level));
                let iova = Iova(bits.sum::<u64>() | number & 0xfff);
                if let Ok(found) = access.lookup(iova, 64, Access::READ_WRITE) {
                    assert!(found.gpa.0 + found.length <= size);
                    passed += 1;
                }
                tried += 1;
            }
            drop(access);
            // However late the guest begins.
            let enough = passed > 0 || begin.elapsed() > 200 * TRIED;
            if begin.elapsed() > TRIED && tried > 10_000 && enough {
                break;
            }
        }
        setup.stop.store(true, Ordering::Relaxed);
        assert!(passed > 0, "none of {tried} passed");
    });
}
