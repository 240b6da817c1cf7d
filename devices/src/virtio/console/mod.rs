//! virtio-console (virtio 1.3, 5.3): a console of the guest (hvc0), or a named port
//! (`/dev/vport0p0`) as a byte stream between the guest and a program on the host.
//!
//! One thread serves it. Input is read only when the guest gave a buffer for it, and output waits
//! for its reader, so neither side is buffered here and neither loses a byte; output to nobody is
//! dropped, since a guest's kernel spins until a console's buffer is used.

#![forbid(unsafe_code)]

mod host;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use viommu::dma::{DmaAccess, DmaPort};
use vmm_sys_util::epoll::EventSet;

use self::host::{End, Host, Link};
use crate::limit::warn_limited;
use crate::virtio::buffers::{self, TransferError};
use crate::virtio::device::{Activation, ActiveQueue, DeviceType, VirtioDevice, VirtioInterrupt};
use crate::virtio::ring::{Broken, Chain, RING_FEATURES};
use crate::virtio::worker::{Stop, Waiter, Workers};

/// VIRTIO_CONSOLE_F_MULTIPORT: named ports, with control queues (5.3.3).
const F_MULTIPORT: u64 = 1 << 1;

/// Queues: port 0, then control (5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
const QUEUE_SIZES: [u16; 4] = [64; 4];

/// Control events (5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// Control messages that wait for a buffer of the guest; more than a driver that answers causes.
const MOST_MESSAGES: usize = 32;

/// The most bytes moved for one buffer of the guest, so that a reset never waits long.
const MOST: u32 = 1 << 20;
/// Buffers in one direction before the others have their turn.
const TURN: usize = 64;

/// The host's end of a console.
#[derive(Debug)]
pub enum ConsoleBackend {
    /// No input; output is dropped.
    Null,
    /// No input; output replaces what is in the file.
    File(PathBuf),
    /// A Unix socket that listens here, for one peer at a time. The path must not exist; it is
    /// removed when the console is dropped.
    Socket(PathBuf),
    /// File descriptors of a terminal or of pipes. `output` should be non-blocking: a reset of
    /// the device waits for a write that blocks.
    Stream {
        /// What the guest reads; ends with end of file.
        input: Option<OwnedFd>,
        /// What the guest writes to.
        output: OwnedFd,
    },
}

/// What a console is made from.
#[derive(Debug)]
pub struct ConsoleConfig {
    /// The host's end.
    pub backend: ConsoleBackend,
    /// `None`: a console, hvc0 in the guest. `Some`: a port of this name, which the guest finds
    /// under `/sys/class/virtio-ports`, and which tells the guest whether a peer is there.
    pub port: Option<String>,
}

/// Why a console was not opened.
#[derive(Error, Debug)]
pub enum ConsoleError {
    /// The output file was not created.
    #[error("console file {path:?} cannot be created: give a path this user can write to")]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The socket's path is taken.
    #[error("console socket {0:?} exists: remove it or give another path")]
    Exists(PathBuf),
    /// The socket was not created.
    #[error(
        "console socket {path:?} cannot be created: give a path of at most 107 bytes in a \
         directory this user can write to"
    )]
    Socket {
        /// Its path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A virtio console.
pub struct Console {
    port: Option<String>,
    /// Locked by the worker as long as it runs, so that a peer stays connected over a reset.
    host: Arc<Mutex<Host>>,
    socket: Option<PathBuf>,
    running: Mutex<Option<Workers>>,
}

impl Console {
    /// Opens the host's end.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn open(config: ConsoleConfig) -> Result<Arc<Self>, ConsoleError> {
        let mut socket = None;
        let mut host = Host::default();
        match config.backend {
            ConsoleBackend::Null => {}
            ConsoleBackend::File(path) => {
                let file =
                    File::create(&path).map_err(|source| ConsoleError::File { path, source })?;
                host.output = Some(End::new(file));
            }
            ConsoleBackend::Socket(path) => {
                host.listener = Some(End::new(listen(&path)?));
                socket = Some(path);
            }
            ConsoleBackend::Stream { input, output } => {
                host.input = input.map(|fd| End::new(File::from(fd)));
                host.output = Some(End::new(File::from(output)));
            }
        }
        Ok(Arc::new(Self {
            port: config.port,
            host: Arc::new(Mutex::new(host)),
            socket,
            running: Mutex::new(None),
        }))
    }

    fn running(&self) -> MutexGuard<'_, Option<Workers>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(path: &Path) -> Result<UnixListener, ConsoleError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => ConsoleError::Exists(path.into()),
        _ => ConsoleError::Socket {
            path: path.into(),
            source,
        },
    };
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        RING_FEATURES | if self.port.is_some() { F_MULTIPORT } else { 0 }
    }

    fn accepts(&self, features: u64) -> bool {
        // A named port cannot be had without the control queues.
        self.port.is_none() || features & F_MULTIPORT != 0
    }

    fn queue_sizes(&self) -> &[u16] {
        match self.port {
            Some(_) => &QUEUE_SIZES,
            None => &QUEUE_SIZES[..2],
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // cols, rows (both not offered), max_nr_ports
        const CONFIG: [u8; 8] = [0, 0, 0, 0, 1, 0, 0, 0];
        data.fill(0);
        for (to, from) in data.iter_mut().zip(CONFIG.iter().skip(offset as usize)) {
            *to = *from;
        }
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let mut queues = activation.queues;
        queues.resize_with(QUEUE_SIZES.len(), || None);
        let mut workers = Workers::new()?;
        let waiter = Waiter::new()?;
        let stop = workers.stop();
        waiter.add(&*stop, STOP, EventSet::IN)?;
        for (token, queue) in (0..).zip(&queues) {
            if let Some(queue) = queue {
                waiter.add(&*queue.kick, token, EventSet::IN)?;
            }
        }
        let service = Service {
            dma: Arc::new(activation.dma),
            interrupt: activation.interrupt,
            stop,
            name: self.port.clone(),
            queues,
            receiving: None,
            sending: None,
            messages: VecDeque::new(),
            guest_ready: false,
            guest_open: false,
            connected: false,
        };
        let host = Arc::clone(&self.host);
        workers.spawn("virtio-console", move || {
            let mut host = host.lock().unwrap_or_else(PoisonError::into_inner);
            service.run(&mut host, waiter);
        })?;
        *self.running() = Some(workers);
        Ok(())
    }

    fn reset(&self) {
        let workers = self.running().take();
        drop(workers);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reset();
        if let Some(path) = &self.socket {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

// Tokens 0 to 3 are the queues'.
const STOP: u64 = 4;
const LISTENER: u64 = 5;
const INPUT: u64 = 6;
const OUTPUT: u64 = 7;

/// One activation of the device.
struct Service {
    dma: Arc<DmaPort>,
    interrupt: Arc<dyn VirtioInterrupt>,
    stop: Arc<Stop>,
    name: Option<String>,
    queues: Vec<Option<ActiveQueue>>,
    /// A buffer that waits for input.
    receiving: Option<Chain>,
    /// What is left of a buffer that waits for its reader.
    sending: Option<Chain>,
    /// Control messages that wait for a buffer.
    messages: VecDeque<Vec<u8>>,
    /// The guest's driver knows the port.
    guest_ready: bool,
    /// A program of the guest has the port open. Its driver throws input away before.
    guest_open: bool,
    /// What the guest was told last about the host's end.
    connected: bool,
}

impl Service {
    fn run(mut self, host: &mut Host, waiter: Waiter) {
        host.forget_waiting();
        let mut link = Link {
            // A peer may have sent something before the reset.
            readable: host.listener.is_some(),
            host,
            waiter,
        };
        if let Err(error) = self.serve(&mut link) {
            warn_limited!("virtio-console needs a reset by the guest: {error}");
            self.interrupt.needs_reset();
        }
    }

    fn serve(&mut self, link: &mut Link<'_>) -> io::Result<()> {
        while !self.stop.is_set() {
            self.work(link)?;
            link.watch(self.receiving.is_some(), self.sending.is_some())?;
            let mut accept = false;
            for (token, _) in link.waiter.wait()? {
                match token {
                    // The loop ends.
                    STOP => {}
                    LISTENER => accept = true,
                    INPUT => link.readable = true,
                    OUTPUT => {}
                    index => {
                        if let Some(Some(queue)) = self.queues.get(index as usize) {
                            // Another signal that comes in now is not lost: it wakes us again.
                            let _ = queue.kick.read();
                        }
                    }
                }
            }
            if accept {
                link.watch(false, false)?;
                link.accept();
            }
        }
        Ok(())
    }

    /// Does everything that can be done without waiting, within a turn.
    fn work(&mut self, link: &mut Link<'_>) -> io::Result<()> {
        let dma = Arc::clone(&self.dma);
        self.control(&dma)?;
        let more = self.output(link, &dma)? | self.input(link, &dma)?;
        let connected = link.is_connected();
        if self.connected != connected {
            self.connected = connected;
            if self.guest_ready {
                self.post(PORT_OPEN, u16::from(connected), &[]);
            }
        }
        self.post_messages(&dma)?;
        if more && let Some(Some(queue)) = self.queues.first() {
            // It brings us back after the others had their turn.
            queue.kick.write(1)?;
        }
        Ok(())
    }

    /// Moves the guest's output to the host. Returns whether the turn ended it.
    fn output(&mut self, link: &mut Link<'_>, dma: &DmaPort) -> io::Result<bool> {
        for _ in 0..TURN {
            let access = dma.access();
            let chain = match self.sending.take() {
                Some(chain) => Some(chain),
                None => self.pop(TRANSMIT, &access)?,
            };
            let Some(mut chain) = chain else {
                return Ok(false);
            };
            let written = match &link.host.output {
                Some(to) if buffers::length(&chain.readable) > 0 => {
                    buffers::write_once(&access, &chain.readable, MOST, to.file.as_fd())
                }
                // Nobody is there, or nothing is left.
                _ => {
                    self.push(TRANSMIT, &access, &chain, 0)?;
                    continue;
                }
            };
            match written {
                Ok(written) => {
                    buffers::trim_front(&mut chain.readable, written as u32);
                    self.sending = Some(chain);
                }
                Err(TransferError::Host(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.sending = Some(chain);
                    return Ok(false);
                }
                Err(error) => {
                    if matches!(error, TransferError::Host(_)) {
                        log::debug!("a console's peer is gone: {error}");
                        link.disconnect()?;
                    }
                    self.push(TRANSMIT, &access, &chain, 0)?;
                }
            }
        }
        Ok(true)
    }

    /// Moves the host's input to the guest. Returns whether the turn ended it.
    fn input(&mut self, link: &mut Link<'_>, dma: &DmaPort) -> io::Result<bool> {
        for _ in 0..TURN {
            let access = dma.access();
            if self.receiving.is_none() {
                self.receiving = self.pop(RECEIVE, &access)?;
            }
            let heard = self.name.is_none() || self.guest_open;
            let (Some(from), true, true) = (&link.host.input, link.readable, heard) else {
                return Ok(false);
            };
            let Some(chain) = self.receiving.take() else {
                return Ok(false);
            };
            if buffers::length(&chain.writable) == 0 {
                self.push(RECEIVE, &access, &chain, 0)?;
                continue;
            }
            match buffers::read_once(&access, &chain.writable, MOST, from.file.as_fd()) {
                Ok(0) => {
                    self.receiving = Some(chain);
                    link.input_ended()?;
                    return Ok(false);
                }
                Ok(read) => {
                    link.readable = link.host.listener.is_some();
                    self.push(RECEIVE, &access, &chain, read as u32)?;
                }
                Err(TransferError::Host(error)) => {
                    self.receiving = Some(chain);
                    link.readable = false;
                    if error.kind() != io::ErrorKind::WouldBlock {
                        link.input_ended()?;
                    }
                    return Ok(false);
                }
                // Memory that is not there: the guest gets its buffer back empty.
                Err(_) => self.push(RECEIVE, &access, &chain, 0)?,
            }
        }
        Ok(true)
    }

    /// Answers the driver's control messages (5.3.6.2).
    fn control(&mut self, dma: &DmaPort) -> io::Result<()> {
        for _ in 0..TURN {
            let access = dma.access();
            let Some(chain) = self.pop(CONTROL_TRANSMIT, &access)? else {
                return Ok(());
            };
            let mut message = [0; 8];
            let whole = buffers::copy_in(&access, &chain.readable, &mut message);
            self.push(CONTROL_TRANSMIT, &access, &chain, 0)?;
            let [a, b, c, d, event_low, event_high, value_low, value_high] = message;
            let port = u32::from_le_bytes([a, b, c, d]);
            let value = u16::from_le_bytes([value_low, value_high]);
            match u16::from_le_bytes([event_low, event_high]) {
                _ if !whole => {}
                // It is about the device, whatever port it names.
                DEVICE_READY if value == 1 => self.post(PORT_ADD, 1, &[]),
                _ if port != 0 => {}
                PORT_READY if value == 1 => {
                    self.guest_ready = true;
                    let name = self.name.clone().unwrap_or_default();
                    self.post(PORT_NAME, 1, name.as_bytes());
                    if self.connected {
                        self.post(PORT_OPEN, 1, &[]);
                    }
                }
                PORT_OPEN => self.guest_open = value == 1,
                _ => {}
            }
        }
        Ok(())
    }

    /// Queues a control message about port 0.
    fn post(&mut self, event: u16, value: u16, more: &[u8]) {
        if self.messages.len() < MOST_MESSAGES {
            let mut message = vec![0; 4];
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            message.extend(more);
            self.messages.push_back(message);
        }
    }

    fn post_messages(&mut self, dma: &DmaPort) -> io::Result<()> {
        while !self.messages.is_empty() {
            let access = dma.access();
            let Some(chain) = self.pop(CONTROL_RECEIVE, &access)? else {
                break;
            };
            let message = self.messages.pop_front().unwrap_or_default();
            let written = buffers::copy_out(&access, &chain.writable, &message).unwrap_or(0);
            self.push(CONTROL_RECEIVE, &access, &chain, written as u32)?;
        }
        Ok(())
    }

    /// The next chain of a queue; `None` when its kick will come.
    fn pop(&mut self, index: u16, access: &DmaAccess<'_>) -> io::Result<Option<Chain>> {
        let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else {
            return Ok(None);
        };
        let mut chain = Chain::default();
        loop {
            if queue.ring.pop(access, &mut chain).map_err(broken)? {
                return Ok(Some(chain));
            }
            if !queue.ring.enable_kicks(access).map_err(broken)? {
                return Ok(None);
            }
        }
    }

    fn push(
        &mut self,
        index: u16,
        access: &DmaAccess<'_>,
        chain: &Chain,
        written: u32,
    ) -> io::Result<()> {
        if let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) {
            let head = chain.head();
            queue.ring.push(access, head, written).map_err(broken)?;
            if queue.ring.wants_interrupt(access).map_err(broken)? {
                self.interrupt.queue(index);
            }
        }
        Ok(())
    }
}

fn broken(error: Broken) -> io::Error {
    io::Error::other(error)
}

#[cfg(test)]
mod tests;
