//! Whole VMs with tiny guests, through the binary: devices behind vIOMMUs, signals, restarts.

#[cfg(test)]
mod run {
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    const NESTLING: &str = env!("CARGO_BIN_EXE_nestling");

    /// A directory with a kernel that runs `code` at its 64-bit entry, and a disk.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str, code: &[u8]) -> Option<Self> {
            if fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .is_err()
            {
                println!("skipped: /dev/kvm cannot be opened here");
                return None;
            }
            let path = std::env::temp_dir().join(format!("nestling-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            let mut image = vec![0; 5 * 512 + 0x1000];
            image[0x1f1] = 4;
            image[0x1f4..0x1f8].copy_from_slice(&0x100u32.to_le_bytes());
            image[0x202..0x206].copy_from_slice(b"HdrS");
            image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
            image[0x211] = 1;
            image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
            image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
            image[0x236] = 1;
            image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
            let entry = 5 * 512 + 0x200;
            image[entry..entry + code.len()].copy_from_slice(code);
            fs::write(path.join("kernel"), image).unwrap();
            fs::write(path.join("disk"), vec![0; 1 << 20]).unwrap();
            Some(Self(path))
        }

        fn start(&self, options: &[&str]) -> Child {
            Command::new(NESTLING)
                .args([
                    "run", "--memory", "size=64M", "--serial", "null", "--kernel",
                ])
                .arg(self.0.join("kernel"))
                .args(options)
                .stdin(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        }

        fn disk(&self, more: &str) -> String {
            format!("path={}{more}", self.0.join("disk").display())
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn status(mut child: Child) -> i32 {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code().unwrap();
            }
            if Instant::now() > end {
                child.kill().unwrap();
                panic!("nestling did not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(child: &Child, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    /// mov al, 7; out 0xf4, al; hlt
    const EXIT: &[u8] = &[0xb0, 7, 0xe6, 0xf4, 0xf4];
    /// jmp to itself
    const SPIN: &[u8] = &[0xeb, 0xfe];

    #[test]
    fn devices_are_put_behind_each_kind_of_viommu() {
        let Some(scratch) = Scratch::new("viommus", EXIT) else {
            return;
        };
        for viommu in [
            "type=vtd",
            "type=vtd,mode=legacy,address_width=39",
            "type=vtd,nested=on,interrupt_remapping=on,pasid_bits=16",
            "type=virtio,bypass=on",
        ] {
            let child = scratch.start(&[
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
            ]);
            assert_eq!(status(child), 7, "{viommu}");
        }
    }

    #[test]
    fn a_running_vm_tells_the_state_of_its_viommus_and_ends_by_a_signal() {
        let Some(scratch) = Scratch::new("state", SPIN) else {
            return;
        };
        let mut child = scratch.start(&[
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
        ]);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        // The signals are blocked once KVM is open; before, SIGUSR1 would end the process.
        std::thread::sleep(Duration::from_millis(500));
        signal(&child, "USR1");
        let state = lines.next().unwrap().unwrap();
        let state: serde_json::Value = serde_json::from_str(&state).unwrap();
        let viommus = state["viommus"].as_array().unwrap();
        assert_eq!(viommus[0]["type"], "vtd");
        assert_eq!(viommus[1]["type"], "virtio");
        assert_eq!(viommus[1]["endpoints"].as_array().unwrap().len(), 1);
        signal(&child, "TERM");
        assert_eq!(status(child), 128 + 15);
    }

    #[test]
    fn a_reset_restarts_the_vm_or_ends_it_as_the_user_said() {
        // mov dx, 0x602; mov al, 1; out dx, al; hlt: the ACPI reset register.
        const RESET: &[u8] = &[0x66, 0xba, 0x02, 0x06, 0xb0, 1, 0xee, 0xf4];
        let Some(scratch) = Scratch::new("reset", RESET) else {
            return;
        };
        let disk = scratch.disk(",iommu=on");
        let child = scratch.start(&["--platform", "on_reboot=exit", "--disk", &disk]);
        assert_eq!(status(child), 3);

        // Without the option it goes round and round, and holds no more than after a while.
        let child = scratch.start(&["--disk", &disk]);
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
        signal(&child, "INT");
        assert_eq!(status(child), 128 + 2);
    }

    #[test]
    fn a_power_off_is_status_0() {
        // mov dx, 0x600; mov al, 0x34; out dx, al; hlt: SLP_TYP 5, SLP_EN.
        const OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];
        let Some(scratch) = Scratch::new("off", OFF) else {
            return;
        };
        assert_eq!(status(scratch.start(&["--cpus", "boot=8"])), 0);
    }
}
