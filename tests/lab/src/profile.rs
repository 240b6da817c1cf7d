//! Profiles: which emulated hardware the lab's host has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// One file of `tests/lab/profiles`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What it is for, in one line.
    pub description: String,
    /// The host's CPUs.
    pub cpus: u8,
    /// The host's memory in MiB. The emulator takes it as it is touched.
    pub memory_mib: u32,
    /// QEMU's `-cpu`.
    #[serde(default = "max")]
    pub cpu: String,
    /// What is added to the host kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// QEMU's arguments for this hardware. `{images}` stands for the folder of the images below.
    #[serde(default)]
    pub qemu: Vec<String>,
    /// Image files to make, sparse and empty, by name, with their size in MiB.
    #[serde(default)]
    pub images: BTreeMap<String, u64>,
}

fn max() -> String {
    "max".to_owned()
}

impl Profile {
    /// Reads the profile `name` of the project at `root`.
    ///
    /// # Errors
    /// There is none of this name or it is not well formed.
    pub fn read(root: &Path, name: &str) -> Result<Self> {
        let path = root.join("tests/lab/profiles").join(format!("{name}.toml"));
        let text = fs::read_to_string(&path)
            .with_context(|| format!("no profile {name}: cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_of_the_project_is_well_formed() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for entry in fs::read_dir(root.join("tests/lab/profiles")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap();
            let profile = Profile::read(&root, name).unwrap();
            assert!(
                !profile.description.is_empty() && profile.cpus > 0,
                "{name}"
            );
        }
    }
}
