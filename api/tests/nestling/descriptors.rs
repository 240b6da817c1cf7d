//! Descriptors that come with a request (SCM_RIGHTS), as they should be and otherwise.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::document;
use super::support::{NESTLING, Scratch, Served, guest, has_kvm, wait_until};

/// One connection, to send several requests on.
struct Connection(UnixStream);

impl Connection {
    fn put(&mut self, request: &str, body: &Value, descriptors: &[&OwnedFd]) -> (u16, Value) {
        let body = body.to_string();
        let text = format!(
            "PUT /api/v1/{request} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let numbers: Vec<i32> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
        let sent = self.0.send_with_fds(&[text.as_bytes()], &numbers).unwrap();
        assert_eq!(sent, text.len());
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while !answer.ends_with(b"\r\n\r\n") {
            self.0.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let head = String::from_utf8(answer).unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
        self.0.read_exact(&mut body).unwrap();
        let body = match body.as_slice() {
            [] => Value::Null,
            body => serde_json::from_slice(body).unwrap(),
        };
        document::promised("PUT", request, status, &body);
        (status, body)
    }
}

fn connect(served: &Served) -> Connection {
    Connection(served.connect())
}

fn opened(path: &Path) -> OwnedFd {
    let file = File::options().read(true).write(true).open(path);
    file.unwrap().into()
}

/// How many descriptors nestling has.
fn held(served: &Served) -> usize {
    let all = fs::read_dir(format!("/proc/{}/fd", served.running.id()));
    all.unwrap().count()
}

fn booted(name: &str) -> Served {
    let served = Served::start(name);
    assert_eq!(served.put("vm.create", &served.config()).0, 204);
    assert_eq!(served.put("vm.boot", &Value::Null).0, 204);
    served
}

#[test]
fn a_disk_that_its_client_opened_needs_no_right_of_nestling_and_outlives_a_reboot() {
    if !has_kvm() {
        return;
    }
    let served = booted("passed");
    // Outside of what the sandbox allows.
    let elsewhere = Scratch::new("passed-elsewhere");
    let image = elsewhere.at("image");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let disk = json!({ "path": image, "fd": 0, "id": "passed", "iommu": true });
    let descriptor = opened(&image);
    let mut client = connect(&served);
    let (status, added) = client.put("vm.add-disk", &disk, &[&descriptor]);
    assert_eq!((status, &added["id"]), (200, &json!("passed")), "{added}");
    drop(descriptor);
    assert!(
        File::open(&image).unwrap().try_lock().is_err(),
        "nestling has a lock on it"
    );
    for request in ["vm.reboot", "vm.shutdown", "vm.boot"] {
        assert_eq!(served.put(request, &Value::Null).0, 204);
    }
    let (_, info) = served.get("vm.info");
    assert_eq!(info["device_tree"]["passed"]["kind"], "disk", "{info:#}");
    let removal = json!({ "id": "passed", "force": true, "timeout": 0 });
    assert_eq!(served.put("vm.remove-device", &removal).0, 204);
    assert!(File::open(&image).unwrap().try_lock().is_ok());
    // The name is free, and inherits no descriptor.
    let (status, error) = served.put("vm.add-disk", &disk);
    assert_eq!((status, &error["field"]), (400, &json!("fd")));

    // Before the boot, too; and the client of the command line opens it by itself.
    assert_eq!(served.put("vm.shutdown", &Value::Null).0, 204);
    let option = format!("path={},id=cli", image.display());
    let client = Command::new(NESTLING)
        .args(["api", "--socket"])
        .arg(served.socket())
        .args(["add-disk", "--pass", &option])
        .output()
        .unwrap();
    assert!(client.status.success(), "{client:?}");
    assert_eq!(served.put("vm.boot", &Value::Null).0, 204);
    assert!(File::open(&image).unwrap().try_lock().is_err());
    assert_eq!(served.put("vm.delete", &Value::Null).0, 204);
    assert!(File::open(&image).unwrap().try_lock().is_ok());
}

#[test]
fn descriptors_of_the_wrong_kind_or_number_are_refused_and_closed() {
    if !has_kvm() {
        return;
    }
    let served = booted("abuse");
    let image = served.scratch.at("image");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let disk = |fd: Value| json!({ "path": image, "fd": fd });
    let good = opened(&image);
    let before = {
        // The connections of answered requests are closed in the server's own time.
        drop(connect(&served));
        std::thread::sleep(std::time::Duration::from_millis(300));
        held(&served)
    };
    let mut client = connect(&served);
    let mut refused = |body: Value, descriptors: &[&OwnedFd], status: u16, word: &str| {
        let (got, error) = client.put("vm.add-disk", &body, descriptors);
        let text = error.to_string();
        assert!(got == status && text.contains(word), "{got} {text}");
    };
    // None came, another one is meant, one is not named, one is named twice.
    refused(disk(json!(0)), &[], 400, "names no descriptor");
    refused(disk(json!(1)), &[&good], 400, "names no descriptor");
    // What an earlier request left is not there any more.
    refused(disk(json!(0)), &[], 400, "names no descriptor");
    refused(disk(json!(0)), &[&good, &good], 400, "named by no field");
    refused(disk(Value::Null), &[&good], 400, "named by no field");
    // No disk, or opened in a way that does not fit.
    let (pipe, _end) = std::io::pipe().unwrap();
    refused(disk(json!(0)), &[&pipe.into()], 422, "regular file");
    let folder = File::open(served.scratch.path()).unwrap().into();
    refused(disk(json!(0)), &[&folder], 422, "regular file");
    let reader = File::open(&image).unwrap().into();
    refused(disk(json!(0)), &[&reader], 422, "O_RDWR");
    let appender = File::options().read(true).append(true).open(&image);
    refused(
        disk(json!(0)),
        &[&appender.unwrap().into()],
        422,
        "O_APPEND",
    );
    let path = std::os::unix::fs::OpenOptionsExt::custom_flags(
        File::options().read(true).write(true),
        0x20_0000, // O_PATH
    )
    .open(&image);
    refused(disk(json!(0)), &[&path.unwrap().into()], 422, "");
    // Nobody's tap, and nobody's device.
    let net = json!({ "tap": "tap0", "fd": 0 });
    let (status, error) = client.put("vm.add-net", &net, &[&good]);
    assert_eq!((status, &error["code"]), (422, &json!("host-refused")));
    let device = json!({ "path": "/sys/bus/pci/devices/0000:ff:1f.7", "fd": 0, "iommufd": 1 });
    let (status, _) = client.put("vm.add-device", &device, &[&good, &good]);
    assert_eq!(status, 422);
    // Of a whole configuration nobody could say whose they are.
    let mut config = served.config();
    config["disks"][0]["fd"] = json!(0);
    let (status, error) = client.put("vm.create", &config, &[&good]);
    assert_eq!((status, &error["field"]), (400, &json!("fd")));

    // Too many at once: the client is cut off.
    let many = [good.as_raw_fd(); 5];
    let mut flood = served.connect();
    flood
        .send_with_fds(&[b"PUT /api/v1/vm.add-disk HTTP/1.1\r\n".as_slice()], &many)
        .unwrap();
    let mut rest = String::new();
    let _ = flood.read_to_string(&mut rest);
    assert!(!rest.contains(" 200 "), "{rest}");
    // One by one, too; and who leaves in between leaves nothing.
    let flood = served.connect();
    for _ in 0..5 {
        let _ = flood.send_with_fds(&[b"P".as_slice()], &many[..1]);
    }
    let mut left = served.connect();
    left.send_with_fds(
        &[b"PUT /api/v1/vm.add-disk HTTP/1.1\r\nContent-Length: 90\r\n\r\n{".as_slice()],
        &many[..2],
    )
    .unwrap();
    left.flush().unwrap();
    drop((left, flood, client));
    wait_until("nestling keeps what nobody uses", || {
        held(&served) <= before
    });
    // And all is well.
    let mut client = connect(&served);
    let (status, _) = client.put("vm.add-disk", &disk(json!(0)), &[&good]);
    assert_eq!(status, 200);
}

#[test]
fn an_option_names_a_descriptor_that_nestling_was_started_with() {
    if !has_kvm() {
        return;
    }
    let scratch = Scratch::with_guest("fd-option", guest::EXIT_42);
    let scratch = scratch.unwrap();
    let command = format!(
        "exec {NESTLING} run --memory size=64M --serial null --kernel {} --disk path=x,fd=7 \
         --platform debug_exit=on 7<>{}",
        scratch.at("kernel").display(),
        scratch.at("disk").display()
    );
    let run = |command: &str| Command::new("sh").args(["-c", command]).output().unwrap();
    let ended = run(&command);
    assert_eq!(ended.status.code(), Some(42), "{ended:?}");
    let closed = run(&command.replace("7<>", "8<>"));
    assert_eq!(closed.status.code(), Some(2), "{closed:?}");
    assert!(String::from_utf8_lossy(&closed.stderr).contains("fd=7 is not open"));
}
