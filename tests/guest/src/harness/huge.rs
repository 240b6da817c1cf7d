//! Huge pages of the host, for guests' memory.

use std::fs;

use anyhow::{Context, Result, ensure};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Huge pages of 2 MiB that the host set aside. It takes them back with the value.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// At least `wanted` that are free.
    ///
    /// # Errors
    /// The host has no memory for them, or this is not root.
    pub fn reserve(wanted: u64) -> Result<Self> {
        let before = Self::count("nr_hugepages")?;
        let reserved = Self { before };
        Self::resize(before + wanted)?;
        let free = Self::count("free_hugepages")?;
        ensure!(
            free >= wanted,
            "the host has only {free} huge pages to give, not {wanted}"
        );
        Ok(reserved)
    }

    /// A number of the pool, by the name of its file.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn count(what: &str) -> Result<u64> {
        let path = format!("{POOL}/{what}");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        text.trim().parse().with_context(|| path)
    }

    fn resize(pages: u64) -> Result<()> {
        fs::write(format!("{POOL}/nr_hugepages"), pages.to_string())
            .context("cannot reserve huge pages; be root")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Those that are still in use go when their guest does.
        let _ = Self::resize(self.before);
    }
}
