//! The experimental ATTACH_TABLE and INVALIDATE, by a driver of the tests' own with tables in
//! guest memory and the software engine behind.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::testing::{Recorder, attach, detach, map, probe, unmap};
use super::{Config, Iommu, Reply};
use crate::backend::software::{EndpointConfig, Engine};
use crate::backend::{Backend, Translation};
use crate::dma::DmaPort;
use crate::reserved::Regions;
use crate::spec::virtio_iommu::{
    ProbePgtVtd, ReqAttachPgtVtd, ReqHead, ReqInvalidate, Status, feature, fl_flag,
    inval_granularity, probe_type, req_type, table_format,
};
use crate::{GuestRam, Rid};

const A: Rid = Rid::new(0, 3, 0);
const ROOT: u64 = 0x1000;
const DATA: u64 = 0x8000;
const IOVA: u64 = 0x1234_5000;
/// Present, writable, user.
const LEAF: u64 = 7;

struct Driver {
    ram: GuestRam,
    engine: Arc<Engine>,
    unit: Iommu,
    port: DmaPort,
}

fn driver(attach_table: bool) -> Driver {
    let ram: GuestRam =
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let engine = Arc::new(Engine::new(ram.clone()));
    let port = engine.add_endpoint(A, EndpointConfig::default()).unwrap();
    let config = Config::compose(&engine.capabilities(), 0).unwrap();
    let unit = Iommu::new(Config {
        attach_table,
        ..config
    });
    unit.set_features(u64::MAX);
    unit.add_endpoint(A, engine.clone(), Regions::new())
        .unwrap();
    let driver = Driver {
        ram,
        engine,
        unit,
        port,
    };
    // A table of four levels at 0x1000 to 0x4fff, with one page.
    for (level, table) in (1..=4u64).rev().zip((ROOT..).step_by(0x1000)) {
        let entry = if level == 1 { DATA } else { table + 0x1000 };
        driver.entry(level, table, entry | LEAF);
    }
    driver.ram.write_obj(42u8, GuestAddress(DATA)).unwrap();
    driver
}

impl Driver {
    fn entry(&self, level: u64, table: u64, entry: u64) {
        let index = IOVA >> (12 + 9 * (level - 1)) & 0x1ff;
        self.ram
            .write_obj(entry, GuestAddress(table + 8 * index))
            .unwrap();
    }

    fn send(&self, request: &[u8]) -> Option<u8> {
        self.unit.process(request, 4).status()
    }

    fn read(&self) -> Option<u8> {
        self.port.access().read_obj(GuestAddress(IOVA)).ok()
    }
}

fn request() -> ReqAttachPgtVtd {
    ReqAttachPgtVtd {
        head: head(req_type::ATTACH_TABLE),
        domain: 1.into(),
        endpoint: u32::from(A.0).into(),
        flags: 0.into(),
        format: table_format::PGTF_VTD.into(),
        reserved: [0; 2],
        pasid: 0.into(),
        pgd: ROOT.into(),
        fl_flags: 0.into(),
        addr_width: 48.into(),
        reserved2: [0; 36],
    }
}

fn invalidation(first: u64, pages: u64, granule: u8) -> ReqInvalidate {
    ReqInvalidate {
        head: head(req_type::INVALIDATE),
        inv_gran: inval_granularity::VA.into(),
        inv_type: 1.into(),
        flags: 0.into(),
        reserved1: [0; 2],
        domain: 1.into(),
        pasid: 0.into(),
        reserved2: [0; 4],
        archid: 0.into(),
        virt_start: first.into(),
        nr_pages: pages.into(),
        granule,
        reserved3: [0; 11],
    }
}

fn head(r#type: u8) -> ReqHead {
    ReqHead {
        r#type,
        reserved: [0; 3],
    }
}

const OK: Option<u8> = Some(Status::Ok as u8);
const INVAL: Option<u8> = Some(Status::Inval as u8);

#[test]
fn tables_are_off_unless_the_user_wants_them() {
    let driver = driver(false);
    assert_eq!(driver.unit.features() & feature::ATTACH_TABLE, 0);
    assert_eq!(driver.unit.process(request().as_bytes(), 4), Reply::Nothing);
    let invalidate = invalidation(IOVA, 1, 12);
    assert_eq!(
        driver.unit.process(invalidate.as_bytes(), 4),
        Reply::Nothing
    );
    assert_eq!(driver.read(), None);
}

#[test]
fn a_guests_table_translates_and_what_it_changes_counts_when_it_is_invalidated() {
    let driver = driver(true);
    assert_eq!(driver.send(request().as_bytes()), OK);
    assert_eq!(driver.read(), Some(42));
    driver
        .ram
        .write_obj(43u8, GuestAddress(DATA + 0x1000))
        .unwrap();
    driver.entry(1, 0x4000, (DATA + 0x1000) | LEAF);
    assert_eq!(driver.send(invalidation(IOVA, 1, 12).as_bytes()), OK);
    assert_eq!(driver.read(), Some(43));
    driver.entry(1, 0x4000, 0);
    let mut all = invalidation(0, 0, 0);
    all.inv_gran = inval_granularity::DOMAIN.into();
    assert_eq!(driver.send(all.as_bytes()), OK);
    assert_eq!(driver.read(), None);
    let table = driver.unit.snapshot().domains[0].table;
    assert_eq!(table.unwrap().root.0, ROOT);
    assert_eq!(driver.send(&detach(A.0.into(), 1)), OK);
    let blocked = driver.engine.translation(crate::Target::rid(A));
    assert_eq!(blocked, Translation::Blocked);
    assert_eq!(driver.send(all.as_bytes()), Some(Status::NoEnt as u8));
}

#[test]
fn an_endpoint_changes_between_a_table_and_mappings() {
    let driver = driver(true);
    assert_eq!(driver.send(request().as_bytes()), OK);
    let other = DATA + 0x1000;
    driver.ram.write_obj(9u8, GuestAddress(other)).unwrap();
    assert_eq!(driver.send(&attach(A.0.into(), 2, 0)), OK);
    assert_eq!(driver.read(), None);
    assert_eq!(driver.send(&map(2, (IOVA, IOVA + 0xfff), other, 3)), OK);
    assert_eq!(driver.read(), Some(9));
    assert_eq!(driver.send(request().as_bytes()), OK);
    assert_eq!(driver.read(), Some(42));
    assert_eq!(driver.engine.objects().domains, 0);
}

#[test]
fn a_domain_is_one_thing_and_map_unmap_and_invalidate_keep_to_it() {
    let driver = driver(true);
    assert_eq!(driver.send(request().as_bytes()), OK);
    assert_eq!(driver.send(request().as_bytes()), OK);
    assert_eq!(driver.send(&map(1, (0, 0xfff), 0, 3)), INVAL);
    assert_eq!(driver.send(&unmap(1, 0, 0xfff)), INVAL);
    for flags in [0, 1] {
        assert_eq!(driver.send(&attach(A.0.into(), 1, flags)), INVAL);
    }
    let mut other = request();
    other.pgd = (ROOT + 0x1000).into();
    assert_eq!(driver.send(other.as_bytes()), INVAL);
    assert_eq!(driver.read(), Some(42));
    assert_eq!(driver.send(&attach(A.0.into(), 2, 0)), OK);
    let mut wrong = invalidation(0, 1, 12);
    wrong.domain = 2.into();
    assert_eq!(driver.send(wrong.as_bytes()), INVAL);
}

#[test]
fn address_bits_that_are_no_address_and_unknown_bits_are_refused() {
    let driver = driver(true);
    let spoilt: [fn(&mut ReqAttachPgtVtd); 10] = [
        |r| r.pgd = (ROOT | 1).into(),
        |r| r.pgd = (ROOT | 0x800).into(),
        |r| r.pgd = (ROOT | 1 << 52).into(),
        |r| r.fl_flags = (1 << 3).into(),
        |r| r.addr_width = 39.into(),
        |r| r.addr_width = (48 + 256).into(),
        |r| r.format = 3.into(),
        |r| r.flags = 1.into(),
        |r| r.pasid = 1.into(),
        |r| r.reserved2[35] = 1,
    ];
    for (n, spoil) in spoilt.into_iter().enumerate() {
        let mut request = request();
        spoil(&mut request);
        assert_eq!(driver.send(request.as_bytes()), INVAL, "{n}");
    }
    assert_eq!(driver.read(), None);
    assert_eq!(driver.send(request().as_bytes()), OK);
    let spoilt: [fn(&mut ReqInvalidate); 7] = [
        |r| r.granule = 11,
        |r| r.granule = 64,
        |r| r.nr_pages = 0.into(),
        |r| r.virt_start = 1.into(),
        |r| r.inv_gran = 2.into(),
        |r| r.inv_type = 8.into(),
        |r| r.flags = 1.into(),
    ];
    for (n, spoil) in spoilt.into_iter().enumerate() {
        let mut request = invalidation(IOVA, 1, 12);
        spoil(&mut request);
        assert_eq!(driver.send(request.as_bytes()), INVAL, "{n}");
    }
    assert_eq!(driver.send(invalidation(IOVA, u64::MAX, 30).as_bytes()), OK);
}

#[test]
fn what_a_back_end_never_offered_is_unsupp_and_changes_nothing() {
    let driver = driver(true);
    let capabilities = driver.engine.capabilities();
    assert_eq!(driver.send(&attach(A.0.into(), 2, 0)), OK);
    let mut request = request();
    request.fl_flags = fl_flag::SRE.into();
    if !capabilities.sre {
        assert_eq!(driver.send(request.as_bytes()), Some(Status::Unsupp as u8));
        assert_eq!(driver.unit.snapshot().endpoints[0].domain, Some(2));
    }
}

#[test]
fn a_probe_tells_that_tables_can_be_attached_where_they_can() {
    let driver = driver(true);
    let reply = driver
        .unit
        .process(&probe(A.0.into()), driver.unit.longest_reply());
    let (property, _) = ProbePgtVtd::read_from_prefix(&reply.bytes()[24..]).unwrap();
    assert_eq!(property.head.r#type.get(), probe_type::PAGE_TABLE_FMT);
    assert_eq!((property.head.length.get(), property.format.get()), (20, 4));
    assert_ne!(property.ecap_reg.get() & 1 << 47, 0);
    // This back end has none.
    let none = Recorder::new();
    let config = Config::compose(&none.capabilities(), 0).unwrap();
    let unit = Iommu::new(Config {
        attach_table: true,
        ..config
    });
    unit.set_features(u64::MAX);
    unit.add_endpoint(A, none.clone(), Regions::new()).unwrap();
    let reply = unit.process(&probe(A.0.into()), unit.longest_reply());
    assert!(reply.bytes()[24..].iter().all(|&byte| byte == 0));
    none.book().refuse = [true].into();
    let refused = unit.process(request().as_bytes(), 4).status();
    assert_eq!(refused, Some(Status::NoMem as u8));
    assert_eq!(unit.snapshot().domains, []);
}

#[test]
fn nothing_is_left_of_tables_after_a_reset() {
    let driver = driver(true);
    assert_eq!(driver.send(request().as_bytes()), OK);
    driver.unit.reset();
    assert_eq!(driver.read(), None);
    let objects = driver.engine.objects();
    assert_eq!((objects.targets, objects.translations), (0, 0));
}

#[test]
fn an_invalidation_that_a_back_end_refuses_blocks_the_endpoint_until_it_is_attached_again() {
    let backend = Recorder::new();
    let config = Config::compose(&backend.capabilities(), 0).unwrap();
    let unit = Iommu::new(Config {
        attach_table: true,
        ..config
    });
    unit.set_features(u64::MAX);
    unit.add_endpoint(A, backend.clone(), Regions::new())
        .unwrap();
    let send = |request: &[u8]| unit.process(request, 4).status();
    assert_eq!(send(request().as_bytes()), OK);
    backend.book().refuse = [true].into();
    let stale = invalidation(IOVA, 1, 12);
    assert_eq!(send(stale.as_bytes()), Some(Status::DevErr as u8));
    assert_eq!(backend.translation_of(A), Translation::Blocked);
    assert_eq!(unit.next_fault().unwrap().endpoint.get(), u32::from(A.0));
    assert!(unit.snapshot().endpoints[0].refused);
    assert_eq!(send(request().as_bytes()), OK);
    assert!(matches!(backend.translation_of(A), Translation::Stage1(_)));
    assert_eq!(send(stale.as_bytes()), OK);
}
