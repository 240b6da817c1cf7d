//! What nestling cannot do it refuses in one sentence that names the thing, the value and the
//! remedy, before it has made anything.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::{Lab, Test};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("bad_input_is_refused_in_one_sentence", table).tiny(),
    Test::new("a_host_without_kvm_is_refused_in_one_sentence", no_kvm),
];

/// How long a refusal may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A bad command line, and words that the refusal must have.
struct Bad {
    what: &'static str,
    arguments: Vec<String>,
    says: Vec<String>,
}

fn table(lab: &Lab) -> Result<()> {
    let kernel = lab.shared("guests/lab/vmlinuz").display().to_string();
    let file = |name: &str, contents: &[u8]| -> Result<String> {
        let path = lab.file(name);
        fs::write(&path, contents)?;
        Ok(path.display().to_string())
    };
    let whole = fs::read(&kernel)?;
    let truncated = file("truncated", &whole[..whole.len() / 2])?;
    let short = file("short", &whole[..600])?;
    let text = file("text", b"#!/bin/sh\necho not a kernel\n")?;
    let empty = file("empty", b"")?;
    let json = file("vm.json", br#"{"payload": {"kernel": "/x"}, "dsiks": []}"#)?;
    let not_json = file("not.json", b"{")?;
    let folder = lab.file("folder");
    fs::create_dir_all(&folder)?;
    let folder = folder.display().to_string();
    let long = "x".repeat(70_000);

    let run = |what: &'static str, arguments: &[&str], says: &[&str]| Bad {
        what,
        arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
        says: says.iter().map(|s| (*s).to_owned()).collect(),
    };
    let with = |what: &'static str, arguments: &[&str], says: &[&str]| {
        run(what, &[&["--kernel", &kernel], arguments].concat(), says)
    };
    let cases = [
        run("no kernel", &[], &["--kernel"]),
        run(
            "missing kernel",
            &["--kernel", "/nowhere/vmlinuz"],
            &["/nowhere/vmlinuz"],
        ),
        run("truncated kernel", &["--kernel", &truncated], &[&truncated]),
        run("very short kernel", &["--kernel", &short], &[&short]),
        run("not a kernel", &["--kernel", &text], &[&text]),
        run("empty kernel", &["--kernel", &empty], &[&empty]),
        run("a folder as kernel", &["--kernel", &folder], &[&folder]),
        with(
            "missing initramfs",
            &["--initramfs", "/nowhere/i"],
            &["/nowhere/i"],
        ),
        with(
            "command line too long",
            &["--cmdline", &long],
            &["command line"],
        ),
        with(
            "memory too small",
            &["--memory", "size=1M"],
            &["memory", "1M"],
        ),
        with(
            "memory that is no size",
            &["--memory", "size=lots"],
            &["lots"],
        ),
        with(
            "more memory than the machine",
            &["--memory", "size=4096T"],
            &["4096T"],
        ),
        with(
            "more huge pages than there are",
            &["--memory", "size=4G,hugepages=on"],
            &["huge"],
        ),
        with(
            "virtual commands without the host's PASID file",
            &[
                "--viommu",
                "type=vtd,vcmd=on",
                "--test-device",
                "iommu=on",
                "--platform",
                "pasid_directory=/nowhere/pasids",
            ],
            &["/nowhere/pasids", "create"],
        ),
        with("no vCPU", &["--cpus", "boot=0"], &["boot=0"]),
        with("too many vCPUs", &["--cpus", "boot=65"], &["65"]),
        with(
            "missing disk",
            &["--disk", "path=/nowhere/disk"],
            &["/nowhere/disk"],
        ),
        with(
            "a folder as disk",
            &["--disk", &format!("path={folder}")],
            &[&folder],
        ),
        with("unknown key", &["--disk", "paht=/x"], &["paht", "path"]),
        with("unknown option", &["--dsik", "path=/x"], &["--dsik"]),
        with(
            "bad value",
            &["--disk", &format!("path={text},readonly=maybe")],
            &["maybe"],
        ),
        with(
            "twice the same id",
            &[
                "--disk",
                &format!("path={text},id=a"),
                "--disk",
                &format!("path={text},id=a"),
            ],
            &["id"],
        ),
        with(
            "missing tap",
            &["--net", "tap=this-name-is-too-long"],
            &["this-name-is-too-long"],
        ),
        with("bad mac", &["--net", "tap=t0,mac=12:34"], &["12:34"]),
        run(
            "unknown JSON key",
            &["--config", &json],
            &["dsiks", "disks"],
        ),
        run("not JSON", &["--config", &not_json], &[&not_json]),
        run(
            "missing JSON",
            &["--config", "/nowhere/vm.json"],
            &["/nowhere/vm.json"],
        ),
        with(
            "a console in a missing folder",
            &["--console", "socket=/nowhere/s"],
            &["/nowhere/s"],
        ),
    ];
    let mut wrong = Vec::new();
    for case in &cases {
        if let Err(error) = refused(lab, case, |_| {}) {
            wrong.push(format!("{}: {error:#}", case.what));
        }
    }
    if !wrong.is_empty() {
        bail!(
            "{} of {} refusals are wrong:\n{}",
            wrong.len(),
            cases.len(),
            wrong.join("\n")
        );
    }
    Ok(())
}

fn no_kvm(lab: &Lab) -> Result<()> {
    let kernel = lab.shared("guests/lab/vmlinuz").display().to_string();
    let case = |what| Bad {
        what,
        arguments: vec!["--kernel".to_owned(), kernel.clone()],
        says: vec!["/dev/kvm".to_owned()],
    };
    refused(lab, &case("/dev/kvm not permitted"), |command| {
        command.uid(65534).gid(65534);
    })
    .context("/dev/kvm not permitted")?;
    refused(lab, &case("/dev/kvm absent"), |command| {
        // A mount namespace of its own, in which /dev is empty.
        let program = command.get_program().to_owned();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        *command = Command::new("unshare");
        command.args([
            "-m",
            "sh",
            "-c",
            "mount -t tmpfs none /dev && exec \"$0\" \"$@\"",
        ]);
        command.arg(program).args(arguments);
    })
    .context("/dev/kvm absent")
}

/// Runs nestling and checks that it refuses well.
fn refused(lab: &Lab, case: &Bad, change: impl FnOnce(&mut Command)) -> Result<()> {
    let socket = lab.file("refused.sock");
    let serial = lab.file("refused.log");
    let _ = fs::remove_file(&serial);
    let mut command = Command::new(lab.nestling());
    command.arg("run").args(&case.arguments);
    let has = |option: &str| case.arguments.iter().any(|a| a == option);
    if !has("--config") {
        command
            .arg("--serial")
            .arg(format!("file={}", serial.display()));
    }
    if !has("--config") && !has("--console") {
        command
            .arg("--console")
            .arg(format!("socket={}", socket.display()));
    }
    change(&mut command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let deadline = Instant::now() + LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("it was not refused within {} s", LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    ensure!(
        output.status.code().is_some(),
        "ended by signal {:?}: {said}",
        output.status.signal()
    );
    ensure!(!output.status.success(), "it was not refused: {said}");
    ensure!(
        said.lines().count() == 1,
        "more or less than one sentence:\n{said}"
    );
    for part in &case.says {
        ensure!(said.contains(part.as_str()), "does not name {part}: {said}");
    }
    ensure!(!said.contains("panicked"), "{said}");
    for made in [&socket, &serial] {
        ensure!(
            !exists(made),
            "{} was made and left: {said}",
            made.display()
        );
    }
    Ok(())
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}
