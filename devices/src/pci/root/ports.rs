//! The two front ends of configuration space: ECAM and the ports.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::Rid;

use super::PciRoot;
use crate::bus::BusDevice;
use crate::legacy::PowerEvents;

/// The memory-mapped front end of configuration space (ECAM, 7.2.2): 1 MiB per bus, 4 KiB per
/// function. Bus numbers start at 0.
pub struct Ecam(pub Arc<PciRoot>);

impl Ecam {
    /// Bytes that an ECAM of `buses` buses takes on the MMIO bus.
    pub const fn length(buses: u16) -> u64 {
        (buses as u64) << 20
    }

    fn locate(offset: u64) -> (Rid, u16) {
        (Rid((offset >> 12) as u16), offset as u16 & 0xfff)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (rid, offset) = Self::locate(offset);
        self.0.config_read(rid, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (rid, offset) = Self::locate(offset);
        self.0.config_write(rid, offset, data);
    }
}

/// The port I/O front end of the first 256 bytes (PCI Local Bus 3.0, 3.2.2.3.2): put it on the
/// port I/O bus at [`ConfigPorts::BASE`]. Port 0xcf9 among them is the reset control register.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    power: Arc<dyn PowerEvents>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// CONFIG_ADDRESS.
    pub const BASE: u64 = 0xcf8;
    /// CONFIG_ADDRESS and CONFIG_DATA, four bytes each.
    pub const LENGTH: u64 = 8;
    /// Reset control register, as an offset from [`BASE`](Self::BASE).
    const RESET_CONTROL: u64 = 1;
    const DATA: u64 = 4;

    /// The ports of `root`; a write to 0xcf9 that asks for a reset goes to `power`.
    pub fn new(root: Arc<PciRoot>, power: Arc<dyn PowerEvents>) -> Self {
        Self {
            root,
            power,
            address: Mutex::new(0),
        }
    }

    fn address(&self) -> MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The function and register that CONFIG_ADDRESS selects; `None` while bit 31 is clear.
    fn selected(&self, offset: u64) -> Option<(Rid, u16)> {
        let address = *self.address();
        let register = (address as u16 & 0xfc) + (offset - Self::DATA) as u16;
        (address >> 31 == 1).then_some((Rid((address >> 8) as u16), register))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= Self::DATA {
            match self.selected(offset) {
                Some((rid, register)) => self.root.config_read(rid, register, data),
                None => data.fill(0xff),
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address().to_le_bytes());
        } else if offset == Self::RESET_CONTROL && data.len() == 1 {
            data.fill(0);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= Self::DATA {
            if let Some((rid, register)) = self.selected(offset) {
                self.root.config_write(rid, register, data);
            }
        } else if offset == 0
            && let Ok(address) = <[u8; 4]>::try_from(data)
        {
            // Bits 30:24 and 1:0 are reserved and read as 0.
            *self.address() = u32::from_le_bytes(address) & 0x80ff_fffc;
        } else if offset == Self::RESET_CONTROL && data.len() == 1 && data[0] & 1 << 2 != 0 {
            self.power.reset();
        }
    }
}
