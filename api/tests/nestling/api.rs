//! The API of a real nestling, over its socket: every status, what clients do wrong, and what the
//! document promises.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

use serde_json::{Value, json};

use super::document::{DOCUMENT, matches_schema};
use super::support::{NESTLING, Served, has_kvm, wait_until};

#[test]
fn what_the_state_does_not_allow_is_told_by_status_and_code() {
    let mut nestling = Served::start("states");
    let refused = |(status, body): (u16, Value), expected: u16, code: &str| {
        assert_eq!((status, &body["code"]), (expected, &json!(code)), "{body}");
        assert!(
            body["message"].is_string() && body["remedy"].is_string(),
            "{body}"
        );
    };
    let nothing = Value::Null;
    let (status, ping) = nestling.get("vmm.ping");
    assert_eq!((status, &ping["pid"]), (200, &json!(nestling.running.id())));
    for request in [
        "boot",
        "shutdown",
        "delete",
        "reboot",
        "power-button",
        "pause",
        "resume",
    ] {
        let request = format!("vm.{request}");
        refused(nestling.put(&request, &nothing), 404, "vm-not-created");
    }
    for request in ["vm.info", "vm.counters", "vm.viommu"] {
        refused(nestling.get(request), 404, "vm-not-created");
    }
    refused(nestling.get("vm.nothing"), 404, "no-such-path");
    refused(nestling.get("vm.boot"), 405, "method-not-allowed");
    assert_eq!(nestling.put("vm.create", &nestling.config()).0, 204);
    refused(
        nestling.put("vm.create", &nestling.config()),
        409,
        "vm-already-created",
    );
    for request in ["shutdown", "reboot", "power-button", "pause", "resume"] {
        refused(
            nestling.put(&format!("vm.{request}"), &nothing),
            409,
            "wrong-state",
        );
    }
    refused(nestling.get("vm.viommu"), 409, "wrong-state");
    let (status, info) = nestling.get("vm.info");
    assert_eq!((status, &info["state"]), (200, &json!("Created")));
    assert_eq!(info["config"]["viommus"].as_array().unwrap().len(), 1);

    // Before the boot, devices are changes of the configuration.
    let disk = json!({ "path": nestling.scratch.at("disk") });
    assert_eq!(nestling.put("vm.add-disk", &disk).0, 204);
    let twice = json!({ "path": nestling.scratch.at("disk"), "id": "d" });
    refused(nestling.put("vm.add-disk", &twice), 409, "id-in-use");
    let (_, info) = nestling.get("vm.info");
    assert_eq!(info["config"]["disks"][1]["id"], "_disk0");
    assert_eq!(
        nestling
            .put("vm.remove-device", &json!({ "id": "_disk0" }))
            .0,
        204
    );
    let gone = nestling.put("vm.remove-device", &json!({ "id": "_disk0" }));
    refused(gone, 404, "no-such-device");
    assert_eq!(nestling.put("vm.delete", &nothing).0, 204);

    // A kernel that is not there is told when it is opened.
    let mut config = nestling.config();
    config["payload"]["kernel"] = json!("/nowhere");
    assert_eq!(nestling.put("vm.create", &config).0, 204);
    if has_kvm() {
        refused(nestling.put("vm.boot", &nothing), 422, "host-refused");
        assert_eq!(nestling.get("vm.info").1["state"], "Created");
    }
    assert_eq!(nestling.get("host.info").0, 200);
    let (status, document) = nestling.get("openapi.json");
    assert_eq!((status, &document["openapi"]), (200, &json!("3.1.0")));
    assert_eq!(nestling.put("vmm.shutdown", &nothing).0, 204);
    assert_eq!(nestling.running.status(), 0);
    assert!(!nestling.socket().exists());
    assert_eq!(
        fs::read_dir(nestling.scratch.path()).unwrap().count(),
        2,
        "a lock is left"
    );
}

#[test]
fn bad_bodies_are_refused_with_the_field_that_is_wrong() {
    let nestling = Served::start("bodies");
    let table = [
        ("vm.create", json!(7), ""),
        ("vm.create", json!({}), ""),
        ("vm.create", json!({ "payload": {} }), "payload.kernel"),
        (
            "vm.create",
            json!({ "payload": { "kernel": 7 } }),
            "payload.kernel",
        ),
        (
            "vm.create",
            json!({ "payload": { "kernel": "k" }, "disk": [] }),
            "disk",
        ),
        (
            "vm.create",
            json!({ "payload": { "kernel": "k" }, "disks": {} }),
            "disks",
        ),
        (
            "vm.create",
            json!({ "payload": { "kernel": "k" }, "disks": [{ "pth": "x" }] }),
            "disks[0].pth",
        ),
        (
            "vm.create",
            json!({ "payload": { "kernel": "k" }, "cpus": { "boot_vcpus": 300 } }),
            "cpus.boot_vcpus",
        ),
        (
            "vm.create",
            json!({ "payload": { "kernel": "k" }, "cpus": { "boot_vcpus": 0 } }),
            "",
        ),
        (
            "vm.create",
            json!({ "payload": { "kernel": "k" }, "balloon": { "size": 1 } }),
            "balloon",
        ),
        ("vm.add-disk", json!({}), "path"),
        (
            "vm.add-disk",
            json!({ "path": "x", "readonly": "yes" }),
            "readonly",
        ),
        (
            "vm.add-disk",
            json!({ "path": "x", "num_queues": 4 }),
            "num_queues",
        ),
        ("vm.add-net", json!({ "tap": "t", "mac": "x" }), "mac"),
        ("vm.add-device", json!({ "id": "x" }), "path"),
        ("vm.remove-device", json!({}), ""),
        ("vm.remove-device", json!({ "id": "x", "forced": true }), ""),
        (
            "vm.remove-device",
            json!({ "id": "x", "timeout": 601 }),
            "timeout",
        ),
    ];
    for (request, body, field) in table {
        let (status, error) = nestling.put(request, &body);
        assert_eq!(status, 400, "{request} {body}: {error}");
        assert_eq!(
            error["field"].as_str().unwrap_or_default(),
            field,
            "{body}: {error}"
        );
    }
    for text in ["", "{", "[1,]", "nul", "\u{0}"] {
        assert_eq!(nestling.ask("PUT", "vm.create", text).0, 400, "{text:?}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(nestling.ask("PUT", "vm.create", &deep).0, 400);
    let large = format!("\"{}\"", "x".repeat(2 << 20));
    assert_eq!(nestling.ask("PUT", "vm.create", &large).0, 413);
    assert_eq!(nestling.get("vm.events?after=x").0, 400);
    // What is no HTTP as it should be is answered, or the client is cut off, and that is all.
    for bytes in [
        &b"hello\r\n\r\n"[..],
        b"GET /api/v1/vmm.ping HTTP/9.9\r\n\r\n",
        b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ] {
        let answer = nestling.raw(bytes);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400"),
            "{answer}"
        );
    }
    let header = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
    let answer = nestling.raw(header.as_bytes());
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    assert_eq!(nestling.get("vmm.ping").0, 200);
}

#[test]
fn a_vm_lives_as_its_client_says_and_its_events_tell_it() {
    if !has_kvm() {
        return;
    }
    let path = std::env::temp_dir().join(format!("nestling-monitor-{}", std::process::id()));
    let monitor = format!("path={}", path.display());
    let mut nestling = Served::start_with("life", &["--event-monitor", &monitor]);
    let nothing = Value::Null;
    let mut follower = nestling.connect();
    follower
        .write_all(b"GET /api/v1/vm.events?after=0 HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    assert_eq!(nestling.put("vm.create", &nestling.config()).0, 204);
    let state = || nestling.get("vm.info").1["state"].clone();
    let put = |request: &str| assert_eq!(nestling.put(request, &nothing), (204, Value::Null));
    put("vm.boot");
    assert_eq!(state(), "Running");
    let (_, info) = nestling.get("vm.info");
    assert_eq!(info["device_tree"]["d"]["kind"], "disk", "{info:#}");
    assert_eq!(nestling.put("vm.boot", &nothing).0, 409);
    assert_eq!(nestling.put("vm.resume", &nothing).0, 409);
    put("vm.pause");
    assert_eq!(state(), "Paused");
    assert_eq!(nestling.put("vm.pause", &nothing).0, 409);
    assert_eq!(nestling.put("vm.power-button", &nothing).0, 409);
    put("vm.resume");
    put("vm.power-button");
    let (status, viommu) = nestling.get("vm.viommu");
    assert_eq!(
        (status, &viommu["viommus"][0]["type"]),
        (200, &json!("vtd"))
    );
    let bdf = info["device_tree"]["d"]["pci_bdf"].as_str().unwrap();
    let (_, one) = nestling.get(&format!("vm.viommu?endpoint={bdf}"));
    assert_eq!(
        one["viommus"][0]["endpoints"].as_array().unwrap().len(),
        1,
        "{one}"
    );
    let (_, none) = nestling.get("vm.viommu?endpoint=00:1e.7");
    assert_eq!(none["viommus"], json!([]));
    assert_eq!(nestling.get("vm.viommu?endpoint=x").0, 400);
    let (status, counters) = nestling.get("vm.counters");
    assert_eq!(status, 200);
    for (device, counter) in [
        ("d", "read_bytes"),
        ("d", "queue0_used"),
        ("__rng", "interrupts"),
        ("viommu0", "iotlb_invalidations"),
        ("vcpu0", "mmio_writes"),
    ] {
        let count = &counters[device][counter];
        assert!(count.is_u64(), "{device} {counter}: {counters:#}");
    }
    // The guest of two bytes does nothing at all.
    assert_eq!(counters["d"]["read_ops"], 0);
    put("vm.reboot");
    put("vm.shutdown");
    assert_eq!(state(), "Created");
    put("vm.boot");
    put("vm.delete");
    assert_eq!(nestling.get("vm.info").0, 404);
    put("vmm.shutdown");
    assert_eq!(nestling.running.status(), 0);

    let expected = [
        "created", "booting", "booted", "paused", "resumed", "rebooted", "booting", "booted",
        "shutdown", "booting", "booted", "shutdown", "deleted",
    ];
    let mut streamed = String::new();
    follower.read_to_string(&mut streamed).unwrap();
    let names: Vec<&str> = streamed
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    assert_eq!(names, expected, "{streamed}");
    let lines = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let written: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for (n, record) in written.iter().enumerate() {
        assert_eq!(record["event"], expected[n]);
        matches_schema(
            &document,
            &document["components"]["schemas"]["Record"],
            record,
        );
    }
    assert_eq!(written.len(), expected.len());
}

#[test]
fn the_socket_is_for_one_user_and_one_nestling_and_a_stale_one_is_replaced() {
    let mut first = Served::start("socket");
    let mode = fs::metadata(first.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let start = |path: &std::path::Path| {
        Command::new(NESTLING)
            .args(["run", "--api-socket"])
            .arg(path)
            .output()
            .unwrap()
    };
    let second = start(&first.socket());
    assert_eq!(second.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another nestling"));
    assert_eq!(first.get("vmm.ping").0, 200);
    // The socket that is left of one that was killed is taken over.
    first.running.signal("KILL");
    first.running.child().wait().unwrap();
    assert!(first.socket().exists());
    first.running = Served::serve(&first.scratch, &[]);
    assert_eq!(first.get("vmm.ping").0, 200);
    let file = start(&first.scratch.at("disk"));
    assert!(String::from_utf8_lossy(&file.stderr).contains("is no socket"));
    assert!(first.scratch.at("disk").exists());
}

#[test]
fn many_clients_are_served_and_slow_ones_are_cut_off() {
    let nestling = Served::start("clients");
    let slow: Vec<UnixStream> = (0..40)
        .map(|n| {
            let mut stream = nestling.connect();
            let half: &[u8] = match n % 3 {
                0 => b"",
                1 => b"GET /api/v1/vmm.ping HT",
                _ => b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
            };
            stream.write_all(half).unwrap();
            stream
        })
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..40 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert_eq!(nestling.get("vmm.ping").0, 200);
                }
            });
        }
    });
    for (n, mut stream) in slow.into_iter().enumerate() {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
            "{n}: {answer}"
        );
    }
    let open: Vec<UnixStream> = (0..128).map(|_| nestling.connect()).collect();
    // All are let in before the next one is looked at.
    let mut more = nestling.connect();
    let mut answer = String::new();
    more.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    drop(open);
    wait_until("those that left still count", || {
        let asked = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        nestling.raw(asked).starts_with("HTTP/1.1 200")
    });
}

#[test]
fn the_client_of_the_command_line_asks_and_shows() {
    let nestling = Served::start("client");
    let api = |words: &[&str]| {
        let output = Command::new(NESTLING)
            .args(["api", "--socket"])
            .arg(nestling.socket())
            .args(words)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code().unwrap(),
            String::from_utf8(text).unwrap(),
        )
    };
    let (status, text) = api(&["ping"]);
    assert!(status == 0 && text.starts_with("nestling "), "{text}");
    let (status, text) = api(&["info"]);
    assert!(
        status == 1 && text.contains("create it first (vm.create) (vm-not-created)"),
        "{text}"
    );
    fs::write(
        nestling.scratch.at("vm.json"),
        nestling.config().to_string(),
    )
    .unwrap();
    let file = nestling.scratch.at("vm.json").display().to_string();
    assert_eq!(api(&["create", &file]), (0, String::new()));
    assert!(api(&["info"]).1.starts_with("Created  1 vCPUs  64 MiB"));
    let disk = format!("path={},id=e", nestling.scratch.at("disk").display());
    assert_eq!(api(&["add-disk", &disk]), (0, String::new()));
    let (_, json) = api(&["info", "--json"]);
    let info: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(info["config"]["disks"][1]["id"], "e");
    assert_eq!(api(&["remove", "e", "--timeout", "1"]), (0, String::new()));
    assert_eq!(api(&["add-disk", "pth=x"]).0, 2);
    assert_eq!(api(&["remove", "e"]).0, 1);
    if has_kvm() {
        assert_eq!(api(&["boot"]), (0, String::new()));
        assert!(api(&["info"]).1.contains("disk"));
        assert!(api(&["viommu"]).1.starts_with("viommu0 (vtd, scalable"));
    }
    assert_eq!(api(&["shutdown-vmm"]), (0, String::new()));
    let shells = Command::new(NESTLING).args(["completion", "bash"]).output();
    assert!(String::from_utf8_lossy(&shells.unwrap().stdout).contains("power-button"));
}

/// What Cloud Hypervisor's ch-remote sends and how it reads, byte for byte: no length without
/// a body, header names in exactly this case, an answer that ends where its length says on a
/// connection that stays open.
#[test]
fn ch_remotes_requests_are_answered_as_it_reads() {
    let nestling = Served::start("ch-remote");
    let ask = |verb: &str, request: &str, body: Option<&str>| -> (u16, Option<String>) {
        let mut stream = nestling.connect();
        stream
            .write_all(
                format!("{verb} /api/v1/{request} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n")
                    .as_bytes(),
            )
            .unwrap();
        if let Some(body) = body {
            let length = format!("Content-Length: {}\r\n", body.len());
            stream.write_all(length.as_bytes()).unwrap();
        }
        stream.write_all(b"\r\n").unwrap();
        stream
            .write_all(body.unwrap_or_default().as_bytes())
            .unwrap();
        let (mut text, mut bytes) = (String::new(), [0; 256]);
        loop {
            let got = stream.read(&mut bytes).unwrap();
            assert!(got > 0, "closed: {text}");
            text.push_str(std::str::from_utf8(&bytes[..got]).unwrap());
            let Some((head, rest)) = text.split_once("\r\n\r\n") else {
                continue;
            };
            let status = head["HTTP/1.1 ".len()..][..3].parse().unwrap();
            let length = head
                .lines()
                .find_map(|l| l.strip_prefix("Content-Length: "));
            match length.map(|l| l.parse::<usize>().unwrap()) {
                None => return (status, None),
                Some(length) if rest.len() >= length => return (status, Some(rest.into())),
                Some(_) => {}
            }
        }
    };
    assert!(ask("GET", "vmm.ping", None).1.unwrap().contains("version"));
    let kernel = nestling.scratch.at("kernel");
    let config = json!({
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "topology": null, "kvm_hyperv": false, "max_phys_bits": 46, "affinity": null, "features": { "amx": false } },
        "memory": { "size": 64 << 20, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null, "hotplugged_size": null, "shared": false, "hugepages": false, "hugepage_size": null, "prefault": false, "zones": null, "thp": true },
        "payload": { "firmware": null, "kernel": kernel, "cmdline": "console=ttyS0", "initramfs": null },
        "rate_limit_groups": null, "disks": null, "net": null,
        "rng": { "src": "/dev/urandom", "iommu": false },
        "balloon": null, "fs": null, "pmem": null,
        "serial": { "file": null, "mode": "Null", "iommu": false, "socket": null },
        "console": { "file": null, "mode": "Off", "iommu": false, "socket": null },
        "devices": null, "user_devices": null, "vdpa": null, "vsock": null, "iommu": false,
        "numa": null, "watchdog": false, "pvpanic": false, "pci_segments": null, "platform": null, "tpm": null,
        "landlock_enable": false, "landlock_rules": null,
    });
    assert_eq!(
        ask("PUT", "vm.create", Some(&config.to_string())),
        (204, None)
    );
    let disk = json!({
        "path": nestling.scratch.at("disk"), "readonly": false, "direct": false, "iommu": false,
        "num_queues": 1, "queue_size": 128, "vhost_user": false, "vhost_socket": null,
        "rate_limit_group": null, "rate_limiter_config": null, "id": "d",
        "disable_io_uring": false, "disable_aio": false, "pci_segment": 0, "serial": null,
        "queue_affinity": null,
    });
    assert_eq!(
        ask("PUT", "vm.add-disk", Some(&disk.to_string())),
        (204, None)
    );
    assert!(
        ask("GET", "vm.info", None)
            .1
            .unwrap()
            .contains("\"Created\"")
    );
    assert_eq!(
        ask("PUT", "vm.remove-device", Some("{\"id\":\"d\"}")),
        (204, None)
    );
    let device = json!({ "path": "/nowhere", "iommu": false, "id": null, "pci_segment": 0 });
    assert_eq!(
        ask("PUT", "vm.add-device", Some(&device.to_string())),
        (204, None)
    );
    assert_eq!(
        ask("PUT", "vm.remove-device", Some("{\"id\":\"_device0\"}")),
        (204, None)
    );
    let (status, error) = ask("PUT", "vm.pause", None);
    assert_eq!(status, 409);
    assert!(error.unwrap().contains("wrong-state"));
    if has_kvm() {
        assert_eq!(ask("PUT", "vm.boot", None), (204, None));
        assert_eq!(ask("PUT", "vm.pause", None), (204, None));
        assert_eq!(ask("PUT", "vm.resume", None), (204, None));
        assert_eq!(ask("PUT", "vm.shutdown", None), (204, None));
    }
}
