//! `VmConfig` as clients of Cloud Hypervisor write it.
//!
//! Clients made from its OpenAPI document name every field that it has, most with the value that means "nothing". Such values are
//! taken; anything else that is not built here is refused by name. Fields of early releases become those of today.

use serde_json::{Map, Value};

use super::Failure;
use super::http::Status;
use super::route::bad_json;
use crate::config::VmConfig;

/// Fields that may be told if they ask for nothing: what they are when they do.
fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match name {
        "iommu" | "vhost_user" | "kvm_hyperv" | "nested" | "prefault" | "watchdog" | "pvpanic"
        | "landlock_enable" => *value == Value::Bool(false),
        "thp" => *value == Value::Bool(true),
        "pci_segment" => value.as_u64() == Some(0),
        "vhost_mode" => value == "Client",
        "hotplug_method" => value == "Acpi",
        "balloon" if value.is_boolean() => *value == Value::Bool(false),
        "devices" | "fs" | "landlock_rules" | "numa" | "pmem" | "rate_limit_groups" | "sgx_epc"
        | "user_devices" | "vdpa" | "zones" => value.as_array().is_some_and(Vec::is_empty),
        "features" => {
            *value == serde_json::json!({}) || *value == serde_json::json!({"amx": false})
        }
        _ => false,
    }
}

/// Fields of the surface; where one of them is unknown here, it is not built yet.
const SURFACE: &[&str] = &[
    "affinity",
    "balloon",
    "debug_console",
    "devices",
    "features",
    "fs",
    "hotplug_method",
    "hotplug_size",
    "hotplugged_size",
    "iommu",
    "kvm_hyperv",
    "landlock_enable",
    "landlock_rules",
    "max_phys_bits",
    "nested",
    "numa",
    "pci_segment",
    "platform",
    "pmem",
    "prefault",
    "pvpanic",
    "rate_limit_group",
    "rate_limit_groups",
    "rate_limiter_config",
    "sgx_epc",
    "socket",
    "thp",
    "tpm",
    "user_devices",
    "vdpa",
    "vhost_mode",
    "vhost_socket",
    "vhost_user",
    "watchdog",
    "zones",
];

/// Reads the body of `vm.create`.
pub(super) fn read(body: &[u8]) -> Result<VmConfig, Failure> {
    let mut value: Value = serde_json::from_slice(body).map_err(|e| bad_json(&e))?;
    // To serde, an array of fields would do as well.
    let Value::Object(config) = &mut value else {
        return Err(Failure::new(
            Status::BadRequest,
            "the VM's configuration is no JSON object",
        ));
    };
    early_payload(config);
    early_max(config);
    simplify(&mut value);
    serde_json::from_value(value).map_err(|e| {
        let text = e.to_string();
        let unknown = text
            .strip_prefix("unknown field `")
            .and_then(|rest| rest.split('`').next())
            .filter(|name| SURFACE.contains(name));
        match unknown {
            Some(name) => Failure::new(
                Status::BadRequest,
                format!("the VM's configuration: {name} is not built yet in this version"),
            ),
            None => Failure::of(Status::BadRequest, "the VM's configuration", &e),
        }
    })
}

/// Takes out what asks for nothing. JSON's nesting is limited by its parser.
fn simplify(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, value| !value.is_null() && !asks_for_nothing(name, value));
            fields.values_mut().for_each(simplify);
        }
        Value::Array(values) => values.iter_mut().for_each(simplify),
        _ => {}
    }
}

/// `kernel: {path}`, `initramfs: {path}` and `cmdline: {args}` become parts of `payload`.
fn early_payload(config: &mut Map<String, Value>) {
    for (name, inner) in [
        ("kernel", "path"),
        ("initramfs", "path"),
        ("cmdline", "args"),
    ] {
        let Some(Value::Object(fields)) = config.get(name) else {
            continue;
        };
        // With other fields in it, it stays, and is refused as unknown.
        let (Some(value), 1) = (fields.get(inner).cloned(), fields.len()) else {
            continue;
        };
        config.remove(name);
        let payload = config
            .entry("payload")
            .or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(payload) = payload {
            payload.entry(name).or_insert(value);
        }
    }
}

/// Where only `boot_vcpus` is told, there are no more than these.
fn early_max(config: &mut Map<String, Value>) {
    if let Some(Value::Object(cpus)) = config.get_mut("cpus")
        && let Some(boot) = cpus.get("boot_vcpus").cloned()
    {
        cpus.entry("max_vcpus").or_insert(boot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> String {
        let failure = read(body.as_bytes()).expect_err(body);
        assert_eq!(failure.status, Status::BadRequest);
        failure.chain.join(": ")
    }

    #[test]
    fn a_generated_client_may_tell_every_default() {
        let config = read(
            br#"{
            "cpus": {"boot_vcpus": 2, "max_vcpus": 4, "topology": null, "kvm_hyperv": false, "features": {"amx": false}},
            "memory": {"size": 268435456, "mergeable": false, "hotplug_method": "Acpi", "hotplug_size": null, "prefault": false,
                       "thp": true, "zones": [], "shared": true, "hugepages": false},
            "payload": {"kernel": "/k", "cmdline": "console=ttyS0", "initramfs": null, "firmware": null},
            "disks": [{"path": "/d", "readonly": true, "iommu": false, "vhost_user": false, "vhost_socket": null, "pci_segment": 0}],
            "net": null, "fs": [], "devices": [], "watchdog": false, "iommu": false,
            "serial": {"mode": "File", "file": "/s", "iommu": false}, "console": {"mode": "Off"}
        }"#,
        )
        .unwrap();
        assert_eq!((config.cpus.boot, config.cpus.max), (2, 4));
        assert!(config.memory.shared);
        assert!(config.disks[0].readonly);
        assert_eq!(
            config.serial.mode,
            crate::config::ConsoleMode::File("/s".into())
        );
        assert_eq!(*config.console_mode(), crate::config::ConsoleMode::Off);
        config.validate().unwrap();
    }

    #[test]
    fn fields_of_early_releases() {
        let config = read(
            br#"{"kernel": {"path": "/k"}, "initramfs": {"path": "/i"}, "cmdline": {"args": "quiet"}, "cpus": {"boot_vcpus": 3}}"#,
        )
        .unwrap();
        let payload = config.payload.unwrap();
        assert_eq!(payload.kernel.to_str(), Some("/k"));
        assert_eq!(payload.initramfs.unwrap().to_str(), Some("/i"));
        assert_eq!(payload.cmdline, "quiet");
        assert_eq!((config.cpus.boot, config.cpus.max), (3, 3));
        let text = refused(r#"{"kernel": {"path": "/k", "colour": 1}}"#);
        assert!(text.contains("unknown field `kernel`"), "{text}");
    }

    #[test]
    fn what_is_not_built_is_told_by_name() {
        for (body, name) in [
            (r#"{"net": [{"vhost_user": true}]}"#, "vhost_user"),
            (r#"{"platform": {"num_pci_segments": 2}}"#, "platform"),
            (r#"{"tpm": {"socket": "/t"}}"#, "tpm"),
        ] {
            let text = refused(body);
            assert!(text.contains(&format!("{name} is not built yet")), "{text}");
        }
    }

    #[test]
    fn hostile_bodies() {
        refused("");
        refused("null");
        refused("[]");
        refused(&"[".repeat(100_000));
        refused(r#"{"cpus": {"boot_vcpus": 256}}"#);
        refused(r#"{"cpus": {"boot_vcpus": -1}}"#);
        refused(r#"{"memory": {"size": 1e30}}"#);
        refused(r#"{"colour": 1}"#);
        refused(r#"{"payload": "x", "kernel": {"path": "/k"}}"#);
    }
}
