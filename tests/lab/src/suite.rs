//! Everything that `cargo lab test` checks, in the order in which a mistake shows soonest.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::dependencies;
use crate::fuzz::Fuzzers;
use crate::place::{Place, Test};
use crate::report::{Tally, section};
use crate::schemathesis;

/// How long each fuzz target runs as part of the tests.
const FUZZ_TIME: Duration = Duration::from_secs(10);
/// So that two runs of the tests try the same inputs; `cargo lab fuzz` and `cargo test` look for new
/// ones.
const SEED: u32 = 20261120;

/// Formatting, lints, documentation, licences.
pub fn lints(root: &Path, tally: &mut Tally) {
    section("Source");
    tally.check("formatting", || {
        cargo(root, &["fmt", "--all", "--check"], &[])
    });
    tally.check("clippy", || {
        cargo(
            root,
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--locked",
                "--",
                "-D",
                "warnings",
            ],
            &[],
        )
    });
    tally.check("documentation", || {
        cargo(
            root,
            &[
                "doc",
                "--workspace",
                "--no-deps",
                "--locked",
                "--document-private-items",
            ],
            &[("RUSTDOCFLAGS", "-D warnings")],
        )
    });
    tally.check("dependencies", || dependencies::check(root));
}

/// Unit, property, integration and documentation tests.
///
/// # Errors
/// cargo cannot be started.
pub fn units(root: &Path, tally: &mut Tally) -> Result<()> {
    section("Unit, property and integration tests");
    let mut command = Command::new("cargo");
    command
        .args([
            "test",
            "--workspace",
            "--locked",
            "--no-fail-fast",
            "--exclude",
            "fuzz",
        ])
        .env("PROPTEST_RNG_SEED", SEED.to_string())
        .current_dir(root);
    let output = command.output().context("cannot start cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (passed, failed) = count(&text);
    if failed > 0 {
        println!("{text}");
    }
    println!("  {passed} passed, {failed} failed in these");
    tally.add("unit tests", passed, failed);
    if !output.status.success() && failed == 0 {
        tally.check("the tests build and run", || {
            bail!("{}", String::from_utf8_lossy(&output.stderr))
        });
    }
    Ok(())
}

/// Fuzzing for a bounded time.
pub fn fuzzing(root: &Path, tally: &mut Tally) {
    section("Fuzzing");
    match Fuzzers::build(root).and_then(|fuzzers| fuzzers.run("", FUZZ_TIME, Some(SEED))) {
        Ok(done) => tally.add("fuzz targets", done.passed, done.failed),
        Err(error) => tally.check("the fuzz targets build and run", || Err(error)),
    }
}

/// The API, asked for everything that its document allows or forbids.
pub fn api(root: &Path, cache: &Cache, tally: &mut Tally) {
    tally.check("the API, from its document", || {
        let python = schemathesis::python(root, cache)?;
        let mut command = Command::new("cargo");
        command
            // The packages of `units`, so that nothing is built with other features.
            .args(["test", "--quiet", "--locked", "--workspace"])
            .args(["--exclude", "fuzz", "--test", "nestling"])
            .args(["--", "--ignored", "--nocapture"])
            .arg("fuzz::")
            .env("NESTLING_SCHEMATHESIS", python)
            .current_dir(root);
        let output = command.output().context("cannot start cargo test")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // A test of another name would be none.
        if !output.status.success() || count(&text) != (1, 0) {
            bail!("{text}{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    });
}

/// Guest tests, in all `places` at the same time, those of one profile after each other so that
/// each host boots once: the first place begins at one end of the list, the others at its other.
pub fn guests(
    places: impl IntoIterator<Item = Place>,
    tests: &[Test],
    lab: &Path,
    tally: &mut Tally,
) {
    section("Guest tests");
    let mut ordered: VecDeque<&Test> = tests.iter().collect();
    ordered
        .make_contiguous()
        .sort_by(|a, b| a.profile.cmp(&b.profile));
    let (ordered, tally) = (Mutex::new(ordered), Mutex::new(tally));
    let next = |first: bool| {
        let mut tests = locked(&ordered);
        if first {
            tests.pop_front()
        } else {
            tests.pop_back()
        }
    };
    thread::scope(|scope| {
        for (n, mut place) in places.into_iter().enumerate() {
            let (next, tally) = (&next, &tally);
            scope.spawn(move || {
                while let Some(test) = next(n == 0) {
                    let started = Instant::now();
                    let result = place.run(test, lab);
                    locked(tally).count(&test.name, started.elapsed(), result);
                }
            });
        }
    });
}

fn locked<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the test program lists.
///
/// # Errors
/// It does not run.
pub fn list(programs: &Path) -> Result<Vec<Test>> {
    let program = programs.join("guest-test");
    let output = Command::new(&program)
        .arg("list")
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    serde_json::from_slice(&output.stdout).context("the list of guest tests")
}

fn cargo(root: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let output = Command::new("cargo")
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(root)
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("cargo {} failed:\n{out}{err}", arguments.join(" "));
    }
    Ok(())
}

/// The sums of the `test result:` lines of cargo test.
fn count(text: &str) -> (usize, usize) {
    let number = |line: &str, what: &str| -> usize {
        let before = line.split(what).next().unwrap_or_default();
        before
            .split_whitespace()
            .next_back()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    text.lines()
        .filter(|line| line.starts_with("test result:"))
        .fold((0, 0), |sum, line| {
            (
                sum.0 + number(line, " passed;"),
                sum.1 + number(line, " failed;"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_of_cargo_test_is_counted() {
        let text = "test a ... ok\n\
                    test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured\n\
                    test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured\n";
        assert_eq!(count(text), (15, 2));
        assert_eq!(count(""), (0, 0));
    }
}
