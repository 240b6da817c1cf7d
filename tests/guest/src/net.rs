//! Networking over a tap: the guest and the host reach each other and nothing is lost.

use std::fs::File;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::harness::{Guest, Lab, Machine, Test, show, tap::Tap};

/// The tests.
pub const TESTS: &[Test] = &[Test::new("ping_and_64_mib_of_tcp_go_both_ways", both_ways)];

const HOST: &str = "192.168.77.1";
const GUEST: &str = "192.168.77.2";
const MAC: &str = "52:54:00:77:00:02";
const LENGTH: u64 = 64 << 20;
const SLOW: Duration = Duration::from_secs(400);

fn both_ways(lab: &Lab) -> Result<()> {
    let tap = Tap::new("lab0", &format!("{HOST}/24"))?;
    let mut guest = Guest::debian("7.2")
        .cpus(2)
        .option("--net", &format!("tap={},mac={MAC}", tap.name()))
        .boot(lab)?;
    ensure!(
        guest.run("cat /sys/class/net/eth0/address")?.trim() == MAC,
        "not the MAC given"
    );
    guest.run(&format!(
        "ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"
    ))?;
    guest.run(&format!("ping -c 3 -W 60 {HOST}"))?;
    // Too large for one frame: fragments arrive in order.
    guest.run(&format!("ping -c 2 -W 60 -s 4000 {HOST}"))?;
    host_pings()?;

    exchange(lab, &mut guest, HOST, LENGTH)?;
    let counters = guest.run("cat /sys/class/net/eth0/statistics/*_errors")?;
    ensure!(
        counters.split_whitespace().all(|n| n == "0"),
        "errors on eth0: {counters}"
    );
    guest.power_off()?;
    Ok(())
}

/// Sends `length` bytes from the guest to the host at `host` over TCP, and back again; every
/// byte must arrive.
///
/// # Errors
/// One does not.
pub fn exchange(lab: &Lab, guest: &mut Machine, host: &str, length: u64) -> Result<()> {
    guest.run_within(
        SLOW,
        &format!(
            "head -c 1048576 /dev/urandom > /tmp/part; \
         for n in $(seq 64); do cat /tmp/part; echo $n; done | head -c {length} > /tmp/data"
        ),
    )?;
    let sent = guest.run_within(SLOW, "sha256sum < /tmp/data")?;

    let listener = TcpListener::bind((host, 0))?;
    let port = listener.local_addr()?.port();
    let copy = lab.file("received");
    let path = copy.clone();
    let started = Instant::now();
    let other = std::thread::spawn(move || -> Result<u64> {
        let stream = accept(&listener)?;
        receive(stream, &path, length)
    });
    guest.run_within(SLOW, &format!("nc {host} {port} < /tmp/data"))?;
    let received = joined(other)?;
    ensure!(
        received == length,
        "of {length} bytes {received} reached the host"
    );
    show(format!("guest to host: {:.0} MiB/s", rate(length, started)));
    let arrived = std::process::Command::new("sha256sum")
        .stdin(File::open(&copy)?)
        .output()?;
    let arrived = String::from_utf8_lossy(&arrived.stdout).into_owned();
    ensure!(
        arrived.trim() == sent.trim(),
        "the host received other bytes than the guest sent"
    );

    let listener = TcpListener::bind((host, 0))?;
    let port = listener.local_addr()?.port();
    let started = Instant::now();
    let other = std::thread::spawn(move || -> Result<u64> {
        let mut stream = accept(&listener)?;
        Ok(io::copy(&mut File::open(&copy)?, &mut stream)?)
    });
    let back = guest.run_within(SLOW, &format!("nc {host} {port} < /dev/null | sha256sum"))?;
    joined(other)?;
    show(format!("host to guest: {:.0} MiB/s", rate(length, started)));
    ensure!(
        back.trim() == sent.trim(),
        "the guest received other bytes than the host sent"
    );
    Ok(())
}

fn host_pings() -> Result<()> {
    let output = std::process::Command::new("ping")
        .args(["-c", "2", "-W", "60", GUEST])
        .output()?;
    if !output.status.success() {
        bail!(
            "the host cannot ping the guest: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    Ok(())
}

/// The connection that the guest makes, or an end of waiting.
fn accept(listener: &TcpListener) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + SLOW;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(SLOW))?;
                stream.set_write_timeout(Some(SLOW))?;
                return Ok(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(e) => return Err(e).context("the guest did not connect"),
        }
    }
}

fn receive(mut stream: TcpStream, to: &Path, length: u64) -> Result<u64> {
    let mut file = File::create(to)?;
    // One byte more than is expected shows a stream that does not end.
    Ok(io::copy(&mut (&mut stream).take(length + 1), &mut file)?)
}

fn joined(thread: std::thread::JoinHandle<Result<u64>>) -> Result<u64> {
    match thread.join() {
        Ok(result) => result,
        Err(_) => bail!("the host's end of the connection panicked"),
    }
}

fn rate(length: u64, since: Instant) -> f64 {
    (length >> 20) as f64 / since.elapsed().as_secs_f64()
}
