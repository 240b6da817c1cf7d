//! Devices that come to a configuration, and go from it.

use std::path::{Path, PathBuf};

use super::{Validated, VmConfig};
use crate::control::{ApiError, Code, NewDevice};

impl Validated {
    /// This configuration with one device more, and that device with its name.
    ///
    /// # Errors
    /// Its name or its path is taken, or the whole does not make sense.
    pub fn plus(&self, device: NewDevice) -> Result<(Self, NewDevice), ApiError> {
        let id = device.id();
        if !id.is_empty() && self.ids().any(|taken| taken == id) {
            return Err(ApiError::new(
                Code::IdInUse,
                format!("id={id} is the name of another device or vIOMMU of the VM"),
            )
            .field("id")
            .remedy("give the device another name, or none"));
        }
        let mut config: VmConfig = (**self).clone();
        let whole = |path: &Path| path.components().collect::<PathBuf>();
        match &device {
            NewDevice::Disk(disk) => config.disks.push(disk.clone()),
            NewDevice::Net(net) => config.net.push(net.clone()),
            NewDevice::Device(device) => {
                let same = |d: &&super::DeviceConfig| whole(&d.path) == whole(&device.path);
                if let Some(there) = self.devices.iter().find(same) {
                    return Err(ApiError::new(
                        Code::DeviceInUse,
                        format!(
                            "device path={} is in the VM already, with id={}",
                            device.path.display(),
                            there.id.as_deref().unwrap_or_default()
                        ),
                    )
                    .field("path")
                    .remedy("remove it first (vm.remove-device)"));
                }
                config.devices.push(device.clone());
            }
            NewDevice::Test(device) => config.test_devices.push(device.clone()),
        }
        let config = config
            .validate()
            .map_err(|why| ApiError::from_error(Code::InvalidConfig, &why))?;
        let named = match device {
            NewDevice::Disk(new) => NewDevice::Disk(config.disks.last().cloned().unwrap_or(new)),
            NewDevice::Net(new) => NewDevice::Net(config.net.last().cloned().unwrap_or(new)),
            NewDevice::Device(new) => {
                NewDevice::Device(config.devices.last().cloned().unwrap_or(new))
            }
            NewDevice::Test(new) => {
                NewDevice::Test(config.test_devices.last().cloned().unwrap_or(new))
            }
        };
        Ok((config, named))
    }

    /// Takes the device of this name away; whether it was there. What is left makes sense.
    pub fn minus(&mut self, id: &str) -> bool {
        fn drop_from<T>(list: &mut Vec<T>, is: impl Fn(&T) -> bool) -> bool {
            let before = list.len();
            list.retain(|one| !is(one));
            list.len() < before
        }
        let id = Some(id);
        let config = &mut self.0;
        drop_from(&mut config.disks, |d| d.id.as_deref() == id)
            || drop_from(&mut config.net, |n| n.id.as_deref() == id)
            || drop_from(&mut config.devices, |d| d.id.as_deref() == id)
            || drop_from(&mut config.test_devices, |t| t.id.as_deref() == id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DeviceConfig, DiskConfig};

    fn base() -> Validated {
        let mut config = VmConfig::default();
        config.payload.kernel = "kernel".into();
        config.disks.push(DiskConfig {
            path: "a".into(),
            ..DiskConfig::default()
        });
        config.devices.push(DeviceConfig {
            path: "/sys/bus/pci/devices/0000:01:00.0".into(),
            id: Some("nvme".into()),
            ..DeviceConfig::default()
        });
        config.validate().unwrap()
    }

    fn disk(id: Option<&str>) -> NewDevice {
        NewDevice::Disk(DiskConfig {
            path: "b".into(),
            id: id.map(str::to_owned),
            ..DiskConfig::default()
        })
    }

    #[test]
    fn every_device_has_a_name_and_a_name_that_went_is_free_again() {
        let first = base();
        assert_eq!(first.disks[0].id.as_deref(), Some("_disk0"));
        let (mut second, added) = first.plus(disk(None)).unwrap();
        assert_eq!(added.id(), "_disk1");
        assert!(second.minus("_disk0"));
        assert!(!second.minus("_disk0"));
        let (third, added) = second.plus(disk(None)).unwrap();
        assert_eq!(added.id(), "_disk0");
        assert_eq!(third.disks.len(), 2);
    }

    #[test]
    fn names_and_devices_that_are_taken_are_refused() {
        let config = base();
        assert_eq!(
            config.plus(disk(Some("nvme"))).unwrap_err().code,
            Code::IdInUse
        );
        let again = NewDevice::Device(DeviceConfig {
            path: "/sys/bus/pci/devices//0000:01:00.0/".into(),
            ..DeviceConfig::default()
        });
        assert_eq!(config.plus(again).unwrap_err().code, Code::DeviceInUse);
        let bad = config.plus(disk(Some("no spaces"))).unwrap_err();
        assert_eq!(bad.code, Code::InvalidConfig);
    }
}
