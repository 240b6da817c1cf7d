//! One channel: its registers and what they mean. Pure: no DMA, no thread.

#![forbid(unsafe_code)]

use viommu::Pasid;
use viommu::backend::{Access, ResponseCode};

/// Bytes that one step of an operation does at most.
pub(super) const PIECE: usize = 16 << 10;
/// Pages that one PAGE_REQUEST asks for at most.
pub(super) const MOST_PAGES: u64 = 64;

const PAGE: u64 = 4096;

mod offset {
    pub(super) const CONTROL: u64 = 0x00;
    pub(super) const STATUS: u64 = 0x04;
    pub(super) const OPERATION: u64 = 0x08;
    pub(super) const FLAGS: u64 = 0x0c;
    pub(super) const SOURCE: u64 = 0x10;
    pub(super) const DESTINATION: u64 = 0x18;
    pub(super) const LENGTH: u64 = 0x20;
    pub(super) const PATTERN: u64 = 0x28;
    pub(super) const PASID: u64 = 0x30;
    pub(super) const GROUP: u64 = 0x34;
    pub(super) const VECTOR: u64 = 0x38;
    pub(super) const DONE: u64 = 0x40;
    pub(super) const RESULT: u64 = 0x48;
    pub(super) const FAULT_ADDRESS: u64 = 0x50;
    pub(super) const PAGE_REQUESTS: u64 = 0x58;
    pub(super) const PAGE_RESPONSES: u64 = 0x5c;
}

mod flag {
    pub(super) const PASID: u32 = 1 << 0;
    pub(super) const PRIVILEGED: u32 = 1 << 1;
    pub(super) const EXECUTE: u32 = 1 << 2;
    pub(super) const ATS: u32 = 1 << 3;
    pub(super) const PRI: u32 = 1 << 4;
    pub(super) const WRITE: u32 = 1 << 5;
    pub(super) const NOT_LAST: u32 = 1 << 6;
    pub(super) const INTERRUPT: u32 = 1 << 7;
    pub(super) const ALL: u32 = (1 << 8) - 1;
}

mod operation {
    pub(super) const COPY: u32 = 1;
    pub(super) const FILL: u32 = 2;
    pub(super) const CHECKSUM: u32 = 3;
    pub(super) const TRANSLATE: u32 = 4;
    pub(super) const MESSAGE: u32 = 5;
    pub(super) const PAGE_REQUEST: u32 = 6;
}

/// What configuration space allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Enables {
    pub(super) bus_master: bool,
    pub(super) pasid: bool,
    pub(super) execute: bool,
    pub(super) privileged: bool,
    pub(super) ats: bool,
    pub(super) pri: bool,
    /// Outstanding Page Request Allocation.
    pub(super) allocation: u32,
}

impl Enables {
    /// The ENABLED register.
    pub(super) fn bits(self) -> u32 {
        u32::from(self.bus_master)
            | u32::from(self.pasid) << 1
            | u32::from(self.execute) << 2
            | u32::from(self.privileged) << 3
            | u32::from(self.ats) << 4
            | u32::from(self.pri) << 5
    }
}

/// What a request carries besides its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Attributes {
    pub(super) pasid: Option<Pasid>,
    pub(super) privileged: bool,
    pub(super) execute: bool,
    /// Translate first; nobody is told of what does not pass.
    pub(super) ats: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    Copy {
        from: u64,
        to: u64,
    },
    Fill {
        to: u64,
    },
    Checksum {
        from: u64,
    },
    Translate {
        iova: u64,
        access: Access,
    },
    Message {
        to: u64,
    },
    PageRequest {
        iova: u64,
        access: Access,
        last: bool,
    },
}

/// The next step of a channel, to be done without its lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Job {
    /// Which START it belongs to.
    pub(super) number: u64,
    pub(super) operation: Operation,
    pub(super) attributes: Attributes,
    pub(super) pri: bool,
    pub(super) group: u16,
    pub(super) pattern: u64,
    pub(super) length: u64,
    pub(super) done: u64,
    pub(super) result: u64,
}

impl Job {
    /// Bytes of the next piece.
    pub(super) fn piece(&self) -> usize {
        (self.length - self.done).min(PIECE as u64) as usize
    }
}

/// What a step did, and what stopped it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Outcome {
    pub(super) done: u64,
    pub(super) result: u64,
    pub(super) stop: Option<Stop>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// There is nothing more to do.
    Finished,
    /// An untranslated request did not pass.
    Fault(u64),
    /// An address has no translation.
    Missing(u64, Access),
    /// PAGE_REQUEST: ask for these pages.
    Ask,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Reason {
    BadOperation = 1,
    Disabled = 2,
    Fault = 3,
    NoTranslation = 4,
    PageInvalid = 5,
    PageFailure = 6,
    GroupBusy = 7,
    PageRefused = 8,
    AddressWraps = 9,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum State {
    Idle,
    Running,
    Waiting,
    Done,
    Failed(Reason),
    Aborted,
}

impl State {
    fn bits(self) -> u32 {
        match self {
            Self::Idle => 0,
            Self::Running => 1,
            Self::Waiting => 2,
            Self::Done => 3,
            Self::Failed(reason) => 4 | (reason as u32) << 8,
            Self::Aborted => 5,
        }
    }
}

/// What a write to CONTROL asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Control {
    Start,
    Abort,
}

/// One channel.
#[derive(Clone, Debug)]
pub(super) struct Channel {
    operation: u32,
    flags: u32,
    source: u64,
    destination: u64,
    length: u64,
    pattern: u64,
    pasid: u32,
    group: u32,
    vector: u32,
    state: State,
    done: u64,
    result: u64,
    fault_address: u64,
    requests: u32,
    responses: u32,
    number: u64,
    /// A step is being done, and its end will be told by [`Channel::landed`].
    in_flight: bool,
    /// ABORT was written meanwhile.
    aborting: bool,
    /// It has to wait before it asks for a page.
    starved: bool,
}

impl Channel {
    pub(super) fn new(index: usize) -> Self {
        Self {
            operation: 0,
            flags: 0,
            source: 0,
            destination: 0,
            length: 0,
            pattern: 0,
            pasid: 0,
            group: index as u32,
            vector: index as u32 % u32::from(super::VECTORS),
            state: State::Idle,
            done: 0,
            result: 0,
            fault_address: 0,
            requests: 0,
            responses: 0,
            number: 0,
            in_flight: false,
            aborting: false,
            starved: false,
        }
    }

    /// After a reset: what belongs to a START before it must not be taken for a new one's.
    pub(super) fn continue_from(&mut self, old: &Self) {
        self.number = old.number;
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Whether an operation has not ended. One whose last step is in flight has not, even if the
    /// response that ends it came already.
    pub(super) fn is_busy(&self) -> bool {
        self.in_flight || matches!(self.state, State::Running | State::Waiting)
    }

    /// Which START the channel is at.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The vector to signal if an operation has ended. While its last step is in flight it has
    /// not: the end of that step signals.
    pub(super) fn ended(&self) -> Option<u16> {
        self.interrupt().filter(|_| !self.is_busy())
    }

    /// The vector to signal when an operation ends.
    pub(super) fn interrupt(&self) -> Option<u16> {
        let wanted = self.flags & flag::INTERRUPT != 0;
        wanted.then(|| u16::try_from(self.vector).ok()).flatten()
    }

    /// The 4 bytes at `at`, a multiple of 4.
    pub(super) fn read(&self, at: u64) -> u32 {
        let half = |value: u64| (value >> (8 * (at & 4))) as u32;
        match at {
            offset::CONTROL => 0,
            offset::STATUS if self.in_flight && self.state != State::Waiting => {
                State::Running.bits()
            }
            offset::STATUS => self.state.bits(),
            offset::OPERATION => self.operation,
            offset::FLAGS => self.flags,
            offset::PASID => self.pasid,
            offset::GROUP => self.group,
            offset::VECTOR => self.vector,
            offset::PAGE_REQUESTS => self.requests,
            offset::PAGE_RESPONSES => self.responses,
            _ => match at & !4 {
                offset::SOURCE => half(self.source),
                offset::DESTINATION => half(self.destination),
                offset::LENGTH => half(self.length),
                offset::PATTERN => half(self.pattern),
                offset::DONE => half(self.done),
                offset::RESULT => half(self.result),
                offset::FAULT_ADDRESS => half(self.fault_address),
                _ => 0,
            },
        }
    }

    /// Writes the 4 bytes at `at`, a multiple of 4.
    pub(super) fn write(&mut self, at: u64, value: u32) -> Option<Control> {
        if at == offset::CONTROL {
            return match value {
                1 => Some(Control::Start),
                2 => Some(Control::Abort),
                _ => None,
            };
        }
        if self.is_busy() {
            return None;
        }
        let put = |register: &mut u64| {
            let shift = 8 * (at & 4);
            *register = *register & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match at {
            offset::OPERATION => self.operation = value,
            offset::FLAGS => self.flags = value,
            offset::PASID => self.pasid = value,
            offset::GROUP => self.group = value,
            offset::VECTOR => self.vector = value,
            _ => match at & !4 {
                offset::SOURCE => put(&mut self.source),
                offset::DESTINATION => put(&mut self.destination),
                offset::LENGTH => put(&mut self.length),
                offset::PATTERN => put(&mut self.pattern),
                _ => {}
            },
        }
        None
    }

    /// START. Returns whether the operation ended at once.
    pub(super) fn start(&mut self) -> bool {
        if self.is_busy() {
            return false;
        }
        self.number += 1;
        self.starved = false;
        self.done = 0;
        self.result = match self.operation {
            operation::CHECKSUM => FNV_BASIS,
            _ => 0,
        };
        self.fault_address = 0;
        (self.requests, self.responses) = (0, 0);
        self.state = match self.decode() {
            Ok(_) => State::Running,
            Err(reason) => State::Failed(reason),
        };
        !self.is_busy()
    }

    /// ABORT. Returns whether an operation ended: not while a step is in flight, since its DMA is.
    pub(super) fn abort(&mut self) -> bool {
        self.aborting = self.in_flight && self.is_busy();
        let ends = self.is_busy() && !self.in_flight;
        if ends {
            self.state = State::Aborted;
        }
        ends
    }

    /// The next step, when the channel is RUNNING, or why it cannot be done. It is in flight
    /// until [`landed`](Self::landed).
    pub(super) fn step(&mut self, enables: Enables) -> Option<Result<Job, Reason>> {
        if self.state != State::Running || self.starved {
            return None;
        }
        let job = self.decode().and_then(|job| {
            let attributes = job.attributes;
            let asks = job.pri || matches!(job.operation, Operation::PageRequest { .. });
            let translates = attributes.ats || matches!(job.operation, Operation::Translate { .. });
            let allowed = enables.bus_master
                && (enables.pasid || attributes.pasid.is_none())
                && (enables.execute || !attributes.execute)
                && (enables.privileged || !attributes.privileged)
                && (enables.ats || !translates)
                && (enables.pri || !asks);
            if allowed {
                Ok(job)
            } else {
                Err(Reason::Disabled)
            }
        });
        self.in_flight = true;
        Some(job)
    }

    /// A step is over, with all its DMA and page requests.
    pub(super) fn landed(&mut self) {
        self.in_flight = false;
        if std::mem::take(&mut self.aborting) && self.is_busy() {
            self.state = State::Aborted;
        }
    }

    /// Whether a step is in flight.
    pub(super) fn in_flight(&self) -> bool {
        self.in_flight
    }

    fn decode(&self) -> Result<Job, Reason> {
        let has = |bits: u32| self.flags & bits != 0;
        let access = Access {
            read: !has(flag::WRITE),
            write: has(flag::WRITE),
        };
        let operation = match self.operation {
            operation::COPY => Operation::Copy {
                from: self.source,
                to: self.destination,
            },
            operation::FILL => Operation::Fill {
                to: self.destination,
            },
            operation::CHECKSUM => Operation::Checksum { from: self.source },
            operation::TRANSLATE => Operation::Translate {
                iova: self.source,
                access,
            },
            operation::MESSAGE => Operation::Message {
                to: self.destination,
            },
            operation::PAGE_REQUEST => Operation::PageRequest {
                iova: self.source,
                access,
                last: !has(flag::NOT_LAST),
            },
            _ => return Err(Reason::BadOperation),
        };
        let pasid = Pasid::new(self.pasid);
        let bad = self.flags & !flag::ALL != 0
            || has(flag::PASID) && pasid.is_none()
            || has(flag::PRIVILEGED | flag::EXECUTE) && !has(flag::PASID)
            || has(flag::PRI) && !has(flag::ATS)
            || self.group >= u32::from(viommu::page_requests::GROUPS);
        if bad {
            return Err(Reason::BadOperation);
        }
        let ends = match operation {
            Operation::Copy { from, to } => [from, to],
            Operation::Fill { to } => [to; 2],
            Operation::Checksum { from } => [from; 2],
            Operation::PageRequest { iova, .. } => [iova; 2],
            Operation::Translate { .. } | Operation::Message { .. } => [0; 2],
        };
        if ends
            .into_iter()
            .any(|start| start.checked_add(self.length).is_none())
        {
            return Err(Reason::AddressWraps);
        }
        Ok(Job {
            number: self.number,
            operation,
            attributes: Attributes {
                pasid: pasid.filter(|_| has(flag::PASID)),
                privileged: has(flag::PRIVILEGED),
                execute: has(flag::EXECUTE),
                ats: has(flag::ATS),
            },
            pri: has(flag::PRI),
            group: self.group as u16,
            pattern: self.pattern,
            length: self.length,
            done: self.done,
            result: self.result,
        })
    }

    /// A step is done. Returns the page requests that must be sent for the operation to go on:
    /// the channel is then RUNNING still, until [`wait`](Self::wait). What belongs to an older
    /// START is dropped.
    pub(super) fn apply(&mut self, job: &Job, outcome: Outcome) -> Option<Ask> {
        if self.number != job.number || self.state != State::Running {
            return None;
        }
        self.done = job.done + outcome.done;
        self.result = outcome.result;
        match outcome.stop {
            None => {}
            Some(Stop::Finished) => self.state = State::Done,
            Some(Stop::Fault(at)) => {
                self.fault_address = at;
                self.state = State::Failed(Reason::Fault);
            }
            Some(Stop::Missing(at, access)) => {
                self.fault_address = at;
                if job.pri {
                    return Some(Ask {
                        iova: at & !(PAGE - 1),
                        pages: 1,
                        access,
                        last: true,
                    });
                }
                self.state = State::Failed(Reason::NoTranslation);
            }
            Some(Stop::Ask) => {
                if let Operation::PageRequest { iova, access, last } = job.operation {
                    let first = iova & !(PAGE - 1);
                    let bytes = (iova - first).saturating_add(job.length);
                    return Some(Ask {
                        iova: first,
                        pages: bytes.div_ceil(PAGE).clamp(1, MOST_PAGES),
                        access,
                        last,
                    });
                }
            }
        }
        None
    }

    /// The page requests are sent, or about to be: the channel waits if there will be a response.
    pub(super) fn wait(&mut self, ask: Ask) {
        self.requests = self.requests.saturating_add(ask.pages as u32);
        self.state = if ask.last {
            State::Waiting
        } else {
            State::Done
        };
    }

    /// Nothing may be asked for now; the step is done again after [`feed`](Self::feed).
    pub(super) fn starve(&mut self) {
        self.starved = true;
    }

    /// Something may be asked for again.
    pub(super) fn feed(&mut self) {
        self.starved = false;
    }

    /// The channel cannot go on.
    pub(super) fn fail(&mut self, reason: Reason) {
        self.state = State::Failed(reason);
    }

    /// The response to its group came.
    pub(super) fn respond(&mut self, code: ResponseCode) {
        self.responses = self.responses.saturating_add(1);
        let asked_for_it = self.operation == operation::PAGE_REQUEST;
        if asked_for_it {
            self.result = match code {
                ResponseCode::Success => 0,
                ResponseCode::Invalid => 1,
                ResponseCode::Failure => 15,
            };
        }
        self.state = match code {
            _ if asked_for_it => State::Done,
            ResponseCode::Success => State::Running,
            ResponseCode::Invalid => State::Failed(Reason::PageInvalid),
            ResponseCode::Failure => State::Failed(Reason::PageFailure),
        };
    }
}

/// Page requests to send, as one group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Ask {
    /// The first page.
    pub(super) iova: u64,
    /// How many, 1 to [`MOST_PAGES`].
    pub(super) pages: u64,
    pub(super) access: Access,
    /// Whether the group is complete, so that there is a response.
    pub(super) last: bool,
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// Goes on with the 64-bit FNV-1a `hash` of what came before.
pub(super) fn checksum(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking() -> (Channel, Enables) {
        let mut channel = Channel::new(3);
        channel.write(offset::OPERATION, operation::PAGE_REQUEST);
        channel.write(offset::FLAGS, flag::INTERRUPT);
        assert!(!channel.start());
        let enables = Enables {
            bus_master: true,
            ats: true,
            pri: true,
            allocation: 1,
            ..Enables::default()
        };
        (channel, enables)
    }

    #[test]
    fn a_response_before_the_step_is_over_does_not_end_the_operation_yet() {
        let (mut channel, enables) = asking();
        let job = channel.step(enables).unwrap().unwrap();
        let outcome = Outcome {
            done: 0,
            result: 0,
            stop: Some(Stop::Ask),
        };
        let ask = channel.apply(&job, outcome).unwrap();
        channel.wait(ask);
        channel.respond(ResponseCode::Success);
        assert_eq!(channel.read(offset::STATUS), State::Running.bits());
        assert_eq!(channel.ended(), None, "its interrupt comes at the end");
        assert!(
            !channel.start() && channel.number() == job.number,
            "nor can another begin"
        );
        channel.landed();
        assert_eq!(channel.read(offset::STATUS), State::Done.bits());
        assert_eq!(channel.ended(), Some(3));
    }

    #[test]
    fn an_abort_while_a_step_is_in_flight_ends_when_that_does() {
        let (mut channel, enables) = asking();
        channel.step(enables).unwrap().unwrap();
        assert!(!channel.abort());
        assert_eq!(channel.read(offset::STATUS), State::Running.bits());
        channel.landed();
        assert_eq!(channel.read(offset::STATUS), State::Aborted.bits());
        assert_eq!(channel.ended(), Some(3));
    }
}
