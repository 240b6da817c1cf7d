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

/// A test or a benchmark of a package that needs the lab's kernel: a program of its own, which a
/// guest test runs there.
#[derive(Debug)]
pub struct KernelProgram {
    package: &'static str,
    /// `test` or `bench`.
    kind: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What the names of the guest tests that run it begin with.
    of: &'static str,
}

/// All of them.
pub const KERNEL_PROGRAMS: [KernelProgram; 3] = [
    KernelProgram {
        package: "viommu",
        kind: "test",
        name: "iommufd_mock",
        of: "kernel::",
    },
    KernelProgram {
        package: "devices",
        kind: "test",
        name: "vfio_edu",
        of: "kernel::",
    },
    KernelProgram {
        package: "viommu",
        kind: "bench",
        name: "stage2_setup",
        of: "bench::stage2",
    },
];

/// Builds them, but for [`KERNEL_PROGRAMS`], and gives the folder they are in.
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

/// Those of [`KERNEL_PROGRAMS`] that a chosen guest test runs.
pub fn for_kernel(chosen: impl Fn(&str) -> bool) -> Vec<KernelProgram> {
    let mut programs = Vec::from(KERNEL_PROGRAMS);
    programs.retain(|program| chosen(program.of));
    programs
}

/// Builds such programs into the same folder: they take as long as everything else.
///
/// # Errors
/// The build failed; its output is on the terminal.
pub fn build_for_kernel(root: &Path, programs: &[KernelProgram]) -> Result<()> {
    let folder = folder(root);
    for program in programs {
        let (kind, name) = (program.kind, program.name);
        let mut build = cargo(root, kind);
        build.args(["--package", program.package, "--no-run"]);
        build.args([&format!("--{kind}"), name]);
        let messages = output(build.arg("--message-format=json-render-diagnostics"))?;
        let program = executable(&messages)
            .with_context(|| format!("cargo does not say where the {kind} {name} is"))?;
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
