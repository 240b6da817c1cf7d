//! What a configuration needs to open: pure.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::config::{ConsoleMode, LandlockAccess, LandlockConfig, Reserve, SerialMode, VmConfig};
use crate::control::NewDevice;

/// What may be done below a path.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Access {
    /// Read files, list folders.
    Read,
    /// Write files.
    Write,
    /// Both.
    ReadWrite,
    /// Use a device node: both, and its ioctls.
    Device,
    /// Make files and write them.
    Make,
    /// Make sockets and remove them.
    Socket,
    /// Remove files.
    Remove,
}

/// One path that something of the configuration needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Need {
    /// What needs it, as an option is written: `disk path=/root.img`.
    pub what: String,
    /// The path.
    pub path: PathBuf,
    /// What for.
    pub access: Access,
    /// Whether it is what the user named, not something that every such device needs.
    pub named: bool,
}

impl Need {
    fn named(option: &str, path: &Path, access: Access) -> Self {
        Self {
            what: format!("{option}={}", path.display()),
            path: path.into(),
            access,
            named: true,
        }
    }

    fn common(what: &str, path: &str, access: Access) -> Self {
        Self {
            what: what.into(),
            path: path.into(),
            access,
            named: false,
        }
    }
}

/// What devices of the host need beside their own folder.
const PASSTHROUGH: [(&str, Access); 6] = [
    ("/dev/iommu", Access::Device),
    ("/dev/vfio", Access::Device),
    ("/sys/bus/pci", Access::Read),
    ("/sys/class/iommu", Access::Read),
    ("/sys/devices", Access::Read),
    ("/sys/kernel/iommu_groups", Access::Read),
];
const TUN: &str = "/dev/net/tun";

/// What a VM of this configuration needs, and what any device needs that can be plugged later
/// (`served`).
pub fn of_config(config: &VmConfig, served: bool) -> Vec<Need> {
    let mut needs = vec![
        Need::common("KVM", "/dev/kvm", Access::Device),
        Need::common("huge pages", "/sys/kernel/mm/hugepages", Access::Read),
        Need::named("kernel", &config.payload.kernel, Access::Read),
        Need::named("rng src", &config.rng.src, Access::Read),
    ];
    if let Some(initramfs) = &config.payload.initramfs {
        needs.push(Need::named("initramfs", initramfs, Access::Read));
    }
    for disk in &config.disks {
        needs.extend(of_device(&NewDevice::Disk(disk.clone())));
    }
    if let (SerialMode::File, Some(file)) = (config.serial.mode, &config.serial.file) {
        needs.push(made("serial file", file, Access::Make));
    }
    match (
        config.console.mode,
        &config.console.file,
        &config.console.socket,
    ) {
        (ConsoleMode::File, Some(file), _) => needs.push(made("console file", file, Access::Make)),
        (ConsoleMode::Socket, _, Some(socket)) => {
            needs.push(made("console socket", socket, Access::Socket));
        }
        // Its output is opened again, so as not to block.
        (ConsoleMode::Tty, ..) => needs.push(Need::common(
            "standard output",
            "/proc/self/fd/1",
            Access::Device,
        )),
        _ => {}
    }
    if config.viommus.iter().any(|unit| unit.vcmd) {
        let directory = &config.platform.pasid_directory;
        needs.push(Need::named("pasid_directory", directory, Access::ReadWrite));
        needs.push(Need::named("pasid_directory", directory, Access::Make));
    }
    if served || !config.net.is_empty() {
        needs.push(Need::common("net", TUN, Access::Device));
    }
    if served || !config.devices.is_empty() || config.platform.reserve == Reserve::Host {
        let all = PASSTHROUGH.iter();
        needs.extend(all.map(|(path, access)| Need::common("device", path, *access)));
    }
    needs
}

/// What a device needs that comes later, beside what [`of_config`] has for all.
pub fn of_device(device: &NewDevice) -> Vec<Need> {
    match device {
        NewDevice::Disk(disk) if disk.fd.is_some() => Vec::new(),
        NewDevice::Disk(disk) => {
            let access = match disk.readonly {
                true => Access::Read,
                false => Access::ReadWrite,
            };
            vec![Need::named("disk path", &disk.path, access)]
        }
        NewDevice::Net(net) if net.fd.is_some() => Vec::new(),
        NewDevice::Net(_) => vec![Need::common("net", TUN, Access::Device)],
        NewDevice::Device(device) => PASSTHROUGH
            .iter()
            .filter(|(path, _)| device.fd.is_none() || path.starts_with("/sys"))
            .map(|(path, access)| Need::common("device", path, *access))
            .collect(),
        NewDevice::Test(_) => Vec::new(),
    }
}

/// What the user lets nestling open beside that.
pub fn of_rule(rule: &LandlockConfig) -> Need {
    let access = match rule.access {
        LandlockAccess::Read => Access::Read,
        LandlockAccess::Write => Access::Write,
        LandlockAccess::ReadWrite => Access::ReadWrite,
    };
    Need::named("landlock-rules path", &rule.path, access)
}

/// What the thread of the API needs: to remove its socket.
pub fn of_api(socket: Option<&Path>) -> Vec<Need> {
    let folder = socket.map(|socket| Need {
        path: folder_of(socket).into(),
        ..Need::named("api-socket path", socket, Access::Remove)
    });
    folder.into_iter().collect()
}

/// What the thread needs that looks at the host.
pub fn of_inspector() -> Vec<Need> {
    [
        ("/sys", Access::Read),
        ("/proc", Access::Read),
        ("/dev/kvm", Access::Device),
        ("/dev/iommu", Access::Device),
        ("/dev/vfio", Access::Read),
    ]
    .map(|(path, access)| Need::common("host.info", path, access))
    .into()
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A file is written where it is, and made in its folder where it is not; a socket always is.
fn made(option: &str, path: &Path, access: Access) -> Need {
    if access == Access::Make && path.exists() {
        return Need::named(option, path, Access::Write);
    }
    Need {
        path: folder_of(path).into(),
        ..Need::named(option, path, access)
    }
}
