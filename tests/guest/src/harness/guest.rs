//! A guest under nestling: described, booted, asked, ended.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent::{Client, Output};
use anyhow::{Context, Result, anyhow, bail};

use super::api::Api;
use super::process::{self, HostBroken};
use super::{Lab, dmesg};

/// How long a guest may take until its agent answers.
const BOOT_LIMIT: Duration = Duration::from_secs(400);
/// How often a guest that does not answer yet is looked at for whether it can.
const LOOK: Duration = Duration::from_secs(60);
/// How long a guest that hung may run again for its log.
const HANG_LIMIT: Duration = Duration::from_secs(40);
/// How long a command in a guest may take: longer than what it may wait for ([`until`]).
const RUN_LIMIT: Duration = Duration::from_secs(400);
/// How long nestling may take to print its state.
const STATE_LIMIT: Duration = Duration::from_secs(120);
/// How long nestling may take to say why it ends, when its guest's channel does.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How long nestling may take to end once its guest has asked for it.
const END_LIMIT: Duration = Duration::from_secs(200);
/// How long a guest that answers pings may take for a small command, until it is asked again: it
/// may have been the last thing that it answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Tells one boot of a guest from the next.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// How long something in a guest is waited for, in tenths of a second.
const PATIENCE: u32 = 3000;

/// Shell text that waits until `condition` holds, and ends the shell with status 1 when it never
/// does. How fast the machine is makes no difference.
pub fn until(condition: &str) -> String {
    format!(
        "_n=0; until {condition}; do _n=$((_n + 1)); [ $_n -lt {PATIENCE} ] || exit 1; sleep 0.1; \
         done"
    )
}

/// A guest to be.
#[derive(Clone, Debug)]
pub struct Guest {
    kernel: String,
    /// Another kernel file than the stock one's.
    kernel_file: Option<PathBuf>,
    cpus: u32,
    memory: String,
    cmdline: String,
    /// The serial port shows the kernel's whole log, at the price of two exits a character.
    verbose: bool,
    tools: bool,
    /// It runs guests itself.
    host: bool,
    /// What the harness adds by itself is behind the default vIOMMU, too.
    all_behind: bool,
    /// nestling may lock so many bytes of memory, and has no right to go beyond.
    locked: Option<u64>,
    arguments: Vec<String>,
    /// Where nestling takes requests.
    api: Option<PathBuf>,
    /// How long it may take until its agent answers.
    boots_within: Duration,
}

impl Guest {
    /// A guest with one of Debian's kernels: `6.1`, `6.12` or `7.2`.
    pub fn debian(kernel: &str) -> Self {
        Self {
            kernel: kernel.to_owned(),
            kernel_file: None,
            cpus: 1,
            memory: "size=512M".to_owned(),
            cmdline: "console=ttyS0 panic=-1".to_owned(),
            verbose: false,
            tools: false,
            host: false,
            all_behind: false,
            locked: None,
            arguments: Vec::new(),
            api: None,
            boots_within: BOOT_LIMIT,
        }
    }

    /// With so much time until its agent answers: a guest's guest is slow on a busy machine.
    pub fn boots_within(mut self, limit: Duration) -> Self {
        self.boots_within = limit;
        self
    }

    /// A guest with the lab's own kernel, which has everything built in and boots fastest.
    pub fn lab_kernel() -> Self {
        Self::debian("lab")
    }

    /// With so many vCPUs.
    pub fn cpus(mut self, count: u32) -> Self {
        self.cpus = count;
        self
    }

    /// With this memory, as `--memory` takes it (`size=2G,hugepages=on`).
    pub fn memory(mut self, option: &str) -> Self {
        self.memory = option.to_owned();
        self
    }

    /// With more words on the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// With the kernel's whole log on its serial console, not only warnings. The log of a guest
    /// that powers off is kept either way.
    pub fn verbose(mut self) -> Self {
        self.verbose = true;
        self
    }

    /// With a disk.
    pub fn disk(self, image: &Path) -> Self {
        self.option("--disk", &format!("path={}", image.display()))
    }

    /// With `lspci` and other programs that not every guest has.
    pub fn tools(mut self) -> Self {
        self.tools = true;
        self
    }

    /// With nestling, the guest tests and a guest of its own to run.
    pub fn host(mut self) -> Self {
        self.host = true;
        self
    }

    /// With every device behind the default vIOMMU, the channel of the tests and the entropy source
    /// too: Linux gives no messages to a device that no unit covers once it remaps interrupts.
    pub fn all_behind(mut self) -> Self {
        self.all_behind = true;
        self.option("--rng", "src=/dev/urandom,iommu=on")
    }

    /// With a limit on the memory that nestling may lock, in bytes, as users without rights have.
    pub fn locked_memory(mut self, bytes: u64) -> Self {
        self.locked = Some(bytes);
        self
    }

    /// With another kernel file; the modules and the initramfs stay those of the stock one.
    pub fn kernel_file(mut self, file: &Path) -> Self {
        self.kernel_file = Some(file.to_owned());
        self
    }

    /// With an option of `nestling run`.
    pub fn option(mut self, name: &str, value: &str) -> Self {
        self.arguments.extend([name.to_owned(), value.to_owned()]);
        self
    }

    /// With nestling's API.
    pub fn api(self, lab: &Lab) -> Self {
        self.api_at(lab, "api")
    }

    /// The same on a socket of this name, where there is more than one guest.
    pub fn api_at(mut self, lab: &Lab, name: &str) -> Self {
        let socket = lab.file(name);
        self = self.option("--api-socket", &format!("path={}", socket.display()));
        // Disks that come later are there.
        let images = lab.file(".");
        self = self.option("--landlock-rules", &format!("path={}", images.display()));
        self.api = Some(socket);
        self
    }

    /// Starts nestling and waits until the guest takes commands.
    ///
    /// # Errors
    /// nestling ends or the guest does not answer within its limit; the error has the last lines
    /// of the guest's console.
    pub fn boot(&self, lab: &Lab) -> Result<Machine> {
        let mut machine = self.start(lab)?;
        let Err(error) = machine.wait_for_agent() else {
            return Ok(machine);
        };
        let hangs = !error.is::<HostBroken>() && machine.child.try_wait()?.is_none();
        if hangs && !self.verbose {
            // It hangs, and its console was quiet: the same once more, for the log of it.
            drop(machine);
            if let Ok(mut again) = self.clone().verbose().start(lab) {
                std::thread::sleep(HANG_LIMIT);
                return Err(again.with_last_words(error));
            }
        }
        Err(error)
    }

    /// Starts nestling and waits for nothing: for guests that never take commands.
    ///
    /// # Errors
    /// nestling cannot be started.
    pub fn start(&self, lab: &Lab) -> Result<Machine> {
        let number = lab.next_guest();
        let socket = lab.file(&format!("channel-{number}"));
        let console = lab.file(&format!("console-{number}"));
        let said = lab.file(&format!("nestling-{number}"));
        let behind = if self.all_behind { ",iommu=on" } else { "" };
        let mut command = Command::new(lab.nestling());
        command
            .arg("run")
            .args(self.payload(lab, number)?)
            .args([
                "--cpus",
                &format!("boot={}", self.cpus),
                "--memory",
                &self.memory,
            ])
            .arg("--serial")
            .arg(format!("file={}", console.display()))
            .arg("--console")
            .arg(format!("socket={}{behind}", socket.display()))
            .args(&self.arguments)
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(File::create(&said)?)
            .stderr(File::options().append(true).open(&said)?);
        fs::write(
            lab.logs().join(format!("guest-{number}.cmdline")),
            format!("{command:?}\n"),
        )?;
        if let Some(bytes) = self.locked {
            // SAFETY: between fork and exec only async-signal-safe calls are made.
            unsafe { command.pre_exec(move || limit_locked_memory(bytes)) };
        }
        let started = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {}", lab.nestling().display()))?;
        Ok(Machine {
            child,
            client: None,
            socket,
            api: self.api.clone(),
            boots_within: self.boots_within,
            patience: Duration::from_secs(2),
            console,
            said,
            kept: lab.logs().join(format!("guest-{number}")),
            started,
            status: None,
        })
    }

    /// `--kernel`, `--initramfs` and `--cmdline`.
    ///
    /// # Errors
    /// The initramfs with tools cannot be written.
    pub fn payload(&self, lab: &Lab, number: u32) -> Result<Vec<String>> {
        let folder = lab.shared("guests").join(&self.kernel);
        let kernel = self
            .kernel_file
            .clone()
            .unwrap_or_else(|| folder.join("vmlinuz"));
        let mut initramfs = folder.join("initramfs");
        let more = [(self.tools, "guests/tools"), (self.host, "guests/nested")];
        let more: Vec<&str> = more.into_iter().filter(|m| m.0).map(|m| m.1).collect();
        if !more.is_empty() {
            let mut bytes = fs::read(&initramfs)?;
            for archive in more {
                bytes.extend(fs::read(lab.shared(archive))?);
            }
            initramfs = lab.file(&format!("initramfs-{number}"));
            fs::write(&initramfs, bytes)?;
        }
        Ok(vec![
            "--kernel".into(),
            kernel.display().to_string(),
            "--initramfs".into(),
            initramfs.display().to_string(),
            "--cmdline".into(),
            format!(
                "{}{}",
                self.cmdline,
                if self.verbose { "" } else { " loglevel=5" }
            ),
        ])
    }
}

/// A guest that runs. It ends with the value, and its logs are kept.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    client: Option<Client>,
    socket: PathBuf,
    api: Option<PathBuf>,
    boots_within: Duration,
    /// How long it is waited for when it is next asked whether it is there.
    patience: Duration,
    console: PathBuf,
    said: PathBuf,
    /// Where its logs are kept: this and an ending.
    kept: PathBuf,
    started: Instant,
    status: Option<i32>,
}

/// How nestling ended, and what it left.
#[derive(Debug)]
pub struct Ended {
    /// nestling's exit status.
    pub status: i32,
    /// The guest's serial console.
    pub console: String,
    /// What nestling itself wrote.
    pub said: String,
}

impl Machine {
    fn wait_for_agent(&mut self) -> Result<()> {
        let child = &mut self.child;
        let mut looked = Instant::now();
        let alive = || {
            if looked.elapsed() >= LOOK {
                let broken = process::Doings::of(child.id()).broken;
                looked = Instant::now();
                if broken {
                    return false;
                }
            }
            matches!(child.try_wait(), Ok(None))
        };
        match Client::connect(&self.socket, self.boots_within, alive) {
            Ok(client) => {
                self.client = Some(client);
                Ok(())
            }
            Err(error) => Err(self.with_last_words(anyhow!(error))),
        }
    }

    /// nestling's API, for which the guest was described [with it](Guest::api).
    pub fn api(&self) -> Api {
        Api::new(self.api.as_deref().unwrap_or(Path::new("/nonexistent")))
    }

    /// Whether the guest takes commands, after no more than two seconds, and each time a little
    /// more: however slow it is, it is given enough in the end.
    pub fn answers(&mut self) -> bool {
        if self.client.is_none() {
            let client = Client::connect(&self.socket, self.patience, || true);
            self.client = client.ok();
            self.patience += Duration::from_millis(500);
        }
        self.client.is_some()
    }

    /// Whether the agent that was reached answers within a second.
    pub fn pings(&mut self) -> bool {
        let limit = Duration::from_secs(1);
        self.client
            .as_mut()
            .is_some_and(|client| client.ping(limit).is_ok())
    }

    /// nestling's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The socket of the guest's console, which carries the commands.
    pub fn channel(&self) -> &Path {
        &self.socket
    }

    /// Sends nestling a signal.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let pid = i32::try_from(self.pid())?;
        // SAFETY: kill takes numbers only; the process is our child and not yet waited for.
        if unsafe { libc::kill(pid, signal) } != 0 {
            return Err(std::io::Error::last_os_error()).context("kill");
        }
        Ok(())
    }

    /// The live state of the guest's vIOMMUs, as nestling prints it on SIGUSR1.
    ///
    /// # Errors
    /// It does not print one within its limit.
    pub fn viommus(&self) -> Result<serde_json::Value> {
        let states = || {
            let said = lossy(&self.said);
            // The last line may be half written yet.
            said.split_inclusive('\n')
                .filter(|l| l.starts_with("{\"viommus\"") && l.ends_with('\n'))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let before = states().len();
        self.signal(libc::SIGUSR1)?;
        let deadline = Instant::now() + STATE_LIMIT;
        while Instant::now() < deadline {
            if let Some(state) = states().get(before) {
                let mut state: serde_json::Value = serde_json::from_str(state)?;
                fs::write(
                    self.kept.with_extension("viommus.json"),
                    format!("{state:#}\n"),
                )?;
                return Ok(state["viommus"].take());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("nestling prints no state of its vIOMMUs on SIGUSR1")
    }

    /// Sends a command that makes the guest start over, and waits for its agent.
    ///
    /// # Errors
    /// nestling ends, or the guest does not come back within its limit.
    pub fn restart_by(&mut self, command: &str) -> Result<()> {
        let boot = self.run(BOOT_ID)?;
        let client = self.client.as_mut().context("the guest has no agent")?;
        client.start(command, END_LIMIT)?;
        let deadline = Instant::now() + END_LIMIT + self.boots_within;
        // The next agent says that it is there; where that is not heard, it is asked.
        let _ = client.begins(END_LIMIT);
        loop {
            // A slow agent of the old boot may answer late, and then it is still that one's.
            if let Some(asked) = self.client.as_mut()
                && let Ok(now) = asked.run(BOOT_ID, ANSWER_LIMIT)
                && now.status == 0
                && now.stdout != boot
            {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("`{command}` did not take the guest down");
            }
            std::thread::sleep(Duration::from_millis(100));
            self.client = None;
            self.wait_for_agent()?;
        }
    }

    /// Waits for the agent of a guest that was made to start over from outside.
    ///
    /// # Errors
    /// nestling ends, or the guest does not come back within its limit.
    pub fn starts_over(&mut self) -> Result<()> {
        self.client = None;
        self.wait_for_agent()
    }

    /// The time since nestling was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Runs a command that must succeed, and gives what it wrote.
    ///
    /// # Errors
    /// The command failed, or the guest does not answer.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_within(RUN_LIMIT, command)
    }

    /// The same with another limit.
    ///
    /// # Errors
    /// The command failed or took too long, or the guest does not answer.
    pub fn run_within(&mut self, limit: Duration, command: &str) -> Result<String> {
        let output = self.try_run(limit, command)?;
        if output.status != 0 {
            bail!(
                "`{command}` in the guest: status {}\n{}{}",
                output.status,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// Runs a command that may fail.
    ///
    /// # Errors
    /// The guest does not answer.
    pub fn try_run(&mut self, limit: Duration, command: &str) -> Result<Output> {
        let client = self.client.as_mut().context("the guest has no agent")?;
        match client.run(command, limit) {
            Ok(output) => Ok(output),
            Err(error) => {
                // If it is ending, it has something to say yet.
                let deadline = Instant::now() + LAST_WORDS;
                while self.child.try_wait()?.is_none() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(self.with_last_words(anyhow!(error)))
            }
        }
    }

    /// Runs a test of this program in the guest, which is a [`host`](Guest::host). The logs of
    /// the guest's guests are kept beside its own.
    ///
    /// # Errors
    /// The test failed, or the guest does not answer.
    pub fn run_inside(&mut self, limit: Duration, test: &str) -> Result<()> {
        let output = self.try_run(
            limit,
            &format!("NESTLING_LAB=/lab exec /lab/bin/guest-test run {test}"),
        )?;
        print!("{}", output.stdout);
        let logs = self.run("cd /lab/logs && tail -n 400 $(find . -type f)")?;
        fs::write(self.kept.with_extension("inside.log"), logs)?;
        if output.status != 0 {
            bail!(
                "inside the guest: status {}: {}",
                output.status,
                output.stderr.trim()
            );
        }
        Ok(())
    }

    /// Sends a command that ends the guest, and waits for nestling's end.
    ///
    /// # Errors
    /// nestling does not end.
    pub fn end_by(mut self, command: &str) -> Result<Ended> {
        let client = self.client.as_mut().context("the guest has no agent")?;
        client.start(command, END_LIMIT)?;
        self.wait(END_LIMIT)
    }

    /// Checks the guest's log, powers it off, and checks that nestling ends well.
    ///
    /// # Errors
    /// The guest's kernel complained, or nestling's status is not 0.
    pub fn power_off(mut self) -> Result<Ended> {
        let log = self.run("dmesg -r")?;
        fs::write(self.kept.with_extension("dmesg.log"), &log)?;
        let ended = self.end_by("poweroff -f")?;
        if ended.status != 0 {
            bail!(
                "nestling ended with status {} after a power-off\n{}",
                ended.status,
                ended.said
            );
        }
        dmesg::check("the guest's kernel", &log)?;
        Ok(ended)
    }

    /// Waits for nestling's end.
    ///
    /// # Errors
    /// It does not end within `limit`; it is killed then.
    pub fn wait(mut self, limit: Duration) -> Result<Ended> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let status = status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
                self.status = Some(status);
                return Ok(Ended {
                    status,
                    console: lossy(&self.console),
                    said: lossy(&self.said),
                });
            }
            if Instant::now() >= deadline {
                let error = anyhow!("nestling did not end within {} s", limit.as_secs());
                return Err(self.with_last_words(error));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// `error` with what the guest and nestling had to say.
    fn with_last_words(&mut self, error: anyhow::Error) -> anyhow::Error {
        let said = lossy(&self.said);
        let ended = match self.child.try_wait() {
            Ok(Some(status)) => format!("nestling ended: {status}\n"),
            _ => String::new(),
        };
        let console = lossy(&self.console);
        let lines: Vec<&str> = console.lines().collect();
        let from = lines.len().saturating_sub(15);
        let process::Doings {
            exits,
            later,
            why,
            broken,
        } = process::Doings::of(self.pid());
        let words = format!(
            "{ended}nestling said: {said}\nits threads: {}\nits exits: {exits} and a second later: \
             {later}\nwhy vCPUs leave: {why:#?}\nthe console ended with:\n{}",
            process::threads(self.pid()).join(", "),
            lines[from..].join("\n")
        );
        if broken {
            return error.context(words).context(HostBroken);
        }
        error.context(words)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = fs::copy(&self.console, self.kept.with_extension("console.log"));
        let _ = fs::copy(&self.said, self.kept.with_extension("nestling.log"));
    }
}

/// Sets the limit, and drops the right to ignore it from what the next program may have.
fn limit_locked_memory(bytes: u64) -> std::io::Result<()> {
    const CAP_IPC_LOCK: libc::c_ulong = 14;
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the structure outlives the call, which only reads it.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
    // SAFETY: this option of prctl takes numbers only.
    let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0) };
    match (set, dropped) {
        (0, 0) => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
