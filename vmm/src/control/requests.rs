//! What API clients ask for, done.

use std::collections::BTreeMap;

use super::Control;
use super::vm::{Running, Vm};
use crate::api::{Answer, DeviceNode, Failure, Ping, Request, Resize, Status, VmInfo, VmState};
use crate::config::VmConfig;

type Result<T> = std::result::Result<T, Failure>;

/// The operation `what` does not go with the VM's state.
fn wrong_state(what: &str, state: VmState, wanted: &str) -> Failure {
    Failure::new(
        Status::WrongState,
        format!("{what}: the VM is {state:?}; it must be {wanted}"),
    )
}

/// `what` failed because of `error`.
fn failed<E: std::error::Error>(what: &'static str) -> impl Fn(E) -> Failure {
    move |error| Failure::of(Status::Failed, what, &error)
}

fn no_vm() -> Failure {
    Failure::new(Status::NotFound, "there is no VM; vm.create makes one")
}

impl Control<'_> {
    /// Does what is asked, the VMM's end aside.
    pub(super) fn answer(&mut self, request: Request) -> Result<Answer> {
        match request {
            Request::Ping => return Answer::json(&Ping::of_this_process()),
            Request::VmInfo => return Answer::json(&info(self.created()?)),
            Request::VmCounters => return Answer::json(&self.counters()?),
            // It never comes here, and would be no more than this.
            Request::VmmShutdown => {}
            Request::Create(config) => self.create(*config)?,
            Request::Boot => self.boot()?,
            Request::Delete => self.delete()?,
            Request::Pause => {
                self.in_state("pausing", VmState::Running)?.pause();
            }
            Request::Resume => self.resume()?,
            Request::Shutdown => self.shut_down()?,
            Request::Reboot => self.reboot()?,
            Request::PowerButton => {
                let running = self.in_state("pressing the power button", VmState::Running)?;
                let pressed = running.machine.devices().press_power_button();
                pressed.map_err(failed("pressing the power button"))?;
            }
            Request::Nmi => {
                let running = self.in_state("sending an NMI", VmState::Running)?;
                let sent = running.machine.nmi();
                sent.map_err(failed("sending an NMI"))?;
            }
            Request::Resize(resize) => self.resize(&resize)?,
            Request::ResizeDisk(resize) => {
                let running = self.running("resizing a disk")?;
                let devices = running.machine.devices();
                let disk = devices.disk(&resize.id).ok_or_else(|| {
                    Failure::new(
                        Status::NotFound,
                        format!("resizing a disk: there is none with id {:?}", resize.id),
                    )
                })?;
                let resized = disk.resize(resize.desired_size);
                resized.map_err(failed("resizing a disk"))?;
            }
        }
        Ok(Answer::Done)
    }

    fn created(&mut self) -> Result<&mut Vm> {
        self.vm.as_mut().ok_or_else(no_vm)
    }

    /// What runs or is paused.
    fn running(&mut self, what: &str) -> Result<&mut Running> {
        let vm = self.created()?;
        let state = vm.state();
        vm.running_mut()
            .ok_or_else(|| wrong_state(what, state, "Running or Paused"))
    }

    fn in_state(&mut self, what: &str, wanted: VmState) -> Result<&mut Running> {
        let vm = self.created()?;
        let state = vm.state();
        match vm.running_mut() {
            Some(running) if state == wanted => Ok(running),
            _ => Err(wrong_state(what, state, &format!("{wanted:?}"))),
        }
    }

    fn create(&mut self, config: VmConfig) -> Result<()> {
        if let Some(vm) = &self.vm {
            return Err(Failure::new(
                Status::WrongState,
                format!(
                    "creating a VM: there is one already, and it is {:?}; vm.delete forgets it",
                    vm.state()
                ),
            ));
        }
        let valid = config.validate();
        valid.map_err(|e| Failure::of(Status::BadRequest, "creating a VM", &e))?;
        self.vm = Some(Vm::new(config));
        Ok(())
    }

    fn boot(&mut self) -> Result<()> {
        let (hypervisor, events) = (self.hypervisor, self.events);
        let vm = self.created()?;
        match vm.state() {
            VmState::Created | VmState::Shutdown => {
                let booted = vm.boot(hypervisor, events);
                booted.map_err(failed("booting the VM"))
            }
            state => Err(wrong_state("booting the VM", state, "Created or Shutdown")),
        }
    }

    fn delete(&mut self) -> Result<()> {
        let receiver = self.receiver;
        self.created()?.shut_down(receiver);
        self.vm = None;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        let events = self.events;
        let resumed = self.in_state("resuming", VmState::Paused)?.resume(events);
        resumed.map_err(failed("resuming"))
    }

    fn shut_down(&mut self) -> Result<()> {
        let receiver = self.receiver;
        self.running("shutting down")?;
        self.created()?.shut_down(receiver);
        Ok(())
    }

    fn reboot(&mut self) -> Result<()> {
        let (hypervisor, events, receiver) = (self.hypervisor, self.events, self.receiver);
        let what = "rebooting";
        self.running(what)?;
        let vm = self.created()?;
        vm.reset(hypervisor, events, receiver)
            .map_err(failed(what))?;
        match vm.running_mut() {
            Some(running) => running.resume(events).map_err(failed(what)),
            None => Ok(()),
        }
    }

    fn resize(&mut self, resize: &Resize) -> Result<()> {
        let what = "resizing the VM";
        self.running(what)?;
        // Nothing is changed if that is asked for.
        if resize.desired_vcpus.is_some() {
            return Err(Failure::new(
                Status::Failed,
                format!("{what}: desired_vcpus is not built yet in this version"),
            ));
        }
        let ram = match resize.desired_ram {
            Some(ram) => ram,
            None => self.running(what)?.machine.devices().ram(),
        };
        let balloon = match (resize.desired_balloon, resize.desired_ram_w_balloon) {
            (None, None) => None,
            (Some(balloon), None) => Some(balloon),
            (None, Some(left)) if left <= ram => Some(ram - left),
            (None, Some(left)) => {
                return Err(Failure::new(
                    Status::BadRequest,
                    format!("{what}: desired_ram_w_balloon={left} is more than the RAM of {ram}"),
                ));
            }
            (Some(_), Some(_)) => {
                return Err(Failure::new(
                    Status::BadRequest,
                    format!("{what}: desired_balloon and desired_ram_w_balloon exclude each other"),
                ));
            }
        };
        let devices = self.running(what)?.machine.devices();
        if resize.desired_ram.is_some() {
            devices.resize_ram(ram).map_err(failed(what))?;
        }
        match balloon {
            Some(balloon) => devices.resize_balloon(balloon).map_err(failed(what)),
            None => Ok(()),
        }
    }

    fn counters(&mut self) -> Result<BTreeMap<String, BTreeMap<String, u64>>> {
        let running = self.running("reading counters")?;
        let counters = running.machine.counters();
        Ok(counters
            .into_iter()
            .map(|(cpu, counters)| (format!("vcpu{cpu}"), counters))
            .collect())
    }
}

fn info(vm: &Vm) -> VmInfo {
    let devices = vm.running().map(|running| running.machine.devices());
    let memory = devices.map_or(vm.config.memory.size, |devices| {
        devices.ram().saturating_sub(devices.balloon_actual())
    });
    VmInfo {
        config: vm.config.clone(),
        state: vm.state(),
        memory_actual_size: memory,
        device_tree: devices
            .into_iter()
            .flat_map(|devices| devices.on_pci())
            .map(|(id, slot)| {
                let node = DeviceNode {
                    id: id.to_owned(),
                    pci_bdf: format!("0000:00:{slot:02x}.0"),
                };
                (id.to_owned(), node)
            })
            .collect(),
    }
}
