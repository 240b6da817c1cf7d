//! The one event loop: what the guest ended with, signals, and what is typed.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::kvm::vcpu::{EventLine, GuestEvent};
use crate::terminal::Escape;

/// Why the loop ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wake {
    /// The guest did something that ends it.
    Guest(GuestEvent),
    /// This signal came, or Ctrl-A x was typed.
    Signal(u8),
}

/// Something that takes what is typed: a serial port, a console.
pub(super) trait Input {
    /// Takes bytes from the front; the number taken.
    fn receive(&self, bytes: &[u8]) -> usize;

    /// What becomes ready when more can be taken after less than all was.
    fn room(&self) -> (RawFd, EventSet);

    /// Called when it is.
    fn has_room(&self) {}
}

/// What to do on SIGUSR1 and SIGPWR.
pub(super) struct OnSignal {
    /// SIGUSR1.
    pub(super) user1: Box<dyn Fn()>,
    /// SIGPWR.
    pub(super) power: Box<dyn Fn()>,
}

/// A descriptor to watch.
pub(super) struct Watched {
    /// Which.
    pub(super) event: EventFd,
    /// What to do each time that it is signalled.
    pub(super) act: Box<dyn Fn()>,
}

/// Signals, blocked for the whole process and read from a file descriptor. Make it before any
/// thread is started.
#[derive(Debug)]
pub(super) struct Signals(File);

const SIGNALS: [i32; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGPWR,
];

impl Signals {
    /// Blocks the signals and opens the descriptor.
    ///
    /// # Errors
    /// What the kernel said.
    pub(super) fn block() -> io::Result<Self> {
        let wrong = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let set = vmm_sys_util::signal::create_sigset(&SIGNALS).map_err(wrong)?;
        // SAFETY: `set` is an initialized signal set; the old mask is not asked for.
        let refused =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if refused != 0 {
            return Err(io::Error::from_raw_os_error(refused));
        }
        // SAFETY: `set` is an initialized signal set; -1 asks for a new descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor, so nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    fn next(&mut self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        self.0.read_exact(&mut info).ok()?;
        // ssi_signo is the first field.
        Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
    }
}

type Ended = Rc<RefCell<Option<Wake>>>;

fn end(ended: &Ended, wake: Wake) {
    ended.borrow_mut().get_or_insert(wake);
}

/// Runs until the guest or a signal ends it.
///
/// # Errors
/// The loop itself fails (epoll).
pub(super) fn run(
    events: Arc<EventLine>,
    signals: Signals,
    on_signal: OnSignal,
    typed_into: Option<Box<dyn Input>>,
    watched: Vec<Watched>,
) -> io::Result<(Wake, Signals)> {
    let ended = Ended::default();
    let signals = Rc::new(RefCell::new(Some(signals)));
    let mut manager: EventManager<Box<dyn MutEventSubscriber>> =
        EventManager::new().map_err(io::Error::other)?;
    manager.add_subscriber(Box::new(GuestEnd {
        events,
        ended: ended.clone(),
    }));
    manager.add_subscriber(Box::new(SignalReader {
        signals: signals.clone(),
        on_signal,
        ended: ended.clone(),
    }));
    for one in watched {
        manager.add_subscriber(Box::new(one));
    }
    if let Some(target) = typed_into {
        manager.add_subscriber(Box::new(Keyboard {
            target,
            escape: Escape::default(),
            waiting: Vec::new(),
            ended: ended.clone(),
        }));
    }
    loop {
        let wake = ended.borrow().clone();
        if let Some(wake) = wake {
            drop(manager);
            let signals = signals.borrow_mut().take();
            let signals = signals.ok_or_else(|| io::Error::other("the signals are gone"))?;
            return Ok((wake, signals));
        }
        manager.run().map_err(io::Error::other)?;
    }
}

fn add(ops: &mut EventOps<'_>, events: Events, what: &str) {
    if let Err(why) = ops.add(events) {
        log::error!("{what} is not watched: {why}");
    }
}

struct GuestEnd {
    events: Arc<EventLine>,
    ended: Ended,
}

impl MutEventSubscriber for GuestEnd {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let events = Events::new(self.events.eventfd(), EventSet::IN);
        add(ops, events, "the guest's end");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.events.eventfd().read();
        if let Some(event) = self.events.event() {
            end(&self.ended, Wake::Guest(event));
        }
    }
}

impl MutEventSubscriber for Watched {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        add(
            ops,
            Events::new(&self.event, EventSet::IN),
            "a device's event",
        );
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.event.read();
        (self.act)();
    }
}

struct SignalReader {
    signals: Rc<RefCell<Option<Signals>>>,
    on_signal: OnSignal,
    ended: Ended,
}

impl MutEventSubscriber for SignalReader {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Some(signals) = &*self.signals.borrow() {
            add(ops, Events::new(&signals.0, EventSet::IN), "signals");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut signals = self.signals.borrow_mut();
        while let Some(number) = signals.as_mut().and_then(Signals::next) {
            match number {
                libc::SIGUSR1 => (self.on_signal.user1)(),
                libc::SIGPWR => (self.on_signal.power)(),
                other => end(&self.ended, Wake::Signal(other as u8)),
            }
        }
    }
}

/// Standard input, into the device that has the terminal. While the device has no room, standard
/// input is not read.
struct Keyboard {
    target: Box<dyn Input>,
    escape: Escape,
    waiting: Vec<u8>,
    ended: Ended,
}

impl Keyboard {
    const STDIN: u32 = 0;
    const ROOM: u32 = 1;

    fn stdin() -> Events {
        Events::with_data(&io::stdin(), Self::STDIN, EventSet::IN)
    }

    fn room(&self) -> Events {
        let (fd, set) = self.target.room();
        Events::with_data_raw(fd, Self::ROOM, set)
    }

    /// Gives what is waiting; whether all of it was taken.
    fn give(&mut self) -> bool {
        let taken = self.target.receive(&self.waiting);
        self.waiting.drain(..taken);
        self.waiting.is_empty()
    }

    fn typed(&mut self, ops: &mut EventOps<'_>) {
        let mut bytes = [0; 256];
        // SAFETY: `bytes` is a writable buffer of the given length; the descriptor is read
        // directly so that nothing stays in a buffer that epoll does not see.
        let got = unsafe {
            libc::read(
                io::stdin().as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
            )
        };
        match usize::try_from(got) {
            Ok(got) if got > 0 => {
                let (through, quit) = self.escape.filter(&bytes[..got]);
                self.waiting.extend(through);
                if quit {
                    end(&self.ended, Wake::Signal(libc::SIGINT as u8));
                }
                if !self.give() {
                    let _ = ops.remove(Self::stdin());
                    add(ops, self.room(), "the console's room");
                }
            }
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            // The end of the input, or a terminal that is gone.
            _ => {
                let _ = ops.remove(Self::stdin());
            }
        }
    }
}

impl MutEventSubscriber for Keyboard {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(why) = ops.add(Self::stdin()) {
            // A regular file: there is nothing to wait for.
            log::debug!("standard input is not read: {why}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.data() == Self::STDIN {
            return self.typed(ops);
        }
        self.target.has_room();
        if self.give() {
            let _ = ops.remove(self.room());
            add(ops, Self::stdin(), "standard input");
        }
    }
}
