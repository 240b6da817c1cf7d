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
fn exits(pid: u32) -> String {
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
fn why_they_leave() -> Vec<(String, u32)> {
    trace_exits().map_or_else(Vec::new, |trace| frequent(&trace))
}

fn frequent(trace: &str) -> Vec<(String, u32)> {
    let mut counts = BTreeMap::new();
    for line in trace.lines() {
        // `vcpu 0 reason npf rip 0x… info1 0x… info2 0x… …`: of a nested page fault its error code
        // and its address.
        let Some((_, exit)) = line.split_once("kvm_exit: ") else {
            continue;
        };
        let words: Vec<&str> = exit.split_whitespace().take(10).collect();
        *counts.entry(words.join(" ")).or_insert(0u32) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    counts.truncate(12);
    counts
}

/// The host's CPU or KVM is broken, so that a guest cannot go on: no verdict on nestling.
#[derive(Debug)]
pub struct HostBroken;

impl std::fmt::Display for HostBroken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the host's KVM resolves no page fault of the guest's memory, again and again")
    }
}

impl std::error::Error for HostBroken {}

/// Exits in a tenth of a second that a guest which gets on does not have at one instruction.
const TOO_MANY: u32 = 1000;
/// Where devices begin in the address space of nestling's guests; memory is below.
const DEVICES: u64 = 3 << 30;
/// The function of the host's kernel that enters a guest.
const ENTRY: &str = "__svm_vcpu_run";

/// What the vCPUs of a guest do that does not answer.
#[derive(Debug)]
pub struct Doings {
    /// How often KVM counted each kind of exit.
    pub exits: String,
    /// The same a second later.
    pub later: String,
    /// Why they left in a tenth of a second and where they were, the most frequent ones first.
    pub why: Vec<(String, u32)>,
    /// Whether the host is broken, so that no guest gets on.
    pub broken: bool,
}

impl Doings {
    /// Looks at the guest of process `pid`, for a second.
    pub fn of(pid: u32) -> Self {
        let before = exits(pid);
        std::thread::sleep(Duration::from_secs(1));
        let later = exits(pid);
        let why = why_they_leave();
        let symbols = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
        let broken = is_broken(&before, &later, &why, &symbols);
        Self {
            exits: before,
            later,
            why,
            broken,
        }
    }
}

/// Whether the host is broken, by a guest's [`exits`] before and after a second, and by
/// [why its vCPUs left](why_they_leave): they do nothing but leave for one page fault at one
/// instruction, and KVM neither takes the fault nor repairs it nor asks nestling; and the fault is
/// one of memory, or the instruction is the host's own that entered the guest, which the emulated
/// CPU gives for the guest's. `symbols` is the host's `/proc/kallsyms`. Nothing that nestling or a
/// guest does has this effect.
fn is_broken(before: &str, after: &str, why: &[(String, u32)], symbols: &str) -> bool {
    let without_total = |exits: &str| {
        let mut words: Vec<String> = exits.split_whitespace().map(str::to_owned).collect();
        words.drain(..words.len().min(2));
        words
    };
    let [(exit, count)] = why else {
        return false;
    };
    let words: Vec<&str> = exit.split_whitespace().collect();
    let [
        "vcpu",
        _,
        "reason",
        "npf",
        "rip",
        rip,
        "info1",
        _,
        "info2",
        address,
    ] = words[..]
    else {
        return false;
    };
    let is_memory = hexadecimal(address).is_some_and(|address| address < DEVICES);
    let is_the_hosts = hexadecimal(rip).is_some_and(|rip| is_in(symbols, ENTRY, rip));
    *count >= TOO_MANY
        && (is_memory || is_the_hosts)
        && !before.is_empty()
        && without_total(before) == without_total(after)
}

fn hexadecimal(number: &str) -> Option<u64> {
    u64::from_str_radix(number.trim_start_matches("0x"), 16).ok()
}

/// Whether `address` lies between the symbol `name` and the one after it.
fn is_in(symbols: &str, name: &str, address: u64) -> bool {
    let mut named = symbols.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let at = hexadecimal(words.next()?)?;
        Some((at, words.nth(1)?))
    });
    let Some((from, _)) = named.find(|(_, found)| *found == name) else {
        return false;
    };
    let to = named.map(|(at, _)| at).filter(|at| *at > from).min();
    address >= from && to.is_some_and(|to| address < to)
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
    fn a_broken_host_is_found_under_what_else_is_said() {
        let error = anyhow::anyhow!("no answer")
            .context("words")
            .context(HostBroken);
        let error = error.context("in the test");
        assert!(crate::is_no_verdict(&error));
        assert!(!crate::is_no_verdict(
            &anyhow::anyhow!("no answer").context("words")
        ));
    }

    #[test]
    fn a_host_that_resolves_no_fault_is_broken_and_a_busy_guest_is_none() {
        let line = |n: u32, rest: &str| format!("vcpu0-7 [000] d.. 1.{n}: kvm_exit: {rest} x 0\n");
        let fault = "vcpu 0 reason npf rip 0x12 info1 0x10000000c info2 0x7b3000";
        let stuck: String = (0..4000).map(|n| line(n, fault)).collect();
        let why = frequent(&stuck);
        assert_eq!(why, [(fault.to_owned(), 4000)]);
        let before = "exits 10 io_exits 2 irq_exits 4 pf_taken 7 ";
        let after = "exits 40010 io_exits 2 irq_exits 4 pf_taken 7 ";
        assert!(is_broken(before, after, &why, ""));
        assert!(!is_broken("", "", &why, ""), "KVM does not count");
        assert!(!is_broken(before, after, &[], ""), "there is no trace");
        let taken = "exits 40010 io_exits 2 irq_exits 4 pf_taken 8 ";
        assert!(!is_broken(before, taken, &why, ""), "it gets on");
        let two = stuck.clone() + &line(1, "vcpu 0 reason msr rip 0x14 info1 0 info2 0");
        assert!(
            !is_broken(before, after, &frequent(&two), ""),
            "it does more"
        );
        let kick = fault.replace("0x7b3000", "0xe0003000");
        let kicks: String = (0..4000).map(|n| line(n, &kick)).collect();
        assert!(
            !is_broken(before, after, &frequent(&kicks), ""),
            "a doorbell"
        );
        let few: String = (0..9).map(|n| line(n, fault)).collect();
        assert!(!is_broken(before, after, &frequent(&few), ""), "it waits");

        let symbols = "ff80 T before\nffa0 T __svm_vcpu_run\nffc0 T after\n";
        let of_host = kick.replace("rip 0x12", "rip 0xffac");
        let again: String = (0..4000).map(|n| line(n, &of_host)).collect();
        assert!(is_broken(before, after, &frequent(&again), symbols));
        assert!(!is_broken(before, after, &frequent(&kicks), symbols));
    }

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
