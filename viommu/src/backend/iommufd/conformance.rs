//! The host back end, on the fake kernel, under the conformance suite of all back ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};

use super::fake::Fake;
use super::tests::{A, B, Bench, STAGE2, mapping, stage1};
use crate::backend::conformance::{self, Harness};
use crate::backend::{
    Access, Backend, Capabilities, EventSink, Fault, Invalidation, Mapping, Objects, PageRequest,
    PageResponse, Refused, ResponseCode, Stage2, Translation,
};
use crate::doorbell::Doorbell;
use crate::{DomainId, Gpa, HwptId, Iova, Pasid, Rid, Target};

/// The back end, with what the suite wants to do to it at particular calls.
struct Host {
    bench: Bench,
    heard: Arc<Heard>,
    /// Cookies that were given out, and for what.
    cookies: Mutex<BTreeMap<u32, (Target, u16)>>,
    responses: Mutex<Vec<PageResponse>>,
}

/// Counts page requests on their way to a front end.
#[derive(Default)]
struct Heard {
    count: Mutex<usize>,
    more: Condvar,
}

struct Counting(Arc<dyn EventSink>, Arc<Heard>);

impl EventSink for Counting {
    fn fault(&self, fault: Fault) {
        self.0.fault(fault);
    }

    fn translation_request(&self, target: Target, iova: Iova) -> bool {
        self.0.translation_request(target, iova)
    }

    fn page_request(&self, request: PageRequest) {
        self.0.page_request(request);
        *self.1.count.lock().unwrap() += 1;
        self.1.more.notify_all();
    }
}

impl Host {
    fn new() -> Self {
        let bench = Bench::empty();
        bench.tables();
        bench.page(0, 0x20_0000 | 3);
        for rid in [A, B] {
            bench.add(rid, |_| {}).unwrap();
        }
        Self {
            bench,
            heard: Arc::default(),
            cookies: Mutex::default(),
            responses: Mutex::default(),
        }
    }

    fn fake(&self) -> &Arc<Fake> {
        &self.bench.fake
    }
}

impl Backend for Host {
    fn capabilities(&self) -> Capabilities {
        self.bench.host.capabilities()
    }
    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        let counting = Arc::new(Counting(sink, self.heard.clone()));
        self.bench.host.claim(endpoint, counting)
    }
    fn release(&self, endpoint: Rid) {
        self.bench.host.release(endpoint);
    }
    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused> {
        let result = self.bench.host.apply(target, translation);
        // What was to fail has failed, however often it was tried.
        self.fake().world().fail_all = None;
        self.bench.check();
        result
    }
    fn translation(&self, target: Target) -> Translation {
        self.bench.host.translation(target)
    }
    fn hwpt(&self, target: Target) -> Option<HwptId> {
        self.bench.host.hwpt(target)
    }
    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        self.bench.host.invalidate(batch)
    }
    fn drain_page_requests(&self) {
        self.bench.host.drain_page_requests();
    }
    fn doorbell(&self, endpoint: Rid) -> Doorbell {
        self.bench.host.doorbell(endpoint)
    }
    fn respond(&self, response: PageResponse) {
        self.bench.host.respond(response);
    }
    fn create_domain(&self) -> Result<DomainId, Refused> {
        self.bench.host.create_domain()
    }
    fn destroy_domain(&self, domain: DomainId) {
        self.bench.host.destroy_domain(domain);
    }
    fn map(&self, domain: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        self.bench.host.map(domain, mappings)
    }
    fn unmap(&self, domain: DomainId, first: Iova, last: Iova) -> Result<u64, Refused> {
        self.bench.host.unmap(domain, first, last)
    }
    fn objects(&self) -> Objects {
        self.bench.host.objects()
    }
}

impl Harness for Host {
    fn backend(&self) -> &(dyn Backend + 'static) {
        self
    }

    fn endpoints(&self) -> [Rid; 2] {
        [A, B]
    }

    fn pasids(&self) -> Vec<Pasid> {
        vec![Pasid(1), Pasid(9)]
    }

    fn translations(&self) -> Vec<Translation> {
        vec![
            stage1(0x1000),
            Translation::Identity,
            Translation::Stage2(STAGE2),
            stage1(0x2000),
        ]
    }

    fn refused(&self) -> Vec<Translation> {
        let Translation::Stage1(good) = stage1(0x1000) else {
            unreachable!()
        };
        let stage2 = |root, width| {
            Translation::Stage2(Stage2 {
                root: Gpa(root),
                width,
                ad: false,
            })
        };
        vec![
            stage1(0x1001),
            stage1(1 << 60),
            stage2(0x10, 48),
            stage2(0x1000, 47),
            Translation::Nested {
                stage1: good,
                stage2: STAGE2,
            },
        ]
    }

    fn mappings(&self) -> Vec<Mapping> {
        let at = |n: u64| {
            mapping(
                0x10_0000 + n * 0x4000,
                n * 0x3000,
                0x2000,
                Access::READ_WRITE,
            )
        };
        (0..5).map(at).collect()
    }

    fn fail_next_apply(&self) -> bool {
        self.fake().world().fail_all = Some(("attach", libc::ENOMEM));
        true
    }

    fn request_page(&self, target: Target, group: u16) -> bool {
        let device = u32::from(target.endpoint.0);
        let before = *self.heard.count.lock().unwrap();
        let cookie = self
            .fake()
            .page_request(device, target.pasid, group.into(), 0x5000);
        self.cookies.lock().unwrap().insert(cookie, (target, group));
        let heard = self.heard.count.lock().unwrap();
        let _heard = self
            .heard
            .more
            .wait_while(heard, |count| *count == before)
            .unwrap();
        true
    }

    fn page_responses(&self) -> Option<Vec<PageResponse>> {
        let mut answered = self.fake().responses();
        // What the kernel answers by itself, when a table goes, is Invalid.
        let taken = std::mem::take(&mut self.fake().world().auto_answered);
        answered.extend(taken.into_iter().map(|cookie| (cookie, 1)));
        let mut responses = self.responses.lock().unwrap();
        for (cookie, code) in answered {
            let (target, group) = self.cookies.lock().unwrap()[&cookie];
            responses.push(PageResponse {
                target,
                group,
                code: match code {
                    0 => ResponseCode::Success,
                    _ => ResponseCode::Invalid,
                },
            });
        }
        Some(responses.clone())
    }
}

#[test]
fn the_host_back_end_conforms() {
    conformance::run(|| Box::new(Host::new()));
}
