//! The ACPI tables: what the guest learns of the platform without probing.
//!
//! Hardware-reduced ACPI 6: no fixed hardware, sleep and reset by registers, a control-method
//! power button. [`tables`] is pure: it turns a [`Platform`] into bytes and the address of the
//! RSDP. Tables of vIOMMUs (DMAR, VIOT) plug in as [`Platform::extra`].

#![forbid(unsafe_code)]

mod dsdt;
mod madt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::memory::layout::{Layout, Range};

const OEM: [u8; 6] = *b"NESTLG";
const OEM_TABLE: [u8; 8] = *b"NESTLING";
const OEM_REVISION: u32 = 1;

/// What the tables tell.
#[derive(Clone, Debug)]
pub struct Platform<'a> {
    /// Where memory, ECAM and the apertures are.
    pub layout: &'a Layout,
    /// The port I/O window of the PCI root, both ends inclusive.
    pub pio: (u16, u16),
    /// How many vCPUs there are; APIC IDs count from 0.
    pub vcpus: u8,
    /// The I/O APIC's ID.
    pub ioapic_id: u8,
    /// Where its registers are.
    pub ioapic: Range,
    /// The port of the sleep control register.
    pub sleep_control: u16,
    /// The port of the sleep status register.
    pub sleep_status: u16,
    /// The port of the reset register, and what resets when it is written there.
    pub reset: (u16, u8),
    /// The GSI of the power button's edge-triggered line.
    pub power_button_gsi: u32,
    /// The hot-plug registers.
    pub hotplug: Hotplug,
    /// PCI device numbers of bus 0 and the GSIs of their interrupt lines.
    pub interrupt_lines: &'a [(u8, u32)],
    /// The serial port's first port and GSI.
    pub serial: (u16, u32),
    /// Complete tables to add to the XSDT.
    pub extra: &'a [Vec<u8>],
}

/// How devices come and go on bus 0.
#[derive(Clone, Copy, Debug)]
pub struct Hotplug {
    /// The first port of the registers of [`devices::pci::hotplug`].
    pub port: u16,
    /// The GSI of their level-triggered line.
    pub gsi: u32,
    /// The device numbers where one may come or go, one bit each.
    pub slots: u32,
}

/// The tables as they go into guest memory.
#[derive(Clone, Debug)]
pub struct Tables {
    /// Where `bytes` goes; the RSDP is its beginning.
    pub at: u64,
    /// All tables.
    pub bytes: Vec<u8>,
}

/// The tables do not fit.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the ACPI tables need {needs} bytes and there are {has}; configure fewer devices or vIOMMUs"
)]
pub struct TooLarge {
    needs: usize,
    has: u64,
}

/// Lays out the tables of `platform` in `area`.
///
/// # Errors
/// They do not fit.
pub fn tables(platform: &Platform<'_>, area: Range) -> Result<Tables, TooLarge> {
    // The RSDP comes first, so that a guest that searches finds it; it is written last.
    let mut place = Place {
        at: area.first,
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = place.add(&dsdt::table(platform));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(place.add(&aml(&fadt(platform, dsdt))));
    xsdt.add_entry(place.add(&madt::table(platform)));
    xsdt.add_entry(place.add(&aml(&mcfg(platform))));
    for table in platform.extra {
        xsdt.add_entry(place.add(table));
    }
    let xsdt = place.add(&aml(&xsdt));
    let mut bytes = place.bytes;
    let rsdp = aml(&Rsdp::new(OEM, xsdt));
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    if bytes.len() as u64 > area.len() {
        return Err(TooLarge {
            needs: bytes.len(),
            has: area.len(),
        });
    }
    Ok(Tables {
        at: area.first,
        bytes,
    })
}

struct Place {
    at: u64,
    bytes: Vec<u8>,
}

impl Place {
    /// Appends a table at a multiple of 16 bytes and returns its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let at = self.at + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        at
    }
}

fn aml(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address.into(),
    )
}

fn fadt(platform: &Platform<'_>, dsdt: u64) -> acpi_tables::fadt::FADT {
    // IA-PC boot architecture flags (ACPI 6.5, table 5.11): no VGA, no CMOS clock. The bits for
    // legacy devices and the 8042 stay clear: there are none to probe.
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;
    let (reset_port, reset_value) = platform.reset;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // "Implemented as a control method device, or not at all".
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port(reset_port);
    fadt.reset_value = reset_value;
    fadt.sleep_control_reg = port(platform.sleep_control);
    fadt.sleep_status_reg = port(platform.sleep_status);
    fadt.finalize()
}

fn mcfg(platform: &Platform<'_>) -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    let ecam = platform.layout.ecam;
    let last_bus = (ecam.len() >> 20).saturating_sub(1).min(255);
    mcfg.add_ecam(ecam.first, 0, 0, last_bus as u8);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::ACPI_AREA;
    use crate::memory::layout::{IOAPIC, compose};

    fn made(vcpus: u8, extra: &[Vec<u8>]) -> Result<Tables, TooLarge> {
        let layout = compose(2 << 30, 40, &[]).unwrap();
        tables(
            &Platform {
                layout: &layout,
                pio: (0x1000, 0xffff),
                vcpus,
                ioapic_id: 0,
                ioapic: IOAPIC,
                sleep_control: 0x600,
                sleep_status: 0x601,
                reset: (0x602, 1),
                power_button_gsi: 5,
                hotplug: Hotplug {
                    port: 0x610,
                    gsi: 6,
                    slots: 0x7fff_fffe,
                },
                interrupt_lines: &[(16, 16), (17, 17)],
                serial: (0x3f8, 4),
                extra,
            },
            ACPI_AREA,
        )
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The tables that the XSDT points to, and the DSDT that the FADT points to.
    fn all(tables: &Tables) -> Vec<(String, Vec<u8>)> {
        let table = |at: u64| {
            let bytes = &tables.bytes[(at - tables.at) as usize..];
            let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
            let name = String::from_utf8(bytes[..4].to_vec()).unwrap();
            (name, bytes[..length as usize].to_vec())
        };
        assert_eq!(&tables.bytes[..8], b"RSD PTR ");
        assert_eq!(sum(&tables.bytes[..20]), 0);
        assert_eq!(sum(&tables.bytes[..36]), 0);
        let xsdt = table(word(&tables.bytes, 24));
        let mut found: Vec<_> = (36..xsdt.1.len())
            .step_by(8)
            .map(|at| table(word(&xsdt.1, at)))
            .collect();
        let dsdt = word(&found[0].1, 140);
        found.push(table(dsdt));
        found.push(xsdt);
        found
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_sums_to_zero() {
        let dmar = acpi_tables::sdt::Sdt::new(*b"DMAR", 48, 1, OEM, OEM_TABLE, 1);
        let tables = made(64, &[dmar.as_slice().to_vec()]).unwrap();
        let names: Vec<String> = all(&tables)
            .into_iter()
            .map(|(name, bytes)| {
                assert_eq!(sum(&bytes), 0, "{name}");
                name
            })
            .collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG", "DMAR", "DSDT", "XSDT"]);
    }

    #[test]
    fn the_madt_has_one_entry_per_vcpu_the_io_apic_and_the_nmi_pin() {
        for vcpus in [1u8, 8, 64] {
            let tables = all(&made(vcpus, &[]).unwrap());
            let madt = &tables[1].1;
            let (mut at, mut kinds) = (44, Vec::new());
            while at < madt.len() {
                kinds.push(madt[at]);
                at += usize::from(madt[at + 1]);
            }
            assert_eq!(at, madt.len());
            assert_eq!(
                kinds.iter().filter(|k| **k == 0).count(),
                usize::from(vcpus)
            );
            assert_eq!(kinds.iter().filter(|k| **k == 1).count(), 1);
            assert_eq!(kinds.iter().filter(|k| **k == 4).count(), 1);
        }
    }

    #[test]
    fn tables_that_do_not_fit_are_refused_with_both_sizes() {
        let error = made(1, &[vec![0; 0x2_0000]]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains(&format!("and there are {}", ACPI_AREA.len())),
            "{error}"
        );
    }

    #[test]
    fn the_dsdt_has_a_device_that_can_be_ejected_for_each_slot_and_no_other() {
        let tables = all(&made(1, &[]).unwrap());
        let dsdt = &tables.iter().find(|(name, _)| name == "DSDT").unwrap().1;
        let at = |needle: &[u8]| dsdt.windows(needle.len()).position(|w| w == needle);
        // The sizes of the tables of 30 slots do not surprise whoever has 16 units besides.
        assert!(dsdt.len() < 8192, "{} bytes", dsdt.len());
        for device in 0..32u8 {
            let name = format!("S{device:02X}_");
            let found = at(name.as_bytes());
            assert_eq!(found.is_some(), (1..31).contains(&device), "{name}");
            let Some(found) = found else { continue };
            let slot = &dsdt[found..found + 40];
            // Name(_ADR, device << 16): a double word for device 1 and above.
            let mut address = b"\x08_ADR\x0c".to_vec();
            address.extend((u32::from(device) << 16).to_le_bytes());
            assert!(slot.windows(address.len()).any(|w| w == address), "{name}");
            assert!(slot.windows(4).any(|w| w == b"_EJ0"), "{name}");
        }
        for object in [b"HPRG", b"HPEV", b"HPIN", b"HPLV", b"HPVN", b"HPEJ"] {
            assert!(at(object).is_some());
        }
    }
}
