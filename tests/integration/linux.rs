//! Linux guests: our own kernel and the distribution's, to user space and back.
//! `resources/guest/init` and `resources/guest/tests` say the `CH-` lines.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::support::{Ended, Kvm, Vmm, asset};

const MIB: u64 = 1 << 20;

/// A guest of one of our kernels, with further words on its command line.
pub struct Linux {
    kernel: &'static str,
    cmdline: &'static str,
    cpus: u64,
    memory: u64,
    patience: Duration,
    disk: Option<String>,
    /// In a network namespace of its own, with this value of `--net`.
    net: Option<&'static str>,
    /// In a network namespace with this address, and without capabilities.
    confined: Option<&'static str>,
    /// Another VMM than the usual one.
    program: Option<PathBuf>,
    /// Another initramfs than the usual one.
    initramfs: Option<PathBuf>,
    /// Further options with their values.
    options: Vec<(&'static str, String)>,
    /// Further options that have no value.
    switches: Vec<&'static str>,
    /// The value of `--memory`, where it says more than the size.
    memory_option: Option<String>,
    /// The kernel's console: `ttyS0` or `hvc0`.
    console: &'static str,
}

impl Linux {
    /// Our kernel with one vCPU and 128 MiB.
    pub fn new(_: Kvm) -> Self {
        Self {
            kernel: "vmlinux",
            cmdline: "cmdline",
            cpus: 1,
            memory: 128 * MIB,
            patience: Duration::from_secs(580),
            disk: None,
            net: None,
            confined: None,
            program: None,
            initramfs: None,
            options: Vec::new(),
            switches: Vec::new(),
            memory_option: None,
            console: "ttyS0",
        }
    }

    /// With this value of `--disk`.
    pub fn disk(mut self, disk: String) -> Self {
        self.disk = Some(disk);
        self
    }

    /// With this VMM instead of the usual one.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// With that many vCPUs.
    pub fn cpus(mut self, cpus: u64) -> Self {
        self.cpus = cpus;
        self
    }

    /// With this initramfs instead of the usual one.
    pub fn initramfs(mut self, path: impl Into<PathBuf>) -> Self {
        self.initramfs = Some(path.into());
        self
    }

    /// With a further option.
    pub fn option(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.options.push((name, value.into()));
        self
    }

    /// With a further option that has no value.
    pub fn switch(mut self, name: &'static str) -> Self {
        self.switches.push(name);
        self
    }

    /// With this value of `--memory`.
    pub fn memory_option(mut self, value: impl Into<String>) -> Self {
        self.memory_option = Some(value.into());
        self
    }

    pub fn start(&self, words: &str) -> Vmm {
        let cmdline = fs::read_to_string(asset(self.cmdline))
            .expect("the command line")
            .replace("console=ttyS0", &format!("console={}", self.console));
        let terminal = match self.console {
            "hvc0" => "--console",
            _ => "--serial",
        };
        let usual = || asset("initramfs.cpio");
        let initramfs = self.initramfs.clone().unwrap_or_else(usual);
        let builder = Vmm::builder()
            .patience(self.patience)
            .option("--kernel", asset(self.kernel))
            .option("--initramfs", initramfs)
            .option("--cmdline", format!("{} {words}", cmdline.trim_end()))
            .option(terminal, "tty")
            .option("--cpus", format!("boot={}", self.cpus))
            .option(
                "--memory",
                self.memory_option
                    .clone()
                    .unwrap_or_else(|| format!("size={}", self.memory)),
            );
        let builder = self.options.iter().fold(builder, |builder, (name, value)| {
            builder.option(name, value)
        });
        let builder = builder.args(self.switches.iter().copied());
        let builder = match &self.program {
            Some(program) => builder.program(program),
            None => builder,
        };
        let builder = match &self.disk {
            Some(disk) => builder.option("--disk", disk),
            None => builder,
        };
        let builder = match self.confined {
            Some(address) => builder.confined(address),
            None => builder,
        };
        match self.net {
            Some(net) => builder.option("--net", net).own_network(),
            None => builder,
        }
        .start()
    }

    /// In a network namespace of its own in which `address` is the host's, and without any capability.
    pub fn confined(mut self, address: &'static str) -> Self {
        self.confined = Some(address);
        self
    }

    /// With this value of `--net`, in a network namespace of its own.
    pub fn net(mut self, net: &'static str) -> Self {
        self.net = Some(net);
        self
    }

    /// Runs a test of the initramfs to its good end and the power-off.
    pub fn run(&self, test: &str) -> Ended {
        let vmm = self.start(&format!("ch.test={test}"));
        Self::finish(vmm, test)
    }

    /// Waits for the good end of that test, and for the power-off.
    pub fn finish(vmm: Vmm, test: &str) -> Ended {
        let ended = vmm.wait().expect_clean();
        for line in [
            "CH-INIT: user space reached",
            &format!("CH-TEST: {test} exit 0"),
            "CH-INIT: powering off",
        ] {
            assert!(
                ended.out.lines().any(|l| l == line),
                "the guest did not say {line:?}"
            );
        }
        ended
    }
}

impl Linux {
    /// User space reads a line from the serial port and says it back, then powers off.
    fn echo(&self) {
        let mut vmm = self.start("ch.test=echo");
        vmm.wait_for("CH-INIT: user space reached");
        vmm.wait_for("CH-ECHO: ready");
        vmm.send("hello, guest\r");
        vmm.wait_for("CH-ECHO: hello, guest");
        vmm.wait_for("CH-INIT: powering off");
        vmm.wait().expect_clean();
    }
}

/// What stands between `CH-BEGIN name` and `CH-END name`.
fn sections(out: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut all = BTreeMap::new();
    let mut lines = out.lines();
    while let Some(line) = lines.next() {
        if let Some(name) = line.strip_prefix("CH-BEGIN ") {
            let end = format!("CH-END {name}");
            all.insert(name, lines.by_ref().take_while(|l| *l != end).collect());
        }
    }
    all
}

/// The guest sees the machine that the options describe, and its firmware tables without a complaint.
fn info(kvm: Kvm, cpus: u64, memory: u64) {
    let linux = Linux {
        cpus,
        memory,
        ..Linux::new(kvm)
    };
    let ended = linux.run("info");
    let sections = sections(&ended.out);

    let cpuinfo = &sections["/proc/cpuinfo"];
    let count = |start| cpuinfo.iter().filter(|l| l.starts_with(start)).count() as u64;
    assert_eq!(count("processor\t"), cpus);
    assert!(
        cpuinfo
            .iter()
            .any(|l| l.starts_with("flags") && l.contains(" hypervisor")),
        "{cpuinfo:?}"
    );

    let total = sections["/proc/meminfo"]
        .iter()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
        .expect("MemTotal")
        .parse::<u64>()
        .unwrap()
        * 1024;
    // The kernel keeps its image, and 64 bytes for each page.
    assert!(
        total <= memory && memory - total < 32 * MIB + memory / 32,
        "MemTotal is {total} of {memory}"
    );

    check_iomem(&sections["/proc/iomem"], memory);

    assert!(
        sections["/proc/interrupts"]
            .iter()
            .any(|l| l.contains("ttyS0")),
        "the serial port has no interrupt"
    );
    let dmesg = &sections["dmesg"];
    for complaint in [
        "ACPI Error",
        "ACPI BIOS Error",
        "ACPI Warning",
        "ACPI Exception",
        "Firmware Bug",
        "firmware bug",
        "WARNING:",
        "BUG:",
        "Call Trace",
        "Oops",
    ] {
        let lines: Vec<_> = dmesg.iter().filter(|l| l.contains(complaint)).collect();
        assert!(lines.is_empty(), "{lines:#?}");
    }
    assert!(
        dmesg
            .iter()
            .any(|l| l.contains("ACPI: Interpreter enabled"))
    );
}

/// RAM adds up and keeps clear of the hole below 4 GiB; the local APIC is where it belongs.
fn check_iomem(lines: &[&str], memory: u64) {
    let ranges: Vec<(u64, u64, &str)> = lines
        .iter()
        .filter(|l| !l.starts_with(' '))
        .map(|l| {
            let (range, name) = l.split_once(" : ").expect("range and name");
            let (start, end) = range.split_once('-').expect("start and end");
            let number = |text| u64::from_str_radix(text, 16).expect("a number");
            (number(start), number(end), name)
        })
        .collect();
    let ram: u64 = ranges
        .iter()
        .filter(|r| r.2 == "System RAM")
        .map(|r| r.1 - r.0 + 1)
        .sum();
    assert!(
        ram <= memory && memory - ram <= MIB,
        "RAM is {ram} of {memory}"
    );
    assert!(
        ranges
            .iter()
            .all(|r| r.2 != "System RAM" || r.1 < 3 << 30 || r.0 >= 4 << 30),
        "RAM in the hole: {ranges:x?}"
    );
    let all = lines.join("\n");
    assert!(all.contains("fee00000-fee00fff : Local APIC"), "{all}");
}

#[test]
fn info_with_one_vcpu() {
    let Some(kvm) = Kvm::here() else { return };
    info(kvm, 1, 128 * MIB);
}

#[test]
fn info_with_two_vcpus() {
    let Some(kvm) = Kvm::here() else { return };
    info(kvm, 2, 512 * MIB);
}

#[test]
fn all_vcpus_run_processes() {
    let Some(kvm) = Kvm::here() else { return };
    // From four on Linux would send its interrupts by hypercalls, where KVM has them.
    let linux = Linux {
        cpus: 4,
        ..Linux::new(kvm)
    };
    let ended = linux.run("cpus");
    for line in [
        "CH-CPUS: online 0-3",
        "CH-CPUS: ran on 0",
        "CH-CPUS: ran on 3",
    ] {
        assert!(ended.out.lines().any(|l| l == line), "no {line:?}");
    }
}

#[test]
fn a_shell_takes_commands() {
    let Some(kvm) = Kvm::here() else { return };
    let mut vmm = Linux::new(kvm).start("");
    vmm.wait_for("guest:/# ");
    vmm.send("echo $((6 * 7)) is the answer\r");
    vmm.wait_for("42 is the answer");
    vmm.wait_for("guest:/# ");
    vmm.send("poweroff\r");
    vmm.wait().expect_clean();
}

#[test]
fn a_process_reads_the_serial_port() {
    let Some(kvm) = Kvm::here() else { return };
    Linux::new(kvm).echo();
}

#[test]
fn a_process_reads_the_virtio_console() {
    let Some(kvm) = Kvm::here() else { return };
    let linux = Linux {
        console: "hvc0",
        ..Linux::new(kvm)
    };
    linux.echo();
}

#[test]
fn reboot_starts_linux_anew() {
    let Some(kvm) = Kvm::here() else { return };
    let linux = Linux {
        cpus: 2,
        ..Linux::new(kvm)
    };
    let mut vmm = linux.start("ch.reboot");
    for _ in 0..2 {
        vmm.wait_for("CH-INIT: user space reached");
    }
    vmm.signal(libc::SIGTERM);
    vmm.wait().expect_clean();
}

#[test]
fn a_bzimage_unpacks_itself_and_reaches_user_space() {
    let Some(kvm) = Kvm::here() else { return };
    let linux = Linux {
        kernel: "bzImage",
        ..Linux::new(kvm)
    };
    linux.echo();
}

#[test]
fn stock_cloud_kernel_reaches_user_space() {
    let Some(kvm) = Kvm::here() else { return };
    let linux = Linux {
        kernel: "vmlinux-cloud",
        cmdline: "cmdline-cloud",
        patience: Duration::from_secs(1400),
        ..Linux::new(kvm)
    };
    linux.echo();
}
