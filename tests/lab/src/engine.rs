//! The kernel module of the DMA test engine (`tests/dma-engine/module`), built for stock kernels
//! with the headers packages that Debian has for them.
//!
//! Only the module is kept: its place in the cache names the kernel's release and the sum of the
//! source, so a new one of either is built anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, remove, sha256};
use crate::debian::{self, Apt};
use crate::report::step;

/// Its source in the project.
const SOURCE: &str = "tests/dma-engine/module";
/// Its name.
pub const MODULE: &str = "dma_engine.ko";

/// What stands in the small Debian 13 that builds modules for its kernels, beside the headers:
/// base-files first, since its links say where everything else goes.
const TRIXIE: [&str; 10] = [
    "base-files",
    "bash",
    "binutils",
    "coreutils",
    "dash",
    "findutils",
    "grep",
    "make",
    "mawk",
    "sed",
];

/// The module for the kernel `release`; `None` for one that is not Debian's.
///
/// Debian 12's kernels are built for with the compiler of this machine. Debian 13's headers want
/// their own compiler and C library: those are unpacked beside them, and the build runs there.
///
/// # Errors
/// The headers cannot be had, or the build failed.
pub fn module<'a>(
    root: &Path,
    cache: &Cache,
    release: &str,
    apt: impl FnOnce() -> Result<&'a Apt>,
) -> Result<Option<PathBuf>> {
    let Some(flavourless) = release.strip_suffix("-amd64") else {
        return Ok(None);
    };
    let kbuild = match flavourless.strip_prefix("6.1.0-") {
        Some(_) => Some("linux-kbuild-6.1".to_owned()),
        None if flavourless.contains("+deb12") => Some(format!("linux-kbuild-{flavourless}")),
        None if flavourless.contains("+deb13") => None,
        None => return Ok(None),
    };
    let source = root.join(SOURCE);
    let sum = sha256(&source.join("dma_engine.c"))?;
    let name = format!("dma-engine/{release}-{}", sum.get(..16).unwrap_or(&sum));
    let folder = cache.component(&name, |to| {
        step(
            &format!("build the DMA test engine's module for {release}"),
            || {
                let tree = to.join("tree");
                match kbuild {
                    Some(kbuild) => {
                        let apt = apt()?;
                        let packages = [
                            format!("linux-headers-{release}"),
                            format!("linux-headers-{flavourless}-common"),
                            kbuild,
                        ];
                        for package in packages {
                            apt.unpack(&package, &tree)?;
                        }
                        build(&source, &tree, release, &to.join(MODULE))?;
                    }
                    None => {
                        let headers = format!("linux-headers-{release}");
                        let packages = [TRIXIE.as_slice(), &[headers.as_str()]].concat();
                        let apt = Apt::open_trixie(cache)?;
                        apt.unpack_all(&packages, "trixie-backports", &tree)?;
                        build_inside(&source, &tree, release, &to.join(MODULE))?;
                    }
                }
                remove(&tree)
            },
        )
    })?;
    Ok(Some(folder.join(MODULE)))
}

/// Builds in the machine's own system, with the headers that `tree` has.
fn build(source: &Path, tree: &Path, release: &str, to: &Path) -> Result<()> {
    let headers = tree
        .join("usr/src")
        .join(format!("linux-headers-{release}"));
    // The packages expect to be installed: two files name others by absolute paths.
    for name in ["Makefile", ".kernelvariables"] {
        let path = headers.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        let place = |folder: &str| format!("{}{folder}", tree.display());
        let text = text.replace("/usr/src", &place("/usr/src"));
        fs::write(&path, text.replace("/usr/lib", &place("/usr/lib")))?;
    }
    let work = copied(source, tree)?;
    let mut make = Command::new("make");
    make.arg(format!("KERNEL={}", headers.display()))
        .arg("CC=gcc")
        .current_dir(&work);
    run(make, release)?;
    stripped(&work, to)
}

/// Builds in the system that stands in `tree`, which has no more than that in it. It is entered
/// in name spaces of its own, so that nothing stays mounted whatever happens.
fn build_inside(source: &Path, tree: &Path, release: &str, to: &Path) -> Result<()> {
    let work = copied(source, tree)?;
    // What mawk's installation would have done.
    let awk = tree.join("usr/bin/awk");
    std::os::unix::fs::symlink("mawk", &awk).with_context(|| format!("{}", awk.display()))?;
    let mut make = Command::new("unshare");
    if !debian::is_root() {
        make.args(["--user", "--map-root-user"]);
    }
    make.args(["--mount", "sh", "-ec"])
        .arg(
            "mount --rbind /dev dev; mount --rbind /proc proc; \
             exec /usr/sbin/chroot . /usr/bin/env -i PATH=/usr/bin make -C /module KERNEL=\"$0\"",
        )
        .arg(format!("/usr/src/linux-headers-{release}"))
        .current_dir(tree);
    run(make, release)?;
    stripped(&work, to)
}

/// The module's source in a folder of `tree`.
fn copied(source: &Path, tree: &Path) -> Result<PathBuf> {
    let work = tree.join("module");
    fs::create_dir(&work)?;
    for file in ["Makefile", "dma_engine.c"] {
        fs::copy(source.join(file), work.join(file))?;
    }
    Ok(work)
}

fn run(mut make: Command, release: &str) -> Result<()> {
    let output = make.output().context("cannot start the build")?;
    if !output.status.success() {
        bail!(
            "building {SOURCE} for {release} failed:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// The module that stands in `work`, without debugging information.
fn stripped(work: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip")
        .args(["--strip-debug", "-o"])
        .args([to, &work.join(MODULE)])
        .status()
        .context("strip")?;
    if !status.success() {
        bail!("strip {MODULE} failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "fetches 120 MB of Debian packages; run it by name after changing the module"]
    fn the_module_builds_for_debians_kernels() -> Result<()> {
        let cache = Cache::open()?;
        let apt = Apt::open(&cache)?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for (before, after) in [
            ("linux-headers-6.1.0-", "-amd64"),
            ("linux-headers-6.12.", "+deb12-amd64"),
            ("linux-headers-7.2.", "+deb13-amd64"),
        ] {
            let package = apt.newest(before, after)?;
            let release = package.trim_start_matches("linux-headers-");
            let module = module(&root, &cache, release, || Ok(&apt))?.context("no module")?;
            let bytes = fs::read(module)?;
            let magic = format!("vermagic={release} ");
            assert!(
                bytes
                    .windows(magic.len())
                    .any(|part| part == magic.as_bytes())
            );
        }
        Ok(())
    }
}
