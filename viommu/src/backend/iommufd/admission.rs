//! Which devices can be in this VM: what their IOMMU can do, which parent they get, where they
//! reserve addresses. All of it is known before the guest starts, or the hot-plug is refused.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, Weak};

use super::faults::{Faults, Reader};
use super::host::{Device, Endpoint, HostIommu, lock};
use super::hwinfo::{self, HwInfo, HwModel};
use super::object::{FaultQueue, Hwpt, Paging};
use super::parent::Parent;
use crate::Rid;
use crate::backend::Capabilities;
use crate::reserved::{Kind, Region, Regions, X86_MSI};

/// Why a device or its memory cannot be used. Found before the guest starts, or at hot-plug.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// The kernel refused.
    #[error("{call} for {object} failed; see the kernel's log of the host")]
    Host {
        /// The call, by the kernel's name.
        call: &'static str,
        /// For what.
        object: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Pinning guest memory went over the limit.
    #[error("{object} cannot be locked in memory; raise the limit (ulimit -l, LimitMEMLOCK=)")]
    LockedMemory {
        /// What was to be pinned.
        object: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A reserved region of a device is where guest memory is.
    #[error(
        "device {0} reserves addresses where guest RAM is; give the VM the layout that avoids them (nestling doctor lists them)"
    )]
    ReservedByDevice(Rid),
    /// The host's IOMMU would let guest memory hide the doorbell.
    #[error(
        "device {endpoint}: the host's IOMMU does not keep {doorbell} out of guest memory, so its interrupts would be lost; boot the host with interrupt remapping (intremap=on)"
    )]
    Doorbell {
        /// Which device.
        endpoint: Rid,
        /// Its doorbell.
        doorbell: Region,
    },
    /// Device memory was to go where a device has a reserved region.
    #[error("{0} is kept by a device; place the BAR elsewhere")]
    Reserved(Region),
    /// The device is there already.
    #[error("endpoint {0} has a device already; remove it first")]
    Known(Rid),
    /// A vIOMMU stands before a device that the host's IOMMU cannot keep apart from this one.
    #[error(
        "device {endpoint} is in the IOMMU group of {other}, which is behind a vIOMMU, and the host translates for a group alike; give the VM one of them, or put neither behind a vIOMMU"
    )]
    SharesGroup {
        /// The new device.
        endpoint: Rid,
        /// The one that is behind it.
        other: Rid,
    },
    /// The VM promised its guest more than this device has.
    #[error(
        "device {endpoint} has {what} = {has}, but the running guest was offered {offered}; restart the VM with this device present, or with {what}={has}"
    )]
    Short {
        /// Which device.
        endpoint: Rid,
        /// The field of [`Capabilities`].
        what: &'static str,
        /// What the guest was offered.
        offered: String,
        /// What the device has.
        has: String,
    },
}

impl Unfit {
    pub(super) fn host(call: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Self::Host {
            call,
            object: object.into(),
            source,
        }
    }

    pub(super) fn mapping(call: &'static str, object: String, source: io::Error) -> Self {
        if source.raw_os_error() == Some(libc::ENOMEM) {
            Self::LockedMemory { object, source }
        } else {
            Self::host(call, object, source)
        }
    }
}

impl HostIommu {
    /// Adds a bound device. Nothing is in force for it until it is claimed and applied to.
    ///
    /// The device must not be able to do DMA during this call (PCI: bus mastering off, as VFIO
    /// leaves a device that it has just opened): it is attached to guest memory for a moment.
    ///
    /// # Errors
    /// Why this device cannot be in this VM.
    pub fn add_device(&self, rid: Rid, device: Device) -> Result<(), Unfit> {
        // One admission at a time; what runs is not held up by it.
        let _admission = lock(&self.admission);
        if self.endpoint(rid).is_ok() {
            return Err(Unfit::Known(rid));
        }
        if let Some(other) = self.shares_group(rid, device.group, Endpoint::is_behind_viommu) {
            return Err(Unfit::SharesGroup {
                endpoint: rid,
                other,
            });
        }
        let info = self
            .kernel
            .hw_info(device.id)
            .map_err(|e| Unfit::host("IOMMU_GET_HW_INFO", rid.to_string(), e))?;
        let parent = self.parent_for(rid, &device, &info)?;
        // The parent is in force now; reserved regions can be read.
        let usable = self.memory.ioas().usable();
        device.attach.detach(None).map_err(|e| {
            // It still reaches guest memory until it is closed.
            device.attach.stop();
            Unfit::host("VFIO_DEVICE_DETACH_IOMMUFD_PT", rid.to_string(), e)
        })?;
        let usable =
            usable.map_err(|e| Unfit::host("IOMMU_IOAS_IOVA_RANGES", rid.to_string(), e))?;
        let width = address_width(&info, &usable, parent.kind());
        let parent = Parent::enforced(parent, rid, &info.model, &usable)?;
        let kind = parent.table().kind();

        let mut capabilities = hwinfo::capabilities(&info.model, width);
        if !kind.nest_parent {
            // The hardware could, but this kernel does not (VT-d's scalable mode switched off).
            capabilities = Capabilities {
                stage1: false,
                stage1_57: false,
                stage1_1g: false,
                sre: false,
                eafe: false,
                page_requests: false,
                ..capabilities
            };
        }
        let pasid_bits = if kind.pasid {
            info.pasid_bits
        } else {
            capabilities.pasid_bits = 0;
            0
        };
        if let Some(offered) = *lock(&self.frozen) {
            meets(rid, &offered, &capabilities)?;
        }
        let page_requests = device.page_requests && capabilities.page_requests;
        if page_requests {
            self.start_page_requests()?;
        }
        let mut reserved = Regions::outside(&usable);
        reserved.insert(X86_MSI.first, X86_MSI.last, X86_MSI.kind);
        // And what no address of this device reaches.
        reserved.insert(1 << width, u64::MAX, Kind::Reserved);
        self.memory.reserve(&reserved);
        let endpoint = Endpoint {
            rid,
            device,
            info,
            parent,
            capabilities,
            pasid_bits,
            page_requests,
            state: Mutex::default(),
        };
        self.endpoints_mut().insert(rid, Arc::new(endpoint));
        Ok(())
    }

    /// Attaches `device` to a parent that its IOMMU is compatible with, and returns that.
    fn parent_for(&self, rid: Rid, device: &Device, info: &HwInfo) -> Result<Arc<Hwpt>, Unfit> {
        let attach =
            |parent: &Arc<Hwpt>| self.while_in_reset(|| device.attach.attach(None, parent.id()));
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(libc::EADDRINUSE) => Unfit::ReservedByDevice(rid),
            _ => Unfit::host("VFIO_DEVICE_ATTACH_IOMMUFD_PT", rid.to_string(), error),
        };
        let mut parents = lock(&self.parents);
        parents.retain(|parent| parent.strong_count() > 0);
        let kinds = kinds(info);
        for parent in parents.iter().filter_map(Weak::upgrade) {
            // Not one that has less than this device could have.
            if parent.kind() != kinds[0] {
                continue;
            }
            match attach(&parent) {
                Ok(()) => return Ok(parent),
                // Not compatible with this device's IOMMU: another parent, on the same IOAS.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let mut refusal = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        for kind in kinds {
            match Hwpt::paging(self.kernel.clone(), device.id, self.memory.ioas(), kind) {
                Ok(parent) => {
                    let parent = Arc::new(parent);
                    attach(&parent).map_err(failed)?;
                    parents.push(Arc::downgrade(&parent));
                    return Ok(parent);
                }
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => refusal = error,
                Err(error) => {
                    refusal = error;
                    break;
                }
            }
        }
        // It is the first table that pins what the address space has.
        let object = match refusal.raw_os_error() {
            Some(libc::ENOMEM) => format!("guest memory, for {rid},"),
            _ => rid.to_string(),
        };
        Err(Unfit::mapping("IOMMU_HWPT_ALLOC", object, refusal))
    }

    fn start_page_requests(&self) -> Result<(), Unfit> {
        let mut faults = lock(&self.faults);
        if faults.is_some() {
            return Ok(());
        }
        let failed = |e| Unfit::host("IOMMU_FAULT_QUEUE_ALLOC", "page requests", e);
        let queue = Arc::new(FaultQueue::new(self.kernel.clone()).map_err(failed)?);
        let new = Arc::new(Faults::new(queue));
        *lock(&self.reader) = Some(Reader::start(new.clone()).map_err(failed)?);
        *faults = Some(new);
        Ok(())
    }
}

/// The kinds of parent to try for a device, best first.
fn kinds(info: &HwInfo) -> [Paging; 4] {
    let full = Paging {
        nest_parent: matches!(info.model, HwModel::Vtd(unit) if unit.can_nest()),
        dirty: info.dirty_tracking(),
        pasid: info.pasid_bits != 0,
    };
    let flat = Paging {
        nest_parent: false,
        ..full
    };
    let alone = Paging {
        pasid: false,
        ..flat
    };
    let plain = Paging {
        dirty: false,
        ..alone
    };
    [full, flat, alone, plain]
}

/// Bits of address that the device has: what the kernel lets be mapped, and the unit's own word.
fn address_width(info: &HwInfo, usable: &[(u64, u64)], parent: Paging) -> u8 {
    let last = usable.last().map_or(0, |&(_, last)| last);
    let bits = match last.checked_add(1) {
        Some(end) if end > 1 => end.ilog2() as u8,
        Some(_) => 0,
        None => 64,
    };
    match info.model {
        // A domain's table is no nest parent, so without dirty tracking the kernel gives it
        // first-stage format, whose lower half has one bit less.
        HwModel::Vtd(unit) if parent.nest_parent && !parent.dirty => {
            bits.min(unit.mgaw().min(48) - 1)
        }
        HwModel::Vtd(unit) => bits.min(unit.mgaw()),
        HwModel::Other(_) => bits,
    }
    .min(57)
}

/// Whether a device with `has` can be put behind a unit that offered `offered`.
fn meets(endpoint: Rid, offered: &Capabilities, has: &Capabilities) -> Result<(), Unfit> {
    let short = |what, offered: &dyn fmt::Display, has: &dyn fmt::Display| Unfit::Short {
        endpoint,
        what,
        offered: offered.to_string(),
        has: has.to_string(),
    };
    let flags = [
        ("stage1", offered.stage1, has.stage1),
        ("stage1_57", offered.stage1_57, has.stage1_57),
        ("stage1_1g", offered.stage1_1g, has.stage1_1g),
        ("sre", offered.sre, has.sre),
        ("eafe", offered.eafe, has.eafe),
        ("nested", offered.nested, has.nested),
        ("page_requests", offered.page_requests, has.page_requests),
        ("snoop_control", offered.snoop_control, has.snoop_control),
    ];
    for (what, offered, has) in flags {
        if offered && !has {
            return Err(short(what, &offered, &has));
        }
    }
    let numbers = [
        ("pasid_bits", offered.pasid_bits, has.pasid_bits),
        ("address_width", offered.address_width, has.address_width),
    ];
    for (what, offered, has) in numbers {
        if offered > has {
            return Err(short(what, &offered, &has));
        }
    }
    Ok(())
}
