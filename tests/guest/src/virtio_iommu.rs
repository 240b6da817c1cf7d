//! Devices behind a virtio-iommu: stock drivers drive it as they should, and everything arrives.
//!
//! In stock kernels the driver is a module, and a device behind the unit waits for it. Debian's
//! 6.1 has no such driver.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::harness::{Guest, Lab, Machine, Test, tap::Tap, until};
use crate::vtd::{HOST, disk_keeps, groups_are, network_works, rebind};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new(
        "stock_7_2_works_lazy_with_a_driver_that_comes_late",
        |lab| {
            Behind::new(Guest::debian("7.2").cpus(2))
                .late()
                .lazy()
                .works(lab)
        },
    ),
    Test::new(
        "stock_6_12_works_strict_with_a_driver_that_comes_first",
        |lab| {
            let first = "agent.modprobe=virtio_iommu iommu.strict=1";
            Behind::new(Guest::debian("6.12").cmdline(first)).works(lab)
        },
    ),
    Test::new("stock_7_2_works_strict", |lab| {
        Behind::new(Guest::debian("7.2").cmdline("iommu.strict=1"))
            .late()
            .works(lab)
    }),
    Test::new("stock_6_12_works_lazy", |lab| {
        Behind::new(Guest::debian("6.12").cpus(2))
            .late()
            .lazy()
            .works(lab)
    }),
    Test::new(
        "passthrough_is_one_bypass_domain_and_reboots_leave_nothing",
        identity,
    ),
    Test::new(
        "a_guest_without_a_driver_boots_from_a_disk_in_bypass",
        bypass,
    ),
    Test::new(
        "a_guest_without_a_driver_reaches_nothing_by_default",
        blocked_disk,
    ),
    Test::new("nothing_is_left_after_a_kexec_and_a_reboot", kexec),
    Test::new(
        "a_vtd_unit_and_a_virtio_iommu_serve_their_own_devices",
        mixed,
    ),
    Test::new("stock_6_12_drives_two_engines_through_vfio", |lab| {
        engines(
            lab,
            Guest::debian("6.12").cmdline("agent.modprobe=virtio_iommu"),
        )
    }),
    Test::new("stock_7_2_drives_two_engines_through_vfio", |lab| {
        engines(
            lab,
            Guest::debian("7.2").cmdline("agent.modprobe=virtio_iommu"),
        )
    }),
    Test::new("an_engine_moves_between_address_spaces_of_iommufd", iommufd),
];

const SLOW: Duration = Duration::from_secs(400);

/// A guest whose disk and network card are behind a unit, and what is expected of it.
struct Behind {
    guest: Guest,
    /// The driver is loaded when everything else is there.
    late: bool,
    group: &'static str,
}

impl Behind {
    fn new(guest: Guest) -> Self {
        Self {
            guest,
            late: false,
            group: "DMA",
        }
    }

    fn late(mut self) -> Self {
        self.late = true;
        self
    }

    /// The guest flushes in batches.
    fn lazy(mut self) -> Self {
        self.group = "DMA-FQ";
        self
    }

    /// Boots it, and checks how it drives the unit and that all bytes arrive, also after its
    /// drivers were bound anew.
    fn works(self, lab: &Lab) -> Result<()> {
        let image = lab.image("disk", 32)?;
        let tap = Tap::new("lab1", &format!("{HOST}/24"))?;
        let mut guest = with_disk(self.guest, &image)
            .option("--net", &format!("tap={},iommu=on", tap.name()))
            .boot(lab)?;
        if self.late {
            guest.run("[ ! -e /dev/vda ] && [ ! -e /sys/class/net/eth0 ]")?;
            guest.run("modprobe virtio_iommu")?;
        }
        present(&mut guest, "/dev/vda")?;
        present(&mut guest, "/sys/class/net/eth0")?;
        groups_are(&mut guest, self.group)?;
        disk_keeps(&mut guest, &image)?;
        network_works(lab, &mut guest, 8 << 20)?;
        translated(&guest.viommus()?[0], 2)?;
        rebind(&mut guest)?;
        disk_keeps(&mut guest, &image)?;
        network_works(lab, &mut guest, 1 << 20)?;
        let unit = &guest.viommus()?[0];
        translated(unit, 2)?;
        clean(unit)?;
        guest.power_off()?;
        Ok(())
    }
}

fn with_disk(guest: Guest, image: &Path) -> Guest {
    guest
        .option("--viommu", "type=virtio")
        .option("--disk", &format!("path={},iommu=on", image.display()))
}

/// Waits until a file is there.
fn present(guest: &mut Machine, file: &str) -> Result<()> {
    guest.run(&until(&format!("[ -e {file} ]")))?;
    Ok(())
}

fn list<'v>(unit: &'v Value, key: &str) -> Result<&'v Vec<Value>> {
    unit[key]
        .as_array()
        .with_context(|| format!("no {key} in {unit:#}"))
}

/// There are so many endpoints, each in a domain of its own that maps something.
fn translated(unit: &Value, count: usize) -> Result<()> {
    let (endpoints, domains) = (list(unit, "endpoints")?, list(unit, "domains")?);
    let attached = endpoints.iter().filter(|e| e["domain"].is_u64()).count();
    let mapped = |d: &&Value| d["bypass"] == false && d["mappings"].as_u64() > Some(0);
    ensure!(
        attached == count
            && domains.len() == count
            && domains.iter().filter(mapped).count() == count,
        "{count} endpoints in domains with mappings were expected: {unit:#}"
    );
    Ok(())
}

/// So many endpoints are in one bypass domain, and there is no other.
fn bypassed(unit: &Value, count: usize) -> Result<()> {
    let (endpoints, domains) = (list(unit, "endpoints")?, list(unit, "domains")?);
    ensure!(
        domains.len() == 1 && domains[0]["bypass"] == true,
        "one bypass domain was expected: {unit:#}"
    );
    let inside = endpoints
        .iter()
        .filter(|e| e["domain"] == domains[0]["domain"]);
    ensure!(
        inside.count() == count,
        "{count} endpoints in the bypass domain were expected: {unit:#}"
    );
    Ok(())
}

/// Nothing was reported or refused.
fn clean(unit: &Value) -> Result<()> {
    let refused = list(unit, "endpoints")?
        .iter()
        .any(|e| e["refused"] != false);
    ensure!(
        !refused
            && unit["faults"]["reported"] == 0
            && unit["faults"]["dropped"] == 0
            && unit["counters"]["refusals"] == 0,
        "the unit has faults or refusals: {unit:#}"
    );
    Ok(())
}

/// The driver is built in, so that nothing is deferred.
fn identity(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let tap = Tap::new("lab1", &format!("{HOST}/24"))?;
    let mut guest = with_disk(Guest::lab_kernel().cmdline("iommu.passthrough=1"), &image)
        .option("--net", &format!("tap={},iommu=on", tap.name()))
        .boot(lab)?;
    for boot in 0..2 {
        groups_are(&mut guest, "identity")?;
        disk_keeps(&mut guest, &image)?;
        network_works(lab, &mut guest, 1 << 20)?;
        let unit = &guest.viommus()?[0];
        bypassed(unit, 2)?;
        clean(unit)?;
        // A group changes its domain while no driver has its device.
        guest.run(
            "d=$(basename $(readlink -f /sys/block/vda/device/..)); \
             g=$(readlink -f /sys/bus/pci/devices/$d/iommu_group); \
             echo $d > /sys/bus/pci/drivers/virtio-pci/unbind && echo DMA > $g/type && \
             echo $d > /sys/bus/pci/drivers/virtio-pci/bind",
        )?;
        present(&mut guest, "/dev/vda")?;
        disk_keeps(&mut guest, &image)?;
        let unit = &guest.viommus()?[0];
        let domains = list(unit, "domains")?;
        let kinds = |bypass: bool| domains.iter().filter(|d| d["bypass"] == bypass).count();
        ensure!(
            kinds(true) == 1 && kinds(false) == 1,
            "a bypass domain and another were expected: {unit:#}"
        );
        clean(unit)?;
        if boot == 0 {
            guest.restart_by("reboot -f")?;
        }
    }
    guest.power_off()?;
    Ok(())
}

/// A new kernel with no firmware between, and then one with it.
fn kexec(lab: &Lab) -> Result<()> {
    const WORDS: &str = "agent.modprobe=virtio_iommu";
    let image = lab.image("disk", 32)?;
    let mut guest = Guest::debian("6.12").cmdline(WORDS);
    for name in ["vmlinuz", "initramfs"] {
        // The disk of a file has whole sectors.
        let copy = lab.file(name);
        let length = std::fs::copy(lab.shared("guests/6.12").join(name), &copy)?;
        let file = File::options().write(true).open(&copy)?;
        file.set_len(length.next_multiple_of(512))?;
        guest = guest.option("--disk", &format!("path={},id={name}", copy.display()));
    }
    let disk = format!("path={},id=behind,iommu=on", image.display());
    let mut guest = guest
        .option("--viommu", "type=virtio")
        .option("--disk", &disk)
        .boot(lab)?;
    let keeps = |guest: &mut Machine| -> Result<()> {
        let disk = disk_named(guest, "behind")?;
        guest.run_within(
            SLOW,
            &format!(
                "head -c 4194304 /dev/urandom > /tmp/data && \
                 dd if=/tmp/data of={disk} bs=1M conv=notrunc && sync && \
                 echo 3 > /proc/sys/vm/drop_caches && head -c 4194304 {disk} | cmp - /tmp/data"
            ),
        )?;
        let unit = &guest.viommus()?[0];
        translated(unit, 1)?;
        clean(unit)
    };
    keeps(&mut guest)?;
    for name in ["vmlinuz", "initramfs"] {
        let disk = disk_named(&mut guest, name)?;
        guest.run(&format!("cat {disk} > /tmp/{name}"))?;
    }
    guest.restart_by(&format!(
        "/init kexec /tmp/vmlinuz /tmp/initramfs console=ttyS0 panic=-1 loglevel=5 {WORDS} again"
    ))?;
    let line = guest.run("cat /proc/cmdline")?;
    ensure!(line.trim().ends_with("again"), "not a new kernel: {line}");
    keeps(&mut guest)?;
    guest.restart_by("reboot -f")?;
    let line = guest.run("cat /proc/cmdline")?;
    ensure!(!line.contains("again"), "not rebooted: {line}");
    keeps(&mut guest)?;
    guest.power_off()?;
    Ok(())
}

/// The device of the disk with this id, when it is there.
fn disk_named(guest: &mut Machine, id: &str) -> Result<String> {
    let found = guest.run(&until(&format!(
        "for d in /sys/block/vd*; do \
         [ \"$(cat $d/serial)\" = {id} ] && echo /dev/${{d##*/}} && exit 0; done; false"
    )))?;
    Ok(found.trim().to_owned())
}

/// Debian's 6.1 has no driver for the unit, as firmware has none.
fn bypass(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let mut guest = Guest::debian("6.1")
        .option("--viommu", "type=virtio,bypass=on")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .boot(lab)?;
    disk_keeps(&mut guest, &image)?;
    let unit = &guest.viommus()?[0];
    ensure!(
        unit["bypass"] == true && unit["features"] == 0 && list(unit, "domains")?.is_empty(),
        "no driver, and bypass, were expected: {unit:#}"
    );
    clean(unit)?;
    guest.power_off()?;
    Ok(())
}

fn blocked_disk(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    // The driver of the disk waits for an answer that cannot arrive, and the guest for the driver.
    let guest = with_disk(Guest::debian("6.1"), &image).start(lab)?;
    let deadline = Instant::now() + SLOW;
    // A signal that comes before nestling is ready for it would end it; it is when its guest has a
    // channel.
    while !guest.channel().exists() {
        ensure!(Instant::now() < deadline, "the guest has no channel");
        std::thread::sleep(Duration::from_millis(50));
    }
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let units = guest.viommus().unwrap_or_default();
        let unit = &units[0];
        if unit["faults"]["reported"].as_u64() > Some(0) {
            let endpoints = list(unit, "endpoints")?;
            ensure!(
                endpoints.len() == 1 && endpoints[0]["domain"].is_null(),
                "one endpoint without a domain was expected: {unit:#}"
            );
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no fault is reported: {unit:#}");
    }
}

/// The disk is behind a virtio-iommu, the card behind a VT-d unit, and the engine behind none.
fn mixed(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let tap = Tap::new("lab1", &format!("{HOST}/24"))?;
    let mut guest = Guest::debian("7.2")
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=virtio,id=paravirtual")
        .option("--viommu", "type=vtd,id=hardware")
        .option(
            "--disk",
            &format!("path={},viommu=paravirtual", image.display()),
        )
        .option("--net", &format!("tap={},viommu=hardware", tap.name()))
        .boot(lab)?;
    guest.run("modprobe virtio_iommu")?;
    present(&mut guest, "/dev/vda")?;
    present(&mut guest, "/sys/class/net/eth0")?;
    groups_are(&mut guest, "DMA-FQ")?;
    disk_keeps(&mut guest, &image)?;
    network_works(lab, &mut guest, 4 << 20)?;
    let units = guest.viommus()?;
    let of = |kind: &str| {
        let mut all = units.as_array().into_iter().flatten();
        let found = all.find(|unit| unit["type"] == kind);
        found.with_context(|| format!("no unit of type {kind} in {units:#}"))
    };
    let (virtio, vtd) = (of("virtio")?, of("vtd")?);
    translated(virtio, 1)?;
    clean(virtio)?;
    ensure!(
        list(vtd, "targets")?.len() == 1
            && vtd["targets"][0]["translation"]["kind"] == "stage1"
            && vtd["faults_recorded"] == 0,
        "one target with first-stage tables was expected: {vtd:#}"
    );
    guest.power_off()?;
    Ok(())
}

/// The PCI addresses of the engines, and their endpoint numbers.
fn addresses(guest: &mut Machine) -> Result<Vec<(String, u32)>> {
    let found = guest.run(
        "for d in /sys/bus/pci/devices/*; do \
         if [ $(cat $d/vendor)-$(cat $d/device) = 0x1af4-0x10f0 ]; then basename $d; fi; done",
    )?;
    found
        .split_whitespace()
        .map(|address| {
            // 0000:BB:DD.F
            let part = |range| u32::from_str_radix(address.get(range).unwrap_or_default(), 16);
            let (bus, device, function) = (part(5..7)?, part(8..10)?, part(11..12)?);
            Ok((address.to_owned(), bus << 8 | device << 3 | function))
        })
        .collect()
}

/// The guest's kernel has logged a fault of `endpoint` at `address`; its log is empty then.
///
/// The kernel logs ten of them in five seconds and no more, so the next check waits that long: for
/// what is told late, too.
fn fault_is_logged(guest: &mut Machine, endpoint: u32, address: u64) -> Result<()> {
    let wanted = format!("fault from EP {endpoint} at {address:#x} ");
    let told = until(&format!(
        "dmesg | grep virtio_iommu | grep -q -F '{wanted}'"
    ));
    let told = guest.try_run(SLOW, &told)?.status == 0;
    let log = guest.run("sleep 6; dmesg -c")?;
    ensure!(told, "the guest's kernel does not log a {wanted}:\n{log}");
    Ok(())
}

/// Where the checks of `dma-engine` map their buffers.
const IOVA: u64 = 0x5_0000_0000;

fn engines(lab: &Lab, guest: Guest) -> Result<()> {
    let mut guest = guest
        .cpus(2)
        .option("--viommu", "type=virtio")
        .option("--test-device", "iommu=on")
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    let found = addresses(&mut guest)?;
    let [(one, first), (two, second)] = found.as_slice() else {
        bail!("two engines were expected: {found:?}");
    };
    guest.run("dmesg -c > /tmp/boot.log")?;
    guest.run_within(SLOW, &format!("dma-engine blocked {one}"))?;
    fault_is_logged(&mut guest, *first, 0x1000)?;
    // The guest's kernel wants to be told that this is a test.
    guest.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1 && modprobe vfio_pci")?;
    guest.run_within(SLOW, &format!("dma-engine vfio {one}"))?;
    fault_is_logged(&mut guest, *first, IOVA)?;
    guest.run_within(SLOW, &format!("dma-engine together {one} {two}"))?;
    fault_is_logged(&mut guest, *second, IOVA)?;
    let unit = &guest.viommus()?[0];
    ensure!(
        list(unit, "domains")?.iter().all(|d| d["mappings"] == 0),
        "mappings of VFIO's are left: {unit:#}"
    );
    guest.power_off()?;
    Ok(())
}

fn iommufd(lab: &Lab) -> Result<()> {
    let mut guest = Guest::lab_kernel()
        .cpus(2)
        .option("--viommu", "type=virtio")
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    let found = addresses(&mut guest)?;
    let [(engine, endpoint)] = found.as_slice() else {
        bail!("one engine was expected: {found:?}");
    };
    guest.run("echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts")?;
    guest.run("dmesg -c > /tmp/boot.log")?;
    guest.run_within(SLOW, &format!("dma-engine cdev {engine}"))?;
    fault_is_logged(&mut guest, *endpoint, IOVA)?;
    guest.power_off()?;
    Ok(())
}
