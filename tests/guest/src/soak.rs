//! Many boots in a row: nothing hangs and nothing is left behind. Run by `cargo lab soak`.

use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Result, ensure};

use crate::ending;
use crate::harness::{Guest, Lab, Test, process, show};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("fifty_boots_leave_nothing_behind", fifty_boots)
        .limit(3600)
        .on_request(),
    Test::new("fifty_reboots_of_one_process_leave_nothing_behind", |lab| {
        ending::reboots(lab, 50)
    })
    .limit(3600)
    .on_request(),
];

const BOOTS: u32 = 50;

/// KiB that the host may have less than after the first boots.
const MOST_LOST: u64 = 32 << 10;

/// KiB that the host has less than `before`, once its kernel has let go of what it frees later and
/// of its caches.
fn lost_since(before: u64) -> Result<u64> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let lost = before.saturating_sub(process::available_kib()?);
        if lost < MOST_LOST || Instant::now() >= deadline {
            return Ok(lost);
        }
        // Only the lab's host lets a test do that.
        let _ = fs::write("/proc/sys/vm/drop_caches", "3");
        thread::sleep(Duration::from_secs(1));
    }
}

fn fifty_boots(lab: &Lab) -> Result<()> {
    let disk = lab.image("disk", 8)?;
    let guest = Guest::lab_kernel().cpus(2).memory("size=256M").disk(&disk);
    let me = std::process::id();
    let mut first = None;
    let mut host = None;
    for n in 1..=BOOTS {
        let mut machine = guest.boot(lab)?;
        machine.run("cat /dev/vda > /dev/null")?;
        let holding = process::holding(machine.pid())?;
        machine.power_off()?;
        let seen = first.get_or_insert(holding);
        ensure!(
            holding.fds == seen.fds && holding.threads == seen.threads,
            "boot {n} holds {holding:?}, the first {seen:?}"
        );
        let now = (process::holding(me)?, process::available_kib()?);
        // The first boots fill the host's caches.
        let before = if n <= 5 {
            *host.insert(now)
        } else {
            *host.get_or_insert(now)
        };
        ensure!(
            now.0.fds == before.0.fds && now.0.threads == before.0.threads,
            "after boot {n} the test holds {:?}, before {:?}",
            now.0,
            before.0
        );
        let lost = lost_since(before.1)?;
        ensure!(
            lost < MOST_LOST,
            "after boot {n} the host has {lost} KiB less"
        );
        if n % 10 == 0 {
            show(format!(
                "{n} boots; nestling holds {holding:?}; {lost} KiB less on the host"
            ));
        }
    }
    Ok(())
}
