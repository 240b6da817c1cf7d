//! Devices behind a VT-d unit: stock drivers choose the mode they should, and everything arrives.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::harness::{Guest, Lab, Machine, Test, show, tap::Tap, until};
use crate::net::exchange;

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("stock_7_2_uses_first_stage_tables_strict", |lab| {
        Behind::new(Guest::debian("7.2").cmdline("iommu.strict=1")).works(lab)
    }),
    Test::new("stock_7_2_uses_first_stage_tables_lazy", |lab| {
        Behind::new(Guest::debian("7.2").cmdline("iommu.strict=0").cpus(2))
            .lazy()
            .works(lab)
    }),
    Test::new("stock_6_12_uses_first_stage_tables", |lab| {
        Behind::new(Guest::debian("6.12").cpus(2)).lazy().works(lab)
    }),
    Test::new("stock_6_1_uses_first_stage_tables", |lab| {
        Behind::new(Guest::debian("6.1").cpus(2)).lazy().works(lab)
    }),
    Test::new(
        "the_guests_dump_of_its_tables_agrees_with_ours",
        dump_agrees,
    ),
    Test::new("iommu_pt_makes_an_identity_domain", |lab| {
        Behind::new(Guest::lab_kernel().cmdline("iommu=pt"))
            .group("identity")
            .translation("identity")
            .works(lab)
    }),
    Test::new("legacy_mode_uses_second_stage_tables", |lab| {
        Behind::new(Guest::lab_kernel())
            .unit("mode=legacy")
            .translation("stage2")
            .works(lab)
    }),
    Test::new(
        "a_guest_that_declines_scalable_mode_gets_second_stage_tables",
        |lab| {
            Behind::new(Guest::debian("6.12").cmdline("intel_iommu=on,sm_off"))
                .translation("stage2")
                .works(lab)
        },
    ),
    Test::new("a_unit_of_39_bits_works", |lab| {
        Behind::new(Guest::lab_kernel())
            .unit("address_width=39")
            .lazy()
            .works(lab)
    }),
    Test::new("a_unit_of_57_bits_works_with_5_level_cpus", |lab| {
        Behind::new(Guest::lab_kernel().cpus(2))
            .unit("address_width=57")
            .lazy()
            .also(five_levels)
            .works(lab)
    }),
    Test::new("two_units_serve_their_own_devices", two_units),
    Test::new("traffic_goes_on_after_a_reboot", reboots),
    Test::new("traffic_goes_on_after_a_kexec", kexec),
];

pub(crate) const HOST: &str = "192.168.78.1";
const GUEST: &str = "192.168.78.2";
const SLOW: Duration = Duration::from_secs(400);

/// A guest whose disk and network card are behind a unit, and what is expected of it.
struct Behind {
    guest: Guest,
    unit: String,
    group: &'static str,
    translation: &'static str,
    also: fn(&mut Machine, &Value) -> Result<()>,
}

impl Behind {
    fn new(guest: Guest) -> Self {
        let guest = guest.cmdline("intel_iommu=on");
        let unit = "type=vtd,id=unit".into();
        Self {
            guest,
            unit,
            group: "DMA",
            translation: "stage1",
            also: |_, _| Ok(()),
        }
    }

    /// With an option of the unit's.
    fn unit(mut self, option: &str) -> Self {
        self.unit = format!("{},{option}", self.unit);
        self
    }

    /// The guest flushes in batches.
    fn lazy(self) -> Self {
        self.group("DMA-FQ")
    }

    fn group(mut self, group: &'static str) -> Self {
        self.group = group;
        self
    }

    fn translation(mut self, translation: &'static str) -> Self {
        self.translation = translation;
        self
    }

    /// Something more holds, of the guest and of the units' state.
    fn also(mut self, also: fn(&mut Machine, &Value) -> Result<()>) -> Self {
        self.also = also;
        self
    }

    /// Boots it, and checks how it drives the unit and that all bytes arrive, also after its
    /// drivers were bound anew.
    fn works(self, lab: &Lab) -> Result<()> {
        let image = lab.image("disk", 32)?;
        let tap = Tap::new("lab1", &format!("{HOST}/24"))?;
        let mut guest = self
            .guest
            .option("--viommu", &self.unit)
            .option("--disk", &format!("path={},iommu=on", image.display()))
            .option("--net", &format!("tap={},iommu=on", tap.name()))
            .boot(lab)?;
        groups_are(&mut guest, self.group)?;
        disk_keeps(&mut guest, &image)?;
        network_works(lab, &mut guest, 8 << 20)?;
        let units = guest.viommus()?;
        translations_are(&units, self.translation, 2)?;
        (self.also)(&mut guest, &units)?;
        rebind(&mut guest)?;
        disk_keeps(&mut guest, &image)?;
        network_works(lab, &mut guest, 1 << 20)?;
        no_faults(&guest.viommus()?)?;
        guest.power_off()?;
        Ok(())
    }
}

/// The devices behind the unit are in groups of this type, each in its own.
pub(crate) fn groups_are(guest: &mut Machine, expected: &str) -> Result<()> {
    let types = guest.run("cat /sys/kernel/iommu_groups/*/type")?;
    let types: Vec<&str> = types.lines().collect();
    ensure!(
        types.len() == 2 && types.iter().all(|t| *t == expected),
        "the groups have the types {types:?}, two of {expected} were expected"
    );
    Ok(())
}

/// Each of so many targets has this kind of translation in force.
fn translations_are(units: &Value, kind: &str, count: usize) -> Result<()> {
    let targets = units
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|unit| unit["targets"].as_array().cloned().unwrap_or_default());
    let found: Vec<Value> = targets.collect();
    ensure!(
        found.len() == count
            && found
                .iter()
                .all(|t| t["translation"]["kind"] == kind && t["in_force"] == true),
        "{count} targets with {kind} were expected, there are {found:#?}"
    );
    Ok(())
}

fn no_faults(units: &Value) -> Result<()> {
    for unit in units.as_array().into_iter().flatten() {
        let clean = ["faults_recorded", "faults_lost"]
            .iter()
            .all(|key| unit[*key] == 0)
            && unit["queue"]["errors"] == 0
            && unit["back_end"]["refusals"] == 0;
        ensure!(clean, "the unit has faults or errors: {unit:#}");
    }
    Ok(())
}

/// What the guest writes reaches the image, and is read back.
pub(crate) fn disk_keeps(guest: &mut Machine, image: &Path) -> Result<()> {
    guest.run_within(SLOW, "dd if=/dev/urandom of=/dev/vda bs=1M count=16")?;
    guest.run_within(
        SLOW,
        "for at in 1 7 4095 30001; do \
         dd if=/dev/urandom of=/dev/vda bs=512 count=9 seek=$at conv=notrunc; done; \
         sync; echo 3 > /proc/sys/vm/drop_caches",
    )?;
    let read = guest.run_within(SLOW, "sha256sum < /dev/vda")?;
    let output = Command::new("sha256sum")
        .stdin(fs::File::open(image)?)
        .output()?;
    let written = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        read.trim() == written.trim(),
        "the guest reads {read}, the image has {written}"
    );
    Ok(())
}

pub(crate) fn network_works(lab: &Lab, guest: &mut Machine, length: u64) -> Result<()> {
    guest.run(&format!(
        "ip addr flush dev eth0; ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"
    ))?;
    guest.run(&format!("ping -c 2 -W 60 -s 4000 {HOST}"))?;
    exchange(lab, guest, HOST, length)
}

/// The guest's CPUs page with 5 levels where the host's can, and its tables for devices have 5.
fn five_levels(guest: &mut Machine, units: &Value) -> Result<()> {
    // The kernel takes the flag away from CPUs that do not page so.
    let flag = "grep -q -w la57 /proc/cpuinfo";
    let host = Command::new("sh").args(["-c", flag]).status()?.success();
    if host {
        guest.run(flag)?;
    } else {
        show("this host's CPUs page with 4 levels, so the guest's do");
    }
    let targets = units[0]["targets"].as_array();
    for target in targets.into_iter().flatten() {
        ensure!(
            target["translation"]["width"] == 57,
            "a target has no table of 5 levels: {target:#}"
        );
    }
    Ok(())
}

/// Takes the drivers of the disk and the card away and gives them back.
pub(crate) fn rebind(guest: &mut Machine) -> Result<()> {
    guest.run(&format!(
        "cd /sys/bus/pci/drivers/virtio-pci; \
         for d in $(ls -d /sys/kernel/iommu_groups/*/devices/*); do \
         d=${{d##*/}}; echo $d > unbind && echo $d > bind || exit 1; done; {}",
        until("[ -b /dev/vda ] && [ -d /sys/class/net/eth0 ]")
    ))?;
    Ok(())
}

/// The lab kernel's debugfs shows the root tables in use; they are the ones that the unit has.
fn dump_agrees(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let mut guest = Guest::lab_kernel()
        .cmdline("intel_iommu=on iommu.strict=1")
        .option("--viommu", "type=vtd")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .boot(lab)?;
    disk_keeps(&mut guest, &image)?;
    let units = guest.viommus()?;
    let unit = &units[0];
    let root = unit["root_table"]
        .as_u64()
        .context("the unit has no root table")?;
    let first_stage = &unit["targets"][0]["translation"]["root"];
    let first_stage = first_stage
        .as_u64()
        .context("the disk has no first-stage table")?;
    let dump = guest.run("cat /sys/kernel/debug/iommu/intel/dmar_translation_struct")?;
    ensure!(
        dump.contains(&format!("Root Table Address: {root:#x}")),
        "the guest's root table is not {root:#x}:\n{dump}"
    );
    // The PASID table entry, its quadwords from high to low: PGTT 001b, and FSPTPTR.
    let entry = dump
        .lines()
        .find(|l| l.starts_with("00:"))
        .context("no endpoint in the dump")?;
    let entry = entry.split_whitespace().last().unwrap_or_default();
    let words: Vec<u64> = entry
        .split(':')
        .filter_map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok())
        .collect();
    ensure!(
        words.len() == 3 && words[2] >> 6 & 7 == 1 && words[0] & !0xfff == first_stage,
        "the PASID entry {entry} of the guest is not one of the first-stage table {first_stage:#x}"
    );
    let registers = guest.run("cat /sys/kernel/debug/iommu/intel/iommu_regset")?;
    for (name, key) in [("CAP", "cap"), ("ECAP", "ecap"), ("GSTS", "gsts")] {
        let ours = unit[key]
            .as_u64()
            .map(|v| format!("{v:016x}"))
            .context("no register")?;
        let theirs = registers
            .lines()
            .find(|l| l.split_whitespace().next() == Some(name));
        let theirs = theirs.with_context(|| format!("no {name} in:\n{registers}"))?;
        ensure!(
            theirs.ends_with(&ours),
            "{name} is {ours} here and in the guest: {theirs}"
        );
    }
    no_faults(&units)?;
    guest.power_off()?;
    Ok(())
}

fn two_units(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let tap = Tap::new("lab1", &format!("{HOST}/24"))?;
    let mut guest = Guest::debian("7.2")
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=vtd,id=storage")
        .option("--viommu", "type=vtd,id=network")
        .option(
            "--disk",
            &format!("path={},viommu=storage", image.display()),
        )
        .option("--net", &format!("tap={},viommu=network", tap.name()))
        .boot(lab)?;
    let units = guest.run("ls /sys/class/iommu")?;
    ensure!(
        units.split_whitespace().eq(["dmar0", "dmar1"]),
        "the guest sees {units}"
    );
    disk_keeps(&mut guest, &image)?;
    network_works(lab, &mut guest, 4 << 20)?;
    let units = guest.viommus()?;
    for unit in units.as_array().into_iter().flatten() {
        let count = unit["endpoints"].as_array().map_or(0, Vec::len);
        ensure!(count == 1, "a unit has {count} endpoints: {unit:#}");
    }
    translations_are(&units, "stage1", 2)?;
    no_faults(&units)?;
    guest.power_off()?;
    Ok(())
}

fn reboots(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let mut guest = Guest::debian("7.2")
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=vtd")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .boot(lab)?;
    disk_keeps(&mut guest, &image)?;
    guest.restart_by("reboot -f")?;
    let fresh = guest.viommus()?;
    if fresh[0]["queue"]["wait"].as_u64().is_none() {
        bail!("the state has no count of waits: {fresh:#}");
    }
    disk_keeps(&mut guest, &image)?;
    translations_are(&guest.viommus()?, "stage1", 1)?;
    no_faults(&guest.viommus()?)?;
    guest.power_off()?;
    Ok(())
}

/// A stock kernel starts another one, with no reset of the machine between: the unit still has
/// the first one's tables, and the second one's driver takes it over.
fn kexec(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let tap = Tap::new("lab1", &format!("{HOST}/24"))?;
    let folder = lab.shared("guests/6.12");
    let mut guest = Guest::debian("6.12")
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=vtd")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .option("--net", &format!("tap={},iommu=on", tap.name()));
    let mut fetch = String::new();
    for (file, disk) in [("vmlinuz", "vdb"), ("initramfs", "vdc")] {
        let bytes = fs::read(folder.join(file))?;
        let to = lab.file(file);
        fs::write(&to, &bytes)?;
        let whole = (bytes.len() as u64).next_multiple_of(512);
        fs::File::options().write(true).open(&to)?.set_len(whole)?;
        guest = guest.option("--disk", &format!("path={},readonly=on", to.display()));
        fetch += &format!("head -c {} /dev/{disk} > /tmp/{file} && ", bytes.len());
    }
    let mut guest = guest.boot(lab)?;
    disk_keeps(&mut guest, &image)?;
    network_works(lab, &mut guest, 1 << 20)?;
    guest.run_within(SLOW, &format!("{fetch} true"))?;
    guest.restart_by(
        "/init kexec /tmp/vmlinuz /tmp/initramfs console=ttyS0 panic=-1 loglevel=5 \
         intel_iommu=on second=kernel",
    )?;
    guest.run("grep -q second=kernel /proc/cmdline")?;
    disk_keeps(&mut guest, &image)?;
    network_works(lab, &mut guest, 1 << 20)?;
    let units = guest.viommus()?;
    translations_are(&units, "stage1", 2)?;
    no_faults(&units)?;
    guest.power_off()?;
    Ok(())
}
