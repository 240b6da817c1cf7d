//! The kernel's own benchmark of DMA mapping (`CONFIG_DMA_MAP_BENCHMARK`), with the engine as the
//! device that is mapped for.

use std::fs::OpenOptions;

use anyhow::{Context, Result};

use crate::ioctl::ioctl;
use crate::sysfs::Function;

/// The driver that binds whatever device is given to it, and its file.
const DRIVER: &str = "dma_map_benchmark";
const FILE: &str = "/sys/kernel/debug/dma_map_benchmark";

/// `_IOWR('d', 1, struct map_benchmark)`.
const DMA_MAP_BENCHMARK: u64 = 3 << 30 | (size_of::<Benchmark>() as u64) << 16 | 0x64 << 8 | 1;

/// `struct map_benchmark` of `linux/map_benchmark.h`.
#[repr(C)]
#[derive(Debug)]
struct Benchmark {
    avg_map_100ns: u64,
    map_stddev: u64,
    avg_unmap_100ns: u64,
    unmap_stddev: u64,
    threads: u32,
    seconds: u32,
    node: i32,
    dma_bits: u32,
    dma_dir: u32,
    dma_trans_ns: u32,
    granule: u32,
    map_mode: u8,
    expansion: [u8; 75],
}

/// Maps and unmaps single pages for the function at `address`, one after the other with
/// `pause_ns` between (10 ms at most), for `seconds`. Prints the averages in nanoseconds.
///
/// # Errors
/// What the kernel said.
pub fn run(address: &str, seconds: u32, pause_ns: u32) -> Result<()> {
    Function::at(address)?.give_to(Some(DRIVER))?;
    let file = OpenOptions::new().read(true).write(true).open(FILE);
    let file = file.with_context(|| format!("cannot open {FILE}"))?;
    let mut benchmark = Benchmark {
        avg_map_100ns: 0,
        map_stddev: 0,
        avg_unmap_100ns: 0,
        unmap_stddev: 0,
        threads: 1,
        seconds,
        node: -1,
        dma_bits: 64,
        // DMA_MAP_BIDIRECTIONAL.
        dma_dir: 0,
        dma_trans_ns: pause_ns,
        granule: 1,
        // DMA_MAP_BENCH_SINGLE_MODE, the only one of older kernels.
        map_mode: 0,
        expansion: [0; 75],
    };
    // SAFETY: the command takes this structure, whose layout the assertion below fixes.
    unsafe {
        ioctl(
            "DMA_MAP_BENCHMARK",
            &file,
            DMA_MAP_BENCHMARK,
            &raw mut benchmark,
        )
    }?;
    println!(
        "map {} unmap {}",
        benchmark.avg_map_100ns * 100,
        benchmark.avg_unmap_100ns * 100
    );
    Ok(())
}

const _: () = assert!(size_of::<Benchmark>() == 136);
