//! The lab: everything that proves nestling, on any machine. See tests/README.md.

use std::iter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use lab::cache::Cache;
use lab::fuzz::Fuzzers;
use lab::machine::Hosts;
use lab::place::{PLAIN, Place, Test, has_kvm};
use lab::report::{Tally, step};
use lab::setup::Supplies;
use lab::{cache, debian, figures, images, programs, report, schemathesis, setup, shell, suite};

/// Everything that proves nestling, on any machine.
///
/// Guests run on this machine when its CPU has vmx or svm and /dev/kvm can be opened, else inside
/// a host that QEMU emulates. What is downloaded or built is kept in a cache
/// ($NESTLING_CACHE, else ~/.cache/nestling); logs are in target/lab/logs/TEST.
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Run guests inside the emulated host even where this machine has KVM.
    #[arg(long, global = true)]
    emulate: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run every test; with FILTERS, the guest tests whose name contains one of them.
    Test {
        /// Parts of guest tests' names, see `cargo lab list`. A test on request needs its whole
        /// name.
        filters: Vec<String>,
        /// Only what needs no guest: formatting, lints, documentation, unit tests, fuzzing.
        #[arg(long, conflicts_with = "filters")]
        no_guests: bool,
    },
    /// List the guest tests, with the profile of hardware each one needs.
    List,
    /// Boot a guest with an IOMMU, send a device astray behind it, and say what was proved.
    Demo,
    /// Open a shell in a guest, or on the host that the guests run on.
    Shell {
        /// The guest's kernel: 6.1, 6.12, 7.2 or lab; `host` for the host.
        #[arg(default_value = "7.2")]
        machine: String,
        /// The hardware that the host has.
        #[arg(long, default_value = "plain")]
        profile: String,
    },
    /// Boot a guest many times in a row and count what is left behind.
    Soak,
    /// Measure: `boot` (beside QEMU in the same run), or any measurement of the guest tests.
    Bench {
        /// Part of a measurement's name.
        #[arg(default_value = "boot")]
        what: String,
    },
    /// Fuzz every target for a bounded time, or run one target on one stored input.
    Fuzz {
        /// Part of a target's name.
        #[arg(default_value = "")]
        target: String,
        /// A stored input.
        input: Option<PathBuf>,
        /// Seconds for each target.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Download and build what the tests need, and nothing else.
    Setup,
    /// Build the lab's own kernel from Debian's source, even where one stands ready.
    Kernel,
    /// Remove the cache and target/lab.
    Clean,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    let lab = Lab::open(cli.emulate)?;
    match &cli.command {
        Command::Test { filters, no_guests } if filters.is_empty() => {
            lab.test_everything(*no_guests)
        }
        Command::Test { filters, .. } => lab.test_guests(filters, false),
        Command::Soak => lab.test_guests(&["soak::".into()], true),
        Command::Bench { what } => lab.test_guests(&[format!("bench::{what}")], true),
        Command::List => {
            for test in suite::list(&programs::build(&lab.root)?)? {
                let request = if test.on_request { "  on request" } else { "" };
                println!("{:60} {}{request}", test.name, test.profile);
            }
            Ok(true)
        }
        Command::Demo => lab.demo(),
        Command::Shell { machine, profile } => lab.shell(machine, profile),
        Command::Fuzz {
            target,
            input,
            seconds,
        } => {
            debian::require(&[("c++", "g++")])?;
            let fuzzers = step("build the fuzz targets", || Fuzzers::build(&lab.root))?;
            match input {
                Some(input) => fuzzers.replay(target, input).map(|()| true),
                None => {
                    let tally = fuzzers.run(target, Duration::from_secs(*seconds), None)?;
                    Ok(tally.failed == 0)
                }
            }
        }
        Command::Setup => {
            schemathesis::python(&lab.root, &lab.cache)?;
            Supplies::get(&lab.root, &lab.cache, true).map(|_| true)
        }
        Command::Kernel => {
            let kernel = setup::build_kernel(&lab.root, &lab.cache)?;
            println!("{}", kernel.display());
            Ok(true)
        }
        Command::Clean => {
            lab.cache.remove()?;
            cache::remove(&lab.lab)?;
            Ok(true)
        }
    }
}

/// Where everything is.
struct Lab {
    root: PathBuf,
    /// `target/lab`.
    lab: PathBuf,
    cache: Cache,
    emulate: bool,
}

impl Lab {
    fn open(emulate: bool) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../..")
            .canonicalize()
            .context("the project's folder has moved since the lab was built; run it by cargo")?;
        let lab = root.join("target/lab");
        std::fs::create_dir_all(&lab)?;
        let emulate = emulate || !has_kvm();
        Ok(Self {
            lab,
            root,
            cache: Cache::open()?,
            emulate,
        })
    }

    /// Builds what runs in machines, makes everything they boot with, and gives the place where
    /// the chosen guest tests run.
    fn prepare(&self, choose: impl Fn(&Test) -> bool) -> Result<(Place, Vec<Test>)> {
        report::section("Set-up");
        let programs = step("build nestling and the guest tests", || {
            programs::build(&self.root)
        })?;
        let mut tests = suite::list(&programs)?;
        tests.retain(choose);
        let runs = |of: &str| tests.iter().any(|test| test.name.starts_with(of));
        let more = programs::for_kernel(runs);
        if !more.is_empty() {
            step("build the tests of the host's kernel", || {
                programs::build_for_kernel(&self.root, &more)
            })?;
        }
        let measured = tests.iter().any(|test| test.name.starts_with("bench::"));
        let emulated = self.emulate || tests.iter().any(|test| test.profile != PLAIN);
        let supplies = Supplies::get(&self.root, &self.cache, emulated || measured)?;
        step("make the guests' images", || {
            images::make(&supplies, &programs, &self.lab)
        })?;
        if measured && let Some(qemu) = &supplies.qemu {
            images::bundle_qemu(qemu, &self.lab)?;
        }
        println!(
            "  guests run {}",
            if self.emulate {
                "inside an emulated host: this machine has no KVM that can run them"
            } else {
                "on this machine's own KVM"
            }
        );
        let program = self.lab.join("bin/guest-test");
        Ok((
            Place::new(program, !self.emulate, self.hosts(supplies)),
            tests,
        ))
    }

    fn hosts(&self, supplies: Supplies) -> Option<Hosts> {
        Some(Hosts {
            qemu: supplies.qemu?,
            kernel: supplies.host_kernel,
            root: self.root.clone(),
            lab: self.lab.clone(),
            lane: 0,
        })
    }

    fn test_everything(&self, no_guests: bool) -> Result<bool> {
        let mut tally = Tally::default();
        debian::require(&[("cc", "gcc"), ("c++", "g++"), ("curl", "curl")])?;
        suite::lints(&self.root, &mut tally);
        suite::units(&self.root, &mut tally)?;
        suite::fuzzing(&self.root, &mut tally);
        suite::api(&self.root, &self.cache, &mut tally);
        if !no_guests {
            let (place, tests) = self.prepare(|test| !test.on_request)?;
            let beside = place.beside();
            suite::guests(
                iter::once(place).chain(beside),
                &tests,
                &self.lab,
                &mut tally,
            );
        }
        Ok(tally.close())
    }

    fn test_guests(&self, filters: &[String], on_request: bool) -> Result<bool> {
        let (place, chosen) = self.prepare(|test| {
            filters.iter().any(|filter| {
                let named = on_request || !test.on_request || test.name == *filter;
                named && test.name.contains(filter)
            })
        })?;
        if chosen.is_empty() {
            bail!("no guest test matches {filters:?}; see cargo lab list");
        }
        let mut tally = Tally::default();
        suite::guests([place], &chosen, &self.lab, &mut tally);
        print!("{}", figures::table(&figures::of(&chosen, &self.lab)?));
        Ok(tally.close())
    }

    fn demo(&self) -> Result<bool> {
        let done = self.test_guests(&["demo::".into()], true)?;
        if done {
            println!(
                "\nThe guest was a stock Debian kernel under nestling {}.\n\
                 Try `cargo lab shell` for a shell in it, and `cargo lab test` for every test.",
                if self.emulate {
                    "inside the emulated host"
                } else {
                    "on this machine"
                }
            );
        }
        Ok(done)
    }

    fn shell(&self, machine: &str, profile: &str) -> Result<bool> {
        let (mut place, _) = self.prepare(|_| false)?;
        let host = place.take_host(profile, &self.lab.join("logs/shell"))?;
        shell::open(host, machine, &self.lab)
    }
}
