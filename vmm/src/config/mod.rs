//! What a user asks for: one schema for option strings, JSON and help.
//!
//! The names are those of Cloud Hypervisor's `VmConfig` where it has them. [`VmConfig`] is the
//! whole document; each group of it is one option of `nestling run`. [`VmConfig::validate`] is
//! pure: nothing is opened or created before the whole configuration is known to make sense.

#![forbid(unsafe_code)]

mod change;
mod groups;
pub mod schema;
pub mod values;

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use viommu::doorbell::{self, Doorbell};
use viommu::reserved::X86_MSI;
use viommu::{Gpa, Pasid};

use crate::memory::layout::{ARCHITECTURAL, BOOT_AREA, Range, VTD_UNITS};

pub use groups::*;
pub use schema::{Field, Group, SchemaError};
pub use values::{Address, Mac, Size};

/// The configuration of one VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// What to boot.
    pub payload: PayloadConfig,
    /// Virtual CPUs.
    pub cpus: CpusConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Disks, in the order of their PCI device numbers.
    pub disks: Vec<DiskConfig>,
    /// Network cards, after the disks.
    pub net: Vec<NetConfig>,
    /// The entropy source.
    pub rng: RngConfig,
    /// The serial port.
    pub serial: SerialConfig,
    /// The virtio console.
    pub console: ConsoleConfig,
    /// Devices of the host, from PCI device number 16 on.
    pub devices: Vec<DeviceConfig>,
    /// DMA test engines, after the other emulated devices.
    pub test_devices: Vec<TestDeviceConfig>,
    /// The vIOMMUs.
    pub viommus: Vec<ViommuConfig>,
    /// Everything that belongs to the VM as a whole.
    pub platform: PlatformConfig,
    /// What nestling itself may do.
    pub sandbox: SandboxConfig,
    /// What it may open beside what is named here.
    pub landlock_rules: Vec<LandlockConfig>,
}

impl PartialSchema for VmConfig {
    fn schema() -> RefOr<Schema> {
        let properties: Map<String, Value> = SECTIONS
            .iter()
            .map(|section| {
                let group = json!({ "$ref": format!("#/components/schemas/{}", section.name) });
                let schema = match section.many {
                    true => json!({ "type": "array", "items": group }),
                    false => group,
                };
                (section.key.into(), schema)
            })
            .collect();
        schema::openapi(json!({
            "type": "object",
            "description": "The configuration of one VM.",
            "properties": properties,
            "required": ["payload"],
            "additionalProperties": false,
        }))
    }
}

impl ToSchema for VmConfig {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        for section in SECTIONS {
            let schema = schema::openapi(section.group.json_schema());
            schemas.push((section.name.into(), schema));
        }
    }
}

/// One option of the command line that stands for one key of [`VmConfig`].
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// The option without `--`.
    pub option: &'static str,
    /// The key in JSON.
    pub key: &'static str,
    /// Whether it may be given several times: the key holds an array.
    pub many: bool,
    /// Whether its fields are options of their own, and `option` is none.
    pub spread: bool,
    /// Its fields.
    pub group: Group,
    /// The name of the struct.
    pub name: &'static str,
}

macro_rules! one {
    ($key:literal, $type:ident) => {
        Section {
            option: $key,
            key: $key,
            many: false,
            spread: false,
            group: $type::GROUP,
            name: stringify!($type),
        }
    };
}

macro_rules! many {
    ($option:literal, $key:literal, $type:ident) => {
        Section {
            option: $option,
            key: $key,
            many: true,
            spread: false,
            group: $type::GROUP,
            name: stringify!($type),
        }
    };
}

macro_rules! spread {
    ($key:literal, $type:ident) => {
        Section {
            spread: true,
            ..one!($key, $type)
        }
    };
}

/// Every section, in the order help shows them.
pub const SECTIONS: &[Section] = &[
    spread!("payload", PayloadConfig),
    one!("cpus", CpusConfig),
    one!("memory", MemoryConfig),
    many!("disk", "disks", DiskConfig),
    many!("net", "net", NetConfig),
    one!("rng", RngConfig),
    one!("serial", SerialConfig),
    one!("console", ConsoleConfig),
    many!("device", "devices", DeviceConfig),
    many!("test-device", "test_devices", TestDeviceConfig),
    many!("viommu", "viommus", ViommuConfig),
    one!("platform", PlatformConfig),
    spread!("sandbox", SandboxConfig),
    many!("landlock-rules", "landlock_rules", LandlockConfig),
];

/// A [`VmConfig`] as it grows: a JSON document and options on top of it.
#[derive(Clone, Debug, Default)]
pub struct Builder(Map<String, Value>);

impl Builder {
    /// Starts from a JSON document.
    ///
    /// # Errors
    /// Not JSON, or not by the schema.
    pub fn from_json(place: &str, text: &str) -> Result<Self, SchemaError> {
        let value: Value = serde_json::from_str(text).map_err(|why| {
            SchemaError::new(format!("{place} is not JSON ({why}); correct the file"))
        })?;
        Self::from_value(place, value)
    }

    /// Starts from a JSON document that is parsed already.
    ///
    /// # Errors
    /// It is not by the schema.
    pub fn from_value(place: &str, value: Value) -> Result<Self, SchemaError> {
        let Value::Object(mut document) = value else {
            return Err(SchemaError::new(format!(
                "{place} holds no JSON object; write {{\"payload\": {{…}}}}"
            )));
        };
        document.retain(|_, value| !value.is_null());
        for (key, value) in &document {
            let section = SECTIONS.iter().find(|s| s.key == key).ok_or_else(|| {
                let known = SECTIONS.iter().map(|s| s.key);
                schema::unknown(&format!("{place} has no key"), key, known).at("", key)
            })?;
            match (section.many, value) {
                (false, value) => section.group.check(key, value)?,
                (true, Value::Array(items)) => {
                    for (n, item) in items.iter().enumerate() {
                        section.group.check(&format!("{key}[{n}]"), item)?;
                    }
                }
                (true, other) => {
                    return Err(SchemaError::new(format!(
                        "{key} in {place} is {}; it must be an array of objects",
                        schema::short(other)
                    ))
                    .at("", key));
                }
            }
        }
        Ok(Self(document))
    }

    /// Adds `--{option} {text}`. A section that exists once is replaced, a device is added.
    ///
    /// # Errors
    /// An unknown option, or a text that is not by the schema.
    pub fn option(&mut self, option: &str, text: &str) -> Result<(), SchemaError> {
        let spread = SECTIONS.iter().filter(|s| s.spread);
        let mut fields = spread.flat_map(|s| s.group.fields.iter().map(move |f| (s.key, f)));
        if let Some((key, field)) = fields.find(|(_, field)| field.option == option) {
            let value = (field.parse)(text);
            (field.check)(&value).map_err(|_| {
                SchemaError::new(format!(
                    "--{option} {text} is wrong: it must be {}",
                    field.must
                ))
            })?;
            let group = self.0.entry(key).or_insert_with(|| Map::new().into());
            if let Value::Object(group) = group {
                group.insert(field.key.into(), value);
            }
            return Ok(());
        }
        let section = SECTIONS
            .iter()
            .find(|s| s.option == option && !s.spread)
            .ok_or_else(|| {
                let known = SECTIONS.iter().map(|s| s.option);
                schema::unknown("there is no option", option, known)
            })?;
        let value = section.group.parse(option, text)?;
        if section.many {
            let list = self
                .0
                .entry(section.key)
                .or_insert_with(|| Vec::<Value>::new().into());
            if let Value::Array(list) = list {
                list.push(value);
            }
        } else {
            self.0.insert(section.key.into(), value);
        }
        Ok(())
    }

    /// What it says of nestling itself, which is there without a VM, too.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn sandbox(&self) -> Result<(SandboxConfig, Vec<LandlockConfig>), SchemaError> {
        let wrong = |why| SchemaError::new(format!("the configuration is wrong: {why}"));
        let of = |key: &str| self.0.get(key).cloned();
        let sandbox = of("sandbox").map(serde_json::from_value).transpose();
        let rules = of("landlock_rules").map(serde_json::from_value).transpose();
        Ok((
            sandbox.map_err(wrong)?.unwrap_or_default(),
            rules.map_err(wrong)?.unwrap_or_default(),
        ))
    }

    /// The whole configuration.
    ///
    /// # Errors
    /// A required section is missing.
    pub fn build(self) -> Result<VmConfig, SchemaError> {
        if self
            .0
            .get("payload")
            .is_none_or(|p| p.get("kernel").is_none())
        {
            return Err(SchemaError::new(
                "no kernel is given; add --kernel PATH (or payload.kernel in the JSON)",
            ));
        }
        serde_json::from_value(self.0.into())
            .map_err(|why| SchemaError::new(format!("the configuration is wrong: {why}")))
    }
}

/// The most vCPUs a VM can have.
pub const MAX_VCPUS: u8 = 64;
/// The least memory a VM can have, in bytes.
pub const MIN_MEMORY: Size = Size::mib(16);
/// What `memory.size` must be a multiple of, in bytes: a huge page, so that every region of guest
/// memory can be backed by them.
pub const MEMORY_UNIT: Size = Size::mib(2);

/// The most vIOMMUs: the register pages of VT-d units have this much room, of which one is for the
/// unit that only remaps interrupts.
pub const MAX_UNITS: usize = (VTD_UNITS.len() >> 12) as usize - 1;

/// The most disks, network cards, devices of the host and DMA test engines together: the device
/// numbers of bus 0. What else is there takes some of them, which is told at the boot.
pub const MAX_DEVICES: usize = 32;
/// The most rules for paths: a descriptor is kept for each.
pub const MAX_RULES: usize = 256;

/// Which vIOMMU a device is behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Behind<'c> {
    /// None: it does DMA to guest-physical addresses.
    Nothing,
    /// The first one.
    Default,
    /// The one with this id.
    Named(&'c str),
}

impl<'c> Behind<'c> {
    /// What `iommu=` and `viommu=` say together.
    pub fn new(iommu: bool, viommu: Option<&'c str>) -> Self {
        match (viommu, iommu) {
            (Some(id), _) => Self::Named(id),
            (None, true) => Self::Default,
            (None, false) => Self::Nothing,
        }
    }
}

/// A configuration that makes sense as a whole, in which every device has a name. Only
/// [`VmConfig::validate`] makes one.
#[derive(Clone, Debug)]
pub struct Validated(VmConfig);

impl std::ops::Deref for Validated {
    type Target = VmConfig;

    fn deref(&self) -> &VmConfig {
        &self.0
    }
}

/// Why a configuration does not make sense: one sentence with the thing, the value, the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", schema::one_line(.0))]
pub struct ConfigError(String);

impl VmConfig {
    /// Checks what the schema cannot: ranges, and what must fit together.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(mut self) -> Result<Validated, ConfigError> {
        let wrong = |text: String| Err(ConfigError(text));
        if self.payload.kernel.as_os_str().is_empty() {
            return wrong("payload.kernel is empty; give the path of a bzImage or vmlinux".into());
        }
        if self.payload.cmdline.contains('\0') {
            return wrong("the kernel command line has a NUL character; remove it".into());
        }
        let cpus = self.cpus.boot_vcpus;
        if cpus == 0 || cpus > MAX_VCPUS {
            return wrong(format!(
                "cpus boot={cpus} is out of range; give 1 to {MAX_VCPUS}"
            ));
        }
        let size = self.memory.size;
        if size < MIN_MEMORY {
            return wrong(format!(
                "memory size={size} is too small; give at least {MIN_MEMORY}"
            ));
        }
        if !size.0.is_multiple_of(MEMORY_UNIT.0) {
            return wrong(format!(
                "memory size={size} is not a multiple of {MEMORY_UNIT}; give {} or {}",
                Size(size.0 / MEMORY_UNIT.0 * MEMORY_UNIT.0),
                Size(
                    (size.0 / MEMORY_UNIT.0)
                        .saturating_add(1)
                        .saturating_mul(MEMORY_UNIT.0)
                ),
            ));
        }
        self.check_counts()?;
        self.check_consoles()?;
        self.check_devices()?;
        self.check_test_devices()?;
        if self.viommus.is_empty() && self.behind().any(|b| b == Behind::Default) {
            self.viommus.push(ViommuConfig::default());
        }
        self.check_viommus()?;
        self.check_ids()?;
        if let Some(net) = self
            .net
            .iter()
            .find(|net| net.mac.is_some_and(|Mac(mac)| mac[0] & 1 != 0))
        {
            return wrong(format!(
                "net mac={} is a multicast address; clear the lowest bit of its first byte",
                net.mac.unwrap_or_default()
            ));
        }
        if let Some(net) = self
            .net
            .iter()
            .find(|net| net.tap.is_empty() || net.tap.len() > 15)
        {
            return wrong(format!(
                "net tap={} is not an interface name; give 1 to 15 characters",
                net.tap
            ));
        }
        self.give_ids();
        Ok(Validated(self))
    }

    /// Gives each device that has no name one: `_disk0`, `_net0`, `_device0`, `_test0`, and so on.
    fn give_ids(&mut self) {
        let mut taken: BTreeSet<String> = self.ids().map(str::to_owned).collect();
        let mut give = |id: &mut Option<String>, kind: &str| {
            if id.is_none() {
                let free = (0..).map(|n| format!("_{kind}{n}"));
                let mut free = free.filter(|name| !taken.contains(name));
                *id = free.next();
                taken.extend(id.clone());
            }
        };
        for disk in &mut self.disks {
            give(&mut disk.id, "disk");
        }
        for net in &mut self.net {
            give(&mut net.id, "net");
        }
        for device in &mut self.devices {
            give(&mut device.id, "device");
        }
        for device in &mut self.test_devices {
            give(&mut device.id, "test");
        }
        // And an address, locally administered, to each card, which it keeps when others go.
        let mut macs: BTreeSet<Mac> = self.net.iter().filter_map(|net| net.mac).collect();
        let mut free = (0..=u8::MAX).map(|n| Mac([0x02, b'n', b'e', b's', b't', n]));
        for net in self.net.iter_mut().filter(|net| net.mac.is_none()) {
            net.mac = free.find(|mac| macs.insert(*mac));
        }
    }

    /// The names of devices and vIOMMUs.
    fn ids(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().filter_map(|d| d.id.as_deref());
        let nets = self.net.iter().filter_map(|n| n.id.as_deref());
        let passed = self.devices.iter().filter_map(|d| d.id.as_deref());
        let tests = self.test_devices.iter().filter_map(|t| t.id.as_deref());
        let viommus = self.viommus.iter().map(|v| v.id.as_str());
        disks.chain(nets).chain(passed).chain(tests).chain(viommus)
    }

    /// Before anything that takes longer the more there are.
    fn check_counts(&self) -> Result<(), ConfigError> {
        let emulated = self.disks.len() + self.net.len() + self.test_devices.len();
        let devices = emulated + self.devices.len();
        if devices > MAX_DEVICES {
            return Err(ConfigError(format!(
                "there are {devices} disks, network cards and devices, and a PCI bus has {MAX_DEVICES} device numbers; give fewer"
            )));
        }
        let rules = self.landlock_rules.len();
        if rules > MAX_RULES {
            return Err(ConfigError(format!(
                "there are {rules} landlock_rules; give at most {MAX_RULES}, for folders that hold the rest"
            )));
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        for device in &self.devices {
            let path = device.path.display();
            if device.path.file_name().is_none() {
                return Err(ConfigError(format!(
                    "device path={path} names no device; give for example /sys/bus/pci/devices/0000:01:00.0"
                )));
            }
            if !seen.insert(device.path.components().collect::<PathBuf>()) {
                return Err(ConfigError(format!(
                    "device path={path} is given twice; give each device once"
                )));
            }
            if let Some(width) = device.dma_width
                && !(12..=64).contains(&width)
            {
                return Err(ConfigError(format!(
                    "device dma_width={width} is no width of an address; give the bits that the device can put on the bus, 12 to 64"
                )));
            }
            if let Some(offset) = device.pasid_offset
                && (!(0x100..=0xff8).contains(&offset) || offset % 4 != 0)
            {
                return Err(ConfigError(format!(
                    "device pasid_offset={offset} is no place for a capability; give a multiple of 4 from 256 to 4088"
                )));
            }
        }
        Ok(())
    }

    /// The devices that have descriptors, by name: which those are of the device and of the
    /// iommufd.
    pub fn descriptors(&self) -> impl Iterator<Item = (&str, Option<u32>, Option<u32>)> {
        let disks = self.disks.iter().map(|d| (&d.id, d.fd, None));
        let nets = self.net.iter().map(|n| (&n.id, n.fd, None));
        let passed = self.devices.iter().map(|d| (&d.id, d.fd, d.iommufd));
        let all = disks.chain(nets).chain(passed);
        all.filter(|(_, fd, iommufd)| fd.is_some() || iommufd.is_some())
            .map(|(id, fd, iommufd)| (id.as_deref().unwrap_or_default(), fd, iommufd))
    }

    fn check_test_devices(&self) -> Result<(), ConfigError> {
        for device in &self.test_devices {
            if device.pasid_bits > Pasid::BITS {
                return Err(ConfigError(format!(
                    "test-device pasid_bits={} is more than a PASID has; give 0 to {}",
                    device.pasid_bits,
                    Pasid::BITS
                )));
            }
            if device.pri && !device.ats {
                return Err(ConfigError(
                    "test-device pri=on needs ATS; give ats=on, or pri=off".into(),
                ));
            }
        }
        Ok(())
    }

    fn check_consoles(&self) -> Result<(), ConfigError> {
        let wrong = |text: &str| Err(ConfigError(text.into()));
        if self.serial.mode == SerialMode::Tty && self.console.mode == ConsoleMode::Tty {
            return wrong(
                "serial and console both want the terminal; give --serial null or --console off",
            );
        }
        if (self.serial.mode == SerialMode::File) != self.serial.file.is_some() {
            return wrong("serial has mode and file that do not agree; write --serial file=PATH");
        }
        if (self.console.mode == ConsoleMode::File) != self.console.file.is_some() {
            return wrong("console has mode and file that do not agree; write --console file=PATH");
        }
        if (self.console.mode == ConsoleMode::Socket) != self.console.socket.is_some() {
            return wrong(
                "console has mode and socket that do not agree; write --console socket=PATH",
            );
        }
        Ok(())
    }

    /// What each device that can be behind a vIOMMU says about it.
    fn behind(&self) -> impl Iterator<Item = Behind<'_>> {
        let disks = self.disks.iter().map(|d| (d.iommu, &d.viommu));
        let nets = self.net.iter().map(|n| (n.iommu, &n.viommu));
        let rng = [(self.rng.iommu, &self.rng.viommu)];
        let console = [(self.console.iommu, &self.console.viommu)];
        let passed = self.devices.iter().map(|d| (d.iommu, &d.viommu));
        let tests = self.test_devices.iter().map(|t| (t.iommu, &t.viommu));
        disks
            .chain(nets)
            .chain(rng)
            .chain(console)
            .chain(passed)
            .chain(tests)
            .map(|(iommu, viommu)| Behind::new(iommu, viommu.as_deref()))
    }

    fn check_doorbells(&self) -> Result<(), ConfigError> {
        let wrong = |unit: &ViommuConfig, text: String| {
            Err(ConfigError(format!("viommu id={} {text}", unit.id)))
        };
        let mut before: Option<&ViommuConfig> = None;
        for unit in &self.viommus {
            let at = match (unit.msi, unit.doorbell) {
                (MsiMode::Intercepted, None) => continue,
                (MsiMode::Intercepted, Some(at)) => {
                    let text = format!(
                        "has doorbell={at} and msi=intercepted, whose doorbell is fixed; leave doorbell out, or add msi=mapped"
                    );
                    return wrong(unit, text);
                }
                (MsiMode::Mapped, at) => at.unwrap_or(Address(X86_MSI.first)),
            };
            if unit.kind == ViommuKind::Vtd {
                let text = "has msi=mapped, but a VT-d unit takes interrupt messages before it translates; leave msi out, or use type=virtio";
                return wrong(unit, text.into());
            }
            let last = at.0 | (doorbell::WINDOW - 1);
            let taken = ARCHITECTURAL.iter().find(|(range, _)| {
                at.0 != X86_MSI.first && range.overlaps(Range::new(at.0.min(last), last))
            });
            if at.0 % doorbell::WINDOW != 0 || at.0 <= BOOT_AREA.last || at.0 >> 46 != 0 {
                let text =
                    format!("has doorbell={at}; give a multiple of 0x100000 from 0x1000000 to 64T");
                return wrong(unit, text);
            }
            if let Some((range, what)) = taken {
                let text = format!(
                    "has doorbell={at}, where {what} are ({range}); give another place, or 0xfee00000"
                );
                return wrong(unit, text);
            }
            if let Some(other) = before.filter(|other| other.doorbell != unit.doorbell) {
                let text = format!(
                    "has another doorbell than viommu id={}; give both the same",
                    other.id
                );
                return wrong(unit, text);
            }
            before = Some(unit);
        }
        Ok(())
    }

    /// The doorbell that guests have to map, if a vIOMMU has one.
    pub fn doorbell(&self) -> Option<Doorbell> {
        let mut mapped = self.viommus.iter().filter(|u| u.msi == MsiMode::Mapped);
        let at = mapped.next()?.doorbell.map_or(X86_MSI.first, |at| at.0);
        Some(Doorbell::Mapped(Gpa(at)))
    }

    fn check_viommus(&self) -> Result<(), ConfigError> {
        if self.viommus.len() > MAX_UNITS {
            return Err(ConfigError(format!(
                "there are {} vIOMMUs; give at most {MAX_UNITS}",
                self.viommus.len()
            )));
        }
        for unit in self.viommus.iter().filter(|u| u.kind == ViommuKind::Virtio) {
            let of_vtd = [
                ("mode", unit.mode.is_some()),
                ("address_width", unit.address_width.is_some()),
                ("pasid_bits", unit.pasid_bits.is_some()),
                ("interrupt_remapping", unit.interrupt_remapping),
                ("nested", unit.nested),
                ("vcmd", unit.vcmd),
            ];
            if let Some((option, _)) = of_vtd.iter().find(|(_, given)| *given) {
                return Err(ConfigError(format!(
                    "viommu id={} has type=virtio, which has no {option}; leave it out, or use type=vtd",
                    unit.id
                )));
            }
        }
        let tables = |unit: &&ViommuConfig| unit.kind == ViommuKind::Vtd && unit.attach_table;
        if let Some(unit) = self.viommus.iter().find(tables) {
            return Err(ConfigError(format!(
                "viommu id={} has type=vtd, whose tables are always the guest's own; leave out attach_table, or use type=virtio",
                unit.id
            )));
        }
        let no_pasids = |unit: &&ViommuConfig| {
            unit.mode == Some(UnitMode::Legacy) || unit.pasid_bits == Some(0)
        };
        if let Some(unit) = self.viommus.iter().filter(|unit| unit.vcmd).find(no_pasids) {
            return Err(ConfigError(format!(
                "viommu id={} has vcmd=on but no PASIDs; leave out mode=legacy and pasid_bits=0, or vcmd",
                unit.id
            )));
        }
        self.check_doorbells()?;
        for behind in self.behind() {
            if let Behind::Named(id) = behind
                && self.viommus.iter().all(|unit| unit.id != id)
            {
                return Err(ConfigError(format!(
                    "viommu={id} names no vIOMMU; add --viommu id={id}, or use iommu=on"
                )));
            }
        }
        Ok(())
    }

    fn check_ids(&self) -> Result<(), ConfigError> {
        let mut seen = BTreeSet::new();
        for id in self.ids() {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-.".contains(&b);
            if id.is_empty() || id.len() > 64 || !id.bytes().all(plain) || id.starts_with("__") {
                return Err(ConfigError(format!(
                    "id={id} is not an identifier; use up to 64 letters, digits, '-', '_' or '.', not starting with \"__\""
                )));
            }
            if !seen.insert(id) {
                return Err(ConfigError(format!(
                    "id={id} is given twice; give each device and vIOMMU its own"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
