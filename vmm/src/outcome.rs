//! How a VM ended, and the exit status that says so.

#![forbid(unsafe_code)]

/// How a VM ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset, and `platform.on_reboot` is `exit`.
    Reboot,
    /// The guest's CPU shut down.
    TripleFault,
    /// The guest wrote this status to the debug-exit port.
    DebugExit(u8),
    /// A signal, or Ctrl-A x, ended nestling.
    Signal(u8),
    /// A client asked for it (vmm.shutdown).
    Requested,
}

/// The status for errors of nestling or its host.
pub const STATUS_ERROR: u8 = 1;
/// The status for a wrong command line or configuration.
pub const STATUS_USAGE: u8 = 2;

impl Outcome {
    /// The exit status of the process.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Requested => 0,
            Self::Reboot => 3,
            Self::TripleFault => 4,
            Self::DebugExit(status) => *status,
            Self::Signal(number) => 128 + number,
        }
    }
}

/// Every exit status, for help texts.
pub const STATUSES: &[(&str, &str)] = &[
    (
        "0",
        "the guest powered itself off, or a client asked for the end (vmm.shutdown)",
    ),
    (
        "1",
        "nestling or the host cannot go on; the reason is on standard error",
    ),
    ("2", "the command line or the configuration is wrong"),
    (
        "3",
        "the guest asked for a reboot (a panic with panic=-1 does, too) with --platform on_reboot=exit",
    ),
    ("4", "the guest's CPU shut down: a triple fault"),
    (
        "128+N",
        "signal N ended nestling; Ctrl-A x counts as SIGINT",
    ),
    (
        "159",
        "the sandbox killed nestling (SIGSYS, --seccomp): please report it",
    ),
    ("any", "the guest's choice with --platform debug_exit=on"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_the_status_that_help_tells() {
        let told = |outcome: &Outcome| {
            let status = outcome.status().to_string();
            STATUSES.iter().any(|(number, _)| *number == status)
        };
        for outcome in [Outcome::PowerOff, Outcome::Reboot, Outcome::TripleFault] {
            assert!(told(&outcome), "{outcome:?}");
        }
        assert_eq!(Outcome::Signal(15).status(), 143);
        assert_eq!(Outcome::DebugExit(7).status(), 7);
    }
}
