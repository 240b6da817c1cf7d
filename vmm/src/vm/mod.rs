//! A VM from its configuration to its end.
//!
//! [`Prepared::run`] owns the VM: it builds it, starts it, does what clients ask, and builds it again after
//! a reboot. Building is in the order in which a mistake of the user is cheapest to tell: memory,
//! kernel, devices, then vCPUs. Nothing is left behind when any of it fails.

mod buses;
mod devices;
mod event_loop;
mod hotplug;
mod observed;
mod pasids;
mod passthrough;
mod removals;
mod session;
mod slots;
mod terminal_io;
mod viommus;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ::devices::counters::Counters as Counting;
use viommu::Rid;
use vm_memory::{Bytes, GuestAddress};

pub use devices::DeviceError;
pub use hotplug::{AddError, Step};
pub use passthrough::PassthroughError;
pub use session::{Control, Prepared, prepare};
pub use viommus::{ViommuError, ViommuState, ViommuStates};

use self::devices::{Devices, OfHost};
use self::event_loop::{Alarm, DeviceEvent, EventLoop, Wake};
use self::hotplug::{New, Plugged};
use self::passthrough::Passthrough;
use self::removals::{Overdue, Removals};
use self::session::Context;
use crate::acpi::{self, Hotplug, Platform};
use crate::boot::{self, ACPI_AREA, BootError};
use crate::config::Validated;
use crate::control::{
    ApiError, Code, Counters, DeviceNode, Done, Inspect, NewDevice, PciDeviceInfo, Removal, Reply,
};
use crate::interrupts::Interrupts;
use crate::kvm::cpuid::{self, Paging};
use crate::kvm::vcpu::{EventLine, Exits, GuestEvent, VcpuThreads};
use crate::kvm::{self, Host, KvmError, registers};
use crate::memory::layout::{self, HostReserved, IOAPIC, LayoutError};
use crate::memory::ram::{self, RamError};
use crate::sandbox::{PathsError, Refusal, SandboxError};
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
    /// The sandbox cannot be had.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Paths cannot be confined.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// They are, and this VM needs others.
    #[error(transparent)]
    Refused(#[from] Refusal),
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

/// How a device is removed that the host wants back: the host waits for it, and without a limit.
const WANTED: Removal = Removal {
    force: true,
    timeout: Duration::from_secs(10),
};

/// A VM that was built. Fields are dropped in this order: first what uses the others.
struct Vm {
    vcpus: Vec<kvm_ioctls::VcpuFd>,
    devices: Devices,
    removals: Removals,
    /// Wakes when the next removal is overdue; there when the VM was started.
    alarm: Option<Alarm>,
    kvm: Arc<kvm::Vm>,
    events: Arc<EventLine>,
}

impl Vm {
    fn build(
        config: &Validated,
        host_kvm: &Host,
        first_boot: bool,
        control: &Control,
    ) -> Result<Self, VmError> {
        let Control {
            shared,
            descriptors,
            ..
        } = control;
        let progress = &shared.progress;
        progress.step("guest memory");
        let size = config.memory.size.0;
        let mut reserved = passthrough::reserved(&config.devices, config.platform.reserve)
            .map_err(DeviceError::from)?;
        reserved.extend(config.doorbell().map(|doorbell| HostReserved {
            what: "the MSI doorbell (viommu msi=mapped)".into(),
            regions: [doorbell.region()].into_iter().collect(),
        }));
        let layout = layout::compose(size, host_kvm.address_width(), &reserved)?;
        let ram = ram::allocate(&config.memory, &layout)?;
        let memory_map = boot::memory_map(&layout);
        progress.step(match config.devices.is_empty() {
            true => "kernel",
            false => "kernel, and guest memory in the host's IOMMU",
        });
        let (entry, iommu) = passthrough::open_during(&config.devices, &ram, descriptors, || {
            boot::load(&ram, &layout, &config.payload, &memory_map, ACPI_AREA.first)
        });
        let (entry, iommu) = (entry?, iommu.map_err(DeviceError::from)?);

        let cpus = config.cpus.boot_vcpus;
        let kvm = Arc::new(host_kvm.create_vm(ram.clone(), cpus)?);
        let interrupts = Interrupts::new(kvm.fd().clone());
        let events = Arc::new(EventLine::new().map_err(host("an event descriptor"))?);
        progress.step("devices");
        let paging = Paging::of(host_kvm.cpuid());
        let passthrough = iommu.map(|iommu| Passthrough::new(iommu, &kvm, paging, descriptors));
        let passthrough = passthrough.transpose();
        let passthrough = passthrough.map_err(DeviceError::from)?;
        let devices = Devices::new(
            config,
            &layout,
            &kvm,
            &interrupts,
            &events,
            OfHost {
                passthrough,
                paging,
                descriptors,
            },
        )?;

        devices.viommus().tell(shared.events.clone());
        let extra = devices.freeze()?;
        let platform = platform(&layout, cpus, devices.slots(), &extra);
        let tables = acpi::tables(&platform, ACPI_AREA)?;
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
            removals: Removals::default(),
            alarm: None,
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
        event_loop
            .watch_event(self.devices.ejection(), Wake::Device(DeviceEvent::Ejected))
            .map_err(host(watched))?;
        let overdue = event_loop.alarm(Wake::Device(DeviceEvent::Overdue));
        self.alarm = Some(overdue.map_err(host(watched))?);
        for plugged in &mut self.devices.plugged {
            plugged.watch(event_loop).map_err(host(watched))?;
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
    fn device_event(&mut self, event: DeviceEvent, context: &mut Context<'_>) {
        match event {
            DeviceEvent::Failed(rid) => {
                let Some(id) = self.devices.at(rid).map(|plugged| &plugged.id) else {
                    return;
                };
                // What the device does from now on is undefined.
                self.events.report(GuestEvent::Failed(format!(
                    "device id={id} had an uncorrected error; see the kernel's log of the host"
                )));
            }
            DeviceEvent::Wanted(rid) => {
                let Some(plugged) = self.devices.at(rid) else {
                    return;
                };
                if !self.removals.has(rid) {
                    log::warn!("the host wants device id={} back", plugged.id);
                }
                // The host asks again and again.
                let _ = self.begin_removal(rid, WANTED, None);
            }
            DeviceEvent::Ejected => {
                for plugged in self.devices.ejected() {
                    self.removed(plugged, context);
                }
            }
            DeviceEvent::Overdue => self.overdue(context),
        }
        self.set_alarm();
    }

    /// Plugs a device: all of it or nothing.
    fn add(
        &mut self,
        device: NewDevice,
        context: &mut Context<'_>,
    ) -> Result<PciDeviceInfo, ApiError> {
        let progress = &context.shared.progress;
        let step = |step: Step| progress.step(step.to_string());
        let event_loop = &mut *context.event_loop;
        let added = self.devices.add(New::from(&device), &step, |plugged| {
            plugged.watch(event_loop)
        });
        added.map_err(|why| {
            // Some steps are several, of which one failed.
            step(why.step);
            why.to_api()
        })
    }

    /// Unplugs a device, and answers when it is gone.
    fn remove(&mut self, id: &str, how: Removal, reply: Reply) {
        let Some(plugged) = self.devices.find(id) else {
            let stays = self.devices.fixed.iter().any(|(_, fixed)| fixed.id == id);
            return reply.send(Err(if stays {
                ApiError::new(Code::NotRemovable, format!("device {id} cannot be removed"))
                    .field("id")
                    .remedy("boot the VM without it")
            } else {
                session::no_such_device(id)
            }));
        };
        let rid = plugged.rid;
        if let Err(Some(reply)) = self.begin_removal(rid, how, Some(reply)) {
            let pending = ApiError::new(
                Code::RemovalPending,
                format!("the guest has been asked already to let go of device {id}"),
            );
            let remedy = match how.force {
                true => "wait for device-removed: it is taken away when the time is over",
                false => "wait for device-removed, or use force",
            };
            reply.send(Err(pending.field("id").remedy(remedy)));
        }
        self.set_alarm();
    }

    /// Asks the guest to let go of a device; the reply comes back if there is nothing to ask.
    fn begin_removal(
        &mut self,
        rid: Rid,
        how: Removal,
        reply: Option<Reply>,
    ) -> Result<(), Option<Reply>> {
        self.removals.begin(rid, how, reply, Instant::now())?;
        self.devices.ask(rid);
        Ok(())
    }

    fn set_alarm(&mut self) {
        if let Some(alarm) = &mut self.alarm {
            alarm.set(self.removals.next(Instant::now()));
        }
    }

    /// What the guest did not let go of in time is taken away or stays.
    fn overdue(&mut self, context: &mut Context<'_>) {
        for Overdue {
            rid,
            force,
            replies,
        } in self.removals.overdue(Instant::now())
        {
            let gone = match force {
                true => self.devices.take_away(rid),
                false => None,
            };
            if let Some(plugged) = gone {
                self.removed(plugged, context);
                context.answer(replies, &Ok(Done::Nothing));
                continue;
            }
            if self.devices.is_let_go(rid) {
                // Just now: they are answered when it is gone.
                self.removals.keep(rid, replies);
                continue;
            }
            self.devices.withdraw(rid);
            let id = self.devices.at(rid).map(|plugged| plugged.id.clone());
            let late = ApiError::new(
                Code::GuestDidNotEject,
                format!(
                    "the guest did not let go of device {} in time",
                    id.unwrap_or_default()
                ),
            );
            context.answer(replies, &Err(late.remedy("ask again, or use force")));
        }
    }

    /// Nothing of the device is left: says so.
    fn removed(&mut self, plugged: Plugged, context: &mut Context<'_>) {
        let (rid, info) = (plugged.rid, plugged.info());
        plugged.unwatch(context.event_loop);
        context.removed(info);
        context.answer(self.removals.ended(rid), &Ok(Done::Nothing));
    }

    /// Its PCI functions by name.
    fn device_tree(&self) -> BTreeMap<String, DeviceNode> {
        let removable = self.devices.plugged.iter().map(|plugged| DeviceNode {
            id: plugged.id.clone(),
            pci_bdf: plugged.info().bdf,
            kind: plugged.kind,
            viommu: self.devices.viommus().name(plugged.home).map(str::to_owned),
            removable: true,
            removing: self.removals.has(plugged.rid),
        });
        let fixed = self.devices.fixed.iter().map(|(_, node)| node.clone());
        let all = fixed.chain(removable);
        all.map(|node| (node.id.clone(), node)).collect()
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

impl Running {
    /// What can be asked of it while it runs. It keeps no device alive.
    fn inspector(&self) -> Inspector {
        let devices = &self.vm.devices;
        let vcpus = self.threads.counts().iter().enumerate();
        let vcpus = vcpus.map(|(index, counts)| {
            let counts: Arc<dyn Counting> = counts.clone();
            (format!("vcpu{index}"), vec![counts])
        });
        Inspector {
            front_ends: devices.viommus().front_ends(),
            counting: devices.counting().into_iter().chain(vcpus).collect(),
        }
    }
}

/// What can be asked of a VM while it runs.
struct Inspector {
    front_ends: Vec<viommus::FrontEnd>,
    /// By name.
    counting: Vec<(String, Vec<Arc<dyn Counting>>)>,
}

impl Inspect for Inspector {
    fn viommus(&self) -> ViommuStates {
        viommus::states(&self.front_ends)
    }

    fn counters(&self) -> Counters {
        let mut all: Counters = viommus::counters(&self.front_ends);
        for (name, counting) in &self.counting {
            // A virtio-iommu is a vIOMMU and a device.
            let counters = all.entry(name.clone()).or_default();
            for counts in counting {
                counts.read(&mut |counter, count| {
                    counters.insert(counter.to_owned(), count);
                });
            }
        }
        all
    }
}

fn platform<'a>(
    layout: &'a layout::Layout,
    vcpus: u8,
    slots: u32,
    extra: &'a [Vec<u8>],
) -> Platform<'a> {
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
        hotplug: Hotplug {
            port: devices::HOTPLUG_PORT,
            gsi: devices::HOTPLUG_PIN.into(),
            slots,
        },
        interrupt_lines: &passthrough::LINES,
        serial: (SerialPort::COM1 as u16, SerialPort::COM1_IRQ.into()),
        extra,
    }
}
