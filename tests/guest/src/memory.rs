//! Guest memory from huge pages.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::harness::{Guest, Lab, Test};

/// The tests.
pub const TESTS: &[Test] = &[Test::new("huge_pages_are_used_and_given_back", huge_pages)];

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// Of 2 MiB each: 256 MiB of guest memory and a few to spare.
const WANTED: u64 = 140;

fn huge_pages(lab: &Lab) -> Result<()> {
    let before = count("nr_hugepages")?;
    fs::write(
        format!("{POOL}/nr_hugepages"),
        (before + WANTED).to_string(),
    )
    .context("cannot reserve huge pages; be root")?;
    let result = boots_on_them(lab);
    fs::write(format!("{POOL}/nr_hugepages"), before.to_string())?;
    result
}

fn boots_on_them(lab: &Lab) -> Result<()> {
    let free = count("free_hugepages")?;
    ensure!(free >= 128, "the host has only {free} huge pages to give");
    let mut guest = Guest::lab_kernel()
        .memory("size=256M,hugepages=on")
        .boot(lab)?;
    guest.run("dd if=/dev/zero of=/tmp/x bs=1M count=100 && rm /tmp/x")?;
    let taken = free - (count("free_hugepages")? - count("resv_hugepages")?);
    ensure!(
        taken == 128,
        "the guest's 256 MiB took {taken} huge pages of 2 MiB"
    );
    guest.power_off()?;
    let after = count("free_hugepages")?;
    ensure!(after == free, "of {free} huge pages {after} came back");
    Ok(())
}

fn count(what: &str) -> Result<u64> {
    let path = format!("{POOL}/{what}");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.trim().parse().with_context(|| path)
}
