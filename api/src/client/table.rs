//! Answers for people.

use std::fmt::Write as _;

use serde_json::Value;

/// The answer to the subcommand `name` as a table, if there is one for it.
pub(super) fn of(name: &str, answer: &Value) -> Option<String> {
    match name {
        "ping" => Some(format!(
            "{} process {}",
            word(&answer["build_version"]),
            word(&answer["pid"])
        )),
        "info" => Some(info(answer)),
        "viommu" => Some(viommus(answer)),
        "add-disk" | "add-net" | "add-device" | "add-test-device" => Some(format!(
            "{} at {}",
            word(&answer["id"]),
            word(&answer["bdf"])
        )),
        "counters" => Some(counters(answer)),
        _ => None,
    }
}

/// A value without quotes; what is not there is `-`.
fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        other => other.to_string(),
    }
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Rows as columns that are as wide as what is in them.
fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |n: usize| {
        let cells = rows.iter().map(|row| row[n].chars().count());
        cells.max().unwrap_or(0).max(head[n].len())
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn info(answer: &Value) -> String {
    let config = &answer["config"];
    let memory = answer["memory_actual_size"].as_u64().unwrap_or(0) >> 20;
    let mut text = format!(
        "{}  {} vCPUs  {memory} MiB\n",
        word(&answer["state"]),
        word(&config["cpus"]["boot_vcpus"])
    );
    let doing = &answer["operation"];
    if !doing.is_null() {
        let _ = writeln!(
            text,
            "{}: {}, for {} ms",
            word(&doing["name"]),
            word(&doing["step"]),
            word(&doing["running_ms"])
        );
    }
    let devices = answer["device_tree"].as_object();
    let rows: Vec<Vec<String>> = devices
        .into_iter()
        .flat_map(|devices| devices.values())
        .map(|device| {
            let state = match (&device["removing"], &device["removable"]) {
                (Value::Bool(true), _) => "being removed",
                (_, Value::Bool(true)) => "removable",
                _ => "",
            };
            vec![
                word(&device["id"]),
                word(&device["pci_bdf"]),
                word(&device["kind"]),
                word(&device["viommu"]),
                state.into(),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text += "\n";
        text += &columns(&["ID", "BDF", "KIND", "VIOMMU", ""], &rows);
    }
    text
}

fn viommus(answer: &Value) -> String {
    let mut text = String::new();
    for viommu in items(&answer["viommus"]) {
        let _ = write!(text, "{} ({}", word(&viommu["id"]), word(&viommu["type"]));
        let rows: Vec<Vec<String>>;
        let head: &[&str];
        if viommu["type"] == "vtd" {
            let _ = writeln!(
                text,
                ", {}, {} bits, {} bits of PASID): {} targets, {} faults",
                word(&viommu["mode"]),
                word(&viommu["address_width"]),
                word(&viommu["pasid_bits"]),
                word(&viommu["live_targets"]),
                word(&viommu["faults_recorded"])
            );
            head = &[
                "ENDPOINT",
                "PASID",
                "DOMAIN",
                "TRANSLATION",
                "IN FORCE",
                "HWPT",
                "PROBLEM",
            ];
            rows = items(&viommu["targets"])
                .map(|target| {
                    vec![
                        word(&target["target"]["endpoint"]),
                        word(&target["target"]["pasid"]),
                        word(&target["domain"]),
                        word(&target["translation"]["kind"]),
                        word(&target["in_force"]),
                        word(&target["hwpt"]),
                        word(&target["problem"]),
                    ]
                })
                .collect();
        } else {
            let _ = writeln!(text, ", bypass {})", word(&viommu["bypass"]));
            head = &["ENDPOINT", "DOMAIN", "MAPPINGS", "BYTES", "HWPT", "REFUSED"];
            rows = items(&viommu["endpoints"])
                .map(|endpoint| {
                    let domain = items(&viommu["domains"])
                        .find(|domain| domain["domain"] == endpoint["domain"]);
                    let of_domain = |key: &str| domain.map_or("-".into(), |d| word(&d[key]));
                    vec![
                        word(&endpoint["endpoint"]),
                        word(&endpoint["domain"]),
                        of_domain("mappings"),
                        of_domain("mapped_bytes"),
                        word(&endpoint["hwpt"]),
                        word(&endpoint["refused"]),
                    ]
                })
                .collect();
        }
        text += &columns(head, &rows);
        for fault in items(&viommu["last_faults"]) {
            let _ = writeln!(
                text,
                "fault: {} PASID {} at {:#x}: {}",
                word(&fault["target"]["endpoint"]),
                word(&fault["target"]["pasid"]),
                fault["iova"].as_u64().unwrap_or(0),
                word(&fault["reason"])
            );
        }
    }
    if text.is_empty() {
        return "The guest has no vIOMMU.".into();
    }
    text
}

fn counters(answer: &Value) -> String {
    let rows: Vec<Vec<String>> = answer
        .as_object()
        .into_iter()
        .flatten()
        .flat_map(|(device, counters)| {
            let counters = counters.as_object().into_iter().flatten();
            counters.map(|(name, count)| vec![device.clone(), name.clone(), word(count)])
        })
        .collect();
    columns(&["DEVICE", "COUNTER", "COUNT"], &rows)
}

/// One event as a line: its time, its name, and what there is to say.
pub(super) fn event(data: &str) -> String {
    let Ok(record) = serde_json::from_str::<Value>(data) else {
        return data.into();
    };
    let since = &record["timestamp"];
    let mut line = format!(
        "{:>6}.{:03}  {}",
        since["secs"].as_u64().unwrap_or(0),
        since["nanos"].as_u64().unwrap_or(0) / 1_000_000,
        word(&record["event"])
    );
    for (key, value) in record["properties"].as_object().into_iter().flatten() {
        if !value.is_null() {
            let _ = write!(line, "  {key}={}", word(value));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_vm_is_a_line_and_a_row_for_each_device() {
        let answer = json!({
            "state": "Running", "memory_actual_size": 2 << 20,
            "config": { "cpus": { "boot_vcpus": 2 } },
            "operation": { "name": "vm.add-device", "step": "bind", "running_ms": 7 },
            "device_tree": { "d": {
                "id": "d", "pci_bdf": "0000:00:05.0", "kind": "disk", "viommu": "viommu0",
                "removable": true, "removing": false,
            } },
        });
        assert_eq!(
            of("info", &answer).unwrap(),
            "Running  2 vCPUs  2 MiB\n\
             vm.add-device: bind, for 7 ms\n\n\
             ID  BDF           KIND  VIOMMU\n\
             d   0000:00:05.0  disk  viommu0  removable\n"
        );
    }

    #[test]
    fn a_viommu_is_a_line_and_a_row_for_each_endpoint() {
        let answer = json!({ "viommus": [
            { "type": "vtd", "id": "u", "mode": "scalable", "address_width": 48, "pasid_bits": 20,
              "live_targets": 1, "faults_recorded": 0, "targets": [{
                "target": { "endpoint": "00:05.0", "pasid": 7 }, "domain": 2,
                "translation": { "kind": "stage1" }, "in_force": true, "hwpt": 9,
                "problem": null,
            }] },
            { "type": "virtio", "id": "v", "bypass": false,
              "domains": [{ "domain": 1, "mappings": 3, "mapped_bytes": 4096 }],
              "endpoints": [{ "endpoint": "00:06.0", "domain": 1, "hwpt": null, "refused": false }] },
        ] });
        assert_eq!(
            of("viommu", &answer).unwrap(),
            "u (vtd, scalable, 48 bits, 20 bits of PASID): 1 targets, 0 faults\n\
             ENDPOINT  PASID  DOMAIN  TRANSLATION  IN FORCE  HWPT  PROBLEM\n\
             00:05.0   7      2       stage1       yes       9     -\n\
             v (virtio, bypass no)\n\
             ENDPOINT  DOMAIN  MAPPINGS  BYTES  HWPT  REFUSED\n\
             00:06.0   1       3         4096   -     no\n"
        );
    }

    #[test]
    fn an_event_is_a_line() {
        let data = r#"{"seq":1,"timestamp":{"secs":3,"nanos":7000000},"source":"vm",
            "event":"device-added","properties":{"id":"d","bdf":"0000:00:05.0"}}"#;
        assert_eq!(
            event(data),
            "     3.007  device-added  bdf=0000:00:05.0  id=d"
        );
    }
}
