//! `cargo demo`: one guest, shown.

use crate::harness::{Guest, Test, show};

/// The tests.
pub const TESTS: &[Test] = &[Test::new("a_guest", |lab| {
    let mut guest = Guest::debian("7.2")
        .cpus(2)
        .memory("size=1G")
        .verbose()
        .boot(lab)?;
    let seconds = guest.age().as_secs_f64();
    let system = guest.run("uname -srv; nproc; free -m | sed -n 2p; ls /sys/bus/pci/devices")?;
    let ended = guest.power_off()?;
    show("The guest's console:");
    show(&ended.console);
    show(format!(
        "\nIt took commands after {seconds:.1} s. What it says of itself:"
    ));
    show(&system);
    show("\nProved: nestling booted Debian's kernel, its virtio console carried these commands,");
    show("its log has no complaint, and its power-off ended nestling with status 0.");
    Ok(())
})
.on_request()];
