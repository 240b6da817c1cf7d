//! What the lab needs before it can start a machine, each part made once and kept in the cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, sha256};
use crate::debian::{self, Apt};
use crate::engine;
use crate::mend;
use crate::modules;
use crate::report::{note, step};

/// The oldest QEMU whose SVM emulation runs guests without corrupting them.
const QEMU_MIN: (u32, u32, u32) = (10, 0, 2);
/// Where it comes from. A system's own may be another build, whose faults nobody could find.
const QEMU_SUITE: &str = "bookworm-backports";
/// Its place in a tree of Debian's packages.
const QEMU_PROGRAM: &str = "usr/bin/qemu-system-x86_64";

/// The host kernel that may stand ready beside the project, and its sum.
const READY_KERNEL: &str = "../shared/lab/bzImage-host-7.2.12";
const READY_KERNEL_SUM: &str = "4f2af2b8e4966e8348e57b5bdbafc4ac462cec0b5a7d3ae1373b5854d8251585";

/// A stock kernel: its short name and the packages with its image and its modules.
struct Stock {
    name: &'static str,
    image: (&'static str, &'static str),
    modules: Option<(&'static str, &'static str)>,
}

/// Debian's kernels that guests are booted with.
const STOCK: [Stock; 3] = [
    Stock {
        name: "6.1",
        image: ("linux-image-6.1.0-", "-amd64"),
        modules: None,
    },
    Stock {
        name: "6.12",
        image: ("linux-image-6.12.", "+deb12-amd64"),
        modules: None,
    },
    Stock {
        name: "7.2",
        image: ("linux-binary-7.2.", "+deb13-amd64"),
        modules: Some(("linux-modules-7.2.", "+deb13-amd64")),
    },
];

/// The packages of the programs that not every guest has, with the libraries that a small system
/// may lack.
const TOOLS: [&str; 8] = [
    "pciutils",
    "util-linux",
    "libpci3",
    "libkmod2",
    "zlib1g",
    "libzstd1",
    "liblzma5",
    "libssl3",
];

/// The name of the lab's own kernel among the guests' kernels.
pub const LAB_KERNEL: &str = "lab";

/// Everything that comes from outside the project, ready.
#[derive(Debug)]
pub struct Supplies {
    /// QEMU, when there is a need for it.
    pub qemu: Option<Qemu>,
    /// A static busybox.
    pub busybox: PathBuf,
    /// A tree with `usr/bin/lspci` and its libraries.
    pub tools: PathBuf,
    /// The lab's own kernel: of the host that plays the user's, and of guests.
    pub host_kernel: PathBuf,
    /// Stock kernels by name; each folder has `vmlinuz`, `release` and `modules/`.
    pub stock: Vec<(String, PathBuf)>,
    /// The DMA test engine's module for some of them, by the same names.
    pub engine: Vec<(String, PathBuf)>,
}

/// A QEMU that can be started.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    /// The tree it was unpacked in, unless it is the system's.
    tree: Option<PathBuf>,
}

impl Supplies {
    /// Makes what is missing.
    ///
    /// # Errors
    /// Something cannot be had; the error says what and what to do.
    pub fn get(root: &Path, cache: &Cache, with_qemu: bool) -> Result<Self> {
        debian::require(&[
            ("dpkg-deb", "dpkg"),
            ("xz", "xz-utils"),
            ("zstd", "zstd"),
            ("cc", "gcc"),
            ("strip", "binutils"),
            ("make", "make"),
            ("/usr/include/stdio.h", "libc6-dev"),
        ])?;
        let mut apt = LazyApt { cache, apt: None };
        let qemu = if with_qemu {
            Some(qemu(cache, &mut apt)?)
        } else {
            None
        };
        let busybox = cache.component("busybox", |to| {
            step("fetch busybox", || apt.get()?.unpack("busybox-static", to))
        })?;
        let tools = cache.component("programs", |to| {
            step("fetch the guests' programs", || {
                let apt = apt.get()?;
                for package in TOOLS {
                    apt.unpack(package, to)?;
                }
                Ok(())
            })
        })?;
        let host_kernel = host_kernel(root, cache, &mut apt)?;
        let (mut stock, mut modules) = (Vec::new(), Vec::new());
        for kernel in &STOCK {
            let folder = cache.component(&format!("guests/{}", kernel.name), |to| {
                step(&format!("fetch Debian's kernel {}", kernel.name), || {
                    fetch_stock(apt.get()?, kernel, to)
                })
            })?;
            let release = fs::read_to_string(folder.join("release"))?;
            let module = engine::module(root, cache, &release, || apt.get())?;
            modules.extend(module.map(|module| (kernel.name.to_owned(), module)));
            stock.push((kernel.name.to_owned(), folder));
        }
        let busybox = [busybox.join("bin/busybox"), busybox.join("usr/bin/busybox")]
            .into_iter()
            .find(|p| p.exists())
            .context("the package busybox-static has no busybox")?;
        Ok(Self {
            qemu,
            busybox,
            tools,
            host_kernel,
            stock,
            engine: modules,
        })
    }
}

/// apt, set up when first needed: a full cache needs none.
struct LazyApt<'c> {
    cache: &'c Cache,
    apt: Option<Apt>,
}

impl LazyApt<'_> {
    fn get(&mut self) -> Result<&Apt> {
        match &mut self.apt {
            Some(apt) => Ok(apt),
            empty => Ok(empty.insert(Apt::open(self.cache)?)),
        }
    }
}

fn fetch_stock(apt: &Apt, kernel: &Stock, to: &Path) -> Result<()> {
    let tree = to.join("tree");
    let image = apt.newest(kernel.image.0, kernel.image.1)?;
    apt.unpack(&image, &tree)?;
    if let Some((before, after)) = kernel.modules {
        apt.unpack(&apt.newest(before, after)?, &tree)?;
    }
    let base = [tree.join("usr/lib/modules"), tree.join("lib/modules")]
        .into_iter()
        .find(|p| p.is_dir())
        .with_context(|| format!("{image} has no modules"))?;
    let folder = fs::read_dir(&base)?.next().context("no release")??.path();
    let release = folder
        .file_name()
        .and_then(|n| n.to_str())
        .context("no release")?
        .to_owned();
    let vmlinuz = [
        folder.join("vmlinuz"),
        tree.join(format!("boot/vmlinuz-{release}")),
    ]
    .into_iter()
    .find(|p| p.exists())
    .with_context(|| format!("{image} has no vmlinuz"))?;
    fs::copy(vmlinuz, to.join("vmlinuz"))?;
    fs::write(to.join("release"), &release)?;
    modules::collect(&folder, &to.join("modules"))?;
    fs::remove_dir_all(&tree)?;
    Ok(())
}

fn qemu(cache: &Cache, apt: &mut LazyApt) -> Result<Qemu> {
    let system = Qemu {
        program: "/usr/bin/qemu-system-x86_64".into(),
        tree: None,
    };
    let mended = cache.component("qemu-mended", |to| {
        step(&format!("fetch QEMU from {QEMU_SUITE}"), || {
            apt.get()?
                .unpack_with_dependencies("qemu-system-x86", QEMU_SUITE, to)?;
            let program = to.join(QEMU_PROGRAM);
            let mut bytes = fs::read(&program)?;
            let mended = mend::mend(&mut bytes);
            if mended < mend::FAULTS {
                note(&format!(
                    "this QEMU is not the one that the lab knows: {mended} of {} faults of its CPU \
                     were found and mended, and a host may be lost now and then",
                    mend::FAULTS
                ));
            }
            Ok(fs::write(&program, bytes)?)
        })
    });
    let tree = match mended {
        Ok(tree) => tree,
        Err(why) if system.version().is_ok_and(|v| v >= QEMU_MIN) => {
            note(&format!(
                "{why:#}; the system's QEMU is used as it is, and a host may be lost now and then"
            ));
            return Ok(system);
        }
        Err(why) => return Err(why),
    };
    let qemu = Qemu {
        program: tree.join(QEMU_PROGRAM),
        tree: Some(tree),
    };
    let version = qemu.version()?;
    if version < QEMU_MIN {
        bail!(
            "{} is {}.{}.{}; the lab needs 10.0.2 or later",
            qemu.program.display(),
            version.0,
            version.1,
            version.2
        );
    }
    Ok(qemu)
}

impl Qemu {
    /// A command that starts it, with its libraries and firmware found.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(tree) = &self.tree {
            let libraries = tree.join("usr/lib/x86_64-linux-gnu");
            let mut path = libraries.clone().into_os_string();
            path.push(":");
            path.push(tree.join("lib/x86_64-linux-gnu"));
            command.env("LD_LIBRARY_PATH", path);
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
            command.arg("-L").arg(tree.join("usr/share/qemu"));
            command.arg("-L").arg(tree.join("usr/share/seabios"));
        }
        command
    }

    /// The program, and the folders that its libraries and its firmware are in.
    pub fn parts(&self) -> (&Path, Vec<PathBuf>, PathBuf) {
        match &self.tree {
            Some(tree) => (
                &self.program,
                vec![
                    tree.join("usr/lib/x86_64-linux-gnu"),
                    tree.join("lib/x86_64-linux-gnu"),
                ],
                tree.join("usr/share"),
            ),
            None => (&self.program, Vec::new(), "/usr/share".into()),
        }
    }

    fn version(&self) -> Result<(u32, u32, u32)> {
        let output = self.command().arg("--version").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        parse_version(&text).with_context(|| {
            format!(
                "{} does not say its version: {text}{}",
                self.program.display(),
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let word = text.split("version ").nth(1)?.split_whitespace().next()?;
    let mut numbers = word.split('.').map(str::parse);
    Some((
        numbers.next()?.ok()?,
        numbers.next()?.ok()?,
        numbers.next()?.ok()?,
    ))
}

/// The lab's own kernel: the one that stands ready with the right sum, else built and cached.
fn host_kernel(root: &Path, cache: &Cache, apt: &mut LazyApt) -> Result<PathBuf> {
    let ready = root.join(READY_KERNEL);
    if ready.exists() {
        if sha256(&ready)? == READY_KERNEL_SUM {
            return Ok(ready);
        }
        note(&format!(
            "{} does not have the recorded sum; not using it",
            ready.display()
        ));
    }
    let folder = cache.component("host-kernel", |to| build_host_kernel(root, apt.get()?, to))?;
    Ok(folder.join("bzImage"))
}

/// Builds the lab's own kernel into the cache even where another stands ready.
///
/// # Errors
/// A package cannot be had or the build fails.
pub fn build_kernel(root: &Path, cache: &Cache) -> Result<PathBuf> {
    let mut apt = LazyApt { cache, apt: None };
    let folder = cache.component("host-kernel", |to| build_host_kernel(root, apt.get()?, to))?;
    Ok(folder.join("bzImage"))
}

fn build_host_kernel(root: &Path, apt: &Apt, to: &Path) -> Result<()> {
    debian::require(&[
        ("gcc", "gcc"),
        ("make", "make"),
        ("flex", "flex"),
        ("bison", "bison"),
        ("bc", "bc"),
        ("perl", "perl"),
        ("xz", "xz-utils"),
        ("/usr/include/gelf.h", "libelf-dev"),
        ("/usr/include/openssl/opensslv.h", "libssl-dev"),
    ])?;
    let source = to.join("source");
    step("fetch the source of Linux 7.2", || {
        apt.unpack("linux-source-7.2", &source)?;
        let archive = source.join("usr/src/linux-source-7.2.tar.xz");
        shell(&format!(
            "tar -x --strip-components=1 -C '{0}' -f '{1}' && rm '{1}'",
            source.display(),
            archive.display()
        ))
    })?;
    fs::copy(
        root.join("tests/lab/kernel/host.defconfig"),
        source.join(".config"),
    )?;
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    let make = format!(
        "make -C '{}' -s LOCALVERSION= KBUILD_BUILD_HOST=lab",
        source.display()
    );
    step("build the lab's kernel (5-6 minutes on two cores)", || {
        shell(&format!("{make} olddefconfig && {make} -j{jobs} bzImage"))
    })?;
    keep_kernel(&source, to)
}

/// Of all that was built in `source`, the kernel is kept.
fn keep_kernel(source: &Path, to: &Path) -> Result<()> {
    let built = source.join("arch/x86/boot/bzImage");
    fs::copy(&built, to.join("bzImage")).with_context(|| format!("no {}", built.display()))?;
    fs::remove_dir_all(source)?;
    Ok(())
}

fn shell(command: &str) -> Result<()> {
    let output = Command::new("sh").args(["-c", command]).output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let from = text.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
        bail!("{command} failed:\n{}", &text[from..]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_was_built_is_kept_alone_and_found_again() {
        let folder = std::env::temp_dir().join(format!("lab-kernel-{}", std::process::id()));
        let cache = Cache::at(&folder);
        let build = |to: &Path| -> Result<()> {
            let source = to.join("source");
            fs::create_dir_all(source.join("arch/x86/boot/compressed"))?;
            fs::write(source.join("arch/x86/boot/compressed/vmlinux.o"), "x")?;
            fs::write(source.join("arch/x86/boot/bzImage"), "kernel")?;
            keep_kernel(&source, to)
        };
        let made = cache.component("host-kernel", build).unwrap();
        assert_eq!(made, folder.join("host-kernel"));
        let again = |_: &Path| bail!("it is built again");
        assert_eq!(cache.component("host-kernel", again).unwrap(), made);
        assert_eq!(fs::read(made.join("bzImage")).unwrap(), b"kernel");
        let files = fs::read_dir(&made).unwrap().flatten();
        let mut files: Vec<_> = files.map(|file| file.file_name()).collect();
        files.sort();
        assert_eq!(files, ["SHA256SUMS", "bzImage"]);
        cache.remove().unwrap();
    }

    #[test]
    fn a_version_is_read_as_qemu_prints_it() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(parse_version(text), Some((10, 0, 2)));
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (x)"),
            Some((7, 2, 22))
        );
        assert_eq!(parse_version(""), None);
    }
}
