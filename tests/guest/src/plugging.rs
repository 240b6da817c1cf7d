//! How long a device takes to come: from the request over REST until it is answered, which is our
//! part, and from there until the guest's driver has it.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::harness::api::Api;
use crate::harness::{Guest, Lab, payload, show};

/// Devices that come in each measurement of our part, and in a guest.
const MANY: usize = 300;
const SOME: usize = 30;
/// Our part may take this long at the 99th percentile, and `vm.info` while an add is stuck.
const AIM: Duration = Duration::from_millis(2);
const AIM_STUCK: Duration = Duration::from_millis(5);

/// Times, sorted.
struct Times(Vec<Duration>);

impl Times {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        Self(times)
    }

    fn at(&self, percent: usize) -> Duration {
        let last = self.0.len().saturating_sub(1);
        let at = (self.0.len() * percent / 100).min(last);
        self.0.get(at).copied().unwrap_or_default()
    }

    fn line(&self, what: &str, aim: Option<Duration>) -> String {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let mut line = format!(
            "{what:44} median {:7.2} ms  99 % {:7.2}  most {:7.2}",
            ms(self.at(50)),
            ms(self.at(99)),
            ms(self.at(100))
        );
        if let Some(aim) = aim {
            let ratio = self.at(99).as_secs_f64() / aim.as_secs_f64();
            line += &format!("  99 % / aim {ratio:.2}");
        }
        line
    }
}

fn time<T>(work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
    let begun = Instant::now();
    let done = work()?;
    Ok((begun.elapsed(), done))
}

/// A nestling whose guest does nothing, and that ends with its value.
struct Idle {
    child: Child,
    api: Api,
}

impl Drop for Idle {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Our part alone: the guest stands still.
pub(crate) fn our_part(lab: &Lab) -> Result<()> {
    let (kernel, socket, nestling) = (lab.file("kernel"), lab.file("api"), lab.file("nestling"));
    let folder = kernel.parent().context("a folder")?;
    // It halts: nobody listens at its port.
    fs::write(&kernel, payload::exits_with(0))?;
    fs::copy(lab.nestling(), &nestling)?;
    let child = Command::new(&nestling)
        .args(["run", "--memory", "size=64M", "--serial", "null"])
        .args(["--viommu", "type=vtd,id=unit", "--kernel"])
        .arg(&kernel)
        .arg("--api-socket")
        .arg(format!("path={}", socket.display()))
        // The images and the stuck device are plugged later.
        .arg("--landlock-rules")
        .arg(format!("path={}", folder.display()))
        .stdin(Stdio::null())
        .spawn()
        .context("nestling")?;
    let idle = Idle {
        child,
        api: Api::new(&socket),
    };
    let api = &idle.api;
    api.wait(Duration::from_secs(10))?;
    while api.get("vm.info")?["state"] != "Running" {
        std::thread::sleep(Duration::from_millis(10));
    }
    let image = lab.image("disk", 16)?.display().to_string();
    for (what, viommu) in [("behind no vIOMMU", None), ("behind VT-d", Some("unit"))] {
        let disk = json!({"path": image, "id": "disk", "viommu": viommu});
        // A guest that stands still lets go of nothing.
        let gone = json!({"id": "disk", "force": true, "timeout": 0});
        let (mut adds, mut removals) = (Vec::new(), Vec::new());
        for _ in 0..MANY {
            adds.push(time(|| api.put("vm.add-disk", &disk))?.0);
            removals.push(time(|| api.put("vm.remove-device", &gone))?.0);
        }
        let add = format!("a disk is added {what}");
        show(Times::of(adds).line(&add, Some(AIM)));
        let removal = format!("a disk is removed {what}");
        show(Times::of(removals).line(&removal, None));
    }
    while_stuck(lab, api)
}

/// A file of a host's device that is a FIFO keeps who opens it in the kernel.
fn while_stuck(lab: &Lab, api: &Api) -> Result<()> {
    let device = lab.file("device");
    fs::create_dir_all(device.join("vfio-dev"))?;
    fs::create_dir_all(device.join("iommu_group"))?;
    let fifo = device.join("iommu_group/reserved_regions");
    ensure!(Command::new("mkfifo").arg(&fifo).status()?.success());
    let add = json!({"path": device.display().to_string(), "id": "host"});
    std::thread::scope(|scope| -> Result<()> {
        let stuck = scope.spawn(|| api.ask("PUT", "vm.add-device", &add));
        let is_stuck = || -> Result<bool> {
            Ok(api.get("vm.info")?["operation"]["step"] == "reserved-regions")
        };
        while !is_stuck()? {
            std::thread::sleep(Duration::from_millis(1));
        }
        let asked = (0..MANY).map(|_| Ok(time(|| api.get("vm.info"))?.0));
        let asked = asked.collect::<Result<Vec<_>>>();
        let still = is_stuck();
        drop(fs::File::options().write(true).open(&fifo)?);
        match stuck.join() {
            Ok(answer) => ensure!(answer?.status == 422, "the device was added"),
            Err(_) => bail!("the client panicked"),
        }
        ensure!(still?, "the add was not stuck any more");
        show(Times::of(asked?).line("vm.info while an add is stuck", Some(AIM_STUCK)));
        Ok(())
    })
}

/// Both parts, in a guest that runs: Debian 7.2 behind a unit.
pub(crate) fn both_parts(lab: &Lab) -> Result<()> {
    let image = lab.image("disk", 16)?.display().to_string();
    let guest = Guest::debian("7.2").cmdline("intel_iommu=on");
    let guest = guest.option("--viommu", "type=vtd,id=unit").cpus(2);
    let mut guest = guest.api(lab).boot(lab)?;
    let api = guest.api();
    let disk = json!({"path": image, "id": "disk", "viommu": "unit"});
    let (mut ours, mut theirs, mut asking) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..SOME {
        let (took, added): (_, Value) = time(|| api.put("vm.add-disk", &disk))?;
        ours.push(took);
        let bdf = added["bdf"].as_str().context("no bdf")?;
        let there = format!("until [ -e /sys/bus/pci/devices/{bdf}/virtio*/block ]; do :; done");
        theirs.push(time(|| guest.run(&there))?.0);
        asking.push(time(|| guest.run("true"))?.0);
        api.put("vm.remove-device", &json!({"id": "disk"}))?;
    }
    show(Times::of(ours).line("request to answer", None));
    show(Times::of(theirs).line("answer to the guest's probe", None));
    show(Times::of(asking).line("  of which asking the guest", None));
    guest.power_off()?;
    Ok(())
}
