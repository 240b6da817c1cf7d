//! The devices of a VM, built from its configuration.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice, BusError};
use devices::counters::Counters;
use devices::interrupt::IrqLine;
use devices::legacy::{AcpiPower, DebugExit, I8042, Ioapic, PowerEvents, SerialPort};
use devices::pci::hotplug::{self, HotplugRegisters};
use devices::pci::root::{HostBridge, RootError, Slot};
use devices::pci::{ConfigPorts, Ecam, PciFunction, PciRoot, Placement, RootConfig};
use devices::testdev::{Features, NewError, TestDevice};
use devices::virtio::{
    Block, BlockConfig, BlockError, Console, ConsoleError, Net, NetConfig, Rng, RngError, TapError,
    TapSource, VirtioDevice, VirtioPci, VirtioPciError,
};
use viommu::Rid;
use viommu::backend::Capabilities;
use viommu::backend::software::EndpointConfig;
use vmm_sys_util::eventfd::EventFd;

use super::buses::Buses;
use super::event_loop::Input;
use super::hotplug::{AddError, AtStep, Ejected, New, Plugged, Step};
use super::passthrough::{Passthrough, PassthroughError, Waiting};
use super::slots::Slots;
use super::terminal_io::{self, LateFile, PipeInput, SerialInput};
use super::viommus::{ViommuError, Viommus};
use crate::config::{Behind, Mac, SerialMode, Validated};
use crate::control::{Descriptors, DeviceKind, DeviceNode};
use crate::interrupts::Interrupts;
use crate::kvm::vcpu::{EventLine, GuestEvent};
use crate::kvm::{self, cpuid::Paging};
use crate::memory::layout::{IOAPIC, Layout};

/// Where the ACPI power registers are.
pub(super) const ACPI_POWER_PORT: u16 = 0x600;
/// The I/O APIC's pin of the power button.
pub(super) const POWER_BUTTON_PIN: u8 = 5;
/// Where the hot-plug registers are.
pub(super) const HOTPLUG_PORT: u16 = 0x610;
/// The I/O APIC's pin of their line.
pub(super) const HOTPLUG_PIN: u8 = 6;
/// The port I/O window of the PCI root.
pub(super) const PCI_PORTS: (u16, u16) = (0x1000, 0xffff);

/// Why a device cannot be had: one sentence, with its source's appended.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] BlockError),
    /// A network card.
    #[error(transparent)]
    Net(#[from] TapError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// A vIOMMU.
    #[error(transparent)]
    Viommu(#[from] ViommuError),
    /// The entropy source.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// A virtio function.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// A DMA test engine.
    #[error(transparent)]
    Test(#[from] NewError<ViommuError>),
    /// A device of the host.
    #[error(transparent)]
    Passthrough(#[from] PassthroughError),
    /// The PCI root.
    #[error(transparent)]
    Pci(#[from] RootError),
    /// A bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Nowhere to plug it.
    #[error(
        "all {slots} slots {} are taken; remove a device there first",
        behind.as_ref().map_or("behind no vIOMMU".into(), |id| format!("behind vIOMMU {id}"))
    )]
    NoSlot {
        /// The vIOMMU.
        behind: Option<String>,
        /// How many slots there are.
        slots: usize,
    },
    /// A file for output.
    #[error("{what} file={} cannot be written ({source}); correct the path or its permissions", path.display())]
    Output {
        /// Whose.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no more of something.
    #[error("{what} cannot be had ({source}); raise the limits of this user")]
    Host {
        /// Of what.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

impl From<AddError> for DeviceError {
    fn from(error: AddError) -> Self {
        error.source
    }
}

/// What the host has for the devices of a VM.
pub(super) struct OfHost<'h> {
    /// Its IOMMU, if there are devices for it.
    pub(super) passthrough: Option<Passthrough>,
    /// What its CPUs can.
    pub(super) paging: Paging,
    /// What was opened already.
    pub(super) descriptors: &'h Descriptors,
}

/// The devices of a VM. Dropping them stops them.
pub(super) struct Devices {
    pub(super) buses: Buses,
    pub(super) root: Arc<PciRoot>,
    pub(super) viommus: Viommus,
    // After `viommus`, which let go of them first.
    pub(super) plugged: Vec<Plugged>,
    pub(super) passthrough: Option<Passthrough>,
    /// What the guest was offered of the host's IOMMU at boot, if devices of the host were there.
    pub(super) offered: Option<Capabilities>,
    pub(super) slots: Slots,
    /// The functions that are always there, as clients see them.
    pub(super) fixed: Vec<(Rid, DeviceNode)>,
    /// The functions that stand for units without endpoints, and their units.
    anchors: Vec<(Rid, usize)>,
    pub(super) registers: Arc<HotplugRegisters>,
    pub(super) ejected: Arc<Ejected>,
    /// Device numbers whose last device went without the guest's word.
    pub(super) vanished: u32,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) kvm: Arc<kvm::Vm>,
    /// What the host's CPUs can.
    pub(super) paging: Paging,
    pub(super) layout: Layout,
    /// What was opened for devices already.
    pub(super) descriptors: Descriptors,
    serial: Arc<SerialPort>,
    serial_file: LateFile,
    power_button: Arc<dyn IrqLine>,
    ecam: u64,
    /// What is typed goes here, if not to the serial port.
    console_input: Option<OwnedFd>,
    serial_has_terminal: bool,
}

impl Devices {
    /// Builds everything that `config` names.
    pub(super) fn new(
        config: &Validated,
        layout: &Layout,
        kvm: &Arc<kvm::Vm>,
        interrupts: &Arc<Interrupts>,
        events: &Arc<EventLine>,
        host: OfHost<'_>,
    ) -> Result<Self, DeviceError> {
        let OfHost {
            passthrough,
            paging,
            descriptors,
        } = host;
        let (mmio, pio) = (Arc::new(Bus::mmio()), Arc::new(Bus::pio()));
        let ioapic = Ioapic::new(interrupts.clone());
        mmio.insert(IOAPIC.first, IOAPIC.len(), ioapic.clone())?;
        let power: Arc<dyn PowerEvents> = Arc::new(Power(events.clone()));
        let on_ports =
            |base: u64, length: u64, device: Arc<dyn BusDevice>| pio.insert(base, length, device);
        on_ports(
            ACPI_POWER_PORT.into(),
            AcpiPower::LENGTH,
            Arc::new(AcpiPower(power.clone())),
        )?;
        on_ports(I8042::PORT, 1, Arc::new(I8042(power.clone())))?;
        if config.platform.debug_exit {
            on_ports(DebugExit::PORT, 1, Arc::new(DebugExit(power.clone())))?;
        }
        let serial_file = LateFile::default();
        let output = serial_output(config, &serial_file)?;
        let serial = SerialPort::new(ioapic.line(SerialPort::COM1_IRQ), output);
        let serial = Arc::new(serial.map_err(|source| DeviceError::Host {
            what: "an event for the serial port",
            source,
        })?);
        on_ports(SerialPort::COM1, SerialPort::LENGTH, serial.clone())?;

        let root = PciRoot::new(
            RootConfig {
                mmio32: layout.mmio32.first..=layout.mmio32.last,
                mmio64: layout.mmio64.first..=layout.mmio64.last,
                pio: PCI_PORTS.0.into()..=PCI_PORTS.1.into(),
            },
            mmio.clone(),
            pio.clone(),
            interrupts.clone(),
        );
        let ejected = Ejected::new(&root).map_err(|source| DeviceError::Host {
            what: "an event for hot-plug",
            source,
        })?;
        let ejected = Arc::new(ejected);
        let registers = HotplugRegisters::new(ioapic.line(HOTPLUG_PIN), ejected.clone());
        let registers = Arc::new(registers);
        on_ports(HOTPLUG_PORT.into(), hotplug::LENGTH, registers.clone())?;
        let mut waiting = Vec::with_capacity(config.devices.len());
        for (position, device) in config.devices.iter().enumerate() {
            if let Some(passthrough) = &passthrough {
                let slot = Passthrough::slot(&root, position)?;
                waiting.push(passthrough.admit(device, slot)?);
            }
        }
        let viommus = Viommus::new(
            config,
            layout,
            kvm.ram(),
            interrupts,
            &mmio,
            passthrough
                .as_ref()
                .and_then(|p| p.host())
                .map(|host| &**host),
        )?;
        let mut devices = Self {
            viommus,
            plugged: Vec::new(),
            offered: None,
            passthrough,
            slots: Slots::new([], [], 0),
            anchors: Vec::new(),
            fixed: Vec::new(),
            registers,
            ejected,
            vanished: 0,
            interrupts: interrupts.clone(),
            kvm: kvm.clone(),
            paging,
            layout: layout.clone(),
            descriptors: descriptors.clone(),
            power_button: ioapic.line(POWER_BUTTON_PIN),
            buses: Buses { mmio, pio, ioapic },
            root: root.clone(),
            serial,
            serial_file,
            ecam: layout.ecam.first,
            console_input: None,
            serial_has_terminal: config.serial.mode == SerialMode::Tty,
        };
        let (mmio, pio) = (&devices.buses.mmio, &devices.buses.pio);
        mmio.insert(
            layout.ecam.first,
            layout.ecam.len(),
            Arc::new(Ecam(root.clone())),
        )?;
        pio.insert(
            ConfigPorts::BASE,
            ConfigPorts::LENGTH,
            Arc::new(ConfigPorts::new(root, power)),
        )?;
        devices.add_virtio_iommus()?;
        devices.add_emulated(config)?;
        devices.add_passed(config, waiting)?;
        devices.share_out_slots()?;
        Ok(devices)
    }

    fn add_emulated(&mut self, config: &Validated) -> Result<(), DeviceError> {
        for disk in &config.disks {
            self.add_at_boot(New::Disk(disk))?;
        }
        for net in &config.net {
            self.add_at_boot(New::Net(net))?;
        }
        let behind = Behind::new(config.rng.iommu, config.rng.viommu.as_deref());
        let rng = Rng::open(&config.rng.src)?;
        self.add_fixed(Placement::Any, "__rng", DeviceKind::Rng, rng, behind)?;

        let console =
            terminal_io::console(&config.console).map_err(|source| DeviceError::Host {
                what: "a descriptor for the console",
                source,
            })?;
        if let Some((console, input)) = console {
            self.console_input = input;
            let behind = Behind::new(config.console.iommu, config.console.viommu.as_deref());
            let console = Console::open(console)?;
            let kind = DeviceKind::Console;
            self.add_fixed(Placement::Any, "__console", kind, console, behind)?;
        }
        for device in &config.test_devices {
            self.add_at_boot(New::Test(device))?;
        }
        Ok(())
    }

    fn add_at_boot(&mut self, new: New<'_>) -> Result<(), DeviceError> {
        let slot = self.root.reserve(Placement::Any)?;
        let plugged = self.plug_emulated(slot, new)?;
        self.plugged.push(plugged);
        Ok(())
    }

    /// All of them are placed first: each can make a unit offer less to the others. Nothing else
    /// is put behind a vIOMMU before the guest starts.
    fn add_passed(&mut self, config: &Validated, waiting: Vec<Waiting>) -> Result<(), DeviceError> {
        let Some(passthrough) = &self.passthrough else {
            return Ok(());
        };
        for device in &waiting {
            passthrough.place(device, &mut self.viommus)?;
        }
        for (device, config) in waiting.into_iter().zip(&config.devices) {
            let rid = device.rid();
            let passed =
                passthrough.connect(device, &self.viommus, &self.interrupts, &self.buses.ioapic)?;
            let home = self.viommus.home(New::Device(config).behind());
            self.plugged
                .push(Plugged::new(New::Device(config), rid, home, Some(passed)));
        }
        self.offered = passthrough.freeze();
        Ok(())
    }

    /// Decides where devices may come and go from now on. A VT-d unit without endpoints gets a
    /// function to name: Linux does not use a unit that names no device that is there, also later
    /// when one comes.
    fn share_out_slots(&mut self) -> Result<(), DeviceError> {
        for unit in self.viommus.without_endpoints() {
            let slot = self.root.reserve(Placement::Any)?;
            let rid = slot.fill(Arc::new(HostBridge::default()))?;
            self.anchors.push((rid, unit));
        }
        let removable = self
            .plugged
            .iter()
            .map(|plugged| (plugged.rid, plugged.home));
        let removable: Vec<_> = removable.collect();
        let is_removable = |rid: &Rid| removable.iter().any(|(other, _)| other == rid);
        let fixed = self
            .root
            .rids()
            .into_iter()
            .filter(|rid| !is_removable(rid));
        self.slots = Slots::new(fixed, removable.iter().copied(), self.viommus.count());
        for (rid, _) in &removable {
            self.registers.occupy(rid.device(), false);
        }
        Ok(())
    }

    /// Fixes what the guest sees of vIOMMUs, and tells it in ACPI tables.
    pub(super) fn freeze(&self) -> Result<Vec<Vec<u8>>, DeviceError> {
        Ok(self.viommus.freeze(&self.slots, &self.anchors)?)
    }

    /// The device numbers where devices may come and go, one bit each.
    pub(super) fn slots(&self) -> u32 {
        self.slots.mask()
    }

    fn add_virtio_iommus(&mut self) -> Result<(), DeviceError> {
        for (id, rid, device) in self.viommus.functions() {
            let kind = DeviceKind::Viommu;
            self.add_fixed(Placement::At(rid), &id, kind, device, Behind::Nothing)?;
        }
        Ok(())
    }

    /// A virtio device that stays as long as the VM.
    fn add_fixed(
        &mut self,
        placement: Placement,
        id: &str,
        kind: DeviceKind,
        device: Arc<dyn VirtioDevice>,
        behind: Behind<'_>,
    ) -> Result<(), DeviceError> {
        let slot = self.root.reserve(placement)?;
        let rid = self.plug_virtio(slot, device, behind)?;
        let viommu = self.viommus.name(self.viommus.home(behind));
        let node = DeviceNode {
            id: id.into(),
            pci_bdf: format!("0000:{rid}"),
            kind,
            viommu: viommu.map(str::to_owned),
            removable: false,
            removing: false,
        };
        self.fixed.push((rid, node));
        Ok(())
    }

    /// What was opened for `new`, if its configuration says that something was.
    fn descriptor(&self, new: New<'_>, fd: Option<u32>) -> Result<Option<OwnedFd>, DeviceError> {
        let its = fd.map(|_| self.descriptors.of(new.id()));
        its.transpose().map_err(|source| DeviceError::Host {
            what: "the descriptor of a device",
            source,
        })
    }

    /// Builds an emulated device in `slot`, and tells nobody.
    pub(super) fn plug_emulated(&mut self, slot: Slot, new: New<'_>) -> Result<Plugged, AddError> {
        let behind = new.behind();
        let rid = match new {
            New::Disk(disk) => {
                let config = BlockConfig {
                    path: disk.path.clone(),
                    readonly: disk.readonly,
                    // A name that was made up shows as `disk0`.
                    serial: new.id().strip_prefix('_').unwrap_or(new.id()).to_owned(),
                };
                let device = match self.descriptor(new, disk.fd).at(Step::Open)? {
                    Some(descriptor) => Block::adopt(&config, descriptor),
                    None => Block::open(&config),
                };
                self.plug_virtio(slot, device.at(Step::Open)?, behind)?
            }
            New::Net(net) => {
                let Mac(mac) = net.mac.unwrap_or_default();
                let device = Net::open(NetConfig {
                    tap: match self.descriptor(new, net.fd).at(Step::Open)? {
                        Some(fd) => TapSource::Fd(fd),
                        None => TapSource::Name(net.tap.clone()),
                    },
                    mac,
                });
                self.plug_virtio(slot, device.at(Step::Open)?, behind)?
            }
            New::Test(device) => {
                let remapper = self.viommus.remapper_of(slot.rid(), behind);
                let msi = self.interrupts.source(slot.rid(), remapper.clone());
                let features = Features {
                    pasid_bits: device.pasid_bits,
                    ats: device.ats,
                    pri: device.pri,
                };
                let function = TestDevice::new(features, &*msi, |page_responses| {
                    let endpoint = EndpointConfig {
                        pasid_bits: device.pasid_bits,
                        page_responses: device.pri.then_some(page_responses),
                        messages: Some(self.interrupts.messages(remapper)),
                        ..EndpointConfig::default()
                    };
                    self.viommus.port(slot.rid(), behind, endpoint)
                });
                let rid = slot.rid();
                match function {
                    Ok(function) => self.fill(slot, Arc::new(function))?,
                    Err(source) => {
                        self.viommus.remove(rid);
                        let step = match source {
                            NewError::Port(_) => Step::Viommu,
                            _ => Step::Function,
                        };
                        return Err(source).at(step);
                    }
                }
            }
            New::Device(_) => return Err(RootError::NoFunction(slot.rid())).at(Step::Open),
        };
        Ok(Plugged::new(new, rid, self.viommus.home(behind), None))
    }

    fn plug_virtio(
        &mut self,
        slot: Slot,
        device: Arc<dyn VirtioDevice>,
        behind: Behind<'_>,
    ) -> Result<Rid, AddError> {
        let rid = slot.rid();
        let remapper = self.viommus.remapper_of(rid, behind);
        let msi = self.interrupts.source(rid, remapper);
        let port = self
            .viommus
            .port(rid, behind, EndpointConfig::default())
            .at(Step::Viommu)?;
        match VirtioPci::new(device, port, &*msi) {
            Ok(function) => self.fill(slot, function),
            Err(source) => {
                self.viommus.remove(rid);
                Err(source).at(Step::Function)
            }
        }
    }

    /// The last step: the function is on the bus.
    fn fill(&mut self, slot: Slot, function: Arc<dyn PciFunction>) -> Result<Rid, AddError> {
        let rid = slot.rid();
        slot.fill(function)
            .inspect_err(|_| self.viommus.remove(rid))
            .at(Step::Bus)
    }

    /// The vIOMMUs.
    pub(super) fn viommus(&self) -> &Viommus {
        &self.viommus
    }

    /// What counts, by the names of the devices.
    pub(super) fn counting(&self) -> Vec<(String, Vec<Arc<dyn Counters>>)> {
        let plugged = self.plugged.iter().map(|p| (p.rid, &p.id));
        let fixed = self.fixed.iter().map(|(rid, node)| (*rid, &node.id));
        let all = plugged.chain(fixed).filter_map(|(rid, id)| {
            let function = self.root.function(rid)?;
            Some((id.clone(), function.counters()))
        });
        all.collect()
    }

    /// What wakes the event loop for [`ejected`](Self::ejected).
    pub(super) fn ejection(&self) -> &EventFd {
        self.ejected.event()
    }

    /// The last step of building a VM: opens the files that a VM which cannot be built would
    /// leave behind.
    pub(super) fn open_files(
        &self,
        config: &Validated,
        first_boot: bool,
    ) -> Result<(), DeviceError> {
        let Some(path) = &config.serial.file else {
            return Ok(());
        };
        self.serial_file
            .open(path, first_boot)
            .map_err(|source| DeviceError::Output {
                what: "serial",
                path: path.clone(),
                source,
            })
    }

    /// Where vCPUs' exits go.
    pub(super) fn buses(&self) -> &Buses {
        &self.buses
    }

    /// The device that has the terminal.
    pub(super) fn typed_into(&mut self) -> Option<Box<dyn Input>> {
        match self.console_input.take() {
            Some(pipe) => Some(Box::new(PipeInput::new(pipe))),
            None if self.serial_has_terminal => Some(Box::new(SerialInput(self.serial.clone()))),
            None => None,
        }
    }

    /// The power button.
    pub(super) fn power_button(&self) -> Arc<dyn IrqLine> {
        self.power_button.clone()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // They do DMA until they are stopped: what a vIOMMU that has gone no longer translates
        // would be faults of the host.
        for passed in self.plugged.iter().filter_map(|p| p.passed.as_ref()) {
            passed.stop();
        }
        // The buses hold the root complex and it holds them: take one of the two apart.
        let _ = self.buses.mmio.remove(self.ecam);
        let _ = self.buses.pio.remove(ConfigPorts::BASE);
        for rid in self.root.rids() {
            // Dropping a function stops it.
            let _ = self.root.remove(rid);
        }
        self.viommus.release();
    }
}

fn serial_output(
    config: &Validated,
    file: &LateFile,
) -> Result<Box<dyn Write + Send>, DeviceError> {
    match config.serial.mode {
        SerialMode::Tty => match terminal_io::stdout() {
            // Not through Rust's buffer: the guest's prompt has no newline.
            Ok(stdout) => Ok(Box::new(File::from(stdout))),
            Err(source) => Err(DeviceError::Host {
                what: "a descriptor of standard output",
                source,
            }),
        },
        SerialMode::File => Ok(Box::new(file.clone())),
        SerialMode::Null => Ok(Box::new(io::sink())),
    }
}

/// The guest's wishes, to the event loop.
struct Power(Arc<EventLine>);

impl PowerEvents for Power {
    fn reset(&self) {
        self.0.report(GuestEvent::Reset);
    }

    fn power_off(&self) {
        self.0.report(GuestEvent::PowerOff);
    }

    fn debug_exit(&self, status: u8) {
        self.0.report(GuestEvent::DebugExit(status));
    }
}
