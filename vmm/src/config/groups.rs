//! The option groups: each struct is its documentation, its parser and its JSON form.

use std::path::PathBuf;

use super::schema::options;
use super::values::{Address, Mac, Size, words};

options! {
    /// What the guest boots.
    pub struct PayloadConfig {
        /// The kernel: a bzImage, or a vmlinux (ELF) with a PVH entry.
        pub kernel: PathBuf, required;
        /// The initial RAM file system.
        pub initramfs: Option<PathBuf>;
        /// The kernel's command line.
        pub cmdline: String = "console=ttyS0".into();
    }
}

options! {
    /// Virtual CPUs.
    pub struct CpusConfig {
        /// How many vCPUs the guest boots with, 1 to 64.
        pub boot_vcpus ("boot"): u8 = 1;
    }
}

options! {
    /// Guest memory.
    pub struct MemoryConfig {
        /// How much, a multiple of 2M.
        pub size: Size = Size::mib(512);
        /// Back it with 2 MiB huge pages, all of them reserved before the guest starts.
        pub hugepages: bool = false;
        /// Keep it in a file descriptor that other processes and the host's IOMMU can map;
        /// without, it is anonymous memory of this process.
        pub shared: bool = true;
    }
}

options! {
    /// A virtio-blk disk. May be given several times.
    pub struct DiskConfig {
        /// The raw image file or block device.
        pub path: PathBuf, required;
        /// Open it read-only, and tell the guest so.
        pub readonly: bool = false;
        /// A descriptor that is open for it, of which path then is only the name: in an option, one
        /// that nestling was started with; in a request, its place (from 0) among those that came
        /// with it.
        pub fd: Option<u32>;
        /// The device's name, unique in the VM.
        pub id: Option<String>;
        /// Put it behind the default vIOMMU: the first of --viommu, or a VT-d unit if there is none.
        pub iommu: bool = false;
        /// Put it behind the vIOMMU of this id.
        pub viommu: Option<String>;
    }
}

options! {
    /// A virtio-net card on a tap interface. May be given several times.
    pub struct NetConfig {
        /// The tap interface, which must exist or be creatable by this user.
        pub tap: String, required;
        /// The card's address; made from the position of the card when it is not given.
        pub mac: Option<Mac>;
        /// A descriptor that is open for it, of which tap then is only the name: in an option, one
        /// that nestling was started with; in a request, its place (from 0) among those that came
        /// with it.
        pub fd: Option<u32>;
        /// The device's name, unique in the VM.
        pub id: Option<String>;
        /// Put it behind the default vIOMMU: the first of --viommu, or a VT-d unit if there is none.
        pub iommu: bool = false;
        /// Put it behind the vIOMMU of this id.
        pub viommu: Option<String>;
    }
}

options! {
    /// The virtio-rng entropy source.
    pub struct RngConfig {
        /// Where entropy comes from.
        pub src: PathBuf = "/dev/urandom".into();
        /// Put it behind the default vIOMMU: the first of --viommu, or a VT-d unit if there is none.
        pub iommu: bool = false;
        /// Put it behind the vIOMMU of this id.
        pub viommu: Option<String>;
    }
}

words! {
    /// Where the serial port leads.
    pub enum SerialMode: "tty|null|file" {
        /// This terminal.
        #[default]
        Tty = "tty",
        /// Nowhere; what the guest writes is dropped.
        Null = "null",
        /// Output to a file.
        File = "file",
    }
}

options! {
    /// The 16550 serial port at 0x3f8 (the guest's ttyS0).
    pub struct SerialConfig word mode {
        /// This terminal, nowhere, or a file.
        pub mode: SerialMode = SerialMode::Tty;
        /// The file that output is written to; what it held is lost. Implies the mode.
        pub file: Option<PathBuf>;
    }
}

words! {
    /// Where the virtio console leads.
    pub enum ConsoleMode: "off|tty|file|socket" {
        /// There is no such device.
        #[default]
        Off = "off",
        /// This terminal.
        Tty = "tty",
        /// Output to a file.
        File = "file",
        /// A listening Unix socket, for one peer at a time.
        Socket = "socket",
    }
}

options! {
    /// The virtio console (the guest's hvc0).
    pub struct ConsoleConfig word mode {
        /// No such device, this terminal, a file or a Unix socket.
        pub mode: ConsoleMode = ConsoleMode::Off;
        /// The file that output is written to; what it held is lost. Implies the mode.
        pub file: Option<PathBuf>;
        /// The Unix socket that is created; it must not exist. Implies the mode.
        pub socket: Option<PathBuf>;
        /// Make it a named port (in the guest /sys/class/virtio-ports) instead of a console.
        pub port: Option<String>;
        /// Put it behind the default vIOMMU: the first of --viommu, or a VT-d unit if there is none.
        pub iommu: bool = false;
        /// Put it behind the vIOMMU of this id.
        pub viommu: Option<String>;
    }
}

words! {
    /// Whether a device shows a feature.
    pub enum FeatureMode: "auto|on|off" {
        /// Where it works.
        #[default]
        Auto = "auto",
        /// Always, or the device is refused.
        On = "on",
        /// Never.
        Off = "off",
    }
}

options! {
    /// A PCI device of the host, given to the guest. It must be bound to vfio-pci; nestling doctor
    /// says what this host can do with each of its devices. May be given several times.
    pub struct DeviceConfig {
        /// The device in sysfs, for example /sys/bus/pci/devices/0000:01:00.0.
        pub path: PathBuf, required;
        /// A descriptor that is open for it (/dev/vfio/devices/vfioN): in an option, one that
        /// nestling was started with; in a request, its place (from 0) among those that came with
        /// it. What path has in sysfs is read all the same.
        pub fd: Option<u32>;
        /// As fd, of /dev/iommu; by itself, nestling opens that. One for all devices of the VM.
        pub iommufd: Option<u32>;
        /// The device's name, unique in the VM.
        pub id: Option<String>;
        /// Put it behind the default vIOMMU: the first of --viommu, or a VT-d unit if there is none.
        /// Without, it reaches all guest memory, and nothing else.
        pub iommu: bool = false;
        /// Put it behind the vIOMMU of this id.
        pub viommu: Option<String>;
        /// Show the guest PASIDs: auto hides them where they cannot work, on refuses the device then.
        pub pasid: FeatureMode = FeatureMode::Auto;
        /// Show the guest page requests (ATS and PRI): auto shows them where they work.
        pub pri: FeatureMode = FeatureMode::Auto;
        /// Bits of address that the device can put on the bus, 12 to 64, where it is narrower than
        /// the host's IOMMU: one narrower than the guest's CPUs gets no PASIDs.
        pub dma_width: Option<u8>;
        /// Where in its configuration space the guest finds its PASID capability: a multiple of 4
        /// from 256 to 4088 where the vendor has no registers. By itself, a place that reads as 0.
        pub pasid_offset: Option<u16>;
    }
}

options! {
    /// A DMA test engine: a PCI function that does whatever DMA it is told to, to test an IOMMU.
    /// May be given several times.
    pub struct TestDeviceConfig {
        /// Bits of PASID it can send, 0 to 20; 0: it has no PASID capability.
        pub pasid_bits: u8 = 20;
        /// Give it the ATS capability.
        pub ats: bool = true;
        /// Give it the PRI capability, which needs ATS.
        pub pri: bool = true;
        /// The device's name, unique in the VM.
        pub id: Option<String>;
        /// Put it behind the default vIOMMU: the first of --viommu, or a VT-d unit if there is none.
        pub iommu: bool = false;
        /// Put it behind the vIOMMU of this id.
        pub viommu: Option<String>;
    }
}

words! {
    /// What a vIOMMU looks like to the guest.
    pub enum ViommuKind: "vtd|virtio" {
        /// Intel VT-d.
        #[default]
        Vtd = "vtd",
        /// virtio-iommu.
        Virtio = "virtio",
    }
}

words! {
    /// The translation modes that a VT-d unit offers.
    pub enum UnitMode: "scalable|legacy" {
        /// Scalable mode, and legacy mode for guests that do not know it.
        #[default]
        Scalable = "scalable",
        /// Legacy mode only.
        Legacy = "legacy",
    }
}

words! {
    /// How the interrupt messages of the devices behind a vIOMMU reach their doorbell.
    pub enum MsiMode: "intercepted|mapped" {
        /// They are taken before translation, as on x86.
        #[default]
        Intercepted = "intercepted",
        /// They are translated like any other write, as on Arm.
        Mapped = "mapped",
    }
}

options! {
    /// A vIOMMU of the guest. May be given several times; devices name it with viommu=.
    pub struct ViommuConfig {
        /// What it looks like to the guest: an Intel VT-d unit or a virtio-iommu. The options
        /// mode, address_width, pasid_bits, interrupt_remapping, nested and vcmd are a VT-d unit's,
        /// attach_table is a virtio-iommu's.
        pub kind ["type"]: ViommuKind = ViommuKind::Vtd;
        /// Its name, unique in the VM.
        pub id: String = "viommu0".into();
        /// Scalable mode has first-stage tables, which the guest changes without an exit, and
        /// PASIDs. All units of a VM have the same mode. By itself, scalable mode, or legacy mode
        /// where a device of the host is behind a unit and the host's IOMMU cannot nest.
        pub mode: Option<UnitMode>;
        /// Bits of DMA address: 39, 48 or 57; by itself, what all devices have, up to 48.
        pub address_width: Option<u8>;
        /// Bits of PASID, 1 to 20, or 0 for none; by itself, what all devices have.
        pub pasid_bits: Option<u8>;
        /// Offer interrupt remapping. All units of a VM have the same.
        pub interrupt_remapping: bool = false;
        /// Offer second-stage tables in scalable mode: the guest can be a host itself.
        pub nested: bool = false;
        /// Until the guest turns translation on, let DMA pass unchanged, not be blocked.
        pub bypass: bool = false;
        /// Offer virtual commands, by which the guest gets PASIDs that no other VM of the host
        /// has. Linux up to 6.3 uses them.
        pub vcmd: bool = false;
        /// Experimental: offer the requests by which the guest's own first-stage tables translate
        /// (ATTACH_TABLE and INVALIDATE of drafts that may change). No released driver knows them.
        pub attach_table: bool = false;
        /// How interrupt messages reach their doorbell: taken before translation, or (type=virtio,
        /// emulated devices) translated, so that the guest has to map the doorbell to itself. For
        /// guests that are written for platforms of the second kind.
        pub msi: MsiMode = MsiMode::Intercepted;
        /// Where the doorbell is with msi=mapped: 1 MiB from a multiple of that; by itself
        /// 0xfee00000. The same for all vIOMMUs of a VM.
        pub doorbell: Option<Address>;
    }
}

words! {
    /// What a reboot of the guest does.
    pub enum OnReboot: "restart|exit" {
        /// The VM starts again from its kernel, in the same process.
        #[default]
        Restart = "restart",
        /// nestling ends with the status for a reboot.
        Exit = "exit",
    }
}

words! {
    /// Around whose reserved addresses guest memory is laid out.
    pub enum Reserve: "devices|host" {
        /// Those of the devices that the VM is given at boot.
        #[default]
        Devices = "devices",
        /// Those of all devices of the host.
        Host = "host",
    }
}

options! {
    /// The VM as a whole.
    pub struct PlatformConfig {
        /// What happens when the guest asks for a reboot (a panic with panic=-1 does, too): the
        /// VM restarts, or nestling exits with status 3. A triple fault always exits, with 4.
        pub on_reboot: OnReboot = OnReboot::Restart;
        /// Around which reserved addresses guest memory is laid out: those of the devices given
        /// here, or those of all devices of the host, so that any of them can be plugged later.
        pub reserve: Reserve = Reserve::Devices;
        /// A port that ends nestling with a status of the guest's choice, for tests.
        pub debug_exit: bool = false;
        /// The VM's name, as other users of the host see it (nestling pasids).
        pub name: String = "nestling".into();
        /// Where the VMs of the host keep the file by which they share PASIDs (vcmd=on).
        pub pasid_directory: PathBuf = viommu::pasid::DEFAULT_DIRECTORY.into();
        /// How many PASIDs of the host the VM may own (vcmd=on).
        pub pasid_quota: u32 = viommu::pasid::Config::DEFAULT_QUOTA;
    }
}

words! {
    /// What a system call does that nestling never makes.
    pub enum SeccompMode: "on|log|off" {
        /// It kills nestling (SIGSYS).
        #[default]
        On = "on",
        /// It is done, and the kernel's audit log says so.
        Log = "log",
        /// Nothing: there are no filters.
        Off = "off",
    }
}

options! {
    /// What nestling itself may do of the host. It is fixed when nestling starts.
    pub struct SandboxConfig {
        /// What a system call does that nestling never makes: kill it, only be logged by the
        /// kernel's audit, or nothing. By itself, on.
        pub seccomp: Option<SeccompMode>;
        /// Let nestling open only what its configuration and --landlock-rules name, from the
        /// first boot on. By itself, on where the kernel has landlock.
        pub landlock: Option<bool>;
    }
}

words! {
    /// What may be done with the files below a path.
    pub enum LandlockAccess: "r|w|rw" {
        /// Read them.
        Read = "r",
        /// Write them.
        Write = "w",
        /// Both.
        #[default]
        ReadWrite = "rw",
    }
}

options! {
    /// A file, or a folder with all below it, that nestling may open beside what its configuration
    /// names: disks that are plugged later. May be given several times.
    pub struct LandlockConfig {
        /// The file or folder.
        pub path: PathBuf, required;
        /// What for.
        pub access: LandlockAccess = LandlockAccess::ReadWrite;
    }
}
