//! The MADT: local APICs, the I/O APIC, and where NMIs come in (ACPI 6.5, 5.2.12).

use acpi_tables::sdt::Sdt;

use super::{OEM, OEM_REVISION, OEM_TABLE, Platform};
use crate::memory::layout::MSI_DOORBELL;

/// IDs from here on need x2APIC structures: 255 is the broadcast ID of a local APIC.
const FIRST_X2APIC_ID: u32 = 255;
const ENABLED: u32 = 1;

pub(super) fn table(platform: &Platform<'_>) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.append_slice(&(MSI_DOORBELL.first as u32).to_le_bytes());
    // Flags: no 8259 (PCAT_COMPAT clear).
    madt.append_slice(&0u32.to_le_bytes());
    for id in 0..platform.vcpus {
        madt.append_slice(&local_apic(id.into()));
    }
    madt.append_slice(&io_apic(platform));
    madt.append_slice(&nmi_at_lint1());
    madt.as_slice().to_vec()
}

/// Processor local APIC (type 0) or, for large IDs, local x2APIC (type 9). The UID is the ID.
fn local_apic(id: u32) -> Vec<u8> {
    if id < FIRST_X2APIC_ID {
        let mut entry = vec![0, 8, id as u8, id as u8];
        entry.extend(ENABLED.to_le_bytes());
        return entry;
    }
    let mut entry = vec![9, 16, 0, 0];
    for field in [id, ENABLED, id] {
        entry.extend(field.to_le_bytes());
    }
    entry
}

/// I/O APIC (type 1), whose pins are the GSIs from 0.
fn io_apic(platform: &Platform<'_>) -> Vec<u8> {
    let mut entry = vec![1, 12, platform.ioapic_id, 0];
    entry.extend((platform.ioapic.first as u32).to_le_bytes());
    entry.extend(0u32.to_le_bytes());
    entry
}

/// Local APIC NMI (type 4): LINT1 of all processors, edge-triggered and active high as usual.
fn nmi_at_lint1() -> [u8; 6] {
    [4, 6, 0xff, 0, 0, 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_from_255_on_is_an_x2apic_entry() {
        assert_eq!(local_apic(254), [0, 8, 254, 254, 1, 0, 0, 0]);
        assert_eq!(
            local_apic(255),
            [9, 16, 0, 0, 255, 0, 0, 0, 1, 0, 0, 0, 255, 0, 0, 0]
        );
    }
}
