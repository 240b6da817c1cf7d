//! What a vIOMMU costs the host's NVMe drive in a guest: reads of 4 KiB, past every cache, with the
//! vIOMMU relative to without, beside QEMU with the same guest in the same run of the lab.
//!
//! Two quantities: reads per second, which whatever else this machine does disturbs, and reads per
//! second of the emulator's CPU time, which is what everything that a read takes costs: guest, VMM and
//! host together.
//!
//! Each VMM with each vIOMMU is a test of its own in a host of its own: one that is lost costs one
//! figure, and no figure depends on what ran before it. The lab makes the ratios of what they leave.

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use agent::Client;
use anyhow::{Context, Result, ensure};

use super::{Ending, copy_qemu};
use crate::harness::bound::Bound;
use crate::harness::figures::{Figure, Figures, Of};
use crate::harness::{Guest, Lab, Test};
use crate::passthrough::NVME;

/// `cargo lab bench nvme`: each pair side by side in time.
pub(super) const TESTS: [Test; 6] = [
    figure("nvme_nestling_no_viommu", |lab| ours(lab, &NONE)),
    figure("nvme_qemu_no_viommu", |lab| theirs(lab, &NONE)),
    figure("nvme_nestling_vtd", |lab| ours(lab, &VTD)),
    figure("nvme_qemu_vtd", |lab| theirs(lab, &VTD)),
    figure("nvme_nestling_virtio_iommu", |lab| ours(lab, &VIRTIO)),
    figure("nvme_qemu_virtio_iommu", |lab| theirs(lab, &VIRTIO)),
];

const fn figure(name: &'static str, run: fn(&Lab) -> Result<()>) -> Test {
    Test::new(name, run)
        .profile("vtd-measured")
        .limit(600)
        .alone()
        .on_request()
}

/// Samples of one figure, after one that warms up, of a second or little more.
const SAMPLES: usize = 15;
const SLOW: Duration = Duration::from_secs(60);
const RATE: &str = "reads of 4 KiB of a passed-through NVMe drive a second, two at a time";
const BY_CPU: &str = "the same a second of the emulator's CPU time";
/// Where the host sees its emulator's folder in /proc.
const EMULATOR: &str = "/run/emulator";

/// Takes the drive's driver away: a virtio-iommu may go before the drive, whose driver would wait.
const UNBIND: &str = "cd /sys/bus/pci/drivers/nvme && echo $(ls -d 0000:*) > unbind";

/// What is in front of the drive: words for the guest's kernel, nestling's unit and QEMU's.
struct Unit {
    name: &'static str,
    cmdline: &'static str,
    nestling: Option<&'static str>,
    qemu: Option<&'static str>,
    /// It is measured flushing in batches, too.
    lazy: bool,
}

const NONE: Unit = Unit {
    name: Figure::BASE,
    cmdline: "",
    nestling: None,
    qemu: None,
    lazy: false,
};
/// Second-stage tables, which both mirror: no host of the lab nests. Widths are equal, so that
/// tables have as many levels; with caching mode Linux flushes at once whatever it is told.
const VTD: Unit = Unit {
    name: "VT-d, mirrored",
    cmdline: "intel_iommu=on",
    nestling: Some("type=vtd,mode=legacy,address_width=39"),
    qemu: Some("intel-iommu,caching-mode=on,intremap=off,aw-bits=39"),
    lazy: false,
};
const VIRTIO: Unit = Unit {
    name: "virtio-iommu",
    cmdline: "iommu.strict=1",
    nestling: Some("type=virtio"),
    qemu: Some("virtio-iommu-pci"),
    lazy: true,
};

fn ours(lab: &Lab, unit: &Unit) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let behind = if unit.nestling.is_some() {
        ",iommu=on"
    } else {
        ""
    };
    let mut guest = Guest::lab_kernel()
        .cpus(2)
        .cmdline(unit.cmdline)
        .option("--device", &drive.option(behind));
    if let Some(option) = unit.nestling {
        guest = guest.option("--viommu", option);
    }
    let mut machine = guest.boot(lab)?;
    measure(lab, unit, "nestling", |command| {
        machine.run_within(SLOW, command)
    })?;
    machine.run(UNBIND)?;
    machine.power_off()?;
    Ok(())
}

fn theirs(lab: &Lab, unit: &Unit) -> Result<()> {
    let _drive = Bound::new(NVME)?;
    let mut machine = Qemu::boot(lab, &copy_qemu(lab)?, unit)?;
    measure(lab, unit, "QEMU", |command| machine.run(command))?;
    machine.power_off()
}

/// Leaves what one guest does as figures.
fn measure(
    lab: &Lab,
    unit: &Unit,
    vmm: &'static str,
    mut run: impl FnMut(&str) -> Result<String>,
) -> Result<()> {
    run("for i in $(seq 200); do [ -b /dev/nvme0n1 ] && exit 0; sleep 0.1; done; exit 1")?;
    let groups = run("cat /sys/kernel/iommu_groups/*/type 2> /dev/null || true")?;
    ensure!(
        groups.contains("DMA") == unit.nestling.is_some(),
        "{}: the groups have the types {groups:?}",
        unit.name
    );
    let mut figures = Figures::new(lab);
    let emulator = Emulator::new()?;
    let mut add = |of: String, run: &mut dyn FnMut(&str) -> Result<String>| -> Result<()> {
        sample(run)?;
        let (mut rates, mut by_cpu) = (Vec::new(), Vec::new());
        for _ in 0..SAMPLES {
            let before = emulator.seconds()?;
            let (reads, rate) = sample(run)?;
            by_cpu.push(reads / (emulator.seconds()? - before));
            rates.push(rate);
        }
        figures.add(RATE, vmm, &of, Of::Highest, rates)?;
        figures.add(BY_CPU, vmm, &of, Of::Median, by_cpu)
    };
    add(unit.name.to_owned(), &mut run)?;
    if unit.lazy {
        run("echo DMA-FQ > /sys/block/nvme0n1/device/device/iommu_group/type")?;
        add(format!("{}, lazy", unit.name), &mut run)?;
    }
    Ok(())
}

/// The process that plays the host, as the host sees it.
struct Emulator;

impl Emulator {
    fn new() -> Result<Self> {
        fs::create_dir_all(EMULATOR)?;
        let status = Command::new("mount")
            .args(["-t", "9p", "-o", "trans=virtio,version=9p2000.L,cache=none"])
            .args(["emulator", EMULATOR])
            .status()
            .context("mount")?;
        ensure!(status.success(), "cannot mount the emulator's folder");
        Ok(Self)
    }

    /// CPU time that it took, since ever.
    fn seconds(&self) -> Result<f64> {
        let text = fs::read_to_string(format!("{EMULATOR}/stat")).context("the emulator's stat")?;
        // Its name, which may have spaces, ends with the last parenthesis; user and system time are
        // the 14th and 15th word, in hundredths.
        let words = text.rsplit_once(')').context("no name")?.1;
        let ticks = words.split_whitespace().skip(11).take(2);
        let ticks = ticks.map(str::parse::<f64>).sum::<Result<f64, _>>()?;
        Ok(ticks / 100.0)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(EMULATOR).status();
    }
}

/// How many reads there were, and how many per second, two at a time, over a second or so.
fn sample(run: &mut dyn FnMut(&str) -> Result<String>) -> Result<(f64, f64)> {
    // So many reads of one program that starting it is no part of what is measured; in hundredths
    // of a second, as the kernel counts.
    let reader = "now() { read t rest < /proc/uptime; echo ${t%.*}${t#*.}; }; \
         n=0; from=$(now); while t=$(now); [ $((t - from)) -lt 100 ]; do \
         dd if=/dev/nvme0n1 of=/dev/null bs=4k count=512 skip=$((SKIP + n % 4096)) iflag=direct \
         2> /dev/null || exit 1; n=$((n + 512)); done; echo $n $((t - from))";
    let said = run(&format!(
        "(SKIP=0; {reader}) > /tmp/one & (SKIP=8192; {reader}) > /tmp/two & wait; \
         cat /tmp/one /tmp/two"
    ))?;
    let (mut sum, mut rate) = (0.0, 0.0);
    for line in said.lines() {
        let (reads, time) = line
            .split_once(' ')
            .with_context(|| format!("{said:?} is no sample"))?;
        let reads: f64 = reads.parse()?;
        sum += reads;
        rate += reads * 100.0 / time.parse::<f64>()?;
    }
    ensure!(said.lines().count() == 2, "{said:?} is no sample");
    Ok((sum, rate))
}

/// A guest of QEMU's.
struct Qemu {
    child: Ending,
    client: Client,
}

impl Qemu {
    fn boot(lab: &Lab, program: &[String], unit: &Unit) -> Result<Self> {
        let socket = lab.file("qemu-channel");
        let _ = fs::remove_file(&socket);
        let files = Guest::lab_kernel().cmdline(unit.cmdline).payload(lab, 0)?;
        let file = |option: &str| {
            let mut words = files.iter().skip_while(|word| *word != option);
            words.nth(1).with_context(|| format!("no {option}"))
        };
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]);
        command.args(["-enable-kvm", "-cpu", "host", "-smp", "2", "-no-reboot"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args([
            "-M",
            "q35,memory-backend=ram,kernel-irqchip=split",
            "-m",
            "512M",
        ]);
        command.args(["-object", "memory-backend-memfd,id=ram,size=512M"]);
        command.arg("-kernel").arg(file("--kernel")?);
        command.arg("-initrd").arg(file("--initramfs")?);
        command.arg("-append").arg(file("--cmdline")?);
        if let Some(unit) = unit.qemu {
            command.args(["-device", unit]);
        }
        command.args(["-object", "iommufd,id=host"]);
        command
            .arg("-device")
            .arg(format!("vfio-pci,host={NVME},iommufd=host,rombar=0"));
        command.args(["-device", "virtio-serial-pci"]);
        command.args([
            "-device",
            "virtconsole,chardev=c",
            "-device",
            "virtio-rng-pci",
        ]);
        command.arg("-chardev").arg(format!(
            "socket,id=c,path={},server=on,wait=off",
            socket.display()
        ));
        let console = lab.logs().join("QEMU-console.log");
        command
            .arg("-serial")
            .arg(format!("file:{}", console.display()));
        let log = lab.logs().join("QEMU.log");
        command
            .stdin(std::process::Stdio::null())
            .stdout(File::create(&log)?)
            .stderr(File::options().append(true).open(&log)?);
        let mut child = Ending(command.spawn().context("QEMU")?);
        let alive = || matches!(child.0.try_wait(), Ok(None));
        let client = Client::connect(&socket, Duration::from_secs(120), alive)
            .with_context(|| format!("QEMU, {}: see {}", unit.name, log.display()))?;
        Ok(Self { child, client })
    }

    fn run(&mut self, command: &str) -> Result<String> {
        let output = self.client.run(command, SLOW)?;
        ensure!(
            output.status == 0,
            "`{command}` in QEMU's guest: status {}\n{}{}",
            output.status,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    fn power_off(mut self) -> Result<()> {
        self.run(UNBIND)?;
        self.client.start("poweroff -f", Duration::from_secs(10))?;
        let status = self.child.wait(Duration::from_secs(60))?;
        ensure!(status == 0, "QEMU ended with status {status}");
        Ok(())
    }
}
