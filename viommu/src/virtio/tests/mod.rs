//! The device section of virtio 1.3, 5.13, sentence by sentence, and what other implementations
//! get wrong. A test begins with the section's word for it: must, should, may.

mod attach;
mod detach;
mod faults;
mod layout;
mod map;
mod plugging;
mod probe;
mod together;
mod unmap;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

use super::testing::{Recorder, attach, detach, map, probe, unmap};
use super::*;
use crate::backend::software::{EndpointConfig, Engine};
use crate::backend::{Access, Backend, Fault, FaultCause, Mapping, PageRequest, Translation};
use crate::reserved::{Kind, Region, Regions, X86_MSI};
use crate::spec::virtio_iommu::{
    self as spec, ProbeProperty, ProbeResvMem, Status, feature, map_flag, resv_mem_subtype,
};
use crate::{Gpa, GuestRam, Iova, Rid, Target};

const A: Rid = Rid::new(0, 3, 0);
const B: Rid = Rid::new(0, 4, 0);
const PAGE: u64 = 0x1000;
const RW: u32 = map_flag::READ | map_flag::WRITE;

/// A unit with its endpoints.
struct Bench {
    unit: Iommu,
    backend: Arc<Recorder>,
}

fn config() -> Config {
    let capabilities = Recorder::new().capabilities();
    Config::compose(&capabilities, 0).unwrap()
}

/// A unit with endpoints A and B in one back end, all features negotiated.
fn bench() -> Bench {
    bench_with(config())
}

fn bench_with(config: Config) -> Bench {
    let bench = Bench {
        unit: Iommu::new(config),
        backend: Recorder::new(),
    };
    bench.unit.set_features(u64::MAX);
    bench.add(A, Regions::new());
    bench.add(B, Regions::new());
    bench
}

impl Bench {
    fn add(&self, rid: Rid, reserved: Regions) {
        let backend: Arc<dyn Backend> = self.backend.clone();
        self.unit.add_endpoint(rid, backend, reserved).unwrap();
    }

    /// Sends one request with a tail to write, and returns the status.
    fn send(&self, request: &[u8]) -> Status {
        let reply = self.unit.process(request, 4);
        assert_eq!(reply.bytes().len(), 4, "used length");
        assert_eq!(
            reply.bytes()[1..],
            [0; 3],
            "should set reserved of the tail to zero"
        );
        status(reply.bytes()[0])
    }

    /// Sends requests together.
    fn send_all(&self, requests: &[Vec<u8>]) -> Vec<Status> {
        let chains = requests.iter().map(|readable| Chain {
            readable,
            writable: 4,
        });
        let mut replies = Vec::new();
        self.unit.serve(chains, &mut replies);
        replies
            .iter()
            .map(|reply| status(reply.bytes()[0]))
            .collect()
    }

    fn attach(&self, endpoint: Rid, domain: u32) -> Status {
        self.send(&attach(endpoint.0.into(), domain, 0))
    }

    fn detach(&self, endpoint: Rid, domain: u32) -> Status {
        self.send(&detach(endpoint.0.into(), domain))
    }

    /// Maps pages `first..=last` of domain 1 to themselves plus 1 GiB.
    fn map(&self, first: u64, last: u64) -> Status {
        let virt = (first * PAGE, last * PAGE + PAGE - 1);
        self.send(&map(1, virt, (1 << 30) + first * PAGE, RW))
    }

    fn unmap(&self, first: u64, last: u64) -> Status {
        self.send(&unmap(1, first * PAGE, last * PAGE + PAGE - 1))
    }

    /// First and last pages of what is mapped for `endpoint`.
    fn pages(&self, endpoint: Rid) -> Vec<(u64, u64)> {
        let pages = |m: &Mapping| (m.iova.0 / PAGE, (m.iova.0 + m.length) / PAGE - 1);
        let mappings = self.backend.mappings_of(endpoint).expect("not in a domain");
        mappings.iter().map(pages).collect()
    }

    fn fault(&self, endpoint: Rid, cause: FaultCause) {
        let sink = self.backend.book().claimed[&endpoint].clone();
        sink.fault(Fault {
            target: Target::rid(endpoint),
            iova: Iova(0xdead_b000),
            access: Access::READ,
            execute: false,
            privileged: false,
            cause,
        });
    }
}

/// Every test ends with a back end that was used as the waist says, and with nothing left in it.
impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        assert_eq!(self.backend.book().complaints, [""; 0]);
        for endpoint in self.unit.snapshot().endpoints {
            self.unit.remove_endpoint(endpoint.endpoint);
        }
        assert_eq!(self.backend.objects(), crate::backend::Objects::default());
    }
}

fn status(code: u8) -> Status {
    use Status::*;
    [Ok, IoErr, Unsupp, DevErr, Inval, Range, NoEnt, Fault, NoMem][usize::from(code)]
}

/// Properties, as a driver reads them.
fn properties(mut bytes: &[u8]) -> Vec<ProbeResvMem> {
    let mut list = Vec::new();
    while let Ok((head, _)) = ProbeProperty::read_from_prefix(bytes)
        && head.r#type.get() & 0xfff != 0
    {
        list.push(ProbeResvMem::read_from_prefix(bytes).unwrap().0);
        bytes = &bytes[usize::from(head.length.get()) + 4..];
    }
    list
}
