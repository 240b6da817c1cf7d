//! The fuzz harness of the network card.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use super::*;
use crate::testing::Recorder;
use crate::virtio::fuzz::Attack;
use vmm_sys_util::eventfd::EventFd;

/// Serves both queues as an attacker filled them, with frames coming in, and checks that frames
/// are no longer than they may be, that nothing but used rings and receive buffers could change,
/// and that every turn ends.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
#[expect(clippy::expect_used, reason = "a fuzz harness reports by panicking")]
pub fn frames(input: &[u8]) {
    let Some(mut attack) = Attack::new(input, 2) else {
        return;
    };
    let flags = input.first().copied().unwrap_or(0);
    let (tap, wire) = UnixDatagram::pair().expect("the host gives a pair of sockets");
    for end in [&tap, &wire] {
        end.set_nonblocking(true)
            .expect("a socket can be non-blocking");
    }
    let frame = [flags; 1514];
    for length in [frame.len(), 60, 5, 300] {
        wire.send(&frame[..length]).expect("there is room");
    }
    let kick = || Arc::new(EventFd::new(0).expect("the host gives an eventfd"));
    let mut queues = std::mem::take(&mut attack.rings)
        .into_iter()
        .map(|ring| ActiveQueue { ring, kick: kick() });
    let workers = Workers::new().expect("the host gives an eventfd");
    let mut service = Service {
        tap: Arc::new(Tap::fake(OwnedFd::from(tap))),
        counts: Arc::default(),
        dma: Arc::new(attack.dma.clone()),
        interrupt: Arc::new(Recorder::default()),
        stop: workers.stop(),
        merge: flags & 8 != 0,
        receive: queues.next(),
        transmit: queues.next(),
        frame: vec![0; MOST],
        length: 0,
        chains: Vec::new(),
        room: 0,
        spare: Vec::new(),
        used: Vec::new(),
        down: false,
    };
    let before = attack.snapshot();
    // Transmission writes nothing but its used ring, notification hints included.
    let _ = service.transmit(&mut Chain::default());
    let used = Buffer {
        address: vm_memory::GuestAddress(0x1800),
        length: 6 + 8 * 16,
    };
    attack.check(&before, &[used]);
    let _ = service.receive();
    assert!(service.length <= MOST && service.chains.len() <= 16);
    let mut got = vec![0; 2 * MOST];
    while let Ok(length) = wire.recv(&mut got) {
        assert!(
            (HEADER..=MOST).contains(&length),
            "a frame of {length} bytes"
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn whatever_is_in_guest_memory_frames_keep_their_bounds(
            flags: u8, image in prop::collection::vec(any::<u8>(), 0..0x1900)
        ) {
            super::frames(&[&[flags], &image[..]].concat());
        }
    }
}
