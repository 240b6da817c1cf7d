//! What the person at the terminal sees: one line per step, with its time.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Says something in passing.
pub fn note(text: &str) {
    eprintln!("  · {text}");
}

/// Starts a section of the report.
pub fn section(title: &str) {
    println!("\n{title}");
}

/// Runs a step and shows that it runs, then its time.
///
/// # Errors
/// The step's own.
pub fn step<T>(what: &str, run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let terminal = std::io::stdout().is_terminal();
    if terminal {
        print!("  {what} …");
        let _ = std::io::stdout().flush();
    }
    let started = Instant::now();
    let result = run();
    let start = if terminal { "\r" } else { "" };
    let end = if result.is_ok() { "done" } else { "FAILED" };
    println!(
        "{start}  {what}: {end} in {:.1} s",
        started.elapsed().as_secs_f64()
    );
    result
}

/// Counts what held and what did not, over the whole run.
#[derive(Debug, Default)]
pub struct Tally {
    passed: usize,
    failures: Vec<String>,
}

impl Tally {
    /// Counts one check by its outcome and shows it.
    pub fn check(&mut self, name: &str, run: impl FnOnce() -> anyhow::Result<()>) {
        let started = Instant::now();
        let result = run();
        self.count(name, started.elapsed(), result);
    }

    /// Counts one check that took `time` and shows it.
    pub fn count(&mut self, name: &str, time: Duration, result: anyhow::Result<()>) {
        let seconds = time.as_secs_f64();
        match result {
            Ok(()) => {
                println!("  ok     {name}  {seconds:.1} s");
                self.passed += 1;
            }
            Err(error) => {
                println!("  FAILED {name}  {seconds:.1} s");
                for line in format!("{error:#}").lines() {
                    println!("         {line}");
                }
                self.failures.push(name.to_owned());
            }
        }
    }

    /// Counts what another program has counted.
    pub fn add(&mut self, what: &str, passed: usize, failed: usize) {
        self.passed += passed;
        self.failures
            .extend((0..failed).map(|n| format!("{what} ({} of {failed})", n + 1)));
    }

    /// Prints what failed, then the closing line.
    pub fn close(&self) -> bool {
        println!();
        for failure in &self.failures {
            println!("failed: {failure}");
        }
        println!("{} passed, {} failed", self.passed, self.failures.len());
        self.failures.is_empty()
    }
}
