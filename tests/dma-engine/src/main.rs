//! `dma-engine CHECK ADDRESS [PROCESSES]`: runs one check on the engine at a PCI address. Prints
//! one line for each thing that holds; the status is 0 when all do.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dma_engine::{checks, doorbell, map_benchmark, process_checks, processes};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dma-engine: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["blocked", address] => checks::blocked(address),
        ["vfio", address] => checks::vfio(address),
        ["together", one, two] => checks::together(one, two),
        ["cdev", address] => checks::cdev(address),
        ["interrupts", address, rounds] => {
            let rounds = rounds.parse().context("ROUNDS is a number")?;
            checks::interrupts_counted(address, rounds, checks::ARRIVES)
        }
        ["interrupts", address, rounds, seconds] => {
            let rounds = rounds.parse().context("ROUNDS is a number")?;
            let seconds = seconds.parse().context("SECONDS is a number")?;
            checks::interrupts_counted(address, rounds, Duration::from_secs(seconds))
        }
        ["forge", address] => checks::forge(address),
        ["doorbell", address] => doorbell::check(address),
        ["pasid", address] => checks::pasid(address),
        ["sva", address] => processes::together(address, 1),
        ["sva", address, processes] => {
            let processes = processes
                .parse()
                .context("PROCESSES is a number, 1 to 64")?;
            processes::together(address, processes)
        }
        ["map-benchmark", address, seconds, pause] => {
            let seconds = seconds.parse().context("SECONDS is a number, 1 to 300")?;
            let pause = pause.parse().context("PAUSE is in nanoseconds")?;
            map_benchmark::run(address, seconds, pause)
        }
        ["heap", address] => process_checks::heap(address),
        ["fork", address] => process_checks::forked(address),
        ["apart", address] => process_checks::apart(address),
        ["spaces", address] => process_checks::spaces(address),
        ["counts", address] => process_checks::counts(address),
        ["unmap", address] => checks::unmap(address, 32),
        ["unmap", address, rounds] => {
            let rounds = rounds.parse().context("ROUNDS is a number")?;
            checks::unmap(address, rounds)
        }
        ["reuse", address] => checks::reuse(address),
        ["hold", address] => checks::hold(address),
        _ => bail!(
            "usage: dma-engine blocked|vfio|interrupts|forge|doorbell|together|cdev|pasid|sva|heap|fork|unmap|reuse|apart|spaces|\
             counts|hold ADDRESS [ADDRESS|PROCESSES]"
        ),
    }
}
