//! A VM from its configuration to its end.
//!
//! [`run`] builds the VM, runs it, and builds it again after a reboot. Building is in the order
//! in which a mistake of the user is cheapest to tell: memory, kernel, devices, then vCPUs.
//! Nothing is left behind when any of it fails.

mod buses;
mod devices;
mod event_loop;
mod pasids;
mod passthrough;
mod terminal_io;
mod viommus;

use std::io;
use std::sync::Arc;

use ::devices::interrupt::IrqLine;
use vm_memory::{Bytes, GuestAddress};

pub use devices::DeviceError;
pub use passthrough::PassthroughError;
pub use viommus::{ViommuError, ViommuState, ViommuStates};

use self::devices::Devices;
use self::event_loop::{OnSignal, Signals, Wake, Watched};
use self::passthrough::Passthrough;
use crate::acpi::{self, Platform};
use crate::boot::{self, ACPI_AREA, BootError};
use crate::config::{OnReboot, Validated};
use crate::interrupts::Interrupts;
use crate::kvm::vcpu::{EventLine, Exits, GuestEvent, VcpuThreads};
use crate::kvm::{self, Host, KvmError, cpuid, registers};
use crate::memory::layout::{self, IOAPIC, LayoutError};
use crate::memory::ram::{self, RamError};
use crate::outcome::Outcome;
use crate::terminal::RawMode;

/// Why a VM does not run, or did not go on: one sentence, with its sources' appended.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The physical address map.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The kernel or the initramfs.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// ACPI.
    #[error(transparent)]
    Acpi(#[from] acpi::TooLarge),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The host refused something small.
    #[error("{what} cannot be had ({source}); raise the limits of this user")]
    Host {
        /// What.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A vCPU cannot go on.
    #[error("{0}")]
    Failed(String),
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}

/// Runs the VM that `config` describes until it ends.
///
/// # Errors
/// It cannot be built, or nestling or KVM cannot go on.
pub fn run(config: &Validated) -> Result<Outcome, VmError> {
    let kvm = Host::open()?;
    // Before any thread, so that all of them leave the signals to the event loop.
    let mut signals = Signals::block().map_err(host("a descriptor for signals"))?;
    let mut first_boot = true;
    loop {
        let vm = Vm::build(config, &kvm, first_boot)?;
        first_boot = false;
        let wake;
        (wake, signals) = vm.run(signals)?;
        match wake {
            Wake::Guest(GuestEvent::Reset) if config.platform.on_reboot == OnReboot::Restart => {
                log::info!("the guest reboots");
            }
            Wake::Guest(GuestEvent::Reset) => return Ok(Outcome::Reboot),
            Wake::Guest(GuestEvent::PowerOff) => return Ok(Outcome::PowerOff),
            Wake::Guest(GuestEvent::TripleFault) => return Ok(Outcome::TripleFault),
            Wake::Guest(GuestEvent::DebugExit(status)) => return Ok(Outcome::DebugExit(status)),
            Wake::Guest(GuestEvent::Failed(why)) => return Err(VmError::Failed(why)),
            Wake::Signal(number) => return Ok(Outcome::Signal(number)),
        }
    }
}

/// A VM that was built. Fields are dropped in this order: first what uses the others.
struct Vm {
    vcpus: Vec<kvm_ioctls::VcpuFd>,
    devices: Devices,
    _passthrough: Option<Passthrough>,
    kvm: Arc<kvm::Vm>,
    events: Arc<EventLine>,
}

impl Vm {
    fn build(config: &Validated, host_kvm: &Host, first_boot: bool) -> Result<Self, VmError> {
        let size = config.memory.size.0;
        let reserved = passthrough::reserved(&config.devices).map_err(DeviceError::from)?;
        let layout = layout::compose(size, host_kvm.address_width(), &reserved)?;
        let ram = ram::allocate(&config.memory, &layout)?;
        let memory_map = boot::memory_map(&layout);
        let (entry, iommu) = passthrough::open_during(&config.devices, &ram, || {
            boot::load(&ram, &layout, &config.payload, &memory_map, ACPI_AREA.first)
        });
        let (entry, iommu) = (entry?, iommu.map_err(DeviceError::from)?);

        let cpus = config.cpus.boot_vcpus;
        let kvm = Arc::new(host_kvm.create_vm(ram.clone(), cpus)?);
        let interrupts = Interrupts::new(kvm.fd().clone());
        let events = Arc::new(EventLine::new().map_err(host("an event descriptor"))?);
        let passthrough = iommu.map(|iommu| Passthrough::new(iommu, &kvm)).transpose();
        let passthrough = passthrough.map_err(DeviceError::from)?;
        let devices = Devices::new(
            config,
            &layout,
            &ram,
            &interrupts,
            &events,
            passthrough.as_ref(),
        )?;

        let extra = devices.viommus().freeze().map_err(DeviceError::from)?;
        let tables = acpi::tables(&platform(&layout, cpus, &extra), ACPI_AREA)?;
        ram.write_slice(&tables.bytes, GuestAddress(tables.at))
            .map_err(|_| BootError::Write { at: tables.at })?;

        let mut vcpus = Vec::with_capacity(cpus.into());
        for index in 0..cpus {
            let vcpu = kvm.create_vcpu(index)?;
            let cpuid = cpuid::compose(host_kvm.cpuid(), index, cpus, host_kvm.tsc_deadline());
            registers::set_up(&vcpu, index, &cpuid, (index == 0).then_some(entry))?;
            vcpus.push(vcpu);
        }
        devices.open_files(config, first_boot)?;
        Ok(Self {
            vcpus,
            devices,
            _passthrough: passthrough,
            kvm,
            events,
        })
    }

    fn run(mut self, signals: Signals) -> Result<(Wake, Signals), VmError> {
        let typed_into = self.devices.typed_into();
        let _raw = match typed_into {
            Some(_) => RawMode::enter().map_err(host("the terminal in raw mode"))?,
            None => None,
        };
        let exits: Arc<dyn Exits> = Arc::new(self.devices.buses().clone());
        let vcpus = std::mem::take(&mut self.vcpus);
        let mut threads = VcpuThreads::start(&self.kvm, vcpus, &exits, &self.events)?;
        let front_ends = self.devices.viommus().front_ends();
        let watched = self.watched()?;
        let on_signal = OnSignal {
            user1: Box::new(move || print_state(&front_ends)),
            power: Box::new(press(self.devices.power_button())),
        };
        let ended = event_loop::run(self.events.clone(), signals, on_signal, typed_into, watched);
        threads.stop();
        ended.map_err(host("the event loop"))
    }

    /// What the host says of its devices while the guest has them.
    fn watched(&self) -> Result<Vec<Watched>, DeviceError> {
        let mut watched = Vec::new();
        for passed in self.devices.passed() {
            let path = passed.path().display().to_string();
            let (failed, wanted) = passed.events()?;
            let (events, what) = (self.events.clone(), path.clone());
            watched.push(Watched {
                event: failed,
                act: Box::new(move || {
                    // What the device does from now on is undefined.
                    events.report(GuestEvent::Failed(format!(
                        "device path={what} had an uncorrected error; see the kernel's log of the host"
                    )));
                }),
            });
            let press = press(self.devices.power_button());
            watched.push(Watched {
                event: wanted,
                act: Box::new(move || {
                    log::warn!(
                        "the host wants device path={path} back: the guest is asked to power off"
                    );
                    press();
                }),
            });
        }
        Ok(watched)
    }
}

/// Presses the power button.
fn press(button: Arc<dyn IrqLine>) -> impl Fn() {
    move || {
        button.set(true);
        button.set(false);
    }
}

/// Prints the live state as one line of JSON.
fn print_state(front_ends: &[viommus::FrontEnd]) {
    match serde_json::to_string(&viommus::states(front_ends)) {
        Ok(text) => eprintln!("{text}"),
        Err(why) => log::error!("the state cannot be printed: {why}"),
    }
}

fn platform<'a>(layout: &'a layout::Layout, vcpus: u8, extra: &'a [Vec<u8>]) -> Platform<'a> {
    use ::devices::legacy::{AcpiPower, SerialPort};
    let power = |offset: u64| devices::ACPI_POWER_PORT + offset as u16;
    Platform {
        layout,
        pio: devices::PCI_PORTS,
        vcpus,
        ioapic_id: viommus::IOAPIC_ID,
        ioapic: IOAPIC,
        sleep_control: power(AcpiPower::SLEEP_CONTROL),
        sleep_status: power(AcpiPower::SLEEP_STATUS),
        reset: (power(AcpiPower::RESET), AcpiPower::RESET_VALUE),
        power_button_gsi: devices::POWER_BUTTON_PIN.into(),
        serial: (SerialPort::COM1 as u16, SerialPort::COM1_IRQ.into()),
        extra,
    }
}
