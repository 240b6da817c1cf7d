//! A VT-d unit in front of an emulated device: all that a VMM has to do, and a guest that puts it
//! to use. `cargo run -p viommu --example vtd`

use std::sync::Arc;

use viommu::backend::software::{EndpointConfig, Engine};
use viommu::dma::DmaPort;
use viommu::interrupt::{Msi, MsiSink};
use viommu::spec::vtd::dmar::{Dmar, Drhd, Oem, Scope};
use viommu::spec::vtd::paging::FirstStageEntry;
use viommu::spec::vtd::registers::{self as register, Global, Rtaddr};
use viommu::spec::vtd::tables::{
    PasidDirectoryEntry, PasidEntry, PasidEntry0, PasidEntry1, PasidEntry2, RootEntryLow,
    SCALABLE_CONTEXT_ENTRY_SIZE, ScalableContextLow,
};
use viommu::vtd::{Connections, Unit, UnitConfig};
use viommu::{GuestRam, Rid};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The device: bus 0, device 3, function 0.
const DISK: Rid = Rid::new(0, 3, 0);
/// Where the unit's register page is, which the VMM keeps out of guest RAM.
const REGISTERS: u64 = 0xfed9_0000;

/// Delivers the unit's own interrupts. A VMM injects them, with KVM by `KVM_SIGNAL_MSI`.
struct Interrupts;

impl MsiSink for Interrupts {
    fn send(&self, msi: Msi) {
        println!("interrupt: {msi:x?}");
    }
}

/// What a VMM has then: the unit, the device's way to memory, the ACPI table.
type Machine = (Arc<Unit>, DmaPort, Vec<u8>);

/// The VMM's part.
fn vmm(ram: &GuestRam) -> Result<Machine, Box<dyn std::error::Error>> {
    let engine = Arc::new(Engine::new(ram.clone()));
    let connections = Connections {
        ram: ram.clone(),
        msi: Arc::new(Interrupts),
        backends: vec![engine.clone()],
        remapper: None,
        pasids: None,
    };
    let unit = Unit::new(UnitConfig::default(), connections)?;
    let port = engine.add_endpoint(DISK, EndpointConfig::default())?;
    unit.add_endpoint(DISK, engine)?;
    let offer = unit.freeze(); // before the first vCPU runs
    let dmar = Dmar {
        host_address_width: offer.address_width(),
        units: vec![Drhd {
            include_pci_all: false,
            register_base: REGISTERS,
            scopes: vec![Scope::Endpoint(DISK)],
        }],
        ..Dmar::default()
    };
    Ok((unit, port, dmar.to_bytes(Oem::default())))
}

/// The guest's part, as its driver does it: IOVA 0 to 1 GiB of the disk is guest-physical 0 on.
fn guest(unit: &Unit, ram: &GuestRam) -> Result<(), Box<dyn std::error::Error>> {
    let [roots, contexts, directory, pasids, level4, level3] = [1, 2, 3, 4, 5, 6]; // pages
    let poke = |page: u64, offset: u64, entry: u64| {
        ram.write_obj(entry, GuestAddress((page << 12) + offset))
    };
    let root = RootEntryLow::new().with_p(true).with_ctp(contexts);
    poke(roots, 0, root.into_bits())?;
    let context = ScalableContextLow::new().with_p(true);
    let context = context.with_pasiddirptr(directory);
    let size = SCALABLE_CONTEXT_ENTRY_SIZE;
    poke(
        contexts,
        u64::from(DISK.devfn()) * size,
        context.into_bits(),
    )?;
    let table = PasidDirectoryEntry::new().with_p(true);
    poke(directory, 0, table.with_smptblptr(pasids).into_bits())?;
    let entry = PasidEntry {
        q0: PasidEntry0::new().with_p(true).with_pgtt(1), // first-stage
        // The unit snoops caches when it sets flags of table entries.
        q1: PasidEntry1::new().with_did(1).with_pwsnp(true),
        q2: PasidEntry2::new().with_fsptptr(level4),
        ..PasidEntry::default()
    };
    for (offset, word) in (0..).step_by(8).zip(entry.into_words()) {
        poke(pasids, offset, word)?;
    }
    let next = FirstStageEntry::new()
        .with_p(true)
        .with_rw(true)
        .with_us(true);
    poke(level4, 0, next.with_addr(level3).into_bits())?;
    poke(level3, 0, next.with_ps(true).into_bits())?; // one page of 1 GiB
    // The VMM hands the guest's accesses of the register page to the unit like this.
    let root = Rtaddr::new().with_ttm(1).with_rta(roots); // scalable mode
    unit.write(register::RTADDR, &root.into_bits().to_le_bytes());
    for command in [Global::new().with_srtp(true), Global::new().with_te(true)] {
        unit.write(register::GCMD, &command.into_bits().to_le_bytes());
    }
    Ok(())
}

/// The whole of it.
pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ram: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[(
        GuestAddress(0),
        16 << 20,
    )])?);
    let (unit, port, _dmar) = vmm(&ram)?;

    // Fail closed: nothing passes until the guest has tables for it.
    assert!(
        port.access()
            .write_slice(b"early", GuestAddress(0x8000))
            .is_err()
    );
    guest(&unit, &ram)?;
    port.access().write_slice(b"hello", GuestAddress(0x8000))?;
    let beyond = port.access().write_slice(b"astray", GuestAddress(1 << 30));
    assert!(beyond.is_err());

    let state = unit.state();
    println!("in force: {:?}", state.targets);
    println!("faults the guest can read: {:?}", state.last_faults);
    assert_eq!((state.targets.len(), state.last_faults.len()), (1, 1));
    Ok(())
}
