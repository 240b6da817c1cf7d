//! The devices of a VM, built from its configuration.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice, BusError};
use devices::interrupt::IrqLine;
use devices::legacy::{AcpiPower, DebugExit, I8042, Ioapic, PowerEvents, SerialPort};
use devices::pci::root::RootError;
use devices::pci::{ConfigPorts, Ecam, PciRoot, Placement, RootConfig};
use devices::testdev::{Features, NewError, TestDevice};
use devices::virtio::{
    Block, BlockConfig, BlockError, Console, ConsoleError, Net, NetConfig, Rng, RngError, TapError,
    TapSource, VirtioDevice, VirtioPci, VirtioPciError,
};
use viommu::backend::software::EndpointConfig;
use viommu::{GuestRam, Rid};

use super::buses::Buses;
use super::event_loop::Input;
use super::passthrough::{Passed, Passthrough, PassthroughError};
use super::terminal_io::{self, LateFile, PipeInput, SerialInput};
use super::viommus::{ViommuError, Viommus};
use crate::config::{Behind, Mac, SerialMode, Validated};
use crate::interrupts::Interrupts;
use crate::kvm::vcpu::{EventLine, GuestEvent};
use crate::memory::layout::{IOAPIC, Layout};

/// Where the ACPI power registers are.
pub(super) const ACPI_POWER_PORT: u16 = 0x600;
/// The I/O APIC's pin of the power button.
pub(super) const POWER_BUTTON_PIN: u8 = 5;
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

/// The devices of a VM. Dropping them stops them.
pub(super) struct Devices {
    buses: Buses,
    root: Arc<PciRoot>,
    viommus: Viommus,
    // After `viommus`, which let go of them first.
    passed: Vec<Passed>,
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
        ram: &GuestRam,
        interrupts: &Arc<Interrupts>,
        events: &Arc<EventLine>,
        passthrough: Option<&Passthrough>,
    ) -> Result<Self, DeviceError> {
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
        let waiting = match passthrough {
            Some(passthrough) => passthrough.admit(&config.devices, &root)?,
            None => Vec::new(),
        };
        let viommus = Viommus::new(
            &config.viommus,
            &config.platform,
            layout,
            ram,
            interrupts,
            &mmio,
            passthrough.map(|p| &**p.host()),
        )?;
        let mut devices = Self {
            viommus,
            passed: Vec::new(),
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
        devices.add_virtio_iommus(interrupts)?;
        devices.add_virtio(config, interrupts)?;
        devices.add_test_devices(config, interrupts)?;
        if let Some(passthrough) = passthrough {
            devices.passed = passthrough.connect(waiting, &mut devices.viommus, interrupts)?;
        }
        Ok(devices)
    }

    fn add_virtio(
        &mut self,
        config: &Validated,
        interrupts: &Arc<Interrupts>,
    ) -> Result<(), DeviceError> {
        for disk in &config.disks {
            let id = disk.id.as_deref().unwrap_or_default();
            // A name that was made up shows as `disk0`.
            let serial = id.strip_prefix('_').unwrap_or(id).to_owned();
            let device = Block::open(&BlockConfig {
                path: disk.path.clone(),
                readonly: disk.readonly,
                serial,
            })?;
            let behind = Behind::new(disk.iommu, disk.viommu.as_deref());
            self.add_function(device, behind, interrupts)?;
        }
        for (n, net) in config.net.iter().enumerate() {
            let Mac(mac) = net.mac.unwrap_or_else(|| default_mac(n));
            let device = Net::open(NetConfig {
                tap: TapSource::Name(net.tap.clone()),
                mac,
            })?;
            let behind = Behind::new(net.iommu, net.viommu.as_deref());
            self.add_function(device, behind, interrupts)?;
        }
        let behind = Behind::new(config.rng.iommu, config.rng.viommu.as_deref());
        self.add_function(Rng::open(&config.rng.src)?, behind, interrupts)?;

        let console =
            terminal_io::console(&config.console).map_err(|source| DeviceError::Host {
                what: "a descriptor for the console",
                source,
            })?;
        if let Some((console, input)) = console {
            self.console_input = input;
            let behind = Behind::new(config.console.iommu, config.console.viommu.as_deref());
            self.add_function(Console::open(console)?, behind, interrupts)?;
        }
        Ok(())
    }

    fn add_virtio_iommus(&mut self, interrupts: &Arc<Interrupts>) -> Result<(), DeviceError> {
        for (rid, device) in self.viommus.functions() {
            let slot = self.root.reserve(Placement::At(rid))?;
            let msi = interrupts.source(rid, None);
            let port = self
                .viommus
                .port(rid, Behind::Nothing, EndpointConfig::default())?;
            slot.fill(VirtioPci::new(device, port, &*msi)?)?;
        }
        Ok(())
    }

    fn add_test_devices(
        &mut self,
        config: &Validated,
        interrupts: &Arc<Interrupts>,
    ) -> Result<(), DeviceError> {
        for device in &config.test_devices {
            let slot = self.root.reserve(Placement::Any)?;
            let behind = Behind::new(device.iommu, device.viommu.as_deref());
            let remapper = self.viommus.remapper(behind);
            let msi = interrupts.source(slot.rid(), remapper.clone());
            let features = Features {
                pasid_bits: device.pasid_bits,
                ats: device.ats,
                pri: device.pri,
            };
            let function = TestDevice::new(features, &*msi, |page_responses| {
                let endpoint = EndpointConfig {
                    pasid_bits: device.pasid_bits,
                    page_responses: device.pri.then_some(page_responses),
                    messages: Some(interrupts.messages(remapper)),
                    ..EndpointConfig::default()
                };
                self.viommus.port(slot.rid(), behind, endpoint)
            })?;
            slot.fill(Arc::new(function))?;
        }
        Ok(())
    }

    fn add_function(
        &mut self,
        device: Arc<dyn VirtioDevice>,
        behind: Behind<'_>,
        interrupts: &Arc<Interrupts>,
    ) -> Result<Rid, DeviceError> {
        let slot = self.root.reserve(Placement::Any)?;
        let msi = interrupts.source(slot.rid(), self.viommus.remapper(behind));
        let port = self
            .viommus
            .port(slot.rid(), behind, EndpointConfig::default())?;
        let function = VirtioPci::new(device, port, &*msi)?;
        Ok(slot.fill(function)?)
    }

    /// The vIOMMUs.
    pub(super) fn viommus(&self) -> &Viommus {
        &self.viommus
    }

    /// The host's devices.
    pub(super) fn passed(&self) -> &[Passed] {
        &self.passed
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
        // The buses hold the root complex and it holds them: take one of the two apart.
        let _ = self.buses.mmio.remove(self.ecam);
        let _ = self.buses.pio.remove(ConfigPorts::BASE);
        for rid in self.root.rids() {
            // Dropping a function stops it.
            let _ = self.root.remove(rid);
        }
    }
}

/// A locally administered address for the card at this position.
fn default_mac(position: usize) -> Mac {
    Mac([0x02, b'n', b'e', b's', b't', position as u8])
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
