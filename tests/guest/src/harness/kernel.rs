//! What the host's kernel keeps for a nestling and its devices: to count what is left behind where
//! no process shows it.

use std::fs;

use anyhow::{Context, Result};

use super::iommufd;

/// What the host's kernel has of a process and of all devices at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Objects of each iommufd that the process has open.
    pub objects: Vec<u32>,
    /// Interrupts that VFIO has requested; 0 where others are at work.
    pub interrupts: usize,
    /// Pages that the process has pinned, in KiB, as it is charged for them.
    pub pinned_kib: u64,
    /// Pages that are pinned for DMA, whoever did it; 0 where others are at work.
    pub pins: i64,
    /// Pages of the tables of the host's IOMMUs; 0 where others are at work.
    pub tables: u64,
}

impl Kept {
    /// Whether nothing is kept that was not kept `before`. Pins and tables of the whole host may
    /// have become fewer: what the guest before this one had is given back a moment after it ends.
    pub fn is_no_more_than(&self, before: &Self) -> bool {
        self.objects == before.objects
            && self.interrupts == before.interrupts
            && self.pinned_kib == before.pinned_kib
            && self.pins <= before.pins
            && self.tables <= before.tables
    }
}

/// What the host's kernel keeps for the process `pid`.
///
/// # Errors
/// It is gone, or this is not root.
pub fn kept(pid: u32) -> Result<Kept> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let mut kept = Kept {
        objects: iommufd::objects(pid)?,
        pinned_kib: number(&status, "VmPin:").unwrap_or(0),
        ..Kept::default()
    };
    // Elsewhere these are others' too, and come and go with them.
    if lab_is_alone() {
        // Each CPU counts for itself, and what it counted is added up a second or two later; this
        // does it now.
        fs::write("/proc/sys/vm/stat_refresh", "1")?;
        let all = fs::read_to_string("/proc/vmstat")?;
        let of_all = |name: &str| {
            number(&all, name).with_context(|| format!("the host's kernel does not count {name}"))
        };
        kept.interrupts = fs::read_to_string("/proc/interrupts")?
            .matches("vfio-")
            .count();
        kept.pins = of_all("nr_foll_pin_acquired")?.cast_signed()
            - of_all("nr_foll_pin_released")?.cast_signed();
        kept.tables = of_all("nr_iommu_pages")?;
    }
    Ok(kept)
}

/// Whether this is a host of the lab's own making, where nobody else is at work.
fn lab_is_alone() -> bool {
    std::env::var_os("NESTLING_LAB").is_some_and(|place| place == "/lab")
}

/// What the host's kernel has for itself and cannot give back, in KiB.
///
/// # Errors
/// `/proc/meminfo` cannot be read.
pub fn unreclaimable_kib() -> Result<u64> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    number(&memory, "SUnreclaim:").context("the host's kernel does not count its memory")
}

/// The number after `name` in a text of lines.
fn number(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        rest.starts_with(char::is_whitespace).then_some(rest)
    })?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_its_whole_name() {
        let text = "nr_iommu_pages_x 3\nnr_iommu_pages 17\nVmPin:\t  24 kB\n";
        assert_eq!(number(text, "nr_iommu_pages"), Some(17));
        assert_eq!(number(text, "VmPin:"), Some(24));
        assert_eq!(number(text, "nr_iommu"), None);
    }
}
