//! Guest memory from huge pages.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::harness::huge::HugePages;
use crate::harness::{Guest, Lab, Test};

/// The tests.
pub const TESTS: &[Test] = &[Test::new("huge_pages_are_used_and_given_back", huge_pages)];

/// Of 2 MiB each: 256 MiB of guest memory and a few to spare.
const WANTED: u64 = 140;

fn huge_pages(lab: &Lab) -> Result<()> {
    let pages = HugePages::reserve(WANTED)?;
    let free = HugePages::count("free_hugepages")?;
    let mut guest = Guest::lab_kernel()
        .memory("size=256M,hugepages=on")
        .boot(lab)?;
    guest.run("dd if=/dev/zero of=/tmp/x bs=1M count=100 && rm /tmp/x")?;
    let taken = free - (HugePages::count("free_hugepages")? - HugePages::count("resv_hugepages")?);
    ensure!(
        taken == 128,
        "the guest's 256 MiB took {taken} huge pages of 2 MiB"
    );
    guest.power_off()?;
    // The kernel may take its time with what a process leaves.
    let deadline = Instant::now() + Duration::from_secs(60);
    while HugePages::count("free_hugepages")? != free && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = HugePages::count("free_hugepages")?;
    ensure!(after == free, "of {free} huge pages {after} came back");
    drop(pages);
    Ok(())
}
