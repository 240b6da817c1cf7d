//! What a VM leaves behind when it ends or is built again, and what clients learn of it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::support::{NESTLING, Scratch, Served, guest, has_kvm, wait_until};

/// Bytes of address space that a process has.
fn address_space(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let size = status.lines().find_map(|l| l.strip_prefix("VmSize:"));
    let kib = size.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn a_reboot_needs_no_room_for_the_memory_of_two_vms() {
    if !has_kvm() {
        return;
    }
    let nestling = Served::start("room");
    let mut config = nestling.config();
    config["memory"]["size"] = json!(1u64 << 30);
    assert_eq!(nestling.put("vm.create", &config).0, 204);
    assert_eq!(nestling.put("vm.boot", &Value::Null).0, 204);
    let pid = nestling.running.id();
    let limit = address_space(pid) + (512 << 20);
    let limited = Command::new("prlimit")
        .args([format!("--pid={pid}"), format!("--as={limit}")])
        .status();
    assert!(limited.unwrap().success());
    let (status, why) = nestling.put("vm.reboot", &Value::Null);
    assert_eq!(status, 204, "{why}");
    assert_eq!(nestling.get("vm.info").1["state"], "Running");
}

#[test]
fn a_vm_that_cannot_be_built_again_is_told_to_have_stopped() {
    if !has_kvm() {
        return;
    }
    let mut nestling = Served::start_with_guest("unbuilt", guest::SPIN);
    assert_eq!(nestling.put("vm.create", &nestling.config()).0, 204);
    assert_eq!(nestling.put("vm.boot", &Value::Null).0, 204);
    fs::remove_file(nestling.scratch.at("kernel")).unwrap();
    assert_eq!(nestling.put("vm.reboot", &Value::Null).0, 422);
    assert_eq!(nestling.get("vm.info").1["state"], "Created");
    assert_eq!(nestling.put("vm.boot", &Value::Null).0, 422);
    assert_eq!(nestling.put("vmm.shutdown", &Value::Null).0, 204);
    assert_eq!(nestling.running.status(), 0);
    let lines = fs::read_to_string(nestling.scratch.at("events")).unwrap();
    let records = lines
        .lines()
        .map(|l| serde_json::from_str::<Value>(l).unwrap());
    let told: Vec<Value> = records
        .map(|r| json!([r["event"], r["properties"]["reason"]]))
        .collect();
    let told = json!(told);
    let expected = json!([
        ["created", null],
        ["booting", null],
        ["booted", null],
        ["rebooted", null],
        ["booting", null],
        ["shutdown", "failed"],
        ["booting", null],
        ["shutdown", "failed"],
    ]);
    assert_eq!(told, expected);
}

#[test]
fn more_devices_than_a_bus_has_room_for_are_refused_at_once() {
    let nestling = Served::start("crowd");
    let mut config = nestling.config();
    let disk = json!({ "path": "a" });
    // As many as fit a body.
    config["disks"] = json!(vec![disk.clone(); 70_000]);
    let (status, why) = nestling.put("vm.create", &config);
    assert_eq!(
        (status, &why["code"]),
        (400, &json!("invalid-config")),
        "{why}"
    );
    // They are counted before anything looks at each of them, which would be minutes.
    let reason = why["message"].as_str().unwrap();
    assert!(reason.contains("70000 disks"), "{reason}");
    // Nor one by one, each with a descriptor.
    assert_eq!(nestling.put("vm.create", &nestling.config()).0, 204);
    let answers: Vec<u16> = (0..40)
        .map(|_| nestling.put("vm.add-disk", &disk).0)
        .collect();
    let added = answers.iter().take_while(|status| **status == 204).count();
    assert!(added < 32, "{answers:?}");
    assert!(
        answers[added..].iter().all(|status| *status == 400),
        "{answers:?}"
    );
}

#[test]
fn who_used_force_already_is_not_told_to_use_it() {
    if !has_kvm() {
        return;
    }
    // Its guest lets go of nothing.
    let nestling = Served::start("force");
    assert_eq!(nestling.put("vm.create", &nestling.config()).0, 204);
    assert_eq!(nestling.put("vm.boot", &Value::Null).0, 204);
    let body = json!({ "id": "d", "force": true, "timeout": 600 });
    let text = body.to_string();
    let mut waits = nestling.connect();
    let head = "PUT /api/v1/vm.remove-device HTTP/1.1\r\nHost: x\r\nContent-Length";
    let sent = waits.write_all(format!("{head}: {}\r\n\r\n{text}", text.len()).as_bytes());
    sent.unwrap();
    wait_until("nobody asks the guest", || {
        nestling.get("vm.info").1["device_tree"]["d"]["removing"] == true
    });
    let (status, why) = nestling.put("vm.remove-device", &body);
    assert_eq!((status, &why["code"]), (409, &json!("removal-pending")));
    let remedy = why["remedy"].as_str().unwrap();
    assert!(!remedy.contains("force"), "{remedy}");
    let (_, why) = nestling.put("vm.remove-device", &json!({ "id": "d" }));
    assert_eq!(why["code"], "removal-pending");
}

#[test]
fn a_socket_that_nestling_was_started_with_is_served_if_it_listens() {
    let scratch = Scratch::new("inherited");
    let start = |socket: OwnedFd| {
        let mut command = Command::new("sh");
        let run = format!("exec {NESTLING} run --api-socket fd=7 7<&0 0</dev/null");
        command.args(["-c", &run]).stderr(Stdio::piped());
        Inherits(command.stdin(Stdio::from(socket)).spawn().unwrap())
    };
    let path = scratch.at("s");
    let _serves = start(UnixListener::bind(&path).unwrap().into());
    let mut client = UnixStream::connect(&path).unwrap();
    let request = b"GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n";
    client.write_all(request).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("200 OK"), "{answer}");
    // One that does not would be asked for clients in vain, again and again.
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut refused = start(ours.into());
    wait_until("it waits for clients in vain", || {
        refused.0.try_wait().unwrap().is_some()
    });
    let mut said = String::new();
    let stderr = refused.0.stderr.as_mut().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert!(said.contains("does not listen"), "{said}");
    assert_eq!(refused.0.wait().unwrap().code(), Some(2));
}

/// Ends with its test.
struct Inherits(Child);

impl Drop for Inherits {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
