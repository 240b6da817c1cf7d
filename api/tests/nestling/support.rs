//! What all tests here need: a directory of their own, guests, and a nestling that does not
//! outlive its test.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::document;

pub(crate) const NESTLING: &str = env!("CARGO_BIN_EXE_nestling");

/// How long anything may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);

/// Guests, by the code at their 64-bit entry.
pub(crate) mod guest {
    /// jmp to itself
    pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];
    /// Lets go of every device that it is asked for: 0: mov dx, 0x614; in eax, dx; test eax, eax;
    /// jz 0; mov dx, 0x61c; out dx, eax; jmp 0 (the hot-plug registers).
    pub(crate) const LETS_GO: &[u8] = &[
        0x66, 0xba, 0x14, 0x06, 0xed, 0x85, 0xc0, 0x74, 0xf7, 0x66, 0xba, 0x1c, 0x06, 0xef, 0xeb,
        0xf0,
    ];
    /// mov al, 42; out 0xf4, al; hlt: the debug-exit port.
    pub(crate) const EXIT_42: &[u8] = &[0xb0, 42, 0xe6, 0xf4, 0xf4];
    /// mov dx, 0x602; mov al, 1; out dx, al; hlt: the ACPI reset register.
    pub(crate) const RESET: &[u8] = &[0x66, 0xba, 0x02, 0x06, 0xb0, 1, 0xee, 0xf4];
    /// mov dx, 0x600; mov al, 0x34; out dx, al; hlt: SLP_TYP 5, SLP_EN.
    pub(crate) const POWER_OFF: &[u8] = &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4];
}

/// The smallest file that is a bzImage by its header, with `code` at its 64-bit entry.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
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
    image
}

pub(crate) fn has_kvm() -> bool {
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    if kvm.is_err() {
        println!("skipped: /dev/kvm cannot be opened here");
    }
    kvm.is_ok()
}

/// Waits for something; `what` says in a failure what it is.
pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A directory of the test's own.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nestling-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// One with `kernel`, which runs `code`, and `disk`; `None` where no guest can run.
    pub(crate) fn with_guest(name: &str, code: &[u8]) -> Option<Self> {
        has_kvm().then(|| {
            let scratch = Self::new(name);
            scratch.file("kernel", &bzimage(code));
            scratch.file("disk", &[0; 1 << 20]);
            scratch
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Where a file of this name is.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A new file; its path.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.at(name), bytes).unwrap();
        self.at(name).display().to_string()
    }

    /// `disk` as an option.
    pub(crate) fn disk(&self, more: &str) -> String {
        format!("path={}{more}", self.at("disk").display())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A nestling that ends with its test.
pub(crate) struct Running(Child);

impl Running {
    /// A VM whose guest is the one in `scratch`.
    pub(crate) fn guest(scratch: &Scratch, options: &[&str]) -> Self {
        let mut command = Command::new(NESTLING);
        command
            .args(["run", "--memory", "size=64M", "--serial", "null"])
            .arg("--kernel")
            .arg(scratch.at("kernel"))
            .args(options)
            .stderr(Stdio::piped());
        Self::start(&mut command)
    }

    pub(crate) fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    pub(crate) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Its exit status, when it has ended.
    pub(crate) fn status(&mut self) -> i32 {
        let mut ended = None;
        wait_until("nestling does not end", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().code().unwrap()
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A nestling with an API on the socket `s` of its directory, which has `kernel` and `disk`, too.
/// Every answer is held against the document.
pub(crate) struct Served {
    pub(crate) running: Running,
    pub(crate) scratch: Scratch,
}

impl Served {
    pub(crate) fn start(name: &str) -> Self {
        Self::start_with(name, &[])
    }

    pub(crate) fn start_with(name: &str, options: &[&str]) -> Self {
        Self::on(Scratch::new(name), guest::SPIN, options)
    }

    /// One whose guest runs `code`, and that writes what happens to the file `events`.
    pub(crate) fn start_with_guest(name: &str, code: &[u8]) -> Self {
        Self::on(
            Scratch::new(name),
            code,
            &["--event-monitor", "path=events"],
        )
    }

    fn on(scratch: Scratch, code: &[u8], options: &[&str]) -> Self {
        scratch.file("kernel", &bzimage(code));
        scratch.file("disk", &[0; 1 << 20]);
        let running = Self::serve(&scratch, options);
        Self { running, scratch }
    }

    /// Starts one on `scratch`, and waits until it listens.
    pub(crate) fn serve(scratch: &Scratch, options: &[&str]) -> Running {
        let mut command = Command::new(NESTLING);
        command
            .args(["run", "--api-socket"])
            .arg(format!("path={}", scratch.at("s").display()))
            // Disks that come later are there.
            .arg("--landlock-rules")
            .arg(format!("path={}", scratch.path().display()))
            .args(options)
            .current_dir(scratch.path());
        let running = Running::start(&mut command);
        wait_until("nobody listens", || {
            UnixStream::connect(scratch.at("s")).is_ok()
        });
        running
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.scratch.at("s")
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// The whole answer to these bytes, until the connection is closed.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // It may be closed before all is written.
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    pub(crate) fn ask(&self, verb: &str, request: &str, body: &str) -> (u16, Value) {
        let answer = self.raw(
            format!(
                "{verb} /api/v1/{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        );
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = match body {
            "" => Value::Null,
            body => serde_json::from_str(body).unwrap(),
        };
        let path = request.split('?').next().unwrap();
        document::promised(verb, path, status, &body);
        (status, body)
    }

    pub(crate) fn put(&self, request: &str, body: &Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        self.ask("PUT", request, &body)
    }

    pub(crate) fn get(&self, request: &str) -> (u16, Value) {
        self.ask("GET", request, "")
    }

    /// A VM with one disk, `d`, behind its vIOMMU.
    pub(crate) fn config(&self) -> Value {
        json!({
            "payload": { "kernel": self.scratch.at("kernel") },
            "memory": { "size": 64 << 20 },
            "serial": { "mode": "Null" },
            "disks": [{ "path": self.scratch.at("disk"), "iommu": true, "id": "d" }],
        })
    }
}
