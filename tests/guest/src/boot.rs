//! Stock kernels reach user space and see the machine they were promised.

use anyhow::{Result, ensure};

use crate::harness::{Guest, Lab, Test};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("debian_6_1_with_one_cpu_and_128_mib", |lab| {
        sees(
            lab,
            Guest::debian("6.1").cpus(1).memory("size=128M"),
            1,
            128,
        )
    }),
    Test::new("debian_6_12_with_two_cpus_and_2_gib", |lab| {
        sees(
            lab,
            Guest::debian("6.12").cpus(2).memory("size=2G"),
            2,
            2048,
        )
    }),
    Test::new("debian_7_2_with_eight_cpus", |lab| {
        sees(lab, Guest::debian("7.2").cpus(8).memory("size=1G"), 8, 1024)
    }),
    Test::new("the_labs_kernel_with_memory_above_the_32_bit_hole", |lab| {
        sees(
            lab,
            Guest::lab_kernel().cpus(2).memory("size=5G"),
            2,
            5 * 1024,
        )
    }),
    Test::new("an_elf_kernel_boots_by_pvh", |lab| {
        let kernel = lab.shared("guests/lab/vmlinux");
        sees(lab, Guest::lab_kernel().kernel_file(&kernel), 1, 512)
    }),
];

/// Boots the guest and checks that it has so many CPUs and so much memory (MiB).
fn sees(lab: &Lab, guest: Guest, cpus: u32, memory: u64) -> Result<()> {
    let mut guest = guest.verbose().boot(lab)?;
    let online = guest.run("cat /sys/devices/system/cpu/online")?;
    let all = if cpus == 1 {
        "0".to_owned()
    } else {
        format!("0-{}", cpus - 1)
    };
    ensure!(
        online.trim() == all,
        "of {cpus} CPUs only {} are online",
        online.trim()
    );
    // What the firmware map gives as RAM, in KiB: the kernel's own share is not in MemTotal.
    let map = guest.run("dmesg | grep -E 'BIOS-e820.*(usable|System RAM)'")?;
    let usable: u64 = map.lines().filter_map(range).sum();
    let missing = (memory << 20).saturating_sub(usable);
    ensure!(
        missing < 2 << 20,
        "of {memory} MiB {} KiB are not there:\n{map}",
        missing >> 10
    );
    guest.power_off()?;
    Ok(())
}

/// The length of `[mem 0x0-0x9fbff] usable`.
fn range(line: &str) -> Option<u64> {
    let inside = line.split("[mem ").nth(1)?.split(']').next()?;
    let (from, to) = inside.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    number(to)?.checked_sub(number(from)?)?.checked_add(1)
}
