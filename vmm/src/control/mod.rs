//! How a running nestling is told what to do, and asked how it is, from other threads.
//!
//! There is one thread that owns the VM (the main thread, with its event loop) and one that talks
//! to clients. They share three things and nothing else:
//! - **[`Request`]s** go from clients to the owner through a bounded queue ([`channel`]). Each has
//!   a [`Reply`], which the owner answers when the work is done, perhaps much later.
//! - **[`Shared`]** is what the owner lets everyone see: copies that are replaced as a whole, so
//!   that whoever looks never waits for work that is being done.
//! - **[`Events`]** tell what happened, in order, to whoever follows.

#![forbid(unsafe_code)]

mod descriptors;
mod error;
mod events;
mod shared;

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

pub use descriptors::{Descriptors, Given};
pub use error::{ApiError, Code, sentence};
pub use events::{Event, Events, Record};
pub use shared::{
    Counters, DeviceKind, DeviceNode, Inspect, Operation, Progress, Shared, VmInfo, VmSnapshot,
    VmState,
};

use crate::config::{DeviceConfig, DiskConfig, NetConfig, TestDeviceConfig, Validated};

/// How many requests may wait for the one that is being worked on.
pub const QUEUE: usize = 16;

/// What the owner of the VM can be told to do.
#[derive(Debug)]
pub enum Request {
    /// Keep this configuration; nothing of it is opened yet.
    Create(Box<Validated>),
    /// Build the VM and let it run.
    Boot,
    /// Stop the VM at once, and keep its configuration.
    Shutdown,
    /// Stop the VM if it runs, and forget it.
    Delete,
    /// Build the VM anew and let it run.
    Reboot,
    /// Press the guest's power button.
    PowerButton,
    /// Stop the vCPUs between two instructions.
    Pause,
    /// Let them go on.
    Resume,
    /// Plug a device, with the descriptors that came for it.
    Add(NewDevice, Given),
    /// Unplug a device.
    Remove {
        /// Its name.
        id: String,
        /// How.
        how: Removal,
    },
    /// End nestling.
    VmmShutdown,
}

/// A device to plug.
#[derive(Debug)]
pub enum NewDevice {
    /// A virtio-blk disk.
    Disk(DiskConfig),
    /// A virtio-net card.
    Net(NetConfig),
    /// A device of the host.
    Device(DeviceConfig),
    /// A DMA test engine.
    Test(TestDeviceConfig),
}

impl NewDevice {
    /// The request that plugs it.
    pub fn request(&self) -> &'static str {
        match self {
            Self::Disk(_) => "vm.add-disk",
            Self::Net(_) => "vm.add-net",
            Self::Device(_) => "vm.add-device",
            Self::Test(_) => "vm.add-test-device",
        }
    }

    /// Its name; empty when it has none yet.
    pub fn id(&self) -> &str {
        let id = match self {
            Self::Disk(disk) => &disk.id,
            Self::Net(net) => &net.id,
            Self::Device(device) => &device.id,
            Self::Test(device) => &device.id,
        };
        id.as_deref().unwrap_or_default()
    }
}

/// How a device is unplugged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Removal {
    /// Take it away when the guest has not let go of it in time.
    pub force: bool,
    /// How long the guest has.
    pub timeout: Duration,
}

/// What a request came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Done {
    /// It is done, and there is nothing to tell.
    Nothing,
    /// A device is there.
    Added(PciDeviceInfo),
}

/// A device that was plugged.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, utoipa::ToSchema)]
pub struct PciDeviceInfo {
    /// Its name, by which it is removed.
    pub id: String,
    /// Its address in the guest, as `0000:00:05.0`.
    pub bdf: String,
}

/// The way back to who asked. One that is dropped tells that nestling is ending.
pub struct Reply(Box<dyn FnOnce(Result<Done, ApiError>) + Send>);

impl Reply {
    /// `answer` is called once, on the owner's thread; it must not wait.
    pub fn new(answer: impl FnOnce(Result<Done, ApiError>) + Send + 'static) -> Self {
        Self(Box::new(answer))
    }

    /// Answers.
    pub fn send(self, result: Result<Done, ApiError>) {
        (self.0)(result);
    }
}

impl std::fmt::Debug for Reply {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reply")
    }
}

/// The clients' end of the queue.
#[derive(Debug)]
pub struct Controller {
    requests: SyncSender<(Request, Reply)>,
    wake: EventFd,
}

/// The owner's end of the queue.
#[derive(Debug)]
pub struct Requests {
    requests: Receiver<(Request, Reply)>,
    wake: EventFd,
}

/// A queue of at most [`QUEUE`] requests.
///
/// # Errors
/// No descriptor is left.
pub fn channel() -> io::Result<(Controller, Requests)> {
    let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let (sender, receiver) = sync_channel(QUEUE);
    let controller = Controller {
        requests: sender,
        wake: wake.try_clone()?,
    };
    let requests = Requests {
        requests: receiver,
        wake,
    };
    Ok((controller, requests))
}

impl Controller {
    /// Queues `request`. Never waits.
    ///
    /// # Errors
    /// Too many are waiting, or nestling is ending.
    pub fn send(&self, request: Request, reply: Reply) -> Result<(), ApiError> {
        match self.requests.try_send((request, reply)) {
            Ok(()) => {
                // A full counter is a queue that is signalled already.
                let _ = self.wake.write(1);
                Ok(())
            }
            Err(TrySendError::Full(_)) => Err(ApiError::new(
                Code::TooManyRequests,
                format!("{QUEUE} requests are waiting for the one that is being worked on"),
            )
            .remedy("ask again when one of them was answered; vm.info tells what is being done")),
            Err(TrySendError::Disconnected(_)) => Err(ApiError::ending()),
        }
    }
}

impl Requests {
    /// Readable when there may be a request.
    pub fn eventfd(&self) -> &EventFd {
        &self.wake
    }

    /// The next request, if there is one.
    pub fn next(&self) -> Option<(Request, Reply)> {
        self.requests.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn a_full_queue_refuses_and_a_dropped_owner_says_that_it_ends() {
        let (controller, requests) = channel().unwrap();
        let answers = Arc::new(Mutex::new(Vec::new()));
        let reply = || {
            let answers = answers.clone();
            Reply::new(move |answer| answers.lock().unwrap().push(answer))
        };
        for _ in 0..QUEUE {
            controller.send(Request::Boot, reply()).unwrap();
        }
        let full = controller.send(Request::Boot, reply()).unwrap_err();
        assert_eq!(full.code, Code::TooManyRequests);
        assert!(requests.eventfd().read().is_ok());
        while let Some((_, reply)) = requests.next() {
            reply.send(Ok(Done::Nothing));
        }
        assert_eq!(answers.lock().unwrap().len(), QUEUE);
        drop(requests);
        let gone = controller.send(Request::Boot, reply()).unwrap_err();
        assert_eq!(gone.code, Code::Ending);
    }
}
