//! Devices that nestling refuses before a guest starts: each in one sentence with the remedy, and
//! nothing is left behind.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::{NVME, SLOW, open_in};
use crate::harness::bound::Bound;
use crate::harness::{Guest, Lab, Machine};

/// A guest with these options is refused before it starts, in one sentence that has these words.
fn refused(lab: &Lab, options: &[(&str, &str)], words: &[&str]) -> Result<()> {
    let mut guest = Guest::lab_kernel();
    for (name, value) in options {
        guest = guest.option(name, value);
    }
    let ended = guest.start(lab)?.wait(SLOW)?;
    let said = ended.said.trim();
    ensure!(
        ended.status != 0 && said.lines().count() == 1,
        "{options:?} was not refused in one line: {said}"
    );
    for word in words {
        ensure!(said.contains(word), "{options:?}: no {word:?} in: {said}");
    }
    Ok(())
}

/// Each is refused in one sentence with the remedy, and nothing is left behind.
pub(super) fn refusals(lab: &Lab) -> Result<()> {
    let says = |options: &[(&str, &str)], words: &[&str]| refused(lab, options, words);
    let sysfs = format!("path=/sys/bus/pci/devices/{NVME}");
    says(&[("--device", "path=/nowhere")], &["/nowhere", "lspci"])?;
    says(&[("--device", &sysfs)], &[NVME, "vfio-pci", "doctor"])?;
    let drive = Bound::new(NVME)?;
    let iommufd = Hidden::new("/dev/iommu")?;
    for unit in ["type=virtio", "type=vtd"] {
        says(
            &[("--device", &drive.option(",iommu=on")), ("--viommu", unit)],
            &[NVME, "no vIOMMU", "CONFIG_IOMMUFD", "leave iommu=on out"],
        )?;
    }
    let container = Hidden::new("/dev/vfio/vfio")?;
    says(
        &[("--device", &drive.option(""))],
        &["/dev/iommu", "nestling doctor"],
    )?;
    drop((iommufd, container));
    // More than this host's IOMMU translates, and PASIDs, which it does not have.
    for (unit, device, words) in [
        (
            "type=vtd,address_width=57",
            ",iommu=on",
            &["address_width=57", "48 bits", "leave address_width out"][..],
        ),
        (
            "type=vtd",
            ",iommu=on,pasid=on,dma_width=40",
            &[NVME, "pasid=on", "leave it to auto"],
        ),
    ] {
        says(
            &[("--viommu", unit), ("--device", &drive.option(device))],
            words,
        )?;
    }
    in_the_way(lab, &drive)?;
    says(
        &[
            ("--device", &drive.option(",iommu=on")),
            ("--viommu", "type=vtd,mode=scalable"),
        ],
        &[NVME, "first-stage", "mode=legacy"],
    )?;
    let said = Guest::lab_kernel()
        .locked_memory(64 << 20)
        .option("--device", &drive.option(""))
        .start(lab)?
        .wait(SLOW)?
        .said;
    ensure!(
        said.contains("locked in memory") && said.contains("ulimit -l"),
        "the limit of locked memory: {said}"
    );
    let shared = Bound::new("0000:00:14.1")?;
    says(
        &[("--device", &shared.option(""))],
        &["0000:00:14.0", "virtio-pci", "vfio-pci too"],
    )?;
    drop(shared);
    let mut first = Guest::lab_kernel()
        .option("--device", &drive.option(""))
        .start(lab)?;
    in_use(&mut first)?;
    says(&[("--device", &drive.option(""))], &["another"])?;
    drop(first);
    Ok(())
}

/// This host translates 47 bits.
pub(super) fn too_wide(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    refused(
        lab,
        &[
            ("--viommu", "type=vtd,address_width=48"),
            ("--device", &drive.option(",iommu=on")),
        ],
        &["address_width=48", "47 bits", "leave address_width out"],
    )
}

/// Guest memory is laid out around what the host reserves for a device; where nothing can be laid
/// around it, that is said.
fn in_the_way(lab: &Lab, drive: &Bound) -> Result<()> {
    let device = drive.option("");
    for (region, words) in [
        // Where the kernel is loaded.
        (
            "0x0000000000100000 0x00000000001fffff direct",
            &[
                NVME,
                "0x100000-0x1fffff",
                "must boot",
                "leave that device out",
            ][..],
        ),
        // Everything between 3 and 4 GiB.
        (
            "0x00000000c0000000 0x00000000ffffffff reserved",
            &[
                NVME,
                "0xc0000000-0xfedfffff",
                "no room",
                "leave a device out",
            ],
        ),
        // All but a little of what lies above.
        (
            "0x0000000008000000 0x00000000bfffffff reserved\n\
             0x0000000100000000 0xffffffffffffffff reserved",
            &["memory size=512M", "does not fit", "reserved", "give less"],
        ),
    ] {
        let _reserved = Reserved::new(drive, region)?;
        refused(lab, &[("--device", &device)], words)?;
    }
    Ok(())
}

/// What the host says that it reserves for a device, until the value is dropped. No IOMMU of the
/// emulated hosts reserves anything but the addresses of messages.
pub(crate) struct Reserved(PathBuf);

impl Reserved {
    /// `regions` in the words of sysfs.
    pub(crate) fn new(drive: &Bound, regions: &str) -> Result<Self> {
        let place = fs::canonicalize(drive.sysfs().join("iommu_group/reserved_regions"))?;
        let file = std::env::temp_dir().join(format!("reserved-{}", std::process::id()));
        let before = fs::read_to_string(&place)?;
        fs::write(&file, format!("{before}{regions}\n"))?;
        mount(&["--bind".as_ref(), file.as_os_str(), place.as_os_str()])?;
        let _ = fs::remove_file(file);
        Ok(Self(place))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn mount(words: &[&OsStr]) -> Result<()> {
    let mounted = Command::new("mount").args(words).status()?;
    ensure!(mounted.success(), "mount {words:?}");
    Ok(())
}

/// A node of the host that is not there, until the value is dropped.
pub(super) struct Hidden(&'static str);

impl Hidden {
    pub(super) fn new(node: &'static str) -> Result<Self> {
        fs::rename(node, format!("{node}-away"))?;
        Ok(Self(node))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::rename(format!("{}-away", self.0), self.0);
    }
}

/// Waits until a nestling has its device open.
fn in_use(machine: &mut Machine) -> Result<()> {
    let deadline = Instant::now() + SLOW;
    while Instant::now() < deadline {
        if !open_in(machine.pid(), "/dev/vfio/devices").is_empty() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("nestling does not open its device")
}
