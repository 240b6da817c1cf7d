//! Finding the VFIO device of a PCI function, and why it cannot be had.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{read_dir, read_link};
use std::io;
use std::path::{Path, PathBuf};

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not bound to a VFIO driver.
    #[error(
        "{0} has no VFIO device: bind it to vfio-pci first (nestling doctor prints the commands)"
    )]
    NotBound(PathBuf),
    /// The node is there and cannot be opened.
    #[error("{path} cannot be opened: {source}; another VM may have it, or this user may not")]
    Open {
        /// The device node.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not give it to this iommufd.
    #[error("{path} cannot be bound to iommufd: {reason}")]
    Bind {
        /// The device.
        path: PathBuf,
        /// What the error number means here.
        reason: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What was passed in is something else.
    #[error("the descriptor for {0} is not its VFIO device; pass an open /dev/vfio/devices/{1}")]
    NotIt(PathBuf, String),
    /// A call that every VFIO PCI device answers failed.
    #[error("{call} failed for {path}; is this a PCI device?")]
    Call {
        /// The device.
        path: PathBuf,
        /// The call, by the kernel's name.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What a bind error means (A1 in viommu's `iommufd/linux.md`).
pub(super) fn bind_reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "the host does not remap interrupts, or another process owns its \
             group; if the guest is trusted: modprobe iommufd allow_unsafe_interrupts=1"
            .into(),
        Some(libc::EBUSY) => {
            "its group is in use by a host driver or another VM (nestling doctor names it)".into()
        }
        Some(libc::EINVAL) => {
            "another process has it already, or the firmware reserves memory for it (RMRR), or its \
             IOMMU is not coherent"
                .into()
        }
        Some(libc::ENODEV) => "it stands behind no IOMMU; enable VT-d in the firmware".into(),
        _ => error.to_string(),
    }
}

/// The name of the character device of the function at `sysfs`.
pub(super) fn node_of(sysfs: &Path) -> Result<OsString, OpenError> {
    read_dir(sysfs.join("vfio-dev"))
        .ok()
        .and_then(|mut entries| entries.next()?.ok())
        .map(|entry| entry.file_name())
        .ok_or_else(|| OpenError::NotBound(sysfs.into()))
}

/// The number of the IOMMU group of the function at `sysfs`.
///
/// # Errors
/// sysfs tells of none.
pub fn group(sysfs: &Path) -> io::Result<u32> {
    let group = read_link(sysfs.join("iommu_group"))?;
    let number = group
        .file_name()
        .and_then(|name| name.to_str()?.parse().ok());
    number.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The other functions of the group of the one at `sysfs` that a driver of the host has, each with
/// its driver.
pub(super) fn host_drivers(sysfs: &Path) -> Vec<String> {
    let own = sysfs.file_name();
    let members = read_dir(sysfs.join("iommu_group/devices"));
    let mut found = Vec::new();
    for member in members.into_iter().flatten().flatten() {
        let driver = read_link(member.path().join("driver")).ok();
        let driver = driver.as_deref().and_then(Path::file_name);
        if let Some(driver) = driver
            && Some(member.file_name().as_os_str()) != own
            && driver != "vfio-pci"
        {
            let (name, driver) = (member.file_name(), driver.to_string_lossy());
            found.push(format!(
                "{}, which the driver {driver} has",
                name.to_string_lossy()
            ));
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_of_a_bind_says_what_it_means_and_what_helps() {
        let reason = |number| bind_reason(&io::Error::from_raw_os_error(number));
        assert!(reason(libc::EPERM).contains("allow_unsafe_interrupts=1"));
        assert!(reason(libc::EBUSY).contains("nestling doctor"));
        assert!(
            reason(libc::EINVAL).contains("another process")
                && reason(libc::EINVAL).contains("RMRR")
        );
        assert!(reason(libc::ENODEV).contains("VT-d"));
        assert!(reason(libc::EIO).contains("os error 5"));
    }

    #[test]
    fn a_devices_group_is_the_one_that_sysfs_links_to() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        assert!(group(dir.as_path()).is_err(), "nobody knows what it shares");
        let link = dir.as_path().join("iommu_group");
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/17", link).unwrap();
        assert_eq!(group(dir.as_path()).unwrap(), 17);
    }

    #[test]
    fn what_else_of_a_group_the_host_uses_is_named() {
        use std::os::unix::fs::symlink;
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let devices = dir.as_path().join("iommu_group/devices");
        std::fs::create_dir_all(&devices).unwrap();
        let own = dir.as_path().file_name().unwrap().to_owned();
        for (name, driver) in [
            (own.to_str().unwrap(), Some("x")),
            ("0000:00:01.0", Some("vfio-pci")),
            ("0000:00:01.1", Some("e1000e")),
            ("0000:00:01.2", None),
        ] {
            std::fs::create_dir(devices.join(name)).unwrap();
            if let Some(driver) = driver {
                symlink(
                    Path::new("/x").join(driver),
                    devices.join(name).join("driver"),
                )
                .unwrap();
            }
        }
        assert_eq!(
            host_drivers(dir.as_path()),
            ["0000:00:01.1, which the driver e1000e has"]
        );
        assert!(host_drivers(Path::new("/nonexistent")).is_empty());
    }
}
