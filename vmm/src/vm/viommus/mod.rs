//! The vIOMMUs of a VM and what is behind them: the software engine, VT-d units on the memory
//! bus, virtio-iommus on the PCI bus, and the tables (DMAR, VIOT) that tell the guest.

#![forbid(unsafe_code)]

mod error;
mod front_end;
mod units;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use devices::bus::Bus;
use devices::passthrough::Before;
use devices::virtio::VirtioIommu;
use viommu::backend::Backend;
use viommu::backend::iommufd::HostIommu;
use viommu::backend::software::{Config, EndpointConfig, Engine};
use viommu::dma::DmaPort;
use viommu::doorbell::Doorbell;
use viommu::reserved::Regions;
use viommu::spec::vtd::dmar::{Dmar, Drhd, Oem, Scope};
use viommu::virtio::viot::{self, Topology};
use viommu::virtio::{self, Iommu};
use viommu::vtd::{
    Connections, InterruptRemapper, Mode, REGISTERS_SIZE, Unit, UnitConfig, check_agreement,
};
use viommu::{GuestRam, Rid};

pub use self::error::ViommuError;
use self::front_end::Registers;
pub(super) use self::front_end::{FrontEnd, counters, states};
pub use self::front_end::{ViommuState, ViommuStates};
use self::units::{doorbell, mode_of_units, unit_config};
use super::observed::{Observed, Told};
use super::pasids::VmPasids;
use super::slots::{Home, Slots};
use crate::config::{Behind, ViommuConfig, ViommuKind, VmConfig};
use crate::control::Events;
use crate::interrupts::doorbell::MappedDoorbell;
use crate::interrupts::remapping::RemappingUnit;
use crate::interrupts::{Interrupts, Remapper};
use crate::kvm::cpuid::Paging;
use crate::memory::layout::{Layout, VTD_UNITS};

/// The I/O APIC's ID, in the MADT and in the DMAR table.
pub(super) const IOAPIC_ID: u8 = 0;
/// The source-id of its interrupts: an address where no function is.
const IOAPIC_SOURCE: Rid = Rid::new(0xff, 0x1f, 0);

/// The vIOMMUs of a VM.
pub(super) struct Viommus {
    ram: GuestRam,
    engine: Engine,
    placed: Vec<Placed>,
    address_width: u8,
    pasids: Arc<VmPasids>,
    told: Told,
    interrupts: Arc<Interrupts>,
    /// Of endpoints whose doorbell is mapped; as long as they are there.
    doorbells: BTreeMap<Rid, Weak<MappedDoorbell>>,
    /// With interrupt remapping: the unit of everything that is behind no other, which remaps
    /// interrupts only. Where some are remapped, Linux gives none to a function without a unit.
    rest: Option<FrontEnd>,
}

/// A vIOMMU and its place in the guest.
struct Placed {
    front: FrontEnd,
    endpoints: Vec<Rid>,
    /// The guest may have PASIDs of the host from it.
    vcmd: bool,
    /// The software engine and, once there is one, the host's IOMMU, as it sees them: one each, so
    /// that it knows endpoints of the same back end by it.
    engine: Arc<Observed>,
    /// The host's, for as long as an endpoint of it is there.
    host: Weak<Observed>,
    /// How interrupts from behind it reach their doorbell.
    doorbell: Doorbell,
}

impl Viommus {
    /// vIOMMUs as `vm` says, with no endpoints. VT-d units are on the bus then; virtio ones
    /// are put on the PCI bus by [`functions`](Self::functions).
    ///
    /// `host` has the devices that will be passed through: a virtio-iommu never offers more than
    /// they can.
    pub(super) fn new(
        vm: &VmConfig,
        layout: &Layout,
        ram: &GuestRam,
        interrupts: &Arc<Interrupts>,
        mmio: &Bus,
        host: Option<&HostIommu>,
    ) -> Result<Self, ViommuError> {
        let engine = Engine::with_config(
            ram.clone(),
            Config {
                host_address_width: layout.address_width,
                doorbell: vm.viommus.iter().find_map(|config| match doorbell(config) {
                    Doorbell::Mapped(first) => Some(first),
                    Doorbell::Intercepted => None,
                }),
                ..Config::for_ram(ram)
            },
        );
        let configs = &vm.viommus;
        let nests = host.is_none_or(|host| host.capabilities().stage1);
        let mode = mode_of_units(vm, nests);
        let of_vtd = configs.iter().filter(|c| c.kind == ViommuKind::Vtd);
        check_agreement(&of_vtd.map(|c| unit_config(c, mode)).collect::<Vec<_>>())?;
        let told = Told::default();
        let mut viommus = Self {
            ram: ram.clone(),
            engine,
            placed: Vec::with_capacity(configs.len()),
            address_width: layout.address_width,
            pasids: Arc::new(VmPasids::new(&vm.platform, &told)),
            told,
            interrupts: interrupts.clone(),
            doorbells: BTreeMap::new(),
            rest: None,
        };
        for (n, config) in configs.iter().enumerate() {
            let front = match config.kind {
                ViommuKind::Vtd => {
                    viommus.vtd_unit(n, unit_config(config, mode), config.vcmd, interrupts, mmio)?
                }
                ViommuKind::Virtio => viommus.virtio_unit(n, config, host)?,
            };
            let engine = Arc::new(viommus.engine.clone());
            viommus.placed.push(Placed {
                engine: Observed::new(engine, front.id(), &viommus.told),
                host: Weak::new(),
                front,
                endpoints: Vec::new(),
                vcmd: config.vcmd,
                doorbell: doorbell(config),
            });
        }
        let remaps = |c: &&ViommuConfig| c.kind == ViommuKind::Vtd && c.interrupt_remapping;
        if configs.iter().any(|config| remaps(&config)) {
            let rest = UnitConfig {
                id: "interrupts".into(),
                mode: Mode::Legacy,
                interrupt_remapping: true,
                interrupts_only: true,
                ..UnitConfig::default()
            };
            let at = configs.len();
            viommus.rest = Some(viommus.vtd_unit(at, rest, false, interrupts, mmio)?);
        }
        Ok(viommus)
    }

    fn vtd_unit(
        &self,
        n: usize,
        config: UnitConfig,
        vcmd: bool,
        interrupts: &Arc<Interrupts>,
        mmio: &Bus,
    ) -> Result<FrontEnd, ViommuError> {
        let remapping = config
            .interrupt_remapping
            .then(|| RemappingUnit::new(self.ram.clone(), interrupts));
        let unit = Unit::new(
            config,
            Connections {
                ram: self.ram.clone(),
                msi: interrupts.clone(),
                backends: vec![Arc::new(self.engine.clone())],
                remapper: remapping.clone().map(|r| r as Arc<dyn InterruptRemapper>),
                pasids: vcmd.then(|| self.pasids.clone() as _),
            },
        )?;
        if let Some(remapping) = &remapping {
            remapping.belongs_to(&unit);
            // The I/O APIC is behind the first of them.
            if self.placed.iter().all(|p| p.front.remapper().is_none()) {
                interrupts.remap_pins(IOAPIC_SOURCE, &(remapping.clone() as Arc<dyn Remapper>));
            }
        }
        let base = VTD_UNITS.first + n as u64 * REGISTERS_SIZE;
        mmio.insert(base, REGISTERS_SIZE, Arc::new(Registers(unit.clone())))?;
        Ok(FrontEnd::Vtd {
            unit,
            base,
            remapping,
        })
    }

    fn virtio_unit(
        &self,
        n: usize,
        config: &ViommuConfig,
        host: Option<&HostIommu>,
    ) -> Result<FrontEnd, ViommuError> {
        let (capabilities, reserved) = match host {
            Some(host) => (
                self.engine.capabilities().and(host.capabilities()),
                host.reserved().iter().count(),
            ),
            None => (self.engine.capabilities(), 0),
        };
        let offer = virtio::Config::compose(&capabilities, reserved)?;
        Ok(FrontEnd::Virtio {
            id: config.id.clone(),
            unit: Arc::new(Iommu::new(virtio::Config {
                bypass: config.bypass,
                attach_table: config.attach_table,
                gpa_bits: offer.gpa_bits.min(self.address_width),
                doorbell: doorbell(config),
                ..offer
            })),
            // From the end of the bus, so that other devices have the same place with and without.
            rid: Rid::new(0, 31 - n as u8, 0),
        })
    }

    /// Tells `events` of faults and refusals from now on.
    pub(super) fn tell(&self, events: Arc<Events>) {
        // Called once, before the first vCPU runs.
        let _ = self.told.set(events);
    }

    /// The PCI functions that virtio-iommus are, with their names, and where they go.
    pub(super) fn functions(&self) -> Vec<(String, Rid, Arc<VirtioIommu>)> {
        let virtio = self.placed.iter().filter_map(|placed| match &placed.front {
            FrontEnd::Virtio { id, unit, rid } => {
                Some((id.clone(), *rid, VirtioIommu::new(unit.clone())))
            }
            FrontEnd::Vtd { .. } => None,
        });
        virtio.collect()
    }

    /// The way to guest memory of the emulated device at `rid`, which can do what `endpoint` says.
    pub(super) fn port(
        &mut self,
        rid: Rid,
        behind: Behind<'_>,
        mut endpoint: EndpointConfig,
    ) -> Result<DmaPort, ViommuError> {
        let mapped = self.mapped_doorbell(rid, behind);
        // The configuration was validated: a device that names a vIOMMU finds it.
        let Some(placed) = self.find(behind).and_then(|at| self.placed.get_mut(at)) else {
            return Ok(DmaPort::direct(self.ram.clone()));
        };
        self.pasids.limit(endpoint.pasid_bits)?;
        endpoint.doorbell = placed.doorbell;
        if let Some(mapped) = mapped {
            endpoint.messages = Some(mapped);
        }
        let port = self.engine.add_endpoint(rid, endpoint)?;
        let engine = placed.engine.clone();
        if let Err(why) = placed.front.add(rid, engine, Regions::new()) {
            self.engine.remove_endpoint(rid);
            return Err(why);
        }
        placed.endpoints.push(rid);
        Ok(port)
    }

    /// Puts the host's device `rid` there. It is blocked from here on, until the guest has put it
    /// to use; in front of nothing it stays as it is.
    pub(super) fn pass_through(
        &mut self,
        rid: Rid,
        behind: Behind<'_>,
        host: &Arc<HostIommu>,
    ) -> Result<(), ViommuError> {
        let Some(placed) = self.find(behind).and_then(|at| self.placed.get_mut(at)) else {
            return Ok(());
        };
        self.pasids.limit(host.pasid_bits(rid))?;
        let back_end = placed.host.upgrade().unwrap_or_else(|| {
            let new = Observed::new(host.clone(), placed.front.id(), &self.told);
            placed.host = Arc::downgrade(&new);
            new
        });
        placed.front.add(rid, back_end, host.reserved())?;
        placed.endpoints.push(rid);
        Ok(())
    }

    /// What stands before a device that is there, in a guest whose CPUs have `paging`. Fixes what
    /// that vIOMMU offers.
    pub(super) fn before(&self, behind: Behind<'_>, paging: Paging) -> Before {
        let placed = self.find(behind).and_then(|at| self.placed.get(at));
        placed.map_or(Before::Nothing, |placed| Before::Viommu {
            offered: placed.front.offered(),
            cpu_width: paging.width(),
        })
    }

    /// What the guest's CPUs may have of the `host`'s ways of paging: a device that shares a
    /// process's tables must be able to walk them, and Linux has no SVA where one cannot. Fixes
    /// what every vIOMMU offers.
    pub(super) fn paging(&self, host: Paging) -> Paging {
        let offers = self.placed.iter().map(|placed| placed.front.offered());
        let with_pasids = offers.filter(|offered| offered.stage1 && offered.pasid_bits > 0);
        with_pasids.fold(host, |paging, offered| Paging {
            five_levels: paging.five_levels && offered.stage1_57,
            pages_1g: paging.pages_1g && offered.stage1_1g,
        })
    }

    /// Takes the endpoint `rid` away from what it is behind, whatever the guest does: its DMA is
    /// blocked and nothing is kept for it.
    pub(super) fn remove(&mut self, rid: Rid) {
        for placed in &mut self.placed {
            if placed.endpoints.contains(&rid) {
                placed.endpoints.retain(|other| *other != rid);
                placed.front.remove(rid);
            }
        }
        // Where it is a device of the host, its back end is asked by its own way out.
        self.engine.remove_endpoint(rid);
    }

    /// Takes all endpoints away. Whoever still looks at a vIOMMU then keeps nothing of the host's.
    pub(super) fn release(&mut self) {
        for placed in &mut self.placed {
            for rid in std::mem::take(&mut placed.endpoints) {
                placed.front.remove(rid);
            }
        }
    }

    /// Which vIOMMU that is.
    pub(super) fn home(&self, behind: Behind<'_>) -> Home {
        self.find(behind)
    }

    /// The name of a vIOMMU.
    pub(super) fn name(&self, home: Home) -> Option<&str> {
        Some(self.placed.get(home?)?.front.id())
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.placed.len()
    }

    /// The VT-d units that nothing is behind.
    pub(super) fn without_endpoints(&self) -> Vec<usize> {
        let units = self.placed.iter().enumerate();
        let bare = units.filter(|(_, placed)| {
            matches!(placed.front, FrontEnd::Vtd { .. }) && placed.endpoints.is_empty()
        });
        bare.map(|(at, _)| at).collect()
    }

    /// Who remaps the interrupts of the emulated device `rid`, which is there or will be.
    pub(super) fn remapper_of(
        &mut self,
        rid: Rid,
        behind: Behind<'_>,
    ) -> Option<Arc<dyn Remapper>> {
        match self.mapped_doorbell(rid, behind) {
            Some(mapped) => Some(mapped),
            None => self.remapper(behind),
        }
    }

    /// What leads the interrupts of `rid` to a doorbell that is mapped, if it is.
    fn mapped_doorbell(&mut self, rid: Rid, behind: Behind<'_>) -> Option<Arc<MappedDoorbell>> {
        let placed = self.placed.get(self.find(behind)?)?;
        if placed.doorbell == Doorbell::Intercepted {
            return None;
        }
        self.doorbells.retain(|_, known| known.strong_count() > 0);
        if let Some(known) = self.doorbells.get(&rid).and_then(Weak::upgrade) {
            return Some(known);
        }
        let new = MappedDoorbell::new(rid, self.engine.downgrade(), &self.interrupts);
        self.doorbells.insert(rid, Arc::downgrade(&new));
        Some(new)
    }

    /// Who remaps the interrupts of a device that is there.
    pub(super) fn remapper(&self, behind: Behind<'_>) -> Option<Arc<dyn Remapper>> {
        let placed = self.find(behind).and_then(|at| self.placed.get(at));
        let own = placed.and_then(|placed| placed.front.remapper());
        own.or_else(|| self.rest.as_ref()?.remapper())
    }

    fn find(&self, behind: Behind<'_>) -> Option<usize> {
        match behind {
            Behind::Nothing => None,
            Behind::Default => Some(0),
            Behind::Named(id) => self.placed.iter().position(|p| p.front.id() == id),
        }
    }

    /// Fixes what the guest sees, and tells it in ACPI tables.
    ///
    /// Each vIOMMU names its endpoints one by one, those that may come too: a device that it does
    /// not name is behind none. `anchors` are functions that do no DMA, with the units that name
    /// them.
    pub(super) fn freeze(
        &self,
        slots: &Slots,
        anchors: &[(Rid, usize)],
    ) -> Result<Vec<Vec<u8>>, ViommuError> {
        let (mut units, mut topologies) = (Vec::new(), Vec::new());
        let mut interrupt_remapping = false;
        let mut pasid_bits = None;
        for (at, placed) in self.placed.iter().enumerate() {
            let anchors = anchors.iter().filter(|(_, unit)| *unit == at);
            let mut endpoints: BTreeSet<Rid> = slots.of(Some(at)).collect();
            endpoints.extend(&placed.endpoints);
            endpoints.extend(anchors.map(|(rid, _)| rid));
            match &placed.front {
                FrontEnd::Vtd {
                    unit,
                    base,
                    remapping,
                } => {
                    let offer = unit.freeze();
                    if placed.vcmd {
                        if !offer.ecap.vcs() {
                            return Err(ViommuError::NoPasids(unit.config().id.clone()));
                        }
                        let bits = offer.pasid_bits();
                        pasid_bits = Some(pasid_bits.unwrap_or(bits).min(bits));
                    }
                    let mut scopes: Vec<Scope> =
                        endpoints.into_iter().map(Scope::Endpoint).collect();
                    if remapping.is_some() && !interrupt_remapping {
                        interrupt_remapping = true;
                        scopes.push(Scope::Ioapic {
                            id: IOAPIC_ID,
                            source: IOAPIC_SOURCE,
                        });
                    }
                    units.push(Drhd {
                        include_pci_all: false,
                        register_base: *base,
                        scopes,
                    });
                }
                FrontEnd::Virtio { rid, .. } => {
                    topologies.push(Topology::devices(*rid, endpoints)?);
                }
            }
        }
        if let Some(FrontEnd::Vtd { unit, base, .. }) = &self.rest {
            unit.freeze();
            // The last, as it must be: what no scope before it names.
            units.push(Drhd {
                include_pci_all: true,
                register_base: *base,
                scopes: Vec::new(),
            });
        }
        if let Some(bits) = pasid_bits {
            self.pasids.open(bits)?;
        }
        let mut tables = Vec::new();
        if !units.is_empty() {
            let table = Dmar {
                host_address_width: self.address_width,
                interrupt_remapping,
                units,
                ..Dmar::default()
            };
            tables.push(table.to_bytes(Oem::default()));
        }
        if !topologies.is_empty() {
            tables.push(viot::table(&topologies)?);
        }
        Ok(tables)
    }

    /// The front ends, to ask for their state.
    pub(super) fn front_ends(&self) -> Vec<FrontEnd> {
        let placed = self.placed.iter().map(|p| &p.front);
        placed.chain(&self.rest).cloned().collect()
    }
}
