//! The fences, by trying to get through them. What kills a process is tried in a child: this test
//! program, run again with the name of one test and what to try in the environment.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vmm_sys_util::tempdir::TempDir;

use super::calls::{self, Calls};
use super::*;
use crate::config::{DiskConfig, LandlockAccess, VmConfig};
use crate::control::NewDevice;

const TRY: &str = "NESTLING_SANDBOX_TRY";

/// Runs `test` of this program again with something to try.
fn child(test: &str, what: &str) -> Output {
    let name = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    Command::new(std::env::current_exe().unwrap())
        .args([&name, "--exact", "--nocapture", "--test-threads=1"])
        .env(TRY, what)
        .output()
        .unwrap()
}

/// Something that no thread of nestling does.
type Attempt = (&'static str, fn() -> libc::c_long);

fn raw(number: libc::c_long, arguments: [usize; 4]) -> libc::c_long {
    let [a, b, c, d] = arguments;
    // SAFETY: every caller passes numbers, null or paths that live as long as the call; the
    // process is a child that ends after it.
    unsafe { libc::syscall(number, a, b, c, d) }
}

const PATH: &std::ffi::CStr = c"/bin/true";

/// Forbidden to all.
const NEVER: &[Attempt] = &[
    ("execve", || {
        raw(libc::SYS_execve, [PATH.as_ptr() as usize, 0, 0, 0])
    }),
    ("ptrace", || raw(libc::SYS_ptrace, [0, 0, 0, 0])),
    ("fork", || raw(libc::SYS_fork, [0; 4])),
    ("clone", || {
        raw(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0])
    }),
    ("inet", || {
        let kind = libc::SOCK_STREAM as usize;
        raw(libc::SYS_socket, [libc::AF_INET as usize, kind, 0, 0])
    }),
    ("mount", || raw(libc::SYS_mount, [0; 4])),
    ("bpf", || raw(libc::SYS_bpf, [0; 4])),
    ("unshare", || raw(libc::SYS_unshare, [0; 4])),
    ("io_uring", || raw(libc::SYS_io_uring_setup, [1, 0, 0, 0])),
    ("kill another", || {
        // SAFETY: the call takes nothing.
        let parent = unsafe { libc::getppid() } as usize;
        raw(libc::SYS_tgkill, [parent, parent, 0, 0])
    }),
    ("have another signalled", || {
        // SAFETY: the call takes nothing.
        let parent = unsafe { libc::getppid() } as usize;
        raw(libc::SYS_fcntl, [0, libc::F_SETOWN as usize, parent, 0])
    }),
    ("choose the signal", || {
        let kill = libc::SIGKILL as usize;
        raw(libc::SYS_fcntl, [0, 10, kill, 0]) // F_SETSIG
    }),
    ("executable memory", || {
        let rwx = (libc::PROT_READ | libc::PROT_EXEC) as usize;
        raw(libc::SYS_mmap, [0, 4096, rwx, 0x22])
    }),
    ("type ahead", || raw(libc::SYS_ioctl, [0, 0x5412, 0, 0])),
    ("ptrace by process_vm", || {
        raw(libc::SYS_process_vm_writev, [0; 4])
    }),
    ("set a limit", || {
        raw(libc::SYS_prlimit64, [0, 7, PATH.as_ptr() as usize, 0])
    }),
];

/// Of no effect for all but those that open files.
const OPENS: Attempt = ("open", || {
    let at = libc::AT_FDCWD as usize;
    raw(libc::SYS_openat, [at, PATH.as_ptr() as usize, 0, 0])
});
/// Forbidden to all that start no threads.
const THREAD: Attempt = ("thread", || {
    // The kernel refuses it: threads share their signal handlers.
    let flags = libc::CLONE_VM | libc::CLONE_THREAD;
    raw(libc::SYS_clone, [flags as usize, 0, 0, 0])
});
/// Forbidden to all but those that run a guest.
const RUN: Attempt = ("KVM_RUN", || {
    raw(libc::SYS_ioctl, [usize::MAX, 0xae80, 0, 0])
});

fn attempts() -> Vec<Attempt> {
    let more = [OPENS, THREAD, RUN];
    NEVER.iter().copied().chain(more).collect()
}

/// Whether `role` lives when it does what `attempt` tries.
fn may(role: Role, attempt: &str) -> bool {
    match attempt {
        // It fails, for most.
        "open" => true,
        "thread" | "KVM_RUN" => matches!(role, Role::Main | Role::Vcpu),
        _ => false,
    }
}

/// In the child: becomes `role` and tries; in the parent: does nothing.
fn try_it() {
    let Ok(what) = std::env::var(TRY) else {
        return;
    };
    let (role, attempt) = what.split_once('/').unwrap();
    let role = Role::ALL[role.parse::<usize>().unwrap()];
    let all = attempts();
    let (_, attempt) = all.iter().find(|(name, _)| *name == attempt).unwrap();
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `none` is a limit; no core is to be written.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    start(SeccompMode::On).unwrap();
    // As a thread does it: inherited by nobody.
    let result = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(role).unwrap();
            // Memory, locks and messages still work.
            let bytes = vec![1_u8; 1 << 20];
            eprintln!("in the sandbox, {} bytes", bytes.len());
            attempt()
        });
        thread.join().unwrap()
    });
    eprintln!("alive: {result}");
}

#[test]
fn guest_memory_is_had_and_faulted_in_by_several_threads() {
    let test = "guest_memory_is_had_and_faulted_in_by_several_threads";
    if std::env::var_os(TRY).is_none() {
        let output = child(test, "main");
        assert!(output.status.success(), "{output:?}");
        return;
    }
    start(SeccompMode::On).unwrap();
    std::thread::scope(|scope| {
        let main = || {
            enter(Role::Main).unwrap();
            let layout = crate::memory::layout::compose(64 << 20, 40, &[]).unwrap();
            let ram = crate::memory::ram::allocate(&Default::default(), &layout).unwrap();
            viommu::backend::iommufd::prefault(&ram, 3).unwrap();
        };
        scope.spawn(main).join().unwrap();
    });
}

#[test]
fn each_kind_of_thread_is_killed_for_what_it_never_does() {
    if std::env::var_os(TRY).is_some() {
        return try_it();
    }
    let test = "each_kind_of_thread_is_killed_for_what_it_never_does";
    let pairs = Role::ALL.iter().enumerate().flat_map(|(index, role)| {
        attempts()
            .into_iter()
            .map(move |(attempt, _)| (index, *role, attempt))
    });
    for (index, role, attempt) in pairs {
        let output = child(test, &format!("{index}/{attempt}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            said.contains("in the sandbox"),
            "{role:?} {attempt}: {said}"
        );
        let killed = output.status.signal() == Some(libc::SIGSYS);
        assert_eq!(killed, !may(role, attempt), "{role:?} {attempt}: {said}");
        if attempt == "open" {
            let failed = said.contains("alive: -1");
            let opens = matches!(role, Role::Main | Role::Inspector);
            assert_eq!(failed, !opens, "{role:?}: {said}");
        }
    }
}

#[test]
fn with_log_nothing_is_killed() {
    if std::env::var_os(TRY).is_some() {
        start(SeccompMode::Log).unwrap();
        enter(Role::Rng).unwrap();
        // Not of this role, and harmless.
        // SAFETY: the call takes nothing.
        assert!(unsafe { libc::getppid() } > 0);
        return;
    }
    let output = child("with_log_nothing_is_killed", "log");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_panic_in_the_sandbox_is_told_whatever_the_environment_says() {
    if std::env::var_os(TRY).is_some() {
        start(SeccompMode::On).unwrap();
        let thread = viommu::thread::spawn("virtio-rng", || panic!("deliberate"));
        assert!(thread.unwrap().join().is_err());
        eprintln!("the others live");
        return;
    }
    let test = "a_panic_in_the_sandbox_is_told_whatever_the_environment_says";
    let output = child(test, "panic");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("deliberate"), "{said}");
    assert!(said.contains("the others live"), "{said}");
}

#[test]
fn whoever_starts_a_thread_may_do_all_that_it_may() {
    let contains = |outer: &Calls, inner: &Calls| {
        for (number, checks) in inner.all() {
            let there = outer.all().find(|(n, _)| *n == number);
            let (_, outer) = there.unwrap_or_else(|| panic!("system call {number} is missing"));
            // A group of ioctls covers each of its numbers.
            let covered = |check: &calls::Check| {
                outer.iter().any(|o| {
                    o.argument == check.argument
                        && o.mask & check.mask == o.mask
                        && check.value & o.mask == o.value
                })
            };
            assert!(
                outer.is_empty() || (!checks.is_empty() && checks.iter().all(covered)),
                "system call {number}"
            );
        }
    };
    use Role::*;
    for worker in [
        Block,
        Net,
        Rng,
        Console,
        TestEngine,
        Line,
        PageRequests,
        BlockedIrqs,
    ] {
        contains(&calls::of(Vcpu), &calls::of(worker));
    }
    for (role, _) in Role::ALL.iter().zip(0..) {
        if !matches!(role, Api | Inspector) {
            contains(&calls::of(Main), &calls::of(*role));
        }
    }
}

#[test]
fn every_thread_of_nestling_has_a_role_and_another_has_none() {
    for name in [
        "vcpu0",
        "virtio-blk",
        "virtio-net",
        "virtio-rng",
        "virtio-console",
        "dma-test-engine",
        "interrupt-line",
        "page-requests",
        "blocked-irqs",
        "prefault",
        "api",
        "inspector",
        "watchdog",
    ] {
        assert!(Role::of_thread(name).is_some(), "{name}");
    }
    assert_eq!(Role::of_thread("somebody"), None);
    for (index, role) in Role::ALL.iter().enumerate() {
        assert_eq!(*role as usize, index);
    }
}

fn disk(path: &Path, readonly: bool) -> NewDevice {
    NewDevice::Disk(DiskConfig {
        path: path.into(),
        readonly,
        ..DiskConfig::default()
    })
}

fn config(folder: &Path) -> VmConfig {
    let mut config = VmConfig::default();
    config.payload.kernel = folder.join("kernel");
    config.disks.push(DiskConfig {
        path: folder.join("disk"),
        ..DiskConfig::default()
    });
    config.serial.mode = crate::config::SerialMode::File;
    config.serial.file = Some(folder.join("made/serial"));
    config.console.mode = crate::config::ConsoleMode::Socket;
    config.console.socket = Some(folder.join("sockets/console"));
    config
}

fn folder() -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in ["made", "sockets", "images"] {
        std::fs::create_dir(dir.as_path().join(name)).unwrap();
    }
    for name in ["kernel", "disk", "other", "images/later"] {
        std::fs::write(dir.as_path().join(name), "x").unwrap();
    }
    dir
}

/// On a thread, so that the rest of this program is free.
fn confined<T: Send>(needs: &[Need], body: impl FnOnce(Paths) -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let paths = Paths::restrict(needs).unwrap();
            paths.enforced().then(|| body(paths))
        });
        let result = thread.join().unwrap();
        if result.is_none() {
            eprintln!("left out: this kernel has no landlock");
        }
        result
    })
}

#[test]
fn only_what_the_configuration_names_can_be_opened() {
    let dir = folder();
    let at = |name: &str| -> PathBuf { dir.as_path().join(name) };
    let needs = of_config(&config(dir.as_path()), false);
    confined(&needs, |_| {
        let open = |name: &str, write: bool| {
            let file = std::fs::File::options()
                .read(!write)
                .write(write)
                .open(at(name));
            file.map(drop).map_err(|why| why.kind())
        };
        let denied = Err(std::io::ErrorKind::PermissionDenied);
        assert_eq!(open("kernel", false), Ok(()));
        assert_eq!(open("kernel", true), denied);
        assert_eq!(open("disk", false), Ok(()));
        assert_eq!(open("disk", true), Ok(()));
        assert_eq!(open("other", false), denied);
        assert_eq!(open("images/later", false), denied);
        assert!(std::fs::write(at("made/serial"), "x").is_ok());
        assert!(std::fs::write(at("new"), "x").is_err());
        assert!(std::fs::remove_file(at("disk")).is_err());
        assert!(std::os::unix::net::UnixListener::bind(at("sockets/console")).is_ok());
        assert!(std::fs::remove_file(at("sockets/console")).is_ok());
        assert!(std::os::unix::net::UnixListener::bind(at("made/s")).is_err());
        assert!(std::fs::read("/etc/passwd").is_err());
        assert!(std::fs::read_dir("/").is_err());
        assert!(
            std::fs::File::options()
                .write(true)
                .open("/dev/null")
                .is_err()
        );
        // No rule names /dev/net/tun: no card was configured, and none can come.
        let needs_tun = |need: &Need| need.path == Path::new("/dev/net/tun");
        assert!(!needs.iter().any(needs_tun));
    });
}

#[test]
fn a_disk_that_comes_later_needs_a_rule_and_the_error_says_which() {
    let dir = folder();
    let later = dir.as_path().join("images/later");
    let needs = of_config(&config(dir.as_path()), true);
    confined(&needs, |paths| {
        let refused = paths.admit(&of_device(&disk(&later, false))).unwrap_err();
        let rule = format!(
            "--landlock-rules path={},access=rw",
            dir.as_path()
                .join("images")
                .canonicalize()
                .unwrap()
                .display()
        );
        assert!(refused.to_string().contains(&rule), "{refused}");
        // What is not there is told by who looks for it.
        let absent = dir.as_path().join("absent");
        assert_eq!(paths.admit(&of_device(&disk(&absent, false))), Ok(()));
    });
    let mut with_rule = needs.clone();
    with_rule.push(of_rule(&LandlockConfig {
        path: dir.as_path().join("images"),
        access: LandlockAccess::Read,
    }));
    confined(&with_rule, |paths| {
        assert_eq!(paths.admit(&of_device(&disk(&later, true))), Ok(()));
        assert!(std::fs::read(&later).is_ok());
        assert!(paths.admit(&of_device(&disk(&later, false))).is_err());
        assert!(std::fs::write(&later, "y").is_err());
        // The same VM again: all that it needs is there.
        assert_eq!(paths.admit(&needs), Ok(()));
    });
}

#[test]
fn the_api_may_remove_its_socket_and_open_nothing() {
    let dir = folder();
    let socket = dir.as_path().join("sockets/api");
    std::fs::write(&socket, "").unwrap();
    confined(&of_api(Some(&socket)), |_| {
        assert!(std::fs::read(&socket).is_err());
        assert!(std::fs::remove_file(dir.as_path().join("disk")).is_err());
        assert!(std::fs::remove_file(&socket).is_ok());
    });
    confined(&of_inspector(), |_| {
        assert!(std::fs::read("/proc/self/limits").is_ok());
        assert!(std::fs::read_dir("/sys").is_ok());
        assert!(std::fs::read(dir.as_path().join("disk")).is_err());
    });
}

#[test]
fn everything_is_on_that_is_not_switched_off() {
    let on = Sandbox::new(&SandboxConfig::default(), &[], false);
    assert_eq!((on.seccomp, on.landlock), (SeccompMode::On, true));
    let off = SandboxConfig {
        seccomp: Some(SeccompMode::Off),
        landlock: Some(false),
    };
    let off = Sandbox::new(&off, &[], false);
    assert_eq!((off.seccomp, off.landlock), (SeccompMode::Off, false));
}
