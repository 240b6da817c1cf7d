//! Keys of Cloud Hypervisor's API that nestling does not have.
//!
//! Its clients send every field of a configuration, also those that nobody set. A field that
//! nestling does not have is let pass when it is null or has the value that asks for nothing; with
//! any other value it is refused by name, since to ignore it would be to break a promise.

use serde_json::{Map, Value};
use vmm::config::SECTIONS;
use vmm::control::{ApiError, Code};

/// A key, and what of its values asks for nothing beside null, in JSON.
type Known = (&'static str, &'static [&'static str]);

/// By the key that the group has in a VM's configuration.
const GROUPS: &[(&str, &[Known])] = &[
    (
        "payload",
        &[("firmware", &[]), ("igvm", &[]), ("host_data", &[])],
    ),
    (
        "cpus",
        &[
            ("topology", &[]),
            ("kvm_hyperv", &["false"]),
            ("max_phys_bits", &["46"]),
            ("nested", &["true"]),
            ("affinity", &[]),
            ("features", &["{}", r#"{"amx":false}"#]),
            ("core_scheduling", &[r#""Vm""#]),
        ],
    ),
    (
        "memory",
        &[
            ("mergeable", &["false"]),
            ("hotplug_method", &[r#""Acpi""#]),
            ("hotplug_size", &["0"]),
            ("hotplugged_size", &["0"]),
            ("hugepage_size", &[]),
            ("prefault", &["false"]),
            ("reserve", &["false"]),
            ("zones", &["[]"]),
            ("thp", &["true"]),
        ],
    ),
    (
        "disks",
        &[
            ("direct", &["false"]),
            ("num_queues", &["1"]),
            ("queue_size", &["128"]),
            ("vhost_user", &["false"]),
            ("vhost_socket", &[]),
            ("rate_limit_group", &[]),
            ("rate_limiter_config", &[]),
            ("disable_io_uring", &["false"]),
            ("disable_aio", &["false"]),
            ("pci_segment", &["0"]),
            ("pci_device_id", &[]),
            ("serial", &[]),
            ("queue_affinity", &["[]"]),
            ("backing_files", &["false"]),
            ("sparse", &["true"]),
            ("image_type", &[r#""Raw""#, r#""Unknown""#]),
            ("lock_granularity", &[r#""ByteRange""#]),
        ],
    ),
    (
        "net",
        &[
            ("ip", &[r#""192.168.249.1""#]),
            ("mask", &[r#""255.255.255.0""#]),
            ("host_mac", &[]),
            ("mtu", &[]),
            ("num_queues", &["2"]),
            ("queue_size", &["256"]),
            ("vhost_user", &["false"]),
            ("vhost_socket", &[]),
            ("vhost_mode", &[r#""Client""#]),
            ("fds", &["[]"]),
            ("rate_limiter_config", &[]),
            ("pci_segment", &["0"]),
            ("pci_device_id", &[]),
            ("offload_tso", &["true"]),
            ("offload_ufo", &["true"]),
            ("offload_csum", &["true"]),
        ],
    ),
    (
        "rng",
        &[("id", &[]), ("pci_segment", &["0"]), ("pci_device_id", &[])],
    ),
    ("serial", &[("socket", &[]), ("iommu", &["false"])]),
    (
        "console",
        &[("id", &[]), ("pci_segment", &["0"]), ("pci_device_id", &[])],
    ),
    (
        "devices",
        &[
            ("pci_segment", &["0"]),
            ("pci_device_id", &[]),
            ("x_nv_gpudirect_clique", &[]),
            ("x_exclude_mmap_bars", &["[]"]),
        ],
    ),
    (
        "platform",
        &[
            ("num_pci_segments", &["1"]),
            ("iommu_segments", &["[]"]),
            ("iommu_address_width_bits", &["64"]),
            ("serial_number", &[]),
            ("uuid", &[]),
            ("oem_strings", &["[]"]),
            ("tdx", &["false"]),
            ("sev_snp", &["false"]),
            ("iommufd", &["true", "false"]),
            ("vfio_p2p_dma", &["true"]),
        ],
    ),
];

/// Of the configuration itself.
const WHOLE: &[Known] = &[
    ("rate_limit_groups", &["[]"]),
    ("balloon", &[]),
    ("fs", &["[]"]),
    ("generic_vhost_user", &["[]"]),
    ("pmem", &["[]"]),
    ("debug_console", &[]),
    ("user_devices", &["[]"]),
    ("vdpa", &["[]"]),
    ("vsock", &[]),
    ("numa", &["[]"]),
    ("iommu", &["false"]),
    ("watchdog", &["false"]),
    ("pvpanic", &["false"]),
    ("rtc", &[]),
    ("gdb", &["false"]),
    ("pci_segments", &["[]"]),
    ("tpm", &[]),
    // Whoever starts nestling decides (--landlock).
    ("landlock_enable", &["false", "true"]),
];

/// Takes such keys out of the configuration of a VM.
///
/// # Errors
/// One of them asks for something.
pub(super) fn vm(config: &mut Value) -> Result<(), ApiError> {
    let Value::Object(config) = config else {
        // Told where it is parsed.
        return Ok(());
    };
    take(WHOLE, "", config)?;
    for section in SECTIONS {
        match config.get_mut(section.key) {
            Some(Value::Array(items)) if section.many => {
                for (n, item) in items.iter_mut().enumerate() {
                    group(section.key, &format!("{}[{n}]", section.key), item)?;
                }
            }
            Some(item) => group(section.key, section.key, item)?,
            None => {}
        }
    }
    Ok(())
}

/// Takes such keys out of one group of it, which is at `place`.
///
/// # Errors
/// One of them asks for something.
pub(super) fn group(section: &str, place: &str, group: &mut Value) -> Result<(), ApiError> {
    let Value::Object(object) = group else {
        return Ok(());
    };
    if section == "cpus" {
        most_vcpus(place, object)?;
    }
    match GROUPS.iter().find(|(name, _)| *name == section) {
        Some((_, known)) => take(known, place, object),
        None => Ok(()),
    }
}

/// As many vCPUs as the guest boots with are all that it ever has.
fn most_vcpus(place: &str, cpus: &mut Map<String, Value>) -> Result<(), ApiError> {
    let boot = cpus.get("boot_vcpus").cloned().unwrap_or(1.into());
    match cpus.remove("max_vcpus") {
        None | Some(Value::Null) => Ok(()),
        Some(most) if most == boot => Ok(()),
        Some(most) => Err(not_offered(place, "max_vcpus", &most)
            .remedy("leave it out, or give what boot_vcpus says")),
    }
}

fn take(known: &[Known], place: &str, object: &mut Map<String, Value>) -> Result<(), ApiError> {
    for (key, nothing) in known {
        let Some(value) = object.remove(*key) else {
            continue;
        };
        let asks_for_nothing = value.is_null() || nothing.contains(&value.to_string().as_str());
        if !asks_for_nothing {
            return Err(not_offered(place, key, &value).remedy("leave it out"));
        }
    }
    Ok(())
}

fn not_offered(place: &str, key: &str, value: &Value) -> ApiError {
    let field = match place {
        "" => key.into(),
        place => format!("{place}.{key}"),
    };
    let mut value = value.to_string();
    if value.chars().count() > 100 {
        value = value.chars().take(100).chain(['…']).collect();
    }
    ApiError::new(
        Code::InvalidConfig,
        format!("{field} is {value}, which nestling does not offer"),
    )
    .field(field)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_as_cloud_hypervisors_client_sends_it_is_one_of_ours() {
        let mut disk = json!({
            "path": "/disk", "readonly": false, "direct": false, "iommu": true, "num_queues": 1,
            "queue_size": 128, "vhost_user": false, "vhost_socket": null,
            "rate_limit_group": null, "rate_limiter_config": null, "id": null,
            "disable_io_uring": false, "disable_aio": false, "pci_segment": 0, "serial": null,
            "queue_affinity": null,
        });
        group("disks", "", &mut disk).unwrap();
        assert_eq!(
            disk,
            json!({ "path": "/disk", "readonly": false, "iommu": true, "id": null })
        );
    }

    #[test]
    fn what_we_do_not_have_is_refused_by_name_when_it_is_asked_for() {
        let mut config = json!({ "payload": {}, "disks": [{}, { "num_queues": 4 }] });
        let error = vm(&mut config).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("disks[1].num_queues"));
        let mut config = json!({ "cpus": { "boot_vcpus": 2, "max_vcpus": 2 }, "balloon": null });
        vm(&mut config).unwrap();
        assert_eq!(config, json!({ "cpus": { "boot_vcpus": 2 } }));
        let mut config = json!({ "cpus": { "boot_vcpus": 2, "max_vcpus": 8 } });
        assert_eq!(
            vm(&mut config).unwrap_err().field.as_deref(),
            Some("cpus.max_vcpus")
        );
    }

    #[test]
    fn no_key_of_ours_is_taken_for_one_that_we_lack_and_values_are_json() {
        for (section, known) in GROUPS {
            let ours = SECTIONS.iter().find(|s| s.key == *section).unwrap();
            for (key, values) in *known {
                let taken = ours.group.fields.iter().any(|f| f.key == *key);
                assert!(!taken, "{section}.{key}");
                for value in *values {
                    let parsed: Value = serde_json::from_str(value).unwrap();
                    assert_eq!(parsed.to_string(), *value);
                }
            }
        }
        for (key, _) in WHOLE {
            assert!(SECTIONS.iter().all(|s| s.key != *key), "{key}");
        }
    }
}
