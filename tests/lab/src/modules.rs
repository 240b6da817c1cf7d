//! A stock kernel's modules: the few that guests need, uncompressed, in an order that loads.
//!
//! A kernel's package has no `modules.dep` (its installation would make one), so the order comes
//! from what each module says of itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Loaded by the agent before anything else.
const AT_BOOT: [&str; 5] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
];

/// There for `modprobe`.
const ON_DEMAND: [&str; 8] = [
    "nvme",
    "e1000e",
    "virtio_iommu",
    "vfio_pci",
    "vfio_iommu_type1",
    "iommufd",
    "tun",
    "virtio_balloon",
];

/// Copies what a guest needs of the modules under `tree` (a kernel's `lib/modules/RELEASE`) into
/// `to`: the modules, `modules.dep` for modprobe and `load` for the agent.
///
/// A wanted module that is not there is built in, or this kernel does not have it.
///
/// # Errors
/// A file cannot be read, written or decompressed.
pub fn collect(tree: &Path, to: &Path) -> Result<()> {
    let mut index = BTreeMap::new();
    walk(&tree.join("kernel"), &mut index)?;
    fs::create_dir_all(to)?;
    let mut done: Vec<(String, Vec<String>)> = Vec::new();
    for name in AT_BOOT {
        add(name, &index, to, &mut done)?;
    }
    let load: Vec<String> = done.iter().map(|(name, _)| format!("{name}.ko")).collect();
    for name in ON_DEMAND {
        add(name, &index, to, &mut done)?;
    }
    let mut dep = String::new();
    for (name, needs) in &done {
        dep += &format!("{name}.ko:");
        for need in needs {
            dep += &format!(" {need}.ko");
        }
        dep += "\n";
    }
    fs::write(to.join("modules.dep"), dep)?;
    fs::write(to.join("load"), load.join("\n") + "\n")?;
    Ok(())
}

/// Adds a module after those it needs. The list is in loading order; each entry has everything
/// it needs, nearest first, as modprobe wants it.
fn add(
    name: &str,
    index: &BTreeMap<String, PathBuf>,
    to: &Path,
    done: &mut Vec<(String, Vec<String>)>,
) -> Result<Vec<String>> {
    if let Some((_, needs)) = done.iter().find(|(known, _)| known == name) {
        return Ok(needs.clone());
    }
    let Some(path) = index.get(name) else {
        return Ok(Vec::new());
    };
    let module = contents(path)?;
    let mut needs = Vec::new();
    for need in depends(&module) {
        let behind = add(&need, index, to, done)?;
        if index.contains_key(&need) {
            for each in std::iter::once(need).chain(behind) {
                if !needs.contains(&each) {
                    needs.push(each);
                }
            }
        }
    }
    fs::write(to.join(format!("{name}.ko")), module)?;
    done.push((name.to_owned(), needs.clone()));
    Ok(needs)
}

/// Every module by its name, in which `-` and `_` are the same.
fn walk(folder: &Path, index: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("{}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, index)?;
        } else if let Some(name) = path.file_name().and_then(|n| n.to_str())
            && let Some((stem, "ko" | "ko.xz" | "ko.zst")) = name.split_once('.')
        {
            index.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn contents(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(fs::read(path)?),
    };
    let output = Command::new(program)
        .arg("-dc")
        .arg(path)
        .output()
        .context(program)?;
    if !output.status.success() {
        bail!(
            "{program} -dc {}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

/// What a module's `.modinfo` says it depends on.
fn depends(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|w| w == key) else {
        return Vec::new();
    };
    let rest = &module[at + key.len()..];
    let end = rest.iter().position(|b| *b == 0).unwrap_or(rest.len());
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_the_modules_own_words() {
        let module = b"\x7fELF..license=GPL\0depends=virtio-ring,failover\0name=x\0";
        assert_eq!(depends(module), ["virtio_ring", "failover"]);
        assert!(depends(b"license=GPL\0depends=\0").is_empty());
        assert!(depends(b"").is_empty());
    }

    #[test]
    fn a_module_is_loaded_after_what_it_needs() {
        let root = std::env::temp_dir().join(format!("lab-modules-{}", std::process::id()));
        let kernel = root.join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        fs::write(kernel.join("virtio_net.ko"), b"\0depends=net-failover\0").unwrap();
        fs::write(kernel.join("net_failover.ko"), b"\0depends=failover\0").unwrap();
        fs::write(kernel.join("failover.ko"), b"\0depends=\0").unwrap();
        collect(&root, &root.join("out")).unwrap();
        let read = |name: &str| fs::read_to_string(root.join("out").join(name)).unwrap();
        assert_eq!(
            read("load"),
            "failover.ko\nnet_failover.ko\nvirtio_net.ko\n"
        );
        assert!(read("modules.dep").contains("virtio_net.ko: net_failover.ko failover.ko\n"));
        fs::remove_dir_all(&root).unwrap();
    }
}
