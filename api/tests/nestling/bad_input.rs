//! What a user gets wrong is told in one sentence, with a status that says so, and nothing is
//! left behind.

use std::path::Path;
use std::process::{Command, Output};

use super::support::{NESTLING, Scratch, bzimage, guest, has_kvm};

fn nestling(arguments: &[&str]) -> Output {
    Command::new(NESTLING).args(arguments).output().unwrap()
}

/// Runs, and checks that there is one line with all of `words` and the status.
fn refused(arguments: &[&str], status: i32, words: &[&str]) {
    let output = nestling(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{arguments:?}: {error}");
    assert!(error.starts_with("nestling: "), "{error}");
    for word in words {
        assert!(
            error.contains(word),
            "{arguments:?}: no {word:?} in {error}"
        );
    }
}

#[test]
fn a_wrong_command_line_or_configuration_is_a_usage_error() {
    let scratch = Scratch::new("usage");
    let json = |text: &str| scratch.file("vm.json", text.as_bytes());
    for (arguments, words) in [
        (vec!["run", "--kernle", "k"], vec!["--kernle", "--kernel"]),
        (vec!["ruin"], vec!["ruin"]),
        (vec!["run"], vec!["no kernel", "--kernel"]),
        (vec!["completion"], vec!["not provided: <SHELL>"]),
        (
            vec!["run", "--cpus", "boot=2"],
            vec!["no kernel", "--kernel"],
        ),
        (
            vec!["run", "--kernel", "k", "--memory", "sise=1G"],
            vec!["sise", "did you mean \"size\""],
        ),
        (
            vec!["run", "--kernel", "k", "--memory", "size=1M"],
            vec!["size=1M is too small", "at least 16M"],
        ),
        (
            vec!["run", "--kernel", "k", "--cpus", "boot=65"],
            vec!["boot=65", "1 to 64"],
        ),
        (
            vec!["run", "--kernel", "k", "--disk", "readonly=on"],
            vec!["lacks path"],
        ),
        (
            vec!["run", "--config", "/nonexistent/vm.json"],
            vec!["/nonexistent/vm.json", "correct the path"],
        ),
    ] {
        refused(&arguments, 2, &words);
    }
    let config = json(r#"{"payload": {"kernel": "k"}, "dsks": []}"#);
    refused(
        &["run", "--config", &config],
        2,
        &["dsks", "did you mean \"disks\""],
    );
    let config = json("{\n");
    refused(&["run", "--config", &config], 2, &["not JSON"]);
}

#[test]
fn what_the_host_does_not_have_is_an_error_that_names_it() {
    if !has_kvm() {
        return;
    }
    let scratch = Scratch::new("host");
    let kernel = scratch.file("bzImage", &bzimage(guest::EXIT_42));
    let text = scratch.file("text", &[b'x'; 4096]);
    let short = scratch.file("short", &bzimage(guest::EXIT_42)[..5 * 512 + 100]);
    let long = "x".repeat(256);
    let run = |arguments: &[&str], words: &[&str]| {
        let mut all = vec!["run", "--memory", "size=64M"];
        all.extend(arguments);
        refused(&all, 1, words);
    };
    run(
        &["--kernel", "/nonexistent/kernel"],
        &["/nonexistent/kernel", "cannot be read"],
    );
    run(&["--kernel", &text], &["is not a kernel", "bzImage"]);
    run(&["--kernel", &short], &["truncated", "copy it again"]);
    run(
        &["--kernel", &kernel, "--cmdline", &long],
        &["256 bytes", "takes 255", "shorten"],
    );
    run(
        &["--kernel", &kernel, "--initramfs", "/nonexistent/initrd"],
        &["initramfs /nonexistent/initrd"],
    );
    run(
        &["--kernel", &kernel, "--disk", "path=/nonexistent/disk"],
        &["/nonexistent/disk", "does not exist"],
    );
    run(
        &["--kernel", &kernel, "--net", "tap=nonexistent0"],
        &["tap"],
    );
    run(
        &["--kernel", &kernel, "--serial", "file=/nonexistent/log"],
        &["/nonexistent/log"],
    );
    refused(
        &["run", "--kernel", &kernel, "--memory", "size=64T"],
        1,
        &["size=64T", "give less"],
    );
}

#[test]
fn a_refusal_leaves_nothing_behind() {
    if !has_kvm() {
        return;
    }
    let scratch = Scratch::new("nothing");
    let kernel = scratch.file("bzImage", &bzimage(guest::EXIT_42));
    let socket = scratch.at("console");
    let console = format!("socket={}", socket.display());
    refused(
        &[
            "run",
            "--kernel",
            &kernel,
            "--console",
            &console,
            "--disk",
            "path=/nonexistent/disk",
        ],
        1,
        &["/nonexistent/disk"],
    );
    assert!(!Path::new(&socket).exists());
    let log = scratch.at("log");
    let serial = format!("file={}", log.display());
    refused(
        &[
            "run",
            "--kernel",
            &kernel,
            "--serial",
            &serial,
            "--disk",
            "path=/nonexistent/disk",
        ],
        1,
        &["/nonexistent/disk"],
    );
    assert!(!log.exists());
    refused(
        &["run", "--kernel", &kernel, "--memory", "size=4096T"],
        1,
        &["size=4096T", "give less"],
    );
}

#[test]
fn a_guest_that_writes_to_the_debug_exit_port_ends_nestling_with_its_status() {
    if !has_kvm() {
        return;
    }
    let scratch = Scratch::new("exit");
    let kernel = scratch.file("bzImage", &bzimage(guest::EXIT_42));
    let socket = scratch.at("console");
    let console = format!("socket={}", socket.display());
    let output = nestling(&[
        "run",
        "--kernel",
        &kernel,
        "--memory",
        "size=64M",
        "--cpus",
        "boot=4",
        "--serial",
        "null",
        "--console",
        &console,
        "--platform",
        "debug_exit=on",
    ]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(42), "{error}");
    assert_eq!(error, "");
    assert!(!socket.exists());
}

#[test]
fn who_names_no_command_is_shown_them() {
    for arguments in [&[][..], &["api"]] {
        let output = nestling(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let help = String::from_utf8(output.stderr).unwrap();
        assert!(help.contains("Commands:"), "{arguments:?}: {help}");
    }
}

#[test]
fn help_tells_every_option_and_every_status() {
    let output = nestling(&["run", "--help"]);
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    for section in vmm::config::SECTIONS {
        for field in section.group.fields {
            assert!(help.contains(field.option), "{}", field.option);
        }
    }
    for (status, _) in vmm::outcome::STATUSES {
        assert!(help.contains(&format!("\n  {status} ")), "{status}");
    }
}
