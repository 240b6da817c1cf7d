//! The DMA Remapping Reporting ACPI table (chapter 8), built from structures of its own names.

use crate::Rid;

/// Who makes the table, for the ACPI header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Oem {
    /// OEMID.
    pub id: [u8; 6],
    /// OEM Table ID.
    pub table_id: [u8; 8],
    /// Creator ID.
    pub creator: [u8; 4],
}

impl Default for Oem {
    fn default() -> Self {
        Self {
            id: *b"NESTLI",
            table_id: *b"NESTLING",
            creator: *b"NSTL",
        }
    }
}

/// The DMAR table (8.1).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Dmar {
    /// Bits of guest-physical address that DMA can reach; the HAW field is this minus 1.
    pub host_address_width: u8,
    /// INTR_REMAP: the platform supports interrupt remapping.
    pub interrupt_remapping: bool,
    /// X2APIC_OPT_OUT: the OS shall not use x2APIC.
    pub x2apic_opt_out: bool,
    /// DMA_CTRL_PLATFORM_OPT_IN_FLAG.
    pub dma_control_opt_in: bool,
    /// Units. The one with `include_pci_all` is written last, as 8.3 wants.
    pub units: Vec<Drhd>,
    /// Reserved memory.
    pub reserved_memory: Vec<Rmrr>,
    /// Root ports with ATS.
    pub ats: Vec<Atsr>,
    /// Integrated devices with an address translation cache.
    pub caches: Vec<Satc>,
}

/// DMA Remapping Hardware Unit Definition (8.3).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Drhd {
    /// INCLUDE_PCI_ALL: every PCI device that no other unit names.
    pub include_pci_all: bool,
    /// Where the registers are, 4 KiB-aligned; one page.
    pub register_base: u64,
    /// What the unit serves, besides.
    pub scopes: Vec<Scope>,
}

/// Reserved Memory Region Reporting (8.4).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rmrr {
    /// First address, 4 KiB-aligned.
    pub base: u64,
    /// Last address, inclusive.
    pub limit: u64,
    /// Which devices use it.
    pub scopes: Vec<Scope>,
}

/// Root Port ATS Capability Reporting (8.5).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Atsr {
    /// ALL_PORTS: every root port.
    pub all_ports: bool,
    /// Which root ports.
    pub scopes: Vec<Scope>,
}

/// SoC Integrated Address Translation Cache (8.8).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Satc {
    /// ATC_REQUIRED: the devices work only with ATS.
    pub atc_required: bool,
    /// Which devices.
    pub scopes: Vec<Scope>,
}

/// Device Scope (8.3.1). Paths have one step: nestling names devices by their bus number, which
/// it keeps fixed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// One PCI function.
    Endpoint(Rid),
    /// A PCI bridge and everything behind it.
    Bridge(Rid),
    /// An I/O APIC: its APIC ID, and the source-id of its interrupts.
    Ioapic {
        /// Enumeration ID.
        id: u8,
        /// Source-id.
        source: Rid,
    },
    /// An HPET block that can send MSIs: its number, and the source-id of its interrupts.
    Hpet {
        /// Enumeration ID.
        id: u8,
        /// Source-id.
        source: Rid,
    },
}

impl Scope {
    /// Size of a scope with one path step, in bytes.
    const SIZE: usize = 8;

    fn bytes(self) -> [u8; Self::SIZE] {
        let (kind, id, at) = match self {
            Self::Endpoint(rid) => (1, 0, rid),
            Self::Bridge(rid) => (2, 0, rid),
            Self::Ioapic { id, source } => (3, id, source),
            Self::Hpet { id, source } => (4, id, source),
        };
        let size = Self::SIZE as u8;
        [kind, size, 0, 0, id, at.bus(), at.device(), at.function()]
    }
}

impl Dmar {
    /// The whole table with its ACPI header and checksum.
    pub fn to_bytes(&self, oem: Oem) -> Vec<u8> {
        let mut table = Vec::with_capacity(256);
        table.extend(b"DMAR");
        table.extend([0; 4]);
        table.extend([1, 0]);
        table.extend(oem.id);
        table.extend(oem.table_id);
        table.extend(1u32.to_le_bytes());
        table.extend(oem.creator);
        table.extend(1u32.to_le_bytes());
        let flags = u8::from(self.interrupt_remapping)
            | u8::from(self.x2apic_opt_out) << 1
            | u8::from(self.dma_control_opt_in) << 2;
        table.extend([self.host_address_width.saturating_sub(1), flags]);
        table.extend([0; 10]);

        let all_last = |all: bool| self.units.iter().filter(move |u| u.include_pci_all == all);
        for unit in all_last(false).chain(all_last(true)) {
            let mut body = vec![u8::from(unit.include_pci_all), 0, 0, 0];
            body.extend(unit.register_base.to_le_bytes());
            structure(&mut table, 0, &body, &unit.scopes);
        }
        for region in &self.reserved_memory {
            let mut body = vec![0; 4];
            body.extend(region.base.to_le_bytes());
            body.extend(region.limit.to_le_bytes());
            structure(&mut table, 1, &body, &region.scopes);
        }
        for ats in &self.ats {
            let body = [u8::from(ats.all_ports), 0, 0, 0];
            structure(&mut table, 2, &body, &ats.scopes);
        }
        for cache in &self.caches {
            let body = [u8::from(cache.atc_required), 0, 0, 0];
            structure(&mut table, 5, &body, &cache.scopes);
        }

        let length = table.len() as u32;
        table[4..8].copy_from_slice(&length.to_le_bytes());
        let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        table[9] = sum.wrapping_neg();
        table
    }
}

/// Appends a remapping structure: type, length, body, scopes.
fn structure(table: &mut Vec<u8>, kind: u16, body: &[u8], scopes: &[Scope]) {
    let length = 4 + body.len() + scopes.len() * Scope::SIZE;
    table.extend(kind.to_le_bytes());
    table.extend((length as u16).to_le_bytes());
    table.extend(body);
    for scope in scopes {
        table.extend(scope.bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Dmar {
        Dmar {
            host_address_width: 48,
            interrupt_remapping: true,
            units: vec![
                Drhd {
                    include_pci_all: true,
                    register_base: 0xfed9_0000,
                    scopes: vec![Scope::Ioapic {
                        id: 0,
                        source: Rid::new(0xff, 0, 0),
                    }],
                },
                Drhd {
                    include_pci_all: false,
                    register_base: 0xfed9_1000,
                    scopes: vec![Scope::Endpoint(Rid::new(0, 3, 0))],
                },
            ],
            reserved_memory: vec![Rmrr {
                base: 0x7c00_0000,
                limit: 0x7fff_ffff,
                scopes: vec![Scope::Endpoint(Rid::new(0, 2, 0))],
            }],
            ats: vec![Atsr {
                all_ports: true,
                scopes: vec![],
            }],
            caches: vec![Satc {
                atc_required: false,
                scopes: vec![Scope::Endpoint(Rid::new(0, 4, 0))],
            }],
            ..Dmar::default()
        }
    }

    #[test]
    fn the_table_sums_to_zero_and_says_its_length() {
        let bytes = example().to_bytes(Oem::default());
        assert_eq!(
            bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
        assert_eq!(
            u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize,
            bytes.len()
        );
        assert_eq!(&bytes[..4], b"DMAR");
        assert_eq!((bytes[36], bytes[37]), (47, 1));
    }

    #[test]
    fn structures_follow_one_another_and_the_unit_with_everything_is_last_of_its_kind() {
        let bytes = example().to_bytes(Oem::default());
        let mut at = 48;
        let mut kinds = vec![];
        while at < bytes.len() {
            let word = |i: usize| u16::from_le_bytes(bytes[at + i..at + i + 2].try_into().unwrap());
            kinds.push((word(0), bytes[at + 4]));
            at += usize::from(word(2));
        }
        assert_eq!(at, bytes.len());
        assert_eq!(kinds, [(0, 0), (0, 1), (1, 0), (2, 1), (5, 0)]);
        // The first DRHD: 16 bytes, then the scope of 00:03.0.
        assert_eq!(
            &bytes[48..72],
            &[
                0, 0, 24, 0, 0, 0, 0, 0, 0x00, 0x10, 0xd9, 0xfe, 0, 0, 0, 0, 1, 8, 0, 0, 0, 0, 3, 0
            ]
        );
    }

    #[test]
    fn an_ioapic_scope_names_its_id_and_source() {
        let scope = Scope::Ioapic {
            id: 7,
            source: Rid::new(0xff, 0x1f, 7),
        };
        assert_eq!(scope.bytes(), [3, 8, 0, 0, 7, 0xff, 0x1f, 7]);
    }
}
