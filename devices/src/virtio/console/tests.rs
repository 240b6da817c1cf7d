//! The console as its driver sees it, with every kind of end on the host.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::testing::{BUFFERS, Driver, RAM, Recorder, WRITE, ram, start};

struct Guest {
    console: Arc<Console>,
    drivers: Vec<Driver>,
    recorder: Arc<Recorder>,
}

fn guest(backend: ConsoleBackend, port: Option<&str>) -> Guest {
    let console = Console::open(ConsoleConfig {
        backend,
        port: port.map(str::to_owned),
    })
    .unwrap();
    let (drivers, recorder) = start(&*console, &ram(), console.features());
    Guest {
        console,
        drivers,
        recorder,
    }
}

impl Guest {
    /// The guest writes `data` and waits until it is used.
    fn send(&mut self, data: &[u8]) {
        self.drivers[1].write(BUFFERS, data);
        self.drivers[1].add(&[(BUFFERS, data.len() as u32, 0)]);
        self.drivers[1].kick();
        self.drivers[1].wait(&self.recorder, 1);
    }

    /// The guest gives a buffer for `length` bytes of input.
    fn listen(&mut self, length: u32) {
        self.drivers[0].add(&[(BUFFERS + 0x10_0000, length, WRITE)]);
        self.drivers[0].kick();
    }

    /// What came into that buffer.
    fn heard(&mut self) -> Vec<u8> {
        let used = self.drivers[0].wait(&self.recorder, 1);
        self.drivers[0].read(BUFFERS + 0x10_0000, used[0].1 as usize)
    }

    fn control(&mut self, event: u16, value: u16) {
        // Linux names no port when it says that the device is ready.
        let port: u32 = if event == DEVICE_READY { u32::MAX } else { 0 };
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.drivers[3].write(BUFFERS + 0x20_0000, &message);
        self.drivers[3].add(&[(BUFFERS + 0x20_0000, 8, 0)]);
        self.drivers[3].kick();
        self.drivers[3].wait(&self.recorder, 1);
    }

    /// The next control message of the device: event, value, and what follows.
    fn message(&mut self) -> (u16, u16, Vec<u8>) {
        self.drivers[2].add(&[(BUFFERS + 0x21_0000, 64, WRITE)]);
        self.drivers[2].kick();
        let used = self.drivers[2].wait(&self.recorder, 1);
        let bytes = self.drivers[2].read(BUFFERS + 0x21_0000, used[0].1 as usize);
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (word(4), word(6), bytes[8..].to_vec())
    }
}

fn socket() -> (TempDir, PathBuf) {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("console");
    (directory, path)
}

fn connect(path: &Path) -> UnixStream {
    let peer = UnixStream::connect(path).unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(200)))
        .unwrap();
    peer
}

fn hear(peer: &mut UnixStream, expected: &[u8]) {
    let mut data = vec![0; expected.len()];
    peer.read_exact(&mut data).unwrap();
    assert_eq!(data, expected);
}

#[test]
fn output_goes_to_the_file_or_nowhere() {
    let (_directory, path) = socket();
    let mut to_file = guest(ConsoleBackend::File(path.clone()), None);
    to_file.send(b"hello ");
    to_file.send(b"world");
    assert_eq!(std::fs::read(&path).unwrap(), b"hello world");
    guest(ConsoleBackend::Null, None).send(b"nobody hears this");
}

#[test]
fn a_socket_carries_both_directions_and_a_new_peer_after_the_last_one() {
    let (_directory, path) = socket();
    let mut guest = guest(ConsoleBackend::Socket(path.clone()), None);
    guest.send(b"to nobody");
    for round in 0..3 {
        let mut peer = connect(&path);
        guest.listen(100);
        peer.write_all(b"ping").unwrap();
        assert_eq!(guest.heard(), b"ping", "round {round}");
        guest.send(b"pong");
        hear(&mut peer, b"pong");
    }
}

#[test]
fn a_large_transfer_waits_for_its_reader_and_loses_nothing() {
    let (_directory, path) = socket();
    let mut guest = guest(ConsoleBackend::Socket(path.clone()), None);
    let mut peer = connect(&path);
    guest.listen(4096);
    peer.write_all(b"x").unwrap();
    guest.heard();
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n / 5) as u8).collect();
    let expected = data.clone();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        hear(&mut peer, &expected);
        peer
    });
    guest.send(&data);
    let mut peer = reader.join().unwrap();
    let writer = std::thread::spawn(move || {
        peer.write_all(&data).unwrap();
        (peer, data)
    });
    let mut all = Vec::new();
    while all.len() < 3_000_000 {
        guest.listen(100_000);
        all.extend(guest.heard());
    }
    assert!(all == writer.join().unwrap().1);
}

#[test]
fn a_peer_stays_connected_over_a_reset_of_the_device() {
    let (_directory, path) = socket();
    let mut guest = guest(ConsoleBackend::Socket(path.clone()), None);
    let mut peer = connect(&path);
    guest.listen(10);
    peer.write_all(b"a").unwrap();
    assert_eq!(guest.heard(), b"a");
    guest.console.reset();
    peer.write_all(b"b").unwrap();
    let (drivers, recorder) = start(&*guest.console, &ram(), guest.console.features());
    (guest.drivers, guest.recorder) = (drivers, recorder);
    guest.listen(10);
    assert_eq!(guest.heard(), b"b");
    guest.send(b"c");
    hear(&mut peer, b"c");
}

#[test]
fn a_stream_is_read_until_it_ends_and_written_until_nobody_reads() {
    let (input, mut typing) = io::pipe().unwrap();
    let (mut screen, output) = io::pipe().unwrap();
    let mut guest = guest(
        ConsoleBackend::Stream {
            input: Some(input.into()),
            output: output.into(),
        },
        None,
    );
    guest.listen(10);
    typing.write_all(b"ls\n").unwrap();
    assert_eq!(guest.heard(), b"ls\n");
    guest.send(b"bin\n");
    let mut data = [0; 4];
    screen.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"bin\n");
    drop((typing, screen));
    guest.listen(10);
    guest.send(b"nobody reads this");
    assert_eq!(guest.drivers[0].used(), []);
}

#[test]
fn a_named_port_is_announced_with_its_name_and_whether_a_peer_is_there() {
    let (_directory, path) = socket();
    let mut guest = guest(ConsoleBackend::Socket(path.clone()), Some("org.test"));
    assert!(guest.console.accepts(guest.console.features()));
    assert!(
        !guest.console.accepts(RING_FEATURES),
        "needs control queues"
    );
    guest.control(DEVICE_READY, 1);
    assert_eq!(guest.message(), (PORT_ADD, 1, vec![]));
    guest.control(PORT_READY, 1);
    assert_eq!(guest.message(), (PORT_NAME, 1, b"org.test".to_vec()));
    let mut peer = connect(&path);
    assert_eq!(guest.message(), (PORT_OPEN, 1, vec![]));
    // Until a program of the guest listens, its driver would throw input away.
    guest.listen(10);
    peer.write_all(b"early").unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.drivers[0].used(), []);
    guest.control(PORT_OPEN, 1);
    assert_eq!(guest.heard(), b"early");
    drop(peer);
    guest.listen(10);
    assert_eq!(guest.message(), (PORT_OPEN, 0, vec![]));
    let _peer = connect(&path);
    assert_eq!(guest.message(), (PORT_OPEN, 1, vec![]));
}

#[test]
fn control_messages_that_nobody_takes_are_bounded() {
    let mut guest = guest(ConsoleBackend::Null, Some("flood"));
    for _ in 0..3 * MOST_MESSAGES {
        guest.control(DEVICE_READY, 1);
    }
    for _ in 0..MOST_MESSAGES {
        assert_eq!(guest.message().0, PORT_ADD);
    }
    guest.control(PORT_READY, 1);
    assert_eq!(guest.message().0, PORT_NAME);
}

#[test]
fn buffers_outside_memory_come_back_empty_and_the_console_goes_on() {
    let (_directory, path) = socket();
    let mut guest = guest(ConsoleBackend::Socket(path.clone()), None);
    let mut peer = connect(&path);
    guest.drivers[0].add(&[(RAM, 100, WRITE)]);
    guest.listen(10);
    peer.write_all(b"x").unwrap();
    let used = guest.drivers[0].wait(&guest.recorder, 2);
    assert_eq!(used, [(0, 0), (1, 1)]);
    guest.drivers[1].add(&[(RAM, 100, 0)]);
    guest.drivers[1].kick();
    guest.drivers[1].wait(&guest.recorder, 1);
    guest.send(b"y");
    hear(&mut peer, b"y");
    guest.drivers[1].add(&[(BUFFERS, 1, WRITE), (BUFFERS, 1, 0)]);
    guest.drivers[1].kick();
    guest.recorder.wait_until(|counts| counts.needs_reset == 1);
}

#[test]
fn a_socket_whose_path_is_taken_is_refused_and_ours_is_removed() {
    let (_directory, path) = socket();
    let open = || {
        Console::open(ConsoleConfig {
            backend: ConsoleBackend::Socket(path.clone()),
            port: None,
        })
    };
    let console = open().unwrap();
    let error = open().map(|_| ()).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("exists: remove it or give another path")
    );
    drop(console);
    assert!(!path.exists());
    drop(open().unwrap());
    let long = PathBuf::from("/tmp").join("x".repeat(200));
    assert!(matches!(listen(&long), Err(ConsoleError::Socket { .. })));
}
