//! Fault reporting (5.13.6.9).

use super::*;

#[test]
fn a_fault_reaches_the_event_queue_with_the_endpoint_and_the_address() {
    let bench = bench();
    let woken = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = woken.clone();
    bench.unit.on_fault(move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    bench.fault(A, FaultCause::Blocked);
    bench.fault(B, FaultCause::DomainUnmapped);
    assert_eq!(woken.load(std::sync::atomic::Ordering::Relaxed), 2);
    let first = bench.unit.next_fault().unwrap();
    assert_eq!((first.reason, first.endpoint.get()), (1, A.0.into()));
    assert_eq!(
        (first.flags.get(), first.address.get()),
        (0x101, 0xdead_b000)
    );
    assert_eq!(first.as_bytes().len(), 24);
    let second = bench.unit.next_fault().unwrap();
    assert_eq!((second.reason, second.endpoint.get()), (2, B.0.into()));
    assert_eq!(bench.unit.next_fault(), None);
}

#[test]
fn a_page_request_is_answered_invalid_once_per_group() {
    let bench = bench();
    let sink = bench.backend.book().claimed[&A].clone();
    for last in [false, true] {
        sink.page_request(PageRequest {
            target: Target::rid(A),
            group: 7,
            last,
            iova: Iova(0),
            access: Access::READ,
            execute: false,
            privileged: false,
        });
    }
    let responses = bench.backend.book().responses.clone();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].code, crate::backend::ResponseCode::Invalid);
}
