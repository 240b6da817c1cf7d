//! vCPU threads: they run the guest, hand its exits to the buses, and stop when they are told.
//!
//! **Kicks are never lost.** [`VcpuThreads::stop`] and [`VcpuThreads::pause`] say in a `Gate`
//! what is wanted and then send a signal. The signal's handler sets `immediate_exit` in the
//! thread's own `kvm_run`. So wherever the signal hits, either the thread has not yet looked at the
//! gate, or KVM_RUN returns at once.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::counters;
use devices::counters::Counter;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::{KvmError, Vm};

/// Where a vCPU's exits go. Called on vCPU threads, several at a time.
pub trait Exits: Send + Sync {
    /// The guest reads `data.len()` (1, 2 or 4) bytes from an I/O port.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// The guest writes to an I/O port.
    fn port_write(&self, port: u16, data: &[u8]);
    /// The guest reads up to 8 bytes where there is no RAM.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// The guest writes up to 8 bytes where there is no RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// A local APIC acknowledged a level-triggered interrupt of the I/O APIC.
    fn end_of_interrupt(&self, vector: u8);
}

counters! {
    /// How often a vCPU left the guest for nestling, and why. What KVM does by itself (most
    /// doorbells, local APICs) is not among it.
    pub struct Counts {
        /// Reads of I/O ports; a string instruction is one.
        port_reads,
        /// Writes to I/O ports.
        port_writes,
        /// Reads where there is no RAM.
        mmio_reads,
        /// Writes where there is no RAM.
        mmio_writes,
        /// Everything else: signals, ends of interrupts.
        other_exits,
    }
}

/// Why a guest stopped.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GuestEvent {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset: a reboot, or a panic with `panic=-1`.
    Reset,
    /// A vCPU shut down: a triple fault.
    TripleFault,
    /// It wrote to the debug-exit port.
    DebugExit(u8),
    /// nestling or KVM cannot go on.
    Failed(String),
}

/// Carries the first [`GuestEvent`] to the event loop.
#[derive(Debug)]
pub struct EventLine {
    eventfd: EventFd,
    first: Mutex<Option<GuestEvent>>,
}

impl EventLine {
    /// A line without an event.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            eventfd: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            first: Mutex::new(None),
        })
    }

    /// Reports `event`; only the first counts. Never blocks.
    pub fn report(&self, event: GuestEvent) {
        self.lock().get_or_insert(event);
        // A full counter is a line that is signalled already.
        let _ = self.eventfd.write(1);
    }

    /// What was reported, if anything was.
    pub fn event(&self) -> Option<GuestEvent> {
        self.lock().clone()
    }

    /// Readable once there is an event.
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn lock(&self) -> MutexGuard<'_, Option<GuestEvent>> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|cell| {
        let pointer = cell.get();
        if !pointer.is_null() {
            // SAFETY: set by `run` to a byte of the mapped kvm_run of the vCPU that this very
            // thread owns, and cleared before the vCPU is dropped.
            unsafe { pointer.write_volatile(1) };
        }
    });
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// What the vCPU threads are to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Wish {
    Run,
    Pause,
    Stop,
}

/// Where vCPU threads wait while they are paused.
#[derive(Debug, Default)]
struct Gate {
    /// The [`Wish`], for a look between two exits.
    wish: AtomicU8,
    inside: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    paused: usize,
    ended: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self) -> Wish {
        match self.wish.load(Ordering::Acquire) {
            0 => Wish::Run,
            1 => Wish::Pause,
            _ => Wish::Stop,
        }
    }

    fn set(&self, wish: Wish) {
        // Under the lock: a thread that is about to wait must not miss it.
        let inside = self.lock();
        self.wish.store(wish as u8, Ordering::Release);
        self.changed.notify_all();
        drop(inside);
    }

    /// On a vCPU thread: waits for as long as it is to pause.
    fn wait(&self) {
        let mut inside = self.lock();
        inside.paused += 1;
        self.changed.notify_all();
        while self.wish() == Wish::Pause {
            let woken = self.changed.wait(inside);
            inside = woken.unwrap_or_else(PoisonError::into_inner);
        }
        inside.paused -= 1;
    }

    /// On a vCPU thread: it ends.
    fn end(&self) {
        self.lock().ended += 1;
        self.changed.notify_all();
    }

    /// Waits until all of `threads` wait or have ended; whether they do in time.
    fn all_wait(&self, threads: usize, limit: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), limit, |inside| {
                inside.paused + inside.ended < threads
            });
        let (inside, result) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(inside);
        !result.timed_out()
    }
}

/// The vCPU threads of a VM. Dropping them stops them.
#[derive(Debug)]
pub struct VcpuThreads {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
    counts: Vec<Arc<Counts>>,
}

impl VcpuThreads {
    /// Starts a thread for each of `vcpus`, in order.
    ///
    /// # Errors
    /// The host has no room for another thread; those already started are stopped.
    pub fn start(
        vm: &Arc<Vm>,
        vcpus: Vec<VcpuFd>,
        exits: &Arc<dyn Exits>,
        events: &Arc<EventLine>,
    ) -> Result<Self, KvmError> {
        let failed = |call, object: String| {
            move |source: io::Error| KvmError::Call {
                call,
                object,
                source,
            }
        };
        register_signal_handler(kick_signal(), on_kick).map_err(|why| {
            failed("sigaction", "the kick signal".into())(io::Error::from_raw_os_error(why.errno()))
        })?;
        let mut started = Self {
            gate: Arc::default(),
            threads: Vec::with_capacity(vcpus.len()),
            counts: vcpus.iter().map(|_| Arc::default()).collect(),
        };
        for (index, fd) in vcpus.into_iter().enumerate() {
            let vcpu = Vcpu {
                fd,
                index,
                exits: exits.clone(),
                events: events.clone(),
                gate: started.gate.clone(),
                counts: started.counts[index].clone(),
                _vm: vm.clone(),
            };
            let thread = viommu::thread::spawn(&format!("vcpu{index}"), move || vcpu.run())
                .map_err(failed("clone", format!("the thread of vCPU {index}")))?;
            started.threads.push(thread);
        }
        Ok(started)
    }

    /// What each vCPU counts, in order.
    pub fn counts(&self) -> &[Arc<Counts>] {
        &self.counts
    }

    /// Stops all vCPUs between two instructions and waits until they stand still; `false`, and all
    /// run, when one has not finished its exit within `limit`.
    pub fn pause(&self, limit: Duration) -> bool {
        self.gate.set(Wish::Pause);
        self.kick();
        let all = self.gate.all_wait(self.threads.len(), limit);
        if !all {
            self.resume();
        }
        all
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.gate.set(Wish::Run);
    }

    /// Stops all vCPUs and waits until they have. A guest cannot delay it: each exit is finished,
    /// none is begun.
    pub fn stop(&mut self) {
        self.gate.set(Wish::Stop);
        self.kick();
        for thread in self.threads.drain(..) {
            // A panic of a vCPU thread was reported when it happened.
            let _ = thread.join();
        }
    }

    fn kick(&self) {
        for thread in &self.threads {
            // SAFETY: the thread has not been joined, so its pthread_t is valid; the signal has a
            // handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Vcpu {
    fd: VcpuFd,
    index: usize,
    exits: Arc<dyn Exits>,
    events: Arc<EventLine>,
    gate: Arc<Gate>,
    counts: Arc<Counts>,
    // Keeps guest memory mapped for as long as the vCPU can run.
    _vm: Arc<Vm>,
}

/// How often in a row KVM may say that it cannot deliver an event ([`Next::Again`]).
const MOST_AGAIN: u32 = 8;

/// What to do after an exit.
enum Next {
    Run,
    /// KVM did not deliver an event since the guest touched a device meanwhile. That is an end
    /// only if it stays so: where KVM itself runs on an emulated CPU, any access to a device that
    /// is the first exit after an exception can look like that, once.
    Again,
    /// Port I/O with this many bytes for each of its repetitions is to be done.
    Port,
    Stop(GuestEvent),
}

impl Vcpu {
    fn run(mut self) {
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.with(|cell| cell.set(immediate_exit));
        // Panics of a device must end the VM, not leave it without a vCPU.
        let ended =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.run_until_stop()));
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
        self.gate.end();
        match ended {
            Ok(None) => {}
            Ok(Some(event)) => self.events.report(event),
            Err(_) => self.events.report(GuestEvent::Failed(format!(
                "the thread of vCPU {} panicked; this is a bug in nestling, report it",
                self.index
            ))),
        }
    }

    fn run_until_stop(&mut self) -> Option<GuestEvent> {
        let mut again = 0;
        loop {
            match self.gate.wish() {
                Wish::Run => {}
                Wish::Pause => {
                    self.gate.wait();
                    // So that the guest's watchdogs do not count the time. A guest without
                    // KVM's clock has none to tell.
                    let _ = self.fd.kvmclock_ctrl();
                    continue;
                }
                Wish::Stop => return None,
            }
            let mut next = match self.fd.run() {
                Ok(exit) => {
                    self.counts.of(&exit).add_alone(1);
                    handle(exit, &*self.exits, self.index)
                }
                Err(why) => match why.errno() {
                    libc::EINTR => {
                        self.fd.set_kvm_immediate_exit(0);
                        Next::Run
                    }
                    // An application processor before its INIT, or a transient lack of memory.
                    libc::EAGAIN => Next::Run,
                    other => Next::Stop(GuestEvent::Failed(format!(
                        "KVM_RUN failed for vCPU {} ({}); see the kernel's log of the host",
                        self.index,
                        io::Error::from_raw_os_error(other)
                    ))),
                },
            };
            if self.is_undelivered(&next) && again < MOST_AGAIN {
                next = Next::Again;
            }
            again = match next {
                Next::Again => again + 1,
                _ => 0,
            };
            match next {
                Next::Run | Next::Again => {}
                Next::Port => self.port_io(),
                Next::Stop(GuestEvent::Failed(why)) => {
                    let (error, place) = (self.internal_error(), self.where_it_was());
                    return Some(GuestEvent::Failed(format!("{why}{error}{place}")));
                }
                Next::Stop(GuestEvent::TripleFault) => {
                    let place = self.where_it_was();
                    log::warn!("vCPU {} shut down: a triple fault{place}", self.index);
                    return Some(GuestEvent::TripleFault);
                }
                Next::Stop(event) => return Some(event),
            }
        }
    }

    /// Port I/O: a string instruction comes as several accesses of the same size in one exit.
    fn port_io(&mut self) {
        let run = self.fd.get_kvm_run();
        // SAFETY: called only for KVM_EXIT_IO, for which `io` is the field of the union in use.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (size, count) = (usize::from(io.size).max(1), io.count as usize);
        let first = ptr::from_mut(run).cast::<u8>();
        // SAFETY: the kernel says that `count` items of `size` bytes are at `data_offset` in the
        // mapping of kvm_run, which lives as long as `self.fd`.
        let first = unsafe { first.add(io.data_offset as usize) };
        // SAFETY: as above; `run` is not used while the slice lives.
        let data = unsafe { std::slice::from_raw_parts_mut(first, size * count) };
        let write = u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT;
        for item in data.chunks_mut(size) {
            match write {
                true => self.exits.port_write(io.port, item),
                false => self.exits.port_read(io.port, item),
            }
        }
    }

    /// Whether the vCPU is to stop since KVM could not deliver an event.
    fn is_undelivered(&mut self, next: &Next) -> bool {
        if !matches!(next, Next::Stop(GuestEvent::Failed(_))) {
            return false;
        }
        let run = self.fd.get_kvm_run();
        if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
            return false;
        }
        // SAFETY: for this exit reason `internal` is the field of the union in use.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        suberror == kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV
    }

    /// What KVM says of an error of its own, for the message of a failure.
    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
            return String::new();
        }
        // SAFETY: for this exit reason `internal` is the field of the union in use.
        let error = unsafe { run.__bindgen_anon_1.internal };
        let data = error.data.get(..error.ndata as usize).unwrap_or_default();
        format!(" (suberror {}, data {data:x?})", error.suberror)
    }

    /// Where the guest was, for the message of a failure.
    fn where_it_was(&self) -> String {
        match self.fd.get_regs() {
            Ok(regs) => format!(" (rip {:#x}, rflags {:#x})", regs.rip, regs.rflags),
            Err(_) => String::new(),
        }
    }
}

impl Counts {
    fn of(&self, exit: &VcpuExit<'_>) -> &Counter {
        match exit {
            VcpuExit::IoIn(..) => &self.port_reads,
            VcpuExit::IoOut(..) => &self.port_writes,
            VcpuExit::MmioRead(..) => &self.mmio_reads,
            VcpuExit::MmioWrite(..) => &self.mmio_writes,
            _ => &self.other_exits,
        }
    }
}

fn handle(exit: VcpuExit<'_>, exits: &dyn Exits, index: usize) -> Next {
    match exit {
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => return Next::Port,
        VcpuExit::MmioRead(address, data) => exits.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => exits.mmio_write(address, data),
        VcpuExit::IoapicEoi(vector) => exits.end_of_interrupt(vector),
        VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {}
        VcpuExit::Shutdown => return Next::Stop(GuestEvent::TripleFault),
        VcpuExit::SystemEvent(kind, _) => return Next::Stop(system_event(kind)),
        VcpuExit::FailEntry(reason, cpu) => {
            return Next::Stop(GuestEvent::Failed(format!(
                "vCPU {index} could not be entered on CPU {cpu} (hardware reason {reason:#x}); see the kernel's log of the host"
            )));
        }
        other => {
            return Next::Stop(GuestEvent::Failed(format!(
                "vCPU {index} left with {other:?}, which KVM or nestling cannot handle; see the kernel's log of the host"
            )));
        }
    }
    Next::Run
}

fn system_event(kind: u32) -> GuestEvent {
    match kind {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => GuestEvent::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => GuestEvent::Reset,
        other => GuestEvent::Failed(format!(
            "the guest caused system event {other}, which nestling does not know; report it"
        )),
    }
}

#[cfg(test)]
mod tests;
