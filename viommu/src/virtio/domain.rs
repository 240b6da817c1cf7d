//! The state machine: which endpoints there are, which domain each is in, and what each domain
//! maps. Pure: it knows no back end. A request that is refused changes nothing.

use std::collections::BTreeMap;

use super::decode::{Attach, Detach, Map, Mode, Unmap};
use super::mappings::{Mappings, Removed};
use crate::backend::Mapping;
use crate::doorbell::permits;
use crate::reserved::{Kind, Regions};
use crate::spec::virtio_iommu::Status;
use crate::{Gpa, Iova};

/// What requests are checked against; frozen when the device is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// The page granularity in bytes, a power of two of at least 4096.
    pub granule: u64,
    /// Virtual addresses that can be mapped, inclusive.
    pub input_range: (u64, u64),
    /// Domain numbers, inclusive.
    pub domain_range: (u32, u32),
    /// Bits of a guest-physical address.
    pub gpa_bits: u32,
    /// Mappings that one domain may have.
    pub domain_mappings: usize,
    /// Mappings that all domains together may have.
    pub mappings: usize,
}

/// An endpoint, as the guest sees it.
#[derive(Debug)]
pub struct Endpoint {
    /// What cannot be mapped in a domain that it is in.
    pub reserved: Regions,
    /// The domain that it is attached to.
    pub domain: Option<u32>,
    /// The device is gone, but the guest has not detached it yet. Its domain lives on so that the
    /// guest can take it apart.
    pub departed: bool,
}

/// A domain. It exists as long as an endpoint is attached to it.
#[derive(Debug, Default)]
pub struct Domain {
    /// What translates for its endpoints.
    pub mode: Mode,
    /// Its endpoints, never none.
    pub endpoints: Vec<u32>,
    /// What its endpoints have reserved.
    reserved: Regions,
    /// What it maps.
    pub mappings: Mappings,
}

/// What an ATTACH that is in order asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attaching {
    /// The endpoint is in that domain.
    Already,
    /// The endpoint comes into it, from another or from none.
    New,
}

/// See the module's text.
#[derive(Debug)]
pub struct State {
    rules: Rules,
    endpoints: BTreeMap<u32, Endpoint>,
    domains: BTreeMap<u32, Domain>,
    /// In all domains.
    mappings: usize,
}

impl State {
    /// No endpoints, no domains.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            mappings: 0,
        }
    }

    /// What requests are checked against.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The endpoints by number, with those that have departed.
    pub fn endpoints(&self) -> impl Iterator<Item = (u32, &Endpoint)> {
        self.endpoints.iter().map(|(&id, endpoint)| (id, endpoint))
    }

    /// The endpoint with that number, unless it has departed.
    pub fn endpoint(&self, id: u32) -> Option<&Endpoint> {
        self.endpoints.get(&id).filter(|e| !e.departed)
    }

    /// The domains by number.
    pub fn domains(&self) -> impl Iterator<Item = (u32, &Domain)> {
        self.domains.iter().map(|(&id, domain)| (id, domain))
    }

    /// The domain with that number.
    pub fn domain(&self, id: u32) -> Option<&Domain> {
        self.domains.get(&id)
    }

    /// Adds an endpoint, attached to nothing. Whatever had its number must have left
    /// ([`leave`](Self::leave)).
    pub fn add_endpoint(&mut self, id: u32, reserved: Regions) {
        self.endpoints.insert(
            id,
            Endpoint {
                reserved,
                domain: None,
                departed: false,
            },
        );
    }

    /// Removes an endpoint: at once when it is not attached, else it has *departed* until the
    /// guest detaches it. Returns its domain.
    pub fn remove_endpoint(&mut self, id: u32) -> Option<u32> {
        let endpoint = self.endpoints.get_mut(&id)?;
        endpoint.departed = true;
        let domain = endpoint.domain;
        if domain.is_none() {
            self.endpoints.remove(&id);
        }
        domain
    }

    /// All endpoints detached, as after a device reset. Those that have departed are forgotten.
    /// Returns the domains that ceased.
    pub fn reset(&mut self) -> impl Iterator<Item = Domain> + use<> {
        let domains = std::mem::take(&mut self.domains);
        self.mappings = 0;
        self.endpoints.retain(|_, endpoint| {
            endpoint.domain = None;
            !endpoint.departed
        });
        domains.into_values()
    }

    /// Checks an ATTACH, to be followed by [`attach`](Self::attach).
    ///
    /// # Errors
    /// What the guest is told.
    pub fn check_attach(&self, request: &Attach) -> Result<Attaching, Status> {
        let endpoint = self.endpoint(request.endpoint).ok_or(Status::NoEnt)?;
        let (first, last) = self.rules.domain_range;
        if request.domain < first || request.domain > last {
            return Err(Status::Range);
        }
        let domain = self.domains.get(&request.domain);
        if domain.is_some_and(|d| d.mode != request.mode) {
            return Err(Status::Inval);
        }
        if endpoint.domain == Some(request.domain) {
            return Ok(Attaching::Already);
        }
        let incompatible = |d: &Domain| {
            let mut reserved = endpoint.reserved.iter();
            reserved.any(|r| {
                let permitted = |m: &Mapping| permits(r, m.iova, m.gpa);
                !d.mappings.all_in(r.first, r.last, permitted)
            })
        };
        if domain.is_some_and(incompatible) {
            return Err(Status::Unsupp);
        }
        Ok(Attaching::New)
    }

    /// Does an ATTACH that [`check_attach`](Self::check_attach) found in order. Returns the domain
    /// that ceased by it, if one did.
    pub fn attach(&mut self, request: &Attach) -> Option<Domain> {
        let ceased = self.leave(request.endpoint);
        let Some(endpoint) = self.endpoints.get_mut(&request.endpoint) else {
            return ceased;
        };
        endpoint.domain = Some(request.domain);
        let domain = self.domains.entry(request.domain).or_default();
        domain.mode = request.mode;
        domain.endpoints.push(request.endpoint);
        domain.reserved.merge(&endpoint.reserved);
        ceased
    }

    /// Checks a DETACH, to be followed by [`leave`](Self::leave).
    ///
    /// # Errors
    /// What the guest is told.
    pub fn check_detach(&self, request: &Detach) -> Result<(), Status> {
        let endpoint = self.endpoints.get(&request.endpoint).ok_or(Status::NoEnt)?;
        if endpoint.domain == Some(request.domain) {
            Ok(())
        } else {
            Err(Status::Inval)
        }
    }

    /// Takes an endpoint out of its domain, which ceases with its last endpoint and is returned
    /// then: it may be much to free. An endpoint that has departed is forgotten.
    pub fn leave(&mut self, id: u32) -> Option<Domain> {
        let endpoint = self.endpoints.get_mut(&id)?;
        let left = endpoint.domain.take();
        if endpoint.departed {
            self.endpoints.remove(&id);
        }
        let number = left?;
        let domain = self.domains.get_mut(&number)?;
        domain.endpoints.retain(|&other| other != id);
        if domain.endpoints.is_empty() {
            self.mappings -= domain.mappings.len();
            return self.domains.remove(&number);
        }
        domain.reserved = Regions::new();
        for other in &domain.endpoints {
            if let Some(endpoint) = self.endpoints.get(other) {
                domain.reserved.merge(&endpoint.reserved);
            }
        }
        None
    }

    /// Does a MAP.
    ///
    /// # Errors
    /// What the guest is told; nothing is changed then.
    pub fn map(&mut self, request: &Map) -> Result<(), Status> {
        let rules = &self.rules;
        let domain = self.domains.get_mut(&request.domain).ok_or(Status::NoEnt)?;
        if domain.mode != Mode::Mapped {
            return Err(Status::Inval);
        }
        let (first, last) = (request.virt_start, request.virt_end);
        let unaligned = first | last.wrapping_add(1) | request.phys_start;
        if unaligned & (rules.granule - 1) != 0 {
            return Err(Status::Range);
        }
        if last < first {
            return Err(Status::Inval);
        }
        if first < rules.input_range.0 || last > rules.input_range.1 {
            return Err(Status::Range);
        }
        let phys_end = request.phys_start.checked_add(last - first);
        if phys_end.is_none_or(|end| end >> rules.gpa_bits != 0) {
            return Err(Status::Range);
        }
        let to = Gpa(request.phys_start);
        let mut reserved = domain.reserved.all_overlapping(first, last);
        if reserved.any(|region| !permits(region, Iova(first), to)) {
            return Err(Status::Inval);
        }
        let mut hidden = domain.reserved.all_overlapping(to.0, to.0 + (last - first));
        if hidden.any(|region| region.kind == Kind::MappedMsi && first != to.0) {
            // The doorbell at another address than its own.
            return Err(Status::Inval);
        }
        if self.mappings >= rules.mappings || domain.mappings.len() >= rules.domain_mappings {
            let free = !domain.mappings.any_in(first, last);
            return Err(if free { Status::NoMem } else { Status::Inval });
        }
        domain
            .mappings
            .insert(&request.mapping())
            .map_err(|_| Status::Inval)?;
        self.mappings += 1;
        Ok(())
    }

    /// Does an UNMAP. Returns what was removed.
    ///
    /// # Errors
    /// What the guest is told; nothing is changed then.
    pub fn unmap(&mut self, request: &Unmap) -> Result<Removed, Status> {
        self.unmap_some(request, usize::MAX)
            .map(|(removed, _)| removed)
    }

    /// As [`unmap`](Self::unmap), but for about `most` mappings; with where to go on when there
    /// are more. All of the request is checked.
    ///
    /// # Errors
    /// What the guest is told; nothing is changed then.
    pub fn unmap_some(
        &mut self,
        request: &Unmap,
        most: usize,
    ) -> Result<(Removed, Option<u64>), Status> {
        let domain = self.domains.get_mut(&request.domain).ok_or(Status::NoEnt)?;
        if domain.mode != Mode::Mapped || request.virt_end < request.virt_start {
            return Err(Status::Inval);
        }
        let (removed, rest) = domain
            .mappings
            .remove_some(request.virt_start, request.virt_end, most)
            .map_err(|_| Status::Range)?;
        self.mappings -= removed.mappings;
        Ok((removed, rest))
    }
}
