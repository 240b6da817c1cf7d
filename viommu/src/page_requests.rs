//! Which page request groups wait for an answer (PCIe 6.0, 10.4).
//!
//! A device asks for pages in groups and waits for one answer per group. Whoever stands between
//! the device and the guest owes it that answer: exactly one, whatever the guest does, and also
//! when the device is reset or unplugged or the guest dies. This is the book of those debts. It
//! does no I/O: its holder calls it under a lock of its own and acts on what it says.
//!
//! A debt is a *ticket*, a value of the holder's choice that is enough to pay it (nothing, the
//! kernel's cookie, a channel). A ticket that goes in with [`request`](PageRequests::request)
//! comes out exactly once: by its [refusal](Refused), by [`respond`](PageRequests::respond), or by
//! [`withdraw`](PageRequests::withdraw). Whoever gets it out answers the device. Dropping the book
//! drops the tickets, so it is withdrawn from first.
//!
//! ```
//! use viommu::backend::{Access, PageRequest, Scope};
//! use viommu::page_requests::{Limits, PageRequests};
//! use viommu::{Iova, Pasid, Rid, Target};
//!
//! let mut book = PageRequests::new(Limits::default());
//! let request = PageRequest {
//!     target: Target::pasid(Rid(8), Pasid(1)),
//!     group: 3,
//!     last: true,
//!     iova: Iova(0x1000),
//!     access: Access::READ,
//!     execute: false,
//!     privileged: false,
//! };
//! assert_eq!(book.request(&request, "ticket"), Ok(()));
//! assert_eq!(book.respond(request.target, 3), Some("ticket"));
//! assert_eq!(book.respond(request.target, 3), None, "answered already");
//! assert_eq!(book.withdraw(Scope::All), []);
//! ```

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use crate::backend::{PageRequest, Scope};
use crate::{Pasid, Rid, Target};

/// How many page request groups there are per target: their index has 9 bits.
pub const GROUPS: u16 = 512;

/// How much may wait. What is beyond is refused, which is the back-pressure: the device has its
/// answer at once and may ask again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Groups of one endpoint, with and without PASID, so that one endpoint's flood does not
    /// take the others' room.
    pub per_endpoint: usize,
    /// Groups of all endpoints.
    pub total: usize,
    /// Requests in one group before its last one.
    pub per_group: u32,
}

impl Default for Limits {
    /// As many groups as an endpoint has indices, and as many requests as a guest's queue of
    /// 64 KiB holds (Linux's size).
    fn default() -> Self {
        Self {
            per_endpoint: GROUPS as usize,
            total: 16 * GROUPS as usize,
            per_group: 2048,
        }
    }
}

/// Why a request does not get on the book.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// The index is not one.
    #[error("page request group {0} does not exist; indices are below 512")]
    NoSuchGroup(u16),
    /// The group waits for its answer: until then its index must not be used again.
    #[error("a group of this index waits for its answer; the device must wait for that")]
    Waiting,
    /// Too much of this endpoint waits.
    #[error("{0} groups of this endpoint wait already; the device must wait for answers")]
    EndpointFull(usize),
    /// Too much of all endpoints waits.
    #[error("{0} groups wait already; the guest must answer some")]
    Full(usize),
    /// The group has too many requests.
    #[error("the group has {0} requests already; the device must send its last one")]
    GroupFull(u32),
}

/// A request that is not on the book, and what was passed with it. If it was the last of its
/// group, its device is answered now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused<T> {
    /// Why.
    pub why: Refusal,
    /// The ticket, given back.
    pub ticket: T,
}

/// A group that is off the book with no answer from the guest. Its device is answered now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Withdrawn<T> {
    /// Who asked.
    pub target: Target,
    /// Page Request Group Index.
    pub group: u16,
    /// The ticket of its last request.
    pub ticket: T,
}

/// The book. See the module's text.
#[derive(Debug)]
pub struct PageRequests<T> {
    limits: Limits,
    groups: BTreeMap<(Target, u16), Group<T>>,
    endpoints: BTreeMap<Rid, usize>,
    waiting: usize,
}

#[derive(Debug)]
enum Group<T> {
    /// The last request has not come: no answer is owed, and none is accepted.
    Open { requests: u32 },
    /// The answer is owed.
    Waiting(T),
}

impl<T> Default for PageRequests<T> {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl<T> PageRequests<T> {
    /// An empty book.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            groups: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            waiting: 0,
        }
    }

    /// A device asked. With the last request of a group its ticket is kept; the tickets of the
    /// others pay nothing and are dropped.
    ///
    /// # Errors
    /// The request must not be passed on. A group whose earlier requests were passed on stays
    /// open, and the device's last request can still close it.
    pub fn request(&mut self, request: &PageRequest, ticket: T) -> Result<(), Refused<T>> {
        match self.admit(request) {
            Err(why) => Err(Refused { why, ticket }),
            Ok(()) => {
                if request.last {
                    let key = (request.target, request.group);
                    self.groups.insert(key, Group::Waiting(ticket));
                    self.waiting += 1;
                }
                Ok(())
            }
        }
    }

    /// Makes room for a request, and opens its group.
    fn admit(&mut self, request: &PageRequest) -> Result<(), Refusal> {
        if request.group >= GROUPS {
            return Err(Refusal::NoSuchGroup(request.group));
        }
        let (limits, total) = (self.limits, self.groups.len());
        match self.groups.get_mut(&(request.target, request.group)) {
            Some(Group::Waiting(_)) => Err(Refusal::Waiting),
            // The last one always fits, or the group could never be closed.
            Some(Group::Open { requests }) if *requests >= limits.per_group && !request.last => {
                Err(Refusal::GroupFull(limits.per_group))
            }
            Some(Group::Open { requests }) => {
                *requests += 1;
                Ok(())
            }
            None => {
                let endpoint = request.target.endpoint;
                let of_endpoint = self.groups_of(endpoint);
                if of_endpoint >= limits.per_endpoint {
                    return Err(Refusal::EndpointFull(limits.per_endpoint));
                }
                if total >= limits.total {
                    return Err(Refusal::Full(limits.total));
                }
                self.endpoints.insert(endpoint, of_endpoint + 1);
                let key = (request.target, request.group);
                self.groups.insert(key, Group::Open { requests: 1 });
                Ok(())
            }
        }
    }

    /// The guest answers a group. `None` when no answer is owed: it was never asked, asked for
    /// and not complete, or answered already; the device must not hear of it.
    pub fn respond(&mut self, target: Target, group: u16) -> Option<T> {
        let key = (target, group);
        match self.groups.remove(&key)? {
            open @ Group::Open { .. } => {
                self.groups.insert(key, open);
                None
            }
            Group::Waiting(ticket) => {
                self.closed(target.endpoint, 1);
                self.waiting -= 1;
                Some(ticket)
            }
        }
    }

    /// Its holder has answered the last request of a group by itself, without passing it on: if
    /// earlier ones were passed on, the group is not open any longer.
    pub fn abandon(&mut self, target: Target, group: u16) {
        let key = (target, group);
        if matches!(self.groups.get(&key), Some(Group::Open { .. })) {
            self.groups.remove(&key);
            self.closed(target.endpoint, 1);
        }
    }

    /// Takes everything in `scope` off the book: its endpoint is reset or unplugged, its PASID
    /// goes away, or its guest does. Incomplete groups are forgotten; those that are owed an
    /// answer come out. Costs what is in `scope`.
    pub fn withdraw(&mut self, scope: Scope) -> Vec<Withdrawn<T>> {
        let mut out = Vec::new();
        let taken = match scope {
            Scope::All => std::mem::take(&mut self.groups),
            Scope::Endpoint(endpoint) => self.take(keys(
                Target::rid(endpoint),
                Target::pasid(endpoint, Pasid(u32::MAX)),
            )),
            Scope::Target(target) => self.take(keys(target, target)),
        };
        for ((target, group), state) in taken {
            self.closed(target.endpoint, 1);
            if let Group::Waiting(ticket) = state {
                self.waiting -= 1;
                out.push(Withdrawn {
                    target,
                    group,
                    ticket,
                });
            }
        }
        out
    }

    fn take(&mut self, keys: RangeInclusive<(Target, u16)>) -> BTreeMap<(Target, u16), Group<T>> {
        self.groups.extract_if(keys, |_, _| true).collect()
    }

    fn closed(&mut self, endpoint: Rid, count: usize) {
        if let Some(of_endpoint) = self.endpoints.get_mut(&endpoint) {
            *of_endpoint = of_endpoint.saturating_sub(count);
            if *of_endpoint == 0 {
                self.endpoints.remove(&endpoint);
            }
        }
    }

    /// How many groups are owed an answer.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// How many groups of `endpoint` are on the book, complete or not.
    pub fn groups_of(&self, endpoint: Rid) -> usize {
        self.endpoints.get(&endpoint).copied().unwrap_or(0)
    }

    /// Whether nothing is on the book.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }
}

fn keys(first: Target, last: Target) -> RangeInclusive<(Target, u16)> {
    (first, 0)..=(last, u16::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::Iova;
    use crate::backend::Access;

    fn request(target: Target, group: u16, last: bool) -> PageRequest {
        PageRequest {
            target,
            group,
            last,
            iova: Iova(0),
            access: Access::READ,
            execute: false,
            privileged: false,
        }
    }

    fn small() -> PageRequests<u32> {
        PageRequests::new(Limits {
            per_endpoint: 4,
            total: 6,
            per_group: 3,
        })
    }

    const ONE: Target = Target::rid(Rid(1));

    #[test]
    fn a_group_is_answered_once_however_many_requests_it_has() {
        let mut book = small();
        for (last, ticket) in [(false, 1), (false, 2), (true, 3)] {
            book.request(&request(ONE, 0, last), ticket).unwrap();
        }
        assert_eq!(book.waiting(), 1);
        assert_eq!(book.respond(ONE, 0), Some(3));
        assert_eq!(book.respond(ONE, 0), None);
        assert!(book.is_empty());
    }

    #[test]
    fn an_answer_before_the_last_request_is_not_one() {
        let mut book = small();
        book.request(&request(ONE, 7, false), 1).unwrap();
        assert_eq!(book.respond(ONE, 7), None);
        book.request(&request(ONE, 7, true), 2).unwrap();
        assert_eq!(book.respond(ONE, 7), Some(2));
    }

    #[test]
    fn pasids_and_no_pasid_do_not_answer_for_each_other() {
        let mut book = small();
        let (zero, one) = (
            Target::pasid(Rid(1), Pasid(0)),
            Target::pasid(Rid(1), Pasid(1)),
        );
        for (ticket, target) in [ONE, zero, one].into_iter().enumerate() {
            book.request(&request(target, 5, true), ticket as u32)
                .unwrap();
        }
        assert_eq!(book.respond(Target::rid(Rid(2)), 5), None);
        assert_eq!(book.respond(zero, 5), Some(1));
        assert_eq!(book.respond(zero, 5), None);
        assert_eq!(book.respond(ONE, 5), Some(0));
        assert_eq!(book.respond(one, 5), Some(2));
    }

    #[test]
    fn an_index_that_waits_is_not_used_again_until_it_is_answered() {
        let mut book = small();
        book.request(&request(ONE, 5, true), 1).unwrap();
        let refused = book.request(&request(ONE, 5, true), 2).unwrap_err();
        assert_eq!(
            refused,
            Refused {
                why: Refusal::Waiting,
                ticket: 2
            }
        );
        assert!(book.request(&request(ONE, 5, false), 3).is_err());
        assert_eq!(book.respond(ONE, 5), Some(1));
        book.request(&request(ONE, 5, true), 4).unwrap();
    }

    #[test]
    fn a_flood_is_refused_and_leaves_room_for_other_endpoints() {
        let mut book = small();
        for group in 0..600 {
            let result = book.request(&request(ONE, group, group % 2 == 0), group.into());
            let why = result.err().map(|refused| refused.why);
            let wanted = match group {
                0..4 => None,
                4..512 => Some(Refusal::EndpointFull(4)),
                _ => Some(Refusal::NoSuchGroup(group)),
            };
            assert_eq!(why, wanted);
        }
        let two = Target::rid(Rid(2));
        assert!(book.request(&request(two, 0, true), 0).is_ok());
        assert!(book.request(&request(two, 1, true), 0).is_ok());
        let refused = book.request(&request(two, 2, true), 9).unwrap_err();
        assert_eq!(
            refused,
            Refused {
                why: Refusal::Full(6),
                ticket: 9
            }
        );
        assert_eq!(book.respond(ONE, 0), Some(0));
        assert!(book.request(&request(two, 2, true), 0).is_ok());
    }

    #[test]
    fn a_group_without_end_is_refused_but_can_be_closed() {
        let mut book = small();
        for _ in 0..3 {
            book.request(&request(ONE, 0, false), 0).unwrap();
        }
        let refused = book.request(&request(ONE, 0, false), 0).unwrap_err();
        assert_eq!(refused.why, Refusal::GroupFull(3));
        book.request(&request(ONE, 0, true), 8).unwrap();
        assert_eq!(book.respond(ONE, 0), Some(8));
    }

    #[test]
    fn a_group_that_its_holder_ended_takes_no_room_and_one_that_is_owed_stays() {
        let mut book = small();
        book.request(&request(ONE, 0, false), 0).unwrap();
        book.request(&request(ONE, 1, true), 1).unwrap();
        for group in 0..3 {
            book.abandon(ONE, group);
        }
        assert_eq!((book.groups_of(Rid(1)), book.waiting()), (1, 1));
        assert_eq!(book.respond(ONE, 1), Some(1));
        assert!(book.is_empty());
    }

    #[test]
    fn a_reset_withdraws_what_is_owed_and_forgets_what_is_open() {
        let mut book = small();
        let pasid = Target::pasid(Rid(1), Pasid::MAX);
        book.request(&request(ONE, 0, false), 0).unwrap();
        book.request(&request(pasid, 511, true), 1).unwrap();
        book.request(&request(Target::rid(Rid(2)), 0, true), 2)
            .unwrap();
        let withdrawn = book.withdraw(Scope::Endpoint(Rid(1)));
        let owed = Withdrawn {
            target: pasid,
            group: 511,
            ticket: 1,
        };
        assert_eq!(withdrawn, [owed]);
        assert_eq!((book.groups_of(Rid(1)), book.waiting()), (0, 1));
        assert_eq!(book.respond(pasid, 511), None, "too late");
        assert_eq!(book.withdraw(Scope::All).len(), 1);
        assert!(book.is_empty());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Request(Target, u16, bool),
        Respond(Target, u16),
        Withdraw(Scope),
    }

    fn target() -> impl Strategy<Value = Target> {
        (0..3u16, prop::option::of(0..2u32)).prop_map(|(endpoint, pasid)| Target {
            endpoint: Rid(endpoint),
            pasid: pasid.map(Pasid),
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            8 => (target(), 0..4u16, any::<bool>()).prop_map(|(t, g, l)| Step::Request(t, g, l)),
            8 => (target(), 0..4u16).prop_map(|(t, g)| Step::Respond(t, g)),
            1 => target().prop_map(|t| Step::Withdraw(Scope::Target(t))),
            1 => target().prop_map(|t| Step::Withdraw(Scope::Endpoint(t.endpoint))),
            1 => Just(Step::Withdraw(Scope::All)),
        ]
    }

    proptest! {
        #[test]
        fn every_group_is_answered_exactly_once_under_any_interleaving(
            steps in prop::collection::vec(step(), 0..400)
        ) {
            let mut book = small();
            // Groups that are complete and not answered, with their tickets.
            let mut owed = BTreeMap::new();
            let mut answered = BTreeSet::new();
            let mut asked = 0;
            for step in steps.into_iter().chain([Step::Withdraw(Scope::All)]) {
                match step {
                    Step::Request(target, group, last) => {
                        asked += 1;
                        match book.request(&request(target, group, last), asked) {
                            Ok(()) if last => {
                                let older = owed.insert((target, group), asked);
                                prop_assert_eq!(older, None);
                            }
                            Ok(()) => prop_assert!(!owed.contains_key(&(target, group))),
                            Err(refused) => prop_assert_eq!(refused.ticket, asked),
                        }
                    }
                    Step::Respond(target, group) => {
                        let ticket = book.respond(target, group);
                        prop_assert_eq!(ticket, owed.remove(&(target, group)));
                        prop_assert!(ticket.is_none_or(|ticket| answered.insert(ticket)));
                    }
                    Step::Withdraw(scope) => {
                        let within = |target: Target| match scope {
                            Scope::All => true,
                            Scope::Endpoint(endpoint) => target.endpoint == endpoint,
                            Scope::Target(of) => target == of,
                        };
                        for out in book.withdraw(scope) {
                            prop_assert!(within(out.target));
                            let ticket = owed.remove(&(out.target, out.group));
                            prop_assert_eq!(ticket, Some(out.ticket));
                            prop_assert!(answered.insert(out.ticket));
                        }
                        prop_assert!(!owed.keys().any(|(target, _)| within(*target)));
                    }
                }
                prop_assert_eq!(book.waiting(), owed.len());
                let groups: usize = (0..3).map(|rid| book.groups_of(Rid(rid))).sum();
                prop_assert_eq!(groups, book.groups.len());
                prop_assert!((0..3).all(|rid| book.groups_of(Rid(rid)) <= 4));
                prop_assert!(groups <= 6);
            }
            prop_assert!(owed.is_empty() && book.is_empty());
        }
    }
}
