//! The lab's host: a machine with KVM, played by QEMU where the machine at hand has none.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use agent::{Client, Output};
use anyhow::{Context, Result, bail};

use crate::lost::{self, Monitor};
use crate::profile::Profile;
use crate::setup::Qemu;

/// How long a host may take from its start until its agent answers.
const BOOT_LIMIT: Duration = Duration::from_secs(250);
/// How long a small command of the lab's own may take.
const SMALL: Duration = Duration::from_secs(200);
/// How often a host is booted until its timers work.
const BOOT_TRIES: u32 = 5;
/// Where `target/lab` is seen inside a host.
pub const SHARE: &str = "/lab";
/// What the test program is told of its place there.
pub const IN_HOST: &str = "NESTLING_LAB=/lab";

/// What every host is started with.
#[derive(Clone, Debug)]
pub struct Hosts {
    /// The emulator.
    pub qemu: Qemu,
    /// The kernel.
    pub kernel: PathBuf,
    /// The project's folder.
    pub root: PathBuf,
    /// `target/lab`, shared with the host.
    pub lab: PathBuf,
    /// Hosts of different lanes may run at the same time.
    pub lane: u32,
}

/// A running host. It ends with the value.
#[derive(Debug)]
pub struct Host {
    child: Child,
    client: Client,
    monitor: Option<Monitor>,
    logs: PathBuf,
    /// The kernel's log, as its serial port wrote it.
    pub console: PathBuf,
}

impl Hosts {
    /// Boots a host of `profile` and waits until it takes commands. Its logs go into `logs`.
    ///
    /// # Errors
    /// The emulator does not start or the host does not answer within its limit; the error names
    /// the logs.
    pub fn boot(&self, profile: &str, logs: &Path) -> Result<Host> {
        // A busy machine disturbs the kernel's look at its emulated timers; without them all of
        // the host's timers, and so its guests', are as coarse as its clock tick.
        for _ in 1..BOOT_TRIES {
            let mut host = self.boot_once(profile, logs)?;
            let lost = host.run("dmesg | grep 'APIC timer disabled'", SMALL)?;
            if lost.status != 0 {
                return Ok(host);
            }
            crate::report::note("the host lost its fine timers to a busy machine; once more");
            host.power_off();
        }
        self.boot_once(profile, logs)
    }

    fn boot_once(&self, profile: &str, logs: &Path) -> Result<Host> {
        let what = Profile::read(&self.root, profile)?;
        fs::create_dir_all(logs)?;
        let images = self.lab.join(format!("images/{profile}-{}", self.lane));
        fs::create_dir_all(&images)?;
        for (name, mib) in &what.images {
            File::create(images.join(name))?.set_len(mib << 20)?;
        }
        // A socket's path has 107 bytes at most; the build tree's may be longer.
        let place = |of: &str| {
            let name = format!("nestling-lab-{}-{}.{of}", std::process::id(), self.lane);
            std::env::temp_dir().join(name)
        };
        let (socket, asked) = (place("agent"), place("monitor"));
        let _ = fs::remove_file(&socket);
        let _ = fs::remove_file(&asked);
        let console = logs.join("host-console.log");
        let messages = logs.join("qemu.log");
        let _ = fs::remove_file(logs.join(lost::STATE));
        let mut command = self.qemu.command();
        command
            .args(["-accel", "tcg,thread=multi,tb-size=512"])
            .args(["-machine", "q35,kernel-irqchip=split", "-cpu", &what.cpu])
            .args([
                "-smp",
                &what.cpus.to_string(),
                "-m",
                &format!("{}M", what.memory_mib),
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(self.lab.join("guests/host-initramfs"))
            .arg("-append")
            // A kernel that oopses ends, and QEMU with it: the host is lost, and its log says why.
            .arg(format!(
                "console=ttyS0 panic=-1 oops=panic loglevel=7 printk.time=1 no_timer_check \
                 transparent_hugepage=never tsc=reliable tsc_early_khz={} {}",
                tsc_khz(),
                what.cmdline
            ))
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=agent,path={},server=on,wait=off",
                socket.display()
            ))
            .args([
                "-device",
                &format!("virtserialport,chardev=agent,name={}", agent::PORT_NAME),
            ])
            .arg("-chardev")
            .arg(format!(
                "socket,id=monitor,path={},server=on,wait=off",
                asked.display()
            ))
            .args(["-mon", "chardev=monitor,mode=readline"])
            .arg("-virtfs")
            .arg(format!(
                "local,path={},mount_tag=lab,security_model=none,multidevs=remap",
                self.lab.display()
            ))
            .args(
                what.qemu
                    .iter()
                    .map(|a| a.replace("{images}", &images.to_string_lossy())),
            )
            .stdin(Stdio::null())
            .stdout(File::create(&messages)?)
            .stderr(File::options().append(true).open(&messages)?);
        // SAFETY: between fork and exec only prctl is called, which is async-signal-safe.
        unsafe { command.pre_exec(die_with_parent) };
        fs::write(logs.join("qemu.cmdline"), format!("{command:?}\n"))?;
        let mut child = command.spawn().context("cannot start QEMU")?;
        let client = Client::connect(&socket, BOOT_LIMIT, || matches!(child.try_wait(), Ok(None)));
        let mut monitor = Monitor::connect(&asked);
        let _ = fs::remove_file(&socket);
        let _ = fs::remove_file(&asked);
        let client = match client {
            Ok(client) => client,
            Err(error) => {
                lost::keep(child.id(), monitor.as_mut(), logs);
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(&messages).unwrap_or_default();
                return Err(error).with_context(|| {
                    format!(
                        "the host of profile {profile} did not boot; its logs are in {}\n{said}",
                        logs.display()
                    )
                });
            }
        };
        let mut host = Host {
            child,
            client,
            monitor,
            logs: logs.to_owned(),
            console,
        };
        host.expect(
            &format!(
                "mkdir -p {SHARE} && mount -t 9p -o \
                 trans=virtio,version=9p2000.L,msize=512000,cache=mmap lab {SHARE} && \
                 ip link set lo up && ulimit -n 65536 && \
                 echo 0 > /proc/sys/kernel/printk_ratelimit"
            ),
            SMALL,
        )?;
        Ok(host)
    }
}

/// How fast this machine's time stamp counter runs, which the emulated one copies.
///
/// The host's kernel would calibrate it against emulated timers, which other work on this machine
/// disturbs. Its KVM takes this number for the guests' TSC, too: if it is off by more than 250 ppm,
/// KVM gives guests a TSC that it moves by hand, and their timers may never fire.
fn tsc_khz() -> u64 {
    let (from, at) = both_clocks();
    std::thread::sleep(Duration::from_millis(100));
    let (to, end) = both_clocks();
    let nanos = u64::try_from((to - from).as_nanos()).unwrap_or(u64::MAX);
    end.wrapping_sub(at) * 1_000_000 / nanos.max(1)
}

/// The time and the TSC at that time: the closest of many looks, as between the two this thread may
/// have to wait for a processor.
fn both_clocks() -> (Instant, u64) {
    let look = |_| {
        let from = Instant::now();
        // SAFETY: every x86-64 CPU has RDTSC, and Linux lets user space use it.
        let at = unsafe { std::arch::x86_64::_rdtsc() };
        (from.elapsed(), from, at)
    };
    let (_, from, at) = (1..100).map(look).fold(
        look(0),
        |best, next| {
            if next.0 < best.0 { next } else { best }
        },
    );
    (from, at)
}

/// However the lab ends, its hosts end with it.
fn die_with_parent() -> std::io::Result<()> {
    // SAFETY: this option of prctl takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    Ok(())
}

impl Host {
    /// Runs a command.
    ///
    /// # Errors
    /// The host does not answer. That the command failed is no error.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Output> {
        let result = self.client.run(command, limit);
        self.told(result)
    }

    /// The same, for a command that is long. What is known of a host that falls silent meanwhile is
    /// kept in its logs; QEMU is asked to wake it, and it is given up when that does not help.
    ///
    /// # Errors
    /// The host does not answer. That the command failed is no error.
    pub fn run_watched(&mut self, command: &str, limit: Duration) -> Result<Output> {
        let Self {
            child,
            client,
            monitor,
            logs,
            ..
        } = self;
        let mut waking = lost::Waking::default();
        let result = client.run_watched(command, limit, lost::SILENCE, |silent| {
            waking.after(silent, child.id(), monitor.as_mut(), logs);
        });
        if result.is_err() {
            lost::keep(child.id(), monitor.as_mut(), logs);
        }
        self.told(result)
    }

    fn told(&mut self, result: Result<Output, agent::Error>) -> Result<Output> {
        result.with_context(|| match self.child.try_wait() {
            Ok(Some(status)) => format!("the host has ended ({status}): {}", self.last_words()),
            _ => format!("the host hangs: {}", self.last_words()),
        })
    }

    /// Runs a command that must succeed, and gives its output.
    ///
    /// # Errors
    /// The host does not answer or the command failed.
    pub fn expect(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output = self.run(command, limit)?;
        if output.status != 0 {
            bail!(
                "`{command}` on the host: status {}: {}",
                output.status,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// Copies what was kept of it when it was lost.
    pub fn state_to(&self, logs: &Path) {
        let _ = fs::copy(self.logs.join(lost::STATE), logs.join(lost::STATE));
    }

    /// How much the host's kernel has logged.
    pub fn log_length(&self) -> u64 {
        fs::metadata(&self.console).map_or(0, |m| m.len())
    }

    fn last_words(&self) -> String {
        let log = fs::read(&self.console).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(12);
        format!(
            "the end of {}:\n{}",
            self.console.display(),
            lines[from..].join("\n")
        )
    }

    /// Ends the host: asked first, then killed.
    pub fn power_off(mut self) {
        let _ = self
            .client
            .start("sync; poweroff -f", Duration::from_secs(5));
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
