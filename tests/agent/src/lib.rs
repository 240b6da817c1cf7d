//! The channel between a test and the init of the guest it drives: both ends of one small protocol.
//!
//! A request is one header line and a payload, `@lab RUN <id> <limit in ms> <length>\n<command>`;
//! its answer is `@lab DONE <id> <status> <stdout length> <stderr length>\n<stdout><stderr>`.
//! `@lab PING <id>\n` is answered by `@lab PONG <id>\n` and costs nothing, so that a test can
//! wait for a guest by asking. Headers are text because the channel may be a terminal that
//! echoes, or that carries a kernel's last words, before the agent has made it raw: whatever is
//! not a header is skipped.

#![forbid(unsafe_code)]

mod client;
mod frame;

pub use client::{Client, Error, Output};
pub use frame::{Answer, Request, read_answer, read_request, write_answer, write_request};

/// The exit status of a command that was killed because its limit passed, as `timeout(1)` has it.
pub const TIMED_OUT: i32 = 124;

/// The status of a test of a guest that says nothing of what it tests, since the host it ran in is
/// broken.
pub const NO_VERDICT: u8 = 99;

/// The most bytes of output that one command may return; the rest is dropped at the source.
pub const OUTPUT_LIMIT: usize = 16 << 20;

/// The number of the pong that an agent begins with, which nobody asked for.
pub const HELLO: u64 = 0;

/// The name of the virtio-serial port that the agent looks for before it takes `/dev/hvc0`.
pub const PORT_NAME: &str = "nestling.agent";

/// What the agent prints on the console once it runs as init: user space is up.
pub const READY: &str = "agent: user space is up";

/// What the agent prints on the console when no channel appeared within its limit.
pub const NO_CHANNEL: &str = "agent: no channel";
