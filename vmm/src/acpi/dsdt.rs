//! The DSDT: the PCI root with its slots, motherboard resources, the serial port, the power button
//! and the other events, S5.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Or, Package,
    Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use devices::pci::hotplug;

use super::{OEM, OEM_REVISION, OEM_TABLE, Platform};
use crate::memory::layout::VTD_UNITS;

pub(super) fn table(platform: &Platform<'_>) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    for part in [
        pci_root(platform),
        motherboard(platform),
        serial(platform),
        slots(platform),
        events(platform),
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
            &interrupt_lines(platform),
            &operating_system_capabilities(),
        ],
    ))
}

/// `_PRT` (ACPI 6.5, 6.2.13): INTA of each device that may have a line, each with a GSI of its own.
fn interrupt_lines(platform: &Platform<'_>) -> RawAml {
    /// Any function.
    const FUNCTIONS: u32 = 0xffff;
    const INTA: u8 = 0;
    let lines = platform.interrupt_lines.iter().map(|(device, gsi)| {
        let address = u32::from(*device) << 16 | FUNCTIONS;
        // No link device: the fourth element is the GSI.
        RawAml(bytes(&Package::new(vec![&address, &INTA, &ZERO, gsi])))
    });
    let lines: Vec<RawAml> = lines.collect();
    let package = Package::new(lines.iter().map(|line| line as &dyn Aml).collect());
    RawAml(bytes(&Name::new("_PRT".into(), &package)))
}

/// `_OSC` (PCI Firmware 3.3, 4.5.1): the guest gets everything but native hot-plug and SHPC, which
/// this root does not have: devices come and go by ACPI.
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

/// The hot-plug registers, and a device with `_EJ0` for each slot (ACPI 6.5, 6.3): the guest looks
/// for devices where they say, and writes to them what it lets go. `\_SB.PCI0.HPEV` tells it what
/// came and what is to go; a check of the whole bus finds what went without asking.
fn slots(platform: &Platform<'_>) -> Vec<u8> {
    const DEVICE_CHECK: u8 = 1;
    const EJECT_REQUEST: u8 = 3;
    let hotplug = &platform.hotplug;
    let [inserted, leaving, vanished, eject] = ["HPIN", "HPLV", "HPVN", "HPEJ"].map(Path::new);
    // In the order of the registers, which follow each other.
    let fields = [*b"HPIN", *b"HPLV", *b"HPVN", *b"HPEJ"];
    let fields = fields.map(|name| FieldEntry::Named(name, 32));
    let region = OpRegion::new(
        "HPRG".into(),
        OpRegionSpace::SystemIO,
        &hotplug.port,
        &(hotplug::LENGTH as u16),
    );
    let field = Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        fields.into(),
    );
    let numbers = (1..32u8).filter(|device| hotplug.slots & 1 << device != 0);
    let numbers: Vec<u8> = numbers.collect();
    let slot = |device: u8| Path::new(&format!("S{device:02X}_"));
    let devices = numbers.iter().map(|&device| {
        let bit = 1u32 << device;
        let let_go = Store::new(&eject, &bit);
        RawAml(bytes(&Device::new(
            slot(device),
            vec![
                &Name::new("_ADR".into(), &(u32::from(device) << 16)),
                &Name::new("_SUN".into(), &device),
                &Method::new("_EJ0".into(), 1, true, vec![&let_go]),
            ],
        )))
    });
    // Each register is read once, since reading clears it.
    let told = Local(0);
    let tell = |register: &Path, value: u8| {
        let mut told_each = vec![RawAml(bytes(&Store::new(&told, register)))];
        told_each.extend(numbers.iter().map(|&device| {
            let bit = 1u32 << device;
            let set = And::new(&ZERO, &told, &bit);
            RawAml(bytes(&If::new(
                &set,
                vec![&Notify::new(&slot(device), &value)],
            )))
        }));
        told_each
    };
    let root = Path::new("\\_SB_.PCI0");
    let check_all = Notify::new(&root, &ZERO);
    let mut told_all = tell(&inserted, DEVICE_CHECK);
    told_all.extend(tell(&leaving, EJECT_REQUEST));
    told_all.push(RawAml(bytes(&If::new(&vanished, vec![&check_all]))));
    let event = Method::new(
        "HPEV".into(),
        0,
        true,
        told_all.iter().map(|one| one as &dyn Aml).collect(),
    );
    let devices: Vec<RawAml> = devices.collect();
    let mut children: Vec<&dyn Aml> = vec![&region, &field];
    children.extend(devices.iter().map(|one| one as &dyn Aml));
    children.push(&event);
    bytes(&Scope::new("_SB_.PCI0".into(), children))
}

/// What no other device claims: ECAM, the pages of VT-d units, the power and hot-plug registers.
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
    let slots = platform.hotplug.port;
    let slots = IO::new(slots, slots, 1, hotplug::LENGTH as u8);
    let mut resources: Vec<&dyn Aml> = vec![&ecam, &units, &slots];
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

/// A power button, and the generic event device (ACPI 6.5, 5.6.9) whose first interrupt presses it.
/// The second, level-triggered, is that of the hot-plug registers.
fn events(platform: &Platform<'_>) -> Vec<u8> {
    const PRESSED: u8 = 0x80;
    let pressed = Interrupt::new(true, true, false, false, platform.power_button_gsi);
    let plugged = Interrupt::new(true, false, false, false, platform.hotplug.gsi);
    let button = Path::new("\\_SB_.PWRB");
    let press = Notify::new(&button, &PRESSED);
    let is_button = Equal::new(&Arg(0), &platform.power_button_gsi);
    let plug = MethodCall::new("\\_SB_.PCI0.HPEV".into(), vec![]);
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
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&pressed, &plugged]),
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![&If::new(&is_button, vec![&press]), &Else::new(vec![&plug])],
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
