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
use serde_json::Value;

use crate::harness::bound::Bound;
use crate::harness::huge::HugePages;
use crate::harness::{Guest, Lab, Machine, Test, show, until};
use crate::net::exchange;

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
    .profile("vtd")
    .on_request(),
    Test::new(
        "a_network_card_works_in_a_virtio_iommus_bypass_domain",
        |lab| {
            let words = "iommu.passthrough=1";
            network(lab, words, "type=virtio", "identity", 1 << 20)
        },
    )
    .profile("vtd")
    .on_request(),
    Test::new("an_nvme_drive_keeps_a_gibibyte", gibibyte)
        .profile("vtd")
        .limit(900)
        .on_request(),
    Test::new(
        "an_nvme_drive_works_on_a_host_without_iommufd",
        by_its_group,
    )
    .profile("vtd"),
    Test::new("a_device_that_cannot_be_had_is_refused", refusals).profile("vtd"),
];

pub(crate) const NVME: &str = "0000:00:10.0";
const SLOW: Duration = Duration::from_secs(400);

fn without_viommu(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .option("--device", &drive.option(""))
        .boot(lab)?;
    drive_keeps(&mut guest)?;
    function_level_reset(&mut guest)?;
    drive_keeps(&mut guest)?;
    let before = guest.run("sha256sum < /dev/nvme0n1")?;
    busy(&mut guest)?;
    guest.restart_by(RESET)?;
    let after = guest.run_within(SLOW, "sha256sum < /dev/nvme0n1")?;
    ensure!(
        before == after,
        "before the reboot the drive had {before}, now it has {after}"
    );
    drive_keeps(&mut guest)?;
    without_messages(&mut guest)?;
    drive_keeps(&mut guest)?;
    function_level_reset(&mut guest)?;
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
    busy(&mut guest)?;
    guest.restart_by(RESET)?;
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
    // At once, with reads in flight.
    busy(&mut guest)?;
    guest.restart_by(RESET)?;
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

/// Keeps the drive reading from here on.
fn busy(guest: &mut Machine) -> Result<()> {
    guest.run(
        "for n in 1 2; do (while :; do echo 3 > /proc/sys/vm/drop_caches; \
         cat /dev/nvme0n1; done) > /dev/null 2>&1 < /dev/null & done; sleep 1",
    )?;
    Ok(())
}

/// The guest resets the drive by itself, while its driver has it and reads from it.
fn function_level_reset(guest: &mut Machine) -> Result<()> {
    let methods = guest.run_within(
        SLOW,
        &format!(
            "cd /sys/bus/pci/drivers/nvme/0000:*; cat reset_method; \
             (dd if=/dev/nvme0n1 of=/dev/null bs=64k count=256 2> /dev/null) & \
             echo 1 > reset && wait; {}",
            until("[ \"$(cat nvme/nvme0/state)\" = live ]")
        ),
    )?;
    ensure!(
        methods.split_whitespace().any(|method| method == "flr"),
        "the drive has no function-level reset for the guest, only {methods}"
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

/// Each is refused in one sentence with the remedy, and nothing is left behind.
fn refusals(lab: &Lab) -> Result<()> {
    let says = |options: &[(&str, &str)], words: &[&str]| -> Result<()> {
        let mut guest = Guest::lab_kernel();
        for (name, value) in options {
            guest = guest.option(name, value);
        }
        let ended = guest.start(lab)?.wait(SLOW)?;
        let said = ended.said.trim();
        ensure!(
            ended.status != 0 && said.lines().count() == 1,
            "{options:?} was not refused in one line: {said}"
        );
        for word in words {
            ensure!(said.contains(word), "{options:?}: no {word:?} in: {said}");
        }
        Ok(())
    };
    let sysfs = format!("path=/sys/bus/pci/devices/{NVME}");
    says(&[("--device", "path=/nowhere")], &["/nowhere", "lspci"])?;
    says(&[("--device", &sysfs)], &[NVME, "vfio-pci", "doctor"])?;
    let drive = Bound::new(NVME)?;
    let iommufd = Hidden::new("/dev/iommu")?;
    for unit in ["type=virtio", "type=vtd"] {
        says(
            &[("--device", &drive.option(",iommu=on")), ("--viommu", unit)],
            &[NVME, "no vIOMMU", "CONFIG_IOMMUFD", "leave iommu=on out"],
        )?;
    }
    let container = Hidden::new("/dev/vfio/vfio")?;
    says(
        &[("--device", &drive.option(""))],
        &["/dev/iommu", "nestling doctor"],
    )?;
    drop((iommufd, container));
    says(
        &[
            ("--device", &drive.option(",iommu=on")),
            ("--viommu", "type=vtd,mode=scalable"),
        ],
        &[NVME, "first-stage", "mode=legacy"],
    )?;
    let said = Guest::lab_kernel()
        .locked_memory(64 << 20)
        .option("--device", &drive.option(""))
        .start(lab)?
        .wait(SLOW)?
        .said;
    ensure!(
        said.contains("locked in memory") && said.contains("ulimit -l"),
        "the limit of locked memory: {said}"
    );
    let shared = Bound::new("0000:00:14.1")?;
    says(
        &[("--device", &shared.option(""))],
        &["0000:00:14.0", "virtio-pci", "vfio-pci too"],
    )?;
    drop(shared);
    let mut first = Guest::lab_kernel()
        .option("--device", &drive.option(""))
        .start(lab)?;
    in_use(&mut first)?;
    says(&[("--device", &drive.option(""))], &["another"])?;
    drop(first);
    Ok(())
}

/// A node of the host that is not there, until the value is dropped.
struct Hidden(&'static str);

impl Hidden {
    fn new(node: &'static str) -> Result<Self> {
        fs::rename(node, format!("{node}-away"))?;
        Ok(Self(node))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::rename(format!("{}-away", self.0), self.0);
    }
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
        .option("--device", &drive.option(""))
        .boot(lab)?;
    drive_keeps(&mut guest)?;
    function_level_reset(&mut guest)?;
    drive_keeps(&mut guest)?;
    busy(&mut guest)?;
    guest.restart_by(RESET)?;
    drive_keeps(&mut guest)?;
    let said = guest.power_off()?.said;
    ensure!(
        said.contains("no /dev/iommu") && said.contains("no vIOMMU"),
        "nestling does not say how it has the drive: {said}"
    );
    drop(hidden);
    // Its group was given back, too.
    drive.works_on_the_host()
}

/// Waits until a nestling has its device open.
fn in_use(machine: &mut Machine) -> Result<()> {
    let deadline = Instant::now() + SLOW;
    while Instant::now() < deadline {
        let open = fs::read_dir(format!("/proc/{}/fd", machine.pid()))?
            .flatten()
            .filter_map(|fd| fs::read_link(fd.path()).ok())
            .any(|path| path.starts_with("/dev/vfio/devices"));
        if open {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("nestling does not open its device")
}
