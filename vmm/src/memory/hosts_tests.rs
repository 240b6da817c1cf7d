//! Address maps around what real hosts reserve. The hosts are written down as their kernels show
//! them; the maps as text, so that a person can check them.

use viommu::reserved::{Kind, Regions};

use super::layout::{ARCHITECTURAL, HostReserved, Layout, Range, compose};
use crate::boot;

const GIB: u64 = 1 << 30;

/// A host, by `reserved_regions` of its groups and the width of its IOMMU in bits (0: no limit).
struct Host {
    groups: &'static [&'static str],
    width: u8,
}

impl Host {
    fn reserved(&self) -> Vec<HostReserved> {
        let groups = self.groups.iter().enumerate();
        groups
            .map(|(n, text)| {
                let mut regions = Regions::of_host(text);
                if self.width != 0 {
                    regions.insert(1 << self.width, u64::MAX, Kind::Reserved);
                }
                let what = format!("IOMMU group {n}");
                HostReserved { what, regions }
            })
            .collect()
    }

    /// The map of a guest on it, checked against everything that tells a guest of memory.
    fn layout(&self, gib: u64, cpu_width: u8) -> String {
        let reserved = self.reserved();
        let layout = compose(gib * GIB, cpu_width, &reserved).unwrap();
        agree(&layout, &reserved);
        layout.to_string()
    }
}

/// E820, the windows of the PCI root and RAM keep out of what is reserved, all in the same way.
fn agree(layout: &Layout, reserved: &[HostReserved]) {
    let holes: Vec<Range> = reserved
        .iter()
        .flat_map(|host| host.regions.iter().map(|r| Range::new(r.first, r.last)))
        .chain(ARCHITECTURAL.iter().map(|(range, _)| *range))
        .collect();
    let map = boot::memory_map(layout);
    let usable = map.iter().filter(|(_, kind)| *kind == boot::Kind::Ram);
    let windows = [layout.ecam, layout.mmio32, layout.mmio64];
    for part in usable.clone().map(|(range, _)| *range).chain(windows) {
        for hole in &holes {
            assert!(!part.overlaps(*hole), "{part} of the guest is in {hole}");
        }
    }
    for (range, _) in usable {
        let inside = layout.ram.iter().any(|ram| ram.contains(*range));
        assert!(inside, "E820 has RAM at {range}, where none is");
    }
    for host in reserved {
        layout.admits(host).unwrap();
    }
}

/// A laptop of Intel's with graphics: 39 bits, RMRRs of the graphics (relaxable) and of the USB
/// controller, the management engine's direct one.
const INTEL_CLIENT: Host = Host {
    groups: &[
        "0x000000007b800000 0x000000007fffffff direct-relaxable\n\
         0x00000000fee00000 0x00000000feefffff msi\n",
        "0x0000000000000000 0x0000000000ffffff direct-relaxable\n\
         0x00000000fee00000 0x00000000feefffff msi\n",
        "0x000000006b4f2000 0x000000006b511fff direct\n\
         0x00000000fee00000 0x00000000feefffff msi\n",
    ],
    width: 39,
};

#[test]
fn a_client_of_intels_with_graphics_and_39_bits() {
    assert_eq!(
        INTEL_CLIENT.layout(8, 39),
        "0x000000000000-0x00006b3fffff RAM\n\
         0x00006b600000-0x0000bfffffff RAM\n\
         0x0000c0000000-0x0000cfffffff ECAM\n\
         0x0000d0000000-0x0000febfffff 32-bit BARs\n\
         0x000100000000-0x0002401fffff RAM\n\
         0x000280000000-0x007fffffffff 64-bit BARs\n"
    );
}

#[test]
fn cpus_that_are_wider_than_their_iommu_do_not_lead_a_guest_beyond_it() {
    assert_eq!(INTEL_CLIENT.layout(8, 46), INTEL_CLIENT.layout(8, 39));
    let reserved = INTEL_CLIENT.reserved();
    let error = compose(600 * GIB, 46, &reserved).unwrap_err();
    assert!(error.to_string().contains("memory size=600G"), "{error}");
}

/// A server of Intel's: 57 bits, the BMC's graphics with a direct region low in memory.
#[test]
fn a_server_of_intels_with_a_management_controller() {
    let server = Host {
        groups: &[
            "0x00000000fee00000 0x00000000feefffff msi\n",
            "0x0000000073a44000 0x0000000073a54fff direct\n\
             0x00000000fee00000 0x00000000feefffff msi\n",
        ],
        width: 57,
    };
    assert_eq!(
        server.layout(64, 46),
        "0x000000000000-0x0000739fffff RAM\n\
         0x000073c00000-0x0000bfffffff RAM\n\
         0x0000c0000000-0x0000cfffffff ECAM\n\
         0x0000d0000000-0x0000febfffff 32-bit BARs\n\
         0x000100000000-0x0010401fffff RAM\n\
         0x010000000000-0x3fffffffffff 64-bit BARs\n"
    );
}

/// A server of AMD's: the HyperTransport hole below 1 TiB, as the kernel lists it for every group.
/// More RAM than fits below it goes on above.
#[test]
fn a_server_of_amds_with_the_hypertransport_hole() {
    let server = Host {
        groups: &["0x00000000fee00000 0x00000000feefffff msi\n\
                   0x000000fd00000000 0x000000ffffffffff reserved\n"],
        width: 0,
    };
    assert_eq!(
        server.layout(1100, 48),
        "0x000000000000-0x0000bfffffff RAM\n\
         0x0000c0000000-0x0000cfffffff ECAM\n\
         0x0000d0000000-0x0000febfffff 32-bit BARs\n\
         0x000100000000-0x00fcffffffff RAM\n\
         0x010000000000-0x01163fffffff RAM\n\
         0x011640000000-0xffffffffffff 64-bit BARs\n"
    );
}

/// A server of Arm's: the kernel's software-managed doorbell window at 128 MiB, which stage 2 has
/// to keep free, and the windows of the PCI root complexes, which a device reaches itself.
#[test]
fn an_arm_server_with_a_software_doorbell_and_pci_windows() {
    let server = Host {
        groups: &[
            "0x0000000008000000 0x00000000080fffff msi\n\
             0x0000000040000000 0x000000005fffffff reserved\n\
             0x0000280000000000 0x00002fffffffffff reserved\n",
            "0x0000000008000000 0x00000000080fffff msi\n\
             0x0000000060000000 0x000000007fffffff reserved\n",
        ],
        width: 48,
    };
    assert_eq!(
        server.layout(4, 48),
        "0x000000000000-0x000007ffffff RAM\n\
         0x000008200000-0x00003fffffff RAM\n\
         0x000080000000-0x0000bfffffff RAM\n\
         0x0000c0000000-0x0000cfffffff ECAM\n\
         0x0000d0000000-0x0000febfffff 32-bit BARs\n\
         0x000100000000-0x0001801fffff RAM\n\
         0x300000000000-0xffffffffffff 64-bit BARs\n"
    );
}
