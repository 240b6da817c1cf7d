//! The sandbox from outside: what a client can and cannot have, and an end that nothing delays.

use std::fs;
use std::io::Read;
use std::process::Command;

use serde_json::{Value, json};

use super::support::{Running, Scratch, Served, guest, has_kvm, wait_until};

/// Whether this kernel confines paths.
fn has_landlock() -> bool {
    let doctor = Command::new(env!("CARGO_BIN_EXE_nestling"))
        .args(["doctor", "--json"])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    report["landlock"]["ok"] == true
}

#[test]
fn a_disk_comes_later_from_where_a_rule_allows_and_from_nowhere_else() {
    if !has_kvm() || !has_landlock() {
        return;
    }
    let scratch = Scratch::new("rules");
    fs::write(scratch.at("outside"), vec![0; 1 << 20]).unwrap();
    // With a rule for its own directory.
    let served = Served::start("rules-api");
    fs::write(served.scratch.at("later"), vec![0; 1 << 20]).unwrap();
    assert_eq!(served.put("vm.create", &served.config()).0, 204);
    assert_eq!(served.put("vm.boot", &Value::Null).0, 204);

    let outside = json!({ "path": scratch.at("outside") });
    let (status, error) = served.put("vm.add-disk", &outside);
    assert_eq!((status, &error["code"]), (422, &json!("sandbox-refused")));
    let remedy = error["remedy"].as_str().unwrap();
    assert!(remedy.contains("--landlock-rules path="), "{remedy}");
    let later = json!({ "path": served.scratch.at("later"), "id": "later" });
    assert_eq!(served.put("vm.add-disk", &later).0, 200);
    // A reboot finds it, too.
    assert_eq!(served.put("vm.reboot", &Value::Null).0, 204);
    let (_, info) = served.get("vm.info");
    assert_eq!(info["device_tree"]["later"]["kind"], "disk", "{info:#}");

    // Another VM has to do with what the first one could open.
    assert_eq!(served.put("vm.delete", &Value::Null).0, 204);
    let mut other = served.config();
    other["disks"][0]["path"] = json!(scratch.at("outside"));
    assert_eq!(served.put("vm.create", &other).0, 204);
    let (status, error) = served.put("vm.boot", &Value::Null);
    assert_eq!((status, &error["code"]), (422, &json!("sandbox-refused")));
}

#[test]
fn a_client_cannot_switch_the_sandbox_off() {
    let served = Served::start("sandbox-off");
    for (sandbox, field) in [
        (json!({ "seccomp": "off" }), "sandbox.seccomp"),
        (json!({ "landlock": false }), "sandbox.landlock"),
    ] {
        let mut config = served.config();
        config["sandbox"] = sandbox;
        let (status, error) = served.put("vm.create", &config);
        assert_eq!((status, &error["field"]), (422, &json!(field)), "{error}");
    }
    let mut config = served.config();
    config["sandbox"] = json!({ "seccomp": "on", "landlock": true });
    assert_eq!(served.put("vm.create", &config).0, 204);
}

#[test]
fn a_signal_ends_nestling_also_when_it_is_stuck_in_the_kernel() {
    let Some(scratch) = Scratch::with_guest("stuck", guest::SPIN) else {
        return;
    };
    // Whoever opens a pipe for reading waits for its writer.
    fs::remove_file(scratch.at("kernel")).unwrap();
    let made = Command::new("mkfifo").arg(scratch.at("kernel")).status();
    assert!(made.unwrap().success());
    let mut nestling = Running::guest(&scratch, &[]);
    // From then on signals wait for whoever reads them.
    let about = format!("/proc/{}/status", nestling.id());
    wait_until("nestling does not block signals", || {
        let status = fs::read_to_string(&about).unwrap_or_default();
        let mut lines = status.lines();
        lines.any(|line| line.starts_with("SigBlk:") && !line.ends_with("0000000000000000"))
    });
    nestling.signal("TERM");
    assert_eq!(nestling.status(), 143);
    let mut said = String::new();
    let stderr = nestling.child().stderr.as_mut().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    assert!(said.contains("ends without waiting"), "{said}");
}
