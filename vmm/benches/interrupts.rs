//! Interrupt routes: what remapping costs when an interrupt is delivered (nothing: both are irqfds),
//! and what an invalidation of one entry costs beside 1, 1 Ki and 16 Ki routes. Printed as ratios;
//! the absolute figures are this machine's.
//!
//! KVM has at most 4096 routes and takes them all with every change, so 16 Ki are measured without
//! it, which shows our part; with KVM, as many as it has, beside the bare KVM_SET_GSI_ROUTING of the
//! same table, and for many entries that come in one run of the queue, which cost one such call.

#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use devices::interrupt::{MsiSource, MsiVector};
use devices::pci::Space;
use viommu::Rid;
use viommu::interrupt::Msi;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::interrupts::controller::{Controller, Route};
use vmm::interrupts::{Interrupts, Remapper};
use vmm::kvm::Host;
use vmm_sys_util::eventfd::EventFd;

const RID: Rid = Rid(8);
const ROUNDS: usize = 9;
/// Rounds, and how much is done in each, of what is short: so that most rounds are not disturbed.
const SHORT: (usize, u32) = (400, 250);
/// The first GSI that is no pin of the I/O APIC.
const FIRST_GSI: u32 = 24;

/// A kernel that takes everything.
struct Nothing;

impl Controller for Nothing {
    fn limit(&self) -> u32 {
        1 << 15
    }
    fn set_routes(&self, _: &[Route]) -> io::Result<()> {
        Ok(())
    }
    fn connect(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn pulse(&self, _: u32) {}
    fn signal(&self, _: Msi) {}
    fn doorbell(&self, _: bool, _: Space, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

/// One entry per message; what entry 0 makes can be changed.
#[derive(Default)]
struct Table(AtomicU32);

impl Remapper for Table {
    fn remap(&self, _: Rid, msi: Msi) -> Option<Msi> {
        let first = msi.data == 0;
        let vector = if first {
            self.0.load(Ordering::Relaxed)
        } else {
            0x31
        };
        Some(Msi {
            address: 0xfee0_0000,
            data: vector,
        })
    }
    fn send(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        self.remap(rid, msi)
    }
    fn entry(&self, msi: Msi) -> Option<u32> {
        Some(msi.data)
    }
}

/// One entry per message, and all of them change together.
struct Moving(AtomicU32);

impl Remapper for Moving {
    fn remap(&self, _: Rid, _: Msi) -> Option<Msi> {
        Some(Msi {
            address: 0xfee0_0000,
            data: self.0.load(Ordering::Relaxed),
        })
    }
    fn send(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        self.remap(rid, msi)
    }
    fn entry(&self, msi: Msi) -> Option<u32> {
        Some(msi.data)
    }
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_nanos() as f64
}

/// Vectors of `source` with a route each, by remapping table entries from 0 on.
fn routed(source: &dyn MsiSource, routes: u32) -> Vec<Arc<dyn MsiVector>> {
    let vector = |data| {
        let vector = source.vector().unwrap();
        let address = 0xfee0_0010;
        vector.route(Some(Msi { address, data })).unwrap();
        vector
    };
    (0..routes).map(vector).collect()
}

/// The time of one invalidation of entry 0, in ns: with a change, and without.
fn invalidation(
    controller: Arc<dyn Controller>,
    routes: u32,
    (rounds, batch): (usize, u32),
) -> [f64; 2] {
    let interrupts = Interrupts::new(controller);
    let table = Arc::new(Table(AtomicU32::new(0x30)));
    let source = interrupts.source(RID, Some(table.clone()));
    let vectors = routed(&*source, routes);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (changes, times) in [true, false].into_iter().zip(&mut times) {
            let began = Instant::now();
            for n in 0..batch {
                if changes {
                    table.0.store(0x30 + n % 2, Ordering::Relaxed);
                }
                interrupts.reevaluate(&*table, Some(&[0..=0])).unwrap();
            }
            times.push(began.elapsed() / batch);
        }
    }
    drop(vectors);
    times.map(median)
}

/// KVM_SET_GSI_ROUTING of `routes` routes and nothing else, in ns.
fn bare(controller: &dyn Controller, routes: u32) -> f64 {
    let route = |n, vector| Route {
        gsi: FIRST_GSI + n,
        msi: Msi {
            address: 0xfee0_0000,
            data: vector,
        },
    };
    let mut table: Vec<Route> = (0..routes).map(|n| route(n, 0x31)).collect();
    let mut times = Vec::new();
    for round in 0..ROUNDS as u32 * 20 {
        table[0] = route(0, 0x30 + round % 2);
        let began = Instant::now();
        controller.set_routes(&table).unwrap();
        times.push(began.elapsed());
    }
    median(times)
}

/// The time to invalidate 64 entries, all of which changed, per entry in ns: in one call, as when
/// one run of the queue names them, and in one call each.
fn together(controller: Arc<dyn Controller>, routes: u32) -> [f64; 2] {
    const ENTRIES: u32 = 64;
    let interrupts = Interrupts::new(controller);
    let moving = Arc::new(Moving(AtomicU32::new(0x30)));
    let source = interrupts.source(RID, Some(moving.clone()));
    let vectors = routed(&*source, routes);
    let entries: Vec<_> = (0..ENTRIES).map(|entry| entry * 2..=entry * 2).collect();
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS as u32 {
        moving.0.store(0x30 + round % 2 * 2, Ordering::Relaxed);
        let began = Instant::now();
        interrupts.reevaluate(&*moving, Some(&entries)).unwrap();
        times[0].push(began.elapsed() / ENTRIES);
        moving.0.store(0x31 + round % 2 * 2, Ordering::Relaxed);
        let began = Instant::now();
        for entry in &entries {
            let one = std::slice::from_ref(entry);
            interrupts.reevaluate(&*moving, Some(one)).unwrap();
        }
        times[1].push(began.elapsed() / ENTRIES);
    }
    drop(vectors);
    times.map(median)
}

fn show(name: &str, results: &[(u32, [f64; 2])]) {
    println!("{name}");
    let base = results[0].1;
    for (routes, [changed, same]) in results {
        println!(
            "  {routes:>6} routes: {changed:>9.0} ns ({:>6.2} x), nothing to change {same:>7.0} ns ({:.2} x)",
            changed / base[0],
            same / base[1],
        );
    }
}

/// The time to deliver one interrupt by a route, in ns.
fn delivery(host: &Host) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let vm = host.create_vm(Arc::new(ram), 1).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    lapic.regs[0xf1] = 1;
    vcpu.set_lapic(&lapic).unwrap();
    let interrupts = Interrupts::new(vm.fd().clone());
    let table = Arc::new(Table(AtomicU32::new(0x30)));
    let plain = interrupts.source(RID, None).vector().unwrap();
    let address = 0xfee0_0000;
    plain
        .route(Some(Msi {
            address,
            data: 0x32,
        }))
        .unwrap();
    let remapped = interrupts.source(RID, Some(table)).vector().unwrap();
    remapped.route(Some(Msi { address, data: 1 })).unwrap();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS * 5 {
        for (vector, times) in [&plain, &remapped].into_iter().zip(&mut times) {
            let began = Instant::now();
            for _ in 0..20_000 {
                vector.eventfd().write(1).unwrap();
            }
            times.push(began.elapsed() / 20_000);
        }
    }
    let [plain, remapped] = times.map(median);
    println!(
        "delivery by irqfd: unremapped {plain:.0} ns, remapped {remapped:.0} ns ({:.2} x)",
        remapped / plain
    );
}

fn main() {
    let ours: Vec<_> = [1, 1 << 10, 16 << 10]
        .map(|routes| (routes, invalidation(Arc::new(Nothing), routes, SHORT)))
        .into();
    show("invalidation of one entry, our part", &ours);
    let host = match Host::open() {
        Ok(host) => host,
        Err(why) => {
            println!("without KVM: {why}");
            return;
        }
    };
    delivery(&host);
    println!("invalidation with KVM");
    for routes in [1, 1 << 10, 4072] {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let vm = host.create_vm(Arc::new(ram), 1).unwrap();
        let bare = bare(&**vm.fd(), routes);
        let [changed, same] = invalidation(vm.fd().clone(), routes, (ROUNDS, 20));
        println!(
            "  {routes:>6} routes: KVM_SET_GSI_ROUTING alone {bare:>9.0} ns; one entry {changed:>9.0} \
             ns ({:.2} x), nothing to change {same:>5.0} ns",
            changed / bare
        );
        if routes > 128 {
            let [at_once, one_by_one] = together(vm.fd().clone(), routes);
            println!(
                "                 64 entries, each: at once {at_once:>9.0} ns, one by one \
                 {one_by_one:>9.0} ns ({:.0} x)",
                one_by_one / at_once
            );
        }
    }
}
