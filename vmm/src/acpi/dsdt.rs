//! The DSDT: the PCI root, motherboard resources, the serial port, the power button, S5.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Or, Package, Path,
    ResourceTemplate, Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE, Platform};
use crate::memory::layout::VTD_UNITS;

pub(super) fn table(platform: &Platform<'_>) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    for part in [
        pci_root(platform),
        motherboard(platform),
        serial(platform),
        power_button(platform),
        // S5, soft off: SLP_TYP 5 (ACPI 6.5, 7.4.2.7).
        bytes(&Name::new(
            "_S5_".into(),
            &Package::new(vec![&5u8, &ZERO, &ZERO, &ZERO]),
        )),
    ] {
        dsdt.append_slice(&part);
    }
    dsdt.as_slice().to_vec()
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// `\_SB.PCI0`, a PCI Express root on bus 0 that produces the apertures.
fn pci_root(platform: &Platform<'_>) -> Vec<u8> {
    let layout = platform.layout;
    let buses = AddressSpace::new_bus_number(0u16, 0xff);
    // CONFIG_ADDRESS and CONFIG_DATA are consumed by the root itself.
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports = AddressSpace::new_io(platform.pio.0, platform.pio.1, None);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout.mmio32.first as u32,
        layout.mmio32.last as u32,
        None,
    );
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout.mmio64.first,
        layout.mmio64.last,
        None,
    );
    let resources = ResourceTemplate::new(vec![&buses, &config, &ports, &low, &high]);
    bytes(&Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            // Memory is coherent with device DMA.
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &resources),
            &operating_system_capabilities(),
        ],
    ))
}

/// `_OSC` (PCI Firmware 3.3, 4.5.1): the guest gets everything but hot-plug and SHPC, which this
/// root does not have.
fn operating_system_capabilities() -> RawAml {
    const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
    /// PME, AER, PCI Express capability structure.
    const GRANTED: u32 = 1 << 2 | 1 << 3 | 1 << 4;
    /// Capabilities were masked; unknown UUID.
    const MASKED: u32 = 1 << 4;
    const UNRECOGNIZED_UUID: u32 = 1 << 2;
    let (first, third) = (Path::new("CDW1"), Path::new("CDW3"));
    let uuid = Uuid::new(PCI_HOST_BRIDGE);
    let masked = And::new(&ZERO, &third, &GRANTED);
    let other = acpi_tables::aml::NotEqual::new(&third, &masked);
    let tell = Or::new(&first, &first, &MASKED);
    let grant = And::new(&third, &third, &GRANTED);
    let create = CreateDWordField::new(&third, &Arg(3), &8u8);
    let told = If::new(&other, vec![&tell]);
    let known = Equal::new(&Arg(0), &uuid);
    let ours = If::new(&known, vec![&create, &told, &grant]);
    let unknown = Or::new(&first, &first, &UNRECOGNIZED_UUID);
    let theirs = Else::new(vec![&unknown]);
    RawAml(bytes(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&first, &Arg(3), &ZERO),
            &ours,
            &theirs,
            &Return::new(&Arg(3)),
        ],
    )))
}

/// What no other device claims: ECAM, the pages of VT-d units, the power registers.
fn motherboard(platform: &Platform<'_>) -> Vec<u8> {
    let ecam = platform.layout.ecam;
    let ecam = Memory32Fixed::new(true, ecam.first as u32, ecam.len() as u32);
    let units = Memory32Fixed::new(true, VTD_UNITS.first as u32, VTD_UNITS.len() as u32);
    let ports = [
        platform.sleep_control,
        platform.sleep_status,
        platform.reset.0,
    ]
    .map(|port| IO::new(port, port, 1, 1));
    let mut resources: Vec<&dyn Aml> = vec![&ecam, &units];
    resources.extend(ports.iter().map(|port| port as &dyn Aml));
    bytes(&Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    ))
}

/// A 16550 with an edge-triggered, active-high, exclusive interrupt.
fn serial(platform: &Platform<'_>) -> Vec<u8> {
    let (port, gsi) = platform.serial;
    let resources = [
        bytes(&IO::new(port, port, 1, 8)),
        bytes(&Interrupt::new(true, true, false, false, gsi)),
    ]
    .map(RawAml);
    bytes(&Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(resources.iter().map(|r| r as &dyn Aml).collect()),
            ),
        ],
    ))
}

/// A power button, and the generic event device whose interrupt presses it (ACPI 6.5, 5.6.9).
fn power_button(platform: &Platform<'_>) -> Vec<u8> {
    const PRESSED: u8 = 0x80;
    let line = Interrupt::new(true, true, false, false, platform.power_button_gsi);
    let button = Path::new("\\_SB_.PWRB");
    bytes(&Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "PWRB".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
                    &Name::new("_UID".into(), &ZERO),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line])),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![&Notify::new(&button, &PRESSED)],
                    ),
                ],
            ),
        ],
    ))
}

/// AML that is bytes already.
struct RawAml(Vec<u8>);

impl Aml for RawAml {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}
