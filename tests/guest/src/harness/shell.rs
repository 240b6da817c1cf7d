//! A guest that stays while a person looks around in it: `cargo lab shell`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use agent::Client;
use anyhow::{Result, bail};

use super::{Guest, Lab};

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(600);

fn socket() -> PathBuf {
    std::env::temp_dir().join("nestling-shell")
}

/// Boots the guest and leaves it running.
///
/// # Errors
/// It does not boot.
pub fn open(kernel: &str) -> Result<()> {
    let lab = Lab::open("shell")?;
    let _ = std::fs::remove_file(socket());
    let console = lab.logs().join("guest-console.log");
    let mut child = Command::new(lab.nestling())
        .arg("run")
        .args(Guest::debian(kernel).payload(&lab, 0)?)
        .args(["--cpus", "boot=2", "--memory", "size=1G"])
        .arg("--serial")
        .arg(format!("file={}", console.display()))
        .arg("--console")
        .arg(format!("socket={}", socket().display()))
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()?;
    Client::connect(&socket(), Duration::from_secs(600), || {
        matches!(child.try_wait(), Ok(None))
    })?;
    println!("the guest's console goes to {}", console.display());
    Ok(())
}

/// Runs one command in it.
///
/// # Errors
/// It does not answer or the command failed.
pub fn run(command: &str) -> Result<()> {
    let mut client = Client::connect(&socket(), Duration::from_secs(60), || true)?;
    let output = client.run(command, LIMIT)?;
    print!("{}", output.stdout);
    eprint!("{}", output.stderr);
    if output.status != 0 {
        bail!("status {}", output.status);
    }
    Ok(())
}

/// Powers it off.
///
/// # Errors
/// It does not answer.
pub fn close() -> Result<()> {
    let mut client = Client::connect(&socket(), Duration::from_secs(60), || true)?;
    client.start("poweroff -f", LIMIT)?;
    Ok(())
}
