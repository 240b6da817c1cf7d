//! Real clients look at the machine: lspci, the kernel's own log, entropy, interrupts.

use std::fs;

use anyhow::{Result, ensure};

use crate::harness::{Guest, Lab, Test, tap::Tap};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("lspci_and_the_kernel_find_nothing_odd", nothing_odd),
    Test::new("the_entropy_source_gives_entropy", entropy),
];

fn nothing_odd(lab: &Lab) -> Result<()> {
    let tap = Tap::new("lab1", "192.168.78.1/24")?;
    let disk = lab.image("disk", 8)?;
    let mut guest = Guest::debian("7.2")
        .cpus(2)
        .tools()
        .disk(&disk)
        .option("--net", &format!("tap={}", tap.name()))
        .boot(lab)?;
    let text = guest.run("/usr/bin/lspci -vvnn")?;
    fs::write(lab.logs().join("lspci"), &text)?;
    let bytes = guest.run("/usr/bin/lspci -xxxx")?;
    fs::write(lab.logs().join("lspci-bytes"), &bytes)?;
    // This lspci has no name for the fifth of virtio's capabilities, which 4.1.4.9 demands.
    let known = text.replace("VirtIO: <unknown>", "VirtIO: PciCfg");
    for odd in [
        "!!!",
        "access denied",
        "Unknown header",
        "<unknown",
        "[disabled]",
        "rev ff",
    ] {
        ensure!(
            !known.contains(odd),
            "lspci says {odd:?}; see the file lspci in the logs"
        );
    }
    let functions: Vec<&str> = text
        .split("\n\n")
        .filter(|f| !f.trim().is_empty())
        .collect();
    let virtio: Vec<&&str> = functions
        .iter()
        .filter(|f| f.lines().next().is_some_and(|line| line.contains("[1af4:")))
        .collect();
    ensure!(
        virtio.len() >= 4,
        "of disk, net, rng and console only {} are there",
        virtio.len()
    );
    for function in virtio {
        ensure!(
            function.contains("Kernel driver in use: virtio-pci"),
            "no driver:\n{function}"
        );
        ensure!(
            function.contains("MSI-X: Enable+"),
            "MSI-X is not on:\n{function}"
        );
    }
    // Extended configuration space is there: lspci -xxxx has 4096 bytes of each PCIe function.
    ensure!(bytes.contains("\nff0: "), "no extended configuration space");
    let interrupts = guest.run("cat /proc/interrupts")?;
    fs::write(lab.logs().join("interrupts"), &interrupts)?;
    for counter in ["ERR:", "MIS:"] {
        // A kernel may leave a counter out that is 0.
        let line = interrupts
            .lines()
            .find(|line| line.trim_start().starts_with(counter));
        let count = line.and_then(|line| line.split_whitespace().nth(1));
        ensure!(
            count.is_none_or(|n| n == "0"),
            "spurious interrupts: {counter} {count:?}"
        );
    }
    ensure!(
        interrupts.contains("virtio"),
        "no interrupts of virtio:\n{interrupts}"
    );
    guest.power_off()?;
    Ok(())
}

fn entropy(lab: &Lab) -> Result<()> {
    let mut guest = Guest::debian("6.12").boot(lab)?;
    let current = guest.run("cat /sys/class/misc/hw_random/rng_current")?;
    ensure!(
        current.contains("virtio"),
        "the guest's source of entropy is {current}"
    );
    let read = "dd if=/dev/hwrng bs=4096 count=4 iflag=fullblock | sha256sum";
    let first = guest.run(read)?;
    ensure!(guest.run(read)? != first, "the source repeats itself");
    let size = guest.run("dd if=/dev/hwrng bs=4096 count=4 iflag=fullblock | gzip | wc -c")?;
    let size: u32 = size.trim().parse()?;
    ensure!(
        size > 16_000,
        "16 KiB of entropy were compressed to {size} bytes"
    );
    guest.power_off()?;
    Ok(())
}
