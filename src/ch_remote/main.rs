//! The `ch-remote` binary: one request to a running VMM, over its API's socket.

mod args;

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use argh::FromArgs;
use vmm::api::{Resize, ResizeDisk, client};

use args::{Args, Command};

fn main() -> ExitCode {
    let words: Vec<String> = match std::env::args_os()
        .skip(1)
        .map(|word| word.into_string())
        .collect::<Result<_, _>>()
    {
        Ok(words) => words,
        Err(word) => return fail(&anyhow!("argument {word:?} is not UTF-8")),
    };
    let words = args::prepare(&words);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match Args::from_args(&["ch-remote"], &words) {
        Ok(args) => match run(&args) {
            Ok(text) => print(&text),
            Err(e) => fail(&e),
        },
        Err(exit) if exit.status.is_ok() => print(&exit.output),
        Err(exit) => {
            let line = exit.output.split_whitespace().collect::<Vec<_>>().join(" ");
            fail(&anyhow!("{line} (--help lists the commands)"))
        }
    }
}

fn print(text: &str) -> ExitCode {
    let text = text.trim_end();
    if !text.is_empty() {
        // A closed standard output is no failure of ours.
        let _ = writeln!(io::stdout(), "{text}");
    }
    ExitCode::SUCCESS
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(io::stderr(), "ch-remote: {error:#}");
    ExitCode::FAILURE
}

/// Sends the request, and gives what is to be printed.
fn run(args: &Args) -> Result<String> {
    let (method, path, body) = match &args.command {
        Command::Ping(_) => ("GET", "vmm.ping", None),
        Command::ShutdownVmm(_) => ("PUT", "vmm.shutdown", None),
        Command::Info(_) => ("GET", "vm.info", None),
        Command::Counters(_) => ("GET", "vm.counters", None),
        Command::Create(create) => ("PUT", "vm.create", Some(read(create.config.as_deref())?)),
        Command::Boot(_) => ("PUT", "vm.boot", None),
        Command::Delete(_) => ("PUT", "vm.delete", None),
        Command::Pause(_) => ("PUT", "vm.pause", None),
        Command::Resume(_) => ("PUT", "vm.resume", None),
        Command::Shutdown(_) => ("PUT", "vm.shutdown", None),
        Command::Reboot(_) => ("PUT", "vm.reboot", None),
        Command::PowerButton(_) => ("PUT", "vm.power-button", None),
        Command::Nmi(_) => ("PUT", "vm.nmi", None),
        Command::Resize(resize) => {
            let size = |option: &'static str, text: &Option<String>| {
                text.as_deref().map(|t| size(option, t)).transpose()
            };
            let resize = Resize {
                desired_vcpus: resize.cpus,
                desired_ram: size("--memory", &resize.memory)?,
                desired_balloon: size("--balloon", &resize.balloon)?,
                desired_ram_w_balloon: None,
            };
            if resize == Resize::default() {
                anyhow::bail!("resize: one of --cpus, --memory and --balloon is needed");
            }
            ("PUT", "vm.resize", Some(serde_json::to_vec(&resize)?))
        }
        Command::ResizeDisk(resize) => {
            let resize = ResizeDisk {
                id: resize.disk.clone(),
                desired_size: size("--size", &resize.size)?,
            };
            ("PUT", "vm.resize-disk", Some(serde_json::to_vec(&resize)?))
        }
    };
    let socket = Path::new(&args.api_socket);
    let answer = client::request(socket, method, path, body.as_deref())?;
    pretty(&answer)
}

fn size(option: &'static str, text: &str) -> Result<u64> {
    option_parser::parse_size(text)
        .ok_or_else(|| anyhow!("{option}: {text:?} is no size; 512M or 1073741824 would do"))
}

/// A file's bytes, or those of standard input.
fn read(path: Option<&str>) -> Result<Vec<u8>> {
    let Some(path) = path else {
        let mut bytes = Vec::new();
        let read = io::stdin().read_to_end(&mut bytes);
        read.context("reading standard input")?;
        return Ok(bytes);
    };
    fs::read(path).with_context(|| format!("reading {path:?}"))
}

/// JSON for people.
fn pretty(answer: &[u8]) -> Result<String> {
    if answer.is_empty() {
        return Ok(String::new());
    }
    let value: serde_json::Value =
        serde_json::from_slice(answer).context("the answer is not JSON")?;
    Ok(serde_json::to_string_pretty(&value)?)
}
