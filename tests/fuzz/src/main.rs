//! Coverage-guided fuzzing of everything a guest, a file or a client can write to.
//!
//! One binary holds every target; `NESTLING_FUZZ` names the one to run. `cargo lab fuzz` builds it
//! with libFuzzer's instrumentation (which stable Rust has) and runs each target for a bounded
//! time; a crash leaves its input in `target/lab/fuzz/TARGET/` and is run again with
//! `cargo lab fuzz TARGET INPUT`.
//!
//! A target is a plain function over bytes that lives beside the code it attacks (feature
//! `fuzzing` of that crate), panics when an invariant breaks, and is also run by a small property
//! test there. To add one, add a line to [`TARGETS`].

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

/// Name and function of a target.
type Target = (&'static str, fn(&[u8]));

/// Every target, by `crate-part` name.
const TARGETS: &[Target] = &[
    ("devices-block", devices::virtio::block::fuzz::requests),
    ("devices-virtio-iommu", devices::virtio::iommu::fuzz::rings),
    ("devices-dma-engine", devices::testdev::fuzz::dma_engine),
    ("devices-net", devices::virtio::net::fuzz::frames),
    ("devices-pci", devices::pci::fuzz::accesses),
    ("viommu-vtd-registers", viommu::vtd::fuzz::registers),
    ("viommu-vtd-queue", viommu::vtd::fuzz::queue),
    ("viommu-vtd-tables", viommu::vtd::fuzz::tables),
    ("viommu-engine", viommu::backend::software::fuzz::walks),
    ("viommu-page-requests", viommu::pasid::fuzz::page_requests),
    ("viommu-virtio-chains", viommu::virtio::fuzz::chains),
    ("viommu-virtio-operations", viommu::virtio::fuzz::operations),
    (
        "viommu-virtual-commands",
        viommu::pasid::fuzz::virtual_commands,
    ),
    ("vmm-options", vmm::config::fuzz::options),
];

/// What `NESTLING_FUZZ` names.
fn chosen() -> fn(&[u8]) {
    let name = std::env::var("NESTLING_FUZZ").unwrap_or_default();
    match TARGETS.iter().find(|(known, _)| *known == name) {
        Some((_, run)) => *run,
        None => {
            for (known, _) in TARGETS {
                println!("{known}");
            }
            std::process::exit(if name == "list" { 0 } else { 2 });
        }
    }
}

static CHOSEN: OnceLock<fn(&[u8])> = OnceLock::new();

fuzz_target!(
    init: {
        CHOSEN.get_or_init(chosen);
    },
    |data: &[u8]| {
        if let Some(run) = CHOSEN.get() {
            run(data);
        }
    }
);
