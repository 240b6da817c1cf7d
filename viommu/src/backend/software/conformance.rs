//! The engine under the conformance suite of all back ends.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{EndpointConfig, Engine, PageResponseSink};
use crate::backend::conformance::{self, Dma, Harness};
use crate::backend::{Access, Backend, Mapping, PageResponse, Stage1, Stage2, Translation};
use crate::dma::DmaPort;
use crate::{Gpa, GuestRam, Iova, Pasid, Rid, Target};

const ENDPOINTS: [Rid; 2] = [Rid::new(0, 3, 0), Rid::new(4, 0, 1)];

#[derive(Default)]
struct Responses(Mutex<Vec<PageResponse>>);

impl PageResponseSink for Responses {
    fn page_response(&self, response: PageResponse) {
        self.0.lock().unwrap().push(response);
    }
}

struct Software {
    ram: GuestRam,
    engine: Engine,
    ports: [DmaPort; 2],
    responses: Arc<Responses>,
}

impl Software {
    fn new() -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let ram: GuestRam = Arc::new(ram);
        let engine = Engine::new(ram.clone());
        let responses = Arc::<Responses>::default();
        let ports = ENDPOINTS.map(|rid| {
            let config = EndpointConfig {
                pasid_bits: 8,
                page_responses: Some(responses.clone()),
                ..EndpointConfig::default()
            };
            engine.add_endpoint(rid, config).unwrap()
        });
        Self {
            ram,
            engine,
            ports,
            responses,
        }
    }

    fn port(&self, target: Target) -> DmaPort {
        let of = ENDPOINTS.iter().position(|&rid| rid == target.endpoint);
        let port = &self.ports[of.unwrap()];
        match target.pasid {
            None => port.clone(),
            Some(pasid) => port.with_pasid(pasid).unwrap(),
        }
    }
}

const STAGE1: Stage1 = Stage1 {
    root: Gpa(0x1000),
    width: 48,
    sre: false,
    wpe: false,
    eafe: false,
    ere: true,
    pwsnp: true,
    fs1gp: true,
};

const STAGE2: Stage2 = Stage2 {
    root: Gpa(0x2000),
    width: 39,
    ad: false,
};

impl Harness for Software {
    fn backend(&self) -> &(dyn Backend + 'static) {
        &self.engine
    }

    fn endpoints(&self) -> [Rid; 2] {
        ENDPOINTS
    }

    fn pasids(&self) -> Vec<Pasid> {
        vec![Pasid(0), Pasid(255)]
    }

    fn translations(&self) -> Vec<Translation> {
        vec![
            Translation::Stage1(STAGE1),
            Translation::Stage1(Stage1 {
                wpe: true,
                sre: true,
                ..STAGE1
            }),
            Translation::Identity,
            Translation::Stage2(STAGE2),
            Translation::Nested {
                stage1: STAGE1,
                stage2: STAGE2,
            },
        ]
    }

    fn refused(&self) -> Vec<Translation> {
        let narrow = Stage1 {
            width: 39,
            ..STAGE1
        };
        let unaligned = Stage2 {
            root: Gpa(0x2001),
            ..STAGE2
        };
        vec![
            Translation::Stage1(narrow),
            Translation::Stage2(unaligned),
            Translation::Nested {
                stage1: STAGE1,
                stage2: unaligned,
            },
        ]
    }

    fn mappings(&self) -> Vec<Mapping> {
        (0..6)
            .map(|i| Mapping {
                iova: Iova(0x1_0000_0000 + i * 0x4000),
                gpa: Gpa(0x10_0000 + i * 0x2000),
                length: 0x2000,
                access: Access::READ_WRITE,
                mmio: false,
            })
            .collect()
    }

    fn request_page(&self, target: Target, group: u16) -> bool {
        let port = self.port(target);
        port.page_request(Iova(0x5000), Access::READ, group, true)
            .unwrap();
        true
    }

    fn page_responses(&self) -> Option<Vec<PageResponse>> {
        Some(self.responses.0.lock().unwrap().clone())
    }

    fn dma(&self) -> Option<&dyn Dma> {
        Some(self)
    }
}

/// An access in flight on a thread of its own.
struct Held {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.end.take());
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Dma for Software {
    fn access(&self, target: Target, iova: Iova, access: Access) -> bool {
        let port = self.port(target);
        let dma = port.access();
        let at = GuestAddress(iova.0);
        (!access.read || dma.read_obj::<u8>(at).is_ok())
            && (!access.write || dma.write_obj(1u8, at).is_ok())
    }

    fn hold(&self, target: Target, iova: Iova) -> Box<dyn Send> {
        let port = self.port(target);
        let (begun, has_begun) = channel();
        let (end, ended) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let access = port.access();
            access.translate(iova, 1, Access::WRITE).unwrap();
            begun.send(()).unwrap();
            // Comes back when the other side is dropped.
            let _ = ended.recv();
        });
        has_begun.recv().unwrap();
        Box::new(Held {
            end: Some(end),
            thread: Some(thread),
        })
    }

    fn memory(&self, gpa: Gpa) -> u8 {
        self.ram.read_obj(GuestAddress(gpa.0)).unwrap()
    }

    fn set_memory(&self, gpa: Gpa, value: u8) {
        self.ram.write_obj(value, GuestAddress(gpa.0)).unwrap();
    }

    fn read(&self, target: Target, iova: Iova) -> Option<u8> {
        let port = self.port(target);
        let access = port.access();
        access.read_obj(GuestAddress(iova.0)).ok()
    }
}

#[test]
fn the_engine_keeps_every_promise_of_the_waist() {
    conformance::run(|| Box::new(Software::new()));
}
