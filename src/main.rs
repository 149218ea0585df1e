//! The `cloud-hypervisor` binary: reads the command line, starts the control thread, tells how it
//! ended.

mod args;
mod logger;
mod offered;

use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};

use hypervisor::kvm::Kvm;
use vmm::api::{self, ApiSocket, Listening};
use vmm::console::terminal;
use vmm::signals::Signals;
use vmm::{control, event, threads};

fn main() -> ExitCode {
    let words: Vec<String> = match std::env::args_os()
        .skip(1)
        .map(|word| word.into_string())
        .collect::<Result<_, _>>()
    {
        Ok(words) => words,
        Err(word) => return fail(&anyhow!("argument {word:?} is not UTF-8")),
    };
    match args::parse(&words) {
        args::Parsed::Run(run) => match start(&run) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => fail(&e),
        },
        args::Parsed::Print(text) => {
            // A closed standard output is no failure of ours.
            let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
            ExitCode::SUCCESS
        }
        args::Parsed::Wrong(line) => fail(&anyhow!(line)),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // With standard error closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "cloud-hypervisor: {error:#}");
    ExitCode::FAILURE
}

fn start(run: &args::Run) -> Result<()> {
    let args = &run.args;
    logger::install(args.log_file.as_deref(), args.verbosity)?;
    let config = run.vm()?;
    restore_terminal_on_panic();
    restrict_new_files();
    let socket = api_socket(args.api_socket.as_deref())?;

    // Signals are blocked before the first thread starts, so that all threads inherit it.
    let signals = Signals::block().context("blocking signals")?;
    threads::install_kick_handler().context("installing the kick signal's handler")?;
    let kvm = Kvm::new()?;
    for (name, effect) in hypervisor::Hypervisor::missing_optional(&kvm) {
        log::info!("KVM here lacks {name}: {effect}");
    }
    let (events, receiver) = event::event_channel().context("creating an eventfd")?;
    let for_thread = events.try_clone().context("cloning an eventfd")?;
    let (calls, to_answer) = api::call_channel(&events).context("cloning an eventfd")?;
    let for_api = events.try_clone().context("cloning an eventfd")?;
    let control = threads::spawn("control".into(), events, move || {
        control::run(&kvm, config, &signals, &for_thread, &receiver, &to_answer)
    })
    .context("starting the control thread")?;
    // The guest starts meanwhile.
    let api = match socket {
        Some(Listening { listener, file }) => {
            let server = api::Server::start(listener, calls, for_api);
            Some((server.context("starting the API thread")?, file))
        }
        None => None,
    };
    let ended = control.join();
    if let Some((server, file)) = api {
        drop(file);
        server.finish();
    }
    match ended {
        Ok(Some(result)) => {
            let ended = result?;
            log::info!("ended: {ended:?}");
            Ok(())
        }
        Ok(None) | Err(_) => Err(anyhow!("the control thread panicked; this is a bug")),
    }
}

/// Listens where the API is to be: where the option says, or else at a path of our own, without which a guest can do.
fn api_socket(option: Option<&str>) -> Result<Option<Listening>> {
    match option {
        Some("") => Ok(Some(ApiSocket::listen_at_default()?)),
        Some(text) => Ok(Some(ApiSocket::parse(text)?.listen()?)),
        None => match ApiSocket::listen_at_default() {
            Ok(listening) => Ok(Some(listening)),
            Err(e) => {
                log::warn!("there is no API: {}", vmm::error_chain(&e));
                Ok(None)
            }
        },
    }
}

/// A panic anywhere leaves a usable terminal with all the guest's output on it.
fn restore_terminal_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        vmm::console::flush_in_panic();
        terminal::restore();
        default(info);
    }));
}

/// What we create is for the owner alone.
#[allow(unsafe_code)]
fn restrict_new_files() {
    // SAFETY: umask only changes this process's file creation mask.
    unsafe {
        libc::umask(0o077);
    }
}
