//! The conformance suite that any back end must pass: the promises of [the waist](super), one
//! check each, its name the promise.
//!
//! A back end's tests implement [`Harness`] and call [`run`]. What a back end can only show by
//! its state is checked by [`Backend::translation`] and [`Backend::objects`]; where the harness
//! can do real DMA ([`Harness::dma`]) the same promises are checked by what passes.
//!
//! Built for tests and with the feature `conformance`. A broken promise panics.

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a suite of checks reports by panicking"
)]

mod dma;
mod domains;
mod endpoints;
mod requests;

use std::sync::{Arc, Mutex, PoisonError};

use super::{Access, Backend, EventSink, Fault, Mapping, PageRequest, PageResponse, Translation};
use crate::{DomainId, Gpa, Iova, Pasid, Rid, Target};

/// A back end to be checked, with what it needs around it. Each check gets a fresh one.
pub trait Harness {
    /// The back end.
    fn backend(&self) -> &(dyn Backend + 'static);

    /// Two endpoints that the back end has and nobody has claimed.
    fn endpoints(&self) -> [Rid; 2];

    /// PASIDs that both endpoints can send; may be empty.
    fn pasids(&self) -> Vec<Pasid>;

    /// Different translations that the back end must accept for a target with or without PASID,
    /// at least one, without Blocked and domains. They stay valid as long as the harness.
    fn translations(&self) -> Vec<Translation>;

    /// Translations that it must refuse, without unknown domains.
    fn refused(&self) -> Vec<Translation>;

    /// At least four mappings of one length for one domain, ascending, with gaps, each allowing
    /// reads and writes.
    fn mappings(&self) -> Vec<Mapping>;

    /// Makes the next host call that puts a translation in force fail. `false`: cannot be done.
    fn fail_next_apply(&self) -> bool {
        false
    }

    /// Makes the endpoint ask for a page: one group of one request. `false`: cannot be done.
    fn request_page(&self, _target: Target, _group: u16) -> bool {
        false
    }

    /// Responses that the endpoint got so far. `None`: cannot be seen.
    fn page_responses(&self) -> Option<Vec<PageResponse>> {
        None
    }

    /// Real DMA of the endpoints, when there is a way.
    fn dma(&self) -> Option<&dyn Dma> {
        None
    }
}

/// DMA of the harness's endpoints.
pub trait Dma {
    /// Reads or writes one byte; whether it passed.
    fn access(&self, target: Target, iova: Iova, access: Access) -> bool;

    /// Begins an access to one byte that stays in flight until the result is dropped. The access
    /// must pass.
    fn hold(&self, target: Target, iova: Iova) -> Box<dyn Send>;

    /// Reads a byte of guest memory.
    fn memory(&self, gpa: Gpa) -> u8;

    /// Writes a byte of guest memory.
    fn set_memory(&self, gpa: Gpa, value: u8);

    /// The byte that a read gets, if it passes.
    fn read(&self, target: Target, iova: Iova) -> Option<u8>;
}

/// Runs every check, each on a harness of its own.
///
/// # Panics
/// At the first promise that is not kept. The name of the check is printed before it runs.
pub fn run(new: impl Fn() -> Box<dyn Harness>) {
    for (name, check) in CHECKS {
        eprintln!("conformance: {name}");
        check(&*new());
    }
}

/// One promise.
type Check = fn(&dyn Harness);

/// Every check with its name.
pub const CHECKS: &[(&str, Check)] = &[
    (
        "a claimed endpoint is blocked until something is applied",
        endpoints::blocked_at_first,
    ),
    (
        "an endpoint has one front end, and another after its release",
        endpoints::one_claim,
    ),
    (
        "an endpoint that is not claimed gets nothing",
        endpoints::unclaimed_is_refused,
    ),
    (
        "what is applied is in force",
        endpoints::applied_is_in_force,
    ),
    (
        "applying what is in force does nothing",
        endpoints::applying_again_is_no_op,
    ),
    (
        "a refused translation leaves the target blocked",
        endpoints::refused_is_blocked,
    ),
    (
        "a failure of the host leaves the target blocked, and asking again succeeds",
        endpoints::failed_is_blocked,
    ),
    (
        "equal translations are one object",
        endpoints::equal_translations_are_shared,
    ),
    (
        "requests with and without PASID stay apart",
        endpoints::pasids_stay_apart,
    ),
    (
        "a release leaves nothing behind",
        endpoints::release_leaves_nothing,
    ),
    (
        "releasing what is not there is no error",
        endpoints::release_of_nothing,
    ),
    (
        "an invalidation of existing and of unknown targets takes effect in full",
        endpoints::invalidations_take_effect,
    ),
    (
        "a domain that does not exist is refused everywhere",
        domains::unknown_domains,
    ),
    (
        "mappings are counted and removed",
        domains::mappings_are_counted,
    ),
    ("a map is all or nothing", domains::map_is_atomic),
    (
        "an unmap removes what lies inside and nothing that reaches out",
        domains::unmap_is_exact,
    ),
    (
        "destroying a domain blocks its targets",
        domains::destroyed_domain_blocks,
    ),
    (
        "capabilities do not change and compose with themselves",
        endpoints::capabilities_are_stable,
    ),
    (
        "a response to nothing is ignored",
        requests::response_to_nothing,
    ),
    (
        "a page request group has one response",
        requests::one_response_per_group,
    ),
    (
        "what is open at a release is answered invalid",
        requests::release_answers_requests,
    ),
    (
        "no DMA passes a blocked target, and each attempt is a fault",
        dma::blocked_dma_faults,
    ),
    (
        "a domain's mappings carry DMA, by their access, whenever they were made",
        dma::mappings_carry_dma,
    ),
    (
        "DMA under what is removed has ended when the call returns",
        dma::removal_drains,
    ),
    (
        "an unmap does not wait for DMA elsewhere",
        dma::unmap_waits_for_nothing_else,
    ),
];

/// What a front end hears.
#[derive(Default)]
struct Heard {
    faults: Mutex<Vec<Fault>>,
    requests: Mutex<Vec<PageRequest>>,
}

impl Heard {
    fn faults(&self) -> Vec<Fault> {
        std::mem::take(&mut self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn requests(&self) -> Vec<PageRequest> {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut requests)
    }
}

impl EventSink for Heard {
    fn fault(&self, fault: Fault) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.push(fault);
    }

    fn translation_request(&self, _: Target, _: Iova) -> bool {
        true
    }

    fn page_request(&self, request: PageRequest) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        requests.push(request);
    }
}

fn claim(harness: &dyn Harness, endpoint: Rid) -> Arc<Heard> {
    let heard = Arc::new(Heard::default());
    let claimed = harness.backend().claim(endpoint, heard.clone());
    claimed.expect("an endpoint that nobody claimed can be claimed");
    heard
}

/// The targets of `endpoint`: without PASID, and with each PASID there is.
fn targets(harness: &dyn Harness, endpoint: Rid) -> Vec<Target> {
    let pasids = harness.pasids();
    let with = pasids.iter().map(|&p| Target::pasid(endpoint, p));
    std::iter::once(Target::rid(endpoint)).chain(with).collect()
}

/// A domain with `mappings`.
fn domain_of(backend: &dyn Backend, mappings: &[Mapping]) -> DomainId {
    let domain = backend.create_domain().expect("there is room for a domain");
    backend
        .map(domain, mappings)
        .expect("the mappings are good");
    domain
}

/// Everything that a target can be given: the harness's tables, and a new domain.
fn all_translations(harness: &dyn Harness) -> Vec<Translation> {
    let mut all = harness.translations();
    let domain = domain_of(harness.backend(), &harness.mappings()[..1]);
    all.push(Translation::Domain(domain));
    all
}
