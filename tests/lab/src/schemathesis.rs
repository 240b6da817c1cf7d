//! schemathesis, which makes requests from an OpenAPI document: a Python program, kept in the
//! cache with everything that it needs. Each file is checked against its recorded sum.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, remove};
use crate::debian;
use crate::report::{note, step};

/// The version, in `tests/lab/schemathesis.txt`, too.
const VERSION: &str = "4.32.5";
/// Debian's Python: another one on the path may lack venv.
const PYTHON: &str = "/usr/bin/python3";
/// How often it is tried to have the packages, and how long it waits between.
const TRIES: u32 = 4;
const PAUSE: Duration = Duration::from_secs(5);

/// A Python that has schemathesis.
///
/// # Errors
/// It cannot be had; the error says why.
pub fn python(root: &Path, cache: &Cache) -> Result<PathBuf> {
    debian::require(&[(PYTHON, "python3")])?;
    let version = release()?;
    let venv = format!("/usr/lib/python{version}/ensurepip/__init__.py");
    debian::require(&[(&venv, "python3-venv")])?;
    let name = format!("schemathesis-{VERSION}-python{version}");
    let place = cache.component(&name, |to| step("fetch schemathesis", || install(root, to)))?;
    Ok(place.join("bin/python3"))
}

/// The major and minor version of Debian's Python.
fn release() -> Result<String> {
    let code = "import sys; print('%d.%d' % sys.version_info[:2])";
    let output = Command::new(PYTHON).args(["-c", code]).output();
    let output = output.with_context(|| format!("cannot run {PYTHON}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn install(root: &Path, to: &Path) -> Result<()> {
    let mut tried = 1;
    while let Err(why) = try_to_install(root, to) {
        if tried == TRIES {
            return Err(why);
        }
        note(&format!("{why:#}; trying again"));
        tried += 1;
        thread::sleep(PAUSE);
        remove(to)?;
    }
    Ok(())
}

fn try_to_install(root: &Path, to: &Path) -> Result<()> {
    run(Command::new(PYTHON).args(["-m", "venv"]).arg(to))?;
    let mut pip = Command::new(to.join("bin/python3"));
    pip.args(["-m", "pip", "--quiet", "--no-input"])
        .args(["--disable-pip-version-check", "--retries", "5"])
        .args(["--timeout", "30", "install", "--no-deps"])
        .args(["--require-hashes", "--only-binary", ":all:"])
        .arg("--requirement")
        .arg(root.join("tests/lab/schemathesis.txt"));
    run(&mut pip)
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("{program} failed: {}", text.trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recorded_sums_are_of_this_version() {
        let list = include_str!("../schemathesis.txt");
        assert!(list.contains(&format!("\nschemathesis=={VERSION} ")));
        // A package without sums would be refused.
        let lines = list.lines().filter(|line| !line.starts_with('#'));
        let packages = lines.filter(|line| line.contains("=="));
        assert!(packages.clone().all(|line| line.ends_with('\\')));
        assert!(packages.count() > 20);
    }
}
