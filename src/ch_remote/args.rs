//! The command line of `ch-remote`.

use argh::FromArgs;

/// Tells a running cloud-hypervisor what to do, over the socket of its API.
#[derive(Debug, FromArgs)]
#[argh(
    example = "ch-remote --api-socket /run/vm.sock pause",
    error_code(0, "It is done; what there is to read is on standard output, as JSON."),
    error_code(1, "It is not; one line on standard error says why.")
)]
pub struct Args {
    /// the VMM's --api-socket
    #[argh(option, arg_name = "path")]
    pub api_socket: String,

    #[argh(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, FromArgs)]
#[argh(subcommand)]
pub enum Command {
    Ping(Ping),
    Info(Info),
    Counters(Counters),
    Create(Create),
    Boot(Boot),
    Delete(Delete),
    Pause(Pause),
    Resume(Resume),
    Shutdown(Shutdown),
    Reboot(Reboot),
    PowerButton(PowerButton),
    Nmi(Nmi),
    Resize(Resize),
    ResizeDisk(ResizeDisk),
    ShutdownVmm(ShutdownVmm),
}

/// Commands without options.
macro_rules! plain {
    ($($(#[doc = $help:literal])+ $name:ident $command:literal;)*) => {$(
        $(#[doc = $help])+
        #[derive(Debug, FromArgs)]
        #[argh(subcommand, name = $command)]
        pub struct $name {}
    )*};
}

plain! {
    /// show version and process of the VMM
    Ping "ping";
    /// show the VM's configuration and state
    Info "info";
    /// show what was counted
    Counters "counters";
    /// start the VM that was created, or shut down
    Boot "boot";
    /// end the VM and forget its configuration
    Delete "delete";
    /// hold the VM
    Pause "pause";
    /// let a paused VM go on
    Resume "resume";
    /// end the VM at once; it can be booted again
    Shutdown "shutdown";
    /// start the VM anew
    Reboot "reboot";
    /// press the VM's power button, and so ask its system to power off
    PowerButton "power-button";
    /// send a non-maskable interrupt to each vCPU
    Nmi "nmi";
    /// end VM and VMM
    ShutdownVmm "shutdown-vmm";
}

/// configure a VM, to be booted later
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "create")]
pub struct Create {
    /// file with its configuration as JSON; standard input where there is none, or -
    #[argh(positional)]
    pub config: Option<String>,
}

/// change the VM's vCPUs, memory or balloon
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "resize")]
pub struct Resize {
    /// vCPUs that there shall be
    #[argh(option, arg_name = "n")]
    pub cpus: Option<u8>,

    /// memory that there shall be
    #[argh(option, arg_name = "size")]
    pub memory: Option<String>,

    /// memory that the balloon shall take from the guest
    #[argh(option, arg_name = "size")]
    pub balloon: Option<String>,
}

/// change the size of a disk; the guest is told
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "resize-disk")]
pub struct ResizeDisk {
    /// the disk's id
    #[argh(option, arg_name = "id")]
    pub disk: String,

    /// bytes; K, M, G and T are understood
    #[argh(option, arg_name = "size")]
    pub size: String,
}

/// The words as argh takes them: `--name=value` becomes two, and `-`, the file that is standard input, is left out.
pub fn prepare(words: &[String]) -> Vec<String> {
    let mut out = Vec::with_capacity(words.len());
    for word in words.iter().filter(|word| *word != "-") {
        match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                out.extend([name.to_owned(), value.to_owned()]);
            }
            _ => out.push(word.clone()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Args, String> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let words = prepare(&words);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Args::from_args(&["ch-remote"], &words).map_err(|exit| exit.output)
    }

    #[test]
    fn commands() {
        for command in [
            "ping",
            "info",
            "counters",
            "boot",
            "delete",
            "pause",
            "resume",
            "shutdown",
            "reboot",
            "power-button",
            "nmi",
            "shutdown-vmm",
        ] {
            read(&format!("--api-socket /s {command}")).unwrap();
            assert!(read(&format!("--api-socket /s {command} x")).is_err());
        }
        let args = read("--api-socket=/s resize-disk --disk a --size=1G").unwrap();
        assert_eq!(args.api_socket, "/s");
        assert!(matches!(args.command, Command::ResizeDisk(r) if r.disk == "a" && r.size == "1G"));
        read("--api-socket /s create -").unwrap();
    }

    #[test]
    fn mistakes() {
        for line in [
            "ping",
            "--api-socket /s",
            "--api-socket /s pong",
            "--api-socket /s create a b",
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}
