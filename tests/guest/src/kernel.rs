//! The host's side on a real kernel, without a guest: tests of the packages that skip where there
//! is no such kernel or device, run where there is.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::harness::{Lab, Test, show};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("the_back_end_agrees_with_the_kernels_iommufd", |lab| {
        run(lab, "iommufd_mock")
    })
    .profile("vtd"),
    Test::new("a_dma_engine_reaches_what_it_may_and_nothing_else", |lab| {
        run(lab, "vfio_edu")
    })
    .profile("vtd"),
];

/// Runs a package's test program, all of it.
fn run(lab: &Lab, program: &str) -> Result<()> {
    let output = Command::new(lab.shared("bin").join(program))
        .args(["--test-threads=1", "--nocapture"])
        .output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    fs::write(lab.logs().join(format!("{program}.log")), &said)?;
    let result: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("test result:"))
        .collect();
    ensure!(
        output.status.success() && result.len() == 1,
        "{program} failed; see {program}.log"
    );
    let skipped = said.lines().find(|line| line.contains("skipped:"));
    ensure!(skipped.is_none(), "{program}: {skipped:?}");
    show(result[0]);
    for line in said.lines() {
        if let Some(at) = line.find("measured, ") {
            show(&line[at..]);
        }
    }
    Ok(())
}
