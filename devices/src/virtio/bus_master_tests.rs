//! virtio devices whose guest has not enabled bus mastering: nothing is lost and nothing moves.

use std::sync::Arc;
use std::time::Duration;

use viommu::bus_master::BusMaster;
use viommu::dma::DmaPort;
use vmm_sys_util::tempfile::TempFile;

use crate::testing::{BUFFERS, WRITE, ram, start_behind};
use crate::virtio::{Block, BlockConfig, Rng, VirtioDevice};

/// Offers one chain while bus mastering is off, and then turns it on as the transport does.
fn waits(device: &dyn VirtioDevice, chain: &[(u64, u32, u16)]) {
    let (ram, master) = (ram(), Arc::new(BusMaster::default()));
    master.set(true);
    let port = DmaPort::direct(Arc::clone(&ram)).of_bus_master(Arc::clone(&master));
    let (mut drivers, recorder) = start_behind(device, port, 0, &ram, device.features());
    master.set(false);
    drivers[0].add(chain);
    drivers[0].kick();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(drivers[0].used(), []);
    master.set(true);
    drivers[0].kick();
    drivers[0].wait(&recorder, 1);
    recorder.wait_until(|counts| counts.needs_reset == 0);
    device.reset();
}

#[test]
fn a_disk_and_an_entropy_source_wait_for_bus_mastering() {
    let rng = Rng::open(std::path::Path::new("/dev/urandom")).unwrap();
    waits(&*rng, &[(BUFFERS, 64, WRITE)]);
    let file = TempFile::new().unwrap();
    file.as_file().set_len(8192).unwrap();
    let block = Block::open(&BlockConfig {
        path: file.as_path().into(),
        ..BlockConfig::default()
    });
    waits(
        &*block.unwrap(),
        &[
            (BUFFERS, 16, 0),
            (BUFFERS + 0x1000, 512, WRITE),
            (BUFFERS + 0x2000, 1, WRITE),
        ],
    );
}
