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
use crate::debian::Apt;
use crate::report::step;

/// Its source in the project.
const SOURCE: &str = "tests/dma-engine/module";
/// Its name.
pub const MODULE: &str = "dma_engine.ko";

/// The module for the kernel `release`; `None` where Debian 12 cannot build it: later kernels'
/// headers need a later compiler and C library.
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
        Some(_) => "linux-kbuild-6.1".to_owned(),
        None if flavourless.contains("+deb12") => format!("linux-kbuild-{flavourless}"),
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
                remove(&tree)
            },
        )
    })?;
    Ok(Some(folder.join(MODULE)))
}

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
    let work = tree.join("module");
    fs::create_dir(&work)?;
    for file in ["Makefile", "dma_engine.c"] {
        fs::copy(source.join(file), work.join(file))?;
    }
    let output = Command::new("make")
        .arg(format!("KERNEL={}", headers.display()))
        .arg("CC=gcc")
        .current_dir(&work)
        .output()
        .context("make")?;
    if !output.status.success() {
        bail!(
            "building {SOURCE} for {release} failed:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
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
    #[ignore = "fetches 30 MB of Debian packages; run it by name after changing the module"]
    fn the_module_builds_for_debians_kernels() -> Result<()> {
        let cache = Cache::open()?;
        let apt = Apt::open(&cache)?;
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for (before, after) in [
            ("linux-headers-6.1.0-", "-amd64"),
            ("linux-headers-6.12.", "+deb12-amd64"),
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
        assert_eq!(
            module(&root, &cache, "7.2.12+deb13-amd64", || Ok(&apt))?,
            None
        );
        Ok(())
    }
}
