//! Descriptors that go with a request.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use serde_json::Value;

use crate::Failure;
use crate::inherited::inherited;

/// Whether what this subcommand adds can be opened here.
pub(super) fn can(subcommand: &str) -> bool {
    matches!(subcommand, "add-disk" | "add-device")
}

/// Those that `body` names by number (`fd=`, `iommufd=`: open since this program was started), and
/// with `pass` those that are opened here. `body` then names them by their places.
///
/// # Errors
/// One is not open, or cannot be opened.
pub(super) fn of(subcommand: &str, pass: bool, body: &mut Value) -> Result<Vec<OwnedFd>, Failure> {
    let mut all = Vec::new();
    for key in ["fd", "iommufd"] {
        let Some(number) = body[key].as_u64() else {
            continue;
        };
        let number = i32::try_from(number).unwrap_or(i32::MAX);
        let copy = inherited(number).map_err(|why| Failure::Usage(format!("{key}: {why}")))?;
        add(&mut all, body, key, copy);
    }
    if !pass {
        return Ok(all);
    }
    if !can(subcommand) || !body["fd"].is_null() {
        return Err(Failure::Usage(
            "--pass opens disks and devices of the host, and only without fd=; leave it out".into(),
        ));
    }
    let path = body["path"].as_str().unwrap_or_default().to_owned();
    match subcommand {
        "add-disk" => {
            let readonly = body["readonly"].as_bool().unwrap_or(false);
            let disk = open(Path::new(&path), !readonly)?;
            add(&mut all, body, "fd", disk);
        }
        _ => {
            let node = std::fs::read_dir(Path::new(&path).join("vfio-dev"))
                .and_then(|mut nodes| nodes.next().unwrap_or(Err(io::ErrorKind::NotFound.into())))
                .map_err(|why| {
                    Failure::Usage(format!(
                        "device path={path} has no VFIO device ({why}); bind it to vfio-pci first (nestling doctor prints the commands)"
                    ))
                })?;
            let device = Path::new("/dev/vfio/devices").join(node.file_name());
            let device = open(&device, true)?;
            add(&mut all, body, "fd", device);
            if body["iommufd"].is_null() {
                let iommufd = open(Path::new("/dev/iommu"), true)?;
                add(&mut all, body, "iommufd", iommufd);
            }
        }
    }
    Ok(all)
}

fn add(all: &mut Vec<OwnedFd>, body: &mut Value, key: &str, descriptor: OwnedFd) {
    body[key] = all.len().into();
    all.push(descriptor);
}

fn open(path: &Path, write: bool) -> Result<OwnedFd, Failure> {
    let file = File::options().read(true).write(write).open(path);
    file.map(OwnedFd::from).map_err(|why| {
        Failure::Usage(format!(
            "{} cannot be opened ({why}); correct the path or its permissions",
            path.display()
        ))
    })
}
