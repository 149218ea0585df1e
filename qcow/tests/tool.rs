//! The binary: what it prints, and its exit codes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(feature = "tool")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{Verdict, qemu_check};
use serde_json::Value;

fn tool(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qcow-tool"))
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap()
}

fn ok(dir: &Path, args: &[&str]) -> String {
    let out = tool(dir, args);
    assert!(
        out.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

fn json(dir: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&ok(dir, args)).unwrap()
}

#[test]
fn a_life_of_an_image_from_the_shell() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.raw"), vec![1; 300_000]).unwrap();
    ok(
        d,
        &[
            "convert",
            "base.raw",
            "base",
            "--from",
            "raw",
            "--to",
            "qcow2",
            "--compress",
            "zstd",
        ],
    );
    ok(
        d,
        &[
            "create",
            "disk",
            "--backing",
            "base",
            "--backing-format",
            "qcow2",
            "--cluster-size",
            "4K",
        ],
    );
    let info = json(d, &["info", "disk", "--output", "json"]);
    assert_eq!(
        (info["disk-size"].as_u64(), info["cluster-size"].as_u64()),
        (Some(300_000), Some(4096))
    );
    assert_eq!(info["backing-file"], "base");
    assert!(ok(d, &["info", "disk"]).contains("backing file base, format qcow2"));
    assert_eq!(ok(d, &["snapshot", "create", "disk", "first"]).trim(), "1");
    ok(d, &["resize", "disk", "1M"]);
    ok(d, &["snapshot", "apply", "disk", "first"]);
    assert_eq!(
        json(d, &["snapshot", "list", "disk", "--output", "json"])[0]["name"],
        "first"
    );
    assert!(ok(d, &["snapshot", "list", "disk"]).contains("first"));
    ok(d, &["snapshot", "delete", "disk", "1"]);
    assert!(
        json(d, &["map", "disk", "--follow", "--output", "json"])
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["depth"] == 1)
    );
    assert!(ok(d, &["map", "base"]).contains("compressed"));
    ok(d, &["commit", "disk"]);
    assert!(ok(d, &["check", "disk"]).contains("no errors"));
    assert_eq!(json(d, &["check", "disk", "--output", "json"])["leaks"], 0);
    ok(
        d,
        &[
            "convert", "disk", "out.raw", "--from", "qcow2", "--to", "raw", "--follow",
        ],
    );
    let out = std::fs::read(d.join("out.raw")).unwrap();
    assert!(out[..300_000].iter().all(|b| *b == 1) && out.len() == 300_000);
    assert_eq!(qemu_check(&d.join("disk")), Verdict::Clean);
}

#[test]
fn a_benchmark_makes_the_requests_that_it_tells_of() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M", "--cluster-size", "4K"]);
    let write = [
        "bench",
        "disk",
        "--write",
        "--block-size",
        "4K",
        "--depth",
        "3",
        "--requests",
        "100",
        "--output",
        "json",
    ];
    let result = json(d, &write);
    assert_eq!(result["operation"], "write");
    assert_eq!(result["pattern"], "sequential");
    assert_eq!(
        (result["requests"].as_u64(), result["depth"].as_u64()),
        (Some(100), Some(3))
    );
    assert!(result["requests-per-second"].as_f64().unwrap() > 0.0);
    let latency = |key: &str| result["latency-us"][key].as_f64().unwrap();
    assert!(latency("median") <= latency("99") && latency("99") <= latency("max"));
    // A hundred clusters were written, and no more.
    let report = json(d, &["check", "disk", "--output", "json"]);
    assert_eq!(report["allocated-clusters"], 100);
    let before = std::fs::read(d.join("disk")).unwrap();
    let text = ok(
        d,
        &[
            "bench",
            "disk",
            "--random",
            "--requests",
            "50",
            "--depth",
            "2",
        ],
    );
    assert!(
        text.starts_with("50 random reads of 65536 bytes, 2 in flight"),
        "{text}"
    );
    assert!(
        std::fs::read(d.join("disk")).unwrap() == before,
        "reading changed it"
    );
    assert!(ok(d, &["bench", "--help"]).contains("content is lost"));
    assert_eq!(qemu_check(&d.join("disk")), Verdict::Clean);
}

#[test]
fn mistakes_are_one_line_and_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    let cases: &[(&[&str], &str)] = &[
        (&["create", "disk", "1M"], "exists"),
        (&["create", "new"], "size is needed"),
        (
            &["create", "new", "1M", "--cluster-size", "1000"],
            "powers of two",
        ),
        (
            &["create", "new", "1M", "--backing", "disk"],
            "--backing-format",
        ),
        (&["info", "missing"], "missing"),
        (&["check", "disk", "--repair", "some"], "leaks and all"),
        (
            &["snapshot", "apply", "disk", "none"],
            "no snapshot \"none\"",
        ),
        (
            &[
                "convert",
                "disk",
                "raw",
                "--from",
                "qcow2",
                "--to",
                "raw",
                "--compress",
                "zlib",
            ],
            "raw file",
        ),
        (&["commit", "disk"], "no backing file"),
        (&["bench", "disk", "--depth", "0"], "1 to 256"),
        (
            &["bench", "disk", "--block-size", "2M"],
            "less than a block",
        ),
        (&["bench", "disk", "--requests", "0"], "no requests"),
    ];
    for (args, text) in cases {
        let out = tool(d, args);
        let error = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{args:?}: {error}");
        assert!(
            error.contains(text) && error.lines().count() == 1,
            "{args:?}: {error}"
        );
    }
    assert!(!d.join("new").exists());
}

#[test]
fn exit_codes_tell_leaks_from_corruption() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    let mut bytes = std::fs::read(d.join("disk")).unwrap();
    // The refcount block is the third cluster, and the image has four.
    bytes[2 * 65536 + 9] = 1;
    std::fs::write(d.join("disk"), &bytes).unwrap();
    assert_eq!(tool(d, &["check", "disk"]).status.code(), Some(3));
    ok(d, &["check", "disk", "--repair", "leaks"]);
    bytes[2 * 65536 + 7] = 0;
    std::fs::write(d.join("disk"), &bytes).unwrap();
    assert_eq!(tool(d, &["check", "disk"]).status.code(), Some(2));
    ok(d, &["check", "disk", "--repair", "all"]);
    assert_eq!(qemu_check(&d.join("disk")), Verdict::Clean);
}
