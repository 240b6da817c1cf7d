//! Removals that wait for the guest.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use viommu::Rid;

use crate::control::{ApiError, Code, Removal, Reply};

/// The longest that anybody waits.
const LONGEST: Duration = Duration::from_secs(86_400);

/// The devices that the guest was asked to let go of, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Removals(BTreeMap<Rid, Pending>);

#[derive(Debug)]
struct Pending {
    force: bool,
    deadline: Instant,
    replies: Vec<Reply>,
}

/// A device that the guest did not let go of in time.
#[derive(Debug)]
pub(super) struct Overdue {
    pub(super) rid: Rid,
    /// It is to be taken away; else it stays.
    pub(super) force: bool,
    pub(super) replies: Vec<Reply>,
}

impl Removals {
    /// Whether the guest has been asked to let go of the device at `rid`.
    pub(super) fn has(&self, rid: Rid) -> bool {
        self.0.contains_key(&rid)
    }

    /// The guest is being asked. Who asks for more force than was asked for before joins; who does
    /// not gets the reply back.
    pub(super) fn begin(
        &mut self,
        rid: Rid,
        how: Removal,
        reply: Option<Reply>,
        now: Instant,
    ) -> Result<(), Option<Reply>> {
        // A client may name any number of milliseconds.
        let latest = now + LONGEST;
        let deadline = now
            .checked_add(how.timeout)
            .map_or(latest, |at| at.min(latest));
        match self.0.get_mut(&rid) {
            Some(pending) if pending.force || !how.force => Err(reply),
            Some(pending) => {
                pending.force = true;
                pending.deadline = deadline.min(pending.deadline);
                pending.replies.extend(reply);
                Ok(())
            }
            None => {
                let pending = Pending {
                    force: how.force,
                    deadline,
                    replies: reply.into_iter().collect(),
                };
                self.0.insert(rid, pending);
                Ok(())
            }
        }
    }

    /// The guest let go of the device at `rid` in the end: `replies` wait until it is gone.
    pub(super) fn keep(&mut self, rid: Rid, replies: Vec<Reply>) {
        let pending = Pending {
            force: true,
            deadline: Instant::now() + LONGEST,
            replies,
        };
        self.0.insert(rid, pending);
    }

    /// How long until [`overdue`](Self::overdue) has something to say.
    pub(super) fn next(&self, now: Instant) -> Option<Duration> {
        let next = self.0.values().map(|pending| pending.deadline).min()?;
        Some(next.saturating_duration_since(now))
    }

    /// The devices whose time is over.
    pub(super) fn overdue(&mut self, now: Instant) -> Vec<Overdue> {
        let over = self.0.extract_if(.., |_, pending| pending.deadline <= now);
        over.map(|(rid, pending)| Overdue {
            rid,
            force: pending.force,
            replies: pending.replies,
        })
        .collect()
    }

    /// The device at `rid` is gone: who waits for it.
    pub(super) fn ended(&mut self, rid: Rid) -> Vec<Reply> {
        let pending = self.0.remove(&rid);
        pending.map_or_else(Vec::new, |pending| pending.replies)
    }
}

/// The VM stops before the guest has let go.
impl Drop for Removals {
    fn drop(&mut self) {
        for reply in std::mem::take(&mut self.0)
            .into_values()
            .flat_map(|pending| pending.replies)
        {
            let stopped = ApiError::new(
                Code::WrongState,
                "the VM stopped before its guest let go of the device",
            );
            reply.send(Err(
                stopped.remedy("ask again: the VM has the device when it is booted")
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::control::Done;

    const RID: Rid = Rid::new(0, 5, 0);
    const SECOND: Duration = Duration::from_secs(1);

    type Answers = Arc<Mutex<Vec<Result<Done, ApiError>>>>;

    fn reply(answers: &Answers) -> Option<Reply> {
        let answers = answers.clone();
        Some(Reply::new(move |answer| {
            answers.lock().unwrap().push(answer)
        }))
    }

    fn how(force: bool, seconds: u64) -> Removal {
        Removal {
            force,
            timeout: Duration::from_secs(seconds),
        }
    }

    #[test]
    fn a_removal_is_overdue_once_after_its_time() {
        let (answers, now) = (Answers::default(), Instant::now());
        let mut removals = Removals::default();
        assert_eq!(removals.next(now), None);
        removals
            .begin(RID, how(false, 2), reply(&answers), now)
            .unwrap();
        assert_eq!(removals.next(now + SECOND), Some(SECOND));
        assert!(removals.overdue(now + SECOND).is_empty());
        let over = removals.overdue(now + 2 * SECOND);
        assert_eq!((over.len(), over[0].rid, over[0].force), (1, RID, false));
        assert!(!removals.has(RID));
        assert_eq!(removals.next(now), None);
    }

    #[test]
    fn only_more_force_joins_a_removal_that_is_pending() {
        let (answers, now) = (Answers::default(), Instant::now());
        let mut removals = Removals::default();
        removals
            .begin(RID, how(false, 60), reply(&answers), now)
            .unwrap();
        assert!(
            removals
                .begin(RID, how(false, 1), reply(&answers), now)
                .is_err()
        );
        removals
            .begin(RID, how(true, 1), reply(&answers), now)
            .unwrap();
        assert!(removals.begin(RID, how(true, 0), None, now).is_err());
        let over = removals.overdue(now + SECOND);
        assert!(over[0].force);
        assert_eq!(over[0].replies.len(), 2, "both are told");
    }

    #[test]
    fn whoever_waits_is_told_when_the_device_is_gone_and_when_the_vm_stops() {
        let (answers, now) = (Answers::default(), Instant::now());
        let mut removals = Removals::default();
        removals
            .begin(RID, how(false, 60), reply(&answers), now)
            .unwrap();
        for reply in removals.ended(RID) {
            reply.send(Ok(Done::Nothing));
        }
        assert!(removals.ended(RID).is_empty());
        // One that is late by a moment.
        removals
            .begin(RID, how(true, 0), reply(&answers), now)
            .unwrap();
        for overdue in removals.overdue(now) {
            removals.keep(overdue.rid, overdue.replies);
        }
        assert!(removals.overdue(now + SECOND).is_empty());
        assert_eq!(removals.ended(RID).len(), 1);
        removals
            .begin(RID, how(false, 60), reply(&answers), now)
            .unwrap();
        drop(removals);
        let answers = answers.lock().unwrap();
        assert!(answers[0].is_ok());
        assert_eq!(answers[1].as_ref().unwrap_err().code, Code::WrongState);
    }

    #[test]
    fn any_time_may_be_asked_for() {
        let now = Instant::now();
        let mut removals = Removals::default();
        let how = Removal {
            force: false,
            timeout: Duration::MAX,
        };
        removals.begin(RID, how, None, now).unwrap();
        assert!(removals.next(now).unwrap() > Duration::from_secs(3600));
    }
}
