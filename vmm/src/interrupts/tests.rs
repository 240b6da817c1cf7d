use std::sync::atomic::{AtomicU32, Ordering};

use devices::bus::BusDevice;
use devices::legacy::Ioapic;
use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::kvm::{Host, Vm, for_test};

fn vm(host: &Host) -> Vm {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    host.create_vm(Arc::new(ram), 1).unwrap()
}

fn msi(vector: u8) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector.into(),
    }
}

#[test]
fn each_vector_has_its_own_route_and_gives_it_back() {
    let Some(host) = for_test() else { return };
    let vm = vm(&host);
    let interrupts = Interrupts::new(vm.fd().clone());
    let source = interrupts.source(Rid(8), None);
    for _ in 0..3 {
        let vectors: Vec<_> = (0..100).map(|_| source.vector().unwrap()).collect();
        for (n, vector) in vectors.iter().enumerate() {
            vector.route(Some(msi(n as u8))).unwrap();
        }
        assert_eq!(interrupts.state().routes.list.len(), 100);
        vectors[5].route(None).unwrap();
        vectors[5].route(Some(msi(99))).unwrap();
        vectors[5].route(Some(msi(98))).unwrap();
        drop(vectors);
        assert!(interrupts.state().routes.list.is_empty());
        assert!(interrupts.state().by_entry.is_empty());
        assert!(interrupts.state().lines.is_empty());
    }
}

/// Adds an offset to the vector that it can change, or blocks. The entry is the vector.
#[derive(Default)]
struct Unit {
    offset: AtomicU32,
    faults: Mutex<Vec<(Rid, Msi)>>,
}

const BLOCKS: u32 = u32::MAX;

impl Unit {
    fn set(&self, offset: u32) {
        self.offset.store(offset, Ordering::Relaxed);
    }

    fn faults(&self) -> usize {
        self.faults.lock().unwrap().len()
    }
}

impl Remapper for Unit {
    fn remap(&self, _rid: Rid, msi: Msi) -> Option<Msi> {
        match self.offset.load(Ordering::Relaxed) {
            BLOCKS => None,
            offset => Some(Msi {
                data: msi.data + offset,
                ..msi
            }),
        }
    }

    fn send(&self, rid: Rid, msi: Msi) -> Option<Msi> {
        let remapped = self.remap(rid, msi);
        if remapped.is_none() {
            self.faults.lock().unwrap().push((rid, msi));
        }
        remapped
    }

    fn entry(&self, msi: Msi) -> Option<u32> {
        Some(msi.data)
    }
}

/// A kernel that remembers what it was told.
#[derive(Default)]
struct Kernel(Mutex<Told>);

#[derive(Default)]
struct Told {
    routes: Vec<Route>,
    updates: usize,
    connected: BTreeSet<u32>,
    signals: Vec<Msi>,
    pulses: Vec<u32>,
    refuse: bool,
}

impl Kernel {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.lock().unwrap()
    }

    /// The vector that a GSI leads to, while its eventfd is connected.
    fn vector(&self, gsi: u32) -> Option<u32> {
        let told = self.told();
        let route = told.routes.iter().find(|route| route.gsi == gsi)?;
        told.connected.contains(&gsi).then_some(route.msi.data)
    }
}

impl Controller for Kernel {
    fn set_routes(&self, routes: &[Route]) -> io::Result<()> {
        let mut told = self.told();
        if told.refuse {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        told.updates += 1;
        told.routes = routes.to_vec();
        Ok(())
    }

    fn connect(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
        assert!(self.told().connected.insert(gsi));
        Ok(())
    }

    fn disconnect(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
        assert!(self.told().connected.remove(&gsi));
        Ok(())
    }

    fn pulse(&self, gsi: u32) {
        self.told().pulses.push(gsi);
    }

    fn signal(&self, msi: Msi) {
        self.told().signals.push(msi);
    }

    fn doorbell(&self, _: bool, _: Space, _: u64, _: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

const RID: Rid = Rid(8);

struct Bench {
    kernel: Arc<Kernel>,
    interrupts: Arc<Interrupts>,
    unit: Arc<Unit>,
}

impl Bench {
    fn new() -> Self {
        let kernel = Arc::new(Kernel::default());
        Self {
            interrupts: Interrupts::new(kernel.clone()),
            kernel,
            unit: Arc::default(),
        }
    }

    fn remapper(&self) -> Arc<dyn Remapper> {
        self.unit.clone()
    }

    /// A vector behind the unit that the guest programmed, and its GSI.
    fn vector(&self, vector: u8) -> (Arc<dyn MsiVector>, u32) {
        let source = self.interrupts.source(RID, Some(self.remapper()));
        let made = source.vector().unwrap();
        made.route(Some(msi(vector))).unwrap();
        let last = *self.interrupts.state().lines.keys().max().unwrap();
        (made, last)
    }

    fn reevaluate(&self, entries: Option<RangeInclusive<u32>>) {
        let entries = entries.as_ref().map(std::slice::from_ref);
        self.interrupts.reevaluate(&*self.unit, entries).unwrap();
    }
}

/// Waits until `done`, which another thread makes true.
fn until(done: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !done() {
        assert!(began.elapsed().as_secs() < 200, "nothing happens");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn a_remapped_route_follows_its_unit_when_it_is_reevaluated() {
    let bench = Bench::new();
    let (_behind, behind) = bench.vector(0x30);
    let plain = bench.interrupts.source(Rid(16), None).vector().unwrap();
    plain.route(Some(msi(0x40))).unwrap();
    bench.unit.set(2);
    assert_eq!(
        bench.kernel.vector(behind),
        Some(0x30),
        "not before it is told"
    );
    let other = Unit::default();
    bench.interrupts.reevaluate(&other, None).unwrap();
    assert_eq!(bench.kernel.vector(behind), Some(0x30), "another unit's");
    bench.reevaluate(None);
    assert_eq!(bench.kernel.vector(behind), Some(0x32));
    assert_eq!(bench.kernel.vector(behind + 1), Some(0x40));
    bench.unit.set(BLOCKS);
    bench.reevaluate(None);
    assert_eq!(bench.kernel.vector(behind), None);
    assert_eq!(bench.kernel.vector(behind + 1), Some(0x40));
    bench.unit.set(1);
    bench.reevaluate(None);
    assert_eq!(bench.kernel.vector(behind), Some(0x31));
}

#[test]
fn an_invalidation_rewrites_exactly_the_routes_that_go_by_its_entries() {
    let bench = Bench::new();
    let vectors: Vec<_> = (0x30..0x50).map(|vector| bench.vector(vector)).collect();
    bench.unit.set(1);
    let before = bench.kernel.told().updates;
    bench.reevaluate(Some(0x38..=0x3b));
    assert_eq!(
        bench.kernel.told().updates,
        before + 1,
        "one update for all of them"
    );
    for (wrote, (_, gsi)) in (0x30u32..).zip(&vectors) {
        let moved = u32::from((0x38..=0x3b).contains(&wrote));
        assert_eq!(bench.kernel.vector(*gsi), Some(wrote + moved));
    }
    bench.reevaluate(Some(0x38..=0x3b));
    bench.reevaluate(Some(0x100..=0x1ff));
    assert_eq!(
        bench.kernel.told().updates,
        before + 1,
        "nothing has changed"
    );
    // Ranges that come together are one update, also where they overlap.
    bench.unit.set(2);
    let some = [0x3a..=0x3d, 0x3c..=0x3f, 0x200..=0x2ff];
    let reevaluated = bench.interrupts.reevaluate(&*bench.unit, Some(&some));
    reevaluated.unwrap();
    assert_eq!(bench.kernel.told().updates, before + 2);
    for (wrote, (_, gsi)) in (0x30u32..).zip(&vectors) {
        let moved = match wrote {
            0x3a..=0x3f => 2,
            0x38..=0x39 => 1,
            _ => 0,
        };
        assert_eq!(bench.kernel.vector(*gsi), Some(wrote + moved));
    }
    bench.unit.set(1);
    // The entry that counts is the one that the guest programmed last.
    vectors[0].0.route(Some(msi(0x90))).unwrap();
    bench.unit.set(4);
    bench.reevaluate(Some(0x30..=0x30));
    assert_eq!(bench.kernel.vector(vectors[0].1), Some(0x91));
    bench.reevaluate(Some(0x90..=0x90));
    assert_eq!(bench.kernel.vector(vectors[0].1), Some(0x94));
}

#[test]
fn a_blocked_interrupt_of_a_device_is_a_fault_and_is_not_delivered() {
    let bench = Bench::new();
    bench.unit.set(BLOCKS);
    let (vector, gsi) = bench.vector(0x30);
    assert_eq!(bench.unit.faults(), 0, "nothing was sent yet");
    vector.eventfd().write(1).unwrap();
    until(|| bench.unit.faults() == 1);
    assert_eq!(bench.unit.faults.lock().unwrap()[0], (RID, msi(0x30)));
    vector.eventfd().write(1).unwrap();
    until(|| bench.unit.faults() == 2);
    assert_eq!(bench.kernel.vector(gsi), None);
    assert!(bench.kernel.told().signals.is_empty());
    // A vector of the host's kernel (VFIO) is no different, and one that is masked stays silent.
    vector.route(None).unwrap();
    vector.eventfd().write(1).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(bench.unit.faults(), 2);
    assert_eq!(vector.eventfd().read().unwrap(), 1, "it waits for unmask");
}

#[test]
fn what_comes_while_an_entry_changes_is_a_fault_or_delivered_and_never_lost() {
    let bench = Bench::new();
    let (vector, gsi) = bench.vector(0x30);
    let mut sent = 0;
    for round in 0..200 {
        bench.unit.set(BLOCKS);
        bench.reevaluate(Some(0x30..=0x30));
        assert_eq!(bench.kernel.vector(gsi), None);
        vector.eventfd().write(1).unwrap();
        sent += 1;
        if round % 2 == 0 {
            until(|| bench.unit.faults() + bench.kernel.told().signals.len() == sent);
        }
        // Else the thread may or may not have seen it.
        bench.unit.set(0);
        bench.reevaluate(Some(0x30..=0x30));
        assert_eq!(bench.kernel.vector(gsi), Some(0x30));
        assert!(vector.eventfd().read().is_err(), "nothing is left in it");
        let told = bench.unit.faults() + bench.kernel.told().signals.len();
        assert_eq!(told, sent);
    }
}

#[test]
fn an_entry_that_became_present_without_an_invalidation_delivers() {
    let bench = Bench::new();
    bench.unit.set(BLOCKS);
    let (vector, gsi) = bench.vector(0x30);
    bench.unit.set(5);
    vector.eventfd().write(1).unwrap();
    until(|| bench.kernel.vector(gsi) == Some(0x35));
    assert_eq!(bench.kernel.told().signals, [msi(0x35)]);
    assert_eq!(bench.unit.faults(), 0);
}

#[test]
fn a_line_that_cannot_be_watched_leaves_no_other_with_a_route_that_is_out_of_date() {
    let bench = Bench::new();
    let shared = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    // It can be watched once.
    let twice = [0x30, 0x31].map(|number| {
        let gsi = bench
            .interrupts
            .add(RID, Some(bench.remapper()), shared.clone())
            .unwrap();
        let vector = Vector {
            interrupts: bench.interrupts.clone(),
            gsi,
            eventfd: shared.clone(),
        };
        vector.route(Some(msi(number))).unwrap();
        vector
    });
    let (_other, other) = bench.vector(0x32);
    bench.unit.set(BLOCKS);
    bench.interrupts.reevaluate(&*bench.unit, None).unwrap_err();
    for gsi in twice
        .each_ref()
        .map(|vector| vector.gsi)
        .iter()
        .chain([&other])
    {
        assert_eq!(bench.kernel.vector(*gsi), None, "GSI {gsi}");
    }
    // And what passes again is in the kernel's table.
    bench.unit.set(1);
    bench.reevaluate(None);
    assert_eq!(bench.kernel.vector(other), Some(0x33));
}

#[test]
fn a_refusal_of_the_kernel_leaves_no_route_that_is_out_of_date() {
    let bench = Bench::new();
    let (_vector, gsi) = bench.vector(0x30);
    bench.unit.set(7);
    bench.kernel.told().refuse = true;
    assert!(bench.interrupts.reevaluate(&*bench.unit, None).is_err());
    assert_eq!(bench.kernel.vector(gsi), None);
    bench.kernel.told().refuse = false;
    bench.reevaluate(None);
    assert_eq!(bench.kernel.vector(gsi), Some(0x37));
}

#[test]
fn nothing_is_left_of_a_vector_that_is_gone_blocked_or_not() {
    let bench = Bench::new();
    for offset in [0, BLOCKS] {
        bench.unit.set(offset);
        let (vector, _) = bench.vector(0x30);
        drop(vector);
        let state = bench.interrupts.state();
        assert!(state.lines.is_empty() && state.by_entry.is_empty());
        assert!(state.routes.list.is_empty() && state.routes.at.is_empty());
        assert!(bench.kernel.told().connected.is_empty());
    }
}

/// Level-triggered pins behind remapping, as Linux uses them: the entry of the table says edge, the
/// redirection entry says level, and its vector (the pin) is what the I/O APIC is told at EOI.
#[test]
fn a_level_triggered_pin_behind_remapping_ends_by_a_directed_eoi() {
    let bench = Bench::new();
    bench.interrupts.remap_pins(Rid(0xfff8), &bench.remapper());
    bench.unit.set(0x20);
    let ioapic = Ioapic::new(bench.interrupts.clone());
    program(&ioapic, 9, 1 << 15 | 9);
    ioapic.set(9, true);
    assert_eq!(bench.kernel.told().pulses, [9]);
    ioapic.write(0x40, &9u32.to_le_bytes());
    assert_eq!(bench.kernel.told().pulses, [9, 9], "the line is still high");
    ioapic.set(9, false);
    ioapic.write(0x40, &9u32.to_le_bytes());
    assert_eq!(bench.kernel.told().pulses, [9, 9]);
}

/// Without remapping, or where both entries have one vector, KVM tells of the EOI of a route that
/// is level-triggered, and every I/O APIC hears the vector.
#[test]
fn a_level_triggered_pin_ends_by_a_broadcast_eoi() {
    let bench = Bench::new();
    let ioapic = Ioapic::new(bench.interrupts.clone());
    program(&ioapic, 9, 1 << 15 | 0x39);
    let route = bench.kernel.told().routes[0];
    assert_eq!(
        route.msi.data >> 15 & 1,
        1,
        "KVM must see that it is level-triggered"
    );
    ioapic.set(9, true);
    ioapic.end_of_interrupt(0x38);
    assert_eq!(bench.kernel.told().pulses, [9]);
    ioapic.end_of_interrupt(0x39);
    assert_eq!(bench.kernel.told().pulses, [9, 9]);
}

#[test]
fn a_blocked_pin_is_a_fault_at_each_interrupt_and_comes_back_with_its_entry() {
    let bench = Bench::new();
    bench.interrupts.remap_pins(Rid(0xfff8), &bench.remapper());
    bench.unit.set(BLOCKS);
    let ioapic = Ioapic::new(bench.interrupts.clone());
    program(&ioapic, 4, 0x34);
    for _ in 0..3 {
        ioapic.set(4, true);
        ioapic.set(4, false);
    }
    assert_eq!(
        (bench.unit.faults(), bench.kernel.told().pulses.len()),
        (3, 0)
    );
    bench.unit.set(1);
    ioapic.set(4, true);
    assert_eq!(bench.kernel.told().pulses, [4]);
    assert_eq!(bench.kernel.told().routes[0].msi.data, 0x35);
}

fn program(ioapic: &Ioapic, pin: u8, entry: u64) {
    for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
        ioapic.write(0x00, &[0x10 + 2 * pin + half]);
        ioapic.write(0x10, &value.to_le_bytes());
    }
}

#[test]
fn allocation_is_bounded_by_kvms_routes() {
    let Some(host) = for_test() else { return };
    let vm = vm(&host);
    let interrupts = Interrupts::new(vm.fd().clone());
    let eventfd = Arc::new(EventFd::new(0).unwrap());
    let taken = (0..5000)
        .take_while(|_| interrupts.add(Rid(8), None, eventfd.clone()).is_ok())
        .count();
    assert_eq!(taken as u32, interrupts.vm.limit() - IOAPIC_PINS);
}

/// Signals that came in while a vector was disconnected are delivered when it is connected:
/// nothing is lost while a unit has blocked it for a moment.
#[test]
fn an_irqfd_delivers_to_a_halted_vcpu_and_a_pin_pulses() {
    let Some(host) = for_test() else { return };
    let vm = vm(&host);
    let interrupts = Interrupts::new(vm.fd().clone());
    // Vector 0x30 of the real-mode table leads to 0:0x2000. The APIC is enabled by its spurious
    // vector register through KVM_SET_LAPIC.
    let ram = vm.ram();
    ram.write_obj(0x2000u32, GuestAddress(0x30 * 4)).unwrap();
    // sti; hlt; jmp to the hlt
    ram.write_slice(&[0xfb, 0xf4, 0xeb, 0xfd], GuestAddress(0x1000))
        .unwrap();
    // out 0x10, al; iret
    ram.write_slice(&[0xe6, 0x10, 0xcf], GuestAddress(0x2000))
        .unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs {
        rip: 0x1000,
        rsp: 0x8000,
        rflags: 2,
        ..Default::default()
    })
    .unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    lapic.regs[0xf1] = 1;
    vcpu.set_lapic(&lapic).unwrap();

    let vector = interrupts.source(Rid(8), None).vector().unwrap();
    vector.eventfd().write(1).unwrap();
    vector.route(Some(msi(0x30))).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, _) => {}
        other => panic!("{other:?}"),
    }
    // No EOI was written, so a second 0x30 would stay pending; another vector of a higher class
    // passes.
    ram.write_obj(0x2000u32, GuestAddress(0x41 * 4)).unwrap();
    interrupts.set_pin(4, Some(msi(0x41))).unwrap();
    interrupts.pulse_pin(4);
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, _) => {}
        other => panic!("{other:?}"),
    }
    ram.write_obj(0x2000u32, GuestAddress(0x52 * 4)).unwrap();
    interrupts.send(msi(0x52));
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, _) => {}
        other => panic!("{other:?}"),
    }
}
