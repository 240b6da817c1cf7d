use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::config::MemoryConfig;
use crate::memory::{layout, ram};

/// A file in the test's own directory, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nestling-boot-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 5 * 512 + 0x1000];
    image[0x1f1] = 4;
    image[0x1f4..0x1f8].copy_from_slice(&0x100u32.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236] = 1;
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    image[5 * 512..].fill(0xcc);
    image
}

/// One segment and a PVH note.
fn vmlinux() -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..4].copy_from_slice(b"\x7fELF");
    image[4..6].copy_from_slice(&[2, 1]);
    image[18..20].copy_from_slice(&62u16.to_le_bytes());
    image[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
    image[32..40].copy_from_slice(&64u64.to_le_bytes());
    image[54..56].copy_from_slice(&56u16.to_le_bytes());
    image[56..58].copy_from_slice(&2u16.to_le_bytes());
    let mut header = |n: usize, kind: u32, offset: u64, physical: u64, size: u64| {
        let at = 64 + 56 * n;
        image[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, physical), (32, size), (40, size)] {
            image[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(0, 1, 0x800, 0x100_0000, 0x100);
    header(1, 4, 0x400, 0, 20);
    image[0x400..0x404].copy_from_slice(&4u32.to_le_bytes());
    image[0x404..0x408].copy_from_slice(&4u32.to_le_bytes());
    image[0x408..0x40c].copy_from_slice(&18u32.to_le_bytes());
    image[0x40c..0x410].copy_from_slice(b"Xen\0");
    image[0x410..0x414].copy_from_slice(&0x100_0040u32.to_le_bytes());
    image[0x800..0x900].fill(0xdd);
    image
}

fn boot(
    kernel: &[u8],
    initramfs: Option<&[u8]>,
    cmdline: &str,
    mib: u64,
) -> Result<(GuestRam, Entry), BootError> {
    let layout = layout::compose(mib << 20, 40, &[]).unwrap();
    let ram = ram::allocate(&MemoryConfig::default(), &layout).unwrap();
    let kernel = Scratch::new(kernel);
    let initramfs = initramfs.map(Scratch::new);
    let payload = PayloadConfig {
        kernel: kernel.0.clone(),
        initramfs: initramfs.as_ref().map(|file| file.0.clone()),
        cmdline: cmdline.into(),
    };
    let map = memory_map(&layout);
    let entry = load(&ram, &layout, &payload, &map, 0xe_0000)?;
    Ok((ram, entry))
}

#[test]
fn a_bzimage_is_loaded_with_all_that_the_boot_protocol_asks_for() {
    let (ram, entry) = boot(&bzimage(), Some(&[7; 5000]), "console=ttyS0", 64).unwrap();
    assert_eq!(
        entry,
        Entry::Linux64 {
            rip: 0x10_0200,
            zero_page: ZERO_PAGE_AT,
            page_tables: PAGE_TABLES_AT,
            gdt: GDT_AT
        }
    );
    let params: boot_params = ram.read_obj(GuestAddress(ZERO_PAGE_AT)).unwrap();
    let header = params.hdr;
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    assert_eq!({ header.cmd_line_ptr }, CMDLINE_AT as u32);
    assert_eq!({ header.ramdisk_size }, 5000);
    let at = GuestAddress(header.ramdisk_image.into());
    assert_eq!(at.0 % PAGE, 0);
    assert_eq!(at.0 + 2 * PAGE, 64 << 20);
    assert_eq!(ram.read_obj::<u8>(at.unchecked_add(4999)).unwrap(), 7);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 0xcc);
    let mut line = [0; 14];
    ram.read_slice(&mut line, GuestAddress(CMDLINE_AT)).unwrap();
    assert_eq!(&line, b"console=ttyS0\0");
    let table = params.e820_table;
    assert_eq!(params.e820_entries, 7);
    assert_eq!(({ table[0].addr }, { table[0].size }), (0, 0x9_fc00));
    assert_eq!({ table[4].addr }, 0x10_0000);
}

#[test]
fn every_address_of_the_first_4_gib_is_mapped_to_itself() {
    let (ram, _) = boot(&bzimage(), None, "", 64).unwrap();
    let entry = |table: u64, n: u64| -> u64 {
        ram.read_obj::<u64>(GuestAddress((table & !0xfff) + 8 * n))
            .unwrap()
    };
    for address in (0..1u64 << 32).step_by(0x0123_4567) {
        let pdpt = entry(PAGE_TABLES_AT, 0);
        let directory = entry(pdpt, address >> 30);
        let page = entry(directory, address >> 21 & 511);
        assert_eq!(page & 0x83, 0x83);
        assert_eq!(page & !0xfff, address & !0x1f_ffff);
    }
}

#[test]
fn a_vmlinux_is_entered_through_its_pvh_note() {
    let (ram, entry) = boot(&vmlinux(), Some(b"cpio"), "a b", 64).unwrap();
    assert_eq!(
        entry,
        Entry::Pvh {
            eip: 0x100_0040,
            start_info: START_INFO_AT as u32,
            gdt: GDT_AT
        }
    );
    let info: hvm_start_info = ram.read_obj(GuestAddress(START_INFO_AT)).unwrap();
    assert_eq!(info.magic, XEN_HVM_START_MAGIC_VALUE);
    assert_eq!((info.nr_modules, info.memmap_entries), (1, 7));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(0x100_00ff)).unwrap(), 0xdd);
}

#[test]
fn a_jump_to_the_bios_resets_the_machine() {
    for kernel in [bzimage(), vmlinux()] {
        let (ram, _) = boot(&kernel, None, "", 64).unwrap();
        let mut code = [0; 4];
        ram.read_slice(&mut code, GuestAddress(0xf_0000 + 0xfff0))
            .unwrap();
        // mov al, 0xfe; out 0x64, al
        assert_eq!(code, [0xb0, 0xfe, 0xe6, 0x64]);
    }
}

#[test]
fn the_memory_map_is_ordered_and_nothing_in_it_overlaps() {
    for gib in [1, 4, 64] {
        let layout = layout::compose(gib << 30, 46, &[]).unwrap();
        let map = memory_map(&layout);
        for pair in map.windows(2) {
            assert!(pair[0].0.last < pair[1].0.first, "{map:?}");
        }
        assert!(map.contains(&(layout.ecam, Kind::Reserved)));
    }
}

#[test]
fn a_payload_that_cannot_boot_is_refused_with_the_reason() {
    let mut short = bzimage();
    short.truncate(5 * 512 + 0x800);
    let mut old = bzimage();
    old[0x206] = 0;
    let mut short_elf = vmlinux();
    short_elf.truncate(0x880);
    let mut without_pvh = vmlinux();
    without_pvh[0x40c] = b'Y';
    let mut arm = vmlinux();
    arm[18] = 183;
    let mut wild = vmlinux();
    wild[64 + 24..64 + 32].fill(0xff);
    for (kernel, words) in [
        (&b"hello"[..], "too short"),
        (&[0; 4096], "neither a bzImage header nor an ELF header"),
        (&short, "is truncated (4608 of at least 6656 bytes)"),
        (&old, "no 64-bit entry"),
        (&short_elf, "is truncated"),
        (&without_pvh, "without a PVH entry"),
        (&arm, "another machine"),
        (&wild, "give more with --memory"),
        (b"\x7fELF", "another machine"),
    ] {
        let error = boot(kernel, None, "", 64).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains('\n'));
    }
    let error = boot(&bzimage(), None, &"x".repeat(256), 64).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("256 bytes and this kernel takes 255")
    );
    let error = boot(&bzimage(), None, "a\0", 64).unwrap_err();
    assert!(error.to_string().contains("NUL"));
    let error = boot(&bzimage(), Some(b""), "", 64).unwrap_err();
    assert!(error.to_string().contains("is empty"));
    let error = boot(&bzimage(), Some(&vec![0; 15 << 20]), "", 16).unwrap_err();
    assert!(error.to_string().contains("needs 18M"), "{error}");
    let error = boot(&bzimage(), Some(&vec![0; 15 << 20]), "", 32).unwrap_err();
    assert!(error.to_string().contains("needs 15M"), "{error}");
    let payload = PayloadConfig {
        kernel: "/nonexistent/kernel".into(),
        ..Default::default()
    };
    let layout = layout::compose(64 << 20, 40, &[]).unwrap();
    let ram = ram::allocate(&MemoryConfig::default(), &layout).unwrap();
    let error = load(&ram, &layout, &payload, &memory_map(&layout), 0).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("/nonexistent/kernel cannot be read")
    );
}
