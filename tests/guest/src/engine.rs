//! The DMA test engine in a guest, behind a VT-d unit: driven from user space through VFIO, and
//! by processes that are bound to it (SVA), on stock kernels.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::harness::{Guest, Lab, Machine, Test};
use crate::vtd::disk_keeps;

/// The tests.
pub const TESTS: &[Test] = &[
    test("a_device_without_a_driver_reaches_nothing", blocked),
    Test::new("stock_6_12_drives_it_through_vfio", |lab| vfio(lab, "6.12")),
    test("stock_7_2_drives_it_through_vfio", |lab| vfio(lab, "7.2")),
    Test::new("pasids_of_iommufd_are_address_spaces_side_by_side", pasid),
    test(
        "processes_of_6_12_share_it_each_with_its_own_memory",
        |lab| sva(lab, "6.12", 16),
    ),
    test(
        "processes_of_7_2_share_it_each_with_its_own_memory",
        |lab| sva(lab, "7.2", 16),
    ),
    test(
        "processes_of_6_1_share_it_each_with_its_own_memory",
        |lab| sva(lab, "6.1", 4),
    ),
    test(
        "pasids_of_6_1_come_from_the_host_and_go_back",
        virtual_commands,
    ),
];

/// Long, and with a machine of its own for each: run when named, as `cargo lab test engine::`.
const fn test(name: &'static str, run: fn(&Lab) -> Result<()>) -> Test {
    Test::new(name, run).limit(600).on_request()
}

const SLOW: Duration = Duration::from_secs(120);

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
fn faults_are(guest: &mut Machine, expected: &[(&str, &str, u64, u8)]) -> Result<()> {
    let at = address(guest)?;
    let missing = |log: &str| {
        let told = |(kind, pasid, address, reason): &&(&str, &str, u64, u8)| {
            let who = format!("[{kind} {pasid}]");
            let what = format!("fault addr {address:#x} [fault reason {reason:#04x}]");
            log.lines().any(|l| l.contains(&who) && l.contains(&what))
        };
        expected.iter().find(|fault| !told(fault)).copied()
    };
    // The fault is there when the device has its answer, and in the log a little later.
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline && missing(&guest.run("dmesg")?).is_some() {
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

const NO_PASID: &str = "NO_PASID";
/// Where `dma-engine` maps its buffers.
const IOVA: u64 = 0x5_0000_0000;

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

fn sva(lab: &Lab, kernel: &str, processes: u32) -> Result<()> {
    let mut guest = guest(kernel).boot(lab)?;
    guest.run("insmod /lib/modules/dma_engine.ko")?;
    check(&mut guest, &format!("sva {processes}"))?;
    let (asked, refused) = (
        number(&guest, "page_requests")?,
        number(&guest, "page_requests_refused")?,
    );
    ensure!(
        asked > 0 && refused == 0,
        "{asked} page requests, {refused} refused"
    );
    check(&mut guest, "unmap")?;
    check(&mut guest, "reuse")?;
    ensure!(
        waiting(&guest.viommus()?) == 0,
        "page requests are left without an answer"
    );
    guest.run("rmmod dma_engine")?;
    guest.power_off()?;
    Ok(())
}

/// Groups of all endpoints that are owed an answer.
fn waiting(units: &Value) -> u64 {
    let units = units.as_array().into_iter().flatten();
    let endpoints = units.flat_map(|unit| unit["endpoints"].as_array().into_iter().flatten());
    endpoints
        .filter_map(|endpoint| endpoint["page_requests_waiting"].as_u64())
        .sum()
}

fn virtual_commands(lab: &Lab) -> Result<()> {
    let folder = lab.file("pasids");
    fs::create_dir_all(&folder)?;
    let boot = |name: &str| {
        let platform = format!(
            "name={name},pasid_directory={},pasid_quota=70",
            folder.display()
        );
        let guest = guest("6.1").option("--viommu", "type=vtd,vcmd=on");
        guest.option("--platform", &platform).boot(lab)
    };
    let holders = || -> Result<Value> {
        let mut command = Command::new(lab.nestling());
        let output = command
            .args(["pasids", "--json", "--directory"])
            .arg(&folder)
            .output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let in_use = |name: &str| -> Result<u64> {
        let all = holders()?;
        let mut all = all.as_array().into_iter().flatten();
        let Some(holder) = all.find(|holder| holder["owner"]["name"] == name) else {
            bail!("{name} owns no PASID of the host");
        };
        Ok(holder["in_use"].as_u64().unwrap_or(0))
    };
    let (mut one, mut two) = (boot("one")?, boot("two")?);
    for (name, guest) in [("one", &mut one), ("two", &mut two)] {
        guest.run("insmod /lib/modules/dma_engine.ko")?;
        check(guest, "sva 2")?;
        ensure!(
            in_use(name)? == 0,
            "PASIDs of processes that ended are still in use"
        );
    }
    // Processes that stay: their PASIDs are the host's.
    for (name, guest) in [("one", &mut one), ("two", &mut two)] {
        let at = address(guest)?;
        for _ in 0..3 {
            guest.run(&format!(
                "dma-engine hold {at} >/dev/null 2>&1 </dev/null &"
            ))?;
        }
        guest.run("sleep 3")?;
        ensure!(
            in_use(name)? == 3,
            "{name} has {} PASIDs in use, not 3",
            in_use(name)?
        );
    }
    // A VM that is killed leaves nothing.
    one.signal(libc::SIGKILL)?;
    drop(one);
    ensure!(in_use("one").is_err(), "a killed VM still owns PASIDs");
    ensure!(in_use("two")? == 3, "and it took another's with it");
    two.power_off()?;
    Ok(())
}
