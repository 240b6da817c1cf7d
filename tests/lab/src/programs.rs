//! The programs that run inside machines: nestling, the agent and the guest tests, linked
//! statically so that they run on any kernel with nothing beside them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A target triple of its own keeps static linking away from build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The profile of the workspace they are built with.
const PROFILE: &str = "lab";

/// Builds them and gives the folder they are in.
///
/// # Errors
/// The build failed; its output is on the terminal.
pub fn build(root: &Path) -> Result<PathBuf> {
    let target = root.join("target");
    let status = Command::new("cargo")
        .args([
            "build",
            "--quiet",
            "--locked",
            "--profile",
            PROFILE,
            "--target",
            TRIPLE,
        ])
        .args([
            "--package",
            "api",
            "--package",
            "agent",
            "--package",
            "guest",
            "--package",
            "dma-engine",
            "--bins",
        ])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .current_dir(root)
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("building the programs of the guests failed; the errors stand above");
    }
    Ok(target.join(TRIPLE).join(PROFILE))
}
