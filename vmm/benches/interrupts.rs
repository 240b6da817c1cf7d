//! Interrupt routes: what remapping costs when an interrupt is delivered (nothing: both are irqfds),
//! and what an invalidation of one entry costs beside 1, 1 Ki and 16 Ki routes. Printed as ratios;
//! the absolute figures are this machine's.
//!
//! KVM has at most 4096 routes and takes them all with every change, so 16 Ki are measured without
//! it, which shows our part; with KVM, as many as it has.

#![expect(clippy::unwrap_used, reason = "a benchmark has nobody to report to")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use devices::interrupt::MsiVector;
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

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_nanos() as f64
}

/// The time of one invalidation of entry 0, in ns: with a change, and without.
fn invalidation(controller: Arc<dyn Controller>, routes: u32, batch: u32) -> [f64; 2] {
    let interrupts = Interrupts::new(controller);
    let table = Arc::new(Table(AtomicU32::new(0x30)));
    let source = interrupts.source(RID, Some(table.clone()));
    let vectors: Vec<Arc<dyn MsiVector>> = (0..routes)
        .map(|data| {
            let vector = source.vector().unwrap();
            let address = 0xfee0_0010;
            vector.route(Some(Msi { address, data })).unwrap();
            vector
        })
        .collect();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (changes, times) in [true, false].into_iter().zip(&mut times) {
            let began = Instant::now();
            for n in 0..batch {
                if changes {
                    table.0.store(0x30 + n % 2, Ordering::Relaxed);
                }
                interrupts.reevaluate(&*table, Some(0..=0)).unwrap();
            }
            times.push(began.elapsed() / batch);
        }
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
        .map(|routes| (routes, invalidation(Arc::new(Nothing), routes, 20_000)))
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
    let with_kvm: Vec<_> = [1, 1 << 10, 4072]
        .map(|routes| {
            let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
            let vm = host.create_vm(Arc::new(ram), 1).unwrap();
            (routes, invalidation(vm.fd().clone(), routes, 20))
        })
        .into();
    show("invalidation of one entry, with KVM", &with_kvm);
}
