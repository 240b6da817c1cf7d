//! What the kernel says of a region of a device.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::size_of;

use vfio_bindings::bindings::vfio as sys;

use super::super::hardware::Region;
use super::{DEVICE_GET_REGION_INFO, call};

/// Words of a region's description: the structure, then room for its capabilities.
const REGION_WORDS: usize = 128;

pub(super) fn region(file: &File, index: u32) -> io::Result<(u64, Region)> {
    let mut words = [0u64; REGION_WORDS];
    words[0] = size_of::<[u64; REGION_WORDS]>() as u64; // argsz, flags
    words[1] = index.into(); // index, cap_offset
    call(file, DEVICE_GET_REGION_INFO, &mut words)?;
    Ok(decode_region(&words))
}

/// `struct vfio_region_info` and its chain of capabilities.
fn decode_region(words: &[u64; REGION_WORDS]) -> (u64, Region) {
    let dword = |at: usize| {
        let word = words.get(at / 8).copied().unwrap_or(0);
        (word >> (8 * (at as u64 & 4))) as u32
    };
    let qword = |at: usize| u64::from(dword(at)) | u64::from(dword(at + 4)) << 32;
    let (flags, length, offset) = (dword(4), words[2], words[3]);
    let mut mappable = Vec::new();
    if flags & sys::VFIO_REGION_INFO_FLAG_MMAP != 0 {
        mappable.push((0, length));
    }
    let mut next = dword(12) as usize;
    // As many capabilities as there is room for: the chain is the kernel's, but bounded all the
    // same.
    for _ in 0..REGION_WORDS {
        let inside = (32..REGION_WORDS * 8).contains(&next);
        if flags & sys::VFIO_REGION_INFO_FLAG_CAPS == 0 || !inside {
            break;
        }
        if dword(next) & 0xffff == sys::VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = dword(next + 8) as usize;
            mappable = (0..count.min(REGION_WORDS))
                .map(|index| next + 16 + 16 * index)
                .map(|at| (qword(at), qword(at + 8)))
                .filter(|&(_, length)| length != 0)
                .collect();
        }
        next = dword(next + 4) as usize;
    }
    (offset, Region { length, mappable })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(flags: u32, cap: u32, length: u64) -> [u64; REGION_WORDS] {
        let mut words = [0; REGION_WORDS];
        words[0] = u64::from(flags) << 32;
        words[1] = u64::from(cap) << 32;
        words[2] = length;
        words[3] = 0x100_0000_0000;
        words
    }

    #[test]
    fn a_region_without_mmap_is_trapped_whole() {
        let (offset, region) = decode_region(&description(3, 0, 0x1000));
        assert_eq!(offset, 0x100_0000_0000);
        assert_eq!(region.length, 0x1000);
        assert!(region.mappable.is_empty());
    }

    #[test]
    fn sparse_areas_are_what_may_be_mapped() {
        let mut words = description(0xf, 32, 0x4000);
        words[4] = 1 | 1 << 16; // sparse mmap, version 1, no next
        words[5] = 2; // two areas
        words[6..10].copy_from_slice(&[0, 0x1000, 0x2000, 0x2000]);
        let (_, region) = decode_region(&words);
        assert_eq!(region.mappable, [(0, 0x1000), (0x2000, 0x2000)]);
    }

    #[test]
    fn a_circular_chain_of_capabilities_ends() {
        let mut words = description(0xf, 32, 0x4000);
        words[4] = 2 | 32 << 32;
        let (_, region) = decode_region(&words);
        assert_eq!(region.mappable, [(0, 0x4000)]);
    }
}
