//! The programs that run inside machines: nestling, the agent and the guest tests, linked
//! statically so that they run on any kernel with nothing beside them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A target triple of its own keeps static linking away from build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The profile of the workspace they are built with.
const PROFILE: &str = "lab";

/// Tests of the back end that need the lab's kernel: package and name. They are programs of their
/// own, which the guest tests run there.
pub const KERNEL_TESTS: [(&str, &str); 2] = [("viommu", "iommufd_mock"), ("devices", "vfio_edu")];

/// Builds them, but for [`KERNEL_TESTS`], and gives the folder they are in.
///
/// # Errors
/// The build failed; its output is on the terminal.
pub fn build(root: &Path) -> Result<PathBuf> {
    let packages = ["api", "agent", "guest", "dma-engine"];
    let mut bins = cargo(root, "build");
    for package in packages {
        bins.args(["--package", package]);
    }
    output(bins.arg("--bins"))?;
    Ok(folder(root))
}

/// Builds [`KERNEL_TESTS`] into the same folder: they take as long as everything else, and only the
/// guest tests of `kernel::` run them.
///
/// # Errors
/// The build failed; its output is on the terminal.
pub fn build_kernel_tests(root: &Path) -> Result<()> {
    let folder = folder(root);
    for (package, name) in KERNEL_TESTS {
        let mut test = cargo(root, "test");
        test.args(["--package", package, "--test", name, "--no-run"]);
        let messages = output(test.arg("--message-format=json-render-diagnostics"))?;
        let program = executable(&messages)
            .with_context(|| format!("cargo does not say where the test {name} is"))?;
        let half = folder.join(format!("{name}.new"));
        fs::copy(&program, &half).with_context(|| format!("cannot copy {program}"))?;
        fs::rename(&half, folder.join(name))?;
    }
    Ok(())
}

fn folder(root: &Path) -> PathBuf {
    root.join("target").join(TRIPLE).join(PROFILE)
}

/// A cargo command for static programs.
fn cargo(root: &Path, what: &str) -> Command {
    let mut command = Command::new("cargo");
    command
        .args([what, "--quiet", "--locked", "--profile", PROFILE])
        .args(["--target", TRIPLE])
        .arg("--target-dir")
        .arg(root.join("target"))
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .current_dir(root)
        .stderr(Stdio::inherit());
    command
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("building the programs of the guests failed; the errors stand above");
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The one program that cargo's messages name.
fn executable(messages: &str) -> Option<String> {
    let messages = messages.lines().rev();
    let mut messages =
        messages.filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    messages.find_map(|message| Some(message["executable"].as_str()?.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_among_cargos_messages() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
                        {\"reason\":\"compiler-artifact\",\"executable\":\"/t/deps/a-1\"}\n\
                        {\"reason\":\"build-finished\",\"success\":true}\n";
        assert_eq!(executable(messages).as_deref(), Some("/t/deps/a-1"));
        assert_eq!(executable("not JSON"), None);
    }
}
