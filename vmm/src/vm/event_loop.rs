//! The one event loop: what the guest ended with, signals, requests, devices, and what is typed.
//!
//! It runs on the main thread, which owns the VM, and hands out what is to be done as values: no
//! closure of it reaches into the VM.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use viommu::Rid;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::outcome::Outcome;
use crate::terminal::Escape;

/// What woke the loop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wake {
    /// The guest did something that ends it; its `EventLine` says what.
    Guest,
    /// A signal that ends nestling came, or Ctrl-A x was typed.
    Signal(u8),
    /// The live state is to be printed.
    PrintState,
    /// The power button is to be pressed.
    PowerButton,
    /// There may be requests.
    Requests,
    /// Something about a device.
    Device(DeviceEvent),
}

/// Something about a device that the event loop's thread has to look after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DeviceEvent {
    /// The host's device at this address had an error that cannot be corrected.
    Failed(Rid),
    /// The host wants the device at this address back.
    Wanted(Rid),
    /// The guest has let go of devices.
    Ejected,
    /// The time that a guest had to let go of a device is over.
    Overdue,
}

impl Wake {
    /// Whether it means nothing once the VM is gone.
    fn is_of_the_vm(self) -> bool {
        matches!(self, Self::Guest | Self::Device(_))
    }
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

/// Signals, blocked for the whole process and read by a thread of their own (`watchdog`), which
/// hands them on: one that ends nestling does so even when the main thread is stuck in the kernel.
/// Make it before any other thread is started.
#[derive(Debug)]
pub(super) struct Signals(File);

/// How long nestling may take to end when it is told to.
const END_LIMIT: Duration = Duration::from_secs(20);

const SIGNALS: [i32; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGPWR,
];

impl Signals {
    /// Blocks the signals and starts the thread.
    ///
    /// # Errors
    /// What the kernel said.
    pub(super) fn block() -> io::Result<Self> {
        let (ours, its) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let arrived = Self::signalfd()?;
        let mut hand_on = File::from(OwnedFd::from(its));
        viommu::thread::spawn("watchdog", move || watch(arrived, &mut hand_on, END_LIMIT))?;
        Ok(Self(OwnedFd::from(ours).into()))
    }

    /// Blocks the signals; reading the file waits for one.
    fn signalfd() -> io::Result<File> {
        let wrong = |_| io::Error::from_raw_os_error(libc::EINVAL);
        let set = vmm_sys_util::signal::create_sigset(&SIGNALS).map_err(wrong)?;
        // SAFETY: `set` is an initialized signal set; the old mask is not asked for.
        let refused =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if refused != 0 {
            return Err(io::Error::from_raw_os_error(refused));
        }
        // SAFETY: `set` is an initialized signal set; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor, so nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
    }

    fn next(&mut self) -> Option<i32> {
        let mut number = [0];
        self.0.read_exact(&mut number).ok()?;
        Some(number[0].into())
    }
}

/// Hands signals on as bytes, and ends the process when one that ends it has had no effect within
/// `limit`. The kernel then takes back whatever nestling had.
fn watch(mut arrived: File, hand_on: &mut File, limit: Duration) {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    while arrived.read_exact(&mut info).is_ok() {
        // ssi_signo is the first field, and no number needs more than its first byte.
        let number = info[0];
        // Nobody reads it: the end is there already.
        let _ = hand_on.write_all(&[number]);
        if ends_nestling(number.into()) {
            std::thread::sleep(limit);
            crate::terminal::restore();
            eprintln!(
                "nestling: signal {number} came {} s ago and the host still keeps it busy; it ends without waiting",
                limit.as_secs()
            );
            // SAFETY: it takes a number; nothing of this process is used afterwards.
            unsafe { libc::_exit(Outcome::Signal(number).status().into()) };
        }
    }
}

fn ends_nestling(number: i32) -> bool {
    !matches!(number, libc::SIGUSR1 | libc::SIGPWR)
}

type Wakes = Rc<RefCell<VecDeque<Wake>>>;

/// Something that is watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct WatchId(SubscriberId);

/// Wakes the loop at a time. What belongs to a VM is forgotten with that VM.
pub(super) struct Alarm(TimerFd);

impl Alarm {
    /// Wakes once after `delay`, instead of what was set before; `None`: not at all.
    pub(super) fn set(&mut self, delay: Option<Duration>) {
        let set = match delay {
            // Zero would switch it off.
            Some(delay) => self.0.reset(delay.max(Duration::from_nanos(1)), None),
            None => self.0.clear(),
        };
        if let Err(why) = set {
            log::error!("an alarm is not set: {why}");
        }
    }
}

/// The loop. It lives as long as nestling; what belongs to a VM is watched for as long as that VM
/// is there.
pub(super) struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
    wakes: Wakes,
    /// And what each of them wakes with.
    of_the_vm: Vec<(WatchId, Option<Wake>)>,
}

impl EventLoop {
    /// A loop that watches `signals`.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn new(signals: Signals) -> io::Result<Self> {
        let wakes = Wakes::default();
        let mut manager: EventManager<Box<dyn MutEventSubscriber>> =
            EventManager::new().map_err(io::Error::other)?;
        manager.add_subscriber(Box::new(SignalReader {
            signals,
            wakes: wakes.clone(),
        }));
        Ok(Self {
            manager,
            wakes,
            of_the_vm: Vec::new(),
        })
    }

    /// Wakes with `wake` each time that `event` is readable, and reads it: an eventfd or a
    /// timerfd that does not block.
    ///
    /// # Errors
    /// The host cannot watch it.
    pub(super) fn watch(&mut self, event: impl Into<OwnedFd>, wake: Wake) -> io::Result<WatchId> {
        let refused = Rc::new(RefCell::new(None));
        let id = self.manager.add_subscriber(Box::new(Watched {
            event: event.into().into(),
            wake,
            wakes: self.wakes.clone(),
            refused: refused.clone(),
        }));
        if let Some(why) = refused.borrow_mut().take() {
            let _ = self.manager.remove_subscriber(id);
            return Err(why);
        }
        let id = WatchId(id);
        if wake.is_of_the_vm() {
            self.of_the_vm.push((id, Some(wake)));
        }
        Ok(id)
    }

    /// As [`watch`](Self::watch), for an event that somebody else keeps.
    pub(super) fn watch_event(&mut self, event: &EventFd, wake: Wake) -> io::Result<WatchId> {
        let event = event.try_clone()?.into_raw_fd();
        // SAFETY: the clone has just given up this descriptor, so nobody else owns it.
        self.watch(unsafe { OwnedFd::from_raw_fd(event) }, wake)
    }

    /// An alarm that wakes with `wake`.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn alarm(&mut self, wake: Wake) -> io::Result<Alarm> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        // SAFETY: `timer` is open for as long as the borrowed descriptor is used.
        let watched = unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) }.try_clone_to_owned()?;
        self.watch(watched, wake)?;
        Ok(Alarm(timer))
    }

    /// Watches `id` no longer. What it said already is forgotten: it is about a device that is gone,
    /// whose place the next one may have.
    pub(super) fn unwatch(&mut self, id: WatchId) {
        for (_, said) in self.of_the_vm.extract_if(.., |(one, _)| *one == id) {
            let mut wakes = self.wakes.borrow_mut();
            wakes.retain(|wake| Some(*wake) != said);
        }
        if self.manager.remove_subscriber(id.0).is_err() {
            log::error!("something was watched no longer twice");
        }
    }

    /// Gives what is typed to `target`.
    pub(super) fn type_into(&mut self, target: Box<dyn Input>) {
        let id = self.manager.add_subscriber(Box::new(Keyboard {
            target,
            escape: Escape::default(),
            waiting: Vec::new(),
            wakes: self.wakes.clone(),
        }));
        self.of_the_vm.push((WatchId(id), None));
    }

    /// Forgets all that belongs to a VM that is gone.
    pub(super) fn forget_vm(&mut self) {
        for (id, _) in std::mem::take(&mut self.of_the_vm) {
            self.unwatch(id);
        }
        self.wakes.borrow_mut().retain(|wake| !wake.is_of_the_vm());
    }

    /// Waits until something is to be done.
    ///
    /// # Errors
    /// The loop itself fails (epoll).
    pub(super) fn wait(&mut self) -> io::Result<Wake> {
        loop {
            if let Some(wake) = self.wakes.borrow_mut().pop_front() {
                return Ok(wake);
            }
            self.manager.run().map_err(io::Error::other)?;
        }
    }
}

fn add(ops: &mut EventOps<'_>, events: Events, what: &str) {
    if let Err(why) = ops.add(events) {
        log::error!("{what} is not watched: {why}");
    }
}

struct Watched {
    event: File,
    wake: Wake,
    wakes: Wakes,
    refused: Rc<RefCell<Option<io::Error>>>,
}

impl MutEventSubscriber for Watched {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(why) = ops.add(Events::new(&self.event, EventSet::IN)) {
            *self.refused.borrow_mut() = Some(io::Error::other(why));
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // The count does not matter, and nothing does if another thread has read it.
        let _ = self.event.read(&mut [0; 8]);
        self.wakes.borrow_mut().push_back(self.wake);
    }
}

struct SignalReader {
    signals: Signals,
    wakes: Wakes,
}

impl MutEventSubscriber for SignalReader {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        add(ops, Events::new(&self.signals.0, EventSet::IN), "signals");
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        while let Some(number) = self.signals.next() {
            self.wakes.borrow_mut().push_back(match number {
                libc::SIGUSR1 => Wake::PrintState,
                libc::SIGPWR => Wake::PowerButton,
                other => Wake::Signal(other as u8),
            });
        }
    }
}

/// Standard input, into the device that has the terminal. While the device has no room, standard
/// input is not read.
struct Keyboard {
    target: Box<dyn Input>,
    escape: Escape,
    waiting: Vec<u8>,
    wakes: Wakes,
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
                    let quit = Wake::Signal(libc::SIGINT as u8);
                    self.wakes.borrow_mut().push_back(quit);
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const TRY: &str = "NESTLING_WATCHDOG_TRY";
    const NAME: &str =
        "vm::event_loop::tests::a_signal_ends_nestling_also_when_nobody_takes_it_and_others_do_not";

    /// What a signalfd gives for these signals.
    fn arrived(numbers: &[u8]) -> File {
        let (read, mut write) = io::pipe().unwrap();
        for number in numbers {
            let mut info = [0; size_of::<libc::signalfd_siginfo>()];
            info[0] = *number;
            write.write_all(&info).unwrap();
        }
        OwnedFd::from(read).into()
    }

    #[test]
    fn nothing_is_heard_any_more_of_what_is_watched_no_longer() {
        let (ours, _its) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut event_loop = EventLoop::new(Signals(OwnedFd::from(ours).into())).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (requests, failed, other) = (event(), event(), event());
        let failure = |device| Wake::Device(DeviceEvent::Failed(Rid::new(0, device, 0)));
        event_loop.watch_event(&requests, Wake::Requests).unwrap();
        let its = event_loop.watch_event(&failed, failure(5)).unwrap();
        event_loop.watch_event(&other, failure(6)).unwrap();
        for event in [&requests, &failed, &other] {
            event.write(1).unwrap();
        }
        // All three are there at once. The device goes, and another one comes to its place.
        assert_eq!(event_loop.wait().unwrap(), Wake::Requests);
        event_loop.unwatch(its);
        assert_eq!(event_loop.wait().unwrap(), failure(6));
    }

    #[test]
    fn a_signal_ends_nestling_also_when_nobody_takes_it_and_others_do_not() {
        let (read, write) = io::pipe().unwrap();
        let mut write = File::from(OwnedFd::from(write));
        if std::env::var_os(TRY).is_some() {
            watch(arrived(&[10, 15]), &mut write, Duration::from_millis(50));
            return;
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .args([NAME, "--exact", "--nocapture"])
            .env(TRY, "1")
            .output()
            .unwrap();
        assert_eq!(child.status.code(), Some(143), "{child:?}");
        // SIGUSR1 and SIGPWR are handed on, and nothing waits for them.
        watch(arrived(&[10, 30]), &mut write, Duration::from_secs(3600));
        drop(write);
        let mut numbers = Vec::new();
        File::from(OwnedFd::from(read))
            .read_to_end(&mut numbers)
            .unwrap();
        assert_eq!(numbers, [10, 30]);
    }
}
