//! The virtual machine as KVM sees it: the VM object, its memory, its vCPUs.

pub mod cpuid;
pub mod registers;
pub mod slots;
pub mod vcpu;
pub mod vfio;

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_MAX_CPUID_ENTRIES,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use viommu::GuestRam;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::layout::KVM_PAGES;

/// Pins of the I/O APIC, whose interrupt routes KVM watches for EOIs.
pub const IOAPIC_PINS: u32 = 24;

/// Why KVM does not run this VM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no device node.
    #[error(
        "/dev/kvm does not exist; enable virtualization in the firmware and load kvm_intel or kvm_amd"
    )]
    Absent,
    /// The user may not open it.
    #[error(
        "/dev/kvm may not be opened by this user; add the user to the group kvm or run as root"
    )]
    Permission,
    /// Something else is wrong with it.
    #[error("/dev/kvm cannot be opened ({0}); check that the kernel's KVM module works")]
    Open(io::Error),
    /// Not the stable KVM API.
    #[error("/dev/kvm has API version {0} and nestling needs {KVM_API_VERSION}; update the kernel")]
    Version(i32),
    /// The host kernel lacks something.
    #[error("this kernel's KVM lacks {0}; use a kernel of version 5.10 or later")]
    Lacks(&'static str),
    /// More vCPUs than the host can run in one VM.
    #[error("cpus boot={asked} is more than this host's KVM allows in one VM ({most}); give fewer")]
    TooManyVcpus {
        /// Asked for.
        asked: u8,
        /// The host's limit.
        most: usize,
    },
    /// More pieces of RAM than the host has slots for.
    #[error("guest memory has {pieces} pieces and KVM has {most} slots; reserve fewer ranges")]
    Slots {
        /// Regions of RAM.
        pieces: usize,
        /// The host's limit.
        most: usize,
    },
    /// A call failed.
    #[error("{call} failed for {object}: {source}; see the kernel's log of the host")]
    Call {
        /// The call, by the kernel's name.
        call: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl KvmError {
    fn call(
        call: &'static str,
        object: impl Into<String>,
    ) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        let object = object.into();
        move |source| Self::Call {
            call,
            object,
            source: io::Error::from_raw_os_error(source.errno()),
        }
    }
}

/// What this host's KVM offers.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// Opens /dev/kvm and checks all that nestling needs of it.
    ///
    /// # Errors
    /// What is missing, with the remedy.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|why| match why.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Absent,
            libc::EACCES | libc::EPERM => KvmError::Permission,
            other => KvmError::Open(io::Error::from_raw_os_error(other)),
        })?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::Version(version));
        }
        let needs = [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
            (Cap::X2ApicApi, "KVM_CAP_X2APIC_API"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
            (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
        ];
        if let Some((_, name)) = needs.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Lacks(name));
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID", "/dev/kvm"))?;
        Ok(Self { kvm, cpuid })
    }

    /// Bits of a guest-physical address.
    pub fn address_width(&self) -> u8 {
        cpuid::address_width(self.cpuid.as_slice())
    }

    /// What every vCPU can be given, before [`cpuid::compose`].
    pub fn cpuid(&self) -> &[kvm_bindings::kvm_cpuid_entry2] {
        self.cpuid.as_slice()
    }

    /// Whether a guest's local APIC timer can count to a TSC value.
    pub fn tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// A VM with `ram`, a split interrupt controller (local APICs in the kernel, the I/O APIC in
    /// nestling) and 32-bit APIC IDs.
    ///
    /// # Errors
    /// Limits of the host and failed calls; nothing is kept then.
    pub fn create_vm(&self, ram: GuestRam, vcpus: u8) -> Result<Vm, KvmError> {
        let most = self.kvm.get_max_vcpus();
        if usize::from(vcpus) > most {
            return Err(KvmError::TooManyVcpus { asked: vcpus, most });
        }
        let (pieces, most) = (ram.num_regions(), self.kvm.get_nr_memslots());
        if pieces > most {
            return Err(KvmError::Slots { pieces, most });
        }
        let fd = self
            .kvm
            .create_vm()
            .map_err(KvmError::call("KVM_CREATE_VM", "/dev/kvm"))?;
        // Both are needed on Intel hosts without unrestricted guests and harmless elsewhere.
        if fd.check_extension(Cap::SetIdentityMapAddr) {
            fd.set_identity_map_address(KVM_PAGES.first)
                .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR", "the VM"))?;
        }
        if fd.check_extension(Cap::SetTssAddr) {
            fd.set_tss_address(KVM_PAGES.first as usize + 0x1000)
                .map_err(KvmError::call("KVM_SET_TSS_ADDR", "the VM"))?;
        }
        enable(
            &fd,
            KVM_CAP_SPLIT_IRQCHIP,
            u64::from(IOAPIC_PINS),
            "KVM_CAP_SPLIT_IRQCHIP",
        )?;
        enable(
            &fd,
            KVM_CAP_X2APIC_API,
            u64::from(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK),
            "KVM_CAP_X2APIC_API",
        )?;
        let vm = Vm {
            fd: Arc::new(fd),
            ram,
        };
        vm.map_ram()?;
        Ok(vm)
    }
}

fn enable(fd: &VmFd, cap: u32, arg: u64, name: &'static str) -> Result<(), KvmError> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = arg;
    fd.enable_cap(&request)
        .map_err(KvmError::call("KVM_ENABLE_CAP", name))
}

/// A VM. It owns its RAM, so that no slot of KVM outlives the mapping behind it.
#[derive(Debug)]
pub struct Vm {
    // Declared before `ram`: the VM goes first.
    fd: Arc<VmFd>,
    ram: GuestRam,
}

impl Vm {
    /// KVM's object, for interrupts and ioeventfds.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Guest RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn map_ram(&self) -> Result<(), KvmError> {
        for (slot, region) in self.ram.iter().enumerate() {
            let first = region.start_addr();
            let host = region.get_host_address(vm_memory::MemoryRegionAddress(0));
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: first.raw_value(),
                memory_size: region.len(),
                userspace_addr: host.map_or(0, |pointer| pointer as u64),
            };
            // SAFETY: the range is one whole region of `self.ram`, which stays mapped for as long
            // as `self` lives; `fd` is dropped before it, and every vCPU holds an Arc of `Vm`.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(KvmError::call(
                "KVM_SET_USER_MEMORY_REGION",
                format!("RAM at {:#x}", first.raw_value()),
            ))?;
        }
        Ok(())
    }

    /// A vCPU whose APIC ID is `index`.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(KvmError::call("KVM_CREATE_VCPU", format!("vCPU {index}")))
    }
}

/// The test's way to KVM: `None`, with the reason printed, where KVM cannot be had.
#[cfg(test)]
pub(crate) fn for_test() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(why) => {
            println!("skipped: {why}");
            None
        }
    }
}
