//! The DMA test engine in a guest, behind a VT-d unit: driven from user space through VFIO, and
//! by processes that are bound to it (SVA), on stock kernels.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::harness::{Guest, Lab, Machine, Test, show, until};
use crate::hotplug::gone;
use crate::vtd::disk_keeps;

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("a_device_without_a_driver_reaches_nothing", blocked),
    Test::new("stock_6_12_drives_it_through_vfio", |lab| vfio(lab, "6.12")),
    Test::new("stock_7_2_drives_it_through_vfio", |lab| vfio(lab, "7.2")),
    Test::new("pasids_of_iommufd_are_address_spaces_side_by_side", pasid),
    Test::new(
        "sixty_four_processes_of_7_2_share_it_each_with_its_own_memory",
        sva,
    ),
    Test::new(
        "pasids_of_6_12_are_domains_side_by_side_and_no_processes",
        domains,
    ),
    Test::new(
        "pasids_of_6_1_come_from_the_host_and_go_back",
        virtual_commands,
    ),
];

const SLOW: Duration = Duration::from_secs(400);

/// A guest with a unit and an engine behind it.
fn guest(kernel: &str) -> Guest {
    let guest = match kernel {
        "lab" => Guest::lab_kernel(),
        kernel => Guest::debian(kernel),
    };
    guest
        .cpus(2)
        .cmdline("intel_iommu=on")
        .option("--test-device", "iommu=on")
}

/// The engine's PCI address.
pub(crate) fn address(guest: &mut Machine) -> Result<String> {
    let found = guest.run(
        "for d in /sys/bus/pci/devices/*; do \
         if [ $(cat $d/vendor)-$(cat $d/device) = 0x1af4-0x10f0 ]; then basename $d; fi; done",
    )?;
    let found = found.trim().to_owned();
    ensure!(
        found.split_whitespace().count() == 1,
        "engines in the guest: {found:?}"
    );
    Ok(found)
}

pub(crate) fn check(guest: &mut Machine, what: &str) -> Result<String> {
    let at = address(guest)?;
    let (check, rest) = what.split_once(' ').unwrap_or((what, ""));
    guest.run_within(SLOW, &format!("dma-engine {check} {at} {rest}"))
}

/// Takes the faults that a check made on purpose out of the kernel's log. All of them name the
/// engine, and each of `expected` (kind, PASID, address, reason) is among them. The kernel tells
/// of about five in five seconds.
pub(crate) fn faults_are(guest: &mut Machine, expected: &[(&str, &str, u64, u8)]) -> Result<()> {
    let at = address(guest)?;
    let missing = |log: &str| {
        let told = |(kind, pasid, address, reason): &&(&str, &str, u64, u8)| {
            let who = format!("[{kind} {pasid}]");
            let what = format!("fault addr {address:#x} [fault reason {reason:#04x}]");
            log.lines().any(|l| l.contains(&who) && l.contains(&what))
        };
        expected.iter().find(|fault| !told(fault)).copied()
    };
    // The fault is there when the device has its answer, and in the log a little later: when the
    // driver has taken all of them.
    let deadline = Instant::now() + SLOW;
    while Instant::now() < deadline
        && (number(guest, "fsts")? & PENDING != 0 || missing(&guest.run("dmesg")?).is_some())
    {
        std::thread::sleep(Duration::from_millis(200));
    }
    let log = guest.run("dmesg -c")?;
    let told: Vec<&str> = log.lines().filter(|l| l.contains("DMAR: [DMA")).collect();
    if let Some(fault) = missing(&log) {
        bail!("the guest's kernel does not report {fault:x?}, but {told:#?}");
    }
    // Older kernels name the function without its segment.
    let devices =
        [at.as_str(), at.trim_start_matches("0000:")].map(|at| format!("Request device [{at}]"));
    let ours = |line: &&str| devices.iter().any(|device| line.contains(device));
    if let Some(other) = told.iter().find(|line| !ours(line)) {
        bail!("a fault is not of {at}: {other}");
    }
    Ok(())
}

/// FSTS.PPF and PFO: faults that nobody has taken yet.
const PENDING: u64 = 0b11;
pub(crate) const NO_PASID: &str = "NO_PASID";
/// Where `dma-engine` maps its buffers.
const IOVA: u64 = 0x5_0000_0000;
/// Where it has the memory of processes.
const PROCESS_PLACE: u64 = 0x6000_0000_0000;

/// What the only unit's state says of something.
fn number(guest: &Machine, key: &str) -> Result<u64> {
    let state = guest.viommus()?;
    state[0][key]
        .as_u64()
        .with_context(|| format!("no {key} in {state:#}"))
}

fn blocked(lab: &Lab) -> Result<()> {
    let mut guest = guest("6.12").boot(lab)?;
    check(&mut guest, "blocked")?;
    ensure!(
        number(&guest, "faults_recorded")? > 0,
        "the unit recorded no fault"
    );
    faults_are(
        &mut guest,
        &[
            ("DMA Read", NO_PASID, 0x1000, 0x71),
            ("DMA Write", NO_PASID, 0x1000, 0x71),
        ],
    )?;
    guest.power_off()?;
    Ok(())
}

/// Reads and writes that must not pass, beside a disk behind the same unit that never notices.
fn vfio(lab: &Lab, kernel: &str) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let mut guest = guest(kernel)
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .boot(lab)?;
    disk_keeps(&mut guest, &image)?;
    // Without interrupt remapping the guest's kernel wants to be told that this is a test.
    guest.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1 && modprobe vfio_pci")?;
    check(&mut guest, "vfio")?;
    // Read-only memory is written, what lies behind the mapped memory too, and what was mapped
    // until a moment ago is read.
    faults_are(
        &mut guest,
        &[
            ("DMA Write", NO_PASID, IOVA + (8 << 20), 0x85),
            ("DMA Write", NO_PASID, IOVA + (4 << 20), 0x71),
            ("DMA Read", NO_PASID, IOVA, 0x71),
        ],
    )?;
    disk_keeps(&mut guest, &image)?;
    guest.power_off()?;
    Ok(())
}

fn pasid(lab: &Lab) -> Result<()> {
    let mut guest = guest("lab").boot(lab)?;
    guest.run("echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts")?;
    check(&mut guest, "pasid")?;
    // PASID 3 never had an address space, and 2 had its own taken away.
    faults_are(
        &mut guest,
        &[
            ("DMA Read", "PASID 0x3", IOVA, 0x59),
            ("DMA Read", "PASID 0x2", IOVA, 0x59),
        ],
    )?;
    guest.power_off()?;
    Ok(())
}

/// As many as the device has channels.
const PROCESSES: u64 = 64;

fn sva(lab: &Lab) -> Result<()> {
    let mut guest = guest("7.2").boot(lab)?;
    guest.run("insmod /lib/modules/dma_engine.ko")?;
    show(check(&mut guest, &format!("sva {PROCESSES}"))?);
    // Both sides count the same page requests. Each process ends with one of its own that its
    // unbound PASID answers before the unit hears of it.
    let device = check(&mut guest, "counts")?;
    show(&device);
    let (asked, answered) = (count(&device, "asked")?, count(&device, "answered")?);
    let (queued, refused) = (
        number(&guest, "page_requests")?,
        number(&guest, "page_requests_refused")?,
    );
    ensure!(
        queued > 0 && refused == 0 && asked == answered && asked == queued + PROCESSES,
        "the device asked {asked} times and had {answered} answers; the unit queued {queued} \
         requests and refused {refused}"
    );
    for what in ["heap", "fork", "unmap 8", "reuse"] {
        show(check(&mut guest, what)?);
    }
    let privileged = number(&guest, "privileged_page_requests")?;
    show(check(&mut guest, "apart")?);
    ensure!(
        number(&guest, "privileged_page_requests")? == privileged + 1,
        "a privileged page request is not counted"
    );
    faults_are(&mut guest, &[("DMA Read", NO_PASID, PROCESS_PLACE, 0x71)])?;
    ensure!(
        waiting(&guest.viommus()?) == 0,
        "page requests are left without an answer"
    );
    guest.run("rmmod dma_engine")?;
    guest.power_off()?;
    Ok(())
}

/// 6.12's kernel attaches domains of its own to PASIDs, but, as Debian has it, binds no process:
/// on x86 it answers that this is not supported, whatever the IOMMU is.
fn domains(lab: &Lab) -> Result<()> {
    let mut guest = guest("6.12").boot(lab)?;
    guest.run("insmod /lib/modules/dma_engine.ko")?;
    let at = address(&mut guest)?;
    let refused = guest.try_run(SLOW, &format!("dma-engine heap {at}"))?;
    ensure!(
        refused.status != 0 && refused.stderr.contains("Operation not supported"),
        "6.12 binds a process, or says something else: {refused:?}"
    );
    let said = check(&mut guest, "spaces")?;
    show(&said);
    let (_, detached) = said.split_once("detached=").context("no PASID")?;
    let pasid = detached.split_whitespace().next().unwrap_or_default();
    faults_are(
        &mut guest,
        &[("DMA Write", &format!("PASID {pasid}"), IOVA, 0x59)],
    )?;
    ensure!(
        live_pasids(&guest)? == 0,
        "PASIDs are left in the unit after their domains"
    );
    guest.run("rmmod dma_engine")?;
    guest.power_off()?;
    Ok(())
}

/// Targets of all units that have a PASID.
fn live_pasids(guest: &Machine) -> Result<usize> {
    let units = guest.viommus()?;
    let units = units.as_array().into_iter().flatten();
    let targets = units.flat_map(|unit| unit["targets"].as_array().into_iter().flatten());
    Ok(targets
        .filter(|target| !target["target"]["pasid"].is_null())
        .count())
}

/// A count that `dma-engine counts` prints.
fn count(text: &str, key: &str) -> Result<u64> {
    let mut words = text
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    let found = words.find(|(name, _)| *name == key);
    let (_, value) = found.with_context(|| format!("no {key} in {text:?}"))?;
    Ok(value.parse()?)
}

/// Groups of all endpoints that are owed an answer.
fn waiting(units: &Value) -> u64 {
    let units = units.as_array().into_iter().flatten();
    let endpoints = units.flat_map(|unit| unit["endpoints"].as_array().into_iter().flatten());
    endpoints
        .filter_map(|endpoint| endpoint["page_requests_waiting"].as_u64())
        .sum()
}

/// How many PASIDs each VM of [`virtual_commands`] may own.
const QUOTA: u64 = 8;

/// How often the engine comes and goes there.
const PLUGGED: u32 = 3;

/// Ends the processes of [`hold`].
const FREE: &str = "killall -9 dma-engine";

/// What `nestling pasids` says of one VM.
struct Holder {
    in_use: u64,
    ranges: Vec<(u64, u64)>,
}

fn holder(lab: &Lab, folder: &Path, name: &str) -> Result<Option<Holder>> {
    let mut command = Command::new(lab.nestling());
    let output = command
        .args(["pasids", "--json", "--directory"])
        .arg(folder)
        .output()?;
    let all: Value = serde_json::from_slice(&output.stdout)?;
    let mut all = all.as_array().into_iter().flatten();
    let Some(found) = all.find(|holder| holder["owner"]["name"] == name) else {
        return Ok(None);
    };
    let number = |value: &Value| value.as_u64().context("a number");
    let ranges = found["ranges"].as_array().into_iter().flatten();
    let range = |range: &Value| Ok((number(&range[0])?, number(&range[1])?));
    Ok(Some(Holder {
        in_use: number(&found["in_use"])?,
        ranges: ranges.map(range).collect::<Result<_>>()?,
    }))
}

/// Binds `count` processes that stay, and gives their PASIDs.
fn hold(guest: &mut Machine, count: u64) -> Result<BTreeSet<u64>> {
    let at = address(guest)?;
    guest.run(&format!(
        "rm -f /tmp/held.*; for n in $(seq {count}); do \
         dma-engine hold {at} >/tmp/held.$n 2>&1 </dev/null & done"
    ))?;
    let all = until(&format!("[ $(cat /tmp/held.* | wc -l) -ge {count} ]"));
    let said = guest.run(&format!("({all}); cat /tmp/held.*"))?;
    let pasids = said.lines().filter_map(|line| {
        let (_, number) = line.split_once("has PASID ")?;
        number.trim().parse().ok()
    });
    let pasids: BTreeSet<u64> = pasids.collect();
    ensure!(
        pasids.len() as u64 == count,
        "{count} processes said:\n{said}"
    );
    Ok(pasids)
}

/// Waits until no PASID is in use: the guest's kernel frees them when it forgets the processes.
fn are_free(in_use: &dyn Fn() -> Result<u64>) -> Result<()> {
    let deadline = Instant::now() + SLOW;
    loop {
        let left = in_use()?;
        if left == 0 {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{left} PASIDs of processes that ended are in use"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The engine comes and goes, while processes have PASIDs on it: none is left when they have ended,
/// and those on the engine that comes next get theirs from the host again.
fn plugged(guest: &mut Machine, in_use: impl Fn() -> Result<u64>) -> Result<()> {
    let api = guest.api();
    for _ in 0..PLUGGED {
        api.put("vm.remove-device", &gone("engine"))?;
        guest.run(FREE)?;
        are_free(&in_use)?;
        let engine = json!({"id": "engine", "iommu": true});
        let at = api.put("vm.add-test-device", &engine)?["bdf"].take();
        let at = at.as_str().context("no bdf")?;
        guest.run_within(SLOW, &until(&format!("[ -e /dev/dma-engine-{at} ]")))?;
        hold(guest, 3)?;
        let held = in_use()?;
        ensure!(held == 3, "{held} PASIDs are in use, not 3");
    }
    Ok(())
}

fn virtual_commands(lab: &Lab) -> Result<()> {
    let folder = lab.file("pasids");
    fs::create_dir_all(&folder)?;
    let with = |name: &str, folder: &Path| {
        let platform = format!(
            "name={name},pasid_directory={},pasid_quota={QUOTA}",
            folder.display()
        );
        let guest = Guest::debian("6.1").cpus(2).cmdline("intel_iommu=on");
        let guest = guest.option("--test-device", "iommu=on,id=engine");
        let guest = guest
            .option("--viommu", "type=vtd,vcmd=on")
            .api_at(lab, name);
        guest.option("--platform", &platform)
    };
    // Nothing is half there: what cannot be had is refused before the guest runs.
    let refused = with("nobody", Path::new("/sys")).start(lab)?;
    let refused = refused.wait(SLOW)?;
    ensure!(
        refused.status != 0 && refused.said.contains("/sys"),
        "a directory that cannot be written: status {}, {}",
        refused.status,
        refused.said
    );
    show(refused.said);

    let (mut one, mut two) = (
        with("one", &folder).boot(lab)?,
        with("two", &folder).boot(lab)?,
    );
    let owner = |name: &str| -> Result<Holder> {
        let found = holder(lab, &folder, name)?;
        found.with_context(|| format!("{name} owns no PASID of the host"))
    };
    for (name, guest) in [("one", &mut one), ("two", &mut two)] {
        guest.run("insmod /lib/modules/dma_engine.ko")?;
        hold(guest, 2)?;
        guest.run(FREE)?;
        are_free(&|| Ok(owner(name)?.in_use))?;
    }
    // Processes that stay: their PASIDs are the host's, and no other VM's.
    let mut held = Vec::new();
    for (name, guest) in [("one", &mut one), ("two", &mut two)] {
        let pasids = hold(guest, 3)?;
        let owner = owner(name)?;
        ensure!(
            owner.in_use == 3,
            "{name} has {} PASIDs in use, not 3",
            owner.in_use
        );
        let owns = |pasid: &u64| owner.ranges.iter().any(|(a, b)| (a..=b).contains(&pasid));
        ensure!(
            pasids.iter().all(owns),
            "{name} has {pasids:?}, and owns {:?}",
            owner.ranges
        );
        show(format!("{name}: {pasids:?} of {:?}", owner.ranges));
        held.push(pasids);
    }
    ensure!(
        held[0].is_disjoint(&held[1]),
        "two VMs share a PASID: {held:?}"
    );

    // The quota: the guest's kernel gets an error, and what it has still works.
    two.run(FREE)?;
    are_free(&|| Ok(owner("two")?.in_use))?;
    hold(&mut two, QUOTA)?;
    let at = address(&mut two)?;
    let over = two.try_run(SLOW, &format!("dma-engine hold {at}"))?;
    ensure!(
        over.status != 0 && over.stderr.contains("DMA_ENGINE_PASID"),
        "a process beyond the quota: {over:?}"
    );
    show(over.stderr);
    let told = two.run("dmesg -c")?;
    ensure!(
        told.contains("Failed ASID allocation"),
        "the guest's kernel says nothing of the quota: {told}"
    );
    ensure!(owner("two")?.in_use == QUOTA, "the quota is not in use");
    two.run(FREE)?;
    are_free(&|| Ok(owner("two")?.in_use))?;
    hold(&mut two, 3)?;

    plugged(&mut two, || Ok(owner("two")?.in_use))?;

    // A VM that is killed leaves nothing.
    one.signal(libc::SIGKILL)?;
    drop(one);
    ensure!(
        holder(lab, &folder, "one")?.is_none(),
        "a killed VM still owns PASIDs"
    );
    ensure!(owner("two")?.in_use == 3, "and it took another's with it");
    two.run(FREE)?;
    two.power_off()?;
    ensure!(
        holder(lab, &folder, "two")?.is_none(),
        "a VM that ended still owns PASIDs"
    );
    Ok(())
}
