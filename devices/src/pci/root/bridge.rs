//! The host bridge.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::pci::bar::Bar;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::function::{Decoded, Effect, PciFunction};

/// The host bridge, 00:00.0: there so that the bus has one, as on every PC. It has no registers,
/// does no DMA and has no interrupts, so another one is a function that is nothing but there.
pub struct HostBridge(Mutex<ConfigSpace>);

impl Default for HostBridge {
    fn default() -> Self {
        Self(Mutex::new(ConfigSpace::new(Identity {
            // Red Hat's generic PCI Express host bridge: no guest has quirks for it.
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            ..Identity::default()
        })))
    }
}

impl HostBridge {
    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        self.config().write(offset, data)
    }

    fn decoded(&self) -> Vec<Decoded> {
        Vec::new()
    }

    fn bars(&self) -> Vec<(Bar, u64)> {
        Vec::new()
    }

    fn assign_bar(&self, _bar: u8, _address: u64) {}

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) -> Effect {
        Effect::default()
    }

    fn reset(&self) -> Effect {
        let fresh = Self::default();
        *self.config() = fresh.config().clone();
        Effect::default()
    }
}
