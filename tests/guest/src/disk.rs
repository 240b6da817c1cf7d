//! Disks keep what is written, refuse what is not allowed, and say what they can do.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::harness::{Guest, Lab, Test};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new(
        "what_is_written_is_read_back_after_a_second_boot",
        written_and_read_back,
    ),
    Test::new("a_read_only_disk_stays_as_it_is", read_only),
    Test::new("discard_and_write_zeroes_read_as_zeroes", discard),
];

const SLOW: Duration = Duration::from_secs(400);

fn written_and_read_back(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 64)?;
    let guest = Guest::debian("7.2").cpus(2).disk(&image);

    let mut first = guest.boot(lab)?;
    ensure!(first.run("blockdev --getsize64 /dev/vda")?.trim() == (64 << 20).to_string());
    first.run_within(SLOW, "dd if=/dev/urandom of=/dev/vda bs=1M count=48")?;
    // Small writes at odd places, some of which span pages.
    first.run(
        "for at in 1 7 4095 40001 131069; do \
         dd if=/dev/urandom of=/dev/vda bs=512 count=3 seek=$at conv=notrunc; done",
    )?;
    first.run("sync; echo 3 > /proc/sys/vm/drop_caches")?;
    let written = first.run_within(SLOW, "sha256sum < /dev/vda")?;
    // What was synced is in the file while the guest still runs.
    ensure!(
        sum(&image)? == written.trim(),
        "after sync the image differs from the disk"
    );
    first.power_off()?;

    let mut second = guest.boot(lab)?;
    let read = second.run_within(SLOW, "sha256sum < /dev/vda")?;
    second.power_off()?;
    ensure!(
        read == written,
        "the second boot reads {read} where the first wrote {written}"
    );
    Ok(())
}

fn read_only(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 8)?;
    let before = sum(&image)?;
    let option = format!("path={},readonly=on", image.display());
    let mut guest = Guest::lab_kernel().option("--disk", &option).boot(lab)?;
    ensure!(
        guest.run("cat /sys/block/vda/ro")?.trim() == "1",
        "the guest is not told"
    );
    let write = guest.try_run(SLOW, "dd if=/dev/zero of=/dev/vda count=1")?;
    ensure!(write.status != 0, "a write to a read-only disk succeeded");
    guest.run_within(SLOW, "cat /dev/vda > /dev/null")?;
    guest.power_off()?;
    ensure!(
        sum(&image)? == before,
        "the image of a read-only disk has changed"
    );
    Ok(())
}

fn discard(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 16)?;
    let mut guest = Guest::lab_kernel().tools().disk(&image).boot(lab)?;
    for what in ["discard", "write_zeroes"] {
        let most = guest.run(&format!("cat /sys/block/vda/queue/{what}_max_bytes"))?;
        ensure!(most.trim() != "0", "the disk does not offer {what}");
    }
    let fill = "tr '\\0' x < /dev/zero | dd of=/dev/vda bs=1M count=16 iflag=fullblock && sync";
    let zeroes = |at: u64| {
        format!(
            "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M skip={at} count=4 | \
             tr -d '\\0' | wc -c"
        )
    };
    guest.run_within(SLOW, fill)?;
    guest.run("/sbin/discard -o 4M -l 4M /dev/vda")?;
    guest.run("/sbin/discard -z -o 8M -l 4M /dev/vda")?;
    for (at, left) in [(0, 4 << 20), (4, 0), (8, 0), (12, 4 << 20)] {
        let found = guest.run_within(SLOW, &zeroes(at))?;
        ensure!(
            found.trim() == left.to_string(),
            "at {at} MiB {} bytes are not zero, {left} were expected",
            found.trim()
        );
    }
    guest.power_off()?;
    Ok(())
}

/// The SHA-256 of a file as `sha256sum < FILE` prints it.
fn sum(file: &Path) -> Result<String> {
    let output = Command::new("sha256sum")
        .stdin(std::fs::File::open(file)?)
        .output();
    let output = output.context("cannot run sha256sum")?;
    if !output.status.success() {
        bail!(
            "sha256sum {}: {}",
            file.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
