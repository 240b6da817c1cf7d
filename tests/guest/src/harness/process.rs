//! What a process holds: to count what is left behind, and what nestling itself costs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

/// What one process holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Open file descriptors.
    pub fds: usize,
    /// Threads.
    pub threads: usize,
    /// Memory that is resident, without the guest's, in KiB.
    pub own_kib: u64,
}

/// What the process `pid` holds.
///
/// # Errors
/// It is gone.
pub fn holding(pid: u32) -> Result<Holding> {
    let count = |what: &str| -> Result<usize> {
        let folder = format!("/proc/{pid}/{what}");
        Ok(fs::read_dir(&folder)
            .with_context(|| format!("cannot read {folder}"))?
            .count())
    };
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = |key: &str| field(&status, key);
    // A program that was copied into memory is shared memory, too; what is left of it is the guest's.
    let shared = kib("RssShmem:").saturating_sub(memfds_kib(pid));
    Ok(Holding {
        fds: count("fd")?,
        threads: count("task")?,
        own_kib: kib("RssAnon:") + kib("RssFile:") + shared,
    })
}

/// What each descriptor of a process is, for the report of one that was left behind.
pub fn descriptors(pid: u32) -> Vec<String> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut names: Vec<String> = folder
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What the memfds of a process hold, in KiB: guest memory is one, in nestling and as we start
/// QEMU. (The lab's kernel has no `/proc/PID/smaps`, which would tell it more directly.)
fn memfds_kib(pid: u32) -> u64 {
    let folder = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut inodes = BTreeMap::new();
    for entry in folder.into_iter().flatten().flatten() {
        let is_memfd = fs::read_link(entry.path())
            .is_ok_and(|name| name.to_string_lossy().starts_with("/memfd:"));
        if is_memfd && let Ok(file) = fs::metadata(entry.path()) {
            // Blocks of 512 bytes.
            inodes.insert(file.ino(), file.blocks() / 2);
        }
    }
    inodes.values().sum()
}

fn field(status: &str, key: &str) -> u64 {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .unwrap_or_default();
    line.split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or(0)
}

/// Memory that the host has left, in KiB.
///
/// # Errors
/// `/proc/meminfo` cannot be read.
pub fn available_kib() -> Result<u64> {
    Ok(field(
        &fs::read_to_string("/proc/meminfo")?,
        "MemAvailable:",
    ))
}

/// The processes that run a program of this name and were started by this one.
pub fn named(name: &str) -> Vec<u32> {
    let me = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.parse::<u32>().ok())
        else {
            continue;
        };
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let is = |key: &str, value: &str| {
            status
                .lines()
                .any(|l| l.strip_prefix(key).is_some_and(|v| v.trim() == value))
        };
        if is("Name:", name) && is("PPid:", &me.to_string()) {
            found.push(pid);
        }
    }
    found
}

/// Each thread of a process: its name, its state and where in the kernel it waits. For the report
/// of one that hangs.
pub fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = Vec::new();
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stack = read("stack");
        let calls = stack
            .lines()
            .filter_map(|l| l.split_whitespace().nth(1))
            .take(4);
        let stat = read("stat");
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|s| s.chars().next())
            .unwrap_or('?');
        threads.push(format!(
            "{} {state} [{}]",
            read("comm").trim(),
            calls.collect::<Vec<_>>().join(" < ")
        ));
    }
    threads
}

/// How often the guest of a process has touched what only the process itself can answer (a VT-d
/// unit's registers, but no virtio doorbell).
///
/// # Errors
/// The host's KVM has no statistics for it.
pub fn mmio_exits(pid: u32) -> Result<u64> {
    let said = exits(pid);
    let mut words = said.split_whitespace().skip_while(|w| *w != "mmio_exits");
    words
        .nth(1)
        .and_then(|n| n.parse().ok())
        .with_context(|| format!("KVM counts no exits of process {pid}: {said:?}"))
}

/// How often the guest of a process has left to KVM so far, by reason. Of two answers some time
/// apart the difference says what a guest that hangs is doing.
pub fn exits(pid: u32) -> String {
    let guests = fs::read_dir("/sys/kernel/debug/kvm")
        .into_iter()
        .flatten()
        .flatten();
    let ours = guests.filter(|g| {
        g.file_name()
            .to_string_lossy()
            .starts_with(&format!("{pid}-"))
    });
    let mut said = String::new();
    for guest in ours {
        for reason in [
            "exits",
            "io_exits",
            "mmio_exits",
            "halt_exits",
            "irq_exits",
            "nested_run",
            "pf_taken",
            "pf_fixed",
            "pf_spurious",
        ] {
            let count = fs::read_to_string(guest.path().join(reason)).unwrap_or_default();
            said += &format!("{reason} {} ", count.trim());
        }
    }
    said
}

/// Why vCPUs left their guests in a tenth of a second, and where they were, the most frequent ones
/// first: what a guest that hangs is doing. Of all guests of this host.
pub fn why_they_leave() -> Vec<String> {
    let Some(trace) = trace_exits() else {
        return Vec::new();
    };
    let mut counts = BTreeMap::new();
    for line in trace.lines() {
        // `vcpu 0 reason npf rip 0x… info1 …`
        let Some((_, exit)) = line.split_once("kvm_exit: ") else {
            continue;
        };
        let words: Vec<&str> = exit.split_whitespace().take(6).collect();
        *counts.entry(words.join(" ")).or_insert(0u32) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let few = counts.into_iter().take(12);
    few.map(|(exit, count)| format!("{count}x {exit}"))
        .collect()
}

/// The host kernel's record of a tenth of a second of exits.
fn trace_exits() -> Option<String> {
    let folder = Path::new("/sys/kernel/tracing");
    let event = folder.join("events/kvm/kvm_exit/enable");
    if !event.exists() {
        let mut mount = Command::new("mount");
        let _ = mount
            .args(["-t", "tracefs", "tracefs"])
            .arg(folder)
            .status();
    }
    fs::write(&event, "1").ok()?;
    std::thread::sleep(Duration::from_millis(100));
    fs::write(&event, "0").ok()?;
    let trace = fs::read_to_string(folder.join("trace")).ok();
    let _ = fs::write(folder.join("trace"), "");
    trace
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::FromRawFd;

    use super::*;

    #[test]
    fn guest_memory_is_not_counted() {
        let me = std::process::id();
        let before = holding(me).unwrap();
        // SAFETY: the name ends with a NUL.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: the descriptor is new and nobody else's.
        let mut guest = unsafe { fs::File::from_raw_fd(fd) };
        for _ in 0..128 {
            guest.write_all(&[1; 1 << 19]).unwrap();
        }
        assert_eq!(memfds_kib(me), 64 << 10);
        let after = holding(me).unwrap();
        // Other tests of this process need some meanwhile.
        assert!(
            after.own_kib < before.own_kib + (48 << 10),
            "{before:?} {after:?}"
        );
    }
}
