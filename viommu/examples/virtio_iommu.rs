//! A virtio-iommu in front of an emulated device: all that a VMM has to do, and a guest that puts
//! it to use. `cargo run -p viommu --example virtio_iommu`

use std::sync::Arc;

use viommu::backend::Backend;
use viommu::backend::software::{EndpointConfig, Engine};
use viommu::dma::DmaPort;
use viommu::reserved::Regions;
use viommu::spec::virtio_iommu::{ReqAttach, ReqHead, ReqMap, ReqTail, Status, map_flag, req_type};
use viommu::virtio::viot::{self, Topology};
use viommu::virtio::{Chain, Config, Iommu};
use viommu::{GuestRam, Rid};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

/// The device: bus 0, device 3, function 0.
const DISK: Rid = Rid::new(0, 3, 0);
/// The unit itself, which is a PCI function too.
const UNIT: Rid = Rid::new(0, 31, 0);

/// What a VMM has then: the unit, the device's way to memory, the ACPI table.
type Machine = (Arc<Iommu>, DmaPort, Vec<u8>);

/// The VMM's part.
fn vmm(ram: &GuestRam) -> Result<Machine, Box<dyn std::error::Error>> {
    let engine = Arc::new(Engine::new(ram.clone()));
    let config = Config::compose(&engine.capabilities(), 0)?;
    let unit = Arc::new(Iommu::new(config));
    let port = engine.add_endpoint(DISK, EndpointConfig::default())?;
    unit.add_endpoint(DISK, engine, Regions::new())?;
    // The virtio transport sends what this gives on the event queue, when `on_fault` wakes it.
    unit.on_fault(|| println!("a fault report waits for the event queue"));
    let viot = viot::table(&[Topology::devices(UNIT, [DISK])?])?;
    Ok((unit, port, viot))
}

/// The guest's part, as its driver does it: requests on the request queue.
fn guest(unit: &Iommu) {
    let head = |kind| ReqHead {
        r#type: kind,
        reserved: [0; 3],
    };
    let attach = ReqAttach {
        head: head(req_type::ATTACH),
        domain: 1.into(),
        endpoint: u32::from(DISK.0).into(),
        flags: 0.into(),
        reserved: [0; 4],
    };
    let map = ReqMap {
        head: head(req_type::MAP),
        domain: 1.into(),
        virt_start: 0x10_0000.into(),
        virt_end: 0x10_ffff.into(),
        phys_start: 0x8000.into(),
        flags: (map_flag::READ | map_flag::WRITE).into(),
    };
    unit.set_features(unit.features());
    // The transport hands over what the guest queued, and writes the replies' bytes back.
    let requests = [attach.as_bytes(), map.as_bytes()].map(|readable| Chain {
        readable,
        writable: size_of::<ReqTail>(),
    });
    let mut replies = Vec::new();
    unit.serve(requests, &mut replies);
    assert!(replies.iter().all(|r| r.status() == Some(Status::Ok as u8)));
}

/// The whole of it.
pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(
        GuestAddress(0),
        16 << 20,
    )])?);
    let (unit, port, _viot) = vmm(&ram)?;

    // Fail closed: until the guest attaches the disk, nothing passes, and each attempt is a fault.
    assert!(
        port.access()
            .write_slice(b"early", GuestAddress(0x8000))
            .is_err()
    );
    guest(&unit);
    port.access()
        .write_slice(b"hello", GuestAddress(0x10_0000))?;
    let mut memory = [0; 5];
    ram.read_slice(&mut memory, GuestAddress(0x8000))?;
    assert_eq!(&memory, b"hello");

    println!("fault: {:?}", unit.next_fault());
    println!("state: {:?}", unit.snapshot());
    Ok(())
}
