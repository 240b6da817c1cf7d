//! What a vIOMMU costs the host's NVMe drive in a guest: reads of 4 KiB, past every cache, with the
//! vIOMMU relative to without, beside QEMU with the same guest in the same run.

use std::fs::File;
use std::process::Command;
use std::time::Duration;

use agent::Client;
use anyhow::{Context, Result, ensure};

use super::{Ending, copy_qemu, table};
use crate::harness::bound::Bound;
use crate::harness::{Guest, Lab, show};
use crate::passthrough::NVME;

/// Seconds of one sample, and samples of one guest.
const SECONDS: u32 = 3;
const SAMPLES: usize = 3;
const SLOW: Duration = Duration::from_secs(60);

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

/// Widths are equal, so that tables have as many levels; with caching mode and second-stage tables
/// Linux flushes at once whatever it is told.
const UNITS: [Unit; 3] = [
    Unit {
        name: "no vIOMMU",
        cmdline: "",
        nestling: None,
        qemu: None,
        lazy: false,
    },
    Unit {
        name: "VT-d, shadowed",
        cmdline: "intel_iommu=on",
        nestling: Some("type=vtd,mode=legacy,address_width=39"),
        qemu: Some("intel-iommu,caching-mode=on,intremap=off,aw-bits=39"),
        lazy: false,
    },
    Unit {
        name: "virtio-iommu",
        cmdline: "iommu.strict=1",
        nestling: Some("type=virtio"),
        qemu: Some("virtio-iommu-pci"),
        lazy: true,
    },
];

const VMMS: [&str; 2] = ["nestling", "QEMU"];

/// Operations per second: for each row, ours and theirs.
type Rates = Vec<(String, [f64; 2])>;

/// `cargo lab bench nvme`.
///
/// # Errors
/// A guest failed.
pub(super) fn run(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let qemu = copy_qemu(lab)?;
    let mut rates = Rates::new();
    for unit in &UNITS {
        let guest = Guest::lab_kernel().cpus(2).cmdline(unit.cmdline).option(
            "--device",
            &drive.option(match unit.nestling {
                Some(_) => ",iommu=on",
                None => "",
            }),
        );
        let guest = match unit.nestling {
            Some(option) => guest.option("--viommu", option),
            None => guest,
        };
        let mut machine = guest.boot(lab)?;
        measure(unit, 0, &mut rates, |command| {
            machine.run_within(SLOW, command)
        })?;
        machine.run(UNBIND)?;
        machine.power_off()?;

        let mut machine = Qemu::boot(lab, &qemu, unit)?;
        measure(unit, 1, &mut rates, |command| machine.run(command))?;
        machine.power_off()?;
    }
    report(&rates);
    Ok(())
}

/// Adds what one guest of ours (0) or QEMU's (1) does.
fn measure(
    unit: &Unit,
    whose: usize,
    rates: &mut Rates,
    mut run: impl FnMut(&str) -> Result<String>,
) -> Result<()> {
    run("for i in $(seq 200); do [ -b /dev/nvme0n1 ] && exit 0; sleep 0.1; done; exit 1")?;
    let groups = run("cat /sys/kernel/iommu_groups/*/type 2> /dev/null || true")?;
    ensure!(
        groups.contains("DMA") == unit.nestling.is_some(),
        "{}: the groups have the types {groups:?}",
        unit.name
    );
    let mut row = |name: String, run: &mut dyn FnMut(&str) -> Result<String>| -> Result<()> {
        sample(run)?;
        let values = (0..SAMPLES)
            .map(|_| sample(run))
            .collect::<Result<Vec<_>>>()?;
        let rate = middle(values);
        show(format!("{}, {name}: {rate:.0}", VMMS[whose]));
        match rates.iter_mut().find(|(known, _)| *known == name) {
            Some((_, both)) => both[whose] = rate,
            None => {
                let mut both = [f64::NAN; 2];
                both[whose] = rate;
                rates.push((name, both));
            }
        }
        Ok(())
    };
    row(unit.name.to_owned(), &mut run)?;
    if unit.lazy {
        run("echo DMA-FQ > /sys/block/nvme0n1/device/device/iommu_group/type")?;
        row(format!("{}, lazy", unit.name), &mut run)?;
    }
    Ok(())
}

/// Reads per second, two at a time.
fn sample(run: &mut dyn FnMut(&str) -> Result<String>) -> Result<f64> {
    // In hundredths of a second, as the kernel counts.
    let reader = format!(
        "now() {{ read t rest < /proc/uptime; echo ${{t%.*}}${{t#*.}}; }}; \
         n=0; from=$(now); while t=$(now); [ $((t - from)) -lt {SECONDS}00 ]; do \
         dd if=/dev/nvme0n1 of=/dev/null bs=4k count=256 skip=$((SKIP + n % 4096)) iflag=direct \
         2> /dev/null || exit 1; n=$((n + 256)); done; echo $n $((t - from))"
    );
    let said = run(&format!(
        "(SKIP=0; {reader}) > /tmp/one & (SKIP=8192; {reader}) > /tmp/two & wait; \
         cat /tmp/one /tmp/two"
    ))?;
    let mut rate = 0.0;
    for line in said.lines() {
        let (reads, time) = line
            .split_once(' ')
            .with_context(|| format!("{said:?} is no sample"))?;
        rate += reads.parse::<f64>()? * 100.0 / time.parse::<f64>()?;
    }
    ensure!(said.lines().count() == 2, "{said:?} is no sample");
    Ok(rate)
}

fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(rates: &Rates) {
    let names: Vec<&str> = rates.iter().map(|(name, _)| name.as_str()).collect();
    show("Reads of 4 KiB of a passed-through NVMe drive per second, two at a time, medians:");
    let column = |n: usize| rates.iter().map(|(_, rate)| rate[n]).collect();
    table(&names, &[(VMMS[0], column(0)), (VMMS[1], column(1))]);
    show("The same in percent of what each VMM's guest does without a vIOMMU:");
    let alone = |n: usize| rates.first().map_or(f64::NAN, |(_, rate)| rate[n]);
    let column = |n: usize| {
        let percent = |(_, rate): &(String, [f64; 2])| 100.0 * rate[n] / alone(n);
        rates.iter().map(percent).collect()
    };
    table(&names, &[(VMMS[0], column(0)), (VMMS[1], column(1))]);
}

/// A guest of QEMU's.
struct Qemu {
    child: Ending,
    client: Client,
}

impl Qemu {
    fn boot(lab: &Lab, program: &[String], unit: &Unit) -> Result<Self> {
        let socket = lab.file("qemu-channel");
        let _ = std::fs::remove_file(&socket);
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
