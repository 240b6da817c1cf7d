//! Devices of the host that tests give to guests.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

const DEVICES: &str = "/sys/bus/pci/devices";

/// A device of the host that is bound to vfio-pci, and goes back to its driver with the value.
#[derive(Debug)]
pub struct Bound {
    sysfs: PathBuf,
    address: String,
}

impl Bound {
    /// Binds the device at a PCI address (`0000:00:10.0`).
    ///
    /// # Errors
    /// It is not there or cannot be bound.
    pub fn new(address: &str) -> Result<Self> {
        let sysfs = Path::new(DEVICES).join(address);
        let bound = Self {
            sysfs,
            address: address.to_owned(),
        };
        bound.rebind("vfio-pci")?;
        let driver = fs::read_link(bound.sysfs.join("driver"));
        let driver = driver.with_context(|| format!("{address} has no driver"))?;
        ensure!(
            driver.ends_with("vfio-pci"),
            "{address} is bound to {}",
            driver.display()
        );
        Ok(bound)
    }

    /// Binds the one device with these IDs (`0x1af4`).
    ///
    /// # Errors
    /// There is none, or more than one, or it cannot be bound.
    pub fn with_ids(vendor: &str, device: &str) -> Result<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir(DEVICES)?.flatten() {
            let is = |name: &str, id: &str| {
                let text = fs::read_to_string(entry.path().join(name));
                text.is_ok_and(|text| text.trim() == id)
            };
            if is("vendor", vendor) && is("device", device) {
                found.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        match &found[..] {
            [address] => Self::new(address),
            _ => bail!("devices {vendor}:{device} of this host: {found:?}"),
        }
    }

    /// Gives it to another driver; an empty name means its own.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn rebind(&self, driver: &str) -> Result<()> {
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write(self.sysfs.join("driver_override"), &format!("{driver}\n"))?;
        if self.sysfs.join("driver").exists() {
            write(self.sysfs.join("driver/unbind"), &self.address)?;
        }
        write("/sys/bus/pci/drivers_probe".into(), &self.address)
    }

    /// Where it is in sysfs.
    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    /// Gives an NVMe drive to the host's driver, which finds its namespace, and takes it again.
    ///
    /// # Errors
    /// The host's driver does not find it.
    pub fn works_on_the_host(&self) -> Result<()> {
        self.rebind("")?;
        let deadline = Instant::now() + Duration::from_secs(300);
        while !Path::new("/dev/nvme0n1").exists() {
            ensure!(
                Instant::now() < deadline,
                "the host has no {}",
                self.address
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        self.rebind("vfio-pci")
    }

    /// Its PCI address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The value of `--device` for it, with `more` after it.
    pub fn option(&self, more: &str) -> String {
        format!("path={}{more}", self.sysfs.display())
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // An empty override lets its own driver have it.
        let _ = self.rebind("");
    }
}
