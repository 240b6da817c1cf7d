//! The vIOMMUs of a VM and what is behind them: the software engine, VT-d units on the memory
//! bus, the DMAR table.

#![forbid(unsafe_code)]

use std::sync::Arc;

use devices::bus::{Bus, BusDevice, BusError};
use serde::Serialize;
use viommu::backend::Refused;
use viommu::backend::software::{Config, EndpointConfig, Engine};
use viommu::dma::DmaPort;
use viommu::spec::vtd::dmar::{Dmar, Drhd, Oem, Scope};
use viommu::vtd::{
    AddError, Connections, Mode, REGISTERS_SIZE, Unit, UnitConfig, UnitState, Unsupported,
    check_agreement,
};
use viommu::{GuestRam, Rid};

use crate::config::{Behind, UnitMode, ViommuConfig};
use crate::interrupts::Interrupts;
use crate::memory::layout::{Layout, VTD_UNITS};

/// Why a vIOMMU, or a device behind it, cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ViommuError {
    /// What was asked for is not there.
    #[error(transparent)]
    Unsupported(Box<Unsupported>),
    /// A device cannot be behind its vIOMMU.
    #[error(transparent)]
    Endpoint(Box<AddError>),
    /// The engine does not take the device.
    #[error(transparent)]
    Engine(#[from] Refused),
    /// A register page is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl From<Unsupported> for ViommuError {
    fn from(error: Unsupported) -> Self {
        Self::Unsupported(Box::new(error))
    }
}

impl From<AddError> for ViommuError {
    fn from(error: AddError) -> Self {
        Self::Endpoint(Box::new(error))
    }
}

/// The vIOMMUs of a VM.
pub(super) struct Viommus {
    ram: GuestRam,
    engine: Engine,
    units: Vec<Placed>,
    address_width: u8,
}

/// A unit and its place in the guest.
struct Placed {
    unit: Arc<Unit>,
    base: u64,
    endpoints: Vec<Rid>,
}

/// What a user may ask about the vIOMMUs of a running VM.
#[derive(Debug, Serialize)]
pub struct ViommuStates {
    /// Each unit, in the order of the configuration.
    pub viommus: Vec<UnitState>,
}

impl Viommus {
    /// Units as `configs` says, with no endpoints, on the bus.
    pub(super) fn new(
        configs: &[ViommuConfig],
        layout: &Layout,
        ram: &GuestRam,
        interrupts: &Arc<Interrupts>,
        mmio: &Bus,
    ) -> Result<Self, ViommuError> {
        let engine = Engine::with_config(
            ram.clone(),
            Config {
                host_address_width: layout.address_width,
                ..Config::for_ram(ram)
            },
        );
        let configs: Vec<UnitConfig> = configs.iter().map(unit_config).collect();
        check_agreement(&configs)?;
        let mut units = Vec::with_capacity(configs.len());
        for (config, base) in configs
            .into_iter()
            .zip((VTD_UNITS.first..).step_by(REGISTERS_SIZE as usize))
        {
            let unit = Unit::new(
                config,
                Connections {
                    ram: ram.clone(),
                    msi: interrupts.clone(),
                    backends: vec![Arc::new(engine.clone())],
                    remapper: None,
                    pasids: None,
                },
            )?;
            mmio.insert(base, REGISTERS_SIZE, Arc::new(Registers(unit.clone())))?;
            units.push(Placed {
                unit,
                base,
                endpoints: Vec::new(),
            });
        }
        Ok(Self {
            ram: ram.clone(),
            engine,
            units,
            address_width: layout.address_width,
        })
    }

    /// The way to guest memory of the emulated device at `rid`, which can do what `endpoint` says.
    pub(super) fn port(
        &mut self,
        rid: Rid,
        behind: Behind<'_>,
        endpoint: EndpointConfig,
    ) -> Result<DmaPort, ViommuError> {
        let placed = match behind {
            Behind::Nothing => None,
            Behind::Default => self.units.first_mut(),
            Behind::Named(id) => self.units.iter_mut().find(|p| p.unit.config().id == id),
        };
        // The configuration was validated: a device that names a unit finds it.
        let Some(placed) = placed else {
            return Ok(DmaPort::direct(self.ram.clone()));
        };
        let port = self.engine.add_endpoint(rid, endpoint)?;
        if let Err(why) = placed.unit.add_endpoint(rid, Arc::new(self.engine.clone())) {
            self.engine.remove_endpoint(rid);
            return Err(why.into());
        }
        placed.endpoints.push(rid);
        Ok(port)
    }

    /// Fixes what the guest sees, and tells it in a DMAR table.
    ///
    /// Each unit names its endpoints one by one: a device that it does not name is behind none.
    pub(super) fn freeze(&self) -> Option<Vec<u8>> {
        if self.units.is_empty() {
            return None;
        }
        let units = self.units.iter().map(|placed| {
            placed.unit.freeze();
            Drhd {
                include_pci_all: false,
                register_base: placed.base,
                scopes: placed
                    .endpoints
                    .iter()
                    .map(|rid| Scope::Endpoint(*rid))
                    .collect(),
            }
        });
        let table = Dmar {
            host_address_width: self.address_width,
            units: units.collect(),
            ..Dmar::default()
        };
        Some(table.to_bytes(Oem::default()))
    }

    /// The units themselves, to ask for their state.
    pub(super) fn units(&self) -> Vec<Arc<Unit>> {
        self.units.iter().map(|p| p.unit.clone()).collect()
    }
}

/// The state of `units`.
pub(super) fn states(units: &[Arc<Unit>]) -> ViommuStates {
    ViommuStates {
        viommus: units.iter().map(|unit| unit.state()).collect(),
    }
}

fn unit_config(config: &ViommuConfig) -> UnitConfig {
    UnitConfig {
        id: config.id.clone(),
        mode: match config.mode {
            UnitMode::Scalable => Mode::Scalable,
            UnitMode::Legacy => Mode::Legacy,
        },
        address_width: config.address_width,
        pasid_bits: config.pasid_bits,
        interrupt_remapping: false,
        nested: config.nested,
        bypass: config.bypass,
    }
}

/// A unit's register page.
struct Registers(Arc<Unit>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }
}
