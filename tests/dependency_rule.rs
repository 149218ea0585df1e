//! The workspace's shape, read from `cargo metadata`: each crate has a layer, no edge points upward, and some pairs
//! never meet. `docs/architecture.md` has the table in words.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::MetadataCommand;

/// Layer and crate. A new crate gets its line here, in `docs/architecture.md` and in `README.md`.
const LAYERS: &[(u8, &str)] = &[
    (0, "option_parser"),
    (0, "test-guest"),
    (0, "vm-allocator"),
    (0, "vm-migration"),
    (1, "block_util"),
    (1, "hypervisor"),
    (1, "net_util"),
    (1, "qcow"),
    (1, "user_net"),
    (1, "vm-device"),
    (2, "arch"),
    (2, "devices"),
    (2, "pci"),
    (2, "vm-virtio"),
    (3, "virtio-devices"),
    (4, "vmm"),
    (5, "cloud-hypervisor"),
    (5, "fuzz"),
    (5, "performance-metrics"),
    (5, "vhost_user_block"),
    (5, "vhost_user_net"),
];

/// The first never depends on the second, not even through others of the workspace.
const NEVER: &[(&str, &str)] = &[
    ("arch", "devices"),
    ("block_util", "hypervisor"),
    ("devices", "hypervisor"),
    ("net_util", "hypervisor"),
    ("qcow", "hypervisor"),
    ("user_net", "hypervisor"),
    ("virtio-devices", "hypervisor"),
    ("vm-device", "hypervisor"),
    ("vm-virtio", "hypervisor"),
    // VFIO, the one user of it in `pci`, is a feature.
    ("pci", "hypervisor"),
];

/// Crates that know nothing of virtio, whoever wrote it.
const WITHOUT_VIRTIO: &[&str] = &["block_util", "net_util", "qcow", "user_net"];

/// One dependency.
#[derive(Clone, Copy, Debug)]
struct Edge<'a> {
    from: &'a str,
    to: &'a str,
    /// Part of a default build; false with features and for tests alone.
    always: bool,
}

fn layer(name: &str) -> Option<u8> {
    LAYERS.iter().find(|l| l.1 == name).map(|l| l.0)
}

/// Everything that a default build of `name` brings in.
fn reach<'a>(edges: &[Edge<'a>], name: &str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut todo = vec![name];
    while let Some(from) = todo.pop() {
        for edge in edges.iter().filter(|e| e.always && e.from == from) {
            if seen.insert(edge.to) {
                todo.push(edge.to);
            }
        }
    }
    seen
}

/// One sentence for each rule that the crates and edges break.
fn broken(crates: &[&str], edges: &[Edge<'_>]) -> Vec<String> {
    let mut out = Vec::new();
    for name in crates.iter().filter(|name| layer(name).is_none()) {
        out.push(format!(
            "{name} has no layer: give it one in tests/dependency_rule.rs"
        ));
    }
    for Edge { from, to, .. } in edges {
        if let (Some(lower), Some(upper)) = (layer(from), layer(to))
            && upper > lower
        {
            out.push(format!(
                "{from} (layer {lower}) depends on {to} (layer {upper}): edges point down"
            ));
        }
        if edges.iter().any(|e| e.from == *to && e.to == *from) {
            out.push(format!("{from} and {to} depend on each other"));
        }
        if WITHOUT_VIRTIO.contains(from) && to.contains("virtio") {
            out.push(format!("{from} depends on {to}: it is to know no virtio"));
        }
    }
    for (from, to) in NEVER {
        if reach(edges, from).contains(to) {
            out.push(format!("{from} depends on {to}, which it never may"));
        }
    }
    out
}

#[test]
fn crates_depend_downwards_only() {
    let metadata = MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
        .no_deps()
        .exec()
        .expect("cargo metadata");
    let packages = metadata.workspace_packages();
    let crates: Vec<&str> = packages.iter().map(|p| p.name.as_str()).collect();
    let edges: Vec<Edge<'_>> = packages
        .iter()
        .flat_map(|p| {
            p.dependencies.iter().map(|d| Edge {
                from: p.name.as_str(),
                to: d.name.as_str(),
                always: !d.optional && d.kind == cargo_metadata::DependencyKind::Normal,
            })
        })
        .collect();
    assert!(
        edges
            .iter()
            .any(|e| e.from == "cloud-hypervisor" && e.to == "vmm"),
        "cargo metadata does not show the binary's dependency on vmm"
    );
    assert_eq!(broken(&crates, &edges), Vec::<String>::new());
}

#[test]
fn each_rule_notices_its_breach() {
    let edge = |from, to| Edge {
        from,
        to,
        always: true,
    };
    let one = |edges: &[Edge<'_>]| {
        let found = broken(&[], edges);
        assert_eq!(found.len(), 1, "{found:?}");
        found.into_iter().next().unwrap_or_default()
    };
    assert!(one(&[edge("arch", "vmm")]).contains("edges point down"));
    assert!(one(&[edge("net_util", "virtio-queue")]).contains("no virtio"));
    assert!(one(&[edge("arch", "devices")]).contains("never"));
    assert!(one(&[edge("devices", "arch"), edge("arch", "hypervisor")]).contains("never"));
    assert!(broken(&[], &[edge("arch", "pci"), edge("pci", "arch")])[0].contains("each other"));
    assert!(broken(&["newcomer"], &[])[0].contains("no layer"));
    let feature = Edge {
        always: false,
        ..edge("pci", "hypervisor")
    };
    assert_eq!(broken(&[], &[feature]), Vec::<String>::new());
}

/// Names and lines of `[workspace.dependencies]`.
fn workspace_dependencies() -> BTreeMap<String, String> {
    include_str!("../Cargo.toml")
        .lines()
        .skip_while(|line| *line != "[workspace.dependencies]")
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

#[test]
fn every_dependency_has_its_reason() {
    let text = include_str!("../docs/dependencies.md");
    let dependencies = workspace_dependencies();
    assert!(dependencies.contains_key("vm-memory"), "{dependencies:?}");
    let reasons: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .filter(|(_, reason)| reason.trim_end_matches(" |").len() > 10)
        .map(|(name, _)| name)
        .collect();
    let theirs: BTreeSet<&str> = dependencies
        .iter()
        .filter(|(_, value)| !value.contains("path ="))
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(
        reasons, theirs,
        "docs/dependencies.md (left) and Cargo.toml (right) differ"
    );
}

#[test]
fn every_crate_is_in_the_readme() {
    let readme = include_str!("../README.md");
    for (name, _) in workspace_dependencies()
        .iter()
        .filter(|(_, value)| value.contains("path ="))
    {
        assert!(
            readme.contains(&format!("| [`{name}`]({name}) | ")),
            "README.md does not tell of {name}"
        );
    }
}
