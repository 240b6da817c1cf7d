//! The host's PASIDs, for the virtual commands of a VM's VT-d units (`vcmd=on`).
//!
//! The units are made before it is known how narrow their narrowest device is, and the host is
//! asked once it is: still before the first vCPU runs, so that a host that has no PASID for this
//! VM refuses it, and no guest ever finds virtual commands that cannot work.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use viommu::Pasid;
use viommu::pasid::{Config, Error, HostPasids, PasidAllocator};

use super::observed::Told;
use super::viommus::ViommuError;
use crate::config::PlatformConfig;
use crate::control::Event;

/// Bits of the PASIDs that guests get. Linux up to 6.3, the guest that has virtual commands, keeps
/// 16 bits of the number in its command to free one: wider ones would never come back.
const BITS: u8 = 16;

/// All units of a VM share one.
#[derive(Debug)]
pub(super) struct VmPasids {
    platform: PlatformConfig,
    told: Told,
    /// Bits of PASID of the narrowest device that has any.
    bits: AtomicU8,
    host: OnceLock<HostPasids>,
}

impl VmPasids {
    /// The host is not asked yet.
    pub(super) fn new(platform: &PlatformConfig, told: &Told) -> Self {
        Self {
            platform: platform.clone(),
            told: told.clone(),
            bits: AtomicU8::new(BITS),
            host: OnceLock::new(),
        }
    }

    /// A device has `bits` bits of PASID; 0: it uses none.
    ///
    /// # Errors
    /// The guest may have been given wider ones already.
    pub(super) fn limit(&self, bits: u8) -> Result<(), ViommuError> {
        let offered = self.bits.load(Ordering::Relaxed);
        if bits == 0 || bits >= offered {
            return Ok(());
        }
        if self.host.get().is_some() {
            return Err(ViommuError::FewPasids { has: bits, offered });
        }
        self.bits.store(bits, Ordering::Relaxed);
        Ok(())
    }

    /// Asks the host, for PASIDs that every device and every unit (`bits`) can use.
    pub(super) fn open(&self, bits: u8) -> Result<(), Error> {
        self.bits.fetch_min(bits, Ordering::Relaxed);
        let config = Config {
            quota: self.platform.pasid_quota,
            ..Config::new(&self.platform.name, self.bits.load(Ordering::Relaxed))
        };
        let host = HostPasids::open(&self.platform.pasid_directory, config)?;
        // Opened once; were it not, the first stays and this one's PASIDs are free again.
        self.host.get_or_init(|| host);
        Ok(())
    }

    fn host(&self) -> Result<&HostPasids, Error> {
        // Nobody runs who could ask before the host was.
        self.host.get().ok_or(Error::Quota { quota: 0 })
    }
}

impl PasidAllocator for VmPasids {
    fn allocate(&self) -> Result<Pasid, Error> {
        let host = self.host()?;
        let allocated = host.allocate();
        if allocated.is_err()
            && let Some(events) = self.told.get()
        {
            let owned = host.counts().owned;
            events.emit(Event::PasidExhausted { owned });
        }
        allocated
    }

    fn free(&self, pasid: Pasid) -> Result<(), Error> {
        self.host()?.free(pasid)
    }

    fn free_all(&self) {
        if let Ok(host) = self.host() {
            host.free_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::control::Events;

    #[test]
    fn a_vm_without_the_directory_is_refused_before_it_starts() {
        let platform = PlatformConfig {
            pasid_directory: "/no/such".into(),
            ..PlatformConfig::default()
        };
        let pasids = VmPasids::new(&platform, &Told::default());
        assert!(matches!(pasids.open(20), Err(Error::NoDirectory(_))));
        assert!(pasids.allocate().is_err());
    }

    #[test]
    fn pasids_fit_the_narrowest_device_and_the_quota() {
        let directory = std::env::temp_dir().join(format!("vm-pasids-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let platform = PlatformConfig {
            pasid_directory: directory.clone(),
            pasid_quota: 5,
            ..PlatformConfig::default()
        };
        let told = Told::default();
        let events = Arc::new(Events::default());
        told.set(events.clone()).unwrap();
        let pasids = VmPasids::new(&platform, &told);
        for bits in [20, 0, 8] {
            pasids.limit(bits).unwrap();
        }
        pasids.open(16).unwrap();
        pasids.limit(8).unwrap();
        let late = pasids.limit(7).unwrap_err();
        assert!(late.to_string().contains("7 bits"), "{late}");
        let got: Vec<_> = std::iter::from_fn(|| pasids.allocate().ok()).collect();
        assert_eq!(got.len(), 5);
        assert!(got.iter().all(|pasid| (1..256).contains(&pasid.0)));
        let told = |event: &Event| {
            let told = events.after(0).records;
            told.iter().filter(|record| record.event == *event).count()
        };
        let exhausted = Event::PasidExhausted { owned: 5 };
        assert_eq!(told(&exhausted), 1, "who follows the events is told");
        pasids.free(got[0]).unwrap();
        pasids.allocate().unwrap();
        assert_eq!(told(&exhausted), 1);
        drop(pasids);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
