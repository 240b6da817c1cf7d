use proptest::prelude::*;

use super::*;

/// Configuration space of an NVMe drive as a host has it: two capabilities hidden from guests
/// (Enhanced Allocation, SR-IOV), MSI, MSI-X, Express with FLR, AER, ATS, PRI.
pub(in super::super) fn nvme() -> [u8; SIZE] {
    let mut raw = [0; SIZE];
    let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x86, 0x80, 0x60, 0x0b, 0x06, 0x04, 0x10, 0x00]);
    put(0x08, &[0x00, 0x02, 0x08, 0x01]);
    put(0x0e, &[0x80]); // multi-function
    put(0x10, &0xf000_0004u32.to_le_bytes()); // 64-bit memory
    put(0x18, &0xe001u32.to_le_bytes()); // port I/O
    put(0x30, &0xfff0_0001u32.to_le_bytes()); // ROM
    put(0x34, &[0x40]);
    put(0x3c, &[0x0b, 0x01]);
    put(0x40, &[0x01, 0x50, 0x03, 0x00]); // power management
    put(0x50, &[0x05, 0x70, 0x8a, 0x01]); // MSI: 64-bit, masking, 32 vectors
    put(0x70, &[0x10, 0xb0, 0x02, 0x00]); // Express, endpoint, version 2
    put(0x74, &(1u32 << 28).to_le_bytes()); // FLR
    put(0x7c, &[0x42, 0x00, 0x00, 0x00]); // link capabilities
    put(0xb0, &[0x11, 0xc0, 0x20, 0x00]); // MSI-X: 33 vectors
    put(0xb4, &0x2000u32.to_le_bytes());
    put(0xb8, &0x3000u32.to_le_bytes());
    put(0xc0, &[0x14, 0x00]); // Enhanced Allocation
    put(0x100, &(0x01u32 | 2 << 16 | 0x150 << 20).to_le_bytes()); // AER
    put(0x150, &(0x10u32 | 1 << 16 | 0x200 << 20).to_le_bytes()); // SR-IOV
    put(0x200, &(0x0fu32 | 1 << 16 | 0x210 << 20).to_le_bytes()); // ATS
    put(0x204, &[0x00, 0x00, 0x00, 0x80]); // enabled by the host
    put(0x210, &(0x13u32 | 1 << 16).to_le_bytes()); // PRI
    put(0x214, &[0x01, 0x00, 0x00, 0x00]); // enabled by the host, not stopped
    put(0x218, &512u32.to_le_bytes());
    raw
}

pub(in super::super) const LENGTHS: [u64; 7] = [0x4000, 0, 0x20, 0, 0, 0, 0x1_0000];

const ALL: Offer = Offer {
    pasid: Some(OfferedPasid {
        bits: 20,
        execute: false,
        privileged: true,
        at: 0x800,
    }),
    ats: true,
    pri: true,
    pin: 1,
};

/// What the guest reads, with the hardware below it.
struct Guest {
    raw: [u8; SIZE],
    view: GuestConfig,
}

impl Guest {
    fn new(offer: Offer) -> Self {
        let raw = nvme();
        Self {
            view: GuestConfig::new(&raw, LENGTHS, offer),
            raw,
        }
    }

    fn read(&self, at: u16) -> u32 {
        let start = usize::from(at);
        let mut data: [u8; 4] = self.raw[start..start + 4].try_into().unwrap();
        self.view.overlay(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn word(&self, at: u16) -> u16 {
        (self.read(at & !3) >> (8 * (at & 2))) as u16
    }

    fn write(&mut self, at: u16, value: u32) -> Written {
        self.view.write(at, &value.to_le_bytes())
    }

    /// IDs of the standard list.
    fn standard(&self) -> Vec<u8> {
        let mut ids = Vec::new();
        let mut at = self.read(0x34) as u8;
        while at != 0 && ids.len() < 100 {
            let header = self.read(at.into());
            ids.push(header as u8);
            at = (header >> 8) as u8;
        }
        ids
    }

    /// (ID, offset) of the extended list, as Linux walks it.
    fn extended(&self) -> Vec<(u16, u16)> {
        let mut found = Vec::new();
        let mut at = 0x100u16;
        while at != 0 && found.len() < 2000 {
            let header = self.read(at);
            if header == 0 {
                break;
            }
            found.push((header as u16, at));
            at = (header >> 20) as u16;
        }
        found
    }
}

#[test]
fn the_guest_sees_only_capabilities_that_it_can_use_at_their_own_places() {
    let guest = Guest::new(ALL);
    assert_eq!(guest.standard(), [0x01, 0x05, 0x10, 0x11]);
    let found = guest.extended();
    assert_eq!(found[..3], [(0x01, 0x100), (0x0f, 0x200), (0x13, 0x210)]);
    assert_eq!(found[3].0, 0x1b);
    assert_eq!(found.len(), 4);
    // SR-IOV's header is not there to be found by chance.
    assert_eq!(guest.read(0x150), 0);
}

#[test]
fn without_a_viommu_nothing_of_it_is_offered() {
    let guest = Guest::new(Offer::default());
    assert_eq!(guest.extended(), [(0x01, 0x100)]);
}

#[test]
fn pasid_is_put_back_with_the_hosts_width_where_nothing_is() {
    let mut guest = Guest::new(ALL);
    let (_, at) = *guest.extended().last().unwrap();
    assert!(
        guest.raw[usize::from(at)..usize::from(at) + 8]
            .iter()
            .all(|&byte| byte == 0)
    );
    assert_eq!(guest.word(at + 4), 20 << 8 | 1 << 2);
    guest.write(at + 4, 0xffff_ffff);
    // Enable and privileged mode, which it has; not execute.
    assert_eq!(guest.word(at + 6), 0b101);
}

#[test]
fn a_function_without_extended_space_gets_an_empty_first_entry_or_the_capability_itself() {
    let raw = [0; SIZE];
    let view = GuestConfig::new(&raw, [0; 7], ALL);
    let guest = Guest { raw, view };
    let found = guest.extended();
    assert_eq!(found[0].1, 0x100);
    assert!(found.iter().any(|&(id, _)| id == 0x1b));
}

#[test]
fn page_requests_start_stopped_although_the_host_runs_them() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.word(0x214), 0, "not enabled");
    assert_eq!(guest.word(0x216), 1 << 8 | 1 << 15);
    assert_eq!(guest.read(0x218), 512);
    guest.write(0x214, 1);
    assert_eq!((guest.word(0x214), guest.word(0x216)), (1, 1 << 15));
    guest.write(0x21c, 32);
    assert_eq!(guest.read(0x21c), 32);
    guest.write(0x214, 0);
    assert_eq!(guest.word(0x216), 1 << 8 | 1 << 15);
}

#[test]
fn ats_says_page_aligned_and_is_the_guests_to_enable() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.word(0x204), 1 << 5);
    assert_eq!(guest.word(0x206), 0);
    guest.write(0x204, 0x8000_0000);
    assert_eq!(guest.word(0x206), 0x8000);
}

#[test]
fn an_endpoint_on_bus_0_is_an_integrated_one_without_a_link() {
    let guest = Guest::new(ALL);
    assert_eq!(guest.word(0x72), 9 << 4 | 2);
    assert_eq!(guest.read(0x7c), 0);
    assert_ne!(guest.read(0x94) & 1 << 21, 0, "End-End TLP prefix");
    assert_eq!(Guest::new(Offer::default()).read(0x94) & 1 << 21, 0);
}

#[test]
fn bars_are_sized_here_and_not_by_the_hardware() {
    let mut guest = Guest::new(ALL);
    let written = guest.write(0x10, u32::MAX);
    assert!(written.decode && !written.hardware);
    assert_eq!(guest.read(0x10), 0xffff_c004);
    guest.write(0x18, u32::MAX);
    assert_eq!(guest.read(0x18), 0xffe1);
    guest.write(0x1c, u32::MAX);
    assert_eq!(guest.read(0x1c), 0, "not implemented");
}

#[test]
fn decoding_is_the_guests_and_the_hardware_follows() {
    let mut guest = Guest::new(ALL);
    assert!(
        guest.view.decoded().is_empty(),
        "whatever the host had enabled"
    );
    assert_eq!(guest.read(0x04) & 3, 0);
    guest.view.assign(0, 0x80_0000_0000);
    let written = guest.view.write(0x04, &6u16.to_le_bytes());
    assert!(written.decode && written.hardware);
    let decoded = guest.view.decoded();
    assert_eq!(
        (decoded[0].base, decoded[0].length),
        (0x80_0000_0000, 0x4000)
    );
    assert_eq!(decoded.len(), 1);
    guest.view.reset();
    assert!(guest.view.decoded().is_empty());
    assert_eq!(guest.view.bars()[0].1, 0);
}

#[test]
fn a_function_has_the_pin_that_it_is_offered_and_is_alone_in_its_slot() {
    let guest = Guest::new(ALL);
    assert_eq!(guest.read(0x3c) & 0xffff, 0x0100);
    assert_eq!(guest.read(0x0c) >> 16 & 0xff, 0);
    let without = Guest::new(Offer { pin: 0, ..ALL });
    assert_eq!(without.read(0x3c) & 0xffff, 0);
    let mut raw = nvme();
    raw[0x06] = 0; // no capabilities
    let view = GuestConfig::new(&raw, LENGTHS, ALL);
    assert_eq!(view.bytes[0x3d], 1);
    assert!(view.msi_place().is_none() && view.msix_place().is_none());
}

#[test]
fn interrupt_capabilities_are_kept_from_the_hardware() {
    let mut guest = Guest::new(ALL);
    let msi = guest.view.msi_place().unwrap();
    assert_eq!(
        (msi.at, msi.count, msi.wide, msi.maskable),
        (0x50, 32, true, true)
    );
    for at in (0x50..0x68).step_by(4) {
        let written = guest.write(at, u32::MAX);
        assert!(written.msi && !written.hardware, "{at:#x}");
    }
    assert_eq!(guest.word(0x52), 0x18a | 0x71);
    let msix = guest.view.msix_place().unwrap();
    assert_eq!((msix.at, msix.count), (0xb0, 33));
    assert_eq!((msix.table, msix.pending), ((0, 0x2000), (0, 0x3000)));
    assert_eq!(msix.trapped(0), [(0x2000, 33 * 16), (0x3000, 8)]);
    assert_eq!(msix.trapped(2), []);
    let written = guest.write(0xb0, u32::MAX);
    assert!(written.msix);
    assert_eq!(guest.word(0xb2), 0xc020);
}

#[test]
fn a_table_outside_of_its_register_is_no_table() {
    let mut raw = nvme();
    raw[0xb4..0xb8].copy_from_slice(&0x4000u32.to_le_bytes());
    assert!(GuestConfig::new(&raw, LENGTHS, ALL).msix_place().is_none());
    raw[0xb4..0xb8].copy_from_slice(&0x1u32.to_le_bytes());
    assert!(GuestConfig::new(&raw, LENGTHS, ALL).msix_place().is_none());
}

#[test]
fn a_function_level_reset_is_noticed_however_it_is_written() {
    let mut guest = Guest::new(ALL);
    assert!(guest.view.write(0x78, &0x8000u16.to_le_bytes()).reset);
    assert!(guest.view.write(0x79, &[0x80]).reset);
    assert!(guest.write(0x78, 0x8000).reset);
    assert!(!guest.write(0x78, 0x7fff).reset);
    assert!(!guest.view.write(0x7a, &[0x80, 0x80]).reset);
}

#[test]
fn page_requests_need_ats_as_well() {
    let mut raw = nvme();
    assert!(has_page_requests(&raw));
    raw[0x200] = 0x03;
    assert!(!has_page_requests(&raw));
    assert!(!has_page_requests(&[0; SIZE]) && !has_page_requests(&[0xff; SIZE]));
}

#[test]
fn vendor_registers_are_the_hardwares() {
    let mut guest = Guest::new(ALL);
    guest.raw[0xe0..0xe4].copy_from_slice(&0xabcd_1234u32.to_le_bytes());
    assert_eq!(guest.read(0xe0), 0xabcd_1234);
    assert!(!guest.view.is_kept(0xe0, 4) && guest.view.is_kept(0x50, 4));
    assert!(guest.write(0xe0, 0).hardware);
}

proptest! {
    #[test]
    fn whatever_a_device_and_a_guest_do_nothing_panics_and_lists_end(
        noise in prop::collection::vec((0usize..SIZE, any::<u8>()), 0..200),
        writes in prop::collection::vec((0u16..1024, any::<u32>()), 0..60),
    ) {
        let mut raw = nvme();
        for (at, byte) in noise {
            raw[at] = byte;
        }
        let mut guest = Guest { view: GuestConfig::new(&raw, LENGTHS, ALL), raw };
        for (at, value) in writes {
            guest.write(at * 4, value);
        }
        prop_assert!(guest.standard().len() <= 48);
        prop_assert!(guest.extended().len() <= 961);
        for decoded in guest.view.decoded() {
            prop_assert!(decoded.length.is_power_of_two());
        }
    }
}

#[test]
fn the_rom_is_sized_placed_and_answered_only_while_it_and_memory_are_enabled() {
    let mut guest = Guest::new(ALL);
    assert_eq!(guest.read(0x30), 0, "the host's address is not the guest's");
    // Linux sizes it with the enable bit left out.
    guest.write(0x30, 0xffff_f800);
    assert_eq!(guest.read(0x30), 0xffff_0000, "64 KiB");
    guest.write(0x30, u32::MAX);
    assert_eq!(guest.read(0x30), 0xffff_0001);
    assert!(guest.write(0x30, 0xd123_0000).decode);
    guest.write(0x04, 2);
    let rom = |guest: &Guest| {
        guest
            .view
            .decoded()
            .into_iter()
            .find(|at| at.bar == ROM_BAR)
    };
    assert_eq!(rom(&guest), None, "not enabled");
    guest.write(0x30, 0xd123_0001);
    let at = Decoded {
        space: Space::Mmio,
        base: 0xd123_0000,
        length: 0x1_0000,
        bar: ROM_BAR,
    };
    assert_eq!(rom(&guest), Some(at));
    guest.write(0x04, 0);
    assert_eq!(rom(&guest), None, "memory is off");
    guest.write(0x04, 2);
    guest.view.reset();
    assert_eq!(guest.read(0x30), 0);
}

#[test]
fn without_a_rom_or_with_an_impossible_one_its_register_is_empty() {
    for length in [0, 1 << 10, 3 << 12, 1 << 25] {
        let mut lengths = LENGTHS;
        lengths[6] = length;
        let raw = nvme();
        let mut guest = Guest {
            view: GuestConfig::new(&raw, lengths, ALL),
            raw,
        };
        guest.write(0x04, 2);
        guest.write(0x30, u32::MAX);
        assert_eq!(guest.read(0x30), 0, "{length:#x}");
        assert!(guest.view.decoded().iter().all(|at| at.bar != ROM_BAR));
    }
}
