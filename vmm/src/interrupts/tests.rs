use std::sync::atomic::{AtomicU32, Ordering};

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
        assert_eq!(interrupts.state().routes.len(), 100);
        vectors[5].route(None).unwrap();
        vectors[5].route(Some(msi(99))).unwrap();
        vectors[5].route(Some(msi(98))).unwrap();
        drop(vectors);
        assert!(interrupts.state().routes.is_empty());
        assert!(interrupts.state().lines.is_empty());
    }
}

/// Adds an offset to the vector that it can change, or blocks.
#[derive(Default)]
struct Unit(AtomicU32);

impl Remapper for Unit {
    fn remap(&self, _rid: Rid, msi: Msi) -> Option<Msi> {
        match self.0.load(Ordering::Relaxed) {
            u32::MAX => None,
            offset => Some(Msi {
                data: msi.data + offset,
                ..msi
            }),
        }
    }

    fn report(&self, _rid: Rid, _msi: Msi) {}
}

#[test]
fn a_remapped_route_follows_its_unit_when_it_is_reevaluated() {
    let Some(host) = for_test() else { return };
    let vm = vm(&host);
    let interrupts = Interrupts::new(vm.fd().clone());
    let unit = Arc::new(Unit::default());
    let behind = interrupts.source(Rid(8), Some(unit.clone()));
    let (behind, plain) = (
        behind.vector().unwrap(),
        interrupts.source(Rid(16), None).vector().unwrap(),
    );
    behind.route(Some(msi(0x30))).unwrap();
    plain.route(Some(msi(0x40))).unwrap();
    let routes = |interrupts: &Interrupts| -> Vec<u32> {
        let state = interrupts.state();
        state.routes.values().map(|m| m.data).collect()
    };
    unit.0.store(2, Ordering::Relaxed);
    interrupts.reevaluate(&|rid, _| rid == Rid(16)).unwrap();
    assert_eq!(routes(&interrupts), [0x30, 0x40]);
    interrupts.reevaluate(&|_, _| true).unwrap();
    assert_eq!(routes(&interrupts), [0x32, 0x40]);
    unit.0.store(u32::MAX, Ordering::Relaxed);
    interrupts.reevaluate(&|_, _| true).unwrap();
    assert_eq!(routes(&interrupts), [0x40]);
    unit.0.store(1, Ordering::Relaxed);
    interrupts.reevaluate(&|_, _| true).unwrap();
    assert_eq!(routes(&interrupts), [0x31, 0x40]);
}

#[test]
fn allocation_is_bounded_by_kvms_routes() {
    let Some(host) = for_test() else { return };
    let vm = vm(&host);
    let interrupts = Interrupts::new(vm.fd().clone());
    let eventfd = Arc::new(EventFd::new(0).unwrap());
    let taken = (0..MAX_ROUTES)
        .take_while(|_| interrupts.add(Rid(8), None, eventfd.clone()).is_ok())
        .count();
    assert_eq!(taken as u32, MAX_ROUTES - IOAPIC_PINS);
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
