//! `cargo demo`: one guest, shown, with what nestling is for: an IOMMU of its own.

use anyhow::Result;

use crate::engine::{NO_PASID, check, faults_are};
use crate::harness::{Guest, Lab, Test, show, until};
use crate::vtd::disk_keeps;

/// The tests.
pub const TESTS: &[Test] = &[Test::new("a_guest", demo).on_request()];

fn demo(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let mut guest = Guest::debian("7.2")
        .cpus(2)
        .memory("size=1G")
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=vtd,id=unit")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .option("--test-device", "iommu=on")
        .verbose()
        .boot(lab)?;
    let seconds = guest.age().as_secs_f64();
    let system = guest.run("uname -srv; nproc; free -m | sed -n 2p")?;
    let groups = guest.run(
        "for device in /sys/kernel/iommu_groups/*/devices/*; do \
         echo \"$(basename $device): $(cat ${device%/devices/*}/type)\"; done",
    )?;
    disk_keeps(&mut guest, &image)?;
    let astray = check(&mut guest, "blocked")?;
    // The driver takes a fault a little after the device has its answer.
    let told = guest.run(&format!(
        "{}; dmesg | grep 'DMAR: .DMA'",
        until("dmesg | grep -q 'DMA Write.*fault addr 0x1000'")
    ))?;
    faults_are(
        &mut guest,
        &[
            ("DMA Read", NO_PASID, 0x1000, 0x71),
            ("DMA Write", NO_PASID, 0x1000, 0x71),
        ],
    )?;
    disk_keeps(&mut guest, &image)?;
    let units = guest.viommus()?;
    let ended = guest.power_off()?;
    show("The guest's console:");
    show(&ended.console);
    show(format!(
        "\nIt took commands after {seconds:.1} s. What it says of itself:"
    ));
    show(&system);
    show("Its devices behind the VT-d unit, and their domains:");
    show(&groups);
    show("A device without a driver, told to read and write where it may not:");
    show(&astray);
    show("What the guest's kernel says of that:");
    show(&told);
    let faults = units[0]["faults_recorded"].as_u64().unwrap_or_default();
    show(format!(
        "Proved: nestling booted Debian's kernel, whose stock driver took a VT-d unit. A disk\n\
         behind it kept every byte, by tables of the guest's own; a device that went astray reached\n\
         nothing, {faults} faults told the guest so, and the disk never noticed. The power-off ended\n\
         nestling with status 0, and the rest of the guest's log has no complaint."
    ));
    Ok(())
}
