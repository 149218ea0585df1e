//! The command line.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use argh::FromArgs;

/// Measures a VMM against plain host programs and, with --other, against another VMM with the same command line. All take turns.
#[derive(Debug, FromArgs)]
#[argh(
    example = "All benchmarks of disks, against another build:
  performance-metrics target/release/cloud-hypervisor --other /usr/local/bin/cloud-hypervisor --filter block",
    note = "Needs /dev/kvm; for network benchmarks and for counts of system calls and exits also root.
Build the guest first: cargo build --profile ci -p test-guest.",
    error_code(
        1,
        "Something could not be measured; one line on standard error says what."
    )
)]
pub struct Args {
    /// the VMM's binary
    #[argh(positional)]
    pub vmm: Option<PathBuf>,

    /// another VMM's binary, to compare with
    #[argh(option, arg_name = "path")]
    pub other: Option<PathBuf>,

    /// the bare-metal guest (the one beside the VMM's binary, or in target/ci)
    #[argh(option, arg_name = "path")]
    pub guest: Option<PathBuf>,

    /// only benchmarks whose name, such as block/rand-read-4k-qd32/qcow2, contains this; may be repeated
    #[argh(option, arg_name = "text")]
    pub filter: Vec<String>,

    /// turns (5)
    #[argh(option, arg_name = "N", default = "5")]
    pub runs: u32,

    /// milliseconds that a measurement lasts (100)
    #[argh(option, arg_name = "N", default = "100")]
    pub time: u32,

    /// where disk images are made (the directory for temporary files)
    #[argh(option, arg_name = "path")]
    pub dir: Option<PathBuf>,

    /// disks past the host's page cache: direct=on, and O_DIRECT in the host program
    #[argh(switch)]
    pub direct: bool,

    /// the results, as JSON, with every sample
    #[argh(option, arg_name = "path")]
    pub json: Option<PathBuf>,

    /// print the benchmarks' names, and do nothing
    #[argh(switch)]
    pub list: bool,
}

/// What the command line asks for.
pub enum Parsed {
    /// Measure, or list.
    Run(Box<Args>),
    /// Print this and end well.
    Print(String),
    /// It is wrong; the line says what.
    Wrong(String),
}

/// Reads the words after the program's name.
pub fn parse(words: &[String]) -> Parsed {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match Args::from_args(&["performance-metrics"], &words) {
        Ok(args) => match args.check() {
            Ok(()) => Parsed::Run(Box::new(args)),
            Err(error) => Parsed::Wrong(format!("{error:#}")),
        },
        Err(exit) if exit.status.is_ok() => Parsed::Print(exit.output),
        Err(exit) => {
            let line = exit.output.split_whitespace().collect::<Vec<_>>().join(" ");
            Parsed::Wrong(format!("{line} (--help lists the options)"))
        }
    }
}

impl Args {
    fn check(&self) -> Result<()> {
        if self.list {
            return Ok(());
        }
        let Some(vmm) = &self.vmm else {
            bail!("which VMM? Give its binary's path (--help lists the options)");
        };
        for path in [Some(vmm), self.other.as_ref(), self.guest.as_ref()] {
            if let Some(path) = path
                && !path.is_file()
            {
                bail!("{}: no such file", path.display());
            }
        }
        if !(1..=1000).contains(&self.runs) {
            bail!("--runs {}: 1 to 1000 are possible", self.runs);
        }
        if !(10..=60_000).contains(&self.time) {
            bail!("--time {}: 10 to 60000 are possible", self.time);
        }
        Ok(())
    }

    /// The bare-metal guest's ELF file.
    ///
    /// # Errors
    /// When it is nowhere.
    pub fn guest(&self) -> Result<PathBuf> {
        if let Some(path) = &self.guest {
            return Ok(path.clone());
        }
        let beside = self.vmm.as_deref().and_then(Path::parent);
        let places = [
            beside.map(|dir| dir.join("test-guest")),
            beside.map(|dir| dir.join("../ci/test-guest")),
            Some("target/ci/test-guest".into()),
        ];
        match places.into_iter().flatten().find(|path| path.is_file()) {
            Some(path) => Ok(path),
            None => {
                bail!("the bare-metal guest is not built: cargo build --profile ci -p test-guest")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(line: &str) -> String {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        match parse(&words) {
            Parsed::Wrong(text) => text,
            _ => panic!("{line} is accepted"),
        }
    }

    #[test]
    fn wrong_words_give_one_line() {
        for (line, wanted) in [
            ("--runs 3", "which VMM?"),
            ("/nowhere/vmm", "/nowhere/vmm: no such file"),
            ("/proc/self/exe --runs 0", "--runs 0: 1 to 1000"),
            ("/proc/self/exe --time 1", "--time 1: 10 to 60000"),
            ("/proc/self/exe --runs x", "--runs"),
            ("/proc/self/exe --rnus 3", "--rnus"),
        ] {
            let text = wrong(line);
            assert!(text.contains(wanted) && !text.contains('\n'), "{text:?}");
        }
    }

    #[test]
    fn a_list_needs_no_vmm() {
        assert!(matches!(parse(&["--list".to_owned()]), Parsed::Run(args) if args.list));
    }
}
