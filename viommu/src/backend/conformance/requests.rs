//! Page requests.

use std::sync::Arc;

use super::super::{Objects, PageResponse, ResponseCode};
use super::{Harness, Heard, claim, targets};
use crate::Target;

pub(super) fn response_to_nothing(harness: &dyn Harness) {
    let [endpoint, other] = harness.endpoints();
    claim(harness, endpoint);
    for rid in [endpoint, other] {
        for target in targets(harness, rid) {
            for code in [
                ResponseCode::Success,
                ResponseCode::Invalid,
                ResponseCode::Failure,
            ] {
                harness.backend().respond(PageResponse {
                    target,
                    group: 511,
                    code,
                });
            }
        }
    }
    assert!(harness.page_responses().unwrap_or_default().is_empty());
}

/// Claims an endpoint, puts a table in force for every target and lets `target` ask for a page.
/// `None`: this harness cannot.
fn with_request(harness: &dyn Harness, group: u16) -> Option<(Target, Arc<Heard>)> {
    let [endpoint, _] = harness.endpoints();
    let heard = claim(harness, endpoint);
    let translation = harness.translations()[0];
    for target in targets(harness, endpoint) {
        harness
            .backend()
            .apply(target, translation)
            .expect("is accepted");
    }
    let target = *targets(harness, endpoint).last()?;
    harness.page_responses()?;
    harness
        .request_page(target, group)
        .then_some((target, heard))
}

pub(super) fn one_response_per_group(harness: &dyn Harness) {
    let Some((target, heard)) = with_request(harness, 3) else {
        return;
    };
    let backend = harness.backend();
    let requests = heard.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!((requests[0].target, requests[0].last), (target, true));
    assert_eq!(backend.objects().page_requests, 1);
    let response = PageResponse {
        target,
        group: requests[0].group,
        code: ResponseCode::Success,
    };
    backend.respond(response);
    backend.respond(response);
    let responses = harness.page_responses().unwrap_or_default();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].code, ResponseCode::Success);
    assert_eq!(backend.objects().page_requests, 0);
}

pub(super) fn release_answers_requests(harness: &dyn Harness) {
    let Some((target, _heard)) = with_request(harness, 3) else {
        return;
    };
    harness.backend().release(target.endpoint);
    let responses = harness.page_responses().unwrap_or_default();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].code, ResponseCode::Invalid);
    assert_eq!(harness.backend().objects(), Objects::default());
}
