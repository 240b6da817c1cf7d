//! Every way in which a guest can end has its own exit status, and a reboot starts over.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::harness::{Guest, Lab, Test, payload, process};

/// The tests.
pub const TESTS: &[Test] = &[
    // Kernels that could use EFI restart a machine with hardware-reduced ACPI through the BIOS's
    // entry point, not through ACPI's reset register.
    Test::new("a_stock_kernel_restarts", |lab| {
        let mut guest = Guest::debian("6.12").boot(lab)?;
        guest.restart_by("reboot -f")?;
        guest.power_off()?;
        Ok(())
    }),
    Test::new("a_power_off_is_status_0", |lab| {
        ends(lab, "", "poweroff -f", 0)
    }),
    Test::new("a_reboot_that_exits_is_status_3", |lab| {
        ends(lab, "", "reboot -f", 3)
    }),
    Test::new("a_panic_is_a_reboot_and_its_console_says_why", panic),
    Test::new("a_triple_fault_is_status_4", |lab| {
        ends(lab, "reboot=t", "reboot -f", 4)
    }),
    Test::new(
        "a_reboot_starts_over_in_the_same_process_and_leaks_nothing",
        |lab| reboots(lab, 3),
    ),
    Test::new("sigterm_ends_it_cleanly", signal),
    Test::new(
        "an_elf_kernel_is_entered_by_pvh_and_chooses_its_status",
        elf,
    )
    .tiny(),
];

fn guest() -> Guest {
    Guest::lab_kernel().cpus(2).memory("size=256M")
}

fn ends(lab: &Lab, words: &str, command: &str, status: i32) -> Result<()> {
    let guest = guest()
        .cmdline(words)
        .option("--platform", "on_reboot=exit")
        .boot(lab)?;
    let ended = guest.end_by(command)?;
    ensure!(
        ended.status == status,
        "status {} instead of {status}\n{}",
        ended.status,
        ended.said
    );
    Ok(())
}

fn panic(lab: &Lab) -> Result<()> {
    let guest = guest().option("--platform", "on_reboot=exit").boot(lab)?;
    let ended = guest.end_by("echo c > /proc/sysrq-trigger")?;
    ensure!(ended.status == 3, "status {}\n{}", ended.status, ended.said);
    ensure!(
        ended.console.contains("Kernel panic"),
        "the console has no panic"
    );
    Ok(())
}

/// Reboots so many times and compares what the process holds. Used by the soak, too.
///
/// # Errors
/// The guest does not come back, or the process holds more than after its first boot.
pub fn reboots(lab: &Lab, times: u32) -> Result<()> {
    let mut guest = guest().boot(lab)?;
    let mut boot = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    let mut first = None;
    for n in 1..=times {
        guest.restart_by("reboot -f")?;
        let now = guest.run("cat /proc/sys/kernel/random/boot_id")?;
        ensure!(now != boot, "reboot {n} did not start the guest over");
        boot = now;
        let holding = process::holding(guest.pid())?;
        // The first restart may still grow pools and caches.
        let first = first.get_or_insert(holding);
        ensure!(
            holding.fds == first.fds && holding.threads == first.threads,
            "after {n} reboots the process holds {holding:?}, after the first {first:?}"
        );
        ensure!(
            holding.own_kib <= first.own_kib + 2048,
            "after {n} reboots the process has {} KiB, after the first {}",
            holding.own_kib,
            first.own_kib
        );
    }
    guest.power_off()?;
    Ok(())
}

fn elf(lab: &Lab) -> Result<()> {
    let kernel = lab.file("payload");
    std::fs::write(&kernel, payload::exits_with(42))?;
    let guest = guest()
        .kernel_file(&kernel)
        .option("--platform", "debug_exit=on")
        .start(lab)?;
    let ended = guest.wait(Duration::from_secs(200))?;
    ensure!(
        ended.status == 42,
        "status {}\n{}",
        ended.status,
        ended.said
    );
    Ok(())
}

fn signal(lab: &Lab) -> Result<()> {
    let guest = guest().boot(lab)?;
    guest.signal(libc::SIGTERM)?;
    let socket = guest.channel().to_owned();
    let ended = guest.wait(Duration::from_secs(200))?;
    ensure!(
        ended.status == 128 + libc::SIGTERM,
        "status {} after SIGTERM",
        ended.status
    );
    ensure!(!socket.exists(), "{} was left behind", socket.display());
    Ok(())
}
