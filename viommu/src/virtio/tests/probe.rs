//! PROBE requests (5.13.6.7).

use super::*;

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
