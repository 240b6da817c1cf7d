//! Measurements, beside QEMU in the same run. They print ratios; none asserts a time.

mod nvme;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent::Client;
use anyhow::{Context, Result, bail, ensure};

use crate::harness::{Lab, Test, payload, process, show};
use crate::plugging;

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("boot_of_the_vmm_alone", vmm_alone)
        .limit(120)
        .tiny()
        .on_request(),
    Test::new("boot", boot).limit(900).on_request(),
    Test::new("hotplug_of_the_vmm_alone", plugging::our_part)
        .limit(120)
        .tiny()
        .on_request(),
    Test::new("hotplug", plugging::both_parts)
        .limit(400)
        .on_request(),
    Test::new("map", crate::mapping::bench)
        .limit(900)
        .on_request(),
    Test::new("stage2", stage2).limit(1500).on_request(),
    nvme::TESTS[0],
    nvme::TESTS[1],
    nvme::TESTS[2],
    nvme::TESTS[3],
    nvme::TESTS[4],
    nvme::TESTS[5],
];

/// Runs of each measurement; the median is shown.
const RUNS: usize = 5;

/// A VMM to be measured, with everything it reads in memory.
struct Vmm {
    name: &'static str,
    program: Vec<String>,
    /// What the payload's exit is turned into.
    exit: i32,
}

/// The files of the guest.
struct Files {
    payload: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

fn vmm_alone(lab: &Lab) -> Result<()> {
    let files = Files::new(lab)?;
    let mut rows = Vec::new();
    for vmm in vmms(lab)? {
        match median(|| first_instruction(lab, &vmm, &files)) {
            Ok(time) => rows.push((vmm.name, vec![time])),
            // This machine's KVM may be good for tiny guests only, and not for QEMU.
            Err(error) if vmm.name != "nestling" => show(format!("not measured: {error:#}")),
            Err(error) => return Err(error),
        }
    }
    show("A guest of one instruction, the median of five:");
    table(&["from exec to the VMM's end, ms"], &rows);
    Ok(())
}

fn boot(lab: &Lab) -> Result<()> {
    let files = Files::new(lab)?;
    let mut rows = Vec::new();
    for vmm in vmms(lab)? {
        let mut memory = Vec::new();
        let time = median(|| {
            let (time, kib) = user_space(lab, &vmm, &files)?;
            memory.push(kib as f64 / 1024.0);
            Ok(time)
        })?;
        memory.sort_by(f64::total_cmp);
        let first = median(|| first_instruction(lab, &vmm, &files))?;
        rows.push((vmm.name, vec![first, time, memory[memory.len() / 2]]));
    }
    show("Debian 7.2, 2 vCPUs, 512 MiB, the median of five:");
    table(
        &[
            "from exec to the end of a guest of one instruction, ms",
            "from exec to user space, ms",
            "resident memory without the guest's, MiB",
        ],
        &rows,
    );
    Ok(())
}

/// The benchmark of the package that maps guest memory, on this kernel's iommufd.
fn stage2(lab: &Lab) -> Result<()> {
    // As many huge pages as it takes at a time.
    let pages = Path::new("/proc/sys/vm/nr_hugepages");
    let before = fs::read_to_string(pages)?;
    fs::write(pages, "160")?;
    let shown = show_lines_of(&lab.shared("bin/stage2_setup"));
    fs::write(pages, before.trim())?;
    shown
}

/// Shows what a program says as it says it.
fn show_lines_of(program: &Path) -> Result<()> {
    let what = || program.display().to_string();
    let child = Command::new(program).stdout(Stdio::piped()).spawn();
    let mut child = Ending(child.with_context(what)?);
    let said = child.0.stdout.take().with_context(what)?;
    for line in BufReader::new(said).lines() {
        show(line?);
    }
    let status = child.0.wait()?;
    ensure!(status.success(), "{} ended with {status}", what());
    Ok(())
}

/// A line for each quantity, with the ratio of ours to theirs.
fn table(quantities: &[&str], rows: &[(&str, Vec<f64>)]) {
    for (n, what) in quantities.iter().enumerate() {
        let mut line = format!("{what:54}");
        for (name, values) in rows {
            line += &format!("  {name} {:8.1}", values[n]);
        }
        if let [(_, ours), (_, theirs)] = rows {
            line += &format!("  ratio {:.2}", ours[n] / theirs[n]);
        }
        show(line);
    }
}

impl Files {
    fn new(lab: &Lab) -> Result<Self> {
        let files = Self {
            payload: lab.file("payload"),
            kernel: lab.file("vmlinuz"),
            initramfs: lab.file("initramfs"),
        };
        fs::write(&files.payload, payload::exits_with(42))?;
        fs::copy(lab.shared("guests/7.2/vmlinuz"), &files.kernel)?;
        fs::copy(lab.shared("guests/7.2/initramfs"), &files.initramfs)?;
        Ok(files)
    }
}

/// nestling, and QEMU where the lab has put it.
fn vmms(lab: &Lab) -> Result<Vec<Vmm>> {
    // In memory, as everything that is read while a clock runs.
    let nestling = lab.file("nestling");
    fs::copy(lab.nestling(), &nestling)?;
    let mut vmms = vec![Vmm {
        name: "nestling",
        program: vec![nestling.display().to_string()],
        exit: 42,
    }];
    if lab.shared("qemu").exists() {
        vmms.push(Vmm {
            name: "QEMU",
            program: copy_qemu(lab)?,
            exit: 85,
        });
    } else {
        show("no QEMU to measure beside");
    }
    Ok(vmms)
}

/// QEMU with its libraries and firmware, copied into memory; the command that starts it.
fn copy_qemu(lab: &Lab) -> Result<Vec<String>> {
    let to = lab.file("qemu");
    let status = Command::new("cp")
        .arg("-r")
        .arg(lab.shared("qemu"))
        .arg(&to)
        .status()
        .context("cp")?;
    ensure!(status.success(), "cannot copy QEMU");
    let path = |name: &str| to.join(name).display().to_string();
    Ok(vec![
        path("lib/ld-linux-x86-64.so.2"),
        "--library-path".into(),
        path("lib"),
        path("qemu-system-x86_64"),
        "-L".into(),
        path("share"),
    ])
}

impl Vmm {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).stdin(Stdio::null());
        command
    }

    fn arguments(&self, command: &mut Command, kernel: &Path, rest: Option<(&Path, &Path)>) {
        let kernel = kernel.display().to_string();
        if self.name == "nestling" {
            command.args(["run", "--cpus", "boot=2", "--memory", "size=512M"]);
            command.args([
                "--serial",
                "null",
                "--platform",
                "on_reboot=exit,debug_exit=on",
            ]);
            command.args(["--kernel", &kernel]);
            if let Some((initramfs, socket)) = rest {
                command
                    .arg("--initramfs")
                    .arg(initramfs)
                    .args(["--cmdline", "panic=-1"]);
                command
                    .arg("--console")
                    .arg(format!("socket={}", socket.display()));
            }
            return;
        }
        command.args([
            "-enable-kvm",
            "-cpu",
            "host",
            "-smp",
            "2",
            "-no-reboot",
            "-nodefaults",
        ]);
        command.args(["-no-user-config", "-display", "none", "-m", "512M"]);
        command.args(["-M", "q35,memory-backend=ram,kernel-irqchip=split"]);
        command.args(["-object", "memory-backend-memfd,id=ram,size=512M"]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
        command.args(["-kernel", &kernel]);
        if let Some((initramfs, socket)) = rest {
            command
                .arg("-initrd")
                .arg(initramfs)
                .args(["-append", "panic=-1"]);
            command.args([
                "-device",
                "virtio-serial-pci",
                "-device",
                "virtconsole,chardev=c",
            ]);
            command.args(["-device", "virtio-rng-pci"]);
            command.arg("-chardev");
            command.arg(format!(
                "socket,id=c,path={},server=on,wait=off",
                socket.display()
            ));
        }
    }
}

/// Milliseconds from exec until a guest whose first instruction ends it has ended.
fn first_instruction(lab: &Lab, vmm: &Vmm, files: &Files) -> Result<f64> {
    let mut command = vmm.command();
    vmm.arguments(&mut command, &files.payload, None);
    let log = lab.logs().join(format!("{}-payload.log", vmm.name));
    command
        .stdout(fs::File::create(&log)?)
        .stderr(fs::File::options().append(true).open(&log)?);
    let started = Instant::now();
    let mut child = Ending(command.spawn().with_context(|| vmm.name)?);
    let status = child.wait(Duration::from_secs(20))?;
    let time = started.elapsed();
    ensure!(
        status == vmm.exit,
        "{}: status {status}, see {}",
        vmm.name,
        log.display()
    );
    Ok(time.as_secs_f64() * 1000.0)
}

/// Milliseconds from exec until the guest's agent answers, and what the VMM holds then, in KiB.
fn user_space(lab: &Lab, vmm: &Vmm, files: &Files) -> Result<(f64, u64)> {
    let socket = lab.file("bench-channel");
    let _ = fs::remove_file(&socket);
    let mut command = vmm.command();
    vmm.arguments(
        &mut command,
        &files.kernel,
        Some((&files.initramfs, &socket)),
    );
    let log = lab.logs().join(format!("{}-boot.log", vmm.name));
    command
        .stdout(fs::File::create(&log)?)
        .stderr(fs::File::options().append(true).open(&log)?);
    let started = Instant::now();
    let mut child = Ending(command.spawn().with_context(|| vmm.name)?);
    let mut client = Client::connect(&socket, Duration::from_secs(60), || {
        matches!(child.0.try_wait(), Ok(None))
    })
    .with_context(|| format!("{}: see {}", vmm.name, log.display()))?;
    let time = started.elapsed();
    let kib = process::holding(child.0.id())?.own_kib;
    client.start("poweroff -f", Duration::from_secs(10))?;
    let status = child.wait(Duration::from_secs(30))?;
    ensure!(
        status == 0,
        "{}: status {status} after a power-off",
        vmm.name
    );
    Ok((time.as_secs_f64() * 1000.0, kib))
}

/// A child that does not outlive its value.
struct Ending(Child);

impl Ending {
    fn wait(&mut self, limit: Duration) -> Result<i32> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.code().unwrap_or(-1));
            }
            if Instant::now() >= deadline {
                bail!("no end within {} s", limit.as_secs());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The median of some runs, after one that warms up.
fn median(mut run: impl FnMut() -> Result<f64>) -> Result<f64> {
    run()?;
    let mut values = (0..RUNS).map(|_| run()).collect::<Result<Vec<_>>>()?;
    values.sort_by(f64::total_cmp);
    Ok(values[RUNS / 2])
}
