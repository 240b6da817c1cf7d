//! A disk that is kept at work: its DMA is in flight both ways while something happens to it.

use std::time::Duration;

use anyhow::Result;

use super::{Machine, dmesg, until};

/// MiB that are read and written at a time.
const MIB: u32 = 8;
const SLOW: Duration = Duration::from_secs(400);

/// Keeps the block device `name` of a guest reading from its beginning, and writing from `at` MiB
/// on, until it is gone, [`end`] comes, or the guest starts over.
///
/// # Errors
/// The guest does not answer, or its disk does nothing.
pub fn begin(guest: &mut Machine, name: &str, at: u32) -> Result<()> {
    // The writer keeps its disk open: by its name it would make a file of one that is gone.
    guest.run_within(
        SLOW,
        &format!(
            "exec > /dev/null 2>&1 < /dev/null; rm -f /tmp/stop; touch /tmp/reader /tmp/writer; \
             (while [ ! -e /tmp/stop -a -b /dev/{name} ]; do \
             echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/{name} bs=1M count={MIB}; done; \
             rm /tmp/reader) & \
             (exec 3<>/dev/{name}; while [ ! -e /tmp/stop ] && \
             dd if=/dev/zero of=/proc/self/fd/3 bs=1M seek={at} count={MIB} conv=notrunc,fsync; \
             do :; done; rm /tmp/writer) & {}",
            until(&format!("grep -q '[1-9]' /sys/block/{name}/inflight"))
        ),
    )?;
    Ok(())
}

/// Ends what [`begin`] began. What the guest lost with a disk that went is taken out of its log.
///
/// # Errors
/// The guest's kernel complains of more than that, or does not answer.
pub fn end(guest: &mut Machine) -> Result<()> {
    let ended = until("[ ! -e /tmp/reader -a ! -e /tmp/writer ]");
    let log = guest.run_within(SLOW, &format!("touch /tmp/stop; {ended}; dmesg -rc"))?;
    // The block layer says "I/O error", the driver of a drive "I/O Error" of the same command; and
    // of many it says how many it keeps to itself.
    let others = log.lines().filter(|line| {
        let said = line.to_ascii_lowercase();
        !said.contains("i/o error") && !said.contains("callbacks suppressed")
    });
    let others: Vec<&str> = others.collect();
    dmesg::check("the guest's kernel", &others.join("\n"))
}
