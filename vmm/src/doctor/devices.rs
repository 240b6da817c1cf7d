//! The host's PCI functions, as sysfs shows them: `/sys/bus/pci/devices/ADDRESS/`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::{Finding, Roots, hex, link, names, node, text};

/// One PCI function that is not a bridge.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct PciDevice {
    /// `0000:01:00.0`
    pub address: String,
    /// Vendor and device ID: `8086:0b60`.
    pub id: String,
    /// Class code, 24 bits.
    pub class: u32,
    /// The driver that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Its IOMMU, by [`Iommu::name`](super::Iommu::name).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu: Option<String>,
    /// Its IOMMU group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    /// What else is in the group, and can only be passed on together with it.
    pub members: Vec<Member>,
    /// Addresses that its DMA cannot use.
    pub reserved: Vec<Reserved>,
    /// A virtual function of another.
    pub virtual_function: bool,
    /// Has the ATS capability; unknown without root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ats: Option<bool>,
    /// Has the PRI capability; unknown without root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pri: Option<bool>,
    /// Width in its PASID capability; 0 without one, unknown without root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pasid_bits: Option<u8>,
    /// Its VFIO character device, if the host's kernel has made one.
    #[serde(skip)]
    pub(super) cdev: Option<Finding>,
    /// What it can be used for, by the option that asks for it.
    pub modes: BTreeMap<&'static str, Finding>,
}

/// Another function of a group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Member {
    /// Its address.
    pub address: String,
    /// Its driver.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The group cannot be given away while this driver has it.
    pub in_the_way: bool,
}

/// A reserved region of a group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Reserved {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
    /// The kernel's word: `msi`, `direct`, `direct-relaxable`, `reserved`.
    pub kind: String,
}

/// Whether a driver leaves the group to user space. Drivers of bridges do no DMA of their own.
pub(super) fn is_harmless(driver: Option<&str>) -> bool {
    matches!(
        driver,
        None | Some("vfio-pci" | "pcieport" | "pci-stub" | "shpchp")
    ) || driver.is_some_and(is_vfio)
}

/// VFIO's drivers: the plain one, and those for particular devices.
pub(super) fn is_vfio(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("-vfio-pci") || driver.ends_with("_vfio_pci")
}

/// All functions but bridges.
pub(super) fn all(roots: &Roots) -> Vec<PciDevice> {
    let bus = roots.sys.join("bus/pci/devices");
    names(&bus)
        .into_iter()
        .filter_map(|address| one(roots, &bus.join(&address), address))
        .filter(|device| device.class >> 16 != 0x06)
        .collect()
}

fn one(roots: &Roots, at: &Path, address: String) -> Option<PciDevice> {
    let class = hex(&at.join("class"))? as u32;
    let vendor = hex(&at.join("vendor"))?;
    let device = hex(&at.join("device"))?;
    let group = link(&at.join("iommu_group")).and_then(|number| number.parse().ok());
    let group_at = |group: u32| roots.sys.join(format!("kernel/iommu_groups/{group}"));
    let members = group.map_or_else(Vec::new, |group| {
        names(&group_at(group).join("devices"))
            .into_iter()
            .filter(|other| *other != address)
            .map(|other| {
                let driver = link(&roots.sys.join(format!("bus/pci/devices/{other}/driver")));
                Member {
                    in_the_way: !is_harmless(driver.as_deref()),
                    address: other,
                    driver,
                }
            })
            .collect()
    });
    let reserved = group.map_or_else(Vec::new, |group| {
        regions(&text(&group_at(group).join("reserved_regions")).unwrap_or_default())
    });
    let config = config(&at.join("config"));
    let extended = config.as_deref().map(Extended::of);
    let cdev = names(&at.join("vfio-dev")).into_iter().next().map(|name| {
        node(
            &roots.dev.join("vfio/devices").join(name),
            "udev has not made it",
            "start udev, or mount devtmpfs at /dev",
        )
    });
    Some(PciDevice {
        id: format!("{vendor:04x}:{device:04x}"),
        class,
        driver: link(&at.join("driver")),
        iommu: link(&at.join("iommu")),
        group,
        members,
        reserved,
        virtual_function: at.join("physfn").exists(),
        ats: extended.as_ref().map(|caps| caps.ats),
        pri: extended.as_ref().map(|caps| caps.pri),
        pasid_bits: extended.as_ref().map(|caps| caps.pasid_bits),
        cdev,
        modes: BTreeMap::new(),
        address,
    })
}

/// Lines of `first last kind`.
fn regions(text: &str) -> Vec<Reserved> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some(Reserved {
                first: number(words.next()?)?,
                last: number(words.next()?)?,
                kind: words.next()?.to_owned(),
            })
        })
        .collect()
}

/// All 4096 bytes of configuration space. Without root there are 64, and of a conventional
/// function 256: those have no extended capabilities.
fn config(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(4096).read_to_end(&mut bytes).ok()?;
    (bytes.len() >= 256).then_some(bytes)
}

/// Which extended capabilities there are.
#[derive(Default)]
struct Extended {
    ats: bool,
    pri: bool,
    pasid_bits: u8,
}

impl Extended {
    fn of(config: &[u8]) -> Self {
        let mut found = Self::default();
        let dword = |at: usize| {
            let bytes = config.get(at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes))
        };
        let mut at = 0x100;
        // As many as fit: a list can be circular.
        for _ in 0..960 {
            let Some(header) = dword(at).filter(|&header| header != 0 && header != !0) else {
                break;
            };
            match header & 0xffff {
                0x0f => found.ats = true,
                0x13 => found.pri = true,
                0x1b => found.pasid_bits = (dword(at + 4).unwrap_or(0) >> 8 & 0x1f) as u8,
                _ => {}
            }
            at = (header >> 20) as usize & 0xffc;
            if at < 0x100 {
                break;
            }
        }
        found
    }
}
