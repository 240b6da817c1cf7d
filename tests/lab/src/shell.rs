//! `cargo lab shell`: one command line after the other, in a guest or on its host.

use std::io::{BufRead, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::machine::{Host, IN_HOST, SHARE};

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(600);

/// Reads commands until the end of input.
///
/// # Errors
/// The machine does not boot or no longer answers.
pub fn open(mut host: Option<Host>, machine: &str, lab: &Path) -> Result<bool> {
    let program = match &host {
        Some(_) => format!("{IN_HOST} {SHARE}/bin/guest-test"),
        None => format!("NESTLING_LAB={0} {0}/bin/guest-test", lab.display()),
    };
    let on_host = machine == "host";
    if !on_host {
        // The guest is a test that waits; this shell's commands reach it by the same program.
        run(host.as_mut(), &format!("{program} shell-open {machine}"))?;
    }
    println!("{machine}: a command a line; end with Ctrl-D");
    loop {
        print!("{machine}# ");
        std::io::stdout().flush()?;
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 {
            break;
        }
        let command = line.trim();
        if command.is_empty() {
            continue;
        }
        if command == "exit" {
            break;
        }
        let command = if on_host {
            command.to_owned()
        } else {
            format!("{program} shell-run '{}'", command.replace('\'', "'\\''"))
        };
        if let Err(error) = run(host.as_mut(), &command) {
            println!("{error:#}");
        }
    }
    println!();
    if !on_host {
        run(host.as_mut(), &format!("{program} shell-close"))?;
    }
    if let Some(host) = host {
        host.power_off();
    }
    Ok(true)
}

/// Runs a command where the guests run and shows its output.
fn run(host: Option<&mut Host>, command: &str) -> Result<()> {
    match host {
        Some(host) => {
            let output = host.run(command, LIMIT)?;
            print!("{}", output.stdout);
            eprint!("{}", output.stderr);
            if output.status != 0 {
                bail!("status {}", output.status);
            }
        }
        None => {
            let status = Command::new("sh").args(["-c", command]).status()?;
            if !status.success() {
                bail!("{status}");
            }
        }
    }
    Ok(())
}
