//! Devices of the host in a guest: the emulated host's NVMe drive and network card, which
//! stand behind its VT-d unit.
//!
//! That unit cannot nest. So guests get no vIOMMU, or one with second-stage tables, which nestling
//! mirrors; asking for first-stage tables is refused before the guest starts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::harness::bound::Bound;
use crate::harness::huge::HugePages;
use crate::harness::{Guest, Lab, Machine, Test, load, process, show, until};
use crate::hotplug::gone;
use crate::net::exchange;

mod refusals;

pub(crate) use refusals::Reserved;
use refusals::{Hidden, refusals, too_wide};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("an_nvme_drive_works_without_a_viommu", without_viommu).profile("vtd"),
    Test::new("an_nvme_drive_works_behind_second_stage_tables", |lab| {
        behind(
            lab,
            "type=vtd,mode=legacy",
            "intel_iommu=on",
            "DMA",
            "stage2",
        )
    })
    .profile("vtd"),
    Test::new("an_nvme_drive_works_with_iommu_pt", |lab| {
        let cmdline = "intel_iommu=on iommu=pt";
        behind(lab, "type=vtd,mode=legacy", cmdline, "identity", "identity")
    })
    .profile("vtd"),
    // Nothing is said of the mode: this host cannot nest.
    Test::new("an_nvme_drive_works_on_a_host_of_47_bits", |lab| {
        too_wide(lab)?;
        behind(lab, "type=vtd", "intel_iommu=on", "DMA", "stage2")
    })
    .profile("vtd-scalable"),
    Test::new("an_nvme_drive_works_behind_a_virtio_iommu", |lab| {
        behind_virtio(lab, "iommu.strict=0", "DMA-FQ")
    })
    .profile("vtd"),
    Test::new(
        "an_nvme_drive_works_behind_a_virtio_iommu_that_is_flushed_at_once",
        |lab| behind_virtio(lab, "iommu.strict=1", "DMA"),
    )
    .profile("vtd"),
    Test::new(
        "a_drive_with_its_driver_comes_back_from_a_reboot_behind_a_virtio_iommu",
        reboots_with_its_driver,
    )
    .profile("vtd")
    .faults()
    .on_request(),
    Test::new(
        "an_nvme_drive_works_in_a_virtio_iommus_bypass_domain",
        |lab| behind_virtio(lab, "iommu.passthrough=1", "identity"),
    )
    .profile("vtd"),
    Test::new("a_network_card_works_behind_second_stage_tables", |lab| {
        let unit = "type=vtd,mode=legacy";
        network(lab, "intel_iommu=on", unit, "DMA", 256 << 10)
    })
    .profile("vtd"),
    Test::new("a_network_card_works_behind_a_virtio_iommu", |lab| {
        network(lab, "iommu.strict=0", "type=virtio", "DMA-FQ", 1 << 20)
    })
    .profile("vtd"),
    Test::new(
        "a_network_card_works_behind_a_virtio_iommu_that_is_flushed_at_once",
        |lab| network(lab, "iommu.strict=1", "type=virtio", "DMA", 256 << 10),
    )
    .profile("vtd"),
    Test::new(
        "a_network_card_works_in_a_virtio_iommus_bypass_domain",
        |lab| {
            let words = "iommu.passthrough=1";
            network(lab, words, "type=virtio", "identity", 1 << 20)
        },
    )
    .profile("vtd"),
    Test::new("an_nvme_drive_keeps_a_gibibyte", gibibyte)
        .profile("vtd")
        .limit(900),
    Test::new(
        "an_nvme_drive_works_on_a_host_without_iommufd",
        by_its_group,
    )
    .profile("vtd"),
    Test::new(
        "a_device_reaches_the_registers_of_another_until_it_goes",
        peers,
    )
    .profile("vtd")
    .faults(),
    Test::new("a_device_that_cannot_be_had_is_refused", refusals).profile("vtd"),
];

pub(crate) const NVME: &str = "0000:00:10.0";
/// A device of QEMU's for lessons, which no driver of Linux has.
const EDU: &str = "0000:00:12.0";
const SLOW: Duration = Duration::from_secs(400);

fn without_viommu(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .option("--device", &drive.option(""))
        .boot(lab)?;
    keeps_over_resets(&mut guest)?;
    without_messages(&mut guest)?;
    drive_keeps(&mut guest)?;
    // With nothing in flight: QEMU's drive keeps its line up for completions that a reset took, so
    // that its driver has interrupts without end that it has no reason for.
    reset_function(&mut guest)?;
    drive_keeps(&mut guest)?;
    guest.power_off()?;
    Ok(())
}

/// A guest with a unit that has second-stage tables, and how it uses it.
fn behind(lab: &Lab, unit: &str, cmdline: &str, group: &str, translation: &str) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .cmdline(cmdline)
        .option("--viommu", unit)
        .option("--device", &drive.option(",iommu=on"))
        .boot(lab)?;
    group_is(&mut guest, group)?;
    drive_keeps(&mut guest)?;
    translation_is(&guest.viommus()?, translation)?;
    rebind(&mut guest)?;
    drive_keeps(&mut guest)?;
    function_level_reset(&mut guest)?;
    drive_keeps(&mut guest)?;
    guest.restart_by("reboot -f")?;
    drive_keeps(&mut guest)?;
    reset_while_busy(&mut guest)?;
    drive_keeps(&mut guest)?;
    let units = guest.viommus()?;
    translation_is(&units, translation)?;
    let faults = &units[0]["faults_recorded"];
    ensure!(faults == 0, "the unit has {faults} faults: {units:#}");
    guest.power_off()?;
    Ok(())
}

fn behind_virtio(lab: &Lab, cmdline: &str, wanted: &str) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .cmdline(cmdline)
        .option("--viommu", "type=virtio,id=paravirtual")
        .option("--device", &drive.option(",viommu=paravirtual"))
        .boot(lab)?;
    let found = group(&mut guest)?;
    ensure!(found == wanted, "the group has the type {found}");
    drive_keeps(&mut guest)?;
    rebind(&mut guest)?;
    drive_keeps(&mut guest)?;
    in_a_domain(&guest.viommus()?, wanted == "identity")?;
    // Without its driver, since the unit may go first: see `reboots_with_its_driver`.
    unbind(&mut guest)?;
    guest.restart_by("reboot -f")?;
    drive_keeps(&mut guest)?;
    reset_while_busy(&mut guest)?;
    drive_keeps(&mut guest)?;
    let units = guest.viommus()?;
    in_a_domain(&units, wanted == "identity")?;
    let clean = units[0]["faults"]["reported"] == 0 && units[0]["counters"]["refusals"] == 0;
    ensure!(clean, "the unit has faults or refusals: {units:#}");
    unbind(&mut guest)?;
    guest.power_off()?;
    Ok(())
}

/// Takes the drive's driver away.
fn unbind(guest: &mut Machine) -> Result<()> {
    guest.run("cd /sys/bus/pci/drivers/nvme && echo $(ls -d 0000:*) > unbind")?;
    Ok(())
}

/// Linux from 6.15 on resets virtio devices when it shuts down, a virtio-iommu too, and a reset
/// blocks what is behind it. Where that comes before the drive's own shutdown (the order is that
/// of their discovery), the drive cannot answer, and its driver waits: for a minute, unless it is
/// told to wait less. The host sees the drive try.
fn reboots_with_its_driver(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .cmdline("nvme_core.admin_timeout=5")
        .option("--viommu", "type=virtio")
        .option("--device", &drive.option(",iommu=on"))
        .boot(lab)?;
    drive_keeps(&mut guest)?;
    let began = Instant::now();
    guest.restart_by("reboot -f")?;
    show(format!("back after {} s", began.elapsed().as_secs()));
    drive_keeps(&mut guest)?;
    in_a_domain(&guest.viommus()?, false)?;
    guest.power_off()?;
    Ok(())
}

/// The one endpoint is in a domain: a bypass domain, or one with mappings.
fn in_a_domain(units: &Value, bypass: bool) -> Result<()> {
    let unit = &units[0];
    let domains = unit["domains"].as_array().map_or(&[][..], Vec::as_slice);
    let [domain] = domains else {
        bail!("one domain was expected: {units:#}");
    };
    ensure!(
        domain["bypass"] == bypass && (domain["mappings"].as_u64() > Some(0)) != bypass,
        "bypass {bypass} was expected: {units:#}"
    );
    ensure!(
        unit["endpoints"][0]["domain"] == domain["domain"],
        "the endpoint is not in it: {units:#}"
    );
    Ok(())
}

/// The host's end of the wire to its network card.
const PEER: &str = "52:54:00:00:00:11";
const HOST: &str = "192.168.79.1";
const GUEST: &str = "192.168.79.2";

/// The guest's memory is of huge pages: QEMU's e1000e drops each packet that has a fragment across
/// two pages which are not neighbours in its own memory, behind any IOMMU. Every repetition of the
/// packet is dropped again, and the connection stands still.
fn network(lab: &Lab, cmdline: &str, unit: &str, wanted: &str, length: u64) -> Result<()> {
    let card = Bound::new("0000:00:11.0")?;
    let peer = fs::read_dir("/sys/class/net")?.flatten().find(|entry| {
        let address = fs::read_to_string(entry.path().join("address"));
        address.is_ok_and(|address| address.trim() == PEER)
    });
    let peer = peer.context("the host has no interface on the card's wire")?;
    let peer = peer.file_name().to_string_lossy().into_owned();
    let rom = rom(card.sysfs())?;
    let configured = Command::new("sh")
        .args(["-c", &format!("ip addr flush dev {peer} && ip addr add {HOST}/24 dev {peer} && ip link set {peer} up")])
        .status()?;
    ensure!(configured.success(), "{peer} cannot be configured");
    let _pages = HugePages::reserve(256 / 2)?;
    let mut guest = Guest::lab_kernel()
        .memory("size=256M,hugepages=on")
        .cmdline(cmdline)
        .option("--viommu", unit)
        .option("--device", &card.option(",iommu=on"))
        .boot(lab)?;
    let found = group(&mut guest)?;
    ensure!(
        found == wanted || unit != "type=virtio" && found.trim_end_matches("-FQ") == wanted,
        "the group has the type {found}"
    );
    let seen = guest.run(
        "cd /sys/bus/pci/drivers/e1000e/0000:*; echo 1 > rom; sha256sum < rom; echo 0 > rom",
    )?;
    ensure!(
        seen.trim() == rom,
        "the host reads the ROM with the sum {rom}, the guest with {seen}"
    );
    guest.run(&format!(
        "ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"
    ))?;
    guest.run(&until(&format!("ping -c 1 -W 1 {HOST}")))?;
    // Little: where each packet costs two exits and a change of tables, all of it is emulated.
    if let Err(why) = exchange(lab, &mut guest, HOST, length) {
        let counted =
            "cat /proc/interrupts; cat /proc/net/dev; cat /proc/net/tcp; dmesg | tail -n 20";
        let peer = fs::read_to_string("/proc/net/dev")?;
        let seen = guest.run(counted)?;
        std::thread::sleep(Duration::from_secs(5));
        let later = guest.run("cat /proc/interrupts; cat /proc/net/dev")?;
        bail!("{why:#}\nthe guest:\n{seen}\nfive seconds later:\n{later}\nthe host:\n{peer}");
    }
    match unit {
        "type=virtio" => in_a_domain(&guest.viommus()?, wanted == "identity")?,
        _ => translation_is(&guest.viommus()?, "stage2")?,
    }
    guest.power_off()?;
    Ok(())
}

/// The sum of the expansion ROM of the host's device at `sysfs`, as the host's kernel reads it.
fn rom(sysfs: &Path) -> Result<String> {
    let output = Command::new("sh")
        .arg("-c")
        .arg(
            "cd $0 && echo 1 > rom && head -c 2 rom | od -An -tx1 && sha256sum < rom; echo 0 > rom",
        )
        .arg(sysfs)
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let (signature, sum) = said.trim().split_once('\n').unwrap_or_default();
    ensure!(
        signature.trim() == "55 aa",
        "the card has no ROM for the host: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(sum.trim().to_owned())
}

/// The one device behind the vIOMMU is in a group of this type; "DMA" stands for flushed at once
/// or in batches.
fn group_is(guest: &mut Machine, expected: &str) -> Result<()> {
    let found = group(guest)?;
    ensure!(
        found.trim_end_matches("-FQ") == expected,
        "the group has the type {found}, {expected} was expected"
    );
    Ok(())
}

/// The type of the one group that there is.
fn group(guest: &mut Machine) -> Result<String> {
    let types = guest.run("cat /sys/kernel/iommu_groups/*/type")?;
    let types: Vec<&str> = types.lines().collect();
    ensure!(types.len() == 1, "the groups have the types {types:?}");
    Ok(types[0].to_owned())
}

/// The drive's driver has its namespace.
const DRIVE: &str = "[ -b /dev/nvme0n1 ]";

/// What is written to the drive is read back from it, not from a cache.
pub(crate) fn drive_keeps(guest: &mut Machine) -> Result<()> {
    let out = guest.run_within(
        SLOW,
        &format!(
            "{}; \
             head -c 8388608 /dev/urandom > /tmp/data && sha256sum < /tmp/data && \
             for at in 0 24; do dd if=/tmp/data of=/dev/nvme0n1 bs=1M seek=$at conv=notrunc; done && \
             sync && echo 3 > /proc/sys/vm/drop_caches && \
             for at in 0 24; do \
             dd if=/dev/nvme0n1 bs=1M skip=$at count=8 2> /dev/null | sha256sum; done",
            until(DRIVE)
        ),
    )?;
    let sums: Vec<&str> = out.lines().filter(|l| l.ends_with('-')).collect();
    ensure!(
        sums.len() == 3 && sums.iter().all(|sum| *sum == sums[0]),
        "written and read back are not the same: {out}"
    );
    Ok(())
}

/// Restarts the machine at once: no driver is asked to stop.
const RESET: &str = "echo b > /proc/sysrq-trigger";

/// A part of the drive that [`drive_keeps`] leaves alone, in MiB.
const BESIDE: u32 = 40;

/// The sum of what [`drive_keeps`] has left on the drive, which is not asked of a cache.
fn kept(guest: &mut Machine) -> Result<String> {
    guest.run_within(
        SLOW,
        &format!(
            "{}; echo 3 > /proc/sys/vm/drop_caches; \
             dd if=/dev/nvme0n1 bs=1M skip=24 count=2 2> /dev/null | sha256sum",
            until("[ -b /dev/nvme0n1 ]")
        ),
    )
}

/// The machine restarts at once, with DMA of the drive in flight both ways; what was synced before
/// is there afterwards.
fn reset_while_busy(guest: &mut Machine) -> Result<()> {
    let before = kept(guest)?;
    load::begin(guest, "nvme0n1", BESIDE)?;
    guest.restart_by(RESET)?;
    let after = kept(guest)?;
    ensure!(
        before == after,
        "before the reset the drive had {before}, now it has {after}"
    );
    Ok(())
}

/// The drive keeps what it is given, also when it, and the whole machine, is reset in between.
fn keeps_over_resets(guest: &mut Machine) -> Result<()> {
    drive_keeps(guest)?;
    function_level_reset(guest)?;
    drive_keeps(guest)?;
    reset_while_busy(guest)?;
    drive_keeps(guest)
}

/// The guest resets the drive by itself, while its driver has it, reads from it and writes to it;
/// what was synced before is there afterwards.
fn function_level_reset(guest: &mut Machine) -> Result<()> {
    load::begin(guest, "nvme0n1", BESIDE)?;
    reset_function(guest)?;
    load::end(guest)
}

/// The reset alone.
fn reset_function(guest: &mut Machine) -> Result<()> {
    let before = kept(guest)?;
    let methods = guest.run_within(
        SLOW,
        &format!(
            "cd /sys/bus/pci/drivers/nvme/0000:*; cat reset_method; echo 1 > reset || exit 1; {}",
            until("[ \"$(cat nvme/nvme0/state)\" = live ]")
        ),
    )?;
    ensure!(
        methods.split_whitespace().any(|method| method == "flr"),
        "the drive has no function-level reset for the guest, only {methods}"
    );
    let after = kept(guest)?;
    ensure!(
        before == after,
        "before its reset the drive had {before}, now it has {after}"
    );
    Ok(())
}

/// Takes messages away from the drive's driver, which then has the interrupt line.
pub(crate) fn without_messages(guest: &mut Machine) -> Result<()> {
    let interrupts = guest.run_within(
        SLOW,
        &format!(
            "cd /sys/bus/pci/drivers/nvme; d=$(ls -d 0000:*); echo 0 > $d/msi_bus; \
             echo $d > unbind && echo $d > bind; {}; grep nvme /proc/interrupts",
            until(DRIVE)
        ),
    )?;
    ensure!(
        interrupts.contains("IO-APIC") && !interrupts.contains("MSI"),
        "the drive does not use its line: {interrupts}"
    );
    Ok(())
}

/// 1 GiB, each part of it written with other data than the last.
fn gibibyte(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .cpus(2)
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=vtd")
        .option("--device", &drive.option(",iommu=on"))
        .boot(lab)?;
    group_is(&mut guest, "DMA")?;
    // Half of it written, half of it read; every block is another one in every round.
    guest.run_within(SLOW, "head -c 34603008 /dev/urandom > /tmp/data")?;
    for round in 0..16 {
        let part = format!(
            "dd if=/tmp/data iflag=skip_bytes skip={} bs=1M count=32",
            round * 4096
        );
        let sums = guest.run_within(
            SLOW,
            &format!(
                "{part} 2> /dev/null | md5sum && {part} of=/dev/nvme0n1 conv=notrunc && sync && \
                 echo 3 > /proc/sys/vm/drop_caches && \
                 dd if=/dev/nvme0n1 bs=1M count=32 2> /dev/null | md5sum"
            ),
        )?;
        let sums: Vec<&str> = sums.lines().collect();
        ensure!(
            sums.len() == 2 && sums[0] == sums[1],
            "round {round}: written and read back are not the same: {sums:?}"
        );
    }
    let units = guest.viommus()?;
    translation_is(&units, "stage2")?;
    let faults = &units[0]["faults_recorded"];
    ensure!(faults == 0, "the unit has {faults} faults: {units:#}");
    guest.power_off()?;
    Ok(())
}

/// Takes the drive's driver away and gives it back.
pub(crate) fn rebind(guest: &mut Machine) -> Result<()> {
    guest.run_within(
        SLOW,
        &format!(
            "cd /sys/bus/pci/drivers/nvme; d=$(ls -d 0000:*); \
             echo $d > unbind && echo $d > bind; {}",
            until(DRIVE)
        ),
    )?;
    Ok(())
}

/// The one target of the one unit has this kind of translation in force.
fn translation_is(units: &Value, kind: &str) -> Result<()> {
    let target = &units[0]["targets"][0];
    ensure!(
        target["translation"]["kind"] == kind && target["in_force"] == true,
        "one target with {kind} was expected: {units:#}"
    );
    Ok(())
}

/// The older way to a device, which nestling takes by itself, and says so.
fn by_its_group(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let hidden = Hidden::new("/dev/iommu")?;
    let doctor = Command::new(lab.nestling()).arg("doctor").output()?;
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    ensure!(
        doctor.contains("by its group") && doctor.contains("CONFIG_IOMMUFD"),
        "the doctor says: {doctor}"
    );
    let mut guest = Guest::lab_kernel()
        .option("--device", &drive.option(",id=drive"))
        .api(lab)
        .boot(lab)?;
    keeps_over_resets(&mut guest)?;
    comes_and_goes_by_its_group(&mut guest, &drive)?;
    let said = guest.power_off()?.said;
    ensure!(
        ["no /dev/iommu", "no vIOMMU", "no P2P"]
            .iter()
            .all(|part| said.contains(part)),
        "nestling does not say how it has the drive: {said}"
    );
    drop(hidden);
    // Its group was given back, too.
    drive.works_on_the_host()
}

/// It goes and comes as any device does, also beside another one; its group is the host's while it
/// is away, and what was synced is on it.
fn comes_and_goes_by_its_group(guest: &mut Machine, drive: &Bound) -> Result<()> {
    let api = guest.api();
    let other = Bound::new(EDU)?;
    let add = |device: &Bound, id: &str| -> Result<String> {
        let path = device.sysfs().display().to_string();
        let added = api.put("vm.add-device", &json!({"path": path, "id": id}))?;
        Ok(added["bdf"].as_str().context("no bdf")?.to_owned())
    };
    let remove = |id: &str| api.put("vm.remove-device", &gone(id));
    for second in [false, true] {
        let before = kept(guest)?;
        load::begin(guest, "nvme0n1", BESIDE)?;
        remove("drive")?;
        if second {
            remove("other")?;
        }
        guest.run("! [ -e /dev/nvme0n1 ]")?;
        let left = open_in(guest.pid(), "/dev/vfio/");
        ensure!(left.is_empty(), "nestling still has {left:?} open");
        load::end(guest)?;
        drive.works_on_the_host()?;
        add(drive, "drive")?;
        ensure!(kept(guest)? == before, "the drive has other data");
        drive_keeps(guest)?;
        if !second {
            // Another group in the same container.
            let at = add(&other, "other")?;
            let there = until(&format!("[ -e {at} ]"));
            let ids = guest.run_within(
                SLOW,
                &format!("cd /sys/bus/pci/devices; {there}; cat {at}/vendor {at}/device"),
            )?;
            ensure!(ids == "0x1234\n0x11e8\n", "{at} is {ids}");
        }
    }
    Ok(())
}

/// What a process has open whose name begins with `prefix`.
fn open_in(pid: u32, prefix: &str) -> Vec<String> {
    let mut names = process::descriptors(pid);
    names.retain(|name| name.starts_with(prefix));
    names
}

/// `edu` reads the drive's registers by DMA, into its buffer and from there into RAM.
const READ_PEER: &str = r"
set -e
cd /sys/bus/pci/devices
for d in *; do
    case $(cat $d/vendor)-$(cat $d/class) in
    0x1234-*) edu=$d ;;
    *-0x010802) drive=$d ;;
    esac
done
place() { head -n 1 $1/resource | cut -d ' ' -f 1; }
e=$(place $edu)
[ -z $drive ] || place $drive > /tmp/drive
n=$(cat /tmp/drive)
# Memory and bus master.
printf '\006\000' | dd of=$edu/config bs=1 seek=4 conv=notrunc 2> /dev/null
dma() {
    devmem $((e + 0x80)) 64 $1
    devmem $((e + 0x88)) 64 $2
    devmem $((e + 0x90)) 64 16
    devmem $((e + 0x98)) 64 $3
    for i in $(seq 3000); do
        [ $(($(devmem $((e + 0x98)) 64) & 1)) = 0 ] && return
        sleep 0.1
    done
    return 1
}
dma $n 0x40000 1
dma 0x40000 0x10000000 3
echo $(devmem 0x10000000 64) $(devmem 0x10000008 32)
[ -z $drive ] || echo $(devmem $n 64) $(devmem $((n + 8)) 32)
";

fn peers(lab: &Lab) -> Result<()> {
    let (drive, edu) = (Bound::new(NVME)?, Bound::new(EDU)?);
    // A page of RAM that the guest's kernel leaves alone.
    let mut guest = Guest::lab_kernel()
        .cmdline("memmap=64K$0x10000000")
        .option("--device", &drive.option(",id=drive"))
        .option("--device", &edu.option(""))
        .api(lab)
        .boot(lab)?;
    let said = guest.run_within(SLOW, READ_PEER)?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(
        lines.len() == 2 && lines[0] == lines[1] && !lines[0].starts_with("0x0000000000000000"),
        "by DMA and by the CPU the drive's registers are {said}"
    );
    show(format!("the drive's registers are {}", lines[0]));
    guest.api().put("vm.remove-device", &gone("drive"))?;
    // The host's IOMMU stops it, and its kernel reports that.
    show(guest.run_within(SLOW, READ_PEER)?);
    guest.power_off()?;
    Ok(())
}
