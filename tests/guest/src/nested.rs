//! The whole product on stock kernels: a guest (L2) whose unit nests is a host itself. Its Linux
//! gives devices behind that unit to a guest of its own (L3), whose first-stage tables become
//! nested tables of L2's iommufd, on a unit that our software engine plays.
//!
//! A table that L3's unit does not take is in L3's own log. What L3's devices do wrong is reported to
//! L2, whose devices they are, and in the state of the unit that L1 runs: Linux's iommufd does not
//! tell of faults that nobody can answer, so L3 hears of those from the device only.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::engine;
use crate::harness::bound::Bound;
use crate::harness::iommufd;
use crate::harness::{Guest, Lab, Machine, Test, show, until};

/// The tests. Those that are `inside` run in L2.
pub const TESTS: &[Test] = &[
    Test::new(
        "a_guest_of_a_guest_has_devices_through_three_tables",
        |lab| host_of(lab, UNIT, "nested::devices"),
    )
    .limit(3000),
    Test::new("a_guest_of_a_guest_has_pasids", |lab| {
        host_of(lab, WIDE, "nested::pasids")
    })
    .limit(3000),
    Test::new("processes_of_a_guest_of_a_guest_share_a_device", |lab| {
        host_of(lab, WIDE, "nested::processes")
    })
    .limit(3000),
    Test::new("devices", devices).inside().faults(),
    Test::new("pasids", pasids).inside().faults(),
    Test::new("processes", processes).inside().faults(),
];

const SLOW: Duration = Duration::from_secs(400);
/// How long L3 may take to boot, on a machine that others use too.
const L3_BOOTS: Duration = Duration::from_secs(800);

/// What L1 gives to L2: a unit that nests, and remaps interrupts, so that Linux takes L2's guests
/// for safe without being told.
const UNIT: &str = "type=vtd,nested=on,interrupt_remapping=on";
/// The same as wide as CPUs with five levels, whose tables a device of a process shares.
const WIDE: &str = "type=vtd,nested=on,interrupt_remapping=on,address_width=57";

/// The engine's IDs.
const ENGINE: (&str, &str) = ("0x1af4", "0x10f0");
/// Where L2 has it.
const ENGINE_OF_L2: &str = "00:04.0";

/// L2: a host with a drive and a DMA engine behind a unit that nests, where `test` runs.
fn host_of(lab: &Lab, unit: &str, test: &str) -> Result<()> {
    let image = lab.image("disk", 64)?;
    let mut host = Guest::lab_kernel()
        .cpus(2)
        .memory("size=2G")
        .host()
        .all_behind()
        .cmdline("intel_iommu=on,sm_on iommu=nopt")
        .option("--viommu", unit)
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    let before = in_force(&host)?;
    host.run_inside(Duration::from_secs(2700), test)?;
    // What L3's engine did wrong is in the state of the unit that L1 runs, and nothing else is.
    let state = host.viommus()?;
    let faults = state[0]["last_faults"].as_array().context("no faults")?;
    let other = faults
        .iter()
        .find(|fault| fault["target"]["endpoint"] != ENGINE_OF_L2);
    ensure!(
        !faults.is_empty() && other.is_none(),
        "faults of the engine alone were expected of the unit of L2: {state:#}"
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
    let other = faults
        .iter()
        .find(|l| !l.contains(&format!("{ENGINE_OF_L2}]")));
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
    let dma = Bound::with_ids(ENGINE.0, ENGINE.1)?;
    too_narrow(lab, &dma)?;
    // Its clocks are a guest's of a guest: not stable, which tracing would mention.
    let mut guest = Guest::debian("7.2")
        .cmdline("intel_iommu=on iommu.strict=1 trace_clock=global")
        .boots_within(L3_BOOTS)
        .option("--viommu", "type=vtd")
        .option("--device", &disk.option(",iommu=on,id=disk"))
        .option("--device", &dma.option(",iommu=on,id=engine"))
        .api(lab)
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
    rebind(&mut guest, "identity")?;
    keeps(&mut guest)?;
    rebind(&mut guest, "DMA")?;
    keeps(&mut guest)?;
    first_stage(&guest.viommus()?)?;
    wrong_table(&mut guest)?;
    // What the device does wrong, and unmapping while DMA runs.
    guest.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1 && modprobe vfio_pci")?;
    show(engine::check(&mut guest, "vfio")?);
    unplugged(&guest)?;
    guest.power_off()?;
    Ok(())
}

/// Each device that goes takes its objects of L2's iommufd with it, and the last one all of them.
fn unplugged(guest: &Machine) -> Result<()> {
    let objects = || iommufd::objects(guest.pid());
    let both = objects()?;
    guest.api().put(
        "vm.remove-device",
        &json!({"id": "engine", "timeout": SLOW.as_secs()}),
    )?;
    let one = objects()?;
    guest.api().put(
        "vm.remove-device",
        &json!({"id": "disk", "timeout": SLOW.as_secs()}),
    )?;
    let none = objects()?;
    show(format!(
        "objects of L2's iommufd: {both:?} with two devices, {one:?} with one, {none:?} with none"
    ));
    ensure!(
        both.len() == 1 && one.len() == 1 && one[0] < both[0] && none.iter().sum::<u32>() == 0,
        "objects of L2's iommufd: {both:?}, without the engine {one:?}, without the drive {none:?}"
    );
    Ok(())
}

/// L3 with the engine, whose PASIDs each have a table of their own.
fn pasids(lab: &Lab) -> Result<()> {
    let dma = Bound::with_ids(ENGINE.0, ENGINE.1)?;
    let mut guest = Guest::lab_kernel()
        .cmdline("intel_iommu=on trace_clock=global")
        .boots_within(L3_BOOTS)
        .option("--viommu", "type=vtd")
        .option("--device", &dma.option(",iommu=on"))
        .boot(lab)?;
    guest.run("echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts")?;
    show(engine::check(&mut guest, "pasid")?);
    guest.power_off()?;
    Ok(())
}

/// L3's kernel gives the engine a table through a directory that no unit takes: the engine is
/// Blocked, and L3's own log says why. When the directory is right again, so is the engine.
fn wrong_table(guest: &mut Machine) -> Result<()> {
    const RESERVED: u64 = 1 << 11;
    /// SPD.3: a reserved field of the PASID directory entry is set.
    const REASON: u8 = 0x52;
    let at = engine::address(guest)?;
    let group = format!("/sys/bus/pci/devices/{at}/iommu_group/type");
    let is = guest.run(&format!("cat {group}"))?;
    let memory = memory_of(guest)?;
    let state = guest.viommus()?;
    let root = state[0]["root_table"].as_u64().context("no root table")?;
    let directory = directory(&memory, root, &at)?;
    let entry = word(&memory, directory)?;
    memory.write_all_at(&(entry | RESERVED).to_le_bytes(), directory)?;
    guest.run(&format!("echo identity > {group}"))?;
    let state = guest.viommus()?;
    ensure!(
        target(&state, &at)?["problem"] == "pasid-directory-reserved",
        "a wrong directory was expected: {state:#}"
    );
    engine::faults_are(guest, &[("DMA Read", engine::NO_PASID, 0, REASON)])?;
    // That it is Blocked is L2's to tell, whose unit has nothing for the engine now.
    show(engine::check(guest, "blocked")?);
    memory.write_all_at(&entry.to_le_bytes(), directory)?;
    guest.run(&format!("echo {} > {group}", is.trim()))?;
    let state = guest.viommus()?;
    let engine = target(&state, &at)?;
    ensure!(
        engine["problem"].is_null() && engine["in_force"] == true,
        "a table in force was expected: {state:#}"
    );
    Ok(())
}

/// L3's memory as L2 has it: a file, in which an offset is an address, since it is one piece.
fn memory_of(guest: &Machine) -> Result<File> {
    for entry in fs::read_dir(format!("/proc/{}/fd", guest.pid()))? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:")) {
            return Ok(File::options().read(true).write(true).open(path)?);
        }
    }
    bail!("nestling has no memory of its guest as a file")
}

/// Where the first entry of a device's PASID directory is (chapter 9).
fn directory(memory: &File, root: u64, at: &str) -> Result<u64> {
    const PAGE: u64 = !0xfff;
    let (_, device) = at.rsplit_once(':').context("an address of PCI")?;
    let (device, function) = device.split_once('.').context("an address of PCI")?;
    let devfn = u64::from_str_radix(device, 16)? * 8 + u64::from_str_radix(function, 16)?;
    // Bus 0: a table for the lower half of its functions, and one for the upper.
    let context = word(memory, (root & PAGE) + devfn / 0x80 * 8)? & PAGE;
    Ok(word(memory, context + devfn % 0x80 * 32)? & PAGE)
}

fn word(memory: &File, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}

/// What the unit has for requests without PASID of the function at `at` (`0000:00:10.0`).
fn target<'u>(units: &'u Value, at: &str) -> Result<&'u Value> {
    let targets = units[0]["targets"].as_array().context("no targets")?;
    let ours = |target: &&Value| {
        let endpoint = target["target"]["endpoint"].as_str();
        endpoint.is_some_and(|endpoint| at.ends_with(endpoint))
            && target["target"]["pasid"].is_null()
    };
    let found = targets.iter().find(ours);
    found.with_context(|| format!("{at} has nothing: {units:#}"))
}

/// L3 with the engine, which processes of a stock kernel share: PASIDs, page requests and their
/// answers go through L2's iommufd.
fn processes(lab: &Lab) -> Result<()> {
    let dma = Bound::with_ids(ENGINE.0, ENGINE.1)?;
    let mut guest = Guest::debian("7.2")
        .cmdline("intel_iommu=on trace_clock=global")
        .boots_within(L3_BOOTS)
        .option("--viommu", "type=vtd")
        .option("--device", &dma.option(",iommu=on,pasid=on,pri=on"))
        .boot(lab)?;
    guest.run("insmod /lib/modules/dma_engine.ko")?;
    for what in ["sva 4", "counts", "heap", "fork", "unmap 2", "apart"] {
        show(engine::check(&mut guest, what)?);
    }
    let state = guest.viommus()?;
    ensure!(
        state[0]["page_requests"].as_u64() > Some(0) && state[0]["back_end"]["refusals"] == 0,
        "page requests through the host's queue were expected: {state:#}"
    );
    // A process that ended asked for a page by a PASID that is no more.
    engine::faults_are(&mut guest, &[])?;
    guest.run("rmmod dma_engine")?;
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

/// Takes the drive's driver away and gives it back in a domain of this type: between nested tables
/// and the host's own, its interrupts go on.
fn rebind(guest: &mut Machine, domain: &str) -> Result<()> {
    guest.run_within(
        SLOW,
        &format!(
            "d=$(basename $(dirname $(ls -d /sys/bus/virtio/devices/*/block))); \
             a=$(basename $(readlink -f /sys/bus/virtio/devices/$d/..)); \
             cd /sys/bus/pci/drivers/virtio-pci && echo $a > unbind && \
             echo {domain} > /sys/bus/pci/devices/$a/iommu_group/type && echo $a > bind || exit 1; {}",
            until("[ -b /dev/vda ]")
        ),
    )?;
    group_is(guest, domain)
}

/// A device whose addresses are narrower than what CPUs translate shares no process's tables.
fn too_narrow(lab: &Lab, dma: &Bound) -> Result<()> {
    let ended = Guest::debian("7.2")
        .memory("size=128M")
        .option("--viommu", "type=vtd")
        .option("--device", &dma.option(",iommu=on,pasid=on,dma_width=40"))
        .start(lab)?
        .wait(SLOW)?;
    let said = ended.said.trim();
    let words = ["pasid=on", "40 bits", "CPUs translate", "dma_width="];
    ensure!(
        ended.status != 0 && words.iter().all(|word| said.contains(word)),
        "a device of 40 bits that is to have PASIDs: status {}, {said}",
        ended.status
    );
    show(said);
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
