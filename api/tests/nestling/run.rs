//! Whole VMs with tiny guests, through the binary: devices behind vIOMMUs, signals, restarts.

use std::fs;
use std::io::{BufRead, BufReader};
use std::time::Duration;

use super::support::{Running, Scratch, guest, wait_until};

#[test]
fn devices_are_put_behind_each_kind_of_viommu() {
    let Some(scratch) = Scratch::with_guest("viommus", guest::EXIT_42) else {
        return;
    };
    for viommu in [
        "type=vtd",
        "type=vtd,mode=legacy,address_width=39",
        "type=vtd,nested=on,interrupt_remapping=on,pasid_bits=16",
        "type=virtio,bypass=on",
    ] {
        let mut child = Running::guest(
            &scratch,
            &[
                "--viommu",
                viommu,
                "--disk",
                &scratch.disk(",iommu=on"),
                "--rng",
                "viommu=viommu0",
                "--test-device",
                "iommu=on",
                "--platform",
                "debug_exit=on",
            ],
        );
        assert_eq!(child.status(), 42, "{viommu}");
    }
}

#[test]
fn a_running_vm_tells_the_state_of_its_viommus_and_ends_by_a_signal() {
    let Some(scratch) = Scratch::with_guest("state", guest::SPIN) else {
        return;
    };
    let mut child = Running::guest(
        &scratch,
        &[
            "--viommu",
            "type=vtd,id=a",
            "--viommu",
            "type=virtio,id=b",
            "--disk",
            &scratch.disk(",viommu=a"),
            "--rng",
            "viommu=b",
            "--cpus",
            "boot=3",
        ],
    );
    let mut lines = BufReader::new(child.child().stderr.take().unwrap()).lines();
    // Before it is blocked, SIGUSR1 would end the process.
    wait_until("SIGUSR1 is not blocked", || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let blocked = status.lines().find_map(|l| l.strip_prefix("SigBlk:"));
        let blocked = blocked.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
        blocked.is_some_and(|set| set & 1 << 9 != 0)
    });
    child.signal("USR1");
    let state = lines.next().unwrap().unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    let viommus = state["viommus"].as_array().unwrap();
    assert_eq!(viommus[0]["type"], "vtd");
    assert_eq!(viommus[1]["type"], "virtio");
    assert_eq!(viommus[1]["endpoints"].as_array().unwrap().len(), 1);
    child.signal("TERM");
    assert_eq!(child.status(), 128 + 15);
}

#[test]
fn a_reset_restarts_the_vm_or_ends_it_as_the_user_said() {
    let Some(scratch) = Scratch::with_guest("reset", guest::RESET) else {
        return;
    };
    let disk = scratch.disk(",iommu=on");
    let mut child = Running::guest(&scratch, &["--platform", "on_reboot=exit", "--disk", &disk]);
    assert_eq!(child.status(), 3);

    // Without the option it goes round and round, and holds no more than after a while.
    let mut child = Running::guest(&scratch, &["--disk", &disk]);
    let fds = || {
        fs::read_dir(format!("/proc/{}/fd", child.id()))
            .unwrap()
            .count()
    };
    std::thread::sleep(Duration::from_millis(1500));
    let most = (0..20)
        .map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            fds()
        })
        .max()
        .unwrap();
    assert!(most < 150, "{most} descriptors after many restarts");
    child.signal("INT");
    assert_eq!(child.status(), 128 + 2);
}

#[test]
fn a_power_off_is_status_0() {
    let Some(scratch) = Scratch::with_guest("off", guest::POWER_OFF) else {
        return;
    };
    assert_eq!(Running::guest(&scratch, &["--cpus", "boot=8"]).status(), 0);
}
