//! `nestling doctor`: what this host can do, device by device, and for every "no" the reason and
//! the remedy.
//!
//! Everything is read from sysfs, procfs and the device nodes, below roots that a test can choose.
//! Most of it needs no privilege; what does is reported as unknown, with what to run as.
//!
//! ```no_run
//! use vmm::doctor::{Report, Roots};
//!
//! let report = Report::examine(&Roots::default());
//! println!("{report}");
//! # let _json =
//! serde_json::to_string_pretty(&report)?;
//! # Ok::<(), serde_json::Error>(())
//! ```
#![forbid(unsafe_code)]

mod devices;
mod iommus;
mod judge;
mod table;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::sandbox::{self, Support};

pub use devices::{Member, PciDevice, Reserved};
pub use iommus::{Iommu, Model};

/// Where the host's own files are.
#[derive(Clone, Debug)]
pub struct Roots {
    /// `/sys`
    pub sys: PathBuf,
    /// `/dev`
    pub dev: PathBuf,
    /// `/proc`
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            dev: "/dev".into(),
            proc: "/proc".into(),
        }
    }
}

/// The answer to one question.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Finding {
    /// Yes.
    pub ok: bool,
    /// What was found; of a "no", why.
    pub what: String,
    /// How to make it a "yes", where there is a way: a command, or what to change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn yes(what: impl Into<String>) -> Self {
        Self {
            ok: true,
            what: what.into(),
            remedy: None,
        }
    }

    fn no(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            ok: false,
            what: what.into(),
            remedy: Some(remedy.into()),
        }
    }

    /// No, and there is nothing to be done.
    fn never(what: impl Into<String>) -> Self {
        Self {
            ok: false,
            what: what.into(),
            remedy: None,
        }
    }
}

/// All that the doctor found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct Report {
    /// Guests can run.
    pub kvm: Finding,
    /// The kernel's iommufd can be used.
    pub iommufd: Finding,
    /// Guest memory can be pinned.
    pub locked_memory: Finding,
    /// The kernel can confine the paths that nestling opens (landlock).
    pub landlock: Finding,
    /// The host's IOMMUs.
    pub iommus: Vec<Iommu>,
    /// The PCI functions that could be passed through (no bridges).
    pub devices: Vec<PciDevice>,
}

impl Report {
    /// Looks at the host. What cannot be read is part of the answer, so this does not fail.
    pub fn examine(roots: &Roots) -> Self {
        let iommus = iommus::all(&roots.sys);
        let host = judge::Host {
            iommufd: node(
                &roots.dev.join("iommu"),
                "the kernel has no iommufd",
                "use a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later)",
            ),
            has_cdevs: ["iommu", "vfio/devices"]
                .iter()
                .all(|node| roots.dev.join(node).exists()),
            container: roots.dev.join("vfio/vfio").exists(),
            cmdline: text(&roots.proc.join("cmdline")).unwrap_or_default(),
            unsafe_interrupts: text(
                &roots
                    .sys
                    .join("module/iommufd/parameters/allow_unsafe_interrupts"),
            )
            .is_some_and(|value| value == "Y"),
        };
        let devices = devices::all(roots)
            .into_iter()
            .map(|device| judge::modes(device, &iommus, &host))
            .collect();
        Self {
            kvm: node(
                &roots.dev.join("kvm"),
                "there is no KVM",
                "enable virtualization in the firmware, then: modprobe kvm_intel (or kvm_amd)",
            ),
            iommufd: host.iommufd,
            locked_memory: locked_memory(&roots.proc),
            landlock: match sandbox::support() {
                Support::None => Finding::no(
                    "nestling may open whatever its user may",
                    "boot the host with landlock in lsm= (a kernel with CONFIG_SECURITY_LANDLOCK)",
                ),
                version => Finding::yes(version.to_string()),
            },
            iommus,
            devices,
        }
    }
}

/// Whether a device node can be opened.
fn node(path: &Path, absent: &str, remedy: &str) -> Finding {
    let name = path.display();
    match File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::yes(format!("{name} can be opened")),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => {
                Finding::no(format!("{name} does not exist: {absent}"), remedy)
            }
            io::ErrorKind::PermissionDenied => Finding::no(
                format!("{name} may not be opened by this user"),
                format!("run as root, or: setfacl -m u:$USER:rw {name}"),
            ),
            _ => Finding::never(format!("{name} cannot be opened: {error}")),
        },
    }
}

/// The limit on pinned memory: all guest RAM counts.
fn locked_memory(proc: &Path) -> Finding {
    let limits = text(&proc.join("self/limits")).unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    match soft {
        Some("unlimited") => Finding::yes("unlimited"),
        Some(_) if has_ipc_lock(proc) => Finding::yes("no limit for this user (CAP_IPC_LOCK)"),
        None => Finding::never("the limit of locked memory cannot be read"),
        Some(bytes) => {
            let mib = bytes.parse::<u64>().unwrap_or(0) >> 20;
            Finding::no(
                format!("{mib} MiB: a guest with a device and more memory than that is refused"),
                "run as root, or: ulimit -l unlimited (LimitMEMLOCK=infinity in a unit file)",
            )
        }
    }
}

/// Whether the limit does not count: the effective capabilities have `CAP_IPC_LOCK` (14).
fn has_ipc_lock(proc: &Path) -> bool {
    let status = text(&proc.join("self/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok())
        .is_some_and(|bits| bits >> 14 & 1 != 0)
}

/// The trimmed text of a small file.
fn text(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(64 << 10).read_to_string(&mut text).ok()?;
    Some(text.trim().to_owned())
}

/// A number as sysfs writes it: hexadecimal, with or without `0x`.
fn hex(path: &Path) -> Option<u64> {
    let text = text(path)?;
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(&text), 16).ok()
}

/// The last part of what a symbolic link names.
fn link(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The names in a directory, sorted; none if there is no such directory.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect::<Vec<_>>();
    names.sort_unstable();
    names
}
