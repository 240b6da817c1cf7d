//! A guest's init. It mounts the kernel's file systems, loads the modules its initramfs lists and
//! then runs the commands that arrive over the channel (see the library), until the machine ends.
//!
//! The console stays the kernel's: the agent writes a few markers there and nothing else. From the
//! kernel's command line it takes `agent.run=COMMAND` (a shell command with `,` for each space,
//! run instead of waiting when there is no channel, and before it otherwise) and
//! `agent.modprobe=NAME` (a module to load before all others).
//!
//! In a machine that runs, `/init kexec KERNEL INITRAMFS WORDS…` starts another kernel.

mod kexec;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel as channel_of;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent::{
    Answer, HELLO, NO_CHANNEL, OUTPUT_LIMIT, PORT_NAME, READY, Request, TIMED_OUT, read_request,
    write_answer,
};

/// How long the channel's device may take to appear.
const CHANNEL_LIMIT: Duration = Duration::from_secs(120);
/// How long a module may take to load.
const MODPROBE_LIMIT: Duration = Duration::from_secs(200);
/// Where the initramfs lists the modules to load, one path a line, dependencies first.
const MODULES: &str = "/lib/modules/load";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // An init is given words of the kernel's command line; they mean nothing to it.
    if std::process::id() != 1 {
        let result = match arguments.as_slice() {
            [verb, kernel, initramfs, words @ ..] if verb == "kexec" => {
                kexec::go(kernel, initramfs, words)
            }
            _ => Err(io::Error::other("usage: init kexec KERNEL INITRAMFS WORDS")),
        };
        if let Err(error) = result {
            eprintln!("init: {error}");
            std::process::exit(1);
        }
    }
    prepare();
    be_patient();
    if let Some(module) = from_command_line("agent.modprobe") {
        let (status, _, why) = run(&format!("modprobe {module}"), MODPROBE_LIMIT);
        if status != 0 {
            let why = String::from_utf8_lossy(&why).into_owned();
            say(&format!("agent: modprobe {module}: status {status} {why}"));
        }
    }
    load_modules();
    say(READY);
    if let Some(command) = from_command_line("agent.run") {
        let (status, _, _) = run(&command.replace(',', " "), Duration::from_secs(3600));
        say(&format!("agent: agent.run ended with status {status}"));
    }
    let Some(path) = channel() else {
        say(NO_CHANNEL);
        loop {
            reap();
            std::thread::sleep(Duration::from_secs(1));
        }
    };
    say(&format!("agent: taking commands on {}", path.display()));
    loop {
        if let Err(e) = serve(&path) {
            say(&format!("agent: {}: {e}", path.display()));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Mounts what every command expects. A file system that a kernel lacks is no reason to stop.
fn prepare() {
    let mounts = [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("debugfs", "/sys/kernel/debug"),
        ("devpts", "/dev/pts"),
    ];
    for (kind, place) in mounts {
        let _ = fs::create_dir_all(place);
        if let Err(e) = mount(kind, place)
            && e.raw_os_error() != Some(libc::EBUSY)
            && e.raw_os_error() != Some(libc::ENODEV)
            && e.raw_os_error() != Some(libc::ENOENT)
        {
            say(&format!("agent: mount {kind} on {place}: {e}"));
        }
    }
}

/// Tells the kernel that this machine may be slow: what it takes for a lockup would be one on a
/// machine that has a processor of its own. Whoever waits for this machine has a limit, too. A
/// kernel that lacks one of these has no such complaint.
fn be_patient() {
    for (what, value) in [
        (
            "/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout",
            "300",
        ),
        (
            "/sys/module/rcupdate/parameters/rcu_exp_cpu_stall_timeout",
            "300000",
        ),
        ("/proc/sys/kernel/watchdog_thresh", "60"),
        ("/proc/sys/kernel/hung_task_timeout_secs", "600"),
        (
            "/sys/module/workqueue/parameters/cpu_intensive_thresh_us",
            "0",
        ),
    ] {
        let _ = fs::write(what, value);
    }
}

fn mount(kind: &str, place: &str) -> io::Result<()> {
    let kind = std::ffi::CString::new(kind)?;
    let place = std::ffi::CString::new(place)?;
    // SAFETY: the three strings are NUL-terminated and outlive the call; no data is passed.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            place.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn load_modules() {
    let list = fs::read_to_string(MODULES).unwrap_or_default();
    for path in list.lines() {
        if let Err(e) = load_module(Path::new(path))
            && e.raw_os_error() != Some(libc::EEXIST)
        {
            say(&format!("agent: module {path}: {e}"));
        }
    }
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: the descriptor is open for the length of the call and the parameter string is a
    // NUL-terminated literal.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Writes one line on the console, which is the kernel's and may be absent.
fn say(line: &str) {
    // /dev/kmsg puts the line between the kernel's own, with a time.
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| kmsg.write_all(format!("<5>{line}\n").as_bytes()));
    if written.is_err() {
        let _ = writeln!(io::stdout(), "{line}");
    }
}

fn from_command_line(key: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .map(str::to_owned)
}

/// The channel's device: the named virtio-serial port, or else the first virtio console.
fn channel() -> Option<PathBuf> {
    let deadline = Instant::now() + CHANNEL_LIMIT;
    loop {
        for port in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            if fs::read_to_string(port.path().join("name")).is_ok_and(|n| n.trim() == PORT_NAME) {
                return Some(Path::new("/dev").join(port.file_name()));
            }
        }
        // hvc0 has a node in every kernel with the hvc core; it is a console only once opened.
        let hvc = Path::new("/dev/hvc0");
        if hvc.exists() && OpenOptions::new().read(true).open(hvc).is_ok() {
            return Some(hvc.to_owned());
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Answers requests until the channel fails or ends: commands one after the other, and pings at
/// once, whatever runs meanwhile.
fn serve(path: &Path) -> io::Result<()> {
    let to = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)?;
    make_raw(&to);
    let mut from = BufReader::new(to.try_clone()?);
    let to = Arc::new(Mutex::new(to));
    let answer = |to: &Mutex<File>, answer: &Answer| {
        let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
        write_answer(&mut *to, answer)
    };
    // Whoever waits for this boot need not ask.
    answer(&to, &Answer::Pong { id: HELLO })?;
    let (commands, queue) = channel_of::<(u64, u64, String)>();
    let answers = Arc::clone(&to);
    let runner = std::thread::spawn(move || -> io::Result<()> {
        for (id, limit_ms, command) in queue {
            let (status, stdout, stderr) = run(&command, Duration::from_millis(limit_ms));
            let done = Answer::Done {
                id,
                status,
                stdout,
                stderr,
            };
            answer(&answers, &done)?;
        }
        Ok(())
    });
    let ended = loop {
        let done = match read_request(&mut from) {
            Ok(Request::Ping { id }) => answer(&to, &Answer::Pong { id }),
            Ok(Request::Run {
                id,
                limit_ms,
                command,
            }) => commands
                .send((id, limit_ms, command))
                .map_err(io::Error::other),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            break error;
        }
    };
    // What is under way comes to its end; whoever asks next is not answered before.
    drop(commands);
    match runner.join() {
        Ok(_) => Err(ended),
        Err(_) => Err(io::Error::other("the runner of commands panicked")),
    }
}

/// Stops a terminal from echoing and editing; another kind of device has nothing to stop.
fn make_raw(file: &File) {
    // SAFETY: an all-zero termios is a valid value; it is overwritten before it is used.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the structure is ours.
    if unsafe { libc::tcgetattr(file.as_raw_fd(), &raw mut termios) } != 0 {
        return;
    }
    // SAFETY: the structure was filled by tcgetattr.
    unsafe { libc::cfmakeraw(&raw mut termios) };
    // SAFETY: the descriptor is open and the structure is initialised.
    unsafe { libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &raw const termios) };
}

/// Runs a shell command with its output in files, so that what it leaves in the background cannot
/// hold the answer back.
fn run(command: &str, limit: Duration) -> (i32, Vec<u8>, Vec<u8>) {
    let result = spawn_and_wait(command, limit);
    reap();
    match result {
        Ok(done) => done,
        Err(e) => (127, Vec::new(), format!("agent: sh: {e}\n").into_bytes()),
    }
}

fn spawn_and_wait(command: &str, limit: Duration) -> io::Result<(i32, Vec<u8>, Vec<u8>)> {
    let mut out = scratch("out")?;
    let mut err = scratch("err")?;
    let mut child = Command::new("/bin/sh")
        .args(["-c", command])
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .stdin(Stdio::null())
        .stdout(out.try_clone()?)
        .stderr(err.try_clone()?)
        .process_group(0)
        .spawn()?;
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        }
        if Instant::now() >= deadline {
            let group = -i32::try_from(child.id()).unwrap_or(i32::MAX);
            // SAFETY: kill only takes numbers; the group is the child's own.
            unsafe { libc::kill(group, libc::SIGKILL) };
            child.wait()?;
            break TIMED_OUT;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    };
    Ok((status, contents(&mut out)?, contents(&mut err)?))
}

fn scratch(name: &str) -> io::Result<File> {
    let path = format!("/run/agent.{name}");
    let _ = fs::remove_file(&path);
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .open(path)
}

fn contents(file: &mut File) -> io::Result<Vec<u8>> {
    use std::io::Seek;
    file.seek(io::SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(OUTPUT_LIMIT as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Collects orphans, which an init inherits.
fn reap() {
    // SAFETY: waitpid with a null status pointer writes nothing.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}
