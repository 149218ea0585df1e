//! The ways a VM ends or starts anew: what the guest does, and what the user sends.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::support::{BareMetal, Kvm, Report, Vmm, test_guest};

/// A guest that has started and waits for input by interrupt.
fn waiting_guest(kvm: Kvm) -> Vmm {
    let mut vmm = BareMetal::new(kvm).start(&["echo"]);
    vmm.wait_for("READY\r\n");
    vmm
}

#[test]
fn shutdown_ends_with_zero() {
    let Some(kvm) = Kvm::here() else { return };
    BareMetal::new(kvm).word("end=shutdown").run(&["boot"]);
}

/// The guest resets again and again; SIGTERM ends it after the third start.
fn starts_anew(kvm: Kvm, end: &str, cpus: u32) {
    let mut vmm = BareMetal::new(kvm)
        .cpus(cpus)
        .word(end)
        .start(&["boot", "smp"]);
    for _ in 0..3 {
        vmm.wait_for("HELLO test-guest");
        vmm.wait_for("DONE failed=0");
    }
    vmm.signal(libc::SIGTERM);
    let ended = vmm.wait().expect_clean();
    // Each start begins from the same state, and finds the same.
    let starts: Vec<&str> = ended.out.split_inclusive("DONE failed=0\n").collect();
    let plain = |text: &str| {
        let keep = |line: &&str| !line.starts_with("VALUE ping_tsc");
        text.lines()
            .filter(keep)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for start in &starts[1..3] {
        assert_eq!(plain(start), plain(starts[0]));
    }
    Report::parse(starts[2]).unwrap().expect(&["boot", "smp"]);
}

#[test]
fn reset_by_acpi_starts_anew() {
    let Some(kvm) = Kvm::here() else { return };
    starts_anew(kvm, "end=reset", 1);
}

#[test]
fn reset_by_i8042_starts_anew() {
    let Some(kvm) = Kvm::here() else { return };
    starts_anew(kvm, "end=i8042", 1);
}

#[test]
fn reset_with_two_vcpus_starts_both_anew() {
    let Some(kvm) = Kvm::here() else { return };
    starts_anew(kvm, "end=reset", 2);
}

#[test]
fn triple_fault_is_said_plainly() {
    let Some(kvm) = Kvm::here() else { return };
    let ended = BareMetal::new(kvm)
        .word("end=triple")
        .start(&["boot"])
        .wait();
    let line = ended.expect_refusal();
    assert!(
        line.contains("vCPU 0") && line.contains("triple fault"),
        "{line}"
    );
    Report::parse(&ended.out).unwrap().expect(&["boot"]);
}

#[test]
fn sigterm_and_sigint_end_a_guest_that_waits() {
    let Some(kvm) = Kvm::here() else { return };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let vmm = waiting_guest(kvm);
        vmm.signal(signal);
        vmm.wait().expect_clean();
    }
}

#[test]
fn sigterm_ends_a_guest_that_has_halted_for_good() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = BareMetal::new(kvm).cpus(2).word("end=halt").start(&["smp"]);
    vmm.wait_for("DONE failed=0");
    vmm.signal(libc::SIGTERM);
    vmm.wait().expect_clean();
}

#[test]
fn serial_input_arrives_by_interrupt() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = waiting_guest(kvm);
    vmm.send("hello\n");
    vmm.wait_for("ECHO HELLO\r\n");
    // More than the port's FIFO holds, at once.
    let long = "0123456789abcdef".repeat(8);
    vmm.send(&format!("{long}\n"));
    vmm.wait_for(&format!("ECHO {}\r\n", long.to_uppercase()));
    // A closed standard input is no reason to end.
    vmm.send("quit\n");
    vmm.close_input();
    crate::support::report::finish(vmm.wait(), &["echo"]);
}

#[test]
fn a_reset_keeps_serial_input_working() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = BareMetal::new(kvm).word("end=reset").start(&["echo"]);
    for word in ["one", "two", "three"] {
        vmm.wait_for("READY\r\n");
        vmm.send(&format!("{word}\n"));
        vmm.wait_for(&format!("ECHO {}\r\n", word.to_uppercase()));
        vmm.send("quit\n");
    }
    vmm.wait_for("READY\r\n");
    vmm.signal(libc::SIGINT);
    vmm.wait().expect_clean();
}

#[test]
fn serial_to_a_file() {
    let Some(kvm) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let guest = BareMetal::new(kvm).serial(format!("file={}", path.display()));
    let ended = guest.start(&["boot", "memory"]).wait().expect_clean();
    assert_eq!(ended.out, "");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "for its owner alone");
    // A second run replaces the first one's text.
    guest.start(&["boot"]).wait().expect_clean();
    let text = fs::read_to_string(&path).unwrap().replace('\r', "");
    Report::parse(&text).unwrap().expect(&["boot"]);
}

#[test]
fn serial_off_and_null_show_nothing() {
    let Some(kvm) = Kvm::here() else { return };
    for mode in ["off", "null"] {
        // With `off` there is no port: the guest, which polls it, must still come to its end.
        let ended = BareMetal::new(kvm)
            .serial(mode)
            .start(&["boot"])
            .wait()
            .expect_clean();
        assert_eq!(ended.out, "", "--serial {mode}");
    }
}

#[test]
fn threads_have_names() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = BareMetal::new(kvm).cpus(2).start(&["smp", "echo"]);
    vmm.wait_for("READY\r\n");
    let mut names: Vec<String> = fs::read_dir(format!("/proc/{}/task", vmm.pid()))
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap())
        .map(|name| name.trim_end().to_owned())
        .collect();
    names.sort();
    for name in ["control", "vcpu0", "vcpu1"] {
        assert!(names.iter().any(|n| n == name), "{name} not in {names:?}");
    }
    vmm.send("quit\n");
    crate::support::report::finish(vmm.wait(), &["smp", "echo"]);
}

#[test]
fn a_log_file_takes_the_log() {
    let Some(_) = Kvm::here() else { return };
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let vmm = Vmm::builder()
        .option("--kernel", test_guest())
        .option("--log-file", &log)
        .args(["-v", "-v", "-v"])
        .start();
    vmm.wait().expect_clean();
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("GuestShutdown"), "{text}");
}
