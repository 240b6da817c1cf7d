//! `cargo lab fuzz`: builds the fuzz targets with coverage instrumentation and runs each for a
//! bounded time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// What LLVM needs to be told so that libFuzzer sees coverage and comparisons. Only stable
/// options of rustc.
const INSTRUMENTATION: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1";

/// A target triple of its own keeps the instrumentation away from build scripts.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// How many targets held and how many broke.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Targets that ran their time without breaking an invariant.
    pub passed: usize,
    /// Targets that did not.
    pub failed: usize,
}

/// The fuzz targets, built and ready.
#[derive(Debug)]
pub struct Fuzzers {
    program: PathBuf,
    /// `target/lab/fuzz`: a folder per target with its corpus and its crashes.
    work: PathBuf,
    names: Vec<String>,
}

impl Fuzzers {
    /// Builds them in `root`, the project's folder.
    ///
    /// # Errors
    /// The build failed, or the program does not list its targets.
    pub fn build(root: &Path) -> Result<Self> {
        let out = root.join("target/fuzz");
        let status = Command::new("cargo")
            .args(["build", "--quiet", "--package", "fuzz", "--profile", "lab"])
            .args(["--target", TRIPLE, "--target-dir"])
            .arg(&out)
            .env("RUSTFLAGS", INSTRUMENTATION)
            .current_dir(root)
            .status()
            .context("cannot start cargo to build the fuzz targets")?;
        if !status.success() {
            bail!("building the fuzz targets failed; its errors stand above");
        }
        let program = out.join(TRIPLE).join("lab/fuzz");
        let list = Command::new(&program)
            .env("NESTLING_FUZZ", "list")
            .output()?;
        if !list.status.success() {
            bail!("{} does not list its targets", program.display());
        }
        let names = String::from_utf8_lossy(&list.stdout)
            .lines()
            .map(str::to_owned)
            .collect();
        Ok(Self {
            program,
            work: root.join("target/lab/fuzz"),
            names,
        })
    }

    /// Runs every target whose name contains `filter`, each for `time` and one on each core, and says
    /// how it went.
    /// With `seed` the inputs are the same in every run; without, they are new ones.
    ///
    /// # Errors
    /// A folder cannot be made or a target cannot be started; a broken invariant is not an error
    /// but counted.
    pub fn run(&self, filter: &str, time: Duration, seed: Option<u32>) -> Result<Tally> {
        let chosen: Vec<_> = self
            .names
            .iter()
            .filter(|name| name.contains(filter))
            .collect();
        if chosen.is_empty() {
            bail!(
                "no fuzz target matches {filter:?}; there are: {}",
                self.names.join(", ")
            );
        }
        let next = AtomicUsize::new(0);
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let worker = || -> Result<Tally> {
            let mut tally = Tally::default();
            while let Some(name) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                match self.target(name, time, seed)? {
                    true => tally.passed += 1,
                    false => tally.failed += 1,
                }
            }
            Ok(tally)
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..cores).map(|_| scope.spawn(worker)).collect();
            let mut sum = Tally::default();
            for worker in workers {
                let done = worker
                    .join()
                    .map_err(|_| anyhow!("a thread of the lab panicked"))??;
                sum.passed += done.passed;
                sum.failed += done.failed;
            }
            Ok(sum)
        })
    }

    /// Runs one target; whether its invariants held.
    fn target(&self, name: &str, time: Duration, seed: Option<u32>) -> Result<bool> {
        let started = Instant::now();
        let folder = self.work.join(name);
        let log = folder.join("log");
        fs::create_dir_all(folder.join("corpus"))?;
        let status = Command::new(&self.program)
            .arg(format!("-max_total_time={}", time.as_secs().max(1)))
            .args(seed.map(|seed| format!("-seed={seed}")))
            .args(["-timeout=100", "-rss_limit_mb=2048", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}/", folder.display()))
            .arg(folder.join("corpus"))
            .env("NESTLING_FUZZ", name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .status()
            .with_context(|| format!("cannot start the fuzz target {name}"))?;
        let said = fs::read_to_string(&log).unwrap_or_default();
        let seconds = started.elapsed().as_secs();
        if status.success() {
            let runs = executions(&said);
            println!("  fuzz {name}: held for {runs} inputs in {seconds} s");
        } else {
            println!(
                "  fuzz {name}: BROKEN after {seconds} s; see {}",
                log.display()
            );
        }
        Ok(status.success())
    }

    /// Runs one target on one stored input, with its output shown.
    ///
    /// # Errors
    /// The target cannot be started or breaks.
    pub fn replay(&self, name: &str, input: &Path) -> Result<()> {
        let status = Command::new(&self.program)
            .arg(input)
            .env("NESTLING_FUZZ", name)
            .status()?;
        if !status.success() {
            bail!("{name} breaks on {}", input.display());
        }
        Ok(())
    }
}

/// The number of inputs tried, from libFuzzer's final statistics.
fn executions(log: &str) -> &str {
    log.lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .map_or("?", str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_inputs_is_read_from_the_statistics() {
        assert_eq!(
            executions("x\nstat::number_of_executed_units: 1234\ny"),
            "1234"
        );
        assert_eq!(executions(""), "?");
    }
}
