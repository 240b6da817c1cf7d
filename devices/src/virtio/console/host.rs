//! The host's end of a console: who is there, and what is waited for.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use vmm_sys_util::epoll::EventSet;

use super::{INPUT, LISTENER, OUTPUT};
use crate::virtio::worker::Waiter;

/// The host's end: who is there now.
#[derive(Default)]
pub(super) struct Host {
    pub(super) listener: Option<End<UnixListener>>,
    pub(super) input: Option<End<File>>,
    pub(super) output: Option<End<File>>,
}

/// One file descriptor of the host's end, and whether a worker waits for it.
pub(super) struct End<T> {
    pub(super) file: T,
    pub(super) watched: bool,
}

impl Host {
    /// A new worker waits for nothing yet.
    pub(super) fn forget_waiting(&mut self) {
        if let Some(listener) = &mut self.listener {
            listener.watched = false;
        }
        for end in [&mut self.input, &mut self.output].into_iter().flatten() {
            end.watched = false;
        }
    }
}

/// The host's end and what is waited for there, for one activation.
pub(super) struct Link<'h> {
    pub(super) host: &'h mut Host,
    pub(super) waiter: Waiter,
    /// The input was seen readable and has not run dry since. A terminal is read only then, since
    /// it may not be non-blocking.
    pub(super) readable: bool,
}

impl Link<'_> {
    pub(super) fn is_connected(&self) -> bool {
        self.host.output.is_some()
    }

    /// Waits for exactly those ends that something can be done about: one that hung up would
    /// keep us awake otherwise.
    pub(super) fn watch(&mut self, input: bool, output: bool) -> io::Result<()> {
        let alone = !self.is_connected();
        let Host {
            listener,
            input: from,
            output: to,
        } = &mut *self.host;
        if let Some(listener) = listener {
            listener.watch(&self.waiter, alone, LISTENER, EventSet::IN)?;
        }
        if let Some(to) = to {
            to.watch(&self.waiter, output, OUTPUT, EventSet::OUT)?;
        }
        if let Some(end) = from
            && let Err(error) =
                end.watch(&self.waiter, input && !self.readable, INPUT, EventSet::IN)
        {
            // A regular file or /dev/null: there is nothing to wait for, and nobody types there.
            log::debug!("console input is not read: {error}");
            *from = None;
        }
        Ok(())
    }

    pub(super) fn accept(&mut self) {
        let Some(listener) = &self.host.listener else {
            return;
        };
        let peer = listener.file.accept().and_then(|(peer, _)| {
            peer.set_nonblocking(true)?;
            // Two descriptors, so that each direction is waited for on its own.
            Ok((OwnedFd::from(peer.try_clone()?), OwnedFd::from(peer)))
        });
        match peer {
            Ok((input, output)) => {
                self.host.input = Some(End::new(input.into()));
                self.host.output = Some(End::new(output.into()));
                self.readable = true;
            }
            Err(error) => log::debug!("a console peer was lost: {error}"),
        }
    }

    /// The peer is gone, or a stream ended.
    pub(super) fn input_ended(&mut self) -> io::Result<()> {
        self.readable = false;
        if self.host.listener.is_some() {
            return self.disconnect();
        }
        self.watch(false, false)?;
        self.host.input = None;
        Ok(())
    }

    pub(super) fn disconnect(&mut self) -> io::Result<()> {
        // Before they are closed: a duplicate would keep the other's registration alive.
        self.watch(false, false)?;
        self.host.input = None;
        self.host.output = None;
        Ok(())
    }
}

impl<T: AsRawFd> End<T> {
    pub(super) fn new(file: T) -> Self {
        Self {
            file,
            watched: false,
        }
    }

    fn watch(&mut self, waiter: &Waiter, on: bool, token: u64, events: EventSet) -> io::Result<()> {
        if on != self.watched {
            if on {
                waiter.add(&self.file, token, events)?;
            } else {
                waiter.remove(&self.file)?;
            }
            self.watched = on;
        }
        Ok(())
    }
}
