//! A VM and where it is in its life.
//!
//! ```text
//! Created --boot--> Running <--pause, resume--> Paused
//!                     |  ^                        |
//!            shutdown v  | boot                   | shutdown
//!                   Shutdown <--------------------+
//! ```

use std::path::{Path, PathBuf};

use hypervisor::Hypervisor;
use virtio_devices::VsockListener;

use super::ControlError;
use super::sink::Sink;
use super::typing::Typing;
use crate::api::VmState;
use crate::config::{ConsoleConfig, ConsoleMode, VmConfig};
use crate::console::{InputSlot, Outputs};
use crate::event::{EventReceiver, EventSender};
use crate::machine::Machine;

/// A configured VM.
pub(super) struct Vm {
    pub(super) config: VmConfig,
    life: Life,
}

enum Life {
    Created,
    Running(Box<Running>),
    Shutdown,
}

/// What there is while a VM runs or is paused. The fields are dropped in this order: the guest stops, what it printed is written, and
/// the terminal is a person's again.
pub(super) struct Running {
    pub(super) machine: Machine,
    inputs: Inputs,
    outputs: OpenOutputs,
    pub(super) typing: Typing,
    /// Where the pseudo-terminals of serial port and console are.
    terminals: [Option<PathBuf>; 2],
    paused: bool,
}

/// Where clients of the serial port and the console type.
struct Inputs([Option<InputSlot>; 2]);

impl Inputs {
    /// What is typed goes to `machine`.
    fn connect(&self, machine: &Machine) {
        let [serial, console] = &self.0;
        if let Some(slot) = serial {
            slot.set(machine.devices().serial_input());
        }
        if let Some(slot) = console {
            slot.set(machine.devices().console_input());
        }
    }

    /// What is typed waits for another machine.
    fn disconnect(&self) {
        for slot in self.0.iter().flatten() {
            slot.set(None);
        }
    }
}

impl Vm {
    pub(super) fn new(config: VmConfig) -> Self {
        Self {
            config,
            life: Life::Created,
        }
    }

    pub(super) fn state(&self) -> VmState {
        match &self.life {
            Life::Created => VmState::Created,
            Life::Running(running) if running.paused => VmState::Paused,
            Life::Running(_) => VmState::Running,
            Life::Shutdown => VmState::Shutdown,
        }
    }

    pub(super) fn running(&self) -> Option<&Running> {
        match &self.life {
            Life::Running(running) => Some(running),
            _ => None,
        }
    }

    pub(super) fn running_mut(&mut self) -> Option<&mut Running> {
        match &mut self.life {
            Life::Running(running) => Some(running),
            _ => None,
        }
    }

    /// Builds the machine and starts it. Nothing is left behind by one that cannot be.
    pub(super) fn boot(
        &mut self,
        hypervisor: &dyn Hypervisor,
        events: &EventSender,
    ) -> Result<(), ControlError> {
        let running = Running::start(hypervisor, &self.config, events)?;
        // Who looks at the configuration finds the pseudo-terminals.
        let [serial, console] = running.terminals.clone();
        if let ConsoleMode::Pty(path) = &mut self.config.serial.mode {
            *path = serial;
        }
        if let Some(ConsoleConfig {
            mode: ConsoleMode::Pty(path),
            ..
        }) = &mut self.config.console
        {
            *path = console;
        }
        self.life = Life::Running(Box::new(running));
        Ok(())
    }

    /// Stops it for good, if it runs.
    pub(super) fn shut_down(&mut self, receiver: &EventReceiver) {
        if matches!(self.life, Life::Running(_)) {
            self.life = Life::Shutdown;
            forget_events(receiver);
        }
    }

    /// Starts it anew, if it runs; the consoles stay open. A paused one stays paused, before its first instruction.
    pub(super) fn reset(
        &mut self,
        hypervisor: &dyn Hypervisor,
        events: &EventSender,
        receiver: &EventReceiver,
    ) -> Result<(), ControlError> {
        let Life::Running(running) = std::mem::replace(&mut self.life, Life::Shutdown) else {
            return Ok(());
        };
        let Running {
            machine,
            inputs,
            typing,
            outputs,
            terminals,
            paused,
        } = *running;
        inputs.disconnect();
        drop(machine);
        forget_events(receiver);
        let mut machine = Machine::new(hypervisor, &self.config, &outputs.0, events)?;
        if !paused {
            machine.start(events)?;
        }
        inputs.connect(&machine);
        self.life = Life::Running(Box::new(Running {
            machine,
            inputs,
            typing,
            outputs,
            terminals,
            paused,
        }));
        Ok(())
    }
}

/// Events that the old machine's threads sent on their way out. If the output got room among them, the new serial port has nothing
/// waiting for it.
fn forget_events(receiver: &EventReceiver) {
    while receiver.try_next().is_some() {}
}

impl Running {
    fn start(
        hypervisor: &dyn Hypervisor,
        config: &VmConfig,
        events: &EventSender,
    ) -> Result<Self, ControlError> {
        let vsock = config.vsock.as_ref();
        let vsock = vsock
            .map(|vsock| VsockListener::bind(&vsock.socket))
            .transpose()
            .map_err(ControlError::Vsock)?;
        let mut sinks = [
            Sink::open("--serial", &config.serial.mode)?,
            Sink::open("--console", config.console_mode())?,
        ];
        let terminals = sinks.each_ref().map(|sink| sink.path().map(Path::to_owned));
        let mut outputs = OpenOutputs(Outputs {
            vsock,
            ..Outputs::default()
        });
        let (serial, serial_input) = sinks[0].output("serial-out", events)?;
        outputs.0.serial = serial;
        let (console, console_input) = sinks[1].output("console-out", events)?;
        outputs.0.console = console;
        let inputs = Inputs([serial_input, console_input]);
        let machine = match Machine::new(hypervisor, config, &outputs.0, events) {
            Ok(machine) => machine,
            Err(e) => {
                sinks.iter().for_each(Sink::undo);
                return Err(e.into());
            }
        };
        // Files are emptied and the terminal turns raw only now: an error above finds them as they were.
        sinks.iter().try_for_each(Sink::begin)?;
        inputs.connect(&machine);
        let mut running = Self {
            machine,
            inputs,
            outputs,
            typing: Typing::start(config)?,
            terminals,
            paused: false,
        };
        running.machine.start(events)?;
        Ok(running)
    }

    /// Holds the guest.
    pub(super) fn pause(&mut self) {
        self.machine.pause();
        self.paused = true;
    }

    /// Lets it go on.
    pub(super) fn resume(&mut self, events: &EventSender) -> Result<(), ControlError> {
        self.machine.start(events)?;
        self.paused = false;
        Ok(())
    }
}

/// Outputs whose threads end when it is dropped.
struct OpenOutputs(Outputs);

impl Drop for OpenOutputs {
    fn drop(&mut self) {
        let Outputs {
            serial, console, ..
        } = &self.0;
        for output in [serial, console].into_iter().flatten() {
            output.close();
        }
    }
}
