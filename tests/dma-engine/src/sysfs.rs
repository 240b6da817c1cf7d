//! A PCI function through sysfs: its driver, and its registers with no driver at all.

#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::memory::Memory;
use crate::registers::BAR_SIZE;

/// A PCI function.
#[derive(Clone, Debug)]
pub struct Function {
    folder: PathBuf,
}

impl Function {
    /// The one at `address` (`0000:00:05.0`).
    ///
    /// # Errors
    /// There is none.
    pub fn at(address: &str) -> Result<Self> {
        let folder = PathBuf::from("/sys/bus/pci/devices").join(address);
        fs::metadata(&folder).with_context(|| format!("there is no PCI function {address}"))?;
        Ok(Self { folder })
    }

    /// A file of its folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Writes one of its attributes.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.file(name);
        fs::write(&path, value).with_context(|| format!("cannot write {value:?} to {path:?}"))
    }

    /// Takes it from its driver and gives it to another; to none when `driver` is `None`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn give_to(&self, driver: Option<&str>) -> Result<()> {
        if self.file("driver").exists() {
            let name = self.folder.file_name().context("a folder without a name")?;
            self.set("driver/unbind", &name.to_string_lossy())?;
        }
        self.set("driver_override", driver.unwrap_or("\n"))?;
        if let (Some(_), Some(name)) = (driver, self.folder.file_name()) {
            fs::write("/sys/bus/pci/drivers_probe", name.as_encoded_bytes())
                .context("cannot have the function probed")?;
        }
        Ok(())
    }

    /// Lets it decode memory and do DMA, with no driver.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn enable(&self) -> Result<()> {
        self.enable_only(0x6)
    }

    /// Lets it do what these bits of the Command register's low three say, and no more.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn enable_only(&self, bits: u16) -> Result<()> {
        let config = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.file("config"));
        let config = config.context("cannot open the configuration space")?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, 4)?;
        let command = u16::from_le_bytes(command) & !0x7 | bits;
        config.write_all_at(&command.to_le_bytes(), 4)?;
        Ok(())
    }

    /// BAR 0.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn registers(&self) -> Result<Memory> {
        let path = self.file("resource0");
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.with_context(|| format!("cannot open {path:?}"))?;
        Memory::of_file(&file, 0, BAR_SIZE as usize)
    }
}
