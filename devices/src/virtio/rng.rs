//! virtio-rng (virtio 1.3, 5.4): entropy from a source of the host.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use viommu::dma::DmaPort;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::{self, TransferError};
use super::device::{Activation, DeviceType, VirtioDevice, VirtioInterrupt};
use super::ring::{Broken, Chain, RING_FEATURES, Ring};
use super::worker::{Stop, Waiter, Workers};
use crate::limit::warn_limited;

const QUEUE_SIZE: u16 = 64;
/// The most bytes that one request gets.
const MOST: u32 = 1 << 16;

/// The source of the host was not opened.
#[derive(Error, Debug)]
#[error("entropy source {path:?} cannot be opened: use /dev/urandom")]
pub struct RngError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A virtio entropy device.
pub struct Rng {
    source: Arc<File>,
    running: Mutex<Option<Workers>>,
}

impl Rng {
    /// Opens the source of entropy, such as `/dev/urandom`. Reading it must not block for long: a
    /// reset of the device waits for it.
    ///
    /// # Errors
    /// [`RngError`].
    pub fn open(path: &Path) -> Result<Arc<Self>, RngError> {
        let source = File::open(path).map_err(|source| RngError {
            path: path.into(),
            source,
        })?;
        Ok(Arc::new(Self {
            source: Arc::new(source),
            running: Mutex::new(None),
        }))
    }

    fn running(&self) -> MutexGuard<'_, Option<Workers>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&self, mut activation: Activation) -> io::Result<()> {
        let Some(queue) = activation.queues.pop().flatten() else {
            return Ok(());
        };
        let mut workers = Workers::new()?;
        let service = Service {
            source: Arc::clone(&self.source),
            dma: activation.dma,
            interrupt: activation.interrupt,
            ring: queue.ring,
            stop: workers.stop(),
        };
        let mut waiter = Waiter::new()?;
        waiter.add(&*service.stop, STOP, EventSet::IN)?;
        waiter.add(&*queue.kick, KICK, EventSet::IN)?;
        workers.spawn("virtio-rng", move || service.run(&mut waiter, &queue.kick))?;
        *self.running() = Some(workers);
        Ok(())
    }

    fn reset(&self) {
        let workers = self.running().take();
        drop(workers);
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}

const STOP: u64 = 0;
const KICK: u64 = 1;

/// One activation of the device.
struct Service {
    source: Arc<File>,
    dma: DmaPort,
    interrupt: Arc<dyn VirtioInterrupt>,
    ring: Ring,
    stop: Arc<Stop>,
}

impl Service {
    fn run(mut self, waiter: &mut Waiter, kick: &EventFd) {
        let mut chain = Chain::default();
        loop {
            if let Err(broken) = self.drain(&mut chain) {
                warn_limited!("virtio-rng needs a reset by the guest: {broken}");
                self.interrupt.needs_reset();
                return;
            }
            let woken = waiter.wait();
            match woken.map(|mut ready| ready.any(|(token, _)| token == STOP)) {
                Ok(true) => return,
                // Another signal that comes in now is not lost: it wakes us again.
                Ok(false) => drop(kick.read()),
                Err(error) => {
                    log::error!("virtio-rng stops: {error}");
                    self.interrupt.needs_reset();
                    return;
                }
            }
        }
    }

    fn drain(&mut self, chain: &mut Chain) -> Result<(), Broken> {
        while !self.stop.is_set() {
            let access = self.dma.access();
            if !self.ring.pop(&access, chain)? {
                if self.ring.enable_kicks(&access)? {
                    continue;
                }
                return Ok(());
            }
            self.ring.disable_kicks(&access)?;
            // A device may give less than was asked for (5.4.6.1), so one request is bounded.
            let got = match buffers::read_once(&access, &chain.writable, MOST, self.source.as_fd())
            {
                Ok(got) => got as u32,
                Err(TransferError::Host(error)) => {
                    log::debug!("no entropy: {error}");
                    0
                }
                Err(_) => 0,
            };
            self.ring.push(&access, chain.head(), got)?;
            if self.ring.wants_interrupt(&access)? {
                self.interrupt.queue(0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BUFFERS, RAM, WRITE, ram, start};

    #[test]
    fn entropy_fills_what_the_guest_gives_and_one_request_is_bounded() {
        let rng = Rng::open(Path::new("/dev/urandom")).unwrap();
        let (mut drivers, recorder) = start(&*rng, &ram(), rng.features());
        drivers[0].add(&[(BUFFERS, 64, WRITE), (BUFFERS + 64, 64, WRITE)]);
        drivers[0].add(&[(BUFFERS + 0x1000, 1 << 20, WRITE)]);
        drivers[0].kick();
        let used = drivers[0].wait(&recorder, 2);
        assert_eq!(used[0], (0, 128));
        assert_eq!(used[1], (2, MOST));
        assert_ne!(drivers[0].read(BUFFERS, 128), [0; 128]);
        let after = BUFFERS + 0x1000 + u64::from(MOST);
        assert_eq!(drivers[0].read(after, 64), [0; 64]);
    }

    #[test]
    fn buffers_it_cannot_fill_come_back_empty() {
        let rng = Rng::open(Path::new("/dev/urandom")).unwrap();
        let (mut drivers, recorder) = start(&*rng, &ram(), rng.features());
        drivers[0].add(&[(RAM, 64, WRITE)]);
        drivers[0].add(&[(BUFFERS, 64, 0)]);
        drivers[0].kick();
        assert_eq!(drivers[0].wait(&recorder, 2), [(0, 0), (1, 0)]);
        drivers[0].set_available(1000);
        drivers[0].kick();
        recorder.wait_until(|counts| counts.needs_reset == 1);
    }

    #[test]
    fn a_source_that_is_not_there_is_refused_with_the_remedy() {
        let error = Rng::open(Path::new("/dev/nothing"))
            .map(|_| ())
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "entropy source \"/dev/nothing\" cannot be opened: use /dev/urandom"
        );
    }
}
