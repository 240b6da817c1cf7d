//! What kernels say: after each test nothing unexpected may stand in the guest's log or the host's.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Result, bail};

/// Lines at this level and above are read as complaints (4 is a warning).
const WARNING: u8 = 4;

/// Parts of lines that are no fault of nestling, each with its reason.
const HARMLESS: &[&str] = &[
    // The emulated host's CPU has no such MSR; the guest's kernel tries.
    "Unhandled WRMSR(0xc0010007)",
    "ignored wrmsr",
    "ignored rdmsr",
    // The emulated host's own calibration of its TSC moves while it boots.
    "user requested TSC rate below hardware speed",
    // Reading a clock of another CPU takes long where CPUs are threads of a busy machine.
    "clocksource: Watchdog",
    "clocksource: Long readout interval",
    "clocksource: timekeeping watchdog on CPU",
    "clocksource: CPUs ",
    "TSC found unstable after boot",
    "hrtimer: interrupt took",
    "Marking clocksource",
    "Marking TSC unstable",
    "clocksource: Clocksource",
    "clocksource:                       ",
    // A CPU that was not run for a while has work of that time to do.
    "sched: RT throttling activated",
    "sched: DL replenish lagged too much",
    "hogged CPU for",
    "perf: interrupt took too long",
    "INFO: NMI handler (",
    // The lab's kernel: a banner about its debugfs, and drivers for other CPUs.
    "** ",
    "********",
    "idxd driver failed to load without MOVDIR64B",
    "amd_pstate: the _CPC object is not present",
    "VMX not supported",
    // Speculation on CPUs as QEMU models them.
    "Spectre",
    "RETBleed",
    "Speculative",
    "SRSO",
    "MDS CPU bug",
    "VMSCAPE",
    "mitigation",
    "Mitigation",
    "mitigations",
    // A passed-through device is reset whenever it changes hands; the kernel says so as a warning.
    "vfio-pci 0000:00:10.0: reset",
    "vfio-pci 0000:00:11.0: reset",
    // The same in a guest that is a host, `nested::`.
    "vfio-pci 0000:00:04.0: reset",
    // After a kexec: the timer of the kernel before fired on its last steps, and the next one,
    // which has no handler yet, takes the interrupt when it first allows any.
    "Spurious LAPIC timer interrupt",
    // Said where the test asks for it.
    "MSI interrupts are not secure, they cannot be isolated by the platform",
    // The DMA engine of `kernel::` goes where it may not: that is what is tested.
    "Request device [0000:00:12.0]",
    "DMAR: DRHD: handling fault status reg",
    // Follows faults that are in the log themselves, and read there.
    "dmar_fault: ",
    "vfio-pci 0000:00:12.0: reset",
    // Entropy, early.
    "random: crng",
    // A signature check without the distribution's keys in an initramfs of ours.
    "module verification failed",
    "loading out-of-tree module taints kernel",
];

/// Parts of lines that are wrong at any level.
const WRONG: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Call Trace",
    "Oops",
    "DMAR: [DMA",
    "fault addr",
    "unchecked MSR",
    "soft lockup",
    "hung_task",
    "blocked for more than",
    "rcu: INFO",
    "nobody cared",
    "spurious",
    "I/O error",
    "timed out",
];

/// What an emulated host says when the lab wakes it by an NMI, see `tests/lab/src/lost.rs`. In a
/// guest's log it would be wrong.
const WOKEN: &[&str] = &[
    "NMI received for unknown reason",
    "Dazed and confused, but trying to continue",
];

/// The host kernel's log from some moment on.
#[derive(Debug)]
pub struct Host(Option<fs::File>);

impl Host {
    /// From now.
    pub fn from_now() -> Self {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .ok()
            .and_then(|mut file| file.seek(SeekFrom::End(0)).ok().map(|_| file));
        Self(file)
    }

    /// What was said since, in the raw form of `dmesg -r`; kept in `log` too. Empty where the
    /// log is not readable for this user.
    ///
    /// # Errors
    /// The log cannot be read or kept.
    pub fn since(self, log: &Path) -> Result<String> {
        let mut text = String::new();
        if let Some(mut file) = self.0 {
            let mut record = vec![0; 8192];
            loop {
                match file.read(&mut record) {
                    Ok(0) => break,
                    Ok(n) => text += &raw_line(&String::from_utf8_lossy(&record[..n])),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    // The record was overwritten before it was read; the next one is there.
                    Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        fs::write(log, &text)?;
        let woken = |line: &str| WOKEN.iter().any(|part| line.contains(part));
        let lines = text.split_inclusive('\n').filter(|line| !woken(line));
        Ok(lines.collect())
    }
}

/// A record of `/dev/kmsg` (`level,sequence,microseconds,flags;text`) as `dmesg -r` shows it.
fn raw_line(record: &str) -> String {
    let Some((head, text)) = record.split_once(';') else {
        return String::new();
    };
    let mut fields = head.split(',');
    let level: u32 = fields.next().and_then(|f| f.parse().ok()).unwrap_or(6);
    let time: f64 = fields.nth(1).and_then(|f| f.parse().ok()).unwrap_or(0.0);
    let text = text.lines().next().unwrap_or_default();
    format!("<{level}>[{:12.6}] {text}\n", time / 1e6)
}

/// Fails with every unexpected line of a log in the form of `dmesg -r`.
///
/// # Errors
/// There are unexpected lines.
pub fn check(whose: &str, log: &str) -> Result<()> {
    let wrong: Vec<&str> = log.lines().filter(|line| is_wrong(line)).take(20).collect();
    if wrong.is_empty() {
        Ok(())
    } else {
        bail!("{whose} complained:\n{}", wrong.join("\n"))
    }
}

fn is_wrong(line: &str) -> bool {
    if HARMLESS.iter().any(|part| line.contains(part)) {
        return false;
    }
    // The level is the low three bits, the facility the rest; what user space writes is not it.
    let number: u32 = line
        .strip_prefix('<')
        .and_then(|rest| rest.split_once('>'))
        .and_then(|(number, _)| number.parse().ok())
        .unwrap_or(6);
    let from_kernel = number < 8;
    let text = line.split_once('>').map_or("", |(_, rest)| rest);
    let said = text.split_once(']').map_or(text, |(_, said)| said);
    !said.trim().is_empty()
        && from_kernel
        && (number as u8 <= WARNING || WRONG.iter().any(|part| line.contains(part)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_and_known_bad_words_are_wrong_and_noise_is_not() {
        assert!(is_wrong("<4>[ 0.1] something odd"));
        assert!(is_wrong("<6>[ 0.1] WARNING: CPU: 0"));
        assert!(!is_wrong("<6>[ 0.1] fine"));
        assert!(!is_wrong("<12>[ 0.1] user space says"));
        assert!(!is_wrong("<3>[ 0.1] kvm_intel: VMX not supported by CPU 0"));
        assert!(!is_wrong("no level at all"));
        assert!(!is_wrong("<4>[ 0.1] "));
        assert!(!is_wrong("<4>"));
    }

    #[test]
    fn a_record_is_shown_as_dmesg_shows_it() {
        assert_eq!(
            raw_line("4,12,1500000,-;hello\n SUBSYSTEM=x\n"),
            "<4>[    1.500000] hello\n"
        );
    }
}
