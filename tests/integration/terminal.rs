//! `--serial tty` at a terminal: raw while the guest has it, as it was afterwards, however the VMM ends.

use crate::support::pty::Pty;
use crate::support::{BareMetal, Kvm};

/// Starts a guest that waits for input at a terminal, leaves it by `leave`, and holds the terminal's settings before
/// and after against each other.
fn visit(kvm: Kvm, leave: impl Fn(&mut crate::support::Vmm), code: i32) {
    let pty = Pty::new();
    let before = pty.settings();
    assert!(!before.is_raw());
    let guest = BareMetal::new(kvm);
    let mut vmm = pty.start(&guest.builder(&["echo"]));
    vmm.wait_for("READY");
    let during = pty.settings();
    assert!(during.is_raw(), "{during:?}");
    vmm.send("typed\r");
    vmm.wait_for("ECHO TYPED");
    leave(&mut vmm);
    let status = vmm.wait_exit();
    assert_eq!(pty.settings(), before);
    pty.close();
    let ended = vmm.wait();
    assert_eq!(status.code(), Some(code), "{}", ended.err);
    // The guest's echo comes once: the terminal added none of its own.
    assert_eq!(ended.out.matches("typed").count(), 0, "{}", ended.out);
}

#[test]
fn ctrl_a_x_leaves() {
    let Some(kvm) = Kvm::here() else { return };
    visit(kvm, |vmm| vmm.send("\x01x"), 0);
}

#[test]
fn a_guest_that_powers_off_gives_the_terminal_back() {
    let Some(kvm) = Kvm::here() else { return };
    visit(kvm, |vmm| vmm.send("quit\r"), 0);
}

#[test]
fn sigterm_gives_the_terminal_back() {
    let Some(kvm) = Kvm::here() else { return };
    visit(kvm, |vmm| vmm.signal(libc::SIGTERM), 0);
}

#[test]
fn ctrl_c_and_ctrl_a_twice_go_to_the_guest() {
    let Some(kvm) = Kvm::here() else { return };
    let bytes_arrive = |vmm: &mut crate::support::Vmm| {
        vmm.send("a\x03b\x01\x01c\r");
        vmm.wait_for("ECHO A\x03B\x01C");
        vmm.send("\x01x");
    };
    visit(kvm, bytes_arrive, 0);
}

#[test]
fn a_crash_of_the_guest_gives_the_terminal_back() {
    let Some(kvm) = Kvm::here() else { return };
    let pty = Pty::new();
    let before = pty.settings();
    let guest = BareMetal::new(kvm).word("end=triple");
    let mut vmm = pty.start(&guest.builder(&["boot"]));
    let status = vmm.wait_exit();
    assert_eq!(status.code(), Some(1));
    assert_eq!(pty.settings(), before);
    pty.close();
    let ended = vmm.wait();
    assert!(ended.expect_refusal().contains("triple fault"));
}

#[test]
fn a_refusal_leaves_the_terminal_alone() {
    let Some(kvm) = Kvm::here() else { return };
    let pty = Pty::new();
    let before = pty.settings();
    let guest = BareMetal::new(kvm).kernel("/nonexistent/kernel".as_ref());
    let mut vmm = pty.start(&guest.builder(&["boot"]));
    vmm.wait_exit();
    assert_eq!(pty.settings(), before);
    pty.close();
    let ended = vmm.wait();
    assert!(ended.expect_refusal().contains("/nonexistent/kernel"));
    assert_eq!(ended.out, "");
}
