//! What it costs a guest to map memory for a device, in exits as the host's KVM counts them. The
//! guest's kernel has a benchmark for it; the DMA test engine is the device.

use anyhow::{Context, Result, ensure};

use crate::engine;
use crate::harness::{Guest, Lab, Machine, Test, process, show};

/// The tests.
pub const TESTS: &[Test] = &[Test::new(
    "first_stage_tables_cost_no_exit_to_map_and_one_to_unmap_or_next_to_none",
    first_stage,
)];

/// How long each measurement runs.
const SECONDS: u32 = 3;

/// What one measurement saw.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// How often a page was mapped and unmapped: what the time and its parts allow. A few percent
    /// too many, since the loop around them takes time too.
    maps: f64,
    /// How often the guest left to nestling.
    exits: f64,
    /// How many invalidations of IOTLBs the unit obeyed.
    flushes: f64,
    map_ns: f64,
    unmap_ns: f64,
}

impl Cost {
    fn per_map(&self) -> f64 {
        self.exits / self.maps
    }
}

/// A guest with the lab's kernel and the engine behind a unit, and the engine's address.
fn boot(lab: &Lab, words: &str, unit: &str) -> Result<(Machine, String)> {
    let mut guest = Guest::lab_kernel()
        .cmdline("intel_iommu=on")
        .cmdline(words)
        .option("--viommu", &format!("type=vtd,{unit}"))
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    let at = engine::address(&mut guest)?;
    Ok((guest, at))
}

fn measure(guest: &mut Machine, at: &str) -> Result<Cost> {
    let run = |guest: &mut Machine, seconds: u32| {
        let command = format!("dma-engine map-benchmark {at} {seconds} 0");
        guest.run(&command)
    };
    // Page tables are made, and the allocator of addresses has filled its caches.
    run(guest, 1)?;
    let flushes = |guest: &Machine| -> Result<f64> {
        let units = guest.viommus()?;
        let counts = ["iotlb", "pasid_iotlb"].map(|kind| units[0]["queue"][kind].as_f64());
        let counts: Option<Vec<f64>> = counts.into_iter().collect();
        let counts = counts.with_context(|| format!("no counts in {units:#}"))?;
        Ok(counts.iter().sum())
    };
    let before = (process::mmio_exits(guest.pid())?, flushes(guest)?);
    let said = run(guest, SECONDS)?;
    let after = (process::mmio_exits(guest.pid())?, flushes(guest)?);
    let number = |key: &str| -> Result<f64> {
        let mut words = said.split_whitespace().skip_while(|word| *word != key);
        let number = words.nth(1).and_then(|word| word.parse().ok());
        number.with_context(|| format!("no {key} in {said:?}"))
    };
    let (map_ns, unmap_ns) = (number("map")?, number("unmap")?);
    Ok(Cost {
        maps: f64::from(SECONDS) * 1e9 / (map_ns + unmap_ns),
        exits: (after.0 - before.0) as f64,
        flushes: after.1 - before.1,
        map_ns,
        unmap_ns,
    })
}

/// Whether the engine's group flushes at once or in batches; it may change while in use.
fn set_lazy(guest: &mut Machine, at: &str) -> Result<()> {
    guest.run(&format!(
        "echo DMA-FQ > /sys/bus/pci/devices/{at}/iommu_group/type"
    ))?;
    Ok(())
}

fn first_stage(lab: &Lab) -> Result<()> {
    let (mut guest, at) = boot(lab, "iommu.strict=1", "mode=scalable")?;
    let strict = measure(&mut guest, &at)?;
    show(format!("strict: {strict:.0?}"));
    // Each unmap is one invalidation; if that is one exit, none is left for the map.
    ensure!(
        (strict.exits / strict.flushes - 1.0).abs() < 0.05,
        "strict: {:.2} exits for each unmap, {strict:?}",
        strict.exits / strict.flushes
    );
    ensure!(
        (0.8..1.2).contains(&(strict.flushes / strict.maps)),
        "strict: {:.2} invalidations for each map and unmap, {strict:?}",
        strict.flushes / strict.maps
    );
    set_lazy(&mut guest, &at)?;
    let lazy = measure(&mut guest, &at)?;
    show(format!("lazy: {lazy:.0?}"));
    ensure!(
        lazy.per_map() < 0.05,
        "lazy: {:.3} exits for each map and unmap, {lazy:?}",
        lazy.per_map()
    );
    guest.power_off()?;
    Ok(())
}

/// `cargo lab bench map`: every mode.
///
/// # Errors
/// A guest or its kernel failed.
pub fn bench(lab: &Lab) -> Result<()> {
    show("One page mapped and unmapped at a time by the guest's kernel:");
    let row = |name: &str, guest: &mut Machine, at: &str| -> Result<()> {
        let cost = measure(guest, at)?;
        show(format!(
            "{name:34} {:7.3} exits for each  map {:6.0} ns  unmap {:7.0} ns",
            cost.per_map(),
            cost.map_ns,
            cost.unmap_ns
        ));
        Ok(())
    };
    for (name, words, unit) in [
        ("first-stage tables", "iommu.strict=1", "mode=scalable"),
        (
            "second-stage tables, legacy mode",
            "iommu.strict=1",
            "mode=legacy",
        ),
    ] {
        let (mut guest, at) = boot(lab, words, unit)?;
        row(&format!("{name}, strict"), &mut guest, &at)?;
        // With caching mode and second-stage tables, Linux flushes at once whatever it is told.
        if unit == "mode=scalable" {
            set_lazy(&mut guest, &at)?;
            row(&format!("{name}, lazy"), &mut guest, &at)?;
        }
        guest.power_off()?;
    }
    let (mut guest, at) = boot(lab, "iommu=pt", "mode=scalable")?;
    row("no translation (iommu=pt)", &mut guest, &at)?;
    guest.power_off()?;
    Ok(())
}
