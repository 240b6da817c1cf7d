//! Where guest tests run: on this machine when it has KVM that can run Linux, else on the lab's
//! emulated host. One program, `guest-test`, runs there either way.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::machine::{Host, Hosts, IN_HOST, SHARE};

/// One guest test, as the test program lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct Test {
    /// `module::name`.
    pub name: String,
    /// The hardware that it needs.
    pub profile: String,
    /// It is killed after this many seconds.
    pub limit: u64,
    /// Only run when named: a soak, a benchmark, a look around.
    pub on_request: bool,
    /// Its guests run on any /dev/kvm.
    pub tiny: bool,
    /// An emulated host is booted for it alone.
    pub alone: bool,
}

/// The place where guest tests run.
#[derive(Debug)]
pub struct Place {
    /// The test program, to be run on this machine.
    program: PathBuf,
    /// Whether this machine runs guests itself. It has only its own hardware: what needs a
    /// profile of emulated devices runs in the lab's host all the same.
    direct: bool,
    /// How to boot the lab's hosts, where one may be needed.
    hosts: Option<Hosts>,
    /// The host that runs, and its profile.
    running: Option<(String, Host)>,
    boots: u32,
}

/// Whether this machine can run guests itself.
pub fn has_kvm() -> bool {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let hardware = flags.lines().any(|line| {
        line.starts_with("flags") && line.split_whitespace().any(|f| f == "vmx" || f == "svm")
    });
    hardware && opens_kvm()
}

/// Whether /dev/kvm is there for this user. Without vmx or svm it runs tiny guests only.
pub fn opens_kvm() -> bool {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
}

/// How many hosts a test may use for one verdict.
const HOSTS: u32 = 3;

/// The profile that every host has, this machine too.
pub const PLAIN: &str = "plain";

impl Place {
    /// Tests are run by `program` on this machine when that is `direct`, else on `hosts`.
    pub fn new(program: PathBuf, direct: bool, hosts: Option<Hosts>) -> Self {
        Self {
            program,
            direct,
            hosts,
            running: None,
            boots: 0,
        }
    }

    /// Where tests may run beside those that run here: in a host of its own. `None` where a test
    /// may need this machine for itself, or its cores would not do for two hosts.
    pub fn beside(&self) -> Option<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut hosts = self.hosts.clone()?;
        hosts.lane += 1;
        (!self.direct && cores > 1).then(|| Self::new(self.program.clone(), false, Some(hosts)))
    }

    /// Runs one test with its logs in `target/lab/logs/TEST`.
    ///
    /// # Errors
    /// The test failed; the error is what it said, and where the logs are.
    pub fn run(&mut self, test: &Test, lab: &Path) -> Result<()> {
        let logs = lab.join("logs").join(&test.name);
        crate::cache::remove(&logs)?;
        fs::create_dir_all(&logs)?;
        let outcome = if self.is_emulated(test) {
            if test.alone {
                self.end_host();
            }
            let outcome = self.emulated(test, &logs);
            if test.alone {
                self.end_host();
            }
            outcome
        } else {
            direct(&self.program, test, lab, &logs)
        };
        outcome.with_context(|| format!("logs: {}", logs.display()))
    }

    /// Whether a test runs in an emulated host, not on this machine.
    fn is_emulated(&self, test: &Test) -> bool {
        let here = (self.direct && test.profile == PLAIN) || (test.tiny && opens_kvm());
        !here
    }
}

fn direct(program: &Path, test: &Test, lab: &Path, logs: &Path) -> Result<()> {
    let mut child = Command::new(program)
        .args(["run", &test.name])
        .env("NESTLING_LAB", lab)
        .stdin(Stdio::null())
        .stdout(File::create(logs.join("test.log"))?)
        .stderr(File::create(logs.join("verdict"))?)
        .spawn()?;
    let deadline = Instant::now() + Duration::from_secs(test.limit + 10);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("killed after {} s", test.limit);
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    print!(
        "{}",
        lines_to_show(&fs::read_to_string(logs.join("test.log"))?)
    );
    if !status.success() {
        bail!("{}", fs::read_to_string(logs.join("verdict"))?.trim());
    }
    Ok(())
}

impl Place {
    /// A host of `profile`, running.
    ///
    /// # Errors
    /// It does not boot.
    fn host(&mut self, profile: &str) -> Result<&mut Host> {
        if self
            .running
            .as_ref()
            .is_some_and(|(name, _)| name != profile)
        {
            self.end_host();
        }
        if self.running.is_none() {
            self.boots += 1;
            let hosts = self.hosts.as_ref().context("no emulated host was set up")?;
            let name = format!("host-{}.{}-{profile}", hosts.lane, self.boots);
            let logs = hosts.lab.join("logs").join(name);
            let started = Instant::now();
            let host = hosts.boot(profile, &logs)?;
            println!(
                "  host {profile} booted in {:.1} s",
                started.elapsed().as_secs_f64()
            );
            self.running = Some((profile.to_owned(), host));
        }
        match &mut self.running {
            Some((_, host)) => Ok(host),
            None => bail!("no host of profile {profile}"),
        }
    }

    fn end_host(&mut self) {
        if let Some((_, host)) = self.running.take() {
            host.power_off();
        }
    }

    /// A host of its own to work on; `None` where this machine is the host.
    ///
    /// # Errors
    /// It does not boot.
    pub fn take_host(&mut self, profile: &str, logs: &Path) -> Result<Option<Host>> {
        if self.direct && profile == PLAIN {
            return Ok(None);
        }
        let hosts = self
            .hosts
            .as_ref()
            .context("no emulated host was set up: add --emulate")?;
        hosts.boot(profile, logs).map(Some)
    }

    /// A test that got no verdict since its host was lost runs again, in a new one: the emulated
    /// CPU's own faults are not the test's. A verdict stands, whatever it is.
    fn emulated(&mut self, test: &Test, logs: &Path) -> Result<()> {
        for n in 1..HOSTS {
            let Some(lost) = self.verdict(test, logs)? else {
                return Ok(());
            };
            println!(
                "  again  {}: no verdict, its host was lost: {lost:#}",
                test.name
            );
            let console = logs.join("host-console.log");
            if console.exists() {
                fs::rename(console, logs.join(format!("host-lost-{n}.log")))?;
            }
        }
        match self.verdict(test, logs)? {
            None => Ok(()),
            Some(lost) => Err(lost.context(format!("{HOSTS} hosts were lost in this test"))),
        }
    }

    /// Runs a test in a host, for its verdict; or says how the host was lost.
    ///
    /// # Errors
    /// The verdict is that the test failed.
    fn verdict(&mut self, test: &Test, logs: &Path) -> Result<Option<anyhow::Error>> {
        let host = match self.host(&test.profile) {
            Ok(host) => host,
            Err(error) => return Ok(Some(error)),
        };
        let before = host.log_length();
        let result = host.run_watched(
            &format!("{IN_HOST} {SHARE}/bin/guest-test run {}", test.name),
            Duration::from_secs(test.limit + 10),
        );
        let console = copy_from(&host.console, before, &logs.join("host-console.log"));
        let output = match result {
            Ok(output) => output,
            Err(error) => {
                host.state_to(logs);
                // A host that does not answer is of no use to the next test.
                self.running = None;
                console?;
                return Ok(Some(error));
            }
        };
        console?;
        fs::write(logs.join("test.log"), &output.stdout)?;
        fs::write(logs.join("verdict"), &output.stderr)?;
        print!("{}", lines_to_show(&output.stdout));
        match output.status {
            0 => Ok(None),
            status if status == i32::from(agent::NO_VERDICT) => {
                host.state_to(logs);
                self.running = None;
                Ok(Some(anyhow!("{}", output.stderr.trim())))
            }
            agent::TIMED_OUT => {
                // Its VMM may still run.
                self.running = None;
                bail!("killed after {} s; {}", test.limit, output.stderr.trim())
            }
            _ => bail!("{}", output.stderr.trim()),
        }
    }
}

/// A test shows a line to the person at the terminal by starting it with `| `.
fn lines_to_show(log: &str) -> String {
    log.lines()
        .filter_map(|line| line.strip_prefix("| "))
        .map(|line| format!("         {line}\n"))
        .collect()
}

fn copy_from(log: &Path, from: u64, to: &Path) -> Result<()> {
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    fs::write(to, bytes)?;
    Ok(())
}
