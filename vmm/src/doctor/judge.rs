//! What each device can be used for, and why not.

use super::devices::{PciDevice, is_vfio};
use super::{Finding, Iommu, Model};

/// What the host as a whole has to say about a device.
pub(super) struct Host {
    pub iommufd: Finding,
    /// The kernel has iommufd and makes VFIO's devices for it, whoever may open them.
    pub has_cdevs: bool,
    /// The kernel has VFIO's older container.
    pub container: bool,
    pub cmdline: String,
    /// `iommufd.allow_unsafe_interrupts`
    pub unsafe_interrupts: bool,
}

/// Fills in the device's modes. The first question is whether it can be opened at all; the others
/// come down to it where it cannot.
pub(super) fn modes(mut device: PciDevice, iommus: &[Iommu], host: &Host) -> PciDevice {
    let iommu = iommus
        .iter()
        .find(|iommu| Some(&iommu.name) == device.iommu.as_ref());
    let model = iommu.map(|iommu| &iommu.model);
    let passthrough = passthrough(&device, iommu, host);
    let with_iommufd = match (&passthrough.ok, &device.cdev) {
        (false, _) => passthrough.clone(),
        (true, _) if !host.iommufd.ok => host.iommufd.clone(),
        (true, Some(cdev)) if !cdev.ok => cdev.clone(),
        (true, Some(_)) => Finding::yes("through iommufd"),
        (true, None) => Finding::no(
            "the kernel makes no VFIO character devices",
            "use a kernel with CONFIG_VFIO_DEVICE_CDEV (Linux 6.6 or later)",
        ),
    };
    let and = |more: &dyn Fn() -> Finding| {
        if with_iommufd.ok {
            more()
        } else {
            with_iommufd.clone()
        }
    };
    let nested = || nested(model, &host.cmdline);
    let if_nested = |more: fn(&PciDevice, Option<&Model>) -> Finding| {
        let nested = nested();
        if nested.ok {
            more(&device, model)
        } else {
            nested
        }
    };
    // What nestling falls back to where the kernel lacks the way through iommufd.
    let itself = match passthrough.ok && !with_iommufd.ok {
        false => passthrough.clone(),
        true if !host.has_cdevs && host.container => Finding::yes(format!(
            "by its group, with all of the guest's memory in its reach ({})",
            with_iommufd.what
        )),
        true => with_iommufd.clone(),
    };
    let modes = [
        ("device", itself),
        (
            "viommu=virtio",
            and(&|| Finding::yes("each guest mapping is mapped on the host")),
        ),
        (
            "viommu=vtd",
            and(&|| {
                let nested = nested();
                if nested.ok {
                    nested
                } else {
                    Finding::yes(format!(
                        "second-stage tables only, mirrored on each change ({})",
                        nested.what
                    ))
                }
            }),
        ),
        ("nested", and(&nested)),
        ("pasid", and(&|| if_nested(pasid))),
        ("page-requests", and(&|| if_nested(page_requests))),
    ];
    device.modes = modes.into();
    device
}

/// Whether tables of a guest run in the hardware.
fn nested(model: Option<&Model>, cmdline: &str) -> Finding {
    let scalable_off = cmdline
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("intel_iommu="))
        .any(|value| value.split(',').any(|word| word == "sm_off"));
    match model {
        Some(Model::Vtd { nesting: true, .. }) if scalable_off => Finding::no(
            "the IOMMU can nest, but scalable mode is switched off",
            "remove sm_off from intel_iommu= on the kernel's command line",
        ),
        Some(Model::Vtd { nesting: true, .. }) => {
            Finding::yes("the guest's own tables run in hardware")
        }
        Some(Model::Vtd {
            scalable_mode: false,
            ..
        }) => Finding::never("this VT-d unit has no scalable mode (ECAP.SMTS)"),
        Some(Model::Vtd { .. }) => {
            Finding::never("this VT-d unit has no nested translation (ECAP.NEST)")
        }
        Some(Model::Amd { .. }) => {
            Finding::never("guests' tables in VT-d's format do not run on AMD-Vi")
        }
        _ => Finding::never("this IOMMU has no nested translation"),
    }
}

/// PASIDs, where guests' tables run in the hardware.
fn pasid(device: &PciDevice, model: Option<&Model>) -> Finding {
    match (model, device.pasid_bits) {
        (Some(Model::Vtd { pasid_bits: 0, .. }), _) => {
            Finding::never("this VT-d unit has no PASIDs (ECAP.PASID)")
        }
        (Some(Model::Vtd { .. }), None) => Finding::no(
            "its PASID capability cannot be read by this user",
            "run nestling doctor as root",
        ),
        (Some(Model::Vtd { .. }), Some(0)) if device.virtual_function => {
            Finding::yes("a virtual function: as many bits as its physical function has")
        }
        (Some(Model::Vtd { .. }), Some(0)) => Finding::never("the device has no PASID capability"),
        (Some(Model::Vtd { pasid_bits, .. }), Some(bits)) => {
            Finding::yes(format!("{} bits", bits.min(*pasid_bits)))
        }
        _ => Finding::never("PASIDs need a VT-d unit in scalable mode"),
    }
}

/// Page requests, in the same case.
fn page_requests(device: &PciDevice, model: Option<&Model>) -> Finding {
    match (model, device.pri) {
        (
            Some(Model::Vtd {
                page_requests: false,
                ..
            }),
            _,
        ) => Finding::never("this VT-d unit delivers no page requests (ECAP.PRS, PDS)"),
        (Some(Model::Vtd { .. }), None) => Finding::no(
            "its PRI capability cannot be read by this user",
            "run nestling doctor as root",
        ),
        (Some(Model::Vtd { .. }), _) if device.virtual_function => {
            Finding::never("virtual functions have no page requests of their own")
        }
        (Some(Model::Vtd { .. }), Some(true)) if device.ats == Some(true) => {
            Finding::yes("delivered to the guest")
        }
        (Some(Model::Vtd { .. }), _) => {
            Finding::never("the device has no PRI capability, or no ATS")
        }
        _ => Finding::never("page requests need a VT-d unit in scalable mode"),
    }
}

/// Whether the device can be given to a guest at all.
fn passthrough(device: &PciDevice, iommu: Option<&Iommu>, host: &Host) -> Finding {
    let address = &device.address;
    if device.group.is_none() {
        return Finding::no(
            "it stands behind no IOMMU",
            "enable VT-d (or AMD-Vi) in the firmware, and boot with intel_iommu=on",
        );
    }
    if let Some(region) = device
        .reserved
        .iter()
        .find(|region| region.kind == "direct")
    {
        return Finding::never(format!(
            "the firmware reserves {:#x} to {:#x} for it (RMRR), so the kernel keeps it",
            region.first, region.last
        ));
    }
    match device.driver.as_deref() {
        Some(driver) if is_vfio(driver) => {}
        driver => {
            let what = driver.map_or_else(
                || "no driver has it".to_owned(),
                |driver| format!("the host's driver {driver} has it"),
            );
            let unbind = if driver.is_some() {
                format!(" && echo {address} > /sys/bus/pci/devices/{address}/driver/unbind")
            } else {
                String::new()
            };
            return Finding::no(
                what,
                format!(
                    "modprobe vfio-pci && echo vfio-pci > /sys/bus/pci/devices/{address}/driver_override{unbind} && echo {address} > /sys/bus/pci/drivers_probe"
                ),
            );
        }
    }
    if let Some(other) = device.members.iter().find(|member| member.in_the_way) {
        return Finding::no(
            format!(
                "its group has {} too, which the host's driver {} has",
                other.address,
                other.driver.as_deref().unwrap_or("?")
            ),
            format!(
                "bind {0} to vfio-pci as well: echo vfio-pci > /sys/bus/pci/devices/{0}/driver_override && echo {0} > /sys/bus/pci/devices/{0}/driver/unbind && echo {0} > /sys/bus/pci/drivers_probe",
                other.address
            ),
        );
    }
    if let Some(Model::Vtd {
        interrupt_remapping: false,
        ..
    }) = iommu.map(|iommu| &iommu.model)
        && !host.unsafe_interrupts
    {
        return Finding::no(
            "its IOMMU does not remap interrupts, so a guest could raise the host's",
            "if the guest is trusted: modprobe iommufd allow_unsafe_interrupts=1",
        );
    }
    Finding::yes("bound to VFIO, with its group")
}
