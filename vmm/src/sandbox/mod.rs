//! The sandbox: what nestling itself may still do of the host once it runs.
//!
//! Two fences, both put up without any privilege and never taken down:
//!
//! - **System calls** ([`Role`]): each kind of thread has a seccomp filter of its own, which is the
//!   first thing that the thread installs. A call that is not in it kills the process (SIGSYS).
//!   A thread inherits the filters of the one that starts it, so what a thread may do is at most
//!   what its parent may.
//! - **Paths** ([`Paths`]): landlock lets nestling open what its configuration names, and nothing
//!   else, from the first boot on. Threads that need less have less.
//!
//! No new program can be run and no new process be made: there is no `execve`, no `fork`, and no
//! way to privilege by it (`PR_SET_NO_NEW_PRIVS`).

mod calls;
mod filter;
mod needs;
mod paths;

use std::sync::OnceLock;

pub use filter::SandboxError;
pub use needs::{Access, Need, of_api, of_config, of_device, of_inspector, of_rule};
pub use paths::{Paths, PathsError, Refusal, Support, support};

use crate::config::{LandlockConfig, SandboxConfig, SeccompMode};
use filter::Filters;

/// What a process of nestling is confined by.
#[derive(Clone, PartialEq, Debug)]
pub struct Sandbox {
    /// What a forbidden system call does.
    pub seccomp: SeccompMode,
    /// Whether paths are confined.
    pub landlock: bool,
    /// What may be opened beside what the VM's configuration names.
    pub rules: Vec<LandlockConfig>,
    /// Devices may come later: clients are served.
    pub served: bool,
}

impl Sandbox {
    /// What `config` asks for; everything is on that it does not mention.
    pub fn new(config: &SandboxConfig, rules: &[LandlockConfig], served: bool) -> Self {
        Self {
            seccomp: config.seccomp.unwrap_or_default(),
            landlock: config.landlock.unwrap_or(true),
            rules: rules.to_vec(),
            served,
        }
    }
}

/// What is said of a kernel that cannot confine paths.
pub const WITHOUT_LANDLOCK: &str = "the kernel has no landlock, so nestling may open whatever its user may; boot the host with landlock in lsm= (CONFIG_SECURITY_LANDLOCK)";

/// The kinds of threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Role {
    /// Owns the VM: builds it, plugs devices, ends it.
    Main,
    /// Runs the guest, serves its exits and its vIOMMUs, and starts the threads of devices.
    Vcpu,
    /// virtio-blk.
    Block,
    /// virtio-net.
    Net,
    /// virtio-rng.
    Rng,
    /// virtio-console.
    Console,
    /// A DMA test engine.
    TestEngine,
    /// The interrupt line of a passed-through device.
    Line,
    /// Page requests of the host's IOMMU.
    PageRequests,
    /// Signals of interrupts that the guest has not allowed.
    BlockedIrqs,
    /// Faults guest memory in.
    Prefault,
    /// Serves the API.
    Api,
    /// Answers what may take a while.
    Inspector,
    /// Sees that nestling ends when it is told to.
    Watchdog,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Main,
        Self::Vcpu,
        Self::Block,
        Self::Net,
        Self::Rng,
        Self::Console,
        Self::TestEngine,
        Self::Line,
        Self::PageRequests,
        Self::BlockedIrqs,
        Self::Prefault,
        Self::Api,
        Self::Inspector,
        Self::Watchdog,
    ];

    /// Whether it can open files at all.
    fn opens_files(self) -> bool {
        matches!(self, Self::Main | Self::Inspector)
    }

    /// By the name of the thread.
    pub fn of_thread(name: &str) -> Option<Self> {
        Some(match name {
            "virtio-blk" => Self::Block,
            "virtio-net" => Self::Net,
            "virtio-rng" => Self::Rng,
            "virtio-console" => Self::Console,
            "dma-test-engine" => Self::TestEngine,
            "interrupt-line" => Self::Line,
            "page-requests" => Self::PageRequests,
            "blocked-irqs" => Self::BlockedIrqs,
            "prefault" => Self::Prefault,
            "api" => Self::Api,
            "inspector" => Self::Inspector,
            "watchdog" => Self::Watchdog,
            name if name.starts_with("vcpu") => Self::Vcpu,
            _ => return None,
        })
    }
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Makes the filters, and has every thread that is started from now on install its own. Call it
/// before any thread is started; call [`enter`] for the main thread when its work begins.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn start(mode: SeccompMode) -> Result<(), SandboxError> {
    if mode == SeccompMode::Off {
        return Ok(());
    }
    let filters = Filters::new(mode)?;
    filters.begin()?;
    quiet_panics();
    if FILTERS.set(filters).is_ok() {
        viommu::thread::before_each(enter_by_name);
    }
    Ok(())
}

/// Installs the filter of this role on this thread, if there are filters.
///
/// # Errors
/// The kernel refuses; the thread must not go on.
pub fn enter(role: Role) -> Result<(), SandboxError> {
    match FILTERS.get() {
        Some(filters) => filters.install(role),
        None => Ok(()),
    }
}

fn enter_by_name(name: &str) {
    let entered = match Role::of_thread(name) {
        Some(role) => enter(role),
        None => Err(SandboxError::NoRole(name.into())),
    };
    if let Err(why) = entered {
        // A thread without its filter would be a hole, and nobody waits for its result.
        eprintln!("nestling: thread {name} cannot be sandboxed: {why}");
        std::process::exit(crate::outcome::STATUS_ERROR.into());
    }
}

/// Confines the paths of this thread, which has a task of its own.
#[must_use]
pub fn confine_thread(needs: &[Need]) -> Paths {
    Paths::restrict(needs).unwrap_or_else(|why| {
        eprintln!("nestling: a thread cannot be confined: {why}");
        std::process::exit(crate::outcome::STATUS_ERROR.into());
    })
}

/// A backtrace opens files, which most threads may not: the message must be seen before that.
fn quiet_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        eprintln!("thread {name} {info}\n(no backtrace in the sandbox; --seccomp off has one)");
    }));
}

#[cfg(test)]
mod tests;
