//! The owner of the VM: what clients and signals ask for, one after the other, on the main thread.
//!
//! A request either is done when its method returns, or keeps its [`Reply`] until it is. What
//! others see of the VM ([`Shared`]) is replaced after each change, so nobody ever waits for the
//! work that is being done here.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use super::event_loop::{DeviceEvent, EventLoop, Signals, Wake};
use super::{Running, Vm, VmError, host};
use crate::config::{OnReboot, Validated};
use crate::control::{
    ApiError, Code, Descriptors, Done, Event, Given, Inspect, NewDevice, PciDeviceInfo, Removal,
    Reply, Request, Requests, Shared, VmSnapshot, VmState,
};
use crate::kvm::Host;
use crate::kvm::vcpu::GuestEvent;
use crate::outcome::Outcome;
use crate::sandbox::{self, Paths, Refusal, Role, Sandbox};

/// How long a vCPU may take to finish the exit that it is in, when it is paused.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);

/// How clients reach the owner of the VM.
#[derive(Debug)]
pub struct Control {
    /// What they ask for.
    pub requests: Requests,
    /// What they see.
    pub shared: Shared,
    /// What was opened for it already, by the names of devices.
    pub descriptors: Descriptors,
}

/// A nestling whose signals go to its event loop, and to no thread that is started from now on.
#[derive(Debug)]
pub struct Prepared {
    signals: Signals,
    sandbox: Sandbox,
}

/// Call it before any thread is started.
///
/// # Errors
/// No descriptor or thread is left, or the kernel has no system call filters.
pub fn prepare(sandbox: Sandbox) -> Result<Prepared, VmError> {
    sandbox::start(sandbox.seccomp)?;
    let signals = Signals::block().map_err(host("a thread for signals"))?;
    Ok(Prepared { signals, sandbox })
}

impl Prepared {
    /// Runs nestling until a guest, a signal or a request ends it: with a VM of this configuration
    /// if there is one, else with none until a client creates it.
    ///
    /// # Errors
    /// The VM of `config` cannot be built, or nestling or KVM cannot go on.
    pub fn run(self, config: Option<Validated>, control: Control) -> Result<Outcome, VmError> {
        sandbox::enter(Role::Main)?;
        let mut event_loop = EventLoop::new(self.signals).map_err(host("an event loop"))?;
        event_loop
            .watch_event(control.requests.eventfd(), Wake::Requests)
            .map_err(host("a watch of the event loop"))?;
        let mut session = Session {
            event_loop,
            control,
            sandbox: self.sandbox,
            paths: None,
            vm: None,
            running: None,
            first_boot: true,
        };
        if let Some(config) = config {
            session.created(config);
            session.boot("vm.boot")?;
        }
        session.serve()
    }
}

struct Session {
    event_loop: EventLoop,
    control: Control,
    sandbox: Sandbox,
    /// What can be opened since the first boot.
    paths: Option<Paths>,
    /// The configuration of the VM that was created.
    vm: Option<Validated>,
    running: Option<(Running, VmState)>,
    /// The next boot is the first one of this VM.
    first_boot: bool,
}

/// Why the session ends, when it does.
type Ended = Option<Result<Outcome, VmError>>;

impl Session {
    fn serve(&mut self) -> Result<Outcome, VmError> {
        loop {
            let wake = self.event_loop.wait().map_err(host("the event loop"))?;
            let ended = match wake {
                Wake::Guest => self.guest_event(),
                Wake::Signal(number) => {
                    self.shut_down("signal", Some(Outcome::Signal(number).status()));
                    Some(Ok(Outcome::Signal(number)))
                }
                Wake::PrintState => {
                    self.print_state();
                    None
                }
                Wake::PowerButton => {
                    if let Some((running, _)) = &self.running {
                        running.vm.press_power_button();
                    }
                    None
                }
                Wake::Requests => self.requests(),
                Wake::Device(event) => {
                    self.device_event(event);
                    None
                }
            };
            if let Some(ended) = ended {
                return ended;
            }
        }
    }

    /// What the guest did to end its run.
    fn guest_event(&mut self) -> Ended {
        let (running, _) = self.running.as_ref()?;
        let event = running.vm.events.event()?;
        let (reason, end) = match event {
            GuestEvent::Reset => {
                let restarts = self
                    .vm
                    .as_ref()
                    .is_some_and(|config| config.platform.on_reboot == OnReboot::Restart);
                if restarts {
                    log::info!("the guest reboots");
                    return self.reboot("guest").err().map(Err);
                }
                ("reset", Ok(Outcome::Reboot))
            }
            GuestEvent::PowerOff => ("power-off", Ok(Outcome::PowerOff)),
            GuestEvent::TripleFault => ("triple-fault", Ok(Outcome::TripleFault)),
            GuestEvent::DebugExit(status) => ("debug-exit", Ok(Outcome::DebugExit(status))),
            GuestEvent::Failed(why) => ("failed", Err(VmError::Failed(why))),
        };
        self.shut_down(reason, end.as_ref().ok().map(Outcome::status));
        Some(end)
    }

    /// Does all requests that are there.
    fn requests(&mut self) -> Ended {
        while let Some((request, reply)) = self.control.requests.next() {
            match request {
                Request::VmmShutdown => {
                    self.shut_down("request", Some(Outcome::Requested.status()));
                    reply.send(Ok(Done::Nothing));
                    return Some(Ok(Outcome::Requested));
                }
                Request::Add(device, given) => reply.send(self.add(device, given)),
                Request::Remove { id, how } => self.remove(&id, how, reply),
                Request::Create(config) => reply.send(self.create(*config)),
                Request::Boot => reply.send(self.boot_created()),
                Request::Shutdown => reply.send(self.shutdown()),
                Request::Delete => reply.send(self.delete()),
                Request::Reboot => reply.send(self.reboot_running()),
                Request::PowerButton => reply.send(self.power_button()),
                Request::Pause => reply.send(self.pause()),
                Request::Resume => reply.send(self.resume()),
            }
        }
        None
    }

    fn create(&mut self, config: Validated) -> Result<Done, ApiError> {
        if self.vm.is_some() {
            return Err(
                ApiError::new(Code::VmAlreadyCreated, "a VM was created already")
                    .remedy("delete it first (vm.delete)"),
            );
        }
        self.keeps_the_sandbox(&config)?;
        self.created(config);
        Ok(Done::Nothing)
    }

    fn created(&mut self, config: Validated) {
        self.vm = Some(config);
        self.first_boot = true;
        self.control.shared.events.emit(Event::Created);
        self.publish();
    }

    fn boot_created(&mut self) -> Result<Done, ApiError> {
        self.needs_created()?;
        self.boot("vm.boot").map_err(|why| refused(&why))?;
        Ok(Done::Nothing)
    }

    /// Builds the VM and lets it run.
    fn boot(&mut self, operation: &'static str) -> Result<(), VmError> {
        let Some(config) = self.vm.clone() else {
            return Ok(());
        };
        let _operation = self.control.shared.progress.begin(operation);
        self.control.shared.events.emit(Event::Booting);
        let vm = self
            .confine(&config)
            .and_then(|()| Host::open().map_err(VmError::from))
            .and_then(|kvm| Vm::build(&config, &kvm, self.first_boot, &self.control))
            .and_then(|vm| vm.start(&mut self.event_loop));
        let running = match vm {
            Ok(running) => running,
            Err(why) => {
                self.event_loop.forget_vm();
                self.control.shared.events.emit(Event::Shutdown {
                    reason: "failed".into(),
                    status: None,
                });
                return Err(why);
            }
        };
        self.first_boot = false;
        self.running = Some((running, VmState::Running));
        self.publish();
        self.control.shared.events.emit(Event::Booted);
        Ok(())
    }

    /// The sandbox was chosen by who started nestling.
    fn keeps_the_sandbox(&self, config: &Validated) -> Result<(), ApiError> {
        let asked = Sandbox::new(&config.sandbox, &[], false);
        let fixed = &self.sandbox;
        let field = match &config.sandbox {
            asks if asks.seccomp.is_some() && asked.seccomp != fixed.seccomp => "seccomp",
            asks if asks.landlock.is_some() && asked.landlock != fixed.landlock => "landlock",
            _ => return Ok(()),
        };
        Err(ApiError::new(
            Code::SandboxRefused,
            format!("sandbox.{field} was chosen otherwise when nestling was started, and stays so"),
        )
        .field(format!("sandbox.{field}"))
        .remedy(format!("leave it out, or start nestling with --{field}")))
    }

    /// Fixes what can be opened, when the first VM is booted. Whatever VM comes later has to do
    /// with it.
    fn confine(&mut self, config: &Validated) -> Result<(), VmError> {
        if !self.sandbox.landlock {
            return Ok(());
        }
        let mut needs = sandbox::of_config(config, self.sandbox.served);
        let rules = self.sandbox.rules.iter().chain(&config.landlock_rules);
        needs.extend(rules.map(sandbox::of_rule));
        if let Some(paths) = &self.paths {
            return Ok(paths.admit(&needs)?);
        }
        let paths = Paths::restrict(&needs)?;
        if !paths.enforced() {
            log::info!("{}", sandbox::WITHOUT_LANDLOCK);
        }
        self.paths = Some(paths);
        Ok(())
    }

    fn reboot(&mut self, by: &str) -> Result<(), VmError> {
        self.tear_down();
        self.control
            .shared
            .events
            .emit(Event::Rebooted { by: by.into() });
        self.boot("vm.reboot")
    }

    /// A VM that cannot be built again is created, and does not run.
    fn reboot_running(&mut self) -> Result<Done, ApiError> {
        self.needs_running()?;
        self.reboot("request").map_err(|why| refused(&why))?;
        Ok(Done::Nothing)
    }

    fn shutdown(&mut self) -> Result<Done, ApiError> {
        self.needs_running()?;
        self.shut_down("request", None);
        Ok(Done::Nothing)
    }

    fn delete(&mut self) -> Result<Done, ApiError> {
        self.needs_vm()?;
        self.shut_down("request", None);
        self.vm = None;
        self.publish();
        self.control.shared.events.emit(Event::Deleted);
        Ok(Done::Nothing)
    }

    fn power_button(&mut self) -> Result<Done, ApiError> {
        match self.needs_running()? {
            (running, VmState::Running) => running.vm.press_power_button(),
            (_, state) => {
                let remedy = "resume it first (vm.resume)";
                return Err(wrong_state(*state, "running", remedy));
            }
        }
        Ok(Done::Nothing)
    }

    fn pause(&mut self) -> Result<Done, ApiError> {
        match self.needs_running()? {
            (running, state @ VmState::Running) => {
                if !running.threads.pause(PAUSE_LIMIT) {
                    return Err(ApiError::new(
                        Code::Busy,
                        format!(
                            "a vCPU waits for the host since {} s",
                            PAUSE_LIMIT.as_secs()
                        ),
                    )
                    .remedy("ask again; the VM runs"));
                }
                *state = VmState::Paused;
            }
            (_, state) => return Err(wrong_state(*state, "running", "it stands still already")),
        }
        self.publish();
        self.control.shared.events.emit(Event::Paused);
        Ok(Done::Nothing)
    }

    fn resume(&mut self) -> Result<Done, ApiError> {
        match self.needs_running()? {
            (running, state @ VmState::Paused) => {
                running.threads.resume();
                *state = VmState::Running;
            }
            (_, state) => return Err(wrong_state(*state, "paused", "it runs already")),
        }
        self.publish();
        self.control.shared.events.emit(Event::Resumed);
        Ok(Done::Nothing)
    }
}

/// Devices that come and go.
impl Session {
    /// Whether it is added or not, no descriptor is kept that no device has.
    fn add(&mut self, device: NewDevice, given: Given) -> Result<Done, ApiError> {
        let result = self.add_with(device, given);
        self.let_go_of_descriptors();
        result
    }

    fn let_go_of_descriptors(&self) {
        let with_descriptors = self.vm.iter().flat_map(|config| config.descriptors());
        let ids = with_descriptors.map(|(id, ..)| id).collect();
        self.control.descriptors.retain(&ids);
    }

    fn add_with(&mut self, device: NewDevice, given: Given) -> Result<Done, ApiError> {
        let (before, _) = self.needs_vm()?;
        let (after, device) = before.plus(device)?;
        self.control.descriptors.keep(device.id(), given);
        let has_its_viommu = after.viommus.len() == before.viommus.len();
        let Some((running, _)) = &mut self.running else {
            self.vm = Some(after);
            self.publish();
            return Ok(Done::Nothing);
        };
        if !has_its_viommu {
            return Err(ApiError::new(
                Code::CapabilityMismatch,
                "iommu=on needs a vIOMMU, and the VM was booted without one",
            )
            .field("iommu")
            .remedy("leave iommu out, or boot the VM with a vIOMMU (viommus, --viommu)"));
        }
        if let Some(paths) = &self.paths {
            paths
                .admit(&sandbox::of_device(&device))
                .map_err(|why| refused_by_sandbox(&why))?;
        }
        let operation = device.request();
        let id = device.id().to_owned();
        let _operation = self.control.shared.progress.begin(operation);
        let mut context = Context::new(&mut self.event_loop, &self.control.shared, &mut self.vm);
        match running.vm.add(device, &mut context) {
            Ok(added) => {
                self.vm = Some(after);
                self.publish();
                self.control.shared.events.emit(Event::DeviceAdded {
                    id: added.id.clone(),
                    bdf: added.bdf.clone(),
                });
                Ok(Done::Added(added))
            }
            Err(why) => {
                self.control.shared.events.emit(Event::DeviceRefused {
                    id: Some(id),
                    step: self.control.shared.progress.last_step(),
                    code: why.code.to_string(),
                    message: why.message.clone(),
                });
                Err(why)
            }
        }
    }

    fn remove(&mut self, id: &str, how: Removal, reply: Reply) {
        let result =
            self.needs_vm()
                .map(|_| ())
                .and_then(|()| match (&mut self.vm, &self.running) {
                    (Some(config), None) => match config.minus(id) {
                        true => Ok(true),
                        false => Err(no_such_device(id)),
                    },
                    (_, Some((_, VmState::Paused))) if !how.force => Err(wrong_state(
                        VmState::Paused,
                        "running, or the guest cannot let go of the device",
                        "resume it first (vm.resume), or use force",
                    )),
                    _ => Ok(false),
                });
        match result {
            Err(why) => return reply.send(Err(why)),
            Ok(true) => {
                self.publish();
                return reply.send(Ok(Done::Nothing));
            }
            Ok(false) => {}
        }
        if let Some((running, _)) = &mut self.running {
            running.vm.remove(id, how, reply);
        }
        self.publish();
    }

    fn device_event(&mut self, event: DeviceEvent) {
        let mut context = Context::new(&mut self.event_loop, &self.control.shared, &mut self.vm);
        if let Some((running, _)) = &mut self.running {
            running.vm.device_event(event, &mut context);
        }
        let Context {
            removed, answers, ..
        } = context;
        self.publish();
        // Whoever is told finds it so.
        for PciDeviceInfo { id, bdf } in removed {
            let gone = Event::DeviceRemoved { id, bdf };
            self.control.shared.events.emit(gone);
        }
        for (reply, result) in answers {
            reply.send(result);
        }
    }
}

/// What states allow, and what others see.
impl Session {
    fn needs_vm(&self) -> Result<(&Validated, VmState), ApiError> {
        match (&self.vm, &self.running) {
            (None, _) => Err(ApiError::new(Code::VmNotCreated, "there is no VM")
                .remedy("create it first (vm.create)")),
            (Some(config), None) => Ok((config, VmState::Created)),
            (Some(config), Some((_, state))) => Ok((config, *state)),
        }
    }

    fn needs_created(&self) -> Result<(), ApiError> {
        match self.needs_vm()?.1 {
            VmState::Created => Ok(()),
            state => Err(wrong_state(state, "created", "it was booted already")),
        }
    }

    fn needs_running(&mut self) -> Result<&mut (Running, VmState), ApiError> {
        let (_, state) = self.needs_vm()?;
        let not_booted = wrong_state(state, "booted", "boot it first (vm.boot)");
        self.running.as_mut().ok_or(not_booted)
    }

    /// Stops the VM, if it runs, and says why.
    fn shut_down(&mut self, reason: &str, status: Option<u8>) {
        if self.running.is_some() {
            self.tear_down();
            self.control.shared.events.emit(Event::Shutdown {
                reason: reason.into(),
                status,
            });
        }
    }

    /// When it returns, nothing of the VM is left, and everyone sees it so.
    fn tear_down(&mut self) {
        self.event_loop.forget_vm();
        // Who can still look into it keeps its memory, which the next boot may need.
        self.control.shared.close();
        self.running = None;
        self.publish();
    }

    fn publish(&self) {
        self.let_go_of_descriptors();
        let snapshot = self.vm.as_ref().map(|config| {
            let (state, device_tree, inspect) = match &self.running {
                None => (VmState::Created, Default::default(), None),
                Some((running, state)) => {
                    let inspector: Arc<dyn Inspect> = Arc::new(running.inspector());
                    (*state, running.vm.device_tree(), Some(inspector))
                }
            };
            VmSnapshot {
                config: Arc::new((**config).clone()),
                state,
                device_tree,
                inspect,
            }
        });
        self.control.shared.publish(snapshot);
    }

    /// Prints the live state as one line of JSON.
    fn print_state(&self) {
        let Some((running, _)) = &self.running else {
            return;
        };
        match serde_json::to_string(&running.inspector().viommus()) {
            Ok(text) => eprintln!("{text}"),
            Err(why) => log::error!("the state cannot be printed: {why}"),
        }
    }
}

/// What the VM needs of the session while it adds or removes a device.
pub(super) struct Context<'s> {
    /// Where descriptors are watched.
    pub(super) event_loop: &'s mut EventLoop,
    /// What is being done, and what happened.
    pub(super) shared: &'s Shared,
    config: Option<&'s mut Validated>,
    removed: Vec<PciDeviceInfo>,
    answers: Vec<(Reply, Result<Done, ApiError>)>,
}

impl<'s> Context<'s> {
    fn new(
        event_loop: &'s mut EventLoop,
        shared: &'s Shared,
        config: &'s mut Option<Validated>,
    ) -> Self {
        Self {
            event_loop,
            shared,
            config: config.as_mut(),
            removed: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// A device is gone: its name is free, a reboot does not bring it back, and who follows the
    /// events is told.
    pub(super) fn removed(&mut self, device: PciDeviceInfo) {
        if let Some(config) = &mut self.config {
            config.minus(&device.id);
        }
        self.removed.push(device);
    }

    /// All of `replies` are answered with `result`, when everyone can see it.
    pub(super) fn answer(&mut self, replies: Vec<Reply>, result: &Result<Done, ApiError>) {
        let answers = replies.into_iter().map(|reply| (reply, result.clone()));
        self.answers.extend(answers);
    }
}

/// The VM has no device of this name.
pub(super) fn no_such_device(id: &str) -> ApiError {
    ApiError::new(Code::NoSuchDevice, format!("the VM has no device {id:?}"))
        .field("id")
        .remedy("vm.info lists its devices (device_tree)")
}

fn wrong_state(state: VmState, needed: &str, remedy: &str) -> ApiError {
    let is = match state {
        VmState::Created => "not booted",
        VmState::Running => "running",
        VmState::Paused => "paused",
    };
    ApiError::new(
        Code::WrongState,
        format!("the VM is {is}; it must be {needed}"),
    )
    .remedy(remedy)
}

fn refused_by_sandbox(why: &Refusal) -> ApiError {
    ApiError::from_error(Code::SandboxRefused, why).field("path")
}

/// Why a VM was not built, for a client.
fn refused(why: &VmError) -> ApiError {
    let code = match why {
        VmError::Failed(_) => Code::Internal,
        VmError::Acpi(_) => Code::InvalidConfig,
        VmError::Refused(_) => Code::SandboxRefused,
        _ => Code::HostRefused,
    };
    ApiError::from_error(code, why)
}
