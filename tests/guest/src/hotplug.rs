//! Devices that come and go while the guest runs: disks, network cards, the DMA test engine and
//! the host's NVMe drive, behind a VT-d unit, a virtio-iommu or nothing.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::harness::api::{Answer, Api};
use crate::harness::bound::Bound;
use crate::harness::kernel::{self, Kept};
use crate::harness::process::{self, Holding};
use crate::harness::{Guest, Lab, Machine, Test, load, show, tap::Tap, until};
use crate::net::exchange;
use crate::passthrough::Reserved;

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("devices_come_and_go_without_a_viommu", |lab| {
        come_and_go(lab, Guest::debian("6.1").cpus(2), None)
    }),
    Test::new("devices_come_and_go_behind_a_unit_that_has_none", |lab| {
        let guest = Guest::debian("7.2").cmdline("intel_iommu=on");
        come_and_go(lab, guest, Some("type=vtd,id=unit"))
    }),
    Test::new("devices_come_and_go_behind_a_virtio_iommu", |lab| {
        come_and_go(
            lab,
            Guest::lab_kernel().cpus(2),
            Some("type=virtio,id=unit"),
        )
    }),
    Test::new("what_cannot_be_added_leaves_nothing", refusals),
    Test::new(
        "a_device_that_comes_while_the_guest_boots_is_there",
        while_booting,
    ),
    Test::new(
        "a_guest_that_does_not_let_go_is_waited_for_or_not",
        stubborn,
    ),
    Test::new("an_nvme_drive_comes_and_goes", |lab| nvme(lab, 2)).profile("vtd"),
    Test::new("200_cycles_leave_nothing_without_a_viommu", |lab| {
        cycles(lab, Guest::lab_kernel(), None, 200)
    })
    .limit(1800)
    .on_request(),
    Test::new("200_cycles_leave_nothing_behind_a_unit", |lab| {
        let guest = Guest::lab_kernel().cmdline("intel_iommu=on");
        cycles(lab, guest, Some("type=vtd,id=unit"), 200)
    })
    .limit(1800)
    .on_request(),
    Test::new("200_cycles_leave_nothing_behind_a_virtio_iommu", |lab| {
        cycles(lab, Guest::lab_kernel(), Some("type=virtio,id=unit"), 200)
    })
    .limit(1800)
    .on_request(),
    Test::new("200_cycles_of_an_nvme_drive_leave_nothing", |lab| {
        nvme(lab, 70)
    })
    .profile("vtd")
    .limit(3000)
    .on_request(),
    Test::new("a_drive_that_its_client_opened_outlives_a_reboot", passed)
        .profile("vtd")
        .on_request(),
    Test::new("killed_at_any_point_the_host_is_clean", killed)
        .profile("vtd")
        .limit(1200)
        .on_request(),
];

const NVME: &str = "0000:00:10.0";
const HOST: &str = "192.168.80.1";
const GUEST: &str = "192.168.80.2";
const SLOW: Duration = Duration::from_secs(400);

/// A guest whose devices are to come and go, and what it had before.
struct Plugging {
    guest: Machine,
    api: Api,
    viommu: Option<&'static str>,
    before: Before,
}

/// What must be the same after all that came has gone.
struct Before {
    info: Value,
    viommus: Value,
    addresses: String,
    holding: Holding,
    kept: Kept,
}

impl Plugging {
    fn boot(lab: &Lab, guest: Guest, viommu: Option<&str>) -> Result<Self> {
        let guest = match viommu {
            Some(unit) => guest.option("--viommu", unit),
            None => guest,
        };
        Self::after(guest.api(lab).boot(lab)?, viommu.is_some())
    }

    /// A guest that was booted with the drive where devices are to come, and has it no longer: what
    /// the drive cannot was not promised.
    fn boot_with(lab: &Lab, drive: &Bound, viommu: Option<&str>) -> Result<Self> {
        let guest = Guest::lab_kernel().cmdline("intel_iommu=on").api(lab);
        let Some(unit) = viommu else {
            return Self::after(guest.boot(lab)?, false);
        };
        let mut guest = guest
            .option("--viommu", unit)
            .option("--device", &drive.option(",viommu=unit,id=drive"))
            .boot(lab)?;
        block(&mut guest, "0000:00:10.0")?;
        guest.api().put("vm.remove-device", &gone("drive"))?;
        Self::after(guest, true)
    }

    fn after(mut guest: Machine, viommu: bool) -> Result<Self> {
        let api = guest.api();
        let before = Before::now(&mut guest, &api)?;
        Ok(Self {
            guest,
            api,
            viommu: viommu.then_some("unit"),
            before,
        })
    }

    /// `config` for where the devices of this guest are.
    fn placed(&self, mut config: Value) -> Value {
        if let Some(unit) = self.viommu {
            config["viommu"] = unit.into();
        }
        config
    }

    /// Adds a device; its address, which the guest and nestling agree on.
    fn add(&mut self, kind: &str, config: Value) -> Result<String> {
        let config = self.placed(config);
        let added = self.api.put(&format!("vm.add-{kind}"), &config)?;
        let bdf = added["bdf"].as_str().context("no bdf")?.to_owned();
        if let Some(id) = config["id"].as_str() {
            ensure!(added["id"] == id, "{id} was added as {added}");
        }
        let info = self.api.get("vm.info")?;
        let id = added["id"].as_str().context("no id")?;
        let node = &info["device_tree"][id];
        ensure!(
            node["pci_bdf"] == bdf.as_str() && node["removable"] == true,
            "vm.info says {node} of {added}"
        );
        let driver = format!("[ -e /sys/bus/pci/devices/{bdf}/driver ]");
        self.guest.run(&until(&driver))?;
        Ok(bdf)
    }

    /// Removes a device, which the guest and nestling agree on.
    fn remove(&mut self, id: &str, bdf: &str) -> Result<()> {
        self.api.put("vm.remove-device", &gone(id))?;
        let info = self.api.get("vm.info")?;
        ensure!(
            info["device_tree"][id].is_null(),
            "{id} is still in {info:#}"
        );
        self.guest
            .run(&format!("! [ -e /sys/bus/pci/devices/{bdf} ]"))?;
        Ok(())
    }

    /// Everything is as it was before the first device came. What the guest, the host and the server
    /// finish in their own time may be late.
    fn nothing_is_left(&mut self) -> Result<()> {
        let deadline = Instant::now() + SLOW;
        let mut now = Before::now(&mut self.guest, &self.api)?;
        while !self.before.is(&now) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(200));
            now = Before::now(&mut self.guest, &self.api)?;
        }
        let before = &self.before;
        ensure!(
            now.info == before.info,
            "vm.info was {:#}, now it is {:#}",
            before.info,
            now.info
        );
        ensure!(
            now.viommus == before.viommus,
            "the vIOMMUs were {:#}, now they are {:#}",
            before.viommus,
            now.viommus
        );
        ensure!(
            now.addresses == before.addresses,
            "the guest had {}, now it has {}",
            before.addresses,
            now.addresses
        );
        ensure!(
            now.kept.is_no_more_than(&before.kept),
            "the host's kernel had {:?}, now it has {:?}",
            before.kept,
            now.kept
        );
        ensure!(
            before.is(&now),
            "nestling held {:?}, now it holds {:?}: {:#?}",
            before.holding,
            now.holding,
            process::descriptors(self.guest.pid())
        );
        Ok(())
    }
}

impl Before {
    fn now(guest: &mut Machine, api: &Api) -> Result<Self> {
        let info = api.get("vm.info")?;
        let viommus = without_counts(guest.viommus()?);
        let addresses = guest.run("ls /sys/bus/pci/devices")?;
        // What the server has of clients that have left is no device's.
        api.is_alone()?;
        Ok(Self {
            info: json!([info["config"], info["device_tree"]]),
            viommus,
            addresses,
            holding: process::holding(guest.pid())?,
            kept: kernel::kept(guest.pid())?,
        })
    }

    /// Whether `other`, which was taken later, has nothing that this has not.
    fn is(&self, other: &Self) -> bool {
        let held = |before: &Self| (before.holding.fds, before.holding.threads);
        self.info == other.info
            && self.viommus == other.viommus
            && self.addresses == other.addresses
            && held(self) == held(other)
            && other.kept.is_no_more_than(&self.kept)
    }
}

/// What is there, without what was counted on the way.
fn without_counts(viommus: Value) -> Value {
    let mut units: Vec<Value> = viommus.as_array().cloned().unwrap_or_default();
    for unit in &mut units {
        for counts in ["queue", "back_end", "counters", "faults"] {
            if let Some(unit) = unit.as_object_mut() {
                unit.remove(counts);
            }
        }
    }
    units.into()
}

/// What asks for the removal of the device `id`, and gives a slow guest the time that it needs.
pub(crate) fn gone(id: impl Into<Value>) -> Value {
    json!({"id": id.into(), "timeout": SLOW.as_secs()})
}

/// The name of the block device at a PCI address, when the guest has it.
fn block(guest: &mut Machine, bdf: &str) -> Result<String> {
    let name = guest.run(&until(&format!(
        "for d in /sys/bus/pci/devices/{bdf}/virtio*/block/* \
         /sys/bus/pci/devices/{bdf}/nvme/nvme*/nvme*n1; do \
         [ -e $d ] && [ -b /dev/${{d##*/}} ] && echo ${{d##*/}} && exit 0; done; false"
    )))?;
    Ok(name.trim().to_owned())
}

/// What is written to the disk at `bdf` is read back from it.
fn disk_keeps(guest: &mut Machine, bdf: &str, mib: u32) -> Result<String> {
    let name = block(guest, bdf)?;
    let out = guest.run_within(
        SLOW,
        &format!(
            "head -c {} /dev/urandom > /tmp/data && sha256sum < /tmp/data && \
             dd if=/tmp/data of=/dev/{name} bs=1M conv=notrunc 2> /dev/null && sync && \
             echo 3 > /proc/sys/vm/drop_caches && \
             dd if=/dev/{name} bs=1M count={mib} 2> /dev/null | sha256sum",
            mib << 20
        ),
    )?;
    let sums: Vec<&str> = out.lines().filter(|line| line.ends_with('-')).collect();
    ensure!(
        sums.len() == 2 && sums[0] == sums[1],
        "written and read back are not the same: {out}"
    );
    Ok(sums[0].split(' ').next().unwrap_or_default().to_owned())
}

/// The sum of the first MiBs of a disk, which is not asked of a cache.
fn sum_of(guest: &mut Machine, name: &str, mib: u32) -> Result<String> {
    let said = guest.run_within(
        SLOW,
        &format!(
            "echo 3 > /proc/sys/vm/drop_caches; \
             dd if=/dev/{name} bs=1M count={mib} 2> /dev/null | sha256sum"
        ),
    )?;
    Ok(said.split(' ').next().unwrap_or_default().to_owned())
}

/// The first MiBs of a file of the host.
fn begins_with(image: &Path, mib: u32, sum: &str) -> Result<()> {
    let command = format!("head -c {} '{}' | sha256sum", mib << 20, image.display());
    let output = Command::new("sh").args(["-c", &command]).output()?;
    let found = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        found.starts_with(sum),
        "the guest wrote {sum}, the image has {found}"
    );
    Ok(())
}

/// The interface at a PCI address has an address and reaches the host.
fn card_works(lab: &Lab, guest: &mut Machine, bdf: &str) -> Result<()> {
    guest.run(&format!(
        "{}; ip addr flush dev $e && \
         ip addr add {GUEST}/24 dev $e && ip link set $e up && ping -c 2 -W 60 -s 4000 {HOST}",
        until(&format!(
            "e=$(ls /sys/bus/pci/devices/{bdf}/virtio*/net 2> /dev/null)"
        ))
    ))?;
    exchange(lab, guest, HOST, 1 << 20)
}

fn come_and_go(lab: &Lab, guest: Guest, viommu: Option<&str>) -> Result<()> {
    let (first, second) = (lab.image("first", 16)?, lab.image("second", 16)?);
    let tap = Tap::new("lab2", &format!("{HOST}/24"))?;
    let mut vm = Plugging::boot(lab, guest.tools(), viommu)?;
    let disk = |image: &Path, id: &str| json!({"path": image.display().to_string(), "id": id});

    let at = vm.add("disk", disk(&first, "first"))?;
    begins_with(&first, 4, &disk_keeps(&mut vm.guest, &at, 4)?)?;
    let counted = vm.api.get("vm.counters")?;
    for counter in ["read_bytes", "write_bytes"] {
        let bytes = counted["first"][counter].as_u64().unwrap_or(0);
        ensure!(
            bytes >= 4 << 20,
            "4 MiB were moved; {counter} is {bytes}: {counted:#}"
        );
    }
    clients_at_once(&vm, &second, &tap)?;
    // The others come and go while the first one works.
    let name = block(&mut vm.guest, &at)?;
    let synced = sum_of(&mut vm.guest, &name, 4)?;
    load::begin(&mut vm.guest, &name, 8)?;
    let card = vm.add("net", json!({"tap": tap.name(), "id": "card"}))?;
    card_works(lab, &mut vm.guest, &card)?;
    let other = vm.add("disk", disk(&second, "second"))?;
    begins_with(&second, 4, &disk_keeps(&mut vm.guest, &other, 4)?)?;
    let seen = vm.guest.run("lspci -D -n")?;
    for (bdf, id) in [
        (&at, "1af4:1042"),
        (&card, "1af4:1041"),
        (&other, "1af4:1042"),
    ] {
        let line = seen.lines().find(|line| line.starts_with(bdf.as_str()));
        let line = line.with_context(|| format!("lspci does not show {bdf}:\n{seen}"))?;
        ensure!(line.contains(id), "lspci shows another device: {line}");
    }
    let twice = vm
        .api
        .ask("PUT", "vm.add-disk", &vm.placed(disk(&second, "second")))?;
    refused(&twice, 409, "id-in-use")?;
    vm.remove("card", &card)?;
    vm.remove("second", &other)?;
    // Names and addresses are free at once, and what comes there is another device.
    let again = vm.add("disk", disk(&second, "card"))?;
    ensure!(
        again == card,
        "the slot at {card} is not used again, but {again}"
    );
    begins_with(&second, 4, &disk_keeps(&mut vm.guest, &again, 4)?)?;
    vm.remove("card", &again)?;
    let engine = vm.placed(json!({"id": "engine"}));
    let engine = vm.api.put("vm.add-test-device", &engine)?;
    ensure!(engine["id"] == "engine", "{engine}");
    vm.api.put("vm.remove-device", &gone("engine"))?;

    // The last one goes with reads and writes under way, which its driver loses.
    let log = vm.guest.run("dmesg -r")?;
    vm.guest
        .run("mkdir -p /tmp/log && dmesg -r > /tmp/log/before")?;
    ensure!(!log.contains("I/O error"), "I/O errors:\n{log}");
    vm.remove("first", &at)?;
    load::end(&mut vm.guest)?;
    begins_with(&first, 4, &synced)?;
    vm.nothing_is_left()?;
    vm.guest.power_off()?;
    Ok(())
}

/// Two clients, each with a device that comes and goes, while a third one looks.
fn clients_at_once(vm: &Plugging, image: &Path, tap: &Tap) -> Result<()> {
    let tree = || -> Result<Value> { Ok(vm.api.get("vm.info")?["device_tree"].clone()) };
    let before = tree()?;
    let disk = vm.placed(json!({"path": image.display().to_string(), "id": "one"}));
    let card = vm.placed(json!({"tap": tap.name(), "id": "two"}));
    let come_and_go = |request: &str, config: &Value| -> Result<()> {
        for _ in 0..4 {
            let added = vm.api.put(request, config)?;
            let shown = tree()?[added["id"].as_str().context("no id")?]["pci_bdf"].clone();
            ensure!(
                shown == added["bdf"],
                "{added} was added, and is at {shown}"
            );
            vm.api.put("vm.remove-device", &gone(added["id"].clone()))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let clients = [
            scope.spawn(|| come_and_go("vm.add-disk", &disk)),
            scope.spawn(|| come_and_go("vm.add-net", &card)),
        ];
        let results = clients.map(|client| client.join());
        results.into_iter().try_for_each(|result| match result {
            Ok(result) => result,
            Err(_) => bail!("a client panicked"),
        })
    })?;
    let after = tree()?;
    ensure!(
        after == before,
        "there was {before:#}, now there is {after:#}"
    );
    Ok(())
}

/// An answer that is an error of this kind.
fn refused(answer: &Answer, status: u16, code: &str) -> Result<()> {
    ensure!(
        answer.status == status && answer.body["code"] == code,
        "{status} {code} was expected, the answer is {answer:?}"
    );
    Ok(())
}

fn refusals(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 16)?;
    let guest = Guest::lab_kernel().cmdline("intel_iommu=on");
    let mut vm = Plugging::boot(lab, guest, Some("type=vtd,id=unit"))?;
    let path = image.display().to_string();
    let wrong = |request: &str, config: Value, status: u16, code: &str| {
        refused(&vm.api.ask("PUT", request, &config)?, status, code)
            .with_context(|| format!("{request} {config}"))
    };
    wrong(
        "vm.add-disk",
        json!({"path": "/no/such"}),
        422,
        "host-refused",
    )?;
    wrong(
        "vm.add-disk",
        json!({"path": path, "viommu": "x"}),
        400,
        "invalid-config",
    )?;
    wrong(
        "vm.add-disk",
        json!({"path": path, "size": 1}),
        400,
        "invalid-config",
    )?;
    wrong(
        "vm.add-disk",
        json!({"path": path, "id": "unit"}),
        409,
        "id-in-use",
    )?;
    wrong("vm.add-net", json!({"tap": "no/such"}), 422, "host-refused")?;
    let nvme = json!({"path": "/sys/bus/pci/devices/0000:ff:1f.7"});
    wrong("vm.add-device", nvme, 422, "host-refused")?;
    wrong(
        "vm.remove-device",
        json!({"id": "nobody"}),
        404,
        "no-such-device",
    )?;
    wrong(
        "vm.remove-device",
        json!({"id": "__rng"}),
        409,
        "not-removable",
    )?;
    vm.nothing_is_left()?;

    // Every slot, and no more; the guest's own addresses run out at the same time as ours.
    let mut added = Vec::new();
    let full = loop {
        let disk = json!({"path": path, "readonly": true, "viommu": "unit"});
        let answer = vm.api.ask("PUT", "vm.add-disk", &disk)?;
        match answer.status {
            200 => added.push(answer.body),
            _ => break answer,
        }
    };
    refused(&full, 422, "no-free-slot")?;
    ensure!(added.len() >= 10, "there are only {} slots", added.len());
    show(format!("{} slots behind the unit", added.len()));
    for one in &added {
        let bdf = one["bdf"].as_str().context("no bdf")?;
        block(&mut vm.guest, bdf)?;
    }
    for one in added {
        vm.api.put("vm.remove-device", &gone(one["id"].clone()))?;
    }
    vm.nothing_is_left()?;
    vm.guest.power_off()?;
    Ok(())
}

fn while_booting(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 16)?;
    let guest = Guest::debian("6.12").cpus(2).cmdline("intel_iommu=on");
    let guest = guest.option("--viommu", "type=vtd,id=unit").api(lab);
    let mut machine = guest.start(lab)?;
    let api = machine.api();
    api.wait(SLOW)?;
    let mut added = Vec::new();
    // One every now and then, until the guest is up.
    while !machine.answers() {
        if added.len() < 8 {
            let disk = json!({
                "path": image.display().to_string(), "readonly": true, "viommu": "unit",
            });
            let answer = api.ask("PUT", "vm.add-disk", &disk)?;
            ensure!(answer.status == 200, "{answer:?}");
            added.push(answer.body);
        }
        std::thread::sleep(Duration::from_millis(1500));
    }
    show(format!("{} disks came while the guest booted", added.len()));
    for one in &added {
        let bdf = one["bdf"].as_str().context("no bdf")?;
        let name = block(&mut machine, bdf)?;
        machine.run(&format!("dd if=/dev/{name} of=/dev/null bs=1M count=1"))?;
    }
    for one in added {
        api.put("vm.remove-device", &gone(one["id"].clone()))?;
    }
    machine.power_off()?;
    Ok(())
}

/// A guest whose driver for hot-plug is off.
fn stubborn(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 16)?;
    let option = format!("path={},iommu=on,id=disk", image.display());
    let mut machine = Guest::lab_kernel()
        .cmdline("intel_iommu=on acpiphp.disable=1")
        .option("--viommu", "type=vtd,id=unit")
        .option("--disk", &option)
        .api(lab)
        .boot(lab)?;
    let api = machine.api();
    disk_keeps(&mut machine, "0000:00:01.0", 4)?;
    let before = process::holding(machine.pid())?;
    let remove = json!({"id": "disk", "timeout": 1});
    let late = api.ask("PUT", "vm.remove-device", &remove)?;
    refused(&late, 503, "guest-did-not-eject")?;
    // It stays, and works.
    disk_keeps(&mut machine, "0000:00:01.0", 4)?;
    let force = json!({"id": "disk", "timeout": 1, "force": true});
    api.put("vm.remove-device", &force)?;
    let after = process::holding(machine.pid())?;
    ensure!(
        after.fds < before.fds && after.threads < before.threads,
        "nestling held {before:?}, without the disk {after:?}"
    );
    let units = machine.viommus()?;
    let endpoints = units[0]["endpoints"].as_array().map_or(9, Vec::len);
    ensure!(endpoints == 0, "the unit still has {endpoints} endpoints");
    machine.run("ls / > /dev/null")?;
    // Its driver does not know and would wait at the power-off for a reset of the disk.
    machine.signal(libc::SIGTERM)?;
    machine.wait(SLOW)?;
    Ok(())
}

/// The host's kernel may take this much more for itself between two looks at it: what it keeps for
/// each CPU comes and goes in pieces.
const KERNELS_KIB: u64 = 4096;

/// One after the other; each comes without a name, works and goes.
fn cycles(lab: &Lab, guest: Guest, viommu: Option<&str>, count: u32) -> Result<()> {
    let image = lab.image("disk", 16)?;
    let tap = Tap::new("lab2", &format!("{HOST}/24"))?;
    let mut vm = Plugging::boot(lab, guest, viommu)?;
    let mut early = None;
    for n in 0..count {
        let path = image.display().to_string();
        let disk = vm.add("disk", json!({"path": path, "id": "disk"}))?;
        let card = vm.add("net", json!({"tap": tap.name(), "id": "card"}))?;
        begins_with(&image, 1, &disk_keeps(&mut vm.guest, &disk, 1)?)?;
        vm.remove("disk", &disk)?;
        vm.remove("card", &card)?;
        if n == 9 {
            let holding = process::holding(vm.guest.pid())?;
            early = Some((holding, kernel::unreclaimable_kib()?));
        }
    }
    vm.nothing_is_left()?;
    let now = process::holding(vm.guest.pid())?;
    let kernels = kernel::unreclaimable_kib()?;
    if let Some((early, before)) = early {
        show(format!(
            "own memory after 10 cycles {} KiB, after {count} {} KiB; the host's kernel's {before} \
             KiB and {kernels} KiB",
            early.own_kib, now.own_kib
        ));
        ensure!(
            kernels <= before + KERNELS_KIB,
            "the memory of the host's kernel grew from {before} to {kernels} KiB"
        );
        ensure!(
            now.own_kib <= early.own_kib + 2048,
            "nestling's own memory grew from {early:?} to {now:?}"
        );
    }
    vm.guest.power_off()?;
    Ok(())
}

fn nvme(lab: &Lab, count: u32) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let path = drive.sysfs().display().to_string();
    // A unit of a guest without devices of the host promises what this host does not have.
    let guest = Guest::lab_kernel().cmdline("intel_iommu=on");
    let mut vm = Plugging::boot(lab, guest, Some("type=vtd,id=unit"))?;
    let config = vm.placed(json!({"path": path}));
    let short = vm.api.ask("PUT", "vm.add-device", &config)?;
    refused(&short, 422, "capability-mismatch")?;
    vm.nothing_is_left()?;
    vm.guest.power_off()?;
    for viommu in [
        None,
        Some("type=vtd,id=unit,mode=legacy"),
        Some("type=virtio,id=unit"),
    ] {
        let mut vm = Plugging::boot_with(lab, &drive, viommu)?;
        in_the_way(&vm, &drive)?;
        let mut kept = None;
        let mut synced = None;
        for n in 0..count {
            let at = vm.add("device", json!({"path": path, "id": "drive"}))?;
            let name = block(&mut vm.guest, &at)?;
            if let Some(sum) = synced.take() {
                let found = sum_of(&mut vm.guest, &name, 2)?;
                ensure!(found == sum, "{sum} was synced, the drive has {found}");
            }
            let sum = disk_keeps(&mut vm.guest, &at, 2)?;
            // Every time the host's kernel has as much for it.
            let now = kernel::kept(vm.guest.pid())?;
            let now = (now.objects, now.interrupts, now.pinned_kib);
            ensure!(
                kept.get_or_insert_with(|| now.clone()) == &now,
                "the host's kernel had {kept:?} with the drive, now it has {now:?}"
            );
            if n == 0 {
                show(format!("the host's kernel has {now:?} with the drive"));
                load::begin(&mut vm.guest, &name, 8)?;
                synced = Some(sum);
            }
            if viommu.is_some() {
                let state = vm.api.get(&format!("vm.viommu?endpoint={at}"))?;
                let unit = &state["viommus"][0];
                let hwpts = [&unit["targets"][0]["hwpt"], &unit["endpoints"][0]["hwpt"]];
                let told = hwpts.iter().any(|hwpt| hwpt.is_u64());
                ensure!(told, "no HWPT translates for the drive: {state:#}");
            }
            let twice = json!({"path": path});
            let twice = vm.api.ask("PUT", "vm.add-device", &vm.placed(twice))?;
            refused(&twice, 409, "device-in-use")?;
            vm.remove("drive", &at)?;
            if n == 0 {
                load::end(&mut vm.guest)?;
            }
        }
        vm.nothing_is_left()?;
        let at = vm.add("device", json!({"path": path, "id": "drive"}))?;
        block(&mut vm.guest, &at)?;
        wanted_back(&vm, &drive)?;
        vm.guest
            .run(&format!("! [ -e /sys/bus/pci/devices/{at} ]"))?;
        // The host's own driver has mapped its buffers meanwhile: the tables for them stay.
        vm.before.kept.tables = kernel::kept(vm.guest.pid())?.tables;
        vm.nothing_is_left()?;
        vm.guest.power_off()?;
    }
    Ok(())
}

/// The host reserves for the drive what this guest has as RAM.
fn in_the_way(vm: &Plugging, drive: &Bound) -> Result<()> {
    let _reserved = Reserved::new(drive, "0x0000000008000000 0x00000000080fffff direct")?;
    let config = json!({"path": drive.sysfs().display().to_string(), "id": "drive"});
    let answer = vm.api.ask("PUT", "vm.add-device", &vm.placed(config))?;
    refused(&answer, 422, "capability-mismatch")?;
    let said = answer.body.to_string();
    for part in ["0x8000000-0x80fffff", "has RAM", "reserve=host"] {
        ensure!(said.contains(part), "no {part} in {said}");
    }
    Ok(())
}

/// The client opens the drive and the iommufd; nestling gets descriptors.
fn passed(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let path = drive.sysfs().display().to_string();
    let mut vm = Plugging::boot_with(lab, &drive, None)?;
    let client = Command::new(lab.nestling())
        .args(["api", "--socket"])
        .arg(lab.file("api"))
        .args(["add-device", "--pass", &format!("path={path},id=drive")])
        .output()?;
    let said = String::from_utf8_lossy(&client.stderr).into_owned();
    ensure!(client.status.success(), "the client says {said}");
    let at = |vm: &Plugging| -> Result<String> {
        let info = vm.api.get("vm.info")?;
        let bdf = info["device_tree"]["drive"]["pci_bdf"].as_str();
        Ok(bdf
            .with_context(|| format!("no drive in {info:#}"))?
            .to_owned())
    };
    let before = at(&vm)?;
    disk_keeps(&mut vm.guest, &before, 2)?;
    vm.api.put("vm.reboot", &Value::Null)?;
    vm.guest.starts_over()?;
    let after = at(&vm)?;
    disk_keeps(&mut vm.guest, &after, 2)?;
    vm.remove("drive", &after)?;
    vm.nothing_is_left()?;
    vm.guest.power_off()?;
    Ok(())
}

/// The host takes the driver away that holds the device for nestling, which asks its guest for it.
fn wanted_back(vm: &Plugging, drive: &Bound) -> Result<()> {
    std::thread::scope(|scope| -> Result<()> {
        let host = scope.spawn(|| drive.rebind(""));
        let deadline = Instant::now() + SLOW;
        while !vm.api.get("vm.info")?["device_tree"]["drive"].is_null() {
            ensure!(
                Instant::now() < deadline,
                "the host does not get its drive back"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        match host.join() {
            Ok(rebound) => rebound,
            Err(_) => bail!("the host's part panicked"),
        }
    })?;
    drive.rebind("vfio-pci")
}

/// The host has its drive back after nestling was killed, wherever it was.
fn killed(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let path = drive.sysfs().display().to_string();
    for n in 0..6u64 {
        let vm = Plugging::boot_with(lab, &drive, Some("type=vtd,id=unit,mode=legacy"))?;
        let add = vm.placed(json!({"path": path, "id": "drive"}));
        let api = vm.api.clone();
        let worker = std::thread::spawn(move || {
            // As often as it goes.
            while api.ask("PUT", "vm.add-device", &add).is_ok() {
                if api.ask("PUT", "vm.remove-device", &gone("drive")).is_err() {
                    break;
                }
            }
        });
        std::thread::sleep(Duration::from_millis(300 + 977 * n));
        vm.guest.signal(libc::SIGKILL)?;
        vm.guest.wait(SLOW)?;
        if worker.join().is_err() {
            bail!("the client panicked");
        }
        drive.works_on_the_host()?;
    }
    Ok(())
}
