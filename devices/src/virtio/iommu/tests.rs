//! The device behind its rings, driven as a driver does, with the software engine behind it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::backend::{Backend, Objects};
use viommu::dma::DmaPort;
use viommu::reserved::Regions;
use viommu::spec::virtio_iommu::{
    Fault, ReqAttach, ReqDetach, ReqHead, ReqMap, ReqProbe, ReqUnmap, feature,
};
use viommu::virtio::{Config, Iommu};
use viommu::{GuestRam, Rid};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, IntoBytes};

use super::super::device::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use super::super::ring::{Ring, RingConfig};
use super::VirtioIommu;

const RAM: u64 = 1 << 20;
const A: Rid = Rid::new(0, 3, 0);
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Where a driver's buffers are.
const BUFFERS: u64 = 0x2_0000;
/// What devices read and write.
const DATA: u64 = 0x8_0000;

const REQUESTQ: RingConfig = RingConfig {
    size: 256,
    descriptors: 0x1000,
    available: 0x3000,
    used: 0x4000,
};
const EVENTQ: RingConfig = RingConfig {
    size: 16,
    descriptors: 0x6000,
    available: 0x7000,
    used: 0x8000,
};

#[derive(Default)]
struct Interrupts {
    queues: [AtomicUsize; 2],
    needs_reset: AtomicBool,
}

impl VirtioInterrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::Relaxed);
    }

    fn config(&self) {}

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Relaxed);
    }
}

/// One side of a queue as a driver keeps it.
struct Queue {
    config: RingConfig,
    available: u16,
    used: u16,
}

impl Queue {
    fn new(config: RingConfig) -> Self {
        Self {
            config,
            available: 0,
            used: 0,
        }
    }

    fn descriptor(&self, ram: &GuestRam, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
        let at = GuestAddress(self.config.descriptors + 16 * u64::from(index));
        let bytes = [
            &buffer.0.to_le_bytes()[..],
            &buffer.1.to_le_bytes(),
            &flags.to_le_bytes(),
            &next.to_le_bytes(),
        ];
        ram.write_slice(&bytes.concat(), at).unwrap();
    }

    /// Makes a chain of descriptors from `first` available.
    fn offer(&mut self, ram: &GuestRam, first: u16, buffers: &[(u64, u32, bool)]) {
        for (n, &(address, length, write)) in (0u16..).zip(buffers) {
            let more = usize::from(n) + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if write { WRITE } else { 0 };
            self.descriptor(ram, first + n, (address, length), flags, first + n + 1);
        }
        let slot = u64::from(self.available % self.config.size);
        let at = GuestAddress(self.config.available + 4 + 2 * slot);
        ram.write_slice(&first.to_le_bytes(), at).unwrap();
        self.available += 1;
        let at = GuestAddress(self.config.available + 2);
        ram.write_slice(&self.available.to_le_bytes(), at).unwrap();
    }

    /// The next used element: head and length.
    fn take(&mut self, ram: &GuestRam) -> Option<(u32, u32)> {
        let at = |offset| GuestAddress(self.config.used + offset);
        let index: u16 = ram.read_obj(at(2)).unwrap();
        if index == self.used {
            return None;
        }
        let slot = u64::from(self.used % self.config.size);
        self.used += 1;
        let head = ram.read_obj(at(4 + 8 * slot)).unwrap();
        Some((head, ram.read_obj(at(8 + 8 * slot)).unwrap()))
    }
}

struct Bench {
    ram: GuestRam,
    engine: Arc<Engine>,
    unit: Arc<Iommu>,
    device: Arc<VirtioIommu>,
    interrupts: Arc<Interrupts>,
    port: DmaPort,
    requests: Queue,
    events: Queue,
}

impl Bench {
    fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let ram = Arc::new(ram);
        let engine = Arc::new(Engine::new(ram.clone()));
        let port = engine.add_endpoint(A, EndpointConfig::default()).unwrap();
        let config = Config::compose(&engine.capabilities(), 0).unwrap();
        let unit = Arc::new(Iommu::new(config));
        unit.add_endpoint(A, engine.clone(), Regions::new())
            .unwrap();
        let mut bench = Self {
            device: VirtioIommu::new(unit.clone()),
            ram,
            engine,
            unit,
            interrupts: Arc::default(),
            port,
            requests: Queue::new(REQUESTQ),
            events: Queue::new(EVENTQ),
        };
        bench.activate();
        bench
    }

    fn activate(&mut self) {
        let dma = DmaPort::direct(self.ram.clone());
        for config in [REQUESTQ, EVENTQ] {
            self.ram
                .write_obj(0u32, GuestAddress(config.available))
                .unwrap();
            self.ram.write_obj(0u32, GuestAddress(config.used)).unwrap();
        }
        (self.requests, self.events) = (Queue::new(REQUESTQ), Queue::new(EVENTQ));
        let queue = |config| {
            let ring = Ring::new(config, false, true, &dma.access()).unwrap();
            let kick = Arc::new(EventFd::new(0).unwrap());
            Some(ActiveQueue { ring, kick })
        };
        let queues = vec![queue(REQUESTQ), queue(EVENTQ)];
        let activation = Activation {
            features: self.device.features(),
            queues,
            dma: dma.clone(),
            interrupt: self.interrupts.clone(),
        };
        self.device.activate(activation).unwrap();
    }

    /// Sends requests together, each with room for a tail, and returns their statuses.
    fn send(&mut self, requests: &[Vec<u8>]) -> Vec<u8> {
        for (n, request) in (0u16..).zip(requests) {
            let at = BUFFERS + u64::from(n) * 0x100;
            self.ram.write_slice(request, GuestAddress(at)).unwrap();
            self.ram.write_obj(!0u32, GuestAddress(at + 0x80)).unwrap();
            let buffers = [(at, request.len() as u32, false), (at + 0x80, 4, true)];
            self.requests.offer(&self.ram, n * 2, &buffers);
        }
        self.device.notify(0);
        // All of them are answered when the kick is over.
        (0u16..)
            .zip(requests)
            .map(|(n, _)| {
                let used = self.requests.take(&self.ram);
                assert_eq!(used, Some((u32::from(n) * 2, 4)));
                let at = BUFFERS + u64::from(n) * 0x100 + 0x80;
                let tail: [u8; 4] = self.ram.read_obj(GuestAddress(at)).unwrap();
                assert_eq!(tail[1..], [0; 3]);
                tail[0]
            })
            .collect()
    }

    fn attach_and_map(&mut self, flags: u32) {
        let map = map(0x1_0000, 0x1_0fff, DATA, flags);
        assert_eq!(self.send(&[attach(), map]), [0, 0]);
    }

    /// Gives buffers of these lengths to the event queue.
    fn offer_events(&mut self, lengths: &[u32]) {
        for (n, &length) in (0u16..).zip(lengths) {
            let at = BUFFERS + 0x1_0000 + u64::from(n) * 0x40;
            self.events.offer(&self.ram, n, &[(at, length, true)]);
        }
        self.device.notify(1);
    }

    /// The next report.
    fn event(&mut self) -> Option<Fault> {
        let (head, length) = self.events.take(&self.ram)?;
        assert_eq!(length, 24);
        let at = BUFFERS + 0x1_0000 + u64::from(head) * 0x40;
        let bytes: [u8; 24] = self.ram.read_obj(GuestAddress(at)).unwrap();
        Some(Fault::read_from_bytes(&bytes).unwrap())
    }

    fn read(&self, iova: u64) -> Option<u8> {
        self.port.access().read_obj(GuestAddress(iova)).ok()
    }

    fn write(&self, iova: u64, byte: u8) -> bool {
        self.port
            .access()
            .write_obj(byte, GuestAddress(iova))
            .is_ok()
    }
}

fn head(r#type: u8) -> ReqHead {
    ReqHead {
        r#type,
        reserved: [0; 3],
    }
}

fn attach() -> Vec<u8> {
    let request = ReqAttach {
        head: head(1),
        domain: 1.into(),
        endpoint: u32::from(A.0).into(),
        flags: 0.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

fn detach() -> Vec<u8> {
    let request = ReqDetach {
        head: head(2),
        domain: 1.into(),
        endpoint: u32::from(A.0).into(),
        reserved: [0; 8],
    };
    request.as_bytes().to_vec()
}

fn map(first: u64, last: u64, phys: u64, flags: u32) -> Vec<u8> {
    let request = ReqMap {
        head: head(3),
        domain: 1.into(),
        virt_start: first.into(),
        virt_end: last.into(),
        phys_start: phys.into(),
        flags: flags.into(),
    };
    request.as_bytes().to_vec()
}

fn unmap(first: u64, last: u64) -> Vec<u8> {
    let request = ReqUnmap {
        head: head(4),
        domain: 1.into(),
        virt_start: first.into(),
        virt_end: last.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

#[test]
fn a_device_reaches_what_is_mapped_as_it_is_mapped_and_nothing_else() {
    let mut bench = Bench::new();
    bench.ram.write_obj(7u8, GuestAddress(DATA + 5)).unwrap();
    assert_eq!(bench.read(DATA + 5), None, "blocked before it is attached");
    bench.attach_and_map(1);
    assert_eq!(bench.read(0x1_0005), Some(7));
    assert!(!bench.write(0x1_0005, 8), "mapped without WRITE");
    assert_eq!(bench.read(0x1_1000), None);
    assert_eq!(bench.read(DATA + 5), None);
    let again = [unmap(0, u64::MAX), map(0x1_0000, 0x1_0fff, DATA, 3)];
    assert_eq!(bench.send(&again), [0, 0]);
    assert!(bench.write(0x1_0005, 8));
    assert_eq!(bench.send(&[unmap(0x1_0000, 0x1_0fff)]), [0]);
    assert_eq!(bench.read(0x1_0005), None);
    assert_eq!(bench.send(&[detach()]), [0]);
    assert_eq!(bench.read(DATA + 5), None);
}

#[test]
fn a_map_to_what_is_no_memory_of_the_guest_is_a_fault_status_and_no_more() {
    let mut bench = Bench::new();
    assert_eq!(bench.send(&[attach(), map(0, 0xfff, RAM, 3)]), [0, 7]);
    assert_eq!(bench.read(0), None);
    assert_eq!(bench.engine.objects().mappings, 0);
}

#[test]
fn faults_come_with_the_endpoint_and_the_address_and_wait_for_buffers() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0x1234), None);
    bench.attach_and_map(1);
    assert!(!bench.write(0x1_0123, 1));
    bench.offer_events(&[24, 64, 24]);
    let (blocked, refused) = (bench.event().unwrap(), bench.event().unwrap());
    assert_eq!(blocked.reason, 1);
    assert_eq!(blocked.endpoint.get(), u32::from(A.0));
    assert_eq!(
        (blocked.address.get(), blocked.flags.get()),
        (0x1234, 0x101)
    );
    assert_eq!(refused.reason, 2);
    assert_eq!(
        (refused.address.get(), refused.flags.get()),
        (0x1_0123, 0x102)
    );
    assert_eq!(bench.event(), None);
    assert!(bench.interrupts.queues[1].load(Ordering::Relaxed) > 0);
    // The third buffer is there when the next fault happens.
    assert_eq!(bench.read(0xf000), None);
    assert_eq!(bench.event().unwrap().address.get(), 0xf000);
}

#[test]
fn should_not_use_several_buffers_for_a_report_that_does_not_fit_one() {
    let mut bench = Bench::new();
    assert_eq!(bench.read(0x1234), None);
    bench.offer_events(&[8, 23, 24]);
    assert_eq!(bench.events.take(&bench.ram), Some((0, 0)));
    assert_eq!(bench.events.take(&bench.ram), Some((1, 0)));
    assert_eq!(bench.event().unwrap().address.get(), 0x1234);
}

#[test]
fn a_request_may_be_cut_into_buffers_anywhere() {
    let whole = map(0x1_0000, 0x1_0fff, DATA, 3);
    for cut in 1..whole.len() as u32 {
        for tail_cut in 1..4 {
            let mut bench = Bench::new();
            assert_eq!(bench.send(&[attach()]), [0]);
            bench
                .ram
                .write_slice(&whole, GuestAddress(BUFFERS))
                .unwrap();
            let rest = whole.len() as u32 - cut;
            let buffers = [
                (BUFFERS, cut, false),
                (BUFFERS + u64::from(cut), rest, false),
                (BUFFERS + 0x80, tail_cut, true),
                (BUFFERS + 0x90, 4 - tail_cut, true),
            ];
            bench.requests.offer(&bench.ram, 0, &buffers);
            bench.device.notify(0);
            assert_eq!(bench.requests.take(&bench.ram), Some((0, 4)));
            assert!(bench.write(0x1_0000, 1));
        }
    }
}

#[test]
fn a_request_that_cannot_be_answered_is_not_done() {
    let mut bench = Bench::new();
    bench
        .ram
        .write_slice(&attach(), GuestAddress(BUFFERS))
        .unwrap();
    let request = (BUFFERS, 20, false);
    for tail in [
        (RAM, 4, true),
        (RAM - 2, 4, true),
        (u64::MAX - 1, 4, true),
        (BUFFERS, 3, true),
    ] {
        bench.requests.offer(&bench.ram, 0, &[request, tail]);
        bench.device.notify(0);
        assert_eq!(bench.requests.take(&bench.ram), Some((0, 0)));
    }
    bench.requests.offer(&bench.ram, 0, &[request]);
    bench.requests.offer(
        &bench.ram,
        4,
        &[(RAM - 10, 20, false), (BUFFERS + 0x80, 4, true)],
    );
    bench.device.notify(0);
    assert_eq!(bench.requests.take(&bench.ram), Some((0, 0)));
    assert_eq!(bench.requests.take(&bench.ram), Some((4, 0)));
    assert_eq!(bench.unit.snapshot().domains, []);
    assert!(!bench.interrupts.needs_reset.load(Ordering::Relaxed));
}

#[test]
fn a_probe_gets_its_properties_and_the_tail_at_the_end() {
    let mut bench = Bench::new();
    let request = ReqProbe {
        head: head(5),
        endpoint: u32::from(A.0).into(),
        reserved: [0; 64],
    };
    bench
        .ram
        .write_slice(request.as_bytes(), GuestAddress(BUFFERS))
        .unwrap();
    let length = bench.unit.longest_reply() as u32;
    bench
        .ram
        .write_slice(&vec![0xff; length as usize], GuestAddress(DATA))
        .unwrap();
    bench
        .requests
        .offer(&bench.ram, 0, &[(BUFFERS, 72, false), (DATA, length, true)]);
    bench.device.notify(0);
    assert_eq!(bench.requests.take(&bench.ram), Some((0, length)));
    let mut reply = vec![0; length as usize];
    bench
        .ram
        .read_slice(&mut reply, GuestAddress(DATA))
        .unwrap();
    assert_eq!(reply[..8], [1, 0, 20, 0, 1, 0, 0, 0]);
    assert_eq!(reply[8..16], 0xfee0_0000u64.to_le_bytes());
    assert!(reply[24..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_mends_it() {
    let mut bench = Bench::new();
    bench.attach_and_map(3);
    // A chain that loops.
    bench
        .requests
        .descriptor(&bench.ram, 0, (BUFFERS, 4), NEXT, 0);
    let at = GuestAddress(REQUESTQ.available + 2);
    bench
        .ram
        .write_obj(bench.requests.available + 1, at)
        .unwrap();
    bench.device.notify(0);
    assert!(bench.interrupts.needs_reset.load(Ordering::Relaxed));
    bench.device.notify(0);
    bench.device.notify(9);
    bench.device.reset();
    assert_eq!(bench.read(0x1_0000), None);
    let objects = bench.engine.objects();
    assert_eq!((objects.domains, objects.targets), (0, 0));
    bench.device.notify(0);
    bench.activate();
    bench.attach_and_map(3);
    assert!(bench.read(0x1_0000).is_some());
}

#[test]
fn no_interrupt_is_sent_when_nobody_wants_it() {
    let mut bench = Bench::new();
    let requests = |bench: &Bench| bench.interrupts.queues[0].load(Ordering::Relaxed);
    bench
        .ram
        .write_obj(1u16, GuestAddress(REQUESTQ.available))
        .unwrap();
    bench.attach_and_map(3);
    assert_eq!(requests(&bench), 0);
    bench
        .ram
        .write_obj(0u16, GuestAddress(REQUESTQ.available))
        .unwrap();
    let batch = [unmap(0, 0xfff), unmap(0, 0xfff), unmap(0, 0xfff)];
    bench.send(&batch);
    assert_eq!(
        requests(&bench),
        1,
        "one for all that were answered together"
    );
}

#[test]
fn a_full_ring_is_served_in_one_kick_with_few_calls() {
    let mut bench = Bench::new();
    let mut requests = vec![attach()];
    requests.extend((0..100).map(|n| map(n << 12, (n << 12) + 0xfff, DATA, 3)));
    assert!(bench.send(&requests).iter().all(|&status| status == 0));
    assert_eq!(bench.unit.snapshot().counters.map_calls, 1);
    assert_eq!(bench.engine.objects().mappings, 100);
}

#[test]
fn bypass_can_be_written_before_the_driver_is_ready() {
    let bench = Bench::new();
    bench.device.reset();
    bench.ram.write_obj(9u8, GuestAddress(DATA)).unwrap();
    assert!(bench.device.accepts(feature::BYPASS_CONFIG));
    assert_eq!(bench.read(DATA), None);
    bench.device.write_config(36, &[1]);
    assert_eq!(bench.read(DATA), Some(9));
    let mut space = [0xff; 48];
    bench.device.read_config(0, &mut space);
    assert_eq!(space[36..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bench.device.read_config(u32::MAX, &mut space);
    assert_eq!(space, [0; 48]);
}

#[test]
fn nothing_is_left_when_the_unit_goes() {
    let mut bench = Bench::new();
    bench.attach_and_map(3);
    let engine = bench.engine.clone();
    drop(bench);
    assert_eq!(engine.objects(), Objects::default());
}

/// Requests from two vCPUs, DMA that faults, plugging and `bypass` at once: nothing waits for
/// itself, what was unmapped is out of reach when the reply is there, and nothing is left.
#[test]
fn everything_at_once_comes_to_an_end() {
    let mut bench = Bench::new();
    bench.offer_events(&[24; 8]);
    assert_eq!(bench.send(&[attach()]), [0]);
    let other = Rid::new(0, 7, 0);
    let _port = bench
        .engine
        .add_endpoint(other, EndpointConfig::default())
        .unwrap();
    let bench = &bench;
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        let requests = [0x10_0000u64, 0x20_0000].map(|base| {
            scope.spawn(move || {
                let process = |request: &[u8]| bench.unit.process(request, 4).status();
                for n in 0..1000 {
                    let first = base + n % 8 * 0x1000;
                    let status = process(&map(first, first + 0xfff, DATA, 3));
                    assert_eq!(status, Some(0));
                    assert_eq!(process(&unmap(first, first + 0xfff)), Some(0));
                    let late = bench
                        .port
                        .clone()
                        .access()
                        .read_obj::<u8>(GuestAddress(first));
                    assert!(late.is_err(), "{first:#x} is reached after its UNMAP");
                }
            })
        });
        for address in [0x10_0000u64, 0x20_3000, 0x30_0000] {
            let port = bench.port.clone();
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let _ = port.access().read_obj::<u64>(GuestAddress(address));
                }
            });
        }
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let backend = bench.engine.clone();
                bench
                    .unit
                    .add_endpoint(other, backend, Regions::new())
                    .unwrap();
                bench.unit.write_config(36, &[1]);
                bench.device.notify(1);
                bench.unit.write_config(36, &[0]);
                bench.unit.remove_endpoint(other);
                let _ = bench.unit.snapshot();
            }
        });
        let results = requests.map(|thread| thread.join());
        done.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    assert_eq!(bench.engine.objects().mappings, 0);
    assert_eq!(bench.unit.snapshot().endpoints.len(), 1);
}
