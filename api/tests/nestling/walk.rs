//! The walk through the API in the README, run as it is written there.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use super::support::{NESTLING, Scratch, bzimage, guest, has_kvm};

const README: &str = include_str!("../../../README.md");

/// The shell commands of one section.
fn commands(section: &str) -> String {
    let (_, section) = README.split_once(&format!("\n## {section}\n")).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let blocks = section.split("```sh\n").skip(1);
    blocks
        .map(|block| block.split("```").next().unwrap())
        .collect()
}

#[test]
fn the_readmes_walk_through_the_api_goes_as_it_is_written() {
    let curl = env::split_paths(&env::var_os("PATH").unwrap()).any(|dir| dir.join("curl").exists());
    assert!(curl, "install curl: the README's commands need it");
    if !has_kvm() {
        return;
    }
    let scratch = Scratch::new("walk");
    scratch.file("vmlinuz", &bzimage(guest::LETS_GO));
    scratch.file("initramfs", b"nothing");
    let commands = commands("Drive it over the API");
    assert!(commands.contains("curl ") && commands.contains("nestling api"));
    // The commands in the background end with nestling.
    let script = scratch.file("walk.sh", format!("{commands}\nwait\n").as_bytes());
    let programs = Path::new(NESTLING).parent().unwrap().to_owned();
    let path = env::var_os("PATH").unwrap();
    let path = [programs].into_iter().chain(env::split_paths(&path));
    let output = Command::new("timeout")
        .args(["600", "bash", "-eu", "-o", "pipefail", &script])
        .env("PATH", env::join_paths(path).unwrap())
        .current_dir(scratch.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let complained = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(complained, "");
    for (words, count) in [
        // The answer of curl, the tables, and the events of both halves.
        (r#"{"id":"data","bdf":"0000:00:"#, 1),
        ("data at 0000:00:", 1),
        ("unit (vtd, scalable", 2),
        ("device-added", 2),
        ("device-removed", 2),
        ("shutdown  reason=request", 2),
    ] {
        assert_eq!(said.matches(words).count(), count, "{words} in\n{said}");
    }
}
