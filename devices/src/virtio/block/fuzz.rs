//! The fuzz harness of the disk.

use std::os::unix::fs::FileExt;

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::virtio::buffers;
use crate::virtio::fuzz::Attack;

const SECTORS: usize = 16;

thread_local! {
    static IMAGE: Option<File> = TempFile::new().map(TempFile::into_file).ok();
}

/// Serves what an attacker put into guest memory, and checks that a request writes only into its
/// own writable buffers and reports no more than they hold, that the disk keeps its length, and
/// that a read-only disk keeps every byte.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
#[expect(clippy::expect_used, reason = "a fuzz harness reports by panicking")]
pub fn requests(input: &[u8]) {
    let Some(mut attack) = Attack::new(input, 1) else {
        return;
    };
    let readonly = input.first().is_some_and(|flags| flags & 8 != 0);
    let bytes = [0x5a; SECTORS * SECTOR as usize];
    let file = IMAGE.with(|file| file.as_ref().and_then(|file| file.try_clone().ok()));
    let file = file.expect("the host gives a file");
    file.write_all_at(&bytes, 0)
        .expect("the file can be written");
    let disk = Disk {
        file,
        length: bytes.len() as u64,
        readonly,
        serial: *b"nestling-fuzz-serial",
        counts: Default::default(),
    };
    let Some(mut ring) = attack.rings.pop() else {
        return;
    };
    let access = attack.dma.access();
    let mut chain = Chain::default();
    // What the device reads into memory may make more available.
    for _ in 0..64 {
        if !matches!(ring.pop(&access, &mut chain), Ok(true)) {
            break;
        }
        let (before, writable) = (attack.snapshot(), chain.writable.clone());
        let written = disk.execute(&access, &mut chain);
        attack.check(&before, &writable);
        assert!(u64::from(written) <= buffers::length(&writable));
        let pushed = ring.push(&access, chain.head(), written);
        pushed.expect("the ring is in memory");
    }
    let mut after = Vec::new();
    let mut file = &disk.file;
    io::Seek::rewind(&mut file).expect("a file can be rewound");
    io::Read::read_to_end(&mut file, &mut after).expect("the file can be read");
    assert_eq!(after.len(), bytes.len(), "the disk changed its length");
    assert!(!readonly || after == bytes, "a read-only disk changed");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_is_in_guest_memory_a_request_stays_in_its_buffers(
            flags: u8, image in prop::collection::vec(any::<u8>(), 0..0x900)
        ) {
            super::requests(&[&[flags], &image[..]].concat());
        }
    }
}
