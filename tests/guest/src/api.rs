//! A VM in the hands of a client of the API: pause and resume, the power button, reboots, and
//! answers while something else is being done.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::harness::{Guest, Lab, Machine, Test, show};

/// The tests.
pub const TESTS: &[Test] = &[Test::new(
    "a_client_pauses_resumes_presses_the_button_and_reboots",
    lifecycle,
)];

fn lifecycle(lab: &Lab) -> Result<()> {
    let guest = Guest::lab_kernel().cpus(2).memory("size=512M").api(lab);
    let mut guest = guest
        .cmdline("intel_iommu=on")
        .option("--viommu", "type=vtd")
        .boot(lab)?;
    let api = guest.api();
    let state = || -> Result<Value> { Ok(api.get("vm.info")?["state"].clone()) };
    let put = |request: &str| api.put(request, &Value::Null);

    let stalls =
        |guest: &mut Machine| guest.run("dmesg | grep -c -i -E 'soft lockup|rcu.*stall' || true");
    let before = stalls(&mut guest)?;
    // A guest that is paused does nothing, however often.
    for _ in 0..3 {
        put("vm.pause")?;
        ensure!(state()? == "Paused");
        ensure!(!guest.pings(), "a paused guest answers");
        put("vm.resume")?;
        ensure!(state()? == "Running");
        guest.run("true").context("after it was resumed")?;
    }
    let told = stalls(&mut guest)?;
    ensure!(told == before, "a pause is told as {told} stalls");

    // The button reaches the guest's kernel, once for each press.
    let pressed = presses(&mut guest)?;
    put("vm.power-button")?;
    let deadline = Instant::now() + Duration::from_secs(300);
    while presses(&mut guest)? == pressed {
        ensure!(Instant::now() < deadline, "the guest saw no power button");
    }

    // A client that asks does not wait for one that asks for something slow.
    let slow = api.clone();
    let rebooting = std::thread::spawn(move || slow.put("vm.reboot", &Value::Null));
    let mut slowest = Duration::ZERO;
    while !rebooting.is_finished() {
        let begun = Instant::now();
        api.get("vm.info")?;
        slowest = slowest.max(begun.elapsed());
    }
    let rebooted = rebooting.join();
    rebooted.map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    show(format!("vm.info during a reboot: at most {slowest:?}"));
    guest.starts_over()?;
    let info = api.get("vm.info")?;
    ensure!(info["state"] == "Running", "{info:#}");

    put("vm.shutdown")?;
    ensure!(state()? == "Created");
    put("vm.boot")?;
    guest.starts_over()?;
    let again = api.ask("PUT", "vm.boot", &json!(null))?;
    ensure!(again.status == 409, "a second boot is answered {again:?}");
    guest.power_off()?;
    Ok(())
}

/// How often the event device, which the power button presses, was heard of.
fn presses(guest: &mut Machine) -> Result<u64> {
    let lines = guest.run("grep -i ACPI:Ged /proc/interrupts || true")?;
    let counts = lines
        .split_whitespace()
        .filter_map(|word| word.parse::<u64>().ok());
    Ok(counts.sum())
}
