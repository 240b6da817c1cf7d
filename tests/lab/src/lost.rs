//! Emulated hosts that fall silent: what QEMU and this machine's kernel know of one is kept, and it
//! is woken where that is possible.
//!
//! A CPU of QEMU's that sleeps though it has something to do has been seen to wait for ever. An
//! interrupt wakes it: each ping of the agent is one, then QEMU is asked to stop all CPUs and to let
//! them go on, and at last to send an NMI.

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::report::note;

/// The file in a host's logs, and in those of the test that lost it.
pub const STATE: &str = "qemu-state.log";
/// A host that has not answered for so long is lost.
pub const SILENCE: Duration = Duration::from_secs(180);
/// When its state is kept and its CPUs are let go on anew.
const STOP_AND_GO: Duration = Duration::from_secs(30);
/// When it is sent an NMI.
const NMI: Duration = Duration::from_secs(60);
/// How long QEMU's monitor may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// What it writes when it waits for a command.
const PROMPT: &[u8] = b"(qemu) ";
/// What it is asked of a host that is lost.
const QUESTIONS: [&str; 9] = [
    "info status",
    "info cpus",
    "info registers -a",
    "info lapic 0",
    "info lapic 1",
    "info irq",
    "info pic",
    "info registers -a",
    "info lapic 0",
];

/// QEMU's monitor, in the form for people.
#[derive(Debug)]
pub struct Monitor(UnixStream);

impl Monitor {
    /// `None` where nobody listens: a host can be used without it.
    pub fn connect(socket: &Path) -> Option<Self> {
        let stream = UnixStream::connect(socket).ok()?;
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .ok()?;
        stream.set_write_timeout(Some(ANSWER)).ok()?;
        Some(Self(stream))
    }

    /// What it answers within its limit.
    pub fn ask(&mut self, question: &str) -> String {
        // The prompt before this question, or the late answer to another.
        let _ = self.until_prompt(Duration::from_millis(300));
        if let Err(error) = writeln!(self.0, "{question}") {
            return format!("the monitor: {error}");
        }
        self.until_prompt(ANSWER)
    }

    fn until_prompt(&mut self, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        let (mut said, mut part) = (Vec::new(), [0; 4096]);
        while !said.ends_with(PROMPT) && Instant::now() < deadline {
            match self.0.read(&mut part) {
                Ok(0) => break,
                Ok(length) => said.extend_from_slice(part.get(..length).unwrap_or_default()),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(_) => break,
            }
        }
        String::from_utf8_lossy(&said).into_owned()
    }
}

/// What was tried to wake a host.
#[derive(Debug, Default)]
pub struct Waking {
    stopped: bool,
    interrupted: bool,
}

impl Waking {
    /// Tries what is due when the host has been silent for so long.
    pub fn after(
        &mut self,
        silent: Duration,
        qemu: u32,
        mut monitor: Option<&mut Monitor>,
        logs: &Path,
    ) {
        if silent < STOP_AND_GO {
            // It was heard of again.
            *self = Self::default();
            return;
        }
        if !self.stopped {
            self.stopped = true;
            note(&format!(
                "the host is silent since {} s; its state is in {}",
                silent.as_secs(),
                logs.display()
            ));
            keep(qemu, monitor.as_deref_mut(), logs);
            if let Some(monitor) = &mut monitor {
                monitor.ask("stop");
                monitor.ask("cont");
            }
        }
        if silent >= NMI && !self.interrupted {
            self.interrupted = true;
            note("the host is still silent; it is sent an NMI");
            if let Some(monitor) = monitor {
                monitor.ask("nmi");
            }
        }
    }
}

/// Keeps what is known of a host in the file [`STATE`], after what it has already.
pub fn keep(qemu: u32, monitor: Option<&mut Monitor>, logs: &Path) {
    let mut text = format!("QEMU is process {qemu}; its threads:\n{}", threads(qemu));
    std::thread::sleep(Duration::from_secs(2));
    let _ = write!(text, "\ntwo seconds later:\n{}", threads(qemu));
    match monitor {
        Some(monitor) => {
            for question in QUESTIONS {
                let _ = write!(text, "\n{question}\n{}\n", monitor.ask(question));
            }
        }
        None => text.push_str("\nno monitor\n"),
    }
    let file = fs::File::options()
        .create(true)
        .append(true)
        .open(logs.join(STATE));
    let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
}

/// Each thread: its number, name, state, the call of the kernel that it waits in, and its time on
/// a processor in ticks.
fn threads(process: u32) -> String {
    let mut text = String::new();
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = read("stat");
        let after_name = stat.rsplit(") ").next().unwrap_or_default();
        let fields: Vec<&str> = after_name.split(' ').collect();
        let field = |n: usize| fields.get(n).copied().unwrap_or("?");
        let _ = writeln!(
            text,
            "{} {} {} {} user {} system {}",
            task.file_name().to_string_lossy(),
            read("comm").trim(),
            field(0),
            read("wchan").trim(),
            field(11),
            field(12)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_is_known_of_a_silent_host_is_kept_and_it_is_woken() {
        let logs = std::env::temp_dir().join(format!("lab-lost-{}", std::process::id()));
        fs::create_dir_all(&logs).unwrap();
        let socket = logs.join("monitor");
        let listener = UnixListener::bind(&socket).unwrap();
        let qemu = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while let Some(Ok(line)) = lines.next() {
                write!(stream, "answer to {line}\r\n(qemu) ").unwrap();
                asked.push(line);
            }
            asked
        });
        let mut monitor = Monitor::connect(&socket).unwrap();
        let mut waking = Waking::default();
        for silent in [STOP_AND_GO - ANSWER, STOP_AND_GO, NMI, NMI + ANSWER] {
            waking.after(silent, std::process::id(), Some(&mut monitor), &logs);
        }
        drop(monitor);
        let asked = qemu.join().unwrap();
        let expected = [&QUESTIONS[..], &["stop", "cont", "nmi"]].concat();
        assert_eq!(asked, expected);
        let kept = fs::read_to_string(logs.join(STATE)).unwrap();
        assert!(kept.contains("answer to info lapic 1") && kept.contains("two seconds later"));
        fs::remove_dir_all(&logs).unwrap();
    }
}
