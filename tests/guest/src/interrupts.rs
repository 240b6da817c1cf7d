//! Interrupt remapping, as stock guests use it: everything that a device behind the unit sends goes
//! by the guest's table, moves between CPUs while it comes in, and what is forged is a fault.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::engine::address;
use crate::harness::bound::Bound;
use crate::harness::{Guest, Lab, Machine, Test, dmesg, tap::Tap, until};
use crate::net::exchange;
use crate::passthrough::{NVME, drive_keeps, rebind, without_messages};
use crate::vtd::{disk_keeps, groups_are};

/// The tests.
pub const TESTS: &[Test] = &[
    Test::new("stock_7_2_moves_them_between_8_cpus_under_load", |lab| {
        remapped(lab, "7.2", 8)
    }),
    Test::new("stock_6_12_moves_them_under_load", |lab| {
        remapped(lab, "6.12", 4)
    }),
    Test::new("stock_6_1_moves_them_under_load", |lab| {
        remapped(lab, "6.1", 4)
    }),
    Test::new(
        "forged_ones_are_faults_and_vfio_needs_no_unsafe_option",
        |lab| engine(lab, "6.12"),
    ),
    Test::new("an_nvme_drive_sends_them_behind_remapping", nvme).profile("vtd"),
    Test::new(
        "a_mapped_doorbell_is_reached_in_an_identity_domain_and_else_a_fault",
        mapped_doorbell,
    ),
];

const HOST: &str = "192.168.81.1";
const GUEST: &str = "192.168.81.2";
const SLOW: Duration = Duration::from_secs(400);

/// So many changes of affinity are enough, and so many rounds may be made for them.
const ENOUGH: u64 = 20;
const ROUNDS: u32 = 20;

/// Moves the interrupts of a driver from CPU to CPU, until it is told to stop; counts the moves.
fn mover(pattern: &str) -> String {
    format!(
        "cat > /tmp/mover <<'END'\n\
         moves=0\n\
         cpus=$(grep -c ^processor /proc/cpuinfo)\n\
         while [ ! -e /tmp/stop ]; do\n\
         for irq in $(grep '{pattern}' /proc/interrupts | cut -d: -f1); do\n\
         cpu=$(((moves + moves / cpus) % cpus))\n\
         echo $cpu > /proc/irq/$irq/smp_affinity_list && moves=$((moves + 1))\n\
         done\n\
         echo $moves > /tmp/moving\n\
         done\n\
         echo $moves > /tmp/moves\n\
         END\n\
         rm -f /tmp/stop /tmp/moves; echo 0 > /tmp/moving; sh /tmp/mover > /dev/null 2>&1 < /dev/null &"
    )
}

/// How often the mover moved one so far.
fn moves(guest: &mut Machine) -> Result<u64> {
    let moves = guest.run("cat /tmp/moving")?;
    // It is being written.
    Ok(moves.trim().parse().unwrap_or(0))
}

/// Ends the mover; returns how often it moved one.
fn stop_mover(guest: &mut Machine) -> Result<u64> {
    let ended = until("[ -s /tmp/moves ]");
    let moves = guest.run(&format!("touch /tmp/stop; {ended}; cat /tmp/moves"))?;
    moves.trim().parse().context("no count of moves")
}

fn remapped(lab: &Lab, kernel: &str, cpus: u32) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let tap = Tap::new("lab3", &format!("{HOST}/24"))?;
    let mut guest = Guest::debian(kernel)
        .cpus(cpus)
        .cmdline("intel_iommu=on intremap=on")
        .option("--viommu", "type=vtd,interrupt_remapping=on")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .option("--net", &format!("tap={},iommu=on", tap.name()))
        .boot(lab)?;
    let log = guest.run("dmesg")?;
    ensure!(
        log.contains("Enabled IRQ remapping in x2apic mode"),
        "the guest's kernel does not remap in x2APIC mode"
    );
    behind_remapping(&mut guest, "virtio0")?;
    behind_remapping(&mut guest, "virtio1")?;
    let table = guest.run("cat /proc/interrupts")?;
    let plain: Vec<&str> = table
        .lines()
        .filter(|line| line.contains("IO-APIC") && !line.contains("IR-IO-APIC"))
        .collect();
    ensure!(plain.is_empty(), "pins that are not remapped: {plain:?}");
    ensure!(table.contains("IR-IO-APIC"), "no pin is in use:\n{table}");

    guest.run(&format!(
        "ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 1 -W 60 {HOST}"
    ))?;
    let before = per_cpu(&mut guest, "virtio[01]-")?;
    guest.run(&mover("IR-.*virtio[01]-"))?;
    guest.run(
        "(while [ ! -e /tmp/stop ]; do echo 3 > /proc/sys/vm/drop_caches; \
         sha256sum /dev/vda; done | sort | uniq -c > /tmp/sums; touch /tmp/summed) \
         > /dev/null 2>&1 < /dev/null &",
    )?;
    // However slow the mover is, and whomever it comes to late.
    let idle = |before: &[u64], after: &[u64]| {
        let pairs = before.iter().zip(after);
        pairs.filter(|(before, after)| after <= before).count()
    };
    for _ in 0..ROUNDS {
        exchange(lab, &mut guest, HOST, 4 << 20)?;
        let after = per_cpu(&mut guest, "virtio[01]-")?;
        if moves(&mut guest)? > ENOUGH && idle(&before, &after) <= cpus as usize / 4 {
            break;
        }
    }
    let moves = stop_mover(&mut guest)?;
    // All reads came to an end, and all of them read the same.
    let sums = guest.run(&format!("{}; cat /tmp/sums", until("[ -e /tmp/summed ]")))?;
    ensure!(
        sums.lines().count() == 1,
        "reads of an unchanging disk differ, or did not end: {sums:?}"
    );
    let after = per_cpu(&mut guest, "virtio[01]-")?;
    ensure!(moves > ENOUGH, "only {moves} changes of affinity");
    ensure!(
        after.len() == cpus as usize && idle(&before, &after) <= cpus as usize / 4,
        "CPUs got no interrupt: {before:?}, then {after:?} after {moves} moves"
    );
    nothing_spurious(&mut guest)?;
    let unit = unit(&guest)?;
    let remapping = &unit["interrupt_remapping"];
    ensure!(
        remapping["enabled"] == true && remapping["extended"] == true,
        "not remapped with 32-bit destinations: {remapping}"
    );
    let invalidations = remapping["invalidations"].as_u64().unwrap_or(0);
    ensure!(
        remapping["blocked"] == 0 && unit["faults_recorded"] == 0,
        "interrupts were blocked: {unit:#}"
    );
    ensure!(
        invalidations >= moves / 2,
        "{invalidations} invalidations for {moves} moves"
    );
    crate::harness::show(format!(
        "{moves} changes of affinity, {invalidations} invalidations"
    ));
    guest.power_off()?;
    Ok(())
}

/// The interrupts of a device go by the guest's table.
fn behind_remapping(guest: &mut Machine, device: &str) -> Result<()> {
    let lines = guest.run(&format!("grep '{device}-' /proc/interrupts"))?;
    let all = lines.lines().all(|line| line.contains("IR-PCI-MSI"));
    ensure!(all, "{device} is not remapped:\n{lines}");
    Ok(())
}

/// How many interrupts of the lines that match each CPU has had.
fn per_cpu(guest: &mut Machine, pattern: &str) -> Result<Vec<u64>> {
    let lines = guest.run(&format!("grep '{pattern}' /proc/interrupts"))?;
    let mut sums = Vec::new();
    for line in lines.lines() {
        let counts = line.split_whitespace().skip(1);
        let counts = counts.map_while(|word| word.parse::<u64>().ok());
        for (cpu, count) in counts.enumerate() {
            match sums.get_mut(cpu) {
                Some(sum) => *sum += count,
                None => sums.push(count),
            }
        }
    }
    Ok(sums)
}

/// Handlers that find their work done already say that an interrupt was not theirs; so few are none
/// of ours.
const UNHANDLED: u64 = 20;

/// The guest's kernel counted none that nobody wanted.
fn nothing_spurious(guest: &mut Machine) -> Result<()> {
    let counts = guest.run(
        "grep -E '^ *(ERR|MIS):' /proc/interrupts; \
         cat /proc/irq/*/spurious | grep ^unhandled",
    )?;
    for line in counts.lines() {
        let last = line.split_whitespace().last().unwrap_or_default();
        let most = if line.starts_with("unhandled") {
            UNHANDLED
        } else {
            0
        };
        let few = last.parse::<u64>().is_ok_and(|count| count <= most);
        ensure!(few, "spurious interrupts: {counts}");
    }
    Ok(())
}

fn unit(guest: &Machine) -> Result<Value> {
    Ok(guest.viommus()?[0].take())
}

fn engine(lab: &Lab, kernel: &str) -> Result<()> {
    let mut guest = Guest::debian(kernel)
        .cpus(2)
        .cmdline("intel_iommu=on intremap=on")
        .option("--viommu", "type=vtd,interrupt_remapping=on")
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    // No option: the guest's kernel sees that messages are isolated.
    guest.run("modprobe vfio_iommu_type1 && modprobe vfio_pci")?;
    let at = guest.run(
        "for d in /sys/bus/pci/devices/*; do \
         if [ $(cat $d/vendor)-$(cat $d/device) = 0x1af4-0x10f0 ]; then basename $d; fi; done",
    )?;
    let at = at.trim().to_owned();
    guest.run(&mover("IR-.*vfio-msix"))?;
    for _ in 0..ROUNDS {
        let said = guest.run_within(SLOW, &format!("dma-engine interrupts {at} 40"))?;
        crate::harness::show(said.trim());
        if moves(&mut guest)? > ENOUGH {
            break;
        }
    }
    let moves = stop_mover(&mut guest)?;
    crate::harness::show(format!("with {moves} changes of affinity"));
    ensure!(moves > ENOUGH, "only {moves} changes of affinity");
    let before = unit(&guest)?;
    ensure!(before["faults_recorded"] == 0, "faults: {before:#}");

    guest.run_within(SLOW, &format!("dma-engine forge {at}"))?;
    let after = unit(&guest)?;
    let faults = after["last_faults"].to_string();
    for reason in [
        "interrupt-source",
        "interrupt-entry-not-present",
        "interrupt-compatibility-blocked",
    ] {
        ensure!(faults.contains(reason), "no {reason} in {faults}");
    }
    ensure!(
        after["interrupt_remapping"]["blocked"] == 3 && after["faults_recorded"] == 3,
        "three forged messages: {after:#}"
    );
    nothing_spurious(&mut guest)?;
    // Each of them is told; none comes after the log was looked at.
    let told = until("[ $(dmesg | grep -c -F '[INTR-REMAP]') -ge 3 ]");
    let told = guest.try_run(SLOW, &told)?.status == 0;
    let log = guest.run("dmesg -c")?;
    ensure!(
        told,
        "the guest's kernel does not report three blocked interrupts:\n{log}"
    );
    guest.power_off()?;
    Ok(())
}

fn nvme(lab: &Lab) -> Result<()> {
    let drive = Bound::new(NVME)?;
    let mut guest = Guest::lab_kernel()
        .cpus(2)
        .cmdline("intel_iommu=on intremap=on")
        .option("--viommu", "type=vtd,mode=legacy,interrupt_remapping=on")
        .option("--device", &drive.option(",iommu=on"))
        .boot(lab)?;
    drive_keeps(&mut guest)?;
    for round in 0..2 {
        let lines = guest.run("grep nvme /proc/interrupts")?;
        ensure!(
            lines.lines().all(|line| line.contains("IR-PCI-MSI")),
            "not remapped:\n{lines}"
        );
        let counts = per_cpu(&mut guest, "nvme")?;
        ensure!(counts.iter().sum::<u64>() > 0, "no interrupt:\n{lines}");
        if round == 0 {
            rebind(&mut guest)?;
            drive_keeps(&mut guest)?;
        }
    }
    // Its line goes by an entry of the I/O APIC's, whose interrupts the guest ends there.
    without_messages(&mut guest)?;
    drive_keeps(&mut guest)?;
    nothing_spurious(&mut guest)?;
    let unit = unit(&guest)?;
    ensure!(
        unit["interrupt_remapping"]["blocked"] == 0 && unit["faults_recorded"] == 0,
        "interrupts were blocked: {unit:#}"
    );
    guest.power_off()?;
    Ok(())
}

/// How many faults there were; the last message that was lost names the doorbell.
fn missed(guest: &Machine) -> Result<u64> {
    let unit = unit(guest)?;
    ensure!(
        unit["faults"]["missed_doorbell"]["doorbell"] == 0xfee0_0000_u64,
        "the unit does not name the doorbell: {unit:#}"
    );
    let count = unit["faults"]["reported"].as_u64();
    count.with_context(|| format!("no count of faults in {unit:#}"))
}

/// A stock kernel maps the doorbell where everything is mapped to itself, and nowhere else.
fn mapped_doorbell(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 32)?;
    let mut guest = Guest::debian("6.12")
        .cpus(2)
        .cmdline("agent.modprobe=virtio_iommu iommu.passthrough=1")
        .option("--viommu", "type=virtio,msi=mapped")
        .option("--disk", &format!("path={},iommu=on", image.display()))
        .option("--test-device", "iommu=on")
        .boot(lab)?;
    groups_are(&mut guest, "identity")?;
    let came =
        |guest: &mut Machine| -> Result<u64> { Ok(per_cpu(guest, "virtio[01]-")?.iter().sum()) };
    let before = came(&mut guest)?;
    disk_keeps(&mut guest, &image)?;
    let after = came(&mut guest)?;
    ensure!(after > before, "the disk's interrupts do not arrive");

    // VFIO's domain has what is mapped there, and no doorbell.
    guest.run("modprobe vfio_iommu_type1 allow_unsafe_interrupts=1 && modprobe vfio_pci")?;
    guest.run("dmesg -c > /tmp/boot.log")?;
    let at = address(&mut guest)?;
    let lost = guest.try_run(SLOW, &format!("dma-engine interrupts {at} 1 10"))?;
    ensure!(
        lost.status != 0 && lost.stderr.contains("interrupts: [0, 0,"),
        "interrupts without a way: {lost:?}"
    );
    missed(&guest)?;
    let told = until("dmesg | grep -q 'fault from EP.*at 0xfee0'");
    let told = guest.try_run(SLOW, &told)?.status == 0;
    let log = guest.run("dmesg -c")?;
    ensure!(
        told,
        "the guest's kernel logs no fault at the doorbell: {log}"
    );

    // A driver that has it in its own hands.
    let before = missed(&guest)?;
    guest.run("insmod /lib/modules/dma_engine.ko")?;
    crate::harness::show(guest.run_within(SLOW, &format!("dma-engine doorbell {at}"))?);
    let now = missed(&guest)?;
    ensure!(
        now >= before + 12,
        "{before} faults before twelve interrupts were lost, {now} after them"
    );
    // The other device's never stopped.
    disk_keeps(&mut guest, &image)?;
    ensure!(
        came(&mut guest)? > after,
        "the disk's interrupts do not arrive any more"
    );
    let log = guest.run("dmesg -rc")?;
    let (faults, others): (Vec<&str>, Vec<&str>) =
        log.lines().partition(|line| line.contains("fault from EP"));
    let other = faults.iter().find(|line| !line.contains("at 0xfee0"));
    ensure!(other.is_none(), "a fault is not at the doorbell: {other:?}");
    dmesg::check("the guest's kernel", &others.join("\n"))?;
    guest.power_off()?;
    Ok(())
}
