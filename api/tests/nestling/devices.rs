//! Devices that come and go over the API, from one client and from several, and what others see
//! while one is stuck.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::support::{Served, guest, has_kvm, wait_until};

/// A VM that runs, whose guest lets go of what it is asked for; with the vIOMMU `unit`, and `d`
/// behind it.
fn running(name: &str) -> Option<Served> {
    if !has_kvm() {
        return None;
    }
    let nestling = Served::start_with_guest(name, guest::LETS_GO);
    let mut config = nestling.config();
    config["viommus"] = json!([{ "type": "Vtd", "id": "unit" }]);
    assert_eq!(nestling.put("vm.create", &config).0, 204);
    assert_eq!(nestling.put("vm.boot", &Value::Null).0, 204);
    Some(nestling)
}

impl Served {
    /// A disk of its own.
    fn disk(&self, id: &str, viommu: Option<&str>) -> Value {
        let path = self.scratch.file(&format!("{id}.img"), &[0; 4096]);
        json!({ "path": path, "id": id, "viommu": viommu })
    }

    /// The events since the start, names and properties, when `removed` devices are gone.
    fn events(&self, removed: usize) -> Vec<(String, Value)> {
        // They are written after those who wait were answered.
        wait_until("an event is not written", || {
            let lines = fs::read_to_string(self.scratch.at("events")).unwrap();
            let told = lines.matches("\"device-removed\"").count();
            told >= removed && lines.ends_with('\n')
        });
        let lines = fs::read_to_string(self.scratch.at("events")).unwrap();
        let records = lines
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap());
        let event = |r: Value| (r["event"].as_str().unwrap().into(), r["properties"].clone());
        records.map(event).collect()
    }
}

#[test]
fn devices_that_come_and_go_are_told_and_leave_nothing() {
    let Some(nestling) = running("come-and-go") else {
        return;
    };
    let state = || {
        let (info, viommu) = (nestling.get("vm.info").1, nestling.get("vm.viommu").1);
        (info["device_tree"].clone(), info["config"].clone(), viommu)
    };
    let before = state();
    for (n, viommu) in [None, Some("unit"), None, Some("unit")]
        .into_iter()
        .enumerate()
    {
        let disk = nestling.disk("data", viommu);
        let (status, added) = nestling.put("vm.add-disk", &disk);
        assert_eq!((status, &added["id"]), (200, &json!("data")), "{added}");
        let node = &state().0["data"];
        assert_eq!(node["pci_bdf"], added["bdf"]);
        assert_eq!(node["viommu"], json!(viommu));
        assert!(nestling.get("vm.counters").1["data"]["read_ops"].is_u64());
        let (status, twice) = nestling.put("vm.add-disk", &disk);
        assert_eq!((status, &twice["code"]), (409, &json!("id-in-use")));
        // The same file under another name.
        let again = json!({ "path": disk["path"], "id": "again" });
        let (status, locked) = nestling.put("vm.add-disk", &again);
        assert_eq!((status, &locked["code"]), (422, &json!("host-refused")));
        // With the guest's word, and without it.
        let how = json!({ "id": "data", "force": n > 1, "timeout": if n > 1 { 0 } else { 60 } });
        assert_eq!(nestling.put("vm.remove-device", &how).0, 204);
        assert_eq!(state(), before);
        assert!(nestling.get("vm.counters").1["data"].is_null());
    }
    let told: Vec<String> = nestling
        .events(4)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let each = ["device-added", "device-refused", "device-removed"];
    assert_eq!(told[3..], each.repeat(4), "{told:?}");
    let (_, refused) = &nestling.events(4)[4];
    assert_eq!(
        (&refused["id"], &refused["step"]),
        (&json!("again"), &json!("open"))
    );
}

#[test]
fn clients_at_once_find_one_vm_that_makes_sense() {
    let Some(nestling) = running("at-once") else {
        return;
    };
    let before = nestling.get("vm.info").1["device_tree"].clone();
    // Each client has a device of its own, and one that all want.
    let all = nestling.disk("shared", None);
    let come_and_go = &|client: usize| {
        let own = nestling.disk(
            &format!("own{client}"),
            client.is_multiple_of(2).then_some("unit"),
        );
        let remove = |id: &Value| {
            let remove = json!({ "id": id, "timeout": 60 });
            assert_eq!(nestling.put("vm.remove-device", &remove).0, 204);
        };
        let mut shared = 0;
        for _ in 0..20 {
            assert_eq!(nestling.put("vm.add-disk", &own).0, 200);
            let (status, said) = nestling.put("vm.add-disk", &all);
            assert!(matches!(status, 200 | 409), "{said}");
            remove(&own["id"]);
            if status == 200 {
                remove(&all["id"]);
                shared += 1;
            }
        }
        shared
    };
    let watch = || {
        let tree = nestling.get("vm.info").1["device_tree"].clone();
        let nodes = tree.as_object().unwrap().values();
        let places: BTreeSet<&str> = nodes.map(|n| n["pci_bdf"].as_str().unwrap()).collect();
        let count = tree.as_object().unwrap().len();
        assert_eq!(places.len(), count, "two devices in one place: {tree:#}");
    };
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|n| scope.spawn(move || come_and_go(n)))
            .collect();
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                watch();
            }
        });
        let shared: Vec<_> = clients.into_iter().map(|c| c.join()).collect();
        ends.store(true, Ordering::Relaxed);
        let shared: u32 = shared.into_iter().map(|client| client.unwrap()).sum();
        assert!(shared > 0);
        let told = nestling.events(80 + shared as usize);
        let count = |name: &str| told.iter().filter(|(event, _)| event == name).count() as u32;
        assert_eq!(count("device-added"), 80 + shared);
        assert_eq!(count("device-removed"), 80 + shared);
    });
    assert_eq!(nestling.get("vm.info").1["device_tree"], before);
    // What was told, one after the other, makes sense, too.
    let mut there: Vec<Value> = Vec::new();
    for (event, device) in nestling.events(80) {
        match &*event {
            "device-added" => {
                let free = there
                    .iter()
                    .all(|other| other["id"] != device["id"] && other["bdf"] != device["bdf"]);
                assert!(free, "{device} was added beside {there:?}");
                there.push(device);
            }
            "device-removed" => {
                let at = there.iter().position(|other| *other == device).unwrap();
                there.remove(at);
            }
            _ => {}
        }
    }
    assert!(there.is_empty());
}

/// The kernel keeps who opens a FIFO that nobody writes to, for as long as it likes; so a file of
/// the host's sysfs that is one stands for a kernel that does not come back.
#[test]
fn while_an_add_is_stuck_in_the_kernel_everyone_else_is_answered() {
    let Some(nestling) = running("stuck") else {
        return;
    };
    let device = nestling.scratch.at("device");
    fs::create_dir_all(device.join("vfio-dev")).unwrap();
    fs::create_dir_all(device.join("iommu_group")).unwrap();
    let fifo = device.join("iommu_group/reserved_regions");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let operation = || nestling.get("vm.info").1["operation"].clone();
    let add = json!({ "path": device, "id": "host" });
    std::thread::scope(|scope| {
        let stuck = scope.spawn(|| nestling.put("vm.add-device", &add));
        wait_until("the add does not begin", || {
            let operation = operation();
            operation["name"] == "vm.add-device" && operation["step"] == "reserved-regions"
        });
        let mut slowest = Duration::ZERO;
        for _ in 0..200 {
            let begun = Instant::now();
            assert_eq!(nestling.get("vm.info").0, 200);
            slowest = slowest.max(begun.elapsed());
        }
        println!("vm.info while an add is stuck: at most {slowest:?}");
        for request in [
            "vmm.ping",
            "vm.counters",
            "vm.viommu",
            "host.info",
            "openapi.json",
        ] {
            assert_eq!(nestling.get(request).0, 200, "{request}");
        }
        // Those that need the thread that is stuck wait for it, or are told to come back.
        let waiting: Vec<_> = (0..20)
            .map(|_| scope.spawn(|| nestling.put("vm.power-button", &Value::Null).0))
            .collect();
        wait_until("nobody is told to come back", || {
            waiting.iter().any(|client| client.is_finished())
        });
        assert!(!stuck.is_finished());
        // An empty file, in the end: nothing is reserved.
        drop(fs::File::options().write(true).open(&fifo).unwrap());
        let (status, refused) = stuck.join().unwrap();
        assert_eq!((status, &refused["code"]), (422, &json!("host-refused")));
        let answers: Vec<u16> = waiting.into_iter().map(|c| c.join().unwrap()).collect();
        assert!(
            answers.contains(&204) && answers.contains(&429),
            "{answers:?}"
        );
        assert!(
            answers.iter().all(|s| matches!(s, 204 | 429)),
            "{answers:?}"
        );
    });
    assert!(operation().is_null());
    assert!(nestling.get("vm.info").1["device_tree"]["host"].is_null());
}
