//! Tiny guests in machine code, run where /dev/kvm works.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::kvm::registers::{self, Entry};
use crate::kvm::{Host, cpuid, for_test};

/// Records exits; reads give what the address says.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    fn note(&self, text: String) {
        self.0.lock().unwrap().push(text);
    }

    fn first(&self) -> Vec<String> {
        self.0.lock().unwrap().iter().take(8).cloned().collect()
    }
}

impl Exits for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.note(format!("in {port:#x} {}", data.len()));
        data.fill(0x41);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        assert_ne!(port, 0x66, "a device panics on purpose");
        self.note(format!("out {port:#x} {data:x?}"));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.note(format!("read {address:#x} {}", data.len()));
        data.fill(0x42);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.note(format!("write {address:#x} {data:x?}"));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.note(format!("eoi {vector:#x}"));
    }
}

struct Guest {
    threads: VcpuThreads,
    events: Arc<EventLine>,
    recorder: Arc<Recorder>,
}

impl Guest {
    /// Runs real-mode `code` at 0x1000 on `count` vCPUs, of which the first starts there.
    fn run(host: &Host, code: &[u8], count: u8) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        ram.write_slice(code, GuestAddress(0x1000)).unwrap();
        let vm = Arc::new(host.create_vm(Arc::new(ram), count).unwrap());
        let vcpus = (0..count)
            .map(|index| {
                let fd = vm.create_vcpu(index).unwrap();
                let cpuid = cpuid::compose(host.cpuid(), index, count, host.tsc_deadline());
                let entry = (index == 0).then_some(Entry::Real { ip: 0x1000 });
                registers::set_up(&fd, index, &cpuid, entry).unwrap();
                fd
            })
            .collect();
        let recorder = Arc::new(Recorder::default());
        let exits: Arc<dyn Exits> = recorder.clone();
        let events = Arc::new(EventLine::new().unwrap());
        let threads = VcpuThreads::start(&vm, vcpus, &exits, &events).unwrap();
        Self {
            threads,
            events,
            recorder,
        }
    }

    fn wait_for(&self, text: &str) {
        let end = Instant::now() + Duration::from_secs(200);
        while !self.recorder.0.lock().unwrap().iter().any(|t| t == text) {
            assert!(
                Instant::now() < end,
                "no {text}: {:?}",
                self.recorder.first()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Says that the end was reached, and halts.
const END: &[u8] = &[
    0x30, 0xc0, // xor al, al
    0xe6, 0x99, // out 0x99, al
    0xfa, 0xf4, // cli; hlt
    0xeb, 0xfc, // jmp to the cli
];

#[test]
fn port_and_memory_accesses_reach_the_buses_in_order() {
    let Some(host) = for_test() else { return };
    let mut code = vec![
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xec, // in al, dx
        0xee, // out dx, al
        0x66, 0xef, // out dx, eax
        0xb8, 0x00, 0xf0, // mov ax, 0xf000
        0x8e, 0xd8, // mov ds, ax
        0xa0, 0x34, 0x12, // mov al, [0x1234]
        0xa2, 0x35, 0x12, // mov [0x1235], al
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
    ];
    code.extend(END);
    let guest = Guest::run(&host, &code, 1);
    guest.wait_for("out 0x99 [0]");
    let seen = guest.recorder.0.lock().unwrap().clone();
    assert_eq!(seen[0], "in 0x3f8 1");
    assert_eq!(seen[1], "out 0x3f8 [41]");
    assert!(seen[2].starts_with("out 0x3f8 [41, "), "{seen:?}");
    assert_eq!(seen[3], "read 0xf1234 1");
    assert_eq!(seen[4], "write 0xf1235 [42]");
}

#[test]
fn a_string_instruction_is_several_accesses_of_its_own_size() {
    let Some(host) = for_test() else { return };
    let mut code = vec![
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xbe, 0x00, 0x10, // mov si, 0x1000
        0xb9, 0x03, 0x00, // mov cx, 3
        0xfc, // cld
        0xf3, 0x6f, // rep outsw
    ];
    code.extend(END);
    let guest = Guest::run(&host, &code, 1);
    guest.wait_for("out 0x99 [0]");
    let seen = guest.recorder.0.lock().unwrap().clone();
    assert_eq!(
        seen,
        [
            "out 0x3f8 [ba, f8]",
            "out 0x3f8 [3, be]",
            "out 0x3f8 [0, 10]",
            "out 0x99 [0]"
        ]
    );
}

#[test]
fn a_guest_that_never_exits_and_vcpus_that_never_started_stop_at_once() {
    let Some(host) = for_test() else { return };
    for round in 0..50 {
        // out 0x10, al; jmp $
        let mut guest = Guest::run(&host, &[0xe6, 0x10, 0xeb, 0xfe], 4);
        if round % 2 == 0 {
            guest.wait_for("out 0x10 [0]");
        }
        guest.threads.stop();
        assert_eq!(guest.events.event(), None);
    }
}

#[test]
fn a_halted_guest_stops_at_once() {
    let Some(host) = for_test() else { return };
    let mut guest = Guest::run(&host, &[0xe6, 0x10, 0xfa, 0xf4, 0xeb, 0xfd], 1);
    guest.wait_for("out 0x10 [0]");
    guest.threads.stop();
    assert_eq!(guest.events.event(), None);
}

#[test]
fn only_the_first_event_counts() {
    let line = EventLine::new().unwrap();
    line.report(GuestEvent::PowerOff);
    line.report(GuestEvent::Reset);
    assert_eq!(line.event(), Some(GuestEvent::PowerOff));
    assert_eq!(line.eventfd().read().unwrap(), 2);
}

#[test]
fn a_triple_fault_a_power_off_and_a_reset_are_told_apart() {
    let told = |exit| match handle(exit, &Recorder::default(), 0) {
        Next::Stop(event) => event,
        _ => panic!("the vCPU goes on"),
    };
    assert_eq!(told(VcpuExit::Shutdown), GuestEvent::TripleFault);
    let event = VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, &[]);
    assert_eq!(told(event), GuestEvent::PowerOff);
    let event = VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, &[]);
    assert_eq!(told(event), GuestEvent::Reset);
    assert!(matches!(
        told(VcpuExit::InternalError),
        GuestEvent::Failed(_)
    ));
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let Some(host) = for_test() else { return };
    // out 0x10, al; jmp to it: busy for ever. Three more vCPUs never started.
    let mut guest = Guest::run(&host, &[0xe6, 0x10, 0xeb, 0xfc], 4);
    guest.wait_for("out 0x10 [0]");
    let count = || guest.recorder.0.lock().unwrap().len();
    for _ in 0..20 {
        assert!(guest.threads.pause(Duration::from_secs(200)));
        let still = count();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(count(), still);
        guest.threads.resume();
        let end = Instant::now() + Duration::from_secs(200);
        while count() == still {
            assert!(Instant::now() < end, "the guest does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(guest.threads.pause(Duration::from_secs(200)));
    guest.threads.stop();
    assert_eq!(guest.events.event(), None);
}

#[test]
fn a_vcpu_that_ended_does_not_keep_a_pause_waiting() {
    let Some(host) = for_test() else { return };
    // out 0x66, al: a device that panics.
    let guest = Guest::run(&host, &[0xe6, 0x66, 0xf4], 1);
    let end = Instant::now() + Duration::from_secs(200);
    while guest.events.event().is_none() {
        assert!(Instant::now() < end, "the guest does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(matches!(guest.events.event(), Some(GuestEvent::Failed(_))));
    assert!(guest.threads.pause(Duration::from_secs(200)));
}
