//! A VM from its configuration to its end.
//!
//! [`run`] owns the VM: it builds it, starts it, does what clients ask, and builds it again after
//! a reboot. Building is in the order in which a mistake of the user is cheapest to tell: memory,
//! kernel, devices, then vCPUs. Nothing is left behind when any of it fails.

mod buses;
mod devices;
mod event_loop;
mod pasids;
mod passthrough;
mod session;
mod terminal_io;
mod viommus;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

pub use devices::DeviceError;
pub use passthrough::PassthroughError;
pub use session::{Control, run};
pub use viommus::{ViommuError, ViommuState, ViommuStates};

use self::devices::Devices;
use self::event_loop::{DeviceEvent, EventLoop, Wake};
use self::passthrough::Passthrough;
use self::session::Context;
use crate::acpi::{self, Platform};
use crate::boot::{self, ACPI_AREA, BootError};
use crate::config::Validated;
use crate::control::{
    ApiError, Code, Counters, DeviceNode, Inspect, NewDevice, PciDeviceInfo, Progress, Removal,
    Reply,
};
use crate::interrupts::Interrupts;
use crate::kvm::cpuid::{self, Paging};
use crate::kvm::vcpu::{EventLine, Exits, GuestEvent, VcpuThreads};
use crate::kvm::{self, Host, KvmError, registers};
use crate::memory::layout::{self, IOAPIC, LayoutError};
use crate::memory::ram::{self, RamError};
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

/// A VM that was built. Fields are dropped in this order: first what uses the others.
struct Vm {
    vcpus: Vec<kvm_ioctls::VcpuFd>,
    devices: Devices,
    _passthrough: Option<Passthrough>,
    kvm: Arc<kvm::Vm>,
    events: Arc<EventLine>,
}

impl Vm {
    fn build(
        config: &Validated,
        host_kvm: &Host,
        first_boot: bool,
        progress: &Progress,
    ) -> Result<Self, VmError> {
        progress.step("guest memory");
        let size = config.memory.size.0;
        let reserved = passthrough::reserved(&config.devices, config.platform.reserve)
            .map_err(DeviceError::from)?;
        let layout = layout::compose(size, host_kvm.address_width(), &reserved)?;
        let ram = ram::allocate(&config.memory, &layout)?;
        let memory_map = boot::memory_map(&layout);
        progress.step(match config.devices.is_empty() {
            true => "kernel",
            false => "kernel, and guest memory in the host's IOMMU",
        });
        let (entry, iommu) = passthrough::open_during(&config.devices, &ram, || {
            boot::load(&ram, &layout, &config.payload, &memory_map, ACPI_AREA.first)
        });
        let (entry, iommu) = (entry?, iommu.map_err(DeviceError::from)?);

        let cpus = config.cpus.boot_vcpus;
        let kvm = Arc::new(host_kvm.create_vm(ram.clone(), cpus)?);
        let interrupts = Interrupts::new(kvm.fd().clone());
        let events = Arc::new(EventLine::new().map_err(host("an event descriptor"))?);
        progress.step("devices");
        let paging = Paging::of(host_kvm.cpuid());
        let passthrough = iommu.map(|iommu| Passthrough::new(iommu, &kvm, paging));
        let passthrough = passthrough.transpose();
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

        progress.step("vCPUs");
        let paging = devices.viommus().paging(paging);
        let cpuid = |index| {
            let mut cpuid = cpuid::compose(host_kvm.cpuid(), index, cpus, host_kvm.tsc_deadline());
            paging.limit(&mut cpuid);
            cpuid
        };
        let mut vcpus = Vec::with_capacity(cpus.into());
        for index in 0..cpus {
            let vcpu = kvm.create_vcpu(index)?;
            registers::set_up(&vcpu, index, &cpuid(index), (index == 0).then_some(entry))?;
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

    /// Watches what the guest and its devices do from now on, and lets the vCPUs run.
    fn start(mut self, event_loop: &mut EventLoop) -> Result<Running, VmError> {
        let typed_into = self.devices.typed_into();
        let raw = match typed_into {
            Some(_) => RawMode::enter().map_err(host("the terminal in raw mode"))?,
            None => None,
        };
        if let Some(target) = typed_into {
            event_loop.type_into(target);
        }
        let watched = "a watch of the event loop";
        event_loop
            .watch_event(self.events.eventfd(), Wake::Guest)
            .map_err(host(watched))?;
        for passed in self.devices.passed() {
            for (event, about) in passed.events() {
                event_loop
                    .watch_event(event, Wake::Device(about))
                    .map_err(host(watched))?;
            }
        }
        let exits: Arc<dyn Exits> = Arc::new(self.devices.buses().clone());
        let vcpus = std::mem::take(&mut self.vcpus);
        let threads = VcpuThreads::start(&self.kvm, vcpus, &exits, &self.events)?;
        Ok(Running {
            threads,
            vm: self,
            _raw: raw,
        })
    }

    /// Does what an event of a device asks for.
    fn device_event(&mut self, event: DeviceEvent, _context: &mut Context<'_>) {
        let path = |rid| {
            let passed = self.devices.passed().iter().find(|p| p.rid() == rid);
            passed.map(|passed| passed.path().display().to_string())
        };
        match event {
            DeviceEvent::Failed(rid) => {
                let Some(path) = path(rid) else { return };
                // What the device does from now on is undefined.
                self.events.report(GuestEvent::Failed(format!(
                    "device path={path} had an uncorrected error; see the kernel's log of the host"
                )));
            }
            DeviceEvent::Wanted(rid) => {
                let Some(path) = path(rid) else { return };
                log::warn!(
                    "the host wants device path={path} back: the guest is asked to power off"
                );
                self.press_power_button();
            }
        }
    }

    /// Plugs a device: all of it or nothing.
    fn add(
        &mut self,
        device: NewDevice,
        _context: &mut Context<'_>,
    ) -> Result<PciDeviceInfo, ApiError> {
        Err(ApiError::new(
            Code::NoFreeSlot,
            format!("there is no slot for {}", device.id()),
        ))
    }

    /// Unplugs a device, and answers when it is gone.
    fn remove(&mut self, id: &str, _how: Removal, reply: Reply, _context: &mut Context<'_>) {
        reply.send(Err(session::no_such_device(id)));
    }

    /// Its PCI functions by name.
    fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        BTreeMap::new()
    }

    /// What can be asked of it while it runs.
    fn inspector(&self) -> Inspector {
        Inspector {
            front_ends: self.devices.viommus().front_ends(),
        }
    }

    fn press_power_button(&self) {
        let button = self.devices.power_button();
        button.set(true);
        button.set(false);
    }
}

/// A VM whose vCPUs run, or are paused. Fields are dropped in this order: the vCPUs stop first.
struct Running {
    threads: VcpuThreads,
    vm: Vm,
    _raw: Option<RawMode>,
}

/// What can be asked of a VM while it runs.
struct Inspector {
    front_ends: Vec<viommus::FrontEnd>,
}

impl Inspect for Inspector {
    fn viommus(&self) -> ViommuStates {
        viommus::states(&self.front_ends)
    }

    fn counters(&self) -> Counters {
        Counters::new()
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
