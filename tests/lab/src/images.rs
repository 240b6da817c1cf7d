//! The initramfs images that machines of the lab boot with, made anew from the agent just built.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;
use crate::programs::KERNEL_PROGRAMS;
use crate::setup::{LAB_KERNEL, Qemu, Supplies};

/// The kernels of guests whose host is a guest.
const NESTED_KERNELS: [&str; 2] = ["7.2", LAB_KERNEL];

/// Writes everything that the machines see into `lab` (`target/lab`), which they all share:
/// `bin/`, and `guests/NAME/{vmlinuz,initramfs}` with `guests/tools` to append.
///
/// # Errors
/// A file cannot be read or written.
pub fn make(supplies: &Supplies, programs: &Path, lab: &Path) -> Result<()> {
    let bin = lab.join("bin");
    fs::create_dir_all(&bin)?;
    for program in ["nestling", "guest-test"] {
        place(&programs.join(program), &bin.join(program))?;
    }
    // Those are only built for the guest tests that run them.
    for program in KERNEL_PROGRAMS {
        let built = programs.join(program.name);
        if built.exists() {
            place(&built, &bin.join(program.name))?;
        }
    }
    // Debugging information would be most of every guest's initramfs.
    let agent = bin.join("init");
    strip(&programs.join("agent"), &agent)?;
    let engine = bin.join("dma-engine");
    strip(&programs.join("dma-engine"), &engine)?;
    let mut kernels = vec![(LAB_KERNEL, None)];
    for (name, folder) in &supplies.stock {
        kernels.push((name.as_str(), Some(folder)));
    }
    for (name, stock) in kernels {
        let folder = lab.join("guests").join(name);
        fs::create_dir_all(&folder)?;
        let mut archive = base(&supplies.busybox, &agent)?;
        archive.file("bin/dma-engine", &engine)?;
        if let Some((_, module)) = supplies.engine.iter().find(|(of, _)| of == name) {
            archive.file(&format!("lib/modules/{}", crate::engine::MODULE), module)?;
        }
        match stock {
            None => {
                place(&supplies.host_kernel, &folder.join("vmlinuz"))?;
                extract(&folder.join("vmlinuz"), &folder.join("vmlinux"))?;
            }
            Some(stock) => {
                place(&stock.join("vmlinuz"), &folder.join("vmlinuz"))?;
                add_modules(&mut archive, stock)?;
            }
        }
        write(&folder.join("initramfs"), &archive.finish())?;
    }
    write(&lab.join("guests/tools"), &tools(&supplies.tools)?)?;
    write(&lab.join("guests/nested"), &nested(lab, programs)?)?;
    let mut host = base(&supplies.busybox, &agent)?.finish();
    host.extend(tools(&supplies.tools)?);
    write(&lab.join("guests/host-initramfs"), &host)
}

/// Writes the ELF file inside a bzImage, unless it is there and not older.
///
/// Where it lies is in the setup header (Linux, Documentation/arch/x86/boot.rst: setup_sects,
/// payload_offset, payload_length); after the compressed bytes stands the length of the ELF file.
fn extract(image: &Path, to: &Path) -> Result<()> {
    let age = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
    if let (Ok(new), Ok(old)) = (age(image), age(to))
        && old >= new
    {
        return Ok(());
    }
    let bytes = fs::read(image)?;
    let payload = payload(&bytes)
        .with_context(|| format!("{} has no payload that is known", image.display()))?;
    let program = match payload {
        [0x1f, 0x8b, ..] => "gzip",
        [0xfd, b'7', b'z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => bail!("{} is compressed in an unknown way", image.display()),
    };
    let packed = to.with_extension("packed");
    fs::write(&packed, payload)?;
    let output = Command::new(program)
        .args(["-d", "-c"])
        .stdin(fs::File::open(&packed)?)
        .output()
        .context(program)?;
    fs::remove_file(&packed)?;
    if !output.stdout.starts_with(b"\x7fELF") {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
    write(to, &output.stdout)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    let setup = (usize::from(*image.get(0x1f1)?) + 1) * 512;
    let from = setup.checked_add(word(0x248)?)?;
    let length = word(0x24c)?.checked_sub(4)?;
    image.get(from..from.checked_add(length)?)
}

/// An init with a shell.
fn base(busybox: &Path, agent: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    for folder in [
        "dev", "proc", "sys", "tmp", "run", "root", "etc", "mnt", "lab", "sbin",
    ] {
        archive.folder(folder);
    }
    // Without it an init has no standard output before devtmpfs is mounted.
    archive.device("dev/console", 5, 1);
    archive.device("dev/null", 1, 3);
    archive.file("init", agent)?;
    archive.file("bin/busybox", busybox)?;
    let list = Command::new(busybox)
        .arg("--list")
        .output()
        .context("busybox --list")?;
    for applet in String::from_utf8_lossy(&list.stdout)
        .lines()
        .filter(|a| *a != "busybox")
    {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    // What the kernel calls by its full path.
    archive.link("sbin/modprobe", "../bin/busybox");
    archive.link("sbin/poweroff", "../bin/busybox");
    archive.bytes("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.bytes("etc/group", 0o644, b"root:x:0:\n");
    Ok(archive)
}

fn add_modules(archive: &mut Archive, stock: &Path) -> Result<()> {
    let release = fs::read_to_string(stock.join("release"))?;
    let place = format!("lib/modules/{release}");
    for entry in fs::read_dir(stock.join("modules"))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .context("a module without a name")?;
        if name != "load" {
            archive.file(&format!("{place}/{name}"), &path)?;
        }
    }
    let load = fs::read_to_string(stock.join("modules/load"))?;
    let paths: String = load
        .lines()
        .map(|name| format!("/{place}/{name}\n"))
        .collect();
    archive.bytes("lib/modules/load", 0o644, paths.as_bytes());
    Ok(())
}

/// What a guest needs to be a host: nestling, the guest tests, and what its own guests boot.
fn nested(lab: &Path, programs: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for program in ["nestling", "guest-test"] {
        let stripped = lab.join("bin").join(format!("{program}-stripped"));
        strip(&programs.join(program), &stripped)?;
        archive.file(&format!("lab/bin/{program}"), &stripped)?;
    }
    for kernel in NESTED_KERNELS {
        for file in ["vmlinuz", "initramfs"] {
            let file = format!("guests/{kernel}/{file}");
            archive.file(&format!("lab/{file}"), &lab.join(&file))?;
        }
    }
    Ok(archive.finish())
}

/// Programs that are not in every guest, with the libraries they load. `discard` is util-linux's
/// blkdiscard: busybox has one of that name that cannot write zeroes.
fn tools(tree: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let folders = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|p| tree.join(p));
    let mut needed = BTreeSet::new();
    for (program, place) in [
        ("usr/bin/lspci", "usr/bin/lspci"),
        ("sbin/blkdiscard", "sbin/discard"),
    ] {
        let file = tree.join(program);
        archive.file(place, &file)?;
        needed.extend(libraries(&file, &folders)?);
    }
    for library in needed {
        let name = library
            .file_name()
            .and_then(|n| n.to_str())
            .context("a library's name")?;
        let place = if name.starts_with("ld-linux") {
            "lib64"
        } else {
            "lib/x86_64-linux-gnu"
        };
        archive.file(&format!("{place}/{name}"), &library)?;
    }
    Ok(archive.finish())
}

/// Puts QEMU into `lab/qemu` with its libraries and the firmware it boots a kernel with, so that
/// it can be measured where the guests run.
///
/// # Errors
/// A file cannot be copied.
pub fn bundle_qemu(qemu: &Qemu, lab: &Path) -> Result<()> {
    let to = lab.join("qemu");
    for folder in ["lib", "share"] {
        fs::create_dir_all(to.join(folder))?;
    }
    let (program, folders, share) = qemu.parts();
    place(program, &to.join("qemu-system-x86_64"))?;
    for library in libraries(program, &folders)? {
        let name = library.file_name().context("a library's name")?.to_owned();
        place(&library, &to.join("lib").join(name))?;
    }
    for name in [
        "bios-256k.bin",
        "linuxboot_dma.bin",
        "linuxboot.bin",
        "pvh.bin",
        "kvmvapic.bin",
    ] {
        let found = ["qemu", "seabios"].map(|folder| share.join(folder).join(name));
        if let Some(file) = found.iter().find(|f| f.exists()) {
            place(file, &to.join("share").join(name))?;
        }
    }
    Ok(())
}

/// The shared libraries of a program, as this machine's loader finds them.
fn libraries(program: &Path, folders: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let path = std::env::join_paths(folders)?;
    let output = Command::new("ldd")
        .arg(program)
        .env("LD_LIBRARY_PATH", path)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("not found") || !output.status.success() {
        bail!("ldd {}: {text}", program.display());
    }
    Ok(text
        .lines()
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

fn write(to: &Path, contents: &[u8]) -> Result<()> {
    fs::write(to, contents).with_context(|| format!("cannot write {}", to.display()))
}

fn strip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip")
        .arg("-o")
        .arg(to)
        .arg(from)
        .status()
        .context("strip")?;
    if !status.success() {
        bail!("strip {} failed", from.display());
    }
    Ok(())
}

/// Copies a file unless the copy is there and not older.
fn place(from: &Path, to: &Path) -> Result<()> {
    let age = |path: &Path| fs::metadata(path).and_then(|m| Ok((m.modified()?, m.len())));
    if let (Ok(new), Ok(old)) = (age(from), age(to))
        && old.0 >= new.0
        && old.1 == new.1
    {
        return Ok(());
    }
    let half = to.with_extension("new");
    fs::copy(from, &half).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::rename(&half, to).with_context(|| format!("cannot write {}", to.display()))
}
