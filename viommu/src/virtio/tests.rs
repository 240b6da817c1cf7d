//! The device section of virtio 1.3, 5.13, sentence by sentence, and what other implementations
//! get wrong. A test begins with the section's word for it: must, should, may.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::testing::{Recorder, attach, detach, map, probe, unmap};
use super::*;
use crate::backend::software::{EndpointConfig, Engine};
use crate::backend::{Access, Backend, Fault, FaultCause, Mapping, PageRequest, Translation};
use crate::reserved::{Kind, Region, Regions, X86_MSI};
use crate::spec::virtio_iommu::{
    self as spec, ProbeProperty, ProbeResvMem, Status, feature, map_flag, resv_mem_subtype,
};
use crate::{Gpa, GuestRam, Iova, Rid, Target};

const A: Rid = Rid::new(0, 3, 0);
const B: Rid = Rid::new(0, 4, 0);
const PAGE: u64 = 0x1000;
const RW: u32 = map_flag::READ | map_flag::WRITE;

/// A unit with its endpoints.
struct Bench {
    unit: Iommu,
    backend: Arc<Recorder>,
}

fn config() -> Config {
    let capabilities = Recorder::new().capabilities();
    Config::compose(&capabilities, 0).unwrap()
}

/// A unit with endpoints A and B in one back end, all features negotiated.
fn bench() -> Bench {
    bench_with(config())
}

fn bench_with(config: Config) -> Bench {
    let bench = Bench {
        unit: Iommu::new(config),
        backend: Recorder::new(),
    };
    bench.unit.set_features(u64::MAX);
    bench.add(A, Regions::new());
    bench.add(B, Regions::new());
    bench
}

impl Bench {
    fn add(&self, rid: Rid, reserved: Regions) {
        let backend: Arc<dyn Backend> = self.backend.clone();
        self.unit.add_endpoint(rid, backend, reserved).unwrap();
    }

    /// Sends one request with a tail to write, and returns the status.
    fn send(&self, request: &[u8]) -> Status {
        let reply = self.unit.process(request, 4);
        assert_eq!(reply.bytes().len(), 4, "used length");
        assert_eq!(
            reply.bytes()[1..],
            [0; 3],
            "should set reserved of the tail to zero"
        );
        status(reply.bytes()[0])
    }

    /// Sends requests together.
    fn send_all(&self, requests: &[Vec<u8>]) -> Vec<Status> {
        let chains = requests.iter().map(|readable| Chain {
            readable,
            writable: 4,
        });
        let mut replies = Vec::new();
        self.unit.serve(chains, &mut replies);
        replies
            .iter()
            .map(|reply| status(reply.bytes()[0]))
            .collect()
    }

    fn attach(&self, endpoint: Rid, domain: u32) -> Status {
        self.send(&attach(endpoint.0.into(), domain, 0))
    }

    fn detach(&self, endpoint: Rid, domain: u32) -> Status {
        self.send(&detach(endpoint.0.into(), domain))
    }

    /// Maps pages `first..=last` of domain 1 to themselves plus 1 GiB.
    fn map(&self, first: u64, last: u64) -> Status {
        let virt = (first * PAGE, last * PAGE + PAGE - 1);
        self.send(&map(1, virt, (1 << 30) + first * PAGE, RW))
    }

    fn unmap(&self, first: u64, last: u64) -> Status {
        self.send(&unmap(1, first * PAGE, last * PAGE + PAGE - 1))
    }

    /// First and last pages of what is mapped for `endpoint`.
    fn pages(&self, endpoint: Rid) -> Vec<(u64, u64)> {
        let pages = |m: &Mapping| (m.iova.0 / PAGE, (m.iova.0 + m.length) / PAGE - 1);
        let mappings = self.backend.mappings_of(endpoint).expect("not in a domain");
        mappings.iter().map(pages).collect()
    }

    fn fault(&self, endpoint: Rid, cause: FaultCause) {
        let sink = self.backend.book().claimed[&endpoint].clone();
        sink.fault(Fault {
            target: Target::rid(endpoint),
            iova: Iova(0xdead_b000),
            access: Access::READ,
            execute: false,
            privileged: false,
            cause,
        });
    }
}

/// Every test ends with a back end that was used as the waist says, and with nothing left in it.
impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        assert_eq!(self.backend.book().complaints, [""; 0]);
        for endpoint in self.unit.snapshot().endpoints {
            self.unit.remove_endpoint(endpoint.endpoint);
        }
        assert_eq!(self.backend.objects(), crate::backend::Objects::default());
    }
}

fn status(code: u8) -> Status {
    use Status::*;
    [Ok, IoErr, Unsupp, DevErr, Inval, Range, NoEnt, Fault, NoMem][usize::from(code)]
}

/// Properties, as a driver reads them.
fn properties(mut bytes: &[u8]) -> Vec<ProbeResvMem> {
    let mut list = Vec::new();
    while let Ok((head, _)) = ProbeProperty::read_from_prefix(bytes)
        && head.r#type.get() & 0xfff != 0
    {
        list.push(ProbeResvMem::read_from_prefix(bytes).unwrap().0);
        bytes = &bytes[usize::from(head.length.get()) + 4..];
    }
    list
}

// 5.13.3 Feature bits

#[test]
fn should_offer_map_unmap_and_bypass_config_and_not_bypass() {
    assert_ne!(Config::FEATURES & feature::MAP_UNMAP, 0);
    assert_ne!(Config::FEATURES & feature::BYPASS_CONFIG, 0);
    assert_eq!(Config::FEATURES & feature::BYPASS, 0);
}

// 5.13.4 Device configuration layout

#[test]
fn must_set_at_least_one_bit_in_page_size_mask() {
    let mut capabilities = Recorder::new().capabilities();
    for sizes in [0x1000, 0x4020_1000, 0x1fff, u64::MAX, 1 << 21] {
        capabilities.page_sizes = sizes;
        let config = Config::compose(&capabilities, 0).unwrap();
        let space = spec::Config::read_from_bytes(&Iommu::new(config).config_space()).unwrap();
        let lowest = space.page_size_mask.get() & space.page_size_mask.get().wrapping_neg();
        assert_eq!(lowest, if sizes == 1 << 21 { 1 << 21 } else { 0x1000 });
    }
    capabilities.page_sizes = 0;
    assert!(Config::compose(&capabilities, 0).is_err());
}

#[test]
fn bypass_should_not_change_on_device_reset_but_be_restored_on_system_reset() {
    let bench = bench();
    let bypass = |bench: &Bench| bench.unit.config_space()[36];
    assert_eq!(bypass(&bench), 0);
    bench.unit.write_config(36, &[1]);
    assert_eq!(bypass(&bench), 1);
    bench.unit.reset();
    assert_eq!(bypass(&bench), 1);
    assert_eq!(bench.backend.translation_of(A), Translation::Identity);
    bench.unit.system_reset();
    assert_eq!(bypass(&bench), 0);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn must_not_present_a_value_other_than_0_or_1_in_bypass() {
    let bench = bench();
    for value in 0..=0xff {
        bench.unit.write_config(36, &[value]);
        assert!(bench.unit.config_space()[36] <= 1);
    }
    bench.unit.write_config(36, &[1]);
    bench.unit.write_config(36, &[0xfe]);
    assert_eq!(bench.unit.config_space()[36], 1);
}

#[test]
fn only_bypass_can_be_written_and_only_when_negotiated() {
    let bench = bench();
    let before = bench.unit.config_space();
    for offset in (0..36).chain(37..60) {
        bench.unit.write_config(offset, &[1]);
    }
    bench.unit.write_config(u64::MAX, &[1; 8]);
    assert_eq!(bench.unit.config_space(), before);
    bench.unit.set_features(!feature::BYPASS_CONFIG);
    bench.unit.write_config(36, &[1]);
    assert_eq!(bench.unit.config_space(), before);
}

// 5.13.5 Device initialization

#[test]
fn when_the_device_is_reset_endpoints_are_not_attached_and_nothing_is_left() {
    let bench = bench();
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.attach(B, 1), Status::Ok);
    assert_eq!(bench.map(0, 4), Status::Ok);
    bench.unit.reset();
    let objects = bench.backend.objects();
    assert_eq!(
        (objects.domains, objects.mappings, objects.targets),
        (0, 0, 0)
    );
    bench.unit.set_features(u64::MAX);
    assert_eq!(bench.map(0, 4), Status::NoEnt);
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

// 5.13.6 Device operations

#[test]
fn should_not_write_the_buffer_of_an_unrecognised_type_and_set_the_used_length_to_zero() {
    let bench = bench();
    for r#type in [0, 6, 0x7f, 0xff] {
        let mut request = attach(A.0.into(), 1, 0);
        request[0] = r#type;
        assert_eq!(bench.unit.process(&request, 4), Reply::Nothing);
    }
    assert_eq!(Reply::Nothing.bytes(), [0u8; 0]);
}

#[test]
fn a_request_without_room_for_the_tail_is_returned_unwritten_and_not_done() {
    let bench = bench();
    for writable in 0..4 {
        let reply = bench.unit.process(&attach(A.0.into(), 1, 0), writable);
        assert_eq!(reply, Reply::Nothing);
    }
    assert_eq!(bench.unit.snapshot().domains, []);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn a_truncated_request_is_invalid_and_not_done() {
    let bench = bench();
    bench.attach(A, 1);
    let whole = map(1, (0, PAGE - 1), 0, RW);
    for length in 1..whole.len() {
        let reply = bench.unit.process(&whole[..length], 4);
        assert_eq!(reply.status().is_some(), length >= 4);
        assert_ne!(reply.status(), Some(0));
    }
    assert_eq!(bench.unit.process(&[], 4), Reply::Nothing);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn a_longer_buffer_than_needed_gets_the_tail_at_its_front() {
    let bench = bench();
    let reply = bench.unit.process(&attach(A.0.into(), 1, 0), 4096);
    assert_eq!(reply.bytes(), [0; 4]);
}

#[test]
fn should_not_let_unattached_endpoints_access_memory_unless_in_bypass() {
    let bench = bench();
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    let bypass = bench_with(Config {
        bypass: true,
        ..config()
    });
    assert_eq!(bypass.backend.translation_of(A), Translation::Identity);
    // Even if the driver does not accept BYPASS_CONFIG.
    bypass.unit.set_features(feature::MAP_UNMAP);
    assert_eq!(bypass.unit.config_space()[36], 1);
    assert_eq!(bypass.backend.translation_of(A), Translation::Identity);
}

#[test]
fn bypass_holds_for_every_back_end_as_the_configuration_says_it() {
    let bench = bench();
    bench.attach(A, 1);
    bench.unit.write_config(36, &[1]);
    assert!(matches!(
        bench.backend.translation_of(A),
        Translation::Domain(_)
    ));
    assert_eq!(bench.backend.translation_of(B), Translation::Identity);
    bench.detach(A, 1);
    assert_eq!(bench.backend.translation_of(A), Translation::Identity);
    bench.unit.write_config(36, &[0]);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.backend.translation_of(B), Translation::Blocked);
}

#[test]
fn must_ignore_reserved_of_the_head_and_should_set_that_of_the_tail_to_zero() {
    let bench = bench();
    let requests = [
        attach(A.0.into(), 1, 0),
        map(1, (0, PAGE - 1), PAGE, RW),
        unmap(1, 0, PAGE - 1),
        detach(A.0.into(), 1),
    ];
    for mut request in requests {
        request[1..4].fill(0xff);
        // `send` looks at the tail.
        assert_eq!(bench.send(&request), Status::Ok);
    }
}

// ATTACH

#[test]
fn a_device_that_does_not_reject_an_attach_must_attach_the_endpoint() {
    let bench = bench();
    for (domain, flags) in [(0, 0), (0xffff, 0), (1, 1), (2, 0), (1, 1)] {
        assert_eq!(bench.send(&attach(A.0.into(), domain, flags)), Status::Ok);
        let endpoints = bench.unit.snapshot().endpoints;
        assert_eq!(endpoints[0].domain, Some(domain));
        match bench.backend.translation_of(A) {
            Translation::Identity => assert_eq!(flags, 1),
            Translation::Domain(_) => assert_eq!(flags, 0),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn must_reject_attach_with_reserved_or_unknown_flags_with_inval() {
    let bench = bench();
    let mut request = attach(A.0.into(), 1, 0);
    request[16] = 1;
    assert_eq!(bench.send(&request), Status::Inval);
    assert_eq!(bench.send(&attach(A.0.into(), 1, 2)), Status::Inval);
    assert_eq!(bench.send(&attach(A.0.into(), 1, 1 << 31)), Status::Inval);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn must_reject_attach_of_an_endpoint_that_does_not_exist_with_noent() {
    let bench = bench();
    for endpoint in [0, 0xffff, 0x1_0000 | u32::from(A.0), u32::MAX] {
        assert_eq!(bench.send(&attach(endpoint, 1, 0)), Status::NoEnt);
        assert_eq!(bench.send(&detach(endpoint, 1)), Status::NoEnt);
        assert_eq!(bench.unit.process(&probe(endpoint), 4096).status(), Some(6));
    }
    // None of them left anything behind.
    assert_eq!(bench.unit.snapshot().endpoints.len(), 2);
    assert_eq!(bench.unit.snapshot().domains, []);
}

#[test]
fn attach_to_a_domain_out_of_range_is_range() {
    let bench = bench_with(Config {
        domain_range: (1, 100),
        ..config()
    });
    for domain in [0, 101, u32::MAX] {
        assert_eq!(bench.attach(A, domain), Status::Range);
        assert_eq!(bench.detach(A, domain), Status::Inval);
        assert_eq!(
            bench.send(&map(domain, (0, PAGE - 1), 0, RW)),
            Status::NoEnt
        );
        assert_eq!(bench.send(&unmap(domain, 0, PAGE - 1)), Status::NoEnt);
    }
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.attach(B, 100), Status::Ok);
}

#[test]
fn may_attach_another_endpoint_which_shares_the_mappings_and_their_map_call() {
    let bench = bench();
    bench.attach(A, 1);
    assert_eq!(bench.map(0, 4), Status::Ok);
    assert_eq!(bench.attach(B, 1), Status::Ok);
    assert_eq!(bench.pages(B), [(0, 4)]);
    assert_eq!(bench.map(5, 9), Status::Ok);
    assert_eq!(bench.backend.book().map_calls, [1, 1]);
    assert_eq!(bench.pages(A), [(0, 4), (5, 9)]);
    assert_eq!(
        bench.backend.translation_of(A),
        bench.backend.translation_of(B)
    );
}

#[test]
fn a_second_endpoint_in_another_back_end_gets_the_mappings_that_exist() {
    let bench = bench();
    let other = Recorder::new();
    let far = Rid::new(1, 0, 0);
    bench
        .unit
        .add_endpoint(far, other.clone(), Regions::new())
        .unwrap();
    bench.attach(A, 1);
    for n in 0..1000 {
        assert_eq!(bench.map(n * 2, n * 2), Status::Ok);
    }
    assert_eq!(bench.attach(far, 1), Status::Ok);
    assert_eq!(other.mappings_of(far), bench.backend.mappings_of(A));
    assert!(
        other.book().map_calls.iter().all(|&n| n <= 256),
        "not in chunks"
    );
    assert_eq!(bench.map(5000, 5000), Status::Ok);
    assert_eq!(bench.unmap(0, 500), Status::Ok);
    assert_eq!(other.mappings_of(far), bench.backend.mappings_of(A));
    assert_eq!(bench.detach(far, 1), Status::Ok);
    assert_eq!(other.objects().domains, 0);
    bench.unit.remove_endpoint(far);
    assert_eq!(other.book().complaints, [""; 0]);
}

#[test]
fn should_reject_attach_that_is_not_consistent_with_a_bypass_domain_with_inval() {
    let bench = bench();
    assert_eq!(bench.send(&attach(A.0.into(), 1, 1)), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Identity);
    assert_eq!(bench.attach(B, 1), Status::Inval);
    assert_eq!(bench.send(&attach(B.0.into(), 1, 1)), Status::Ok);
    assert_eq!(bench.attach(A, 2), Status::Ok);
    assert_eq!(bench.send(&attach(B.0.into(), 2, 1)), Status::Inval);
    assert_eq!(bench.backend.translation_of(B), Translation::Identity);
}

#[test]
fn should_detach_from_the_old_domain_when_attached_to_another() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    assert_eq!(bench.attach(A, 2), Status::Ok);
    assert_eq!(bench.pages(A), []);
    // The old one has ceased to exist, and its number is free.
    assert_eq!(bench.map(0, 4), Status::NoEnt);
    assert_eq!(bench.backend.objects().domains, 1);
    assert_eq!(bench.attach(B, 1), Status::Ok);
    assert_eq!(bench.pages(B), []);
}

#[test]
fn attach_again_to_the_same_domain_is_ok_and_does_nothing() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.pages(A), [(0, 4)]);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.backend.objects().domains, 0);
}

#[test]
fn should_reject_attach_of_an_endpoint_whose_reserved_regions_are_mapped_with_unsupp() {
    let bench = bench();
    let picky = Rid::new(0, 5, 0);
    let mut reserved = Regions::new();
    reserved.insert(0x10_0000, 0x1f_ffff, Kind::Reserved);
    bench.add(picky, reserved);
    bench.attach(A, 1);
    bench.map(0x100, 0x100);
    assert_eq!(bench.attach(picky, 1), Status::Unsupp);
    assert_eq!(bench.backend.translation_of(picky), Translation::Blocked);
    bench.unmap(0x100, 0x100);
    assert_eq!(bench.attach(picky, 1), Status::Ok);
    // From now on the region is out of bounds for the domain, until the endpoint leaves.
    assert_eq!(bench.map(0x1ff, 0x200), Status::Inval);
    bench.detach(picky, 1);
    assert_eq!(bench.map(0x1ff, 0x200), Status::Ok);
}

#[test]
fn a_failed_attach_changes_nothing() {
    let bench = bench();
    let other = Recorder::new();
    let far = Rid::new(1, 0, 0);
    bench
        .unit
        .add_endpoint(far, other.clone(), Regions::new())
        .unwrap();
    bench.attach(A, 1);
    for n in 0..600 {
        bench.map(n, n);
    }
    assert_eq!(bench.attach(far, 2), Status::Ok);
    assert_eq!(bench.send(&map(2, (0, PAGE - 1), 0, RW)), Status::Ok);
    let before = (other.translation_of(far), other.mappings_of(far));
    // create_domain, three chunks, apply: each of them is refused once.
    for step in 0..5 {
        let refuse = (0..5).map(|n| n == step).collect();
        other.book().refuse = refuse;
        assert_eq!(bench.attach(far, 1), Status::NoMem, "step {step}");
        assert_eq!((other.translation_of(far), other.mappings_of(far)), before);
        assert_eq!(other.objects().domains, 1);
        other.book().refuse.clear();
    }
    assert_eq!(bench.unit.snapshot().domains.len(), 2);
    assert_eq!(bench.attach(far, 1), Status::Ok);
    bench.unit.remove_endpoint(far);
}

#[test]
fn an_endpoint_whose_old_domain_cannot_be_put_back_is_blocked_reported_and_tried_again() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    // create_domain, apply, and apply of the old one.
    bench.backend.book().refuse = [false, true, true].into();
    assert_eq!(bench.attach(A, 2), Status::NoMem);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    let report = bench.unit.next_fault().expect("a report");
    assert_eq!((report.reason, report.endpoint.get()), (0, A.0.into()));
    let refused = |bench: &Bench| bench.unit.snapshot().endpoints[0].refused;
    assert!(refused(&bench));
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert!(!refused(&bench));
    assert_eq!(bench.pages(A), [(0, 4)]);
}

// DETACH

#[test]
fn must_ignore_reserved_of_a_detach() {
    let bench = bench();
    bench.attach(A, 1);
    let mut request = detach(A.0.into(), 1);
    request[12..].fill(0xff);
    assert_eq!(bench.send(&request), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
}

#[test]
fn must_reject_detach_of_an_endpoint_that_does_not_exist_with_noent() {
    let bench = bench();
    bench.attach(A, 1);
    for endpoint in [0, 0xffff, 0x1_0000 | u32::from(A.0), u32::MAX] {
        assert_eq!(bench.send(&detach(endpoint, 1)), Status::NoEnt);
    }
    assert_eq!(bench.pages(A), []);
}

#[test]
fn must_ensure_that_a_detached_endpoint_cannot_access_the_domain() {
    let bench = bench();
    bench.attach(A, 1);
    bench.attach(B, 1);
    bench.map(0, 4);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.pages(B), [(0, 4)]);
}

#[test]
fn may_reject_detach_from_the_wrong_domain_with_inval_and_then_changes_nothing() {
    let bench = bench();
    bench.attach(A, 1);
    bench.attach(B, 2);
    bench.map(0, 4);
    assert_eq!(bench.detach(A, 2), Status::Inval);
    assert_eq!(bench.detach(A, 77), Status::Inval);
    assert_eq!(bench.pages(A), [(0, 4)]);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.detach(A, 1), Status::Inval);
}

#[test]
fn after_all_endpoints_are_detached_the_domain_ceases_to_exist() {
    let bench = bench();
    bench.attach(A, 1);
    bench.attach(B, 1);
    bench.map(0, 4);
    bench.detach(A, 1);
    bench.detach(B, 1);
    assert_eq!(bench.unit.snapshot().domains, []);
    assert_eq!(bench.backend.objects().domains, 0);
    bench.attach(A, 1);
    assert_eq!(bench.pages(A), []);
}

// MAP

#[test]
fn should_reject_a_map_that_is_not_aligned_with_range() {
    let bench = bench();
    bench.attach(A, 1);
    for (virt, phys) in [
        ((1, PAGE - 1), 0),
        ((0, PAGE), 0),
        ((0, PAGE - 2), 0),
        ((0, PAGE - 1), 1),
        ((0, 0), 0),
        ((PAGE / 2, PAGE / 2 * 3 - 1), PAGE / 2),
    ] {
        assert_eq!(
            bench.send(&map(1, virt, phys, RW)),
            Status::Range,
            "{virt:x?}"
        );
    }
    assert_eq!(bench.pages(A), []);
}

#[test]
fn the_granularity_of_a_host_with_larger_pages_holds() {
    let bench = bench_with(Config {
        page_size_mask: 1 << 14 | 1 << 21,
        ..config()
    });
    bench.attach(A, 1);
    assert_eq!(bench.map(1, 4), Status::Range);
    assert_eq!(bench.map(4, 7), Status::Ok);
}

#[test]
fn should_reject_a_map_over_a_mapping_with_inval() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(4, 7);
    for (first, last) in [(4, 7), (0, 4), (7, 9), (5, 6), (0, 100)] {
        assert_eq!(bench.map(first, last), Status::Inval);
    }
    assert_eq!(bench.map(0, 3), Status::Ok);
    assert_eq!(bench.map(8, 9), Status::Ok);
    assert_eq!(bench.pages(A), [(0, 3), (4, 7), (8, 9)]);
}

#[test]
fn must_reject_a_map_with_unknown_flags_with_inval() {
    let bench = bench();
    bench.attach(A, 1);
    for bit in 3..32 {
        assert_eq!(
            bench.send(&map(1, (0, PAGE - 1), 0, RW | 1 << bit)),
            Status::Inval
        );
    }
    bench.unit.set_features(!feature::MMIO);
    let mmio = RW | map_flag::MMIO;
    assert_eq!(bench.send(&map(1, (0, PAGE - 1), 0, mmio)), Status::Inval);
}

#[test]
fn should_reject_map_and_unmap_of_a_domain_that_does_not_exist_with_noent() {
    let bench = bench();
    assert_eq!(bench.map(0, 4), Status::NoEnt);
    assert_eq!(bench.unmap(0, 4), Status::NoEnt);
}

#[test]
fn should_reject_map_and_unmap_of_a_bypass_domain_with_inval() {
    let bench = bench();
    bench.send(&attach(A.0.into(), 1, 1));
    assert_eq!(bench.map(0, 4), Status::Inval);
    assert_eq!(bench.unmap(0, 4), Status::Inval);
}

#[test]
fn must_not_allow_writes_to_a_range_mapped_without_write() {
    let bench = bench();
    bench.attach(A, 1);
    let all = [0, map_flag::READ, map_flag::WRITE, RW, RW | map_flag::MMIO];
    for (n, flags) in (0..).zip(all) {
        let virt = (n * PAGE, n * PAGE + PAGE - 1);
        assert_eq!(bench.send(&map(1, virt, 0, flags)), Status::Ok);
    }
    let told: Vec<_> = bench
        .backend
        .mappings_of(A)
        .unwrap()
        .iter()
        .map(|m| (m.iova.0 / PAGE, m.access, m.mmio))
        .collect();
    // What allows nothing is kept, but there is nothing to tell a back end.
    let expected = [
        (1, Access::READ, false),
        (2, Access::WRITE, false),
        (3, Access::READ_WRITE, false),
        (4, Access::READ_WRITE, true),
    ];
    assert_eq!(told, expected);
    assert_eq!(bench.map(0, 0), Status::Inval);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.map(0, 0), Status::Ok);
}

#[test]
fn a_map_outside_of_the_input_range_or_of_guest_physical_memory_is_range() {
    let bench = bench_with(Config {
        input_range: (0x10 * PAGE, (1 << 40) - 1),
        gpa_bits: 39,
        ..config()
    });
    bench.attach(A, 1);
    let page = |start| (start, start + (PAGE - 1));
    for (virt, phys) in [
        (page(0xf * PAGE), 0),
        (page(1 << 40), 0),
        (page(u64::MAX - (PAGE - 1)), 0),
        ((0, u64::MAX), 0),
        (page(0x10 * PAGE), 1 << 39),
        (page(0x10 * PAGE), u64::MAX - (PAGE - 1)),
        ((0x10 * PAGE, 0x12 * PAGE - 1), (1 << 39) - PAGE),
        ((0x10 * PAGE, 0x12 * PAGE - 1), u64::MAX - (PAGE - 1)),
    ] {
        assert_eq!(
            bench.send(&map(1, virt, phys, RW)),
            Status::Range,
            "{virt:x?}"
        );
    }
    assert_eq!(
        bench.send(&map(1, page((1 << 40) - PAGE), (1 << 39) - PAGE, RW)),
        Status::Ok
    );
    assert_eq!(bench.pages(A).len(), 1);
}

#[test]
fn a_map_or_unmap_that_ends_before_it_begins_is_inval() {
    let bench = bench();
    bench.attach(A, 1);
    assert_eq!(
        bench.send(&map(1, (2 * PAGE, PAGE - 1), 0, RW)),
        Status::Inval
    );
    assert_eq!(bench.send(&map(1, (PAGE, PAGE - 1), 0, RW)), Status::Inval);
    assert_eq!(bench.send(&unmap(1, 2 * PAGE, PAGE - 1)), Status::Inval);
}

#[test]
fn mappings_are_bounded_per_domain_and_per_device_and_more_are_nomem() {
    let bench = bench_with(Config {
        domain_mappings: 8,
        mappings: 12,
        ..config()
    });
    bench.attach(A, 1);
    bench.attach(B, 2);
    for n in 0..8 {
        assert_eq!(bench.map(n, n), Status::Ok);
    }
    assert_eq!(bench.map(8, 8), Status::NoMem);
    assert_eq!(bench.map(7, 7), Status::Inval);
    let in_b = |n: u64| bench.send(&map(2, (n * PAGE, n * PAGE + PAGE - 1), 0, RW));
    for n in 0..4 {
        assert_eq!(in_b(n), Status::Ok);
    }
    assert_eq!(in_b(4), Status::NoMem);
    bench.unmap(0, 0);
    assert_eq!(in_b(4), Status::Ok);
    bench.detach(A, 1);
    assert_eq!(in_b(5), Status::Ok);
}

#[test]
fn what_a_back_end_refuses_reaches_the_guest_as_its_own_status() {
    let bench = bench();
    bench.attach(A, 1);
    bench.backend.book().refuse = [true, true].into();
    assert_eq!(bench.map(0, 4), Status::NoMem);
    assert_eq!(bench.pages(A), []);
    assert_eq!(bench.map(0, 4), Status::Ok);
}

// UNMAP: the numbered examples, in pages

#[test]
fn unmap_example_1_succeeds_and_does_not_unmap_anything() {
    let bench = bench();
    bench.attach(A, 1);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.backend.book().unmap_calls, 0);
}

#[test]
fn unmap_example_2_unmaps_a() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 9);
    assert_eq!(bench.unmap(0, 9), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn unmap_example_3_unmaps_a_and_b() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(5, 9);
    assert_eq!(bench.unmap(0, 9), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn unmap_example_4_fails_with_range_and_does_not_unmap_anything() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 9);
    assert_eq!(bench.unmap(0, 4), Status::Range);
    assert_eq!(bench.unmap(5, 20), Status::Range);
    assert_eq!(bench.unmap(2, 3), Status::Range);
    assert_eq!(bench.pages(A), [(0, 9)]);
    // Nor does it when another mapping would be removed whole.
    bench.map(10, 12);
    assert_eq!(bench.unmap(5, 12), Status::Range);
    assert_eq!(bench.unmap(0, 11), Status::Range);
    assert_eq!(bench.pages(A), [(0, 9), (10, 12)]);
}

#[test]
fn unmap_example_5_unmaps_a() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(5, 9);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.pages(A), [(5, 9)]);
}

#[test]
fn unmap_example_6_unmaps_a() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    assert_eq!(bench.unmap(0, 9), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn unmap_example_7_unmaps_a_and_b() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(10, 14);
    assert_eq!(bench.unmap(0, 14), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn an_unmap_of_everything_unmaps_everything() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(1 << 30, 1 << 30);
    assert_eq!(bench.send(&unmap(1, 0, u64::MAX)), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn may_reject_unmap_with_reserved_not_zero_with_inval() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let mut request = unmap(1, 0, 5 * PAGE - 1);
    request[24] = 1;
    assert_eq!(bench.send(&request), Status::Inval);
    assert_eq!(bench.pages(A), [(0, 4)]);
}

#[test]
fn what_was_unmapped_is_out_of_reach_even_when_the_back_end_refuses() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.map(5, 9);
    bench.backend.book().refuse = [true].into();
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.pages(A), [(5, 9)]);
    // When it cannot be made anew either: Blocked, and the next unmap tries again.
    bench.backend.book().refuse = [true, true].into();
    assert_eq!(bench.unmap(5, 9), Status::Ok);
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.map(0, 4), Status::Ok);
    assert_eq!(bench.map(5, 9), Status::Ok);
    assert_eq!(bench.unmap(5, 9), Status::Ok);
    assert_eq!(bench.pages(A), [(0, 4)]);
}

// Requests that arrive together

#[test]
fn maps_that_arrive_together_are_one_call_and_so_are_unmaps() {
    let bench = bench();
    bench.attach(A, 1);
    let page = |n: u64| (n * PAGE, n * PAGE + PAGE - 1);
    let maps: Vec<_> = (0..128).map(|n| map(1, page(n * 2), 0, RW)).collect();
    assert!(bench.send_all(&maps).iter().all(|&s| s == Status::Ok));
    assert_eq!(bench.backend.book().map_calls, [128]);
    let unmaps: Vec<_> = (0..64)
        .map(|n| unmap(1, page(n * 2).0, page(n * 2).1))
        .collect();
    assert!(bench.send_all(&unmaps).iter().all(|&s| s == Status::Ok));
    assert_eq!(bench.backend.book().unmap_calls, 1);
    assert_eq!(bench.pages(A).len(), 64);
    // A mapping that stays between two unmaps parts them.
    let unmaps = [page(200), page(204)].map(|(first, last)| unmap(1, first, last));
    bench.send_all(&unmaps);
    assert_eq!(bench.backend.book().unmap_calls, 3);
    assert_eq!(bench.pages(A).len(), 62);
}

#[test]
fn statuses_of_a_batch_are_those_of_its_requests_one_by_one() {
    let bench = bench();
    let page = |n: u64| (n * PAGE, n * PAGE + PAGE - 1);
    let (a, b) = (A.0.into(), B.0.into());
    let batch = [
        (map(1, page(0), 0, RW), Status::NoEnt),
        (attach(a, 1, 0), Status::Ok),
        (map(1, page(0), 0, RW), Status::Ok),
        (map(1, page(0), 0, RW), Status::Inval),
        (map(1, page(1), 1, RW), Status::Range),
        (map(1, page(1), 0, RW), Status::Ok),
        (map(2, page(0), 0, RW), Status::NoEnt),
        (unmap(1, 0, PAGE - 1), Status::Ok),
        (map(1, page(0), 0, RW), Status::Ok),
        (attach(b, 2, 0), Status::Ok),
        (unmap(1, 0, PAGE), Status::Range),
        (map(2, page(0), 0, RW), Status::Ok),
        (detach(a, 1), Status::Ok),
        (unmap(1, 0, PAGE), Status::NoEnt),
        (detach(a, 1), Status::Inval),
    ];
    let (requests, expected): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    assert_eq!(bench.send_all(&requests), expected);
    assert_eq!(bench.pages(B), [(0, 0)]);
}

#[test]
fn a_refused_batch_is_done_one_by_one_with_exact_statuses() {
    let bench = bench();
    bench.attach(A, 1);
    let page = |n: u64| (n * PAGE, n * PAGE + PAGE - 1);
    let batch = [0, 1, 1, 2].map(|n| map(1, page(n), 0, RW));
    // The batch, then page 0, then page 1 the first time.
    bench.backend.book().refuse = [true, false, true].into();
    let expected = [Status::Ok, Status::NoMem, Status::Ok, Status::Ok];
    assert_eq!(bench.send_all(&batch), expected);
    assert_eq!(bench.pages(A), [(0, 0), (1, 1), (2, 2)]);
}

#[test]
fn a_map_that_one_of_several_back_ends_refuses_is_in_none() {
    let bench = bench();
    let other = Recorder::new();
    let far = Rid::new(1, 0, 0);
    bench
        .unit
        .add_endpoint(far, other.clone(), Regions::new())
        .unwrap();
    bench.attach(A, 1);
    bench.attach(far, 1);
    other.book().refuse = [true, true].into();
    assert_eq!(bench.map(0, 4), Status::NoMem);
    assert_eq!(bench.pages(A), []);
    assert_eq!(other.mappings_of(far), Some(vec![]));
    assert_eq!(bench.map(0, 4), Status::Ok);
    assert_eq!(other.mappings_of(far), bench.backend.mappings_of(A));
    bench.unit.remove_endpoint(far);
}

// PROBE

#[test]
fn probe_tells_the_msi_window_and_every_reserved_region() {
    let bench = bench();
    let picky = Rid::new(0, 5, 0);
    let mut reserved = Regions::outside(&[(0, (1 << 47) - 1)]);
    for n in 0..40 {
        reserved.insert((n * 2) << 20, (n * 2) << 20 | 0xfff, Kind::Reserved);
    }
    bench.add(picky, reserved.clone());
    let reply = bench.unit.process(&probe(picky.0.into()), 2048 + 4);
    assert_eq!(reply.bytes().len(), 2048 + 4);
    assert_eq!(reply.status(), Some(0));
    let list = properties(&reply.bytes()[..2048]);
    reserved.insert(X86_MSI.first, X86_MSI.last, X86_MSI.kind);
    let told: Vec<_> = list.iter().map(|p| (p.start.get(), p.end.get())).collect();
    let expected: Vec<_> = reserved.iter().map(|r| (r.first, r.last)).collect();
    assert_eq!(told, expected);
    let msi = |p: &&ProbeResvMem| p.subtype == resv_mem_subtype::MSI;
    assert_eq!(list.iter().filter(msi).count(), 1);
}

#[test]
fn should_not_present_resv_mem_properties_that_overlap() {
    let bench = bench();
    let picky = Rid::new(0, 5, 0);
    bench.add(
        picky,
        Regions::outside(&[(0, 0xfe00_0000), (1 << 32, 1 << 40)]),
    );
    let reply = bench.unit.process(&probe(picky.0.into()), 2052);
    let list = properties(reply.bytes());
    for pair in list.windows(2) {
        assert!(pair[0].end.get() < pair[1].start.get());
    }
}

#[test]
fn should_reject_probe_of_an_endpoint_that_does_not_exist_with_noent_at_the_end() {
    let bench = bench();
    let reply = bench.unit.process(&probe(0xffff), 2052);
    assert_eq!(reply.bytes()[..2048], [0; 2048]);
    assert_eq!(reply.bytes()[2048..], [Status::NoEnt as u8, 0, 0, 0]);
}

#[test]
fn should_not_write_any_property_to_a_smaller_list_but_reject_with_inval() {
    let bench = bench();
    for writable in [4, 28, 2051] {
        let reply = bench.unit.process(&probe(A.0.into()), writable);
        let bytes = reply.bytes();
        assert_eq!(bytes.len(), writable);
        assert_eq!(bytes[writable - 4..], [Status::Inval as u8, 0, 0, 0]);
        assert!(bytes[..writable - 4].iter().all(|&b| b == 0));
    }
}

#[test]
fn the_tail_follows_the_properties_however_long_the_buffer_is() {
    let bench = bench();
    let reply = bench.unit.process(&probe(A.0.into()), usize::MAX);
    assert_eq!(reply.bytes().len(), 2052);
    assert_eq!(reply.status(), Some(0));
}

#[test]
fn should_not_write_the_buffer_of_a_probe_that_was_not_negotiated() {
    let bench = bench();
    bench.unit.set_features(!feature::PROBE);
    assert_eq!(bench.unit.process(&probe(A.0.into()), 2052), Reply::Nothing);
}

#[test]
fn must_ignore_reserved_of_a_probe_and_should_fill_the_rest_with_zeroes() {
    let bench = bench();
    let mut request = probe(A.0.into());
    request[8..].fill(0xff);
    request[1..4].fill(0xff);
    let reply = bench.unit.process(&request, 2052);
    assert_eq!(reply.status(), Some(0));
    // One property: the MSI window.
    assert_eq!(properties(reply.bytes()).len(), 1);
    assert!(reply.bytes()[24..].iter().all(|&b| b == 0));
}

#[test]
fn a_truncated_probe_is_invalid_and_its_tail_is_where_a_driver_looks() {
    let bench = bench();
    let reply = bench.unit.process(&probe(A.0.into())[..8], 2052);
    assert_eq!(reply.bytes().len(), 2052);
    assert_eq!(reply.status(), Some(Status::Inval as u8));
}

#[test]
fn should_reject_a_map_that_overlaps_a_resv_mem_region() {
    let bench = bench();
    bench.attach(A, 1);
    let (first, last) = (X86_MSI.first / PAGE, X86_MSI.last / PAGE);
    for (from, to) in [
        (first, first),
        (last, last),
        (first - 1, first),
        (last, last + 1),
    ] {
        assert_eq!(bench.map(from, to), Status::Inval);
    }
    assert_eq!(bench.map(first - 1, first - 1), Status::Ok);
    assert_eq!(bench.map(last + 1, last + 1), Status::Ok);
}

#[test]
fn should_not_allow_accesses_to_resv_mem_regions_to_affect_others() {
    // Memory where interrupts go: whoever reaches it has gone through the window.
    let window = GuestAddress(X86_MSI.first);
    let ram: GuestRam = Arc::new(
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (window, 0x1000)]).unwrap(),
    );
    let engine = Arc::new(Engine::new(ram.clone()));
    let port = engine.add_endpoint(A, EndpointConfig::default()).unwrap();
    let unit = Iommu::new(Config {
        bypass: true,
        ..Config::compose(&engine.capabilities(), 0).unwrap()
    });
    unit.set_features(u64::MAX);
    unit.add_endpoint(A, engine, Regions::new()).unwrap();
    let blocked = || {
        let write = port.access().write_obj(1u8, window);
        let read = port.access().read_obj::<u8>(window);
        write.is_err() && read.is_err() && ram.read_obj::<u8>(window).unwrap() == 0
    };
    assert!(blocked(), "in bypass mode, though there is memory");
    assert!(port.access().write_obj(1u8, GuestAddress(0)).is_ok());
    assert_eq!(unit.process(&attach(A.0.into(), 1, 0), 4).status(), Some(0));
    assert!(blocked(), "in a domain");
    assert_eq!(unit.process(&attach(A.0.into(), 2, 1), 4).status(), Some(0));
    assert!(blocked(), "in a bypass domain");
}

// Fault reporting

#[test]
fn a_fault_reaches_the_event_queue_with_the_endpoint_and_the_address() {
    let bench = bench();
    let woken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = woken.clone();
    bench.unit.on_fault(move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    bench.fault(A, FaultCause::Blocked);
    bench.fault(B, FaultCause::DomainUnmapped);
    assert_eq!(woken.load(std::sync::atomic::Ordering::Relaxed), 2);
    let first = bench.unit.next_fault().unwrap();
    assert_eq!((first.reason, first.endpoint.get()), (1, A.0.into()));
    assert_eq!(
        (first.flags.get(), first.address.get()),
        (0x101, 0xdead_b000)
    );
    assert_eq!(first.as_bytes().len(), 24);
    let second = bench.unit.next_fault().unwrap();
    assert_eq!((second.reason, second.endpoint.get()), (2, B.0.into()));
    assert_eq!(bench.unit.next_fault(), None);
}

#[test]
fn a_page_request_is_answered_invalid_once_per_group() {
    let bench = bench();
    let sink = bench.backend.book().claimed[&A].clone();
    for last in [false, true] {
        sink.page_request(PageRequest {
            target: Target::rid(A),
            group: 7,
            last,
            iova: Iova(0),
            access: Access::READ,
            execute: false,
            privileged: false,
        });
    }
    let responses = bench.backend.book().responses.clone();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].code, crate::backend::ResponseCode::Invalid);
}

// Plugging

#[test]
fn detach_of_a_departed_endpoint_is_accepted_and_ends_its_domain() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.unit.remove_endpoint(A);
    // The back end holds nothing more; the guest takes its domain apart.
    assert_eq!(bench.backend.objects().domains, 0);
    assert_eq!(bench.unmap(0, 4), Status::Ok);
    assert_eq!(bench.attach(A, 2), Status::NoEnt);
    assert_eq!(bench.detach(A, 1), Status::Ok);
    assert_eq!(bench.detach(A, 1), Status::NoEnt);
    assert_eq!(bench.unit.snapshot().domains, []);
}

#[test]
fn the_next_device_with_the_number_of_a_departed_one_starts_unattached() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    bench.unit.remove_endpoint(A);
    bench.add(A, Regions::new());
    assert_eq!(bench.backend.translation_of(A), Translation::Blocked);
    assert_eq!(bench.unit.snapshot().domains, []);
    assert_eq!(bench.attach(A, 1), Status::Ok);
    assert_eq!(bench.pages(A), []);
}

#[test]
fn an_endpoint_plugged_late_works_as_one_from_the_start() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let late = Rid::new(0, 9, 0);
    bench.add(late, Regions::new());
    assert_eq!(bench.attach(late, 1), Status::Ok);
    assert_eq!(bench.pages(late), [(0, 4)]);
}

#[test]
fn an_endpoint_that_cannot_do_what_was_offered_is_refused_with_the_reason() {
    let late = Rid::new(0, 9, 0);
    let backend = || Recorder::new() as Arc<dyn Backend>;
    let wide = Iommu::new(Config {
        input_range: (0, (1 << 57) - 1),
        ..config()
    });
    let error = wide
        .add_endpoint(late, backend(), Regions::new())
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("00:09.0") && text.contains("before boot"),
        "{text}"
    );
    assert_eq!(wide.snapshot().endpoints, []);

    let bench = bench_with(Config {
        probe_size: 64,
        ..config()
    });
    let reserved = (0..4).map(|n| Region {
        first: n << 20,
        last: n << 20,
        kind: Kind::Reserved,
    });
    let error = bench
        .unit
        .add_endpoint(late, backend(), reserved.collect())
        .unwrap_err();
    assert!(matches!(
        error,
        AddError::Properties {
            needs: 120,
            offered: 64,
            ..
        }
    ));
    let error = bench
        .unit
        .add_endpoint(A, backend(), Regions::new())
        .unwrap_err();
    assert!(matches!(error, AddError::Exists(A)));
}

#[test]
fn an_endpoint_that_its_back_end_refuses_is_not_added() {
    let bench = bench_with(Config {
        bypass: true,
        ..config()
    });
    let late = Rid::new(0, 9, 0);
    for refuse in [vec![true], vec![false, true]] {
        bench.backend.book().refuse = refuse.into();
        let backend: Arc<dyn Backend> = bench.backend.clone();
        let error = bench
            .unit
            .add_endpoint(late, backend, Regions::new())
            .unwrap_err();
        assert!(matches!(error, AddError::Refused { .. }));
        assert_eq!(bench.backend.objects().endpoints, 2);
    }
    bench.add(late, Regions::new());
    assert_eq!(bench.backend.translation_of(late), Translation::Identity);
}

#[test]
fn page_sizes_and_input_range_are_composed_from_the_hosts() {
    let mut wide = Recorder::new().capabilities();
    wide.address_width = 57;
    let mut narrow = wide;
    narrow.address_width = 39;
    narrow.page_sizes = 0x20_1000;
    let config = Config::compose(&wide.and(narrow), 100).unwrap();
    assert_eq!(config.input_range, (0, (1 << 39) - 1));
    assert_eq!(config.page_size_mask, 0x20_1000);
    assert!(config.probe_size >= 2400);
    narrow.address_width = 20;
    assert!(Config::compose(&narrow, 0).is_err());
}

#[test]
fn a_map_may_reach_across_two_regions_of_memory() {
    // 3 GiB to 5 GiB: the hole of a PC is the back end's business, not the state machine's.
    let bench = bench();
    bench.attach(A, 1);
    let request = map(1, (0, (2 << 30) - 1), 3 << 30, RW);
    assert_eq!(bench.send(&request), Status::Ok);
    let mapping = bench.backend.mappings_of(A).unwrap()[0];
    assert_eq!((mapping.gpa, mapping.length), (Gpa(3 << 30), 2 << 30));
}

#[test]
fn live_state_is_a_value() {
    let bench = bench();
    bench.attach(A, 1);
    bench.map(0, 4);
    let json = serde_json::to_value(bench.unit.snapshot()).unwrap();
    assert_eq!(json["endpoints"][0]["endpoint"], "00:03.0");
    assert_eq!(json["endpoints"][0]["domain"], 1);
    assert_eq!(json["domains"][0]["mapped_bytes"], 5 * PAGE);
    assert_eq!(json["counters"]["requests"], 2);
}
