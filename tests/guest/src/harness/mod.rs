//! What the guest tests are written with.

pub mod api;
pub mod bound;
pub mod dmesg;
pub mod figures;
mod guest;
pub mod huge;
pub mod iommufd;
pub mod kernel;
pub mod load;
pub mod payload;
pub mod process;
pub mod shell;
pub mod tap;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Serialize;

pub use guest::{Ended, Guest, Machine, until};

/// A guest test: a function that fails with the reason.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// The promise that it checks.
    pub name: &'static str,
    /// The hardware that it needs: a file of `tests/lab/profiles`.
    pub profile: &'static str,
    /// It is killed after this many seconds (of the emulated host, which is slow).
    pub limit: u64,
    /// Only run when named.
    pub on_request: bool,
    /// Its guests are a few instructions, which any /dev/kvm runs, one without vmx or svm too.
    pub tiny: bool,
    /// It is run by another test, in a guest that is a host itself.
    pub inside: bool,
    /// It makes devices fault on purpose, which the host's kernel must report.
    pub faults: bool,
    /// An emulated host is booted for it alone.
    pub alone: bool,
    /// The test.
    pub run: fn(&Lab) -> Result<()>,
}

impl Test {
    /// A test on a plain host with the usual limit.
    pub const fn new(name: &'static str, run: fn(&Lab) -> Result<()>) -> Self {
        Self {
            name,
            profile: "plain",
            limit: 900,
            on_request: false,
            tiny: false,
            inside: false,
            faults: false,
            alone: false,
            run,
        }
    }

    /// With other hardware.
    pub const fn profile(mut self, profile: &'static str) -> Self {
        self.profile = profile;
        self
    }

    /// With another limit, in seconds.
    pub const fn limit(mut self, seconds: u64) -> Self {
        self.limit = seconds;
        self
    }

    /// With guests of a few instructions: run wherever /dev/kvm can be opened.
    pub const fn tiny(mut self) -> Self {
        self.tiny = true;
        self
    }

    /// Run by another test, in a guest that is a host itself ([`Machine::run_inside`]).
    pub const fn inside(mut self) -> Self {
        self.inside = true;
        self
    }

    /// With DMA that must fault, and be reported by the host's kernel.
    pub const fn faults(mut self) -> Self {
        self.faults = true;
        self
    }

    /// In an emulated host that was booted for it, and ends after it: a measurement that nothing
    /// before it may disturb.
    pub const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Run only when named.
    pub const fn on_request(mut self) -> Self {
        self.on_request = true;
        self
    }
}

/// What the lab is told of a test.
#[derive(Serialize)]
pub struct Listed {
    name: String,
    profile: &'static str,
    limit: u64,
    on_request: bool,
    tiny: bool,
    alone: bool,
}

/// The list for the lab.
pub fn list(all: &[(&str, &[Test])]) -> Vec<Listed> {
    let mut listed = Vec::new();
    for (module, tests) in all {
        let of_the_lab = tests.iter().filter(|test| !test.inside);
        listed.extend(of_the_lab.map(|test| Listed {
            name: format!("{module}::{}", test.name),
            profile: test.profile,
            limit: test.limit,
            on_request: test.on_request,
            tiny: test.tiny,
            alone: test.alone,
        }));
    }
    listed
}

/// Where a test finds what it needs and leaves what it made.
#[derive(Debug)]
pub struct Lab {
    /// `target/lab`: programs, kernels and images.
    share: PathBuf,
    /// Where logs are kept.
    logs: PathBuf,
    /// A folder in memory that ends with the test.
    work: PathBuf,
    /// Names guests and their logs: 1, 2, …
    guests: std::cell::Cell<u32>,
}

impl Lab {
    fn open(name: &str) -> Result<Self> {
        let share = std::env::var_os("NESTLING_LAB").map(PathBuf::from);
        let share = share.context("NESTLING_LAB is not set; the lab starts this program")?;
        let logs = share.join("logs").join(name);
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let work = std::env::temp_dir().join(format!("nestling-test-{}", std::process::id()));
        fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
        Ok(Self {
            share,
            logs,
            work,
            guests: std::cell::Cell::new(0),
        })
    }

    /// The nestling under test.
    pub fn nestling(&self) -> PathBuf {
        self.share.join("bin/nestling")
    }

    /// A file of the shared folder.
    pub fn shared(&self, name: &str) -> PathBuf {
        self.share.join(name)
    }

    /// A place for a file of the test.
    pub fn file(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// Where the logs of this test are kept.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// A sparse file of so many MiB.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn image(&self, name: &str, mib: u64) -> Result<PathBuf> {
        let path = self.file(name);
        fs::File::create(&path)?.set_len(mib << 20)?;
        Ok(path)
    }

    fn next_guest(&self) -> u32 {
        self.guests.set(self.guests.get() + 1);
        self.guests.get()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.work);
    }
}

/// Says something to the person who runs the lab.
pub fn show(text: impl std::fmt::Display) {
    for line in text.to_string().lines() {
        println!("| {line}");
    }
}

/// Runs one test, and then looks at what the host's kernel had to say meanwhile.
///
/// # Errors
/// The test's own; unexpected words of the host's kernel; processes left behind.
pub fn run(name: &str, test: &Test) -> Result<()> {
    let lab = Lab::open(name)?;
    let host = dmesg::Host::from_now();
    let result = (test.run)(&lab);
    let left = process::named("nestling");
    let words = host.since(&lab.logs.join("host-dmesg.log"));
    result?;
    if !left.is_empty() {
        bail!("nestling still runs as process {left:?} after the test");
    }
    let mut words = words?;
    if test.faults {
        let (faults, others): (Vec<&str>, Vec<&str>) =
            words.lines().partition(|line| line.contains("DMAR: "));
        if !faults.iter().any(|line| line.contains("DMAR: [DMA")) {
            bail!("the host's kernel reports no fault");
        }
        words = others.join("\n");
    }
    dmesg::check("the host's kernel", &words)
}
