//! The disk as its driver sees it, against a model of what a disk is.

use proptest::prelude::*;
use std::os::unix::fs::FileExt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::testing::{BUFFERS, Driver, RAM, Recorder, WRITE, ram, start};
use crate::virtio::worker;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x800;
const TABLE: u64 = BUFFERS + 0x30_0000;
const DATA: u64 = BUFFERS + 0x1000;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// An image of `sectors` sectors, each filled with its own number.
fn image(sectors: u8) -> (TempFile, Vec<u8>) {
    let file = TempFile::new().unwrap();
    let bytes: Vec<u8> = (0..sectors).flat_map(|n| [n; SECTOR as usize]).collect();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    (file, bytes)
}

fn config(file: &TempFile, readonly: bool) -> BlockConfig {
    BlockConfig {
        path: file.as_path().into(),
        readonly,
        serial: "nestling-0".into(),
    }
}

struct Guest {
    block: Arc<Block>,
    driver: Driver,
    recorder: Arc<Recorder>,
}

impl Guest {
    fn new(file: &TempFile, readonly: bool) -> Self {
        let block = Block::open(&config(file, readonly)).unwrap();
        let (mut drivers, recorder) = start(&*block, &ram(), block.features());
        Self {
            block,
            driver: drivers.remove(0),
            recorder,
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(HEADER, &header);
        self.driver.write(STATUS, &[0xaa]);
    }

    /// One request with its data in buffers of `cut` bytes; status and used length.
    fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: u32,
        writable: bool,
        cut: u32,
    ) -> (u8, u32) {
        self.header(kind, sector);
        let mut chain = vec![(HEADER, 16, 0)];
        let flags = if writable { WRITE } else { 0 };
        let mut at = 0;
        while at < data {
            let length = cut.min(data - at);
            chain.push((DATA + u64::from(at), length, flags));
            at += length;
        }
        chain.push((STATUS, 1, WRITE));
        self.run(&chain)
    }

    fn run(&mut self, chain: &[(u64, u32, u16)]) -> (u8, u32) {
        let head = self.driver.add_indirect(TABLE, chain);
        self.driver.kick();
        let used = self.driver.wait(&self.recorder, 1);
        assert_eq!(used[0].0, head);
        (self.driver.read(STATUS, 1)[0], used[0].1)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut list = Vec::new();
        for (sector, sectors, flags) in ranges {
            list.extend(sector.to_le_bytes());
            list.extend(sectors.to_le_bytes());
            list.extend(flags.to_le_bytes());
        }
        self.driver.write(DATA, &list);
        self.request(kind, 0, list.len() as u32, false, u32::MAX).0
    }
}

#[test]
fn a_read_gives_what_the_image_holds_and_counts_its_bytes() {
    let (file, bytes) = image(8);
    let mut guest = Guest::new(&file, true);
    let (status, written) = guest.request(VIRTIO_BLK_T_IN, 2, 1024, true, 300);
    assert_eq!((status, written), (OK, 1025));
    assert_eq!(guest.driver.read(DATA, 1024), bytes[1024..2048]);
}

#[test]
fn a_driver_may_cut_header_and_status_out_of_any_buffer() {
    let (file, bytes) = image(4);
    let mut guest = Guest::new(&file, false);
    guest.header(VIRTIO_BLK_T_IN, 1);
    // The header in two pieces; data and status in one buffer.
    let chain = [(HEADER, 5, 0), (HEADER + 5, 11, 0), (DATA, 513, WRITE)];
    let (_, written) = guest.run(&chain);
    assert_eq!(written, 513);
    assert_eq!(guest.driver.read(DATA, 512), bytes[512..1024]);
    assert_eq!(guest.driver.read(DATA + 512, 1), [OK]);
    // Header and data in one buffer.
    guest.header(VIRTIO_BLK_T_OUT, 3);
    guest.driver.write(HEADER + 16, &[0x77; 512]);
    let (_, written) = guest.run(&[(HEADER, 528, 0), (DATA, 1, WRITE)]);
    assert_eq!(written, 1);
    assert_eq!(guest.driver.read(DATA, 1), [OK]);
    guest.request(VIRTIO_BLK_T_IN, 3, 512, true, 512);
    assert_eq!(guest.driver.read(DATA, 512), [0x77; 512]);
}

#[test]
fn a_request_that_is_not_whole_sectors_inside_the_disk_fails_and_changes_nothing() {
    let (file, bytes) = image(4);
    let mut guest = Guest::new(&file, false);
    for (sector, length) in [
        (0, 511),
        (4, 512),
        (3, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
    ] {
        for (kind, writable) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
            assert_eq!(guest.request(kind, sector, length, writable, 512).0, IOERR);
        }
    }
    drop(guest);
    assert_eq!(std::fs::read(file.as_path()).unwrap(), bytes);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let (file, bytes) = image(4);
    let mut guest = Guest::new(&file, true);
    assert_ne!(guest.block.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(guest.request(VIRTIO_BLK_T_OUT, 0, 512, false, 512).0, IOERR);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, 0, false, 1).0, OK);
    drop(guest);
    assert_eq!(std::fs::read(file.as_path()).unwrap(), bytes);
}

#[test]
fn the_serial_number_is_20_bytes_padded_with_zeroes() {
    let (file, _) = image(1);
    let mut guest = Guest::new(&file, true);
    assert_eq!(
        guest.request(VIRTIO_BLK_T_GET_ID, 0, 20, true, 20),
        (OK, 21)
    );
    assert_eq!(
        guest.driver.read(DATA, 20),
        b"nestling-0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn what_the_device_does_not_know_is_unsupported() {
    let (file, _) = image(1);
    let mut guest = Guest::new(&file, false);
    for kind in [VIRTIO_BLK_T_SECURE_ERASE, 2, 77, u32::MAX] {
        assert_eq!(guest.request(kind, 0, 512, false, 512).0, UNSUPP);
    }
}

#[test]
fn write_zeroes_leaves_zeroes_with_and_without_unmap_and_nothing_else() {
    let (file, mut bytes) = image(200);
    let mut guest = Guest::new(&file, false);
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    let ranges = [(1, 2, 0), (10, 0, 0), (17, 100, unmap), (199, 1, 0)];
    assert_eq!(guest.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &ranges), OK);
    for (sector, sectors, _) in ranges {
        let from = sector as usize * 512;
        bytes[from..from + sectors as usize * 512].fill(0);
    }
    drop(guest);
    assert_eq!(std::fs::read(file.as_path()).unwrap(), bytes);
}

#[test]
fn a_bad_range_fails_the_whole_request_before_it_takes_effect() {
    let (file, bytes) = image(8);
    let mut guest = Guest::new(&file, false);
    let zero = VIRTIO_BLK_T_WRITE_ZEROES;
    assert_eq!(guest.ranges(zero, &[(0, 4, 0), (7, 2, 0)]), IOERR);
    assert_eq!(guest.ranges(zero, &[(0, 4, 0), (u64::MAX, 2, 0)]), IOERR);
    assert_eq!(guest.ranges(zero, &[(0, 4, 0), (1, 2, 2)]), UNSUPP);
    assert_eq!(guest.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 1, 1)]), UNSUPP);
    assert_eq!(guest.ranges(zero, &[(0, MOST_ZEROES + 1, 0)]), IOERR);
    let many = vec![(0, 1, 0); MOST_RANGES as usize + 1];
    assert_eq!(guest.ranges(zero, &many), IOERR);
    assert_eq!(guest.request(zero, 0, 17, false, 17).0, IOERR);
    drop(guest);
    assert_eq!(std::fs::read(file.as_path()).unwrap(), bytes);
}

#[test]
fn buffers_outside_memory_fail_their_request_and_not_the_device() {
    let (file, bytes) = image(8);
    let mut guest = Guest::new(&file, false);
    for bad in [RAM - 100, RAM, u64::MAX - 100, !511] {
        guest.header(VIRTIO_BLK_T_IN, 0);
        let chain = [(HEADER, 16, 0), (bad, 512, WRITE), (STATUS, 1, WRITE)];
        assert_eq!(guest.run(&chain).0, IOERR, "{bad:#x}");
        guest.header(VIRTIO_BLK_T_OUT, 0);
        let chain = [(HEADER, 16, 0), (bad, 512, 0), (STATUS, 1, WRITE)];
        assert_eq!(guest.run(&chain).0, IOERR, "{bad:#x}");
    }
    // A header or a status that is not there.
    assert_eq!(guest.run(&[(RAM, 16, 0), (STATUS, 1, WRITE)]).0, IOERR);
    guest.header(VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(guest.run(&[(HEADER, 16, 0), (RAM, 1, WRITE)]), (0xaa, 0));
    // No header, no status byte, nothing at all.
    assert_eq!(guest.run(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]).0, IOERR);
    assert_eq!(guest.run(&[(STATUS, 1, WRITE)]).0, IOERR);
    guest.header(VIRTIO_BLK_T_OUT, 0);
    assert_eq!(guest.run(&[(HEADER, 528, 0)]), (0xaa, 0));
    assert_eq!(guest.run(&[(HEADER, 0, 0)]), (0xaa, 0));
    // It still works.
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 5, 512, true, 512).0, OK);
    assert_eq!(guest.driver.read(DATA, 512), [5; 512]);
    drop(guest);
    assert_eq!(std::fs::read(file.as_path()).unwrap()[512..], bytes[512..]);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_works_after_it() {
    let (file, _) = image(4);
    let mut guest = Guest::new(&file, false);
    guest.driver.add(&[(HEADER, 16, WRITE), (HEADER, 16, 0)]);
    guest.driver.kick();
    guest.recorder.wait_until(|counts| counts.needs_reset > 0);
    guest.driver.kick();
    guest.block.reset();
    assert_eq!(guest.recorder.counts().needs_reset, 1);
    let ram = Arc::clone(&guest.driver.ram);
    let (mut drivers, recorder) = start(&*guest.block, &ram, guest.block.features());
    guest.driver = drivers.remove(0);
    guest.recorder = recorder;
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 1, 512, true, 512).0, OK);
}

#[test]
fn a_full_queue_is_served_once_each_and_in_parallel() {
    let (file, bytes) = image(64);
    let mut guest = Guest::new(&file, false);
    for n in 0..64u64 {
        let header = HEADER + 0x1_0000 + 32 * n;
        let mut request = [0; 16];
        request[8..].copy_from_slice(&n.to_le_bytes());
        guest.driver.write(header, &request);
        let data = (DATA + 0x2_0000 + 512 * n, 512, WRITE);
        guest
            .driver
            .add(&[(header, 16, 0), data, (header + 16, 1, WRITE)]);
    }
    guest.driver.kick();
    let mut heads: Vec<u16> = guest
        .driver
        .wait(&guest.recorder, 64)
        .iter()
        .map(|(head, _)| *head)
        .collect();
    heads.sort_unstable();
    heads.dedup();
    assert_eq!(heads.len(), 64);
    assert_eq!(guest.driver.read(DATA + 0x2_0000, 64 * 512), bytes);
}

#[test]
fn a_reset_in_the_middle_of_a_flood_ends_it_and_leaves_no_thread() {
    let (file, _) = image(64);
    let mut guest = Guest::new(&file, false);
    guest.header(VIRTIO_BLK_T_IN, 0);
    for _ in 0..20 {
        for _ in 0..80 {
            let chain = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
            guest.driver.add(&chain);
        }
        guest.driver.kick();
        guest.block.reset();
        let after = guest.driver.used_index();
        std::thread::yield_now();
        assert_eq!(guest.driver.used_index(), after, "quiet after the reset");
        let ram = Arc::clone(&guest.driver.ram);
        let (mut drivers, recorder) = start(&*guest.block, &ram, guest.block.features());
        guest.driver = drivers.remove(0);
        guest.recorder = recorder;
    }
    assert!(worker::running() >= THREADS);
}

#[test]
fn an_image_that_cannot_be_a_disk_is_refused_with_the_remedy() {
    let open = |path: &Path, readonly| {
        let config = BlockConfig {
            path: path.into(),
            readonly,
            serial: String::new(),
        };
        Block::open(&config).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        open(Path::new("/nowhere/disk.img"), false),
        "disk \"/nowhere/disk.img\" does not exist: create it with `truncate -s 1G \
         \"/nowhere/disk.img\"`"
    );
    assert!(open(Path::new("/tmp"), true).contains("neither a regular file nor a block device"));
    assert!(open(Path::new("/dev/null"), true).contains("neither a regular file"));
    let file = TempFile::new().unwrap();
    assert!(open(file.as_path(), true).contains("has 0 bytes"));
    file.as_file().set_len(1000).unwrap();
    assert!(open(file.as_path(), true).contains("has 1000 bytes"));
}

#[test]
fn a_disk_that_is_written_is_nobody_elses() {
    let (file, _) = image(1);
    let writer = Block::open(&config(&file, false)).unwrap();
    let error = Block::open(&config(&file, true)).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("is in use"), "{error}");
    drop(writer);
    let reader = Block::open(&config(&file, true)).unwrap();
    let another = Block::open(&config(&file, true)).unwrap();
    assert!(Block::open(&config(&file, false)).is_err());
    drop((reader, another));
}

#[test]
fn the_configuration_says_capacity_and_limits() {
    let (file, _) = image(200);
    let block = Block::open(&config(&file, false)).unwrap();
    let field = |offset, length: usize| {
        let mut data = [0; 8];
        block.read_config(offset, &mut data[..length]);
        u64::from_le_bytes(data)
    };
    assert_eq!(field(0, 8), 200, "capacity");
    assert_eq!(
        field(12, 4),
        254,
        "seg_max leaves room for header and status"
    );
    assert_eq!(field(20, 4), 512, "blk_size");
    assert_eq!(field(60, 4), 0, "beyond the end");
    assert_eq!(field(u32::MAX, 4), 0, "beyond the end");
}

#[derive(Clone, Debug)]
enum Operation {
    Read(u8, u8),
    Write(u8, u8, u8),
    Zero(u8, u8, bool),
    Flush,
}

fn operation() -> impl Strategy<Value = Operation> {
    let place = || (0..40u8, 1..24u8);
    prop_oneof![
        place().prop_map(|(at, n)| Operation::Read(at, n)),
        (place(), any::<u8>()).prop_map(|((at, n), fill)| Operation::Write(at, n, fill)),
        (place(), any::<bool>()).prop_map(|((at, n), unmap)| Operation::Zero(at, n, unmap)),
        Just(Operation::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_behaves_as_an_array_of_sectors(
        operations in prop::collection::vec(operation(), 1..30),
        cut in 100..5000u32,
    ) {
        let (file, mut model) = image(48);
        let mut guest = Guest::new(&file, false);
        let inside = |at: u8, n: u8| u16::from(at) + u16::from(n) <= 48;
        let bytes = |at: u8, n: u8| usize::from(at) * 512..(usize::from(at) + usize::from(n)) * 512;
        for operation in operations {
            match operation {
                Operation::Read(at, n) => {
                    let length = u32::from(n) * 512;
                    let (status, _) =
                        guest.request(VIRTIO_BLK_T_IN, at.into(), length, true, cut);
                    prop_assert_eq!(status == OK, inside(at, n));
                    if status == OK {
                        let read = guest.driver.read(DATA, length as usize);
                        prop_assert!(read == model[bytes(at, n)]);
                    }
                }
                Operation::Write(at, n, fill) => {
                    let length = usize::from(n) * 512;
                    let data: Vec<u8> = (0..length).map(|i| fill ^ (i / 7) as u8).collect();
                    guest.driver.write(DATA, &data);
                    let (status, _) =
                        guest.request(VIRTIO_BLK_T_OUT, at.into(), length as u32, false, cut);
                    prop_assert_eq!(status == OK, inside(at, n));
                    if status == OK {
                        model[bytes(at, n)].copy_from_slice(&data);
                    }
                }
                Operation::Zero(at, n, unmap) => {
                    let range = (at.into(), n.into(), unmap.into());
                    let status = guest.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[range]);
                    prop_assert_eq!(status == OK, inside(at, n));
                    if status == OK {
                        model[bytes(at, n)].fill(0);
                    }
                }
                Operation::Flush => {
                    prop_assert_eq!(guest.request(VIRTIO_BLK_T_FLUSH, 0, 0, false, 1).0, OK);
                }
            }
        }
        drop(guest);
        prop_assert!(std::fs::read(file.as_path()).unwrap() == model);
    }
}
