//! What the benches of this workspace share: an allocator that counts, a back end that does
//! nothing, virtio-iommu's requests, and statistics that a busy machine does not spoil.

#![allow(
    dead_code,
    reason = "each bench is a program of its own and uses its part"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use viommu::backend::{
    Backend, Capabilities, EventSink, Invalidation, Mapping, Objects, PageResponse, Refused,
    Translation,
};
use viommu::doorbell::Doorbell;
use viommu::spec::virtio_iommu::{ReqAttach, ReqDetach, ReqHead, ReqMap, ReqUnmap, req_type};
use viommu::{DomainId, Iova, Rid, Target};
use zerocopy::IntoBytes;

/// Counts what is allocated.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call to the system's allocator as it is; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations so far.
pub(crate) fn allocations() -> usize {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// Bytes that are allocated now.
pub(crate) fn live_bytes() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// Does everything, at once and in no time.
pub(crate) struct Nothing;

impl Backend for Nothing {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            stage1: true,
            stage1_57: true,
            stage1_1g: true,
            sre: false,
            eafe: false,
            stage2: [true; 3],
            nested: true,
            pasid_bits: 20,
            page_requests: true,
            address_width: 57,
            page_sizes: !0xfff,
            snoop_control: true,
        }
    }
    fn claim(&self, _: Rid, _: Arc<dyn EventSink>) -> Result<(), Refused> {
        Ok(())
    }
    fn release(&self, _: Rid) {}
    fn apply(&self, _: Target, _: Translation) -> Result<(), Refused> {
        Ok(())
    }
    fn translation(&self, _: Target) -> Translation {
        Translation::Blocked
    }
    fn invalidate(&self, batch: &[Invalidation]) -> usize {
        black_box(batch).len()
    }
    fn drain_page_requests(&self) {}
    fn doorbell(&self, _: Rid) -> Doorbell {
        Doorbell::Intercepted
    }
    fn respond(&self, _: PageResponse) {}
    fn create_domain(&self) -> Result<DomainId, Refused> {
        Ok(DomainId(1))
    }
    fn destroy_domain(&self, _: DomainId) {}
    fn map(&self, _: DomainId, mappings: &[Mapping]) -> Result<(), Refused> {
        black_box(mappings);
        Ok(())
    }
    fn unmap(&self, _: DomainId, _: Iova, _: Iova) -> Result<u64, Refused> {
        Ok(0)
    }
    fn objects(&self) -> Objects {
        Objects::default()
    }
}

/// The endpoint that the requests name.
pub(crate) const ENDPOINT: Rid = Rid::new(0, 1, 0);
/// Live mappings lie in runs of this many pages, with as long a hole behind each.
pub(crate) const RUN: u64 = 128;

/// Addresses of the live mappings: from 4 GiB, above the interrupt window.
pub(crate) fn place(n: u64, page: u64) -> u64 {
    (1 << 32) + (n / RUN * 2 * RUN + n % RUN) * page
}

fn head(r#type: u8) -> ReqHead {
    ReqHead {
        r#type,
        reserved: [0; 3],
    }
}

/// A MAP of `length` bytes.
pub(crate) fn map(first: u64, length: u64) -> Vec<u8> {
    map_to(first, length, 1 << 32)
}

/// A MAP of `length` bytes to `to`.
pub(crate) fn map_to(first: u64, length: u64, to: u64) -> Vec<u8> {
    let request = ReqMap {
        head: head(req_type::MAP),
        domain: 1.into(),
        virt_start: first.into(),
        virt_end: (first + length - 1).into(),
        phys_start: to.into(),
        flags: 3.into(),
    };
    request.as_bytes().to_vec()
}

/// An UNMAP of `length` bytes.
pub(crate) fn unmap(first: u64, length: u64) -> Vec<u8> {
    let request = ReqUnmap {
        head: head(req_type::UNMAP),
        domain: 1.into(),
        virt_start: first.into(),
        virt_end: (first + length - 1).into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

/// An ATTACH of [`ENDPOINT`] to domain 1.
pub(crate) fn attach() -> Vec<u8> {
    let request = ReqAttach {
        head: head(req_type::ATTACH),
        domain: 1.into(),
        endpoint: u32::from(ENDPOINT.0).into(),
        flags: 0.into(),
        reserved: [0; 4],
    };
    request.as_bytes().to_vec()
}

/// The DETACH that ends it.
pub(crate) fn detach() -> Vec<u8> {
    let request = ReqDetach {
        head: head(req_type::DETACH),
        domain: 1.into(),
        endpoint: u32::from(ENDPOINT.0).into(),
        reserved: [0; 8],
    };
    request.as_bytes().to_vec()
}

/// Numbers without a pattern.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit.max(1)
    }
}

/// What this thread has run so far. For work of milliseconds, during which a busy machine runs
/// others; a call takes some hundred nanoseconds.
pub(crate) fn cpu_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one `timespec` there.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// What reading the clock before and after something takes, to be taken off.
pub(crate) fn clock() -> Duration {
    median((0..1001).map(|_| Instant::now().elapsed()).collect())
}

/// What `work` takes, without `clock`.
pub(crate) fn time(clock: Duration, work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed().saturating_sub(clock)
}

/// The value in the middle.
pub(crate) fn median<T: Ord + Copy>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Nanoseconds for each of `count`.
pub(crate) fn each(time: Duration, count: u64) -> f64 {
    time.as_nanos() as f64 / count as f64
}
