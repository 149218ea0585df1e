//! Help, version, and words that are no command line. None of these needs `/dev/kvm`.

use crate::support::{Ended, Vmm};

fn run(words: &[&str]) -> Ended {
    Vmm::builder().args(words.iter().copied()).start().wait()
}

#[test]
fn help_tells_of_every_option() {
    let ended = run(&["--help"]).expect_clean();
    for word in [
        "Usage:",
        "--kernel",
        "--initramfs",
        "--cmdline",
        "--cpus",
        "--memory",
        "--serial",
        "--console",
        "--log-file",
        "--version",
        "Ctrl-A x",
        "boot=",
        "size=",
        "file=",
    ] {
        assert!(ended.out.contains(word), "no {word} in {}", ended.out);
    }
}

#[test]
fn version_is_one_line() {
    for word in ["--version", "-V"] {
        let ended = run(&[word]).expect_clean();
        assert_eq!(
            ended.out,
            format!("cloud-hypervisor v{}\n", env!("CARGO_PKG_VERSION"))
        );
    }
}

#[test]
fn help_is_printed_whole_to_a_reader_that_leaves() {
    use std::process::Stdio;
    let builder = Vmm::builder().args(["--help"]);
    let mut command = builder.command();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    command.stdin(Stdio::null()).stdout(writer);
    let mut vmm = builder.spawn(command);
    let status = vmm.wait_exit();
    assert_eq!(status.code(), Some(0));
}

#[test]
fn devices_of_later_versions_are_refused_by_name() {
    for option in ["--fs", "--device", "--gdb", "--restore"] {
        let ended = run(&["--kernel", "k", option, "path=a"]);
        let line = ended.expect_refusal();
        assert!(
            line.contains(&format!("{option} is not built yet")),
            "{line}"
        );
    }
    for (option, value) in [
        ("--seccomp", "true"),
        ("--memory", "size=1G,hotplug_size=1G"),
    ] {
        let ended = run(&["--kernel", "k", option, value]);
        let line = ended.expect_refusal();
        assert!(
            line.contains(option) && line.contains("not built yet"),
            "{line}"
        );
    }
}

#[test]
fn the_terminal_has_one_console() {
    let ended = run(&["--kernel", "k", "--serial", "tty", "--console", "tty"]);
    let line = ended.expect_refusal();
    assert!(
        line.contains("--console: tty is taken by --serial"),
        "{line}"
    );
}

#[test]
fn words_that_are_no_command_line() {
    for (words, wanted) in [
        (&["--krenel", "k"][..], "--krenel"),
        (&["--kernel"], "--kernel"),
        (&["stray"], "stray"),
        (&["--kernel", "a", "--kernel", "b"], "--kernel"),
        (&[], "--kernel"),
    ] {
        let ended = run(words);
        assert_eq!(ended.out, "");
        let line = ended.expect_refusal();
        assert!(line.contains(wanted), "{words:?}: {line}");
    }
}
