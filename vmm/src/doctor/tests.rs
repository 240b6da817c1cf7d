//! The doctor on hosts that are written down.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use vmm_sys_util::tempdir::TempDir;

use super::{Finding, Model, Report, Roots};

/// A host's files below a temporary directory.
struct Tree {
    dir: TempDir,
}

/// Registers with everything that nestling uses, and interrupt remapping.
const CAP: &str = "1100000c00380006";
const ECAP: &str = "1fd9ca400008c";

impl Tree {
    fn new() -> Self {
        let tree = Self {
            dir: TempDir::new().unwrap(),
        };
        tree.file("dev/kvm", "");
        tree.file("dev/iommu", "");
        tree.file("proc/cmdline", "root=/dev/vda intel_iommu=on,sm_on");
        tree.file(
            "proc/self/limits",
            "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608              8388608              bytes",
        );
        tree
    }

    /// With one VT-d unit.
    fn vtd(cap: &str, ecap: &str) -> Self {
        let tree = Self::new();
        tree.file("sys/class/iommu/dmar0/intel-iommu/cap", cap);
        tree.file("sys/class/iommu/dmar0/intel-iommu/ecap", ecap);
        tree
    }

    fn root(&self) -> &Path {
        self.dir.as_path()
    }

    fn file(&self, path: &str, contents: impl AsRef<[u8]>) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn device(&self, address: &str, class: &str, driver: Option<&str>, group: Option<u32>) {
        let at = format!("sys/bus/pci/devices/{address}");
        self.file(&format!("{at}/class"), class);
        self.file(&format!("{at}/vendor"), "0x8086\n");
        self.file(&format!("{at}/device"), "0x0b60\n");
        self.file(&format!("{at}/config"), config());
        if let Some(driver) = driver {
            self.link(
                &format!("{at}/driver"),
                &format!("../../../bus/pci/drivers/{driver}"),
            );
        }
        if let Some(group) = group {
            self.link(
                &format!("{at}/iommu_group"),
                &format!("../../../kernel/iommu_groups/{group}"),
            );
            self.link(&format!("{at}/iommu"), "../../virtual/iommu/dmar0");
            let group = format!("sys/kernel/iommu_groups/{group}");
            self.file(&format!("{group}/devices/{address}"), "");
            self.file(
                &format!("{group}/reserved_regions"),
                "0x00000000fee00000 0x00000000feefffff msi\n",
            );
        }
    }

    /// Bound to vfio-pci, with its character device.
    fn bound(&self, address: &str) {
        self.device(address, "0x010802", Some("vfio-pci"), Some(7));
        self.file(
            &format!("sys/bus/pci/devices/{address}/vfio-dev/vfio0/dev"),
            "511:0",
        );
        self.file("dev/vfio/devices/vfio0", "");
    }

    fn report(&self) -> Report {
        Report::examine(&Roots {
            sys: self.root().join("sys"),
            dev: self.root().join("dev"),
            proc: self.root().join("proc"),
        })
    }
}

/// Configuration space with ATS, PRI and a PASID capability of 20 bits.
fn config() -> Vec<u8> {
    let mut config = vec![0; 4096];
    let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0x100, 0x0f | 1 << 16 | 0x200 << 20);
    put(0x200, 0x13 | 1 << 16 | 0x300 << 20);
    put(0x300, 0x1b | 1 << 16);
    put(0x304, 20 << 8);
    config
}

fn mode<'a>(report: &'a Report, name: &str) -> &'a Finding {
    &report.devices[0].modes[name]
}

#[test]
fn a_host_that_can_do_everything_says_yes_to_everything() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    let report = tree.report();
    assert!(report.kvm.ok && report.iommufd.ok);
    for (name, finding) in &report.devices[0].modes {
        assert!(finding.ok, "{name}: {finding:?}");
    }
    assert_eq!(mode(&report, "pasid").what, "20 bits");
    let Model::Vtd {
        address_width,
        domain_ids,
        ..
    } = report.iommus[0].model
    else {
        panic!("{:?}", report.iommus);
    };
    assert_eq!((address_width, domain_ids), (57, 65536));
    let reserved = &report.devices[0].reserved[0];
    assert_eq!(
        (reserved.first, reserved.kind.as_str()),
        (0xfee0_0000, "msi")
    );
}

#[test]
fn every_no_has_a_reason_and_every_reason_that_can_be_mended_its_remedy() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.device("0000:01:00.0", "0x010802", Some("nvme"), Some(7));
    let report = tree.report();
    let finding = mode(&report, "device");
    assert!(!finding.ok && finding.what.contains("nvme"));
    let remedy = finding.remedy.as_ref().unwrap();
    for part in [
        "driver_override",
        "driver/unbind",
        "drivers_probe",
        "0000:01:00.0",
    ] {
        assert!(remedy.contains(part), "{remedy}");
    }
    // What cannot be, because the device cannot be, says the same.
    assert_eq!(mode(&report, "nested"), finding);
}

#[test]
fn a_device_without_a_driver_is_not_told_to_unbind_one() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.device("0000:01:00.0", "0x010802", None, Some(7));
    let remedy = mode(&tree.report(), "device").remedy.clone().unwrap();
    assert!(!remedy.contains("unbind"), "{remedy}");
}

#[test]
fn a_group_shared_with_a_bound_host_driver_is_named() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    tree.device("0000:01:00.1", "0x020000", Some("igb"), Some(7));
    tree.device("0000:00:1c.0", "0x060400", Some("pcieport"), Some(7));
    let report = tree.report();
    let finding = mode(&report, "device");
    assert!(finding.what.contains("0000:01:00.1") && finding.what.contains("igb"));
    // A bridge is in nobody's way, and is not offered.
    assert_eq!(report.devices.len(), 2);
    assert_eq!(report.devices[0].members.len(), 2);
}

#[test]
fn without_an_iommu_the_firmware_is_named() {
    let tree = Tree::new();
    tree.device("0000:01:00.0", "0x010802", Some("vfio-pci"), None);
    let report = tree.report();
    assert!(
        mode(&report, "device")
            .remedy
            .as_ref()
            .unwrap()
            .contains("firmware")
    );
    assert!(report.to_string().contains("No IOMMU"));
}

#[test]
fn without_iommufd_the_device_goes_to_the_guest_and_no_viommu_in_front_of_it() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    fs::remove_file(tree.root().join("dev/iommu")).unwrap();
    assert!(!mode(&tree.report(), "device").ok, "no container either");
    tree.file("dev/vfio/vfio", "");
    let report = tree.report();
    let device = mode(&report, "device");
    assert!(
        device.ok && device.what.contains("by its group"),
        "{device:?}"
    );
    for name in ["viommu=vtd", "viommu=virtio", "nested", "pasid"] {
        let finding = mode(&report, name);
        assert!(!finding.ok && finding.remedy.as_ref().unwrap().contains("CONFIG_IOMMUFD"));
    }
}

#[test]
fn a_unit_without_nesting_mirrors_second_stage_tables_and_says_why() {
    // SMTS, no NEST
    let tree = Tree::vtd(CAP, "1fd9ca000008c");
    tree.bound("0000:01:00.0");
    let report = tree.report();
    assert!(mode(&report, "nested").what.contains("ECAP.NEST"));
    let vtd = mode(&report, "viommu=vtd");
    assert!(vtd.ok && vtd.what.contains("mirrored") && vtd.what.contains("ECAP.NEST"));
    assert!(!mode(&report, "pasid").ok);
}

#[test]
fn scalable_mode_switched_off_on_the_command_line_is_found() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    tree.file("proc/cmdline", "quiet intel_iommu=on,sm_off");
    assert!(
        mode(&tree.report(), "nested")
            .remedy
            .as_ref()
            .unwrap()
            .contains("sm_off")
    );
}

#[test]
fn interrupts_that_are_not_remapped_are_a_no_unless_they_are_allowed() {
    let tree = Tree::vtd(CAP, "1fd9ca4000084");
    tree.bound("0000:01:00.0");
    assert!(mode(&tree.report(), "device").what.contains("interrupts"));
    tree.file(
        "sys/module/iommufd/parameters/allow_unsafe_interrupts",
        "Y\n",
    );
    assert!(mode(&tree.report(), "device").ok);
}

#[test]
fn firmware_memory_keeps_a_device_on_the_host() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    tree.file(
        "sys/kernel/iommu_groups/7/reserved_regions",
        "0x000000007b800000 0x000000007fffffff direct\n0x00000000fee00000 0x00000000feefffff msi\n",
    );
    let report = tree.report();
    let finding = mode(&report, "device");
    assert!(finding.what.contains("0x7b800000") && finding.remedy.is_none());
}

#[test]
fn what_only_root_can_read_is_unknown_and_not_no() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    tree.file("sys/bus/pci/devices/0000:01:00.0/config", [0; 64]);
    let report = tree.report();
    assert_eq!(report.devices[0].pri, None);
    assert!(
        mode(&report, "page-requests")
            .remedy
            .as_ref()
            .unwrap()
            .contains("root")
    );
}

#[test]
fn a_virtual_function_has_pasids_by_its_parent_and_never_page_requests() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.1");
    tree.file("sys/bus/pci/devices/0000:01:00.1/config", [0; 4096]);
    tree.link("sys/bus/pci/devices/0000:01:00.1/physfn", ".");
    let report = tree.report();
    assert!(mode(&report, "pasid").ok);
    assert!(
        mode(&report, "page-requests")
            .what
            .contains("virtual functions")
    );
}

#[test]
fn the_locked_memory_limit_is_in_mebibytes_with_its_remedy() {
    let report = Tree::new().report();
    assert!(report.locked_memory.what.starts_with("8 MiB"));
    assert!(report.locked_memory.remedy.unwrap().contains("ulimit -l"));
}

#[test]
fn a_user_whose_memory_is_not_limited_is_not_told_to_raise_the_limit() {
    let tree = Tree::new();
    tree.file(
        "proc/self/status",
        "Name:\tnestling\nCapEff:\t000001ffffffffff\n",
    );
    assert!(tree.report().locked_memory.ok);
    tree.file("proc/self/status", "CapEff:\t0000000000000000\n");
    assert!(!tree.report().locked_memory.ok);
}

#[test]
fn people_read_one_reason_once() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.device("0000:01:00.0", "0x010802", Some("nvme"), Some(7));
    let text = tree.report().to_string();
    assert_eq!(text.matches("host's driver nvme").count(), 1, "{text}");
    assert!(text.contains("nor: nested, page-requests, pasid"), "{text}");
}

#[test]
fn an_amd_host_gets_an_answer_too() {
    let tree = Tree::new();
    tree.file(
        "sys/class/iommu/ivhd0/amd-iommu/features",
        "a5bf7ffa2254ada:0\n",
    );
    tree.device("0000:01:00.0", "0x010802", Some("vfio-pci"), Some(7));
    let report = tree.report();
    assert!(matches!(report.iommus[0].model, Model::Amd { .. }));
    assert!(!report.to_string().is_empty());
}

#[test]
fn an_empty_or_broken_tree_is_an_answer_and_no_panic() {
    let tree = Tree::vtd("not a number", "");
    tree.file("sys/bus/pci/devices/0000:01:00.0/class", "zebra");
    tree.file("sys/bus/pci/devices/0000:02:00.0/class", "0x010802");
    let report = tree.report();
    assert!(report.devices.is_empty());
    // A capability list that leads in a circle ends.
    let mut circle = vec![0; 4096];
    circle[0x100..0x104].copy_from_slice(&(0x0fu32 | 1 << 16 | 0x100 << 20).to_le_bytes());
    tree.device("0000:03:00.0", "0x010802", None, None);
    tree.file("sys/bus/pci/devices/0000:03:00.0/config", circle);
    assert_eq!(tree.report().devices[0].ats, Some(true));
}

#[test]
fn programs_get_the_same_as_json() {
    let tree = Tree::vtd(CAP, ECAP);
    tree.bound("0000:01:00.0");
    let json = serde_json::to_value(tree.report()).unwrap();
    assert_eq!(json["devices"][0]["modes"]["nested"]["ok"], true);
    assert_eq!(json["iommus"][0]["model"], "vtd");
    assert_eq!(json["iommus"][0]["address_width"], 57);
    assert_eq!(json["devices"][0]["group"], 7);
}
