//! Puts a kernel, its initramfs and its command line into guest memory.
//!
//! A bzImage is entered by Linux's 64-bit boot protocol, an ELF file by PVH. What lies where below
//! 1 MiB is fixed here; everything else depends on the kernel and on the RAM.

#![forbid(unsafe_code)]

mod files;
mod map;

use std::path::PathBuf;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use viommu::GuestRam;
use vm_memory::{Address, Bytes, GuestAddress};

use crate::config::{PayloadConfig, Size};
use crate::kvm::registers::{Entry, GDT};
use crate::memory::layout::{Layout, Range};

pub use map::{Kind, MemoryMap, memory_map};

const GDT_AT: u64 = 0x500;
const START_INFO_AT: u64 = 0x6000;
const MODULES_AT: u64 = 0x6800;
const ZERO_PAGE_AT: u64 = 0x7000;
/// One PML4, one PDPT and four page directories: the first 4 GiB in pages of 2 MiB.
const PAGE_TABLES_AT: u64 = 0x9000;
const PVH_MEMORY_MAP_AT: u64 = 0x1_0000;
const CMDLINE_AT: u64 = 0x2_0000;
/// The most that fits below the EBDA.
const CMDLINE_ROOM: usize = 0x6_0000;
/// Where kernels are loaded, and where RAM begins again after the legacy hole.
const HIGH_MEMORY: u64 = 0x10_0000;
/// Where ACPI's tables go: the BIOS area in which guests search for the RSDP.
pub const ACPI_AREA: Range = Range::new(0xe_0000, 0xf_efff);
/// The page with the BIOS's entry point.
const ROM: Range = Range::new(ACPI_AREA.last + 1, HIGH_MEMORY - 1);
/// The BIOS's entry point, F000:FFF0 in real mode. Linux ends there when it restarts a machine with
/// hardware-reduced ACPI and a kernel that could use EFI: it then tries neither ACPI's reset
/// register nor the keyboard controller (arch/x86/kernel/reboot.c, `efi_reboot_required`).
const BIOS_ENTRY: u64 = 0xf_fff0;
/// Real-mode code for it that pulses the keyboard controller's reset line: `mov al, 0xfe`,
/// `out 0x64, al`, then `hlt` for ever.
const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

/// The longest command line of a kernel that does not say (COMMAND_LINE_SIZE - 1).
const DEFAULT_CMDLINE_SIZE: usize = 2047;
const PAGE: u64 = 4096;

/// Why the guest cannot be booted: one sentence with the thing, the value, the remedy.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {} cannot be read ({source}); correct the path or its permissions", path.display())]
    Unreadable {
        /// Which option.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file is neither kind of kernel.
    #[error(
        "kernel {} is not a kernel ({why}); give an x86-64 bzImage, or a vmlinux built with CONFIG_PVH",
        path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// A kernel file ends early.
    #[error("kernel {} is truncated ({has} of at least {needs} bytes); copy it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        has: u64,
        /// What its header promises.
        needs: u64,
    },
    /// The file is empty.
    #[error("initramfs {} is empty; leave --initramfs out or give a cpio archive", .0.display())]
    EmptyInitramfs(PathBuf),
    /// The kernel or the initramfs does not fit.
    #[error(
        "{what} {} needs {needs} of guest memory below the 32-bit hole and there are {has}; give more with --memory size=",
        path.display()
    )]
    NoRoom {
        /// Which option.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Bytes needed.
        needs: Size,
        /// Bytes there.
        has: Size,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes and this kernel takes {most}; shorten it")]
    CmdlineTooLong {
        /// Its length.
        length: usize,
        /// The kernel's limit.
        most: usize,
    },
    /// The command line has a NUL.
    #[error("the kernel command line has a NUL character; remove it")]
    CmdlineNul,
    /// Guest memory refused a write that the layout says fits.
    #[error("guest memory at {at:#x} cannot be written; this is a bug in nestling, report it")]
    Write {
        /// Where.
        at: u64,
    },
}

/// What the kernel left free and asks for.
struct Loaded {
    entry: KernelEntry,
    /// One past the last byte that the kernel uses before it manages its memory.
    end: u64,
    /// The last address that an initramfs may use.
    initramfs_last: u64,
    cmdline_size: usize,
}

enum KernelEntry {
    Linux64(Box<setup_header>),
    Pvh(u32),
}

struct Initramfs {
    at: u64,
    size: u64,
}

/// Loads everything that `payload` names and returns how the boot vCPU enters it. `rsdp` is where
/// the ACPI tables begin.
///
/// # Errors
/// See [`BootError`].
pub fn load(
    ram: &GuestRam,
    layout: &Layout,
    payload: &PayloadConfig,
    map: &MemoryMap,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let kernel = load_kernel(ram, layout, payload)?;
    let cmdline = payload.cmdline.as_bytes();
    if cmdline.contains(&0) {
        return Err(BootError::CmdlineNul);
    }
    let most = kernel.cmdline_size.min(CMDLINE_ROOM - 1);
    if cmdline.len() > most {
        return Err(BootError::CmdlineTooLong {
            length: cmdline.len(),
            most,
        });
    }
    write(ram, CMDLINE_AT, cmdline)?;
    write(ram, CMDLINE_AT + cmdline.len() as u64, &[0])?;
    let initramfs = load_initramfs(ram, layout, payload, &kernel)?;
    write(ram, BIOS_ENTRY, &RESET_CODE)?;
    for (n, descriptor) in GDT.iter().enumerate() {
        write(ram, GDT_AT + 8 * n as u64, &descriptor.to_le_bytes())?;
    }
    match kernel.entry {
        KernelEntry::Linux64(header) => {
            write_page_tables(ram)?;
            let rip = u64::from(header.code32_start) + 0x200;
            let params = zero_page(*header, initramfs, map, rsdp);
            ram.write_obj(params, GuestAddress(ZERO_PAGE_AT))
                .map_err(|_| BootError::Write { at: ZERO_PAGE_AT })?;
            Ok(Entry::Linux64 {
                rip,
                zero_page: ZERO_PAGE_AT,
                page_tables: PAGE_TABLES_AT,
                gdt: GDT_AT,
            })
        }
        KernelEntry::Pvh(eip) => {
            write_start_info(ram, initramfs, map, rsdp)?;
            Ok(Entry::Pvh {
                eip,
                start_info: START_INFO_AT as u32,
                gdt: GDT_AT,
            })
        }
    }
}

fn write(ram: &GuestRam, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(at))
        .map_err(|_| BootError::Write { at })
}

fn load_kernel(
    ram: &GuestRam,
    layout: &Layout,
    payload: &PayloadConfig,
) -> Result<Loaded, BootError> {
    let path = &payload.kernel;
    let (mut file, length) = files::open("kernel", path)?;
    let has = layout.low_ram().len();
    let no_room = |needs| BootError::NoRoom {
        what: "kernel",
        path: path.clone(),
        needs: Size(needs),
        has: Size(has),
    };
    let not = |why: String| BootError::NotAKernel {
        path: path.clone(),
        why,
    };
    match files::recognize(&mut file, path, length)? {
        files::Image::BzImage => {
            if length > has {
                return Err(no_room(length));
            }
            let loaded = BzImage::load(&**ram, None, &mut file, Some(GuestAddress(HIGH_MEMORY)))
                .map_err(|why| not(why.to_string()))?;
            let header = loaded
                .setup_header
                .ok_or_else(|| not("it has no setup header".into()))?;
            let start = loaded.kernel_load.raw_value().max(header.pref_address);
            let end = start
                .saturating_add(header.init_size.into())
                .max(loaded.kernel_end);
            if end > has {
                return Err(no_room(end));
            }
            Ok(Loaded {
                end,
                initramfs_last: header.initrd_addr_max.into(),
                cmdline_size: header.cmdline_size as usize,
                entry: KernelEntry::Linux64(Box::new(header)),
            })
        }
        files::Image::Elf { end } => {
            if end > has {
                return Err(no_room(end));
            }
            let loaded = Elf::load(&**ram, None, &mut file, Some(GuestAddress(HIGH_MEMORY)))
                .map_err(|why| not(why.to_string()))?;
            let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
                return Err(not("it is an ELF file without a PVH entry".into()));
            };
            Ok(Loaded {
                entry: KernelEntry::Pvh(entry.raw_value() as u32),
                end: loaded.kernel_end,
                initramfs_last: u32::MAX.into(),
                cmdline_size: DEFAULT_CMDLINE_SIZE,
            })
        }
    }
}

/// As high as it may be, so that the kernel has room to decompress and to move.
fn load_initramfs(
    ram: &GuestRam,
    layout: &Layout,
    payload: &PayloadConfig,
    kernel: &Loaded,
) -> Result<Option<Initramfs>, BootError> {
    let Some(path) = &payload.initramfs else {
        return Ok(None);
    };
    let (mut file, size) = files::open("initramfs", path)?;
    if size == 0 {
        return Err(BootError::EmptyInitramfs(path.clone()));
    }
    let room_end = layout.low_ram().last.min(kernel.initramfs_last) + 1;
    let room_first = kernel.end.next_multiple_of(PAGE);
    let at = room_end
        .checked_sub(size)
        .map(|at| at / PAGE * PAGE)
        .filter(|at| *at >= room_first && size <= u32::MAX.into())
        .ok_or_else(|| BootError::NoRoom {
            what: "initramfs",
            path: path.clone(),
            needs: Size(size),
            has: Size(room_end.saturating_sub(room_first)),
        })?;
    ram.read_exact_volatile_from(GuestAddress(at), &mut file, size as usize)
        .map_err(|why| BootError::Unreadable {
            what: "initramfs",
            path: path.clone(),
            source: std::io::Error::other(why),
        })?;
    Ok(Some(Initramfs { at, size }))
}

/// Identity mapping of the first 4 GiB (Documentation/arch/x86/boot.rst asks for the kernel, the
/// zero page and the command line).
fn write_page_tables(ram: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let pdpt = PAGE_TABLES_AT + PAGE;
    write(
        ram,
        PAGE_TABLES_AT,
        &(pdpt | PRESENT_WRITABLE).to_le_bytes(),
    )?;
    for gib in 0..4u64 {
        let directory = pdpt + PAGE * (gib + 1);
        write(
            ram,
            pdpt + 8 * gib,
            &(directory | PRESENT_WRITABLE).to_le_bytes(),
        )?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|n| ((gib << 30 | n << 21) | PRESENT_WRITABLE | LARGE).to_le_bytes())
            .collect();
        write(ram, directory, &entries)?;
    }
    Ok(())
}

fn zero_page(
    mut header: setup_header,
    initramfs: Option<Initramfs>,
    map: &MemoryMap,
    rsdp: u64,
) -> boot_params {
    /// A boot loader without an assigned number.
    const UNDEFINED_LOADER: u8 = 0xff;
    header.type_of_loader = UNDEFINED_LOADER;
    header.cmd_line_ptr = CMDLINE_AT as u32;
    if let Some(initramfs) = initramfs {
        header.ramdisk_image = initramfs.at as u32;
        header.ramdisk_size = initramfs.size as u32;
    }
    let mut params = boot_params {
        acpi_rsdp_addr: rsdp,
        hdr: header,
        ..Default::default()
    };
    let mut table = params.e820_table;
    let entries = map.iter().zip(table.iter_mut());
    let count = entries
        .map(|((range, kind), slot)| {
            slot.addr = range.first;
            slot.size = range.len();
            slot.r#type = kind.e820();
        })
        .count();
    params.e820_table = table;
    params.e820_entries = count as u8;
    params
}

fn write_start_info(
    ram: &GuestRam,
    initramfs: Option<Initramfs>,
    map: &MemoryMap,
    rsdp: u64,
) -> Result<(), BootError> {
    let at = |at| move |_| BootError::Write { at };
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: CMDLINE_AT,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP_AT,
        ..Default::default()
    };
    if let Some(initramfs) = initramfs {
        let module = hvm_modlist_entry {
            paddr: initramfs.at,
            size: initramfs.size,
            ..Default::default()
        };
        ram.write_obj(module, GuestAddress(MODULES_AT))
            .map_err(at(MODULES_AT))?;
        info.nr_modules = 1;
        info.modlist_paddr = MODULES_AT;
    }
    let mut next = PVH_MEMORY_MAP_AT;
    for (range, kind) in map {
        let entry = hvm_memmap_table_entry {
            addr: range.first,
            size: range.len(),
            type_: kind.e820(),
            reserved: 0,
        };
        ram.write_obj(entry, GuestAddress(next)).map_err(at(next))?;
        next += size_of_val(&entry) as u64;
        info.memmap_entries += 1;
    }
    ram.write_obj(info, GuestAddress(START_INFO_AT))
        .map_err(at(START_INFO_AT))
}

#[cfg(test)]
mod tests;
