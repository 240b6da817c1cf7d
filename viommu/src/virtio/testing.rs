//! What the tests and the fuzz harness share: a back end that keeps a book, refuses on demand and
//! checks that it is used as the waist says; and requests as bytes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::IntoBytes;

use crate::backend::{
    Backend, Capabilities, EventSink, Invalidation, Mapping, Objects, PageResponse, Refused,
    Translation,
};
use crate::doorbell::Doorbell;
use crate::spec::virtio_iommu::{
    ReqAttach, ReqDetach, ReqHead, ReqMap, ReqProbe, ReqUnmap, req_type,
};
use crate::{DomainId, Iova, Rid, Target};

/// The book. Broken promises of the caller end up in `complaints`.
#[derive(Default)]
pub(crate) struct Book {
    pub(crate) claimed: BTreeMap<Rid, Arc<dyn EventSink>>,
    pub(crate) in_force: BTreeMap<Rid, Translation>,
    pub(crate) domains: BTreeMap<u32, BTreeMap<u64, Mapping>>,
    /// Mappings of each call of `map`.
    pub(crate) map_calls: Vec<usize>,
    pub(crate) unmap_calls: usize,
    pub(crate) responses: Vec<PageResponse>,
    /// One per call that can be refused, from the front; all further ones succeed.
    pub(crate) refuse: std::collections::VecDeque<bool>,
    /// How many calls were refused on demand.
    pub(crate) refused: usize,
    pub(crate) complaints: Vec<String>,
    /// Called before a domain is destroyed.
    pub(crate) on_destroy: Option<Box<dyn FnOnce() + Send>>,
    next: u32,
}

/// A back end that keeps a [`Book`].
#[derive(Default)]
pub(crate) struct Recorder(Mutex<Book>);

impl Recorder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mappings in force for an endpoint, when it is in a domain.
    pub(crate) fn mappings_of(&self, endpoint: Rid) -> Option<Vec<Mapping>> {
        let book = self.book();
        match book.in_force.get(&endpoint) {
            Some(Translation::Domain(id)) => {
                Some(book.domains.get(&id.0)?.values().copied().collect())
            }
            _ => None,
        }
    }

    /// What is in force for an endpoint.
    pub(crate) fn translation_of(&self, endpoint: Rid) -> Translation {
        self.translation(Target::rid(endpoint))
    }
}

impl Book {
    fn may_refuse(&mut self) -> Result<(), Refused> {
        if self.refuse.pop_front() == Some(true) {
            self.refused += 1;
            return Err(Refused::NoRoom {
                what: "mapping",
                limit: 0,
            });
        }
        Ok(())
    }

    fn complain(&mut self, text: String) {
        self.complaints.push(text);
    }
}

impl Backend for Recorder {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            stage1: false,
            stage1_57: false,
            stage1_1g: false,
            sre: false,
            eafe: false,
            stage2: [false; 3],
            nested: false,
            pasid_bits: 0,
            page_requests: false,
            address_width: 48,
            page_sizes: 0x4020_1000,
            snoop_control: false,
        }
    }

    fn claim(&self, endpoint: Rid, sink: Arc<dyn EventSink>) -> Result<(), Refused> {
        let mut book = self.book();
        book.may_refuse()?;
        if book.claimed.insert(endpoint, sink).is_some() {
            book.complain(format!("{endpoint} was claimed twice"));
        }
        book.in_force.insert(endpoint, Translation::Blocked);
        Ok(())
    }

    fn release(&self, endpoint: Rid) {
        let mut book = self.book();
        book.claimed.remove(&endpoint);
        book.in_force.remove(&endpoint);
    }

    fn apply(&self, target: Target, translation: Translation) -> Result<(), Refused> {
        let mut book = self.book();
        if !book.claimed.contains_key(&target.endpoint) {
            book.complain(format!("{target} is not claimed"));
        }
        if let Translation::Domain(id) = translation
            && !book.domains.contains_key(&id.0)
        {
            book.complain(format!("{target} was put into unknown domain {}", id.0));
        }
        let outcome = match translation {
            // A back end can always block.
            Translation::Blocked => Ok(()),
            _ => book.may_refuse(),
        };
        let now = if outcome.is_ok() {
            translation
        } else {
            Translation::Blocked
        };
        book.in_force.insert(target.endpoint, now);
        outcome
    }

    fn translation(&self, target: Target) -> Translation {
        let book = self.book();
        book.in_force
            .get(&target.endpoint)
            .copied()
            .unwrap_or_default()
    }

    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        let refused = self.book().may_refuse().is_err();
        if refused { 0 } else { batch.len() }
    }

    fn drain_page_requests(&self) {}

    fn doorbell(&self, _: Rid) -> Doorbell {
        Doorbell::Intercepted
    }

    fn respond(&self, response: PageResponse) {
        self.book().responses.push(response);
    }

    fn create_domain(&self) -> Result<DomainId, Refused> {
        let mut book = self.book();
        book.may_refuse()?;
        book.next += 1;
        let id = book.next;
        book.domains.insert(id, BTreeMap::new());
        Ok(DomainId(id))
    }

    fn destroy_domain(&self, domain: DomainId) {
        let on_destroy = self.book().on_destroy.take();
        if let Some(on_destroy) = on_destroy {
            on_destroy();
        }
        let mut book = self.book();
        for translation in book.in_force.values_mut() {
            if *translation == Translation::Domain(domain) {
                *translation = Translation::Blocked;
            }
        }
        if book.domains.remove(&domain.0).is_none() {
            book.complain(format!("unknown domain {} was destroyed", domain.0));
        }
    }

    fn map(&self, domain: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        let mut book = self.book();
        book.map_calls.push(mappings.len());
        book.may_refuse()?;
        for new in mappings {
            let last = new.iova.0 + (new.length - 1);
            let known = book.domains.entry(domain.0).or_default();
            let clash = known
                .range(..=last)
                .next_back()
                .is_some_and(|(_, m)| m.iova.0 + (m.length - 1) >= new.iova.0);
            known.insert(new.iova.0, *new);
            if clash {
                book.complain(format!("{new:?} overlaps"));
            }
            if !new.access.read && !new.access.write {
                book.complain(format!("{new:?} allows nothing"));
            }
        }
        Ok(())
    }

    fn unmap(&self, domain: DomainId, first: Iova, last: Iova) -> Result<u64, Refused> {
        let mut book = self.book();
        book.unmap_calls += 1;
        book.may_refuse()?;
        let Some(known) = book.domains.get_mut(&domain.0) else {
            book.complain(format!("unmap in unknown domain {}", domain.0));
            return Err(Refused::NoDomain(domain));
        };
        let end = |m: &Mapping| m.iova.0 + (m.length - 1);
        let hit: Vec<Mapping> = known
            .range(..=last.0)
            .rev()
            .map(|(_, m)| *m)
            .take_while(|m| end(m) >= first.0)
            .collect();
        let mut bytes = 0;
        for mapping in hit {
            if mapping.iova < first || end(&mapping) > last.0 {
                book.complain(format!("unmap {first}-{last} splits {mapping:?}"));
            } else if let Some(known) = book.domains.get_mut(&domain.0) {
                known.remove(&mapping.iova.0);
                bytes += mapping.length;
            }
        }
        Ok(bytes)
    }

    fn objects(&self) -> Objects {
        let book = self.book();
        Objects {
            endpoints: book.claimed.len(),
            targets: book
                .in_force
                .values()
                .filter(|t| **t != Translation::Blocked)
                .count(),
            translations: 0,
            domains: book.domains.len(),
            mappings: book.domains.values().map(BTreeMap::len).sum(),
            page_requests: 0,
        }
    }
}

fn head(r#type: u8) -> ReqHead {
    ReqHead {
        r#type,
        reserved: [0; 3],
    }
}

/// The bytes of an ATTACH.
pub(crate) fn attach(endpoint: u32, domain: u32, flags: u32) -> Vec<u8> {
    let request = ReqAttach {
        head: head(req_type::ATTACH),
        domain: domain.into(),
        endpoint: endpoint.into(),
        flags: flags.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

/// The bytes of a DETACH.
pub(crate) fn detach(endpoint: u32, domain: u32) -> Vec<u8> {
    let request = ReqDetach {
        head: head(req_type::DETACH),
        domain: domain.into(),
        endpoint: endpoint.into(),
        reserved: [0; 8],
    };
    request.as_bytes().to_vec()
}

/// The bytes of a MAP.
pub(crate) fn map(domain: u32, virt: (u64, u64), phys_start: u64, flags: u32) -> Vec<u8> {
    let request = ReqMap {
        head: head(req_type::MAP),
        domain: domain.into(),
        virt_start: virt.0.into(),
        virt_end: virt.1.into(),
        phys_start: phys_start.into(),
        flags: flags.into(),
    };
    request.as_bytes().to_vec()
}

/// The bytes of an UNMAP.
pub(crate) fn unmap(domain: u32, virt_start: u64, virt_end: u64) -> Vec<u8> {
    let request = ReqUnmap {
        head: head(req_type::UNMAP),
        domain: domain.into(),
        virt_start: virt_start.into(),
        virt_end: virt_end.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

/// The bytes of a PROBE.
pub(crate) fn probe(endpoint: u32) -> Vec<u8> {
    let request = ReqProbe {
        head: head(req_type::PROBE),
        endpoint: endpoint.into(),
        reserved: [0; 64],
    };
    request.as_bytes().to_vec()
}
