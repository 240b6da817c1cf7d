//! The whole product on stock kernels: a guest (L2) whose unit nests is a host itself. Its Linux
//! gives devices behind that unit to a guest of its own (L3), whose first-stage tables become
//! nested tables of L2's iommufd, on a unit that our software engine plays.
//!
//! What L3's devices do wrong is reported to L2, whose device it is, and in the state of the unit
//! that L1 runs. L3 itself learns it from the device only: Linux's iommufd does not tell of faults
//! that nobody can answer.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::engine;
use crate::harness::bound::Bound;
use crate::harness::{Guest, Lab, Machine, Test, show};

/// The tests. Those that are `inside` run in L2.
pub const TESTS: &[Test] = &[
    Test::new(
        "a_guest_of_a_guest_has_devices_through_three_tables",
        |lab| host_of(lab, false, "nested::devices"),
    )
    .limit(560),
    Test::new("a_guest_of_a_guest_has_pasids", |lab| {
        host_of(lab, true, "nested::pasids")
    })
    .limit(560)
    .on_request(),
    Test::new("devices", devices).inside().faults(),
    Test::new("pasids", pasids).inside().faults(),
];

const SLOW: Duration = Duration::from_secs(150);

/// L2: a host with a drive and a DMA engine behind a unit that nests, where `test` runs. If it
/// does not `remap` interrupts, its kernel has to be told that its guest is trusted.
fn host_of(lab: &Lab, remap: bool, test: &str) -> Result<()> {
    let image = lab.image("disk", 64)?;
    let (unit, words) = if remap {
        ("type=vtd,nested=on,interrupt_remapping=on", "")
    } else {
        ("type=vtd,nested=on", "iommufd.allow_unsafe_interrupts=1")
    };
    let mut host = Guest::lab_kernel()
        .cpus(2)
        .memory("size=2G")
        .host()
        .all_behind()
        .cmdline(&format!("intel_iommu=on,sm_on iommu=nopt {words}"))
        .option("--viommu", unit)
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    let before = in_force(&host)?;
    host.run_inside(Duration::from_secs(450), test)?;
    let state = host.viommus()?;
    ensure!(
        state[0]["faults_recorded"].as_u64() > Some(0),
        "the unit of L2 recorded no fault: {state:#}"
    );
    // Both devices went back to the host's drivers: its tables are what they were.
    let after = in_force(&host)?;
    ensure!(
        before == after,
        "the unit of L2 had {before:?} before its guests, and has {after:?} after them"
    );
    let open =
        host.run("ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c -e /dev/iommu -e /dev/vfio || true")?;
    ensure!(open.trim() == "0", "{open} descriptors are left open in L2");
    forget_faults(&mut host)?;
    host.power_off()?;
    Ok(())
}

/// Takes the faults that L3 made on purpose out of L2's log. Only the engine made any.
fn forget_faults(host: &mut Machine) -> Result<()> {
    let log = host.run("dmesg -c")?;
    let faults: Vec<&str> = log.lines().filter(|l| l.contains("DMAR: [DMA")).collect();
    let other = faults.iter().find(|l| !l.contains("00:04.0]"));
    ensure!(
        !faults.is_empty() && other.is_none(),
        "faults of the engine alone were expected: {faults:#?}"
    );
    Ok(())
}

/// What is in force behind the one unit: each target and the kind of its translation.
fn in_force(machine: &Machine) -> Result<Vec<(String, String)>> {
    let state = machine.viommus()?;
    let targets = state[0]["targets"].as_array().context("no targets")?;
    let mut all: Vec<_> = targets
        .iter()
        .filter(|target| target["translation"]["kind"] != "blocked")
        .map(|target| {
            (
                target["target"].to_string(),
                target["translation"]["kind"].to_string(),
            )
        })
        .collect();
    all.sort();
    Ok(all)
}

/// L3 with the drive and the engine, on a stock kernel.
fn devices(lab: &Lab) -> Result<()> {
    let disk = Bound::with_ids("0x1af4", "0x1042")?;
    let dma = Bound::with_ids("0x1af4", "0x10f0")?;
    // Its clocks are a guest's of a guest: not stable, which tracing would mention.
    let mut guest = Guest::debian("7.2")
        .cmdline("intel_iommu=on iommu.strict=1 trace_clock=global")
        .option("--viommu", "type=vtd")
        .option("--device", &disk.option(",iommu=on"))
        .option("--device", &dma.option(",iommu=on"))
        .boot(lab)?;
    group_is(&mut guest, "DMA")?;
    keeps(&mut guest)?;
    first_stage(&guest.viommus()?)?;
    guest.run(
        "d=$(dirname $(ls -d /sys/bus/virtio/devices/*/block)); \
               echo DMA-FQ > $d/../iommu_group/type",
    )?;
    group_is(&mut guest, "DMA-FQ")?;
    keeps(&mut guest)?;
    rebind(&mut guest)?;
    keeps(&mut guest)?;
    first_stage(&guest.viommus()?)?;
    // Faults on purpose, and unmapping while DMA runs.
    show(engine::check(&mut guest, "blocked")?);
    guest.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1 && modprobe vfio_pci")?;
    show(engine::check(&mut guest, "vfio")?);
    guest.power_off()?;
    Ok(())
}

/// L3 with the engine, whose PASIDs each have a table of their own.
fn pasids(lab: &Lab) -> Result<()> {
    let dma = Bound::with_ids("0x1af4", "0x10f0")?;
    let mut guest = Guest::lab_kernel()
        .cmdline("intel_iommu=on trace_clock=global")
        .option("--viommu", "type=vtd")
        .option("--device", &dma.option(",iommu=on"))
        .boot(lab)?;
    guest.run("echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts")?;
    show(engine::check(&mut guest, "pasid")?);
    guest.power_off()?;
    Ok(())
}

/// Every target of the one unit has a first-stage table in force, and none was refused.
fn first_stage(units: &Value) -> Result<()> {
    let targets = units[0]["targets"].as_array().context("no targets")?;
    let disk = targets
        .iter()
        .any(|target| target["translation"]["kind"] == "stage1" && target["in_force"] == true);
    ensure!(
        disk && units[0]["back_end"]["refusals"] == 0,
        "a first-stage table in force was expected: {units:#}"
    );
    Ok(())
}

/// The drive's group is flushed at once or in batches.
fn group_is(guest: &mut Machine, expected: &str) -> Result<()> {
    let is = guest.run(
        "d=$(dirname $(ls -d /sys/bus/virtio/devices/*/block)); \
         cat $d/../iommu_group/type",
    )?;
    ensure!(is.trim() == expected, "the group's type is {is}");
    Ok(())
}

/// Takes the drive's driver away and gives it back.
fn rebind(guest: &mut Machine) -> Result<()> {
    guest.run_within(
        SLOW,
        "d=$(basename $(dirname $(ls -d /sys/bus/virtio/devices/*/block))); \
         a=$(basename $(readlink -f /sys/bus/virtio/devices/$d/..)); \
         cd /sys/bus/pci/drivers/virtio-pci && echo $a > unbind && echo $a > bind && \
         for i in $(seq 100); do [ -b /dev/vda ] && exit 0; sleep 0.1; done; exit 1",
    )?;
    Ok(())
}

/// What is written to the drive is read back from it, not from a cache.
fn keeps(guest: &mut Machine) -> Result<()> {
    let out = guest.run_within(
        SLOW,
        "head -c 8388608 /dev/urandom > /tmp/data && sha256sum < /tmp/data && \
         dd if=/tmp/data of=/dev/vda bs=1M conv=notrunc && \
         sync && echo 3 > /proc/sys/vm/drop_caches && \
         dd if=/dev/vda bs=1M count=8 2> /dev/null | sha256sum",
    )?;
    let sums: Vec<&str> = out.lines().filter(|l| l.ends_with('-')).collect();
    ensure!(
        sums.len() == 2 && sums[0] == sums[1],
        "written and read back are not the same: {out}"
    );
    Ok(())
}
