//! A doorbell that is mapped, by a driver of the tests' own with the software engine behind: who
//! maps it to itself gets interrupts, who does not gets a fault that names it.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::testing::{attach, detach, map, probe, unmap};
use super::{AddError, Config, Iommu};
use crate::backend::software::{EndpointConfig, Engine};
use crate::backend::{Backend, Translation};
use crate::dma::DmaPort;
use crate::doorbell::Doorbell;
use crate::interrupt::{MessageSink, Msi};
use crate::reserved::Regions;
use crate::spec::virtio_iommu::{
    ProbeProperty, ProbeResvMem, ReqAttachPgtVtd, ReqHead, Status, fault_reason, probe_type,
    req_type, resv_mem_subtype, table_format,
};
use crate::{Gpa, GuestRam, Iova, Rid};

const A: Rid = Rid::new(0, 3, 0);
/// Where Linux has its own window for doorbells.
const WINDOW: u64 = 0x800_0000;
const READ_WRITE: u32 = 3;
const MMIO: u32 = 1 << 2;
const BYPASS: u32 = 1;

/// What came out at the interrupt controller, and how often routes were to be looked at again.
#[derive(Default)]
struct Controller {
    came: Mutex<Vec<Msi>>,
    moved: Mutex<usize>,
}

impl MessageSink for Controller {
    fn message(&self, endpoint: Rid, msi: Msi) {
        assert_eq!(endpoint, A);
        self.came.lock().unwrap().push(msi);
    }

    fn moved(&self, endpoint: Rid) {
        assert_eq!(endpoint, A);
        *self.moved.lock().unwrap() += 1;
    }
}

struct Driver {
    ram: GuestRam,
    engine: Arc<Engine>,
    unit: Iommu,
    port: DmaPort,
    controller: Arc<Controller>,
}

fn driver(doorbell: Doorbell) -> Driver {
    let ram: GuestRam =
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let config = crate::backend::software::Config {
        doorbell: match doorbell {
            Doorbell::Intercepted => None,
            Doorbell::Mapped(first) => Some(first),
        },
        ..crate::backend::software::Config::for_ram(&ram)
    };
    let engine = Arc::new(Engine::with_config(ram.clone(), config));
    let controller = Arc::new(Controller::default());
    let endpoint = EndpointConfig {
        messages: Some(controller.clone()),
        doorbell,
        ..EndpointConfig::default()
    };
    let port = engine.add_endpoint(A, endpoint).unwrap();
    let config = Config::compose(&engine.capabilities(), 1).unwrap();
    let unit = Iommu::new(Config {
        attach_table: true,
        doorbell,
        ..config
    });
    unit.set_features(u64::MAX);
    unit.add_endpoint(A, engine.clone(), Regions::new())
        .unwrap();
    Driver {
        ram,
        engine,
        unit,
        port,
        controller,
    }
}

fn mapped() -> Driver {
    driver(Doorbell::Mapped(Gpa(WINDOW)))
}

const IDENTITY: (u64, u64) = (WINDOW, WINDOW + 0xf_ffff);

impl Driver {
    fn send(&self, request: &[u8]) -> Option<Status> {
        let status = self.unit.process(request, 4).status();
        let known = [Status::Ok, Status::Inval, Status::Unsupp, Status::Range];
        known.into_iter().find(|s| Some(*s as u8) == status)
    }

    /// The device interrupts by a write to `address`, and so does one whose interrupts are routes.
    /// What arrived; both must agree.
    fn interrupt(&self, address: u64) -> Option<Msi> {
        let msi = Msi {
            address,
            data: 0x41,
        };
        let routed = self.engine.message(A, msi).ok();
        let written = self.port.message(msi);
        let came = std::mem::take(&mut *self.controller.came.lock().unwrap());
        assert_eq!(written, !came.is_empty());
        assert_eq!(came.first().copied(), routed);
        routed
    }

    fn works(&self) -> bool {
        let arrived = self.interrupt(WINDOW + 0x300c);
        let right = Msi {
            address: 0xfee0_300c,
            data: 0x41,
        };
        assert!(arrived.is_none_or(|msi| msi == right), "{arrived:x?}");
        arrived.is_some()
    }

    fn moved(&self) -> usize {
        std::mem::take(&mut *self.controller.moved.lock().unwrap())
    }
}

#[test]
fn a_guest_that_maps_the_doorbell_to_itself_gets_interrupts() {
    for flags in [READ_WRITE, READ_WRITE | MMIO, 2] {
        let driver = mapped();
        assert_eq!(driver.send(&attach(A.0.into(), 1, 0)), Some(Status::Ok));
        assert!(!driver.works());
        let request = map(1, IDENTITY, WINDOW, flags);
        assert_eq!(driver.send(&request), Some(Status::Ok));
        assert!(driver.works());
        assert!(driver.moved() > 0, "routes are looked at again");
    }
}

#[test]
fn one_that_does_not_gets_a_fault_that_names_the_doorbell() {
    let driver = mapped();
    assert!(!driver.works(), "blocked");
    driver.send(&attach(A.0.into(), 1, 0));
    while driver.unit.next_fault().is_some() {}
    assert!(!driver.works(), "not mapped");
    let fault = driver.unit.next_fault().unwrap();
    assert_eq!(fault.reason, fault_reason::MAPPING);
    assert_eq!(fault.address.get(), WINDOW + 0x300c);
    assert_eq!(fault.endpoint.get(), u32::from(A.0));
    let missed = driver.unit.snapshot().faults.missed_doorbell.unwrap();
    assert_eq!(
        (missed.endpoint, missed.address, missed.doorbell),
        (A, Iova(WINDOW + 0x300c), Gpa(WINDOW))
    );
    // Read-only is not enough: an interrupt is a write.
    driver.send(&map(1, IDENTITY, WINDOW, 1));
    assert!(!driver.works());
    assert!(driver.unit.next_fault().is_some());
}

#[test]
fn one_that_moves_the_doorbell_or_maps_something_else_there_gets_an_error() {
    let driver = mapped();
    driver.send(&attach(A.0.into(), 1, 0));
    // Memory over the doorbell, beside it, and around it.
    for (first, last) in [(0, 0xfff), (0xf_f000, 0xf_ffff), (0, 0x1f_ffff)] {
        let virt = (WINDOW + first, WINDOW + last);
        let over = map(1, virt, 0, READ_WRITE);
        assert_eq!(driver.send(&over), Some(Status::Inval));
    }
    // The doorbell somewhere else.
    let moved = map(1, (0x10_0000, 0x10_0fff), WINDOW, READ_WRITE);
    assert_eq!(driver.send(&moved), Some(Status::Inval));
    let shifted = map(1, (WINDOW, WINDOW + 0xfff), WINDOW + 0x1000, READ_WRITE);
    assert_eq!(driver.send(&shifted), Some(Status::Inval));
    assert!(!driver.works());
    assert_eq!(driver.interrupt(0x10_000c), None);
    // What x86 has at another place is no doorbell here.
    assert_eq!(driver.interrupt(0xfee0_000c), None);
    assert_eq!(
        driver.send(&map(1, IDENTITY, WINDOW, READ_WRITE)),
        Some(Status::Ok)
    );
    assert!(driver.works());
    assert_eq!(
        driver.send(&unmap(1, IDENTITY.0, IDENTITY.1)),
        Some(Status::Ok)
    );
    driver.moved();
    assert!(!driver.works());
}

#[test]
fn interrupts_keep_flowing_when_an_endpoint_switches_between_bypass_domain_and_table() {
    let driver = mapped();
    // Tables of four levels at 0x1000 to 0x4fff that map the window's page of 0x3000 to itself.
    let page = WINDOW + 0x3000;
    for (level, table) in (1..=4u64).rev().zip((0x1000u64..).step_by(0x1000)) {
        let to = if level == 1 { page } else { table + 0x1000 };
        let index = page >> (12 + 9 * (level - 1)) & 0x1ff;
        let at = GuestAddress(table + 8 * index);
        driver.ram.write_obj(to | 7, at).unwrap();
    }
    let head = ReqHead {
        r#type: req_type::ATTACH_TABLE,
        reserved: [0; 3],
    };
    let table = ReqAttachPgtVtd {
        head,
        domain: 3.into(),
        endpoint: u32::from(A.0).into(),
        flags: 0.into(),
        format: table_format::PGTF_VTD.into(),
        reserved: [0; 2],
        pasid: 0.into(),
        pgd: 0x1000.into(),
        fl_flags: 0.into(),
        addr_width: 48.into(),
        reserved2: [0; 36],
    };
    let table = table.as_bytes().to_vec();
    let domain = |driver: &Driver| {
        assert_eq!(driver.send(&attach(A.0.into(), 2, 0)), Some(Status::Ok));
        let request = map(2, IDENTITY, WINDOW, READ_WRITE);
        assert_eq!(driver.send(&request), Some(Status::Ok));
    };
    for _ in 0..3 {
        assert_eq!(
            driver.send(&attach(A.0.into(), 1, BYPASS)),
            Some(Status::Ok)
        );
        assert!(driver.works(), "bypass: stage 2 has the doorbell");
        domain(&driver);
        assert!(driver.works(), "domain");
        driver.moved();
        assert_eq!(driver.send(&table), Some(Status::Ok));
        assert!(matches!(
            driver.engine.translation(crate::Target::rid(A)),
            Translation::Stage1(_)
        ));
        assert!(driver.works(), "table");
        assert!(driver.moved() > 0, "routes are looked at again");
        domain(&driver);
        assert!(driver.works(), "domain again");
        assert_eq!(driver.send(&detach(A.0.into(), 2)), Some(Status::Ok));
        assert!(!driver.works(), "blocked");
    }
}

#[test]
fn the_guest_is_told_of_the_window_as_reserved_and_of_an_intercepted_one_as_the_doorbell() {
    let properties = |driver: &Driver| {
        let room = driver.unit.longest_reply();
        let reply = driver.unit.process(&probe(A.0.into()), room);
        let mut bytes = reply.bytes();
        let mut list = Vec::new();
        while let Ok((head, _)) = ProbeProperty::read_from_prefix(bytes) {
            if head.r#type.get() & 0xfff != probe_type::RESV_MEM {
                break;
            }
            let property = ProbeResvMem::read_from_prefix(bytes).unwrap().0;
            list.push((property.start.get(), property.end.get(), property.subtype));
            bytes = &bytes[usize::from(head.length.get()) + 4..];
        }
        list
    };
    assert_eq!(
        properties(&mapped()),
        [
            (IDENTITY.0, IDENTITY.1, resv_mem_subtype::RESERVED),
            (0xfee0_0000, 0xfeef_ffff, resv_mem_subtype::RESERVED)
        ]
    );
    assert_eq!(
        properties(&driver(Doorbell::Intercepted)),
        [(0xfee0_0000, 0xfeef_ffff, resv_mem_subtype::MSI)]
    );
    // In its place: only one region.
    assert_eq!(
        properties(&driver(Doorbell::Mapped(Gpa(0xfee0_0000)))),
        [(0xfee0_0000, 0xfeef_ffff, resv_mem_subtype::RESERVED)]
    );
}

#[test]
fn an_intercepted_doorbell_needs_no_mapping_and_takes_none() {
    let driver = driver(Doorbell::Intercepted);
    driver.send(&attach(A.0.into(), 1, 0));
    let msi = Msi {
        address: 0xfee0_300c,
        data: 1,
    };
    assert!(driver.port.message(msi));
    assert_eq!(*driver.controller.came.lock().unwrap(), [msi]);
    let virt = (0xfee0_0000, 0xfeef_ffff);
    let over = map(1, virt, virt.0, READ_WRITE | MMIO);
    assert_eq!(driver.send(&over), Some(Status::Inval));
    assert_eq!(driver.moved(), 0);
}

#[test]
fn an_endpoint_whose_doorbell_is_another_is_refused() {
    let driver = mapped();
    let b = Rid::new(0, 4, 0);
    let _port = driver
        .engine
        .add_endpoint(b, EndpointConfig::default())
        .unwrap();
    let refused = driver
        .unit
        .add_endpoint(b, driver.engine.clone(), Regions::new());
    let error = refused.unwrap_err();
    assert!(matches!(error, AddError::Doorbell { .. }));
    assert!(error.to_string().contains("msi=intercepted"), "{error}");
}
