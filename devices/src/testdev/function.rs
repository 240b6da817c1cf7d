//! The PCI function: configuration space, BAR 0, reset.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use viommu::Pasid;
use viommu::backend::PageResponse;
use viommu::backend::software::PageResponseSink;
use viommu::dma::DmaPort;

use super::registers::Enables;
use super::requests::{Port, Upstream};
use super::worker::{Channels, Paging, Worker};
use super::{CHANNELS, VECTORS};
use crate::counters::Counters;
use crate::interrupt::MsiSource;
use crate::pci::config::{ConfigError, Express, Identity};
use crate::pci::msix::{Msix, Place};
use crate::pci::{Bar, ConfigSpace, Decoded, Delivery, Effect, PciFunction};

/// "NDMA".
const ID: u32 = u32::from_le_bytes(*b"NDMA");
const VERSION: u32 = 1;

const BAR_LENGTH: u64 = 512 << 10;
const TABLE: u64 = 0x1000;
const PENDING: u64 = 0x2000;
const FIRST_CHANNEL: u64 = 0x4_0000;
const CHANNEL_LENGTH: u64 = 0x1000;

/// Device Control, in the PCI Express capability: Initiate Function Level Reset (7.5.3.4).
const DEVICE_CONTROL: u16 = 0x08;
const INITIATE_RESET: u8 = 1 << 7;

/// Extended capability IDs (PCIe 6.0, 10.5.1, 7.8.9 and 10.5.2).
const ATS: u16 = 0x0f;
const PRI: u16 = 0x13;
const PASID: u16 = 0x1b;

/// Of all three capabilities: Control, after the header and another word.
const CONTROL: u16 = 6;
/// PRI has its control first, then status, capacity and allocation.
const PRI_CONTROL: u16 = 4;
const PRI_STATUS: u16 = 6;
const PRI_ALLOCATION: u16 = 12;

const PRI_RESET: u16 = 1 << 1;
const STATUS_FAILURE: u16 = 1 << 0;
const STATUS_UNEXPECTED: u16 = 1 << 1;
const STATUS_STOPPED: u16 = 1 << 8;
const STATUS_PASID_REQUIRED: u16 = 1 << 15;

/// What the function offers in its configuration space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// Bits of PASID, 0 to 20; 0: no PASID capability.
    pub pasid_bits: u8,
    /// The ATS capability.
    pub ats: bool,
    /// The PRI capability; only with `ats`.
    pub pri: bool,
}

impl Default for Features {
    /// Everything.
    fn default() -> Self {
        Self {
            pasid_bits: Pasid::BITS,
            ats: true,
            pri: true,
        }
    }
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum NewError<E> {
    /// Its features do not go together.
    #[error("{0:?} cannot be had: PASIDs have at most 20 bits, and PRI needs ATS")]
    Features(Features),
    /// Configuration space has no room for a capability.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host has no vectors or threads left.
    #[error(
        "the DMA test engine cannot have its interrupts and its thread; raise the host's limits"
    )]
    Host(#[from] io::Error),
    /// The caller could not give it a port.
    #[error(transparent)]
    Port(E),
}

/// The DMA test engine. See the [module's text](super).
pub struct TestDevice {
    config: Mutex<Config>,
    channels: Arc<Channels>,
    /// Last: it ends before anything that it uses.
    _worker: Worker,
}

struct Config {
    space: ConfigSpace,
    express: u16,
    msix: u16,
    pasid: Option<u16>,
    ats: Option<u16>,
    pri: Option<u16>,
    /// As it was built, for reset.
    fresh: ConfigSpace,
}

/// Brings page responses to the channels. Holds no port, so that the engine that holds this does
/// not hold itself.
struct Responses(Arc<Channels>);

impl PageResponseSink for Responses {
    fn page_response(&self, response: PageResponse) {
        self.0.respond(response);
    }
}

impl TestDevice {
    /// A device with these features. Its vectors are from `source`; `port` is given where page
    /// responses must go, and gives the way to guest memory (for a device behind a vIOMMU, both
    /// are what the software engine's `add_endpoint` takes and gives).
    ///
    /// # Errors
    /// [`NewError`].
    pub fn new<E>(
        features: Features,
        source: &dyn MsiSource,
        port: impl FnOnce(Arc<dyn PageResponseSink>) -> Result<DmaPort, E>,
    ) -> Result<Self, NewError<E>> {
        Self::with_upstream(features, source, |sink| {
            Ok(Box::new(Port::new(port(sink)?)))
        })
    }

    fn with_upstream<E>(
        features: Features,
        source: &dyn MsiSource,
        upstream: impl FnOnce(Arc<dyn PageResponseSink>) -> Result<Box<dyn Upstream>, E>,
    ) -> Result<Self, NewError<E>> {
        if features.pasid_bits > Pasid::BITS || features.pri && !features.ats {
            return Err(NewError::Features(features));
        }
        let msix = Msix::new(VECTORS, Delivery::Emulated, source)?;
        let config = Config::new(features, &msix)?;
        let channels = Arc::new(Channels::new(msix));
        let responses = Arc::new(Responses(Arc::clone(&channels)));
        let upstream = upstream(responses).map_err(NewError::Port)?;
        Ok(Self {
            config: Mutex::new(config),
            _worker: Worker::start(Arc::clone(&channels), upstream)?,
            channels,
        })
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The 4 bytes at `at`, a multiple of 4, of the device registers.
    fn device_register(&self, at: u64) -> u32 {
        let (counters, outstanding, enabled) = self.channels.counters();
        let half = |value: u64| (value >> (8 * (at & 4))) as u32;
        match at {
            0x00 => ID,
            0x04 => VERSION,
            0x08 => CHANNELS as u32,
            0x0c => VECTORS.into(),
            0x10 => enabled,
            0x14 => outstanding,
            0x18 | 0x1c => half(counters.requests),
            0x20 | 0x24 => half(counters.responses),
            0x28 | 0x2c => half(counters.stray),
            _ => 0,
        }
    }

    fn read_register(&self, at: u64) -> u32 {
        match at {
            ..TABLE => self.device_register(at),
            FIRST_CHANNEL..BAR_LENGTH => {
                let at = at - FIRST_CHANNEL;
                let index = (at / CHANNEL_LENGTH) as usize;
                self.channels.read(index, at % CHANNEL_LENGTH)
            }
            _ => 0,
        }
    }
}

impl Config {
    fn new(features: Features, msix: &Msix) -> Result<Self, ConfigError> {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x10f0,
            revision: 1,
            class: 0xff_0000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x10f0,
        });
        space.add_bar(Bar::memory64(0, BAR_LENGTH))?;
        let express = space.add_express_endpoint(Express {
            function_level_reset: true,
            end_end_tlp_prefix: features.pasid_bits != 0,
        })?;
        let place = |offset: u64| Place {
            bar: 0,
            offset: offset as u32,
        };
        let msix = msix.add_capability(&mut space, place(TABLE), place(PENDING))?;
        let words = |words: &[u16]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let mut pasid = None;
        if features.pasid_bits != 0 {
            // Execute Permission and Privileged Mode Supported, Max PASID Width.
            let supported = 1 << 1 | 1 << 2 | u16::from(features.pasid_bits) << 8;
            let (body, writable) = (words(&[supported, 0]), words(&[0, 0b111]));
            pasid = Some(space.add_extended_capability(PASID, 1, &body, &writable)?);
        }
        let mut ats = None;
        if features.ats {
            // Page Aligned Request, Global Invalidate Supported; a queue depth of 32.
            let supported = 1 << 5 | 1 << 6;
            let (body, writable) = (words(&[supported, 0]), words(&[0, 1 << 15 | 0x1f]));
            ats = Some(space.add_extended_capability(ATS, 1, &body, &writable)?);
        }
        let mut pri = None;
        if features.pri {
            let capacity = CHANNELS as u16;
            let status = STATUS_STOPPED | STATUS_PASID_REQUIRED;
            let body = words(&[0, status, capacity, 0, 0, 0]);
            let writable = words(&[1, 0, 0, 0, !0, !0]);
            let at = space.add_extended_capability(PRI, 1, &body, &writable)?;
            let clear = STATUS_FAILURE | STATUS_UNEXPECTED;
            space.clear_on_one(at + PRI_STATUS, &clear.to_le_bytes());
            pri = Some(at);
        }
        Ok(Self {
            fresh: space.clone(),
            space,
            express,
            msix,
            pasid,
            ats,
            pri,
        })
    }

    fn enables(&self) -> Enables {
        let control =
            |at: Option<u16>, offset: u16| at.map_or(0, |at| self.space.word(at + offset));
        let pasid = control(self.pasid, CONTROL);
        let allowed = |bit: u16| pasid & 1 != 0 && pasid & bit != 0;
        Enables {
            bus_master: self.space.bus_master(),
            pasid: allowed(1),
            execute: allowed(1 << 1),
            privileged: allowed(1 << 2),
            ats: control(self.ats, CONTROL) & 1 << 15 != 0,
            pri: control(self.pri, PRI_CONTROL) & 1 != 0,
            allocation: self
                .pri
                .map_or(0, |at| self.space.dword(at + PRI_ALLOCATION)),
        }
    }

    /// Puts PRI's state into its status register.
    fn show_paging(&mut self, channels: &Channels) {
        let Some(at) = self.pri else { return };
        let (paging, stopped) = channels.paging();
        let status = [
            (paging.failed, STATUS_FAILURE),
            (paging.unexpected, STATUS_UNEXPECTED),
            (stopped, STATUS_STOPPED),
            (true, STATUS_PASID_REQUIRED),
        ];
        let status = status
            .iter()
            .filter(|(set, _)| *set)
            .fold(0, |all, (_, bit)| all | bit);
        self.space.set(at + PRI_STATUS, &status.to_le_bytes());
    }
}

impl PciFunction for TestDevice {
    fn counters(&self) -> Vec<Arc<dyn Counters>> {
        vec![self.channels.counts().clone()]
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut config = self.config();
        config.show_paging(&self.channels);
        config.space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let written = |at: u16| {
            at.checked_sub(offset)
                .and_then(|i| data.get(usize::from(i)))
        };
        let mut config = self.config();
        let reset = written(config.express + DEVICE_CONTROL + 1);
        if reset.is_some_and(|byte| byte & INITIATE_RESET != 0) {
            drop(config);
            return self.reset();
        }
        config.show_paging(&self.channels);
        let effect = config.space.write(offset, data);
        let msix = self.channels.msix();
        msix.set_control(config.space.word(config.msix + 2));
        msix.set_bus_master(config.space.bus_master());
        if let Some(at) = config.pri {
            if written(at + PRI_STATUS).is_some() {
                let status = config.space.word(at + PRI_STATUS);
                self.channels.set_paging(Paging {
                    failed: status & STATUS_FAILURE != 0,
                    unexpected: status & STATUS_UNEXPECTED != 0,
                });
            }
            let control = written(at + PRI_CONTROL).copied().unwrap_or(0);
            // Reset has an effect only while the interface is disabled (10.5.2.2).
            if u16::from(control) & (PRI_RESET | 1) == PRI_RESET {
                self.channels.reset_paging();
            }
        }
        // With the configuration locked, so that the last write is the last to take effect.
        self.channels.enable(config.enables());
        effect
    }

    fn decoded(&self) -> Vec<Decoded> {
        self.config().space.decoded()
    }

    fn bars(&self) -> Vec<(Bar, u64)> {
        self.config().space.bars()
    }

    fn assign_bar(&self, bar: u8, address: u64) {
        self.config().space.assign_bar(bar, address);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if bar != 0 || offset >= BAR_LENGTH {
            return;
        }
        let msix = self.channels.msix();
        match offset {
            TABLE..PENDING => return msix.table_read(offset - TABLE, data),
            PENDING..FIRST_CHANNEL => return msix.pba_read(offset - PENDING, data),
            _ => {}
        }
        if let (4 | 8, true) = (data.len(), offset.is_multiple_of(data.len() as u64)) {
            for (at, bytes) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
                bytes.copy_from_slice(&self.read_register(at).to_le_bytes());
            }
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> Effect {
        if bar != 0 || offset >= BAR_LENGTH {
            return Effect::default();
        }
        if (TABLE..PENDING).contains(&offset) {
            self.channels.msix().table_write(offset - TABLE, data);
        } else if let (4 | 8, true) = (data.len(), offset.is_multiple_of(data.len() as u64))
            && let Some(offset) = offset.checked_sub(FIRST_CHANNEL)
        {
            let index = (offset / CHANNEL_LENGTH) as usize;
            let (words, _) = data.as_chunks();
            for (at, word) in (offset % CHANNEL_LENGTH..).step_by(4).zip(words) {
                self.channels.write(index, at, u32::from_le_bytes(*word));
            }
        }
        Effect::default()
    }

    fn reset(&self) -> Effect {
        let mut config = self.config();
        config.space = config.fresh.clone();
        // No interrupt and no DMA of before may be seen after.
        let msix = self.channels.msix();
        msix.reset();
        msix.set_bus_master(config.space.bus_master());
        self.channels.enable(config.enables());
        self.channels.reset();
        Effect { decode: true }
    }
}
