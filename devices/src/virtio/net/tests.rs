//! The card as its driver sees it, with a datagram socket as the tap: one datagram is one frame
//! with its header.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::*;
use crate::testing::{BUFFERS, Driver, RAM, Recorder, WRITE, ram, start};

struct Guest {
    net: Net,
    /// The other end of the tap.
    wire: UnixDatagram,
    receive: Driver,
    transmit: Driver,
    recorder: Arc<Recorder>,
}

fn guest(features: u64) -> Guest {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(200)))
        .unwrap();
    let net = Net::on(Tap::fake(OwnedFd::from(tap)), [2, 0, 0, 0, 0, 1]);
    let (mut drivers, recorder) = start(&net, &ram(), features | RING_FEATURES);
    let transmit = drivers.pop().unwrap();
    let receive = drivers.pop().unwrap();
    Guest {
        net,
        wire,
        receive,
        transmit,
        recorder,
    }
}

fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|n| (n / 3) as u8).collect();
    frame[..HEADER].fill(0);
    frame
}

const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

#[test]
fn a_frame_from_the_guest_reaches_the_tap_whole_with_its_header() {
    let mut guest = guest(MERGE);
    let sent = frame(2000);
    guest.transmit.write(BUFFERS, &sent);
    // Header and frame may be cut anywhere.
    guest.transmit.add(&[
        (BUFFERS, 5, 0),
        (BUFFERS + 5, 100, 0),
        (BUFFERS + 105, 1895, 0),
    ]);
    guest.transmit.kick();
    let mut got = [0; 4096];
    let length = guest.wire.recv(&mut got).unwrap();
    assert_eq!(got[..length], sent);
    assert_eq!(guest.transmit.wait(&guest.recorder, 1), [(0, 0)]);
}

#[test]
fn a_frame_to_the_guest_is_merged_over_as_many_buffers_as_it_needs() {
    let mut guest = guest(MERGE);
    for n in 0..4 {
        guest.receive.add(&[(BUFFERS + 0x1000 * n, 1000, WRITE)]);
    }
    guest.receive.kick();
    let mut sent = frame(2500);
    guest.wire.send(&sent).unwrap();
    let used = guest.receive.wait(&guest.recorder, 3);
    assert_eq!(used, [(0, 1000), (1, 1000), (2, 500)]);
    sent[NUM_BUFFERS] = 3;
    let got: Vec<u8> = [(0, 1000), (1, 1000), (2, 500)]
        .iter()
        .flat_map(|&(n, length)| guest.receive.read(BUFFERS + 0x1000 * n, length))
        .collect();
    assert_eq!(got, sent);
    // The next one starts in the buffer after.
    guest.wire.send(&frame(60)).unwrap();
    assert_eq!(guest.receive.wait(&guest.recorder, 1), [(3, 60)]);
}

#[test]
fn a_frame_waits_until_the_guest_gives_room_for_all_of_it() {
    let mut guest = guest(MERGE);
    guest.receive.add(&[(BUFFERS, 1000, WRITE)]);
    guest.receive.kick();
    guest.wire.send(&frame(1500)).unwrap();
    guest.wire.send(&frame(100)).unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.receive.used(), [], "half a frame is no frame");
    guest.receive.add(&[(BUFFERS + 0x1000, 1000, WRITE)]);
    guest.receive.kick();
    assert_eq!(
        guest.receive.wait(&guest.recorder, 2),
        [(0, 1000), (1, 500)]
    );
    guest.receive.add(&[(BUFFERS, 1000, WRITE)]);
    guest.receive.kick();
    assert_eq!(guest.receive.wait(&guest.recorder, 1), [(2, 100)]);
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_dropped_and_its_buffer_kept() {
    let mut guest = guest(0);
    guest.receive.add(&[(BUFFERS, 500, WRITE)]);
    guest.receive.kick();
    guest.wire.send(&frame(501)).unwrap();
    guest.wire.send(&frame(400)).unwrap();
    assert_eq!(guest.receive.wait(&guest.recorder, 1), [(0, 400)]);
    assert_eq!(guest.receive.read(BUFFERS + NUM_BUFFERS as u64, 2), [1, 0]);
}

#[test]
fn frames_that_cannot_be_sent_are_used_and_the_next_ones_go_out() {
    let mut guest = guest(MERGE);
    guest.transmit.add(&[(BUFFERS, 11, 0)]); // shorter than a header
    guest.transmit.add(&[(RAM, 100, 0)]); // not in memory
    guest.transmit.add(&[(BUFFERS, 1 << 20, 0)]); // longer than any frame
    guest.transmit.add(&[(BUFFERS, 100, WRITE)]); // nothing to read
    let many = [(BUFFERS, 1, 0); 200];
    guest.transmit.add(&many); // more pieces than one call takes
    guest.transmit.write(BUFFERS, &frame(100));
    guest.transmit.add(&[(BUFFERS, 100, 0)]);
    guest.transmit.kick();
    assert_eq!(guest.transmit.wait(&guest.recorder, 6).len(), 6);
    let mut got = [0; 4096];
    assert_eq!(guest.wire.recv(&mut got).unwrap(), 100);
    assert_eq!(guest.recorder.counts().needs_reset, 0);
}

#[test]
fn a_receive_buffer_outside_memory_spoils_its_frame_and_not_the_card() {
    let mut guest = guest(MERGE);
    guest.receive.add(&[(RAM - 10, 1000, WRITE)]);
    guest.receive.add(&[(BUFFERS, 1000, WRITE)]);
    guest.receive.kick();
    guest.wire.send(&frame(100)).unwrap();
    guest.wire.send(&frame(100)).unwrap();
    assert_eq!(guest.receive.wait(&guest.recorder, 2), [(0, 0), (1, 100)]);
}

#[test]
fn more_than_a_turn_of_frames_passes_both_ways() {
    let mut guest = guest(MERGE);
    let count = 3 * TURN;
    for n in 0..count as u64 {
        guest.receive.add(&[(BUFFERS + 128 * n, 128, WRITE)]);
        guest.transmit.add(&[(BUFFERS + 0x10_0000, 64, 0)]);
    }
    guest.transmit.write(BUFFERS + 0x10_0000, &frame(64));
    guest.transmit.kick();
    guest.receive.kick();
    let wire = guest.wire.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for _ in 0..count {
            wire.send(&frame(100)).unwrap();
        }
    });
    let mut got = [0; 256];
    for _ in 0..count {
        assert_eq!(guest.wire.recv(&mut got).unwrap(), 64);
    }
    sender.join().unwrap();
    assert_eq!(guest.receive.wait(&guest.recorder, count).len(), count);
    assert_eq!(guest.transmit.wait(&guest.recorder, count).len(), count);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_ends_the_thread_under_load() {
    let mut guest = guest(MERGE);
    guest
        .transmit
        .add(&[(BUFFERS, 64, WRITE), (BUFFERS, 64, 0)]);
    guest.transmit.kick();
    guest.recorder.wait_until(|counts| counts.needs_reset == 1);
    guest.net.reset();
    let ram = Arc::clone(&guest.transmit.ram);
    let (mut drivers, _recorder) = start(&guest.net, &ram, MERGE | RING_FEATURES);
    for _ in 0..200 {
        drivers[1].add(&[(BUFFERS, 64, 0)]);
    }
    drivers[1].kick();
    guest.net.reset();
    let after = drivers[1].used_index();
    std::thread::yield_now();
    assert_eq!(drivers[1].used_index(), after);
}

#[test]
fn segmentation_without_checksums_is_not_accepted() {
    let net = guest(MERGE).net;
    assert!(net.accepts(MERGE));
    assert!(net.accepts(1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4));
    assert!(!net.accepts(1 << VIRTIO_NET_F_HOST_TSO4));
    assert!(!net.accepts(1 << VIRTIO_NET_F_GUEST_TSO6 | 1 << VIRTIO_NET_F_CSUM));
}

#[test]
fn the_configuration_is_the_mac_address() {
    let net = guest(MERGE).net;
    let mut data = [0xff; 8];
    net.read_config(0, &mut data);
    assert_eq!(data, [2, 0, 0, 0, 0, 1, 0, 0]);
    net.read_config(u32::MAX, &mut data);
    assert_eq!(data, [0; 8]);
}
