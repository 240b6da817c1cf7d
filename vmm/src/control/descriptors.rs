//! Descriptors that somebody opened for nestling: a disk, a tap, a device of the host, its iommufd.
//!
//! They are kept by the name of their device for as long as it is in the configuration, so that a
//! reboot finds them, and closed with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What came with a request to add a device. What is not used is closed.
#[derive(Debug, Default)]
pub struct Given {
    /// The device.
    pub device: Option<OwnedFd>,
    /// An open `/dev/iommu`, for a device of the host.
    pub iommufd: Option<OwnedFd>,
}

impl Given {
    /// Whether there is anything.
    pub fn is_empty(&self) -> bool {
        self.device.is_none() && self.iommufd.is_none()
    }
}

/// All that are kept. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    devices: BTreeMap<String, Device>,
    iommufd: Option<OwnedFd>,
    /// The devices that the iommufd is kept for, also those that are opened by their paths.
    of_iommufd: BTreeSet<String>,
}

#[derive(Debug)]
struct Device {
    descriptor: OwnedFd,
    /// Its number in the iommufd, once it is bound: that is done once for a descriptor.
    bound: Option<u32>,
}

impl Descriptors {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what was given for the device `id`. An iommufd that is there already stays.
    pub fn keep(&self, id: &str, given: Given) {
        let mut kept = self.kept();
        if let Some(descriptor) = given.device {
            let device = Device {
                descriptor,
                bound: None,
            };
            kept.devices.insert(id.to_owned(), device);
        }
        if given.iommufd.is_some() {
            kept.of_iommufd.insert(id.to_owned());
        }
        if kept.iommufd.is_none() {
            kept.iommufd = given.iommufd;
        }
    }

    /// Closes all but those of `ids`; the iommufd goes with the last.
    pub fn retain(&self, ids: &BTreeSet<&str>) {
        let mut kept = self.kept();
        kept.devices.retain(|id, _| ids.contains(id.as_str()));
        kept.of_iommufd.retain(|id| ids.contains(id.as_str()));
        if kept.of_iommufd.is_empty() {
            kept.iommufd = None;
        }
    }

    /// A copy of the descriptor of the device `id`.
    ///
    /// # Errors
    /// No descriptor is left, or none was given.
    pub fn of(&self, id: &str) -> io::Result<OwnedFd> {
        match self.kept().devices.get(id) {
            Some(device) => device.descriptor.as_fd().try_clone_to_owned(),
            None => Err(io::Error::other(
                "its descriptor did not come with the request",
            )),
        }
    }

    /// The number of the device `id` in the iommufd, if it is bound.
    pub fn bound(&self, id: &str) -> Option<u32> {
        self.kept().devices.get(id)?.bound
    }

    /// The device `id` is bound to `iommufd`, which is kept.
    pub fn bind(&self, id: &str, number: u32, iommufd: impl AsFd) -> io::Result<()> {
        let copy = iommufd.as_fd().try_clone_to_owned()?;
        let mut kept = self.kept();
        if let Some(device) = kept.devices.get_mut(id) {
            device.bound = Some(number);
            kept.of_iommufd.insert(id.to_owned());
        }
        // Whatever was given, this is what it needs from now on.
        kept.iommufd = Some(copy);
        Ok(())
    }

    /// A copy of the iommufd that was given, or that devices are bound to.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn iommufd(&self) -> io::Result<Option<OwnedFd>> {
        let kept = self.kept();
        let copy = kept
            .iommufd
            .as_ref()
            .map(|fd| fd.as_fd().try_clone_to_owned());
        copy.transpose()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn given() -> Given {
        Given {
            device: Some(File::open("/dev/null").unwrap().into()),
            iommufd: Some(File::open("/dev/zero").unwrap().into()),
        }
    }

    #[test]
    fn a_descriptor_lives_as_long_as_its_device_and_the_iommufd_as_the_last() {
        let all = Descriptors::default();
        all.keep("a", given());
        all.keep("b", given());
        let disk = Given {
            iommufd: None,
            ..given()
        };
        all.keep("disk", disk);
        assert!(all.of("a").is_ok() && all.of("c").is_err());
        all.bind("a", 7, File::open("/dev/zero").unwrap()).unwrap();
        assert_eq!((all.bound("a"), all.bound("b")), (Some(7), None));
        all.retain(&BTreeSet::from(["b", "disk", "x"]));
        assert!(all.of("a").is_err() && all.of("b").is_ok());
        assert!(all.iommufd().unwrap().is_some());
        all.retain(&BTreeSet::from(["disk"]));
        assert!(all.iommufd().unwrap().is_none() && all.of("disk").is_ok());
        all.retain(&BTreeSet::new());
        // An iommufd by itself: its device is opened by its path.
        let iommufd = Given {
            device: None,
            ..given()
        };
        all.keep("path", iommufd);
        all.retain(&BTreeSet::from(["path"]));
        assert!(all.iommufd().unwrap().is_some());
        all.retain(&BTreeSet::new());
        assert!(all.iommufd().unwrap().is_none());
        // A name that is used again inherits nothing.
        all.keep("a", given());
        assert_eq!(all.bound("a"), None);
    }
}
