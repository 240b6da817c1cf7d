//! What the host's kernel keeps for a nestling and its devices: to count what is left behind where
//! no process shows it.

use std::fs;

use anyhow::{Context, Result};

use super::iommufd;

/// What the host's kernel has of a process and of all devices at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Objects of each iommufd that the process has open.
    pub objects: Vec<u32>,
    /// Interrupts that VFIO has requested.
    pub interrupts: usize,
    /// Pages that the process has pinned, in KiB, as it is charged for them.
    pub pinned_kib: u64,
    /// Pages that are pinned for DMA, whoever did it.
    pub pins: i64,
    /// Pages of the tables of the host's IOMMUs.
    pub tables: u64,
}

/// What the host's kernel keeps for the process `pid`.
///
/// # Errors
/// It is gone, or this is not root.
pub fn kept(pid: u32) -> Result<Kept> {
    let interrupts = fs::read_to_string("/proc/interrupts")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let all = fs::read_to_string("/proc/vmstat")?;
    let of_all = |name: &str| {
        number(&all, name).with_context(|| format!("the host's kernel does not count {name}"))
    };
    let pins = of_all("nr_foll_pin_acquired")?.cast_signed()
        - of_all("nr_foll_pin_released")?.cast_signed();
    Ok(Kept {
        objects: iommufd::objects(pid)?,
        interrupts: interrupts.matches("vfio-").count(),
        pinned_kib: number(&status, "VmPin:").unwrap_or(0),
        pins,
        tables: of_all("nr_iommu_pages")?,
    })
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
