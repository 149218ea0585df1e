//! The control thread: it owns the machine, and waits for events, signals and typed input.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::path::PathBuf;

use hypervisor::Hypervisor;
use thiserror::Error;
use virtio_devices::{VsockError, VsockListener};

use crate::config::{ConsoleMode, VmConfig};
use crate::console::{Escape, Output, Outputs, terminal};
use crate::event::{Event, EventReceiver, EventSender};
use crate::machine::{Machine, MachineError};
use crate::signals::{Signals, Taken};

/// Why the VMM ended without a failure of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// The guest powered off.
    GuestShutdown,
    /// SIGTERM or SIGINT.
    Signal,
    /// Ctrl-A x.
    Typed,
}

/// What ends the VMM with exit code 1.
#[derive(Debug, Error)]
pub enum ControlError {
    /// A descriptor that the control thread needs.
    #[error("setting up the control thread: {what}")]
    Setup {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file of `--serial file=` or `--console file=`.
    #[error("{option}: opening {path:?}")]
    File {
        /// Which of them.
        option: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The socket of `--vsock`.
    #[error("--vsock")]
    Vsock(#[source] VsockError),
    /// The machine cannot be built or booted.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest is lost.
    #[error(
        "vCPU {cpu} took a triple fault: the guest crashed before it could handle an exception"
    )]
    TripleFault {
        /// vCPU number.
        cpu: u32,
    },
    /// Something that the VM cannot live without failed.
    #[error("{0}")]
    Failed(String),
}

fn setup(what: &'static str) -> impl Fn(io::Error) -> ControlError {
    move |source| ControlError::Setup { what, source }
}

/// Boots the VM of `config` and serves it to its end.
pub fn run(
    hypervisor: &dyn Hypervisor,
    config: &VmConfig,
    signals: &Signals,
    events: &EventSender,
    receiver: &EventReceiver,
) -> Result<Ended, ControlError> {
    let vsock = config.vsock.as_ref();
    let vsock = vsock
        .map(|vsock| VsockListener::bind(&vsock.socket))
        .transpose()
        .map_err(ControlError::Vsock)?;
    let sinks = [
        Sink::open("--serial", &config.serial.mode)?,
        Sink::open("--console", config.console_mode())?,
    ];
    let outputs = Outputs {
        serial: sinks[0].output("serial-out", events)?,
        console: sinks[1].output("console-out", events)?,
        vsock,
    };
    let mut machine = match Machine::new(hypervisor, config, &outputs, events) {
        Ok(machine) => machine,
        Err(e) => {
            sinks.iter().for_each(Sink::undo);
            return Err(e.into());
        }
    };
    // Files are emptied and the terminal turns raw only now: an error above finds them as they
    // were.
    sinks.iter().try_for_each(Sink::begin)?;
    let mut typing = Typing::start(config)?;
    machine.start(events)?;
    let ended = loop {
        if let Some(ended) = wait(&mut machine, &mut typing, signals, receiver)? {
            break ended;
        }
        let mut reset = false;
        while let Some(event) = receiver.try_next() {
            match event {
                Event::GuestShutdown => return finish(machine, &outputs, Ok(Ended::GuestShutdown)),
                Event::GuestReset => reset = true,
                Event::OutputRoom => machine.devices().output_ready(),
                Event::TripleFault { cpu } => {
                    return finish(machine, &outputs, Err(ControlError::TripleFault { cpu }));
                }
                Event::Failed(why) => {
                    return finish(machine, &outputs, Err(ControlError::Failed(why)));
                }
            }
        }
        if reset {
            log::info!("the guest asked for a reset: starting it anew");
            drop(machine);
            // Events that the old machine's other vCPUs sent on their way out. If the output got
            // room among them, the new serial port has nothing waiting for it.
            while receiver.try_next().is_some() {}
            machine = Machine::new(hypervisor, config, &outputs, events)?;
            machine.start(events)?;
        }
    };
    finish(machine, &outputs, Ok(ended))
}

fn finish(
    machine: Machine,
    outputs: &Outputs,
    result: Result<Ended, ControlError>,
) -> Result<Ended, ControlError> {
    drop(machine);
    for output in [&outputs.serial, &outputs.console].into_iter().flatten() {
        output.close();
    }
    result
}

/// The host's end of a console's output.
struct Sink {
    option: &'static str,
    sink: Option<File>,
    /// Of `file=`.
    path: Option<PathBuf>,
    /// The file was not there before.
    created: bool,
}

impl Sink {
    fn open(option: &'static str, mode: &ConsoleMode) -> Result<Self, ControlError> {
        let mut this = Self {
            option,
            sink: None,
            path: None,
            created: false,
        };
        match mode {
            ConsoleMode::Off | ConsoleMode::Null => {}
            ConsoleMode::Tty => {
                let sink = duplicate(libc::STDOUT_FILENO).map_err(setup("standard output"))?;
                this.sink = Some(sink);
            }
            ConsoleMode::File(path) => {
                let mut options = OpenOptions::new();
                options.write(true);
                let opened = match options.clone().create_new(true).open(path) {
                    Ok(file) => {
                        this.created = true;
                        Ok(file)
                    }
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => options.open(path),
                    Err(e) => Err(e),
                };
                this.sink = Some(opened.map_err(|source| ControlError::File {
                    option,
                    path: path.clone(),
                    source,
                })?);
                this.path = Some(path.clone());
            }
        }
        Ok(this)
    }

    /// Starts the thread that writes to it.
    fn output(&self, thread: &str, events: &EventSender) -> Result<Option<Output>, ControlError> {
        let Some(sink) = &self.sink else {
            return Ok(None);
        };
        let sink = sink.try_clone().map_err(setup("console output"))?;
        let events = events.try_clone().map_err(setup("eventfd"))?;
        let output = Output::start(thread, sink, events).map_err(setup("output thread"))?;
        Ok(Some(output))
    }

    /// Empties a regular file for what is to come.
    fn begin(&self) -> Result<(), ControlError> {
        if let (Some(file), Some(_)) = (&self.sink, &self.path)
            && file.metadata().is_ok_and(|m| m.is_file())
        {
            file.set_len(0).map_err(|source| ControlError::File {
                option: self.option,
                path: self.path.clone().unwrap_or_default(),
                source,
            })?;
        }
        Ok(())
    }

    /// Takes back a file that was created for nothing.
    fn undo(&self) {
        if let (true, Some(path)) = (self.created, &self.path)
            && let Err(e) = std::fs::remove_file(path)
        {
            log::warn!("removing {}: {e}", path.display());
        }
    }
}

#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: fcntl only makes a new descriptor, which is checked.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new and has no other owner.
    Ok(unsafe { File::from_raw_fd(new) })
}

/// Standard input on its way to the console that has the terminal.
struct Typing {
    input: Option<File>,
    escape: Option<Escape>,
    /// Read, and not yet taken by the console.
    waiting: Vec<u8>,
    _raw: Option<terminal::RawMode>,
}

impl Typing {
    fn start(config: &VmConfig) -> Result<Self, ControlError> {
        let mut typing = Self {
            input: None,
            escape: None,
            waiting: Vec::new(),
            _raw: None,
        };
        let modes = [&config.serial.mode, config.console_mode()];
        if modes.contains(&&ConsoleMode::Tty) {
            // A process may be started without standard input; it then simply has none.
            typing.input = duplicate(libc::STDIN_FILENO).ok();
            if terminal::is_terminal(libc::STDIN_FILENO) {
                typing.escape = Some(Escape::default());
                typing._raw = Some(terminal::RawMode::enter().map_err(setup("terminal"))?);
            }
        }
        Ok(typing)
    }

    /// Reads once. True when the person wants to leave.
    fn read(&mut self) -> bool {
        let Some(input) = &mut self.input else {
            return false;
        };
        let mut buffer = [0; 256];
        match input.read(&mut buffer) {
            Ok(0) => self.input = None,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                match &mut self.escape {
                    None => self.waiting.extend_from_slice(bytes),
                    Some(escape) => {
                        let typed = escape.feed(bytes);
                        self.waiting.extend_from_slice(&typed.to_guest);
                        return typed.leave;
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                log::warn!("reading standard input: {e}");
                self.input = None;
            }
        }
        false
    }

    fn pass_to(&mut self, machine: &Machine) {
        let taken = machine.devices().type_in(&self.waiting);
        self.waiting.drain(..taken.min(self.waiting.len()));
    }
}

/// Waits for something to do. `Some` when the VMM is to end.
fn wait(
    machine: &mut Machine,
    typing: &mut Typing,
    signals: &Signals,
    receiver: &EventReceiver,
) -> Result<Option<Ended>, ControlError> {
    let watch = |fd: RawFd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    // poll skips negative descriptors.
    let input = match &typing.input {
        Some(input) if typing.waiting.is_empty() => input.as_raw_fd(),
        _ => -1,
    };
    let mut fds = [
        watch(receiver.wake_fd().as_raw_fd()),
        watch(signals.as_raw_fd()),
        watch(
            machine
                .devices()
                .input_room()
                .map_or(-1, |fd| fd.as_raw_fd()),
        ),
        watch(input),
    ];
    poll(&mut fds).map_err(setup("poll"))?;
    let [events, signal, room, typed] = fds.map(|fd| fd.revents != 0);
    if events {
        // Only a wake-up: the channel has the events.
        let _ = receiver.wake_fd().read();
    }
    if signal {
        match signals.take() {
            Some(Taken::End) => return Ok(Some(Ended::Signal)),
            Some(Taken::Resize) => machine.devices().resize_terminal(terminal::size()),
            None => {}
        }
    }
    if typed && typing.read() {
        return Ok(Some(Ended::Typed));
    }
    if room && let Some(fd) = machine.devices().input_room() {
        let _ = fd.read();
    }
    if !typing.waiting.is_empty() {
        typing.pass_to(machine);
    }
    Ok(None)
}

#[allow(unsafe_code)]
fn poll(fds: &mut [libc::pollfd]) -> io::Result<()> {
    loop {
        // SAFETY: the pointer and count are of one slice of pollfd.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if n >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
