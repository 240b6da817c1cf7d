//! Between the terminal and the guest's serial port or console.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use devices::legacy::SerialPort;
use devices::virtio::{ConsoleBackend, ConsoleConfig};
use vmm_sys_util::epoll::EventSet;

use super::event_loop::Input;
use crate::config::{self, ConsoleMode};

/// What is typed, into the serial port.
pub(super) struct SerialInput(pub(super) Arc<SerialPort>);

impl Input for SerialInput {
    fn receive(&self, bytes: &[u8]) -> usize {
        self.0.receive(bytes)
    }

    fn room(&self) -> (RawFd, EventSet) {
        (self.0.room_event().as_raw_fd(), EventSet::IN)
    }

    fn has_room(&self) {
        let _ = self.0.room_event().read();
    }
}

/// What is typed, into a console that reads the other end of a pipe.
pub(super) struct PipeInput(File);

impl PipeInput {
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Self(pipe.into())
    }
}

impl Input for PipeInput {
    fn receive(&self, bytes: &[u8]) -> usize {
        match (&self.0).write(bytes) {
            Ok(taken) => taken,
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => 0,
            // The console is gone: what is typed goes nowhere.
            Err(_) => bytes.len(),
        }
    }

    fn room(&self) -> (RawFd, EventSet) {
        (self.0.as_raw_fd(), EventSet::OUT)
    }
}

/// A file that is opened once everything else of the VM is there, so that a VM that cannot be
/// built leaves no file behind. No guest runs before it is open.
#[derive(Clone, Debug, Default)]
pub(super) struct LateFile(Arc<OnceLock<File>>);

impl LateFile {
    /// Opens it: empty on the first boot, and after a reboot to go on where the last one ended.
    pub(super) fn open(&self, path: &Path, first_boot: bool) -> io::Result<()> {
        let mut options = OpenOptions::new();
        match first_boot {
            true => options.write(true).create(true).truncate(true),
            false => options.append(true).create(true),
        };
        // Already open only if this is called twice.
        let _ = self.0.set(options.open(path)?);
        Ok(())
    }
}

impl Write for LateFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.get() {
            Some(mut file) => file.write(bytes),
            None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A descriptor of standard output that blocks.
pub(super) fn stdout() -> io::Result<OwnedFd> {
    io::stdout().as_fd().try_clone_to_owned()
}

/// The host's end of the console, and where what is typed goes.
pub(super) fn console(
    config: &config::ConsoleConfig,
) -> io::Result<Option<(ConsoleConfig, Option<OwnedFd>)>> {
    let (backend, input) = match (config.mode, &config.file, &config.socket) {
        (ConsoleMode::Tty, ..) => {
            let (read, write) = io::pipe()?;
            let write = reopen(&write)?.into();
            let output = match reopen(&io::stdout()) {
                Ok(file) => file.into(),
                // A socket cannot be opened again: then a slow reader makes a reset wait.
                Err(_) => stdout()?,
            };
            let backend = ConsoleBackend::Stream {
                input: Some(read.into()),
                output,
            };
            (backend, Some(write))
        }
        (ConsoleMode::File, Some(path), _) => (ConsoleBackend::File(path.clone()), None),
        (ConsoleMode::Socket, _, Some(path)) => (ConsoleBackend::Socket(path.clone()), None),
        (ConsoleMode::Off | ConsoleMode::File | ConsoleMode::Socket, ..) => return Ok(None),
    };
    let port = config.port.clone();
    Ok(Some((ConsoleConfig { backend, port }, input)))
}

/// Opens what `fd` is open for again, for writing without blocking. The mode belongs to the new
/// description only: whoever shares the old one (a shell, its terminal) is not disturbed.
fn reopen(fd: &impl AsRawFd) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}
