//! The command line: argh's structure, and what argh doesn't do (several values after one flag,
//! `--option=value`, options without their value, options that are not built yet).

use anyhow::Result;
use argh::FromArgs;
use vmm::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig, Offered,
    PayloadConfig, PmemConfig, RateLimitGroupConfig, VmConfig, VsockConfig,
};

use crate::offered;

/// A virtual machine monitor for modern cloud workloads on KVM.
///
/// Boots a 64-bit guest from --kernel: an ELF kernel or firmware with a PVH note, an ELF kernel by
/// the 64-bit Linux protocol, or a bzImage.
#[derive(Debug, FromArgs)]
#[argh(
    example = "A shell in a guest of 2 vCPUs and 256 MiB:
  cloud-hypervisor --kernel vmlinux --initramfs initramfs.cpio --cmdline console=ttyS0 --cpus boot=2 --memory size=256M --serial tty",
    note = "Lists are key=value pairs with commas between them; sizes take K, M, G or T.
At a terminal, Ctrl-A x ends the VM, and Ctrl-A Ctrl-A sends one Ctrl-A.",
    error_code(0, "The guest powered off, or the VMM was told to end."),
    error_code(
        1,
        "A wrong command line, or a VM that could not go on; one line on standard error says why."
    )
)]
pub struct Args {
    /// kernel (ELF or bzImage) or PVH firmware to boot
    #[argh(option, arg_name = "path")]
    pub kernel: Option<String>,

    /// initial RAM file system
    #[argh(option, arg_name = "path")]
    pub initramfs: Option<String>,

    /// kernel command line, 64 KiB at most
    #[argh(option, arg_name = "text")]
    pub cmdline: Option<String>,

    /// boot=N (1), max=N (boot), topology=threads:cores:dies:packages (product = max); 1 to 254
    #[argh(option, arg_name = "list", default = "String::new()")]
    pub cpus: String,

    /// size=S (512M), mergeable=on|off, shared=on|off, hugepages=on|off (all off), hotplug_method=acpi|virtio-mem (acpi),
    /// hotplug_size=S and hotplugged_size=S (0) of virtio-mem, balloon=on|off (off)
    #[argh(option, arg_name = "list", default = "String::new()")]
    pub memory: String,

    /// path=FILE, readonly=on|off, direct=on|off (off), num_queues=N (1), queue_size=N (128),
    /// image_type=raw|qcow2 (found out), backing_files=on|off (off), sparse=on|off (on), poll_queue=on|off (on),
    /// serial=TEXT, queue_affinity=[Q@[CPU,..],..] (host CPUs of a queue's thread), bw_size=S with bw_refill_time=MS and
    /// ops_size=N with ops_refill_time=MS (limits; also bw_one_time_burst, ops_one_time_burst), rate_limit_group=ID,
    /// lock_granularity=byte-range|full (byte-range), iommu=on|off (off), id=NAME; or, for a disk that another process serves,
    /// vhost_user=on with socket=PATH (needs --memory shared=on), num_queues, queue_size, readonly, id; one list a disk
    #[argh(option, arg_name = "list")]
    pub disk: Vec<String>,

    /// id=NAME, bw_size=S with bw_refill_time=MS, ops_size=N with ops_refill_time=MS, bw_one_time_burst, ops_one_time_burst:
    /// limits that all disks with rate_limit_group=NAME share; one list a group
    #[argh(option, arg_name = "list")]
    pub rate_limit_group: Vec<String>,

    /// user (no tap, no root: the network is in this process; with network=N (10.0.2.0/24), hostfwd=[tcp:127.0.0.1:2222-:22,..],
    /// host_loopback=on|off (off), dns=A (the host's)), or tap=NAME (a new one) or fd=[N,..] (descriptors of one, a pair of queues
    /// each), ip=A (192.168.249.1) and mask=M (255.255.255.0) of the host's end, mac=MAC and host_mac=MAC (at random), mtu=N,
    /// num_queues=N (2), queue_size=N (256),
    /// offload_tso, offload_ufo, offload_csum=on|off (on), bw_size=S with bw_refill_time=MS and ops_size=N with ops_refill_time=MS
    /// (limits of each direction; also bw_one_time_burst, ops_one_time_burst), iommu=on|off (off), id=NAME;
    /// one list a device
    #[argh(option, arg_name = "list")]
    pub net: Vec<String>,

    /// cid=N (3 to 4294967294), socket=PATH, iommu=on|off (off), id=NAME: sockets between guest and host; a program of the host connects to PATH
    /// and says CONNECT port, and a guest that connects to port P of the host finds who listens at PATH_P
    #[argh(option, arg_name = "list")]
    pub vsock: Option<String>,

    /// file=FILE or a directory, size=S (the file's; a multiple of 2M), mergeable=on|off, discard_writes=on|off (off),
    /// iommu=on|off (off), id=NAME: persistent memory; one list a device
    #[argh(option, arg_name = "list")]
    pub pmem: Vec<String>,

    /// size=S (0) that the guest gives up, deflate_on_oom=on|off, free_page_reporting=on|off (off), id=NAME
    #[argh(option, arg_name = "list")]
    pub balloon: Option<String>,

    /// a device by which the guest tells that it panicked; the log then says so
    #[argh(switch)]
    pub pvpanic: bool,

    /// COM1: off, null (default), tty, pty, file=PATH, or socket=PATH
    #[argh(option, arg_name = "mode", default = "\"null\".into()")]
    pub serial: String,

    /// virtio console: off, null, tty, pty, file=PATH, or socket=PATH (tty, unless --serial is; then off)
    #[argh(option, arg_name = "mode")]
    pub console: Option<String>,

    /// UNIX socket of the API: a path, or fd=N of an inherited one (/run/user/UID/cloud-hypervisor.PID, as
    /// root /run/cloud-hypervisor.PID); without --kernel the VMM waits there for a VM
    #[argh(option, arg_name = "path")]
    pub api_socket: Option<String>,

    /// system call filters: false (they are not built yet)
    #[argh(option, arg_name = "mode", default = "\"false\".into()")]
    pub seccomp: String,

    /// file for the log instead of standard error
    #[argh(option, arg_name = "path")]
    pub log_file: Option<String>,

    /// log more: errors only, then warnings (-v), information (-vv), debugging (-vvv)
    #[argh(switch, short = 'v', long = "verbose")]
    pub verbosity: u32,

    /// print the version
    #[argh(switch, short = 'V')]
    pub version: bool,
}

/// A command line that is to be run.
#[derive(Debug)]
pub struct Run {
    /// What argh knows.
    pub args: Args,
    /// What it doesn't.
    offered: Offered,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Parsed {
    /// Run a VM.
    Run(Box<Run>),
    /// Print this and end well.
    Print(String),
    /// It is wrong; the line says what.
    Wrong(String),
}

/// Options of the surface whose devices or services come later.
const NOT_BUILT: &[&str] = &[
    "debug-console",
    "device",
    "event-monitor",
    "firmware",
    "fs",
    "gdb",
    "landlock",
    "landlock-rules",
    "memory-zone",
    "numa",
    "pci-segment",
    "platform",
    "restore",
    "tpm",
    "user-device",
    "vdpa",
];

/// Reads the words after the program's name.
pub fn parse(words: &[String]) -> Parsed {
    let (offered, words) = match offered::take(&split_equals(words)) {
        Ok(taken) => taken,
        Err(error) => return Parsed::Wrong(error.to_string()),
    };
    let words = repeat_lists(&words);
    for word in &words {
        if let Some(name) = word.strip_prefix("--")
            && NOT_BUILT.contains(&name)
        {
            return Parsed::Wrong(format!("{word} is not built yet in this version"));
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match Args::from_args(&["cloud-hypervisor"], &words) {
        Ok(args) if args.version => {
            Parsed::Print(format!("cloud-hypervisor v{}", env!("CARGO_PKG_VERSION")))
        }
        Ok(args) => Parsed::Run(Box::new(Run { args, offered })),
        Err(exit) if exit.status.is_ok() => Parsed::Print(offered::complete_help(&exit.output)),
        Err(exit) => {
            let line = exit.output.split_whitespace().collect::<Vec<_>>().join(" ");
            Parsed::Wrong(format!("{line} (--help lists the options)"))
        }
    }
}

/// `--name=value` becomes two words, and `-vvv` three. The values of options are left alone.
fn split_equals(words: &[String]) -> Vec<String> {
    let mut out = Vec::with_capacity(words.len());
    for word in words {
        match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                out.push(name.to_owned());
                out.push(value.to_owned());
            }
            _ if word.len() > 2
                && word.starts_with("-v")
                && word.bytes().skip(1).all(|b| b == b'v') =>
            {
                out.extend((1..word.len()).map(|_| "-v".to_owned()));
            }
            _ => out.push(word.clone()),
        }
    }
    out
}

/// `--disk a b` becomes `--disk a --disk b`, and an option whose default serves gets an empty value
/// where it has none.
fn repeat_lists(words: &[String]) -> Vec<String> {
    let is_option = |word: &String| word.starts_with('-');
    let mut out = Vec::with_capacity(words.len());
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        out.push(word.clone());
        match word.as_str() {
            "--disk" | "--net" | "--pmem" | "--rate-limit-group" => {
                out.push(
                    words
                        .next_if(|w| !is_option(w))
                        .cloned()
                        .unwrap_or_default(),
                );
                while let Some(value) = words.next_if(|w| !is_option(w)) {
                    out.extend([word.clone(), value.clone()]);
                }
            }
            "--api-socket" | "--cpus" | "--memory" | "--balloon" => {
                out.push(
                    words
                        .next_if(|w| !is_option(w))
                        .cloned()
                        .unwrap_or_default(),
                );
            }
            _ => out.extend(words.next_if(|w| !is_option(w)).cloned()),
        }
    }
    out
}

impl Run {
    /// The VM to boot; none where one comes through the API.
    pub fn vm(&self) -> Result<Option<VmConfig>> {
        let config = self.vm_config()?;
        let Self { args, .. } = self;
        if args.kernel.is_some() || args.api_socket.is_none() {
            config.validate()?;
            return Ok(Some(config));
        }
        // Whoever describes a machine wants it started.
        if config != VmConfig::default() || args.initramfs.is_some() || args.cmdline.is_some() {
            anyhow::bail!(
                "--kernel is missing; without it a VM comes through the API alone, with its options"
            );
        }
        Ok(None)
    }

    /// The VM that the options describe.
    pub fn vm_config(&self) -> Result<VmConfig> {
        let Self { args, offered } = self;
        if args.seccomp != "false" {
            anyhow::bail!("--seccomp: {:?} is not built yet; false is", args.seccomp);
        }
        let payload = args.kernel.as_ref().map(|kernel| PayloadConfig {
            kernel: kernel.into(),
            initramfs: args.initramfs.as_ref().map(Into::into),
            cmdline: args.cmdline.clone().unwrap_or_default(),
        });
        Ok(VmConfig {
            cpus: CpusConfig::parse(&args.cpus)?,
            memory: MemoryConfig::parse(&args.memory)?,
            payload,
            serial: ConsoleConfig::parse("--serial", &args.serial)?,
            console: match &args.console {
                None => None,
                Some(mode) => Some(ConsoleConfig::parse("--console", mode)?),
            },
            disks: args
                .disk
                .iter()
                .map(|text| DiskConfig::parse(text))
                .collect::<Result<_, _>>()?,
            rate_limit_groups: args
                .rate_limit_group
                .iter()
                .map(|text| RateLimitGroupConfig::parse(text))
                .collect::<Result<_, _>>()?,
            net: args
                .net
                .iter()
                .map(|text| NetConfig::parse(text))
                .collect::<Result<_, _>>()?,
            pvpanic: args.pvpanic,
            offered: offered.clone(),
            vsock: match &args.vsock {
                None => None,
                Some(text) => Some(VsockConfig::parse(text)?),
            },
            balloon: match &args.balloon {
                None => None,
                Some(text) => Some(BalloonConfig::parse(text)?),
            },
            pmem: args
                .pmem
                .iter()
                .map(|text| PmemConfig::parse(text))
                .collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    fn wrong(line: &str) -> String {
        match parse(&words(line)) {
            Parsed::Wrong(text) => text,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn a_full_line_becomes_a_config() {
        let Parsed::Run(run) = parse(&words(
            "--kernel k --initramfs=i --cmdline console=ttyS0 --cpus boot=2 --memory size=1G --serial tty --console off -v -vv",
        )) else {
            panic!("refused");
        };
        assert_eq!(run.args.verbosity, 3);
        let config = run.vm_config().unwrap();
        assert_eq!(config.cpus.boot, 2);
        assert_eq!(config.memory.size, 1 << 30);
        let payload = config.payload.unwrap();
        assert_eq!(payload.cmdline, "console=ttyS0");
        assert_eq!(payload.initramfs.unwrap().to_str(), Some("i"));
    }

    #[test]
    fn options_of_later_devices_are_refused_by_name() {
        for name in NOT_BUILT {
            let text = wrong(&format!("--kernel k --{name} x"));
            assert!(
                text.contains(&format!("--{name} is not built yet")),
                "{text}"
            );
        }
    }

    #[test]
    fn wrong_words_give_one_line() {
        for line in ["--krenel k", "--kernel", "stray", "--serial"] {
            let text = wrong(line);
            assert!(!text.contains('\n'), "{text:?}");
        }
    }

    #[test]
    fn several_disks_after_one_flag_and_flags_without_a_value() {
        let line = "--kernel k --disk path=a path=b,readonly=on -v --disk path=c --net --net tap=,mac= --rng --cpus --memory";
        let Parsed::Run(run) = parse(&words(line)) else {
            panic!("refused");
        };
        let config = run.vm_config().unwrap();
        let paths: Vec<_> = config
            .disks
            .iter()
            .map(|d| d.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["a", "b", "c"]);
        assert_eq!(run.args.verbosity, 1);
        assert_eq!(config.net, [NetConfig::default(), NetConfig::default()]);
        assert_eq!(config.offered, Offered::default());
        assert_eq!(config.cpus, CpusConfig::default());
    }

    #[test]
    fn without_a_kernel_a_vm_comes_through_the_api() {
        let vm = |line| match parse(&words(line)) {
            Parsed::Run(run) => run.vm(),
            other => panic!("{line}: {other:?}"),
        };
        for line in ["--api-socket", "--api-socket /s", "--api-socket=fd=3 -v"] {
            assert_eq!(vm(line).unwrap(), None, "{line}");
        }
        assert!(vm("--api-socket /s --kernel k").unwrap().is_some());
        for line in [
            "-v",
            "--api-socket /s --disk path=a",
            "--api-socket --cmdline x",
        ] {
            let error = vm(line).unwrap_err().to_string();
            assert!(error.starts_with("--kernel"), "{error}");
        }
    }

    #[test]
    fn a_disk_without_its_path_is_said_so() {
        for line in [
            "--kernel k --disk",
            "--kernel k --disk -v",
            "--disk readonly=on",
        ] {
            let Parsed::Run(run) = parse(&words(line)) else {
                panic!("{line}");
            };
            let error = run.vm_config().unwrap_err().to_string();
            assert_eq!(error, "--disk: path is missing", "{line}");
        }
    }

    #[test]
    fn help_names_every_option() {
        let Parsed::Print(text) = parse(&words("--help")) else {
            panic!("no help");
        };
        for option in [
            "--kernel",
            "--initramfs",
            "--cmdline",
            "--cpus",
            "--memory",
            "--serial",
        ] {
            assert!(text.contains(option), "{option} missing in {text}");
        }
    }

    #[test]
    fn version_is_one_line() {
        let Parsed::Print(text) = parse(&words("--version")) else {
            panic!("no version");
        };
        assert!(text.starts_with("cloud-hypervisor v"));
    }
}
