//! The thread of a console that clients come to: what the guest prints goes to the client that is there, what the client types to
//! the guest, and who comes late sees the last [`HISTORY`] bytes first.
//!
//! A client that does not read holds the guest's output up as a slow terminal would. Where there is no client, nothing waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::door::{Client, Door, Visit, nothing_now};
use super::output::Shared;
use crate::event::EventSender;
use crate::poll::{poll, watch};

/// Bytes that are kept for those who come late.
pub const HISTORY: usize = 64 << 10;
/// Bytes on their way to a client, after which the guest's output waits.
const ON_THE_WAY: usize = 64 << 10;

/// A device of the guest that takes input.
pub trait TypedInput: Send + Sync {
    /// Takes `bytes` from their start; how many.
    fn type_in(&self, bytes: &[u8]) -> usize;

    /// Readable when it takes input again, after it had not taken all.
    fn room(&self) -> &EventFd;
}

/// Where the input of a console's client goes: a device, as long as there is one.
#[derive(Clone)]
pub struct InputSlot(Arc<Slot>);

struct Slot {
    device: Mutex<Option<Arc<dyn TypedInput>>>,
    /// Of the thread that has the input.
    wake: EventFd,
}

impl InputSlot {
    pub(super) fn new(wake: EventFd) -> Self {
        Self(Arc::new(Slot {
            device: Mutex::default(),
            wake,
        }))
    }

    /// Input goes to `device` from now on, or waits.
    pub fn set(&self, device: Option<Arc<dyn TypedInput>>) {
        *self.0.device.lock().unwrap_or_else(PoisonError::into_inner) = device;
        // Refused only when its counter is full: then it is readable anyway.
        let _ = self.0.wake.write(1);
    }

    fn get(&self) -> Option<Arc<dyn TypedInput>> {
        self.0
            .device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Serves the clients of one console.
pub(super) struct Clients<'a> {
    shared: &'a Shared,
    wake: &'a EventFd,
    door: Door,
    input: InputSlot,
    client: Option<Client>,
    /// The client types no more, and may read on.
    silent: bool,
    history: VecDeque<u8>,
    /// To the client.
    sending: VecDeque<u8>,
    /// From the client, not yet taken by the guest.
    typed: Vec<u8>,
}

impl<'a> Clients<'a> {
    pub(super) fn new(shared: &'a Shared, wake: &'a EventFd, door: Door, input: InputSlot) -> Self {
        Self {
            shared,
            wake,
            door,
            input,
            client: None,
            silent: false,
            history: VecDeque::new(),
            sending: VecDeque::new(),
            typed: Vec::new(),
        }
    }

    /// Until the output is closed.
    pub(super) fn serve(mut self, events: &EventSender) -> io::Result<()> {
        loop {
            let mut all = false;
            if self.sending.len() < ON_THE_WAY {
                let printed = self.shared.take(events);
                all = printed.is_empty();
                self.remember(&printed);
            }
            self.send();
            if !all && self.sending.len() < ON_THE_WAY {
                // There may be more, of which nobody tells: what was printed after other text wakes nobody.
                let _ = self.wake.write(1);
            }
            self.pass_on();
            // Whoever waits for all to be written hears of it here.
            if self.shared.written(!self.sending.is_empty()) {
                return Ok(());
            }
            self.wait()?;
        }
    }

    /// Keeps what was printed, and sends it if there is a client.
    fn remember(&mut self, printed: &[u8]) {
        self.history.extend(printed);
        let excess = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..excess);
        if self.client.is_some() {
            self.sending.extend(printed);
        }
    }

    /// Sends what the client takes now.
    fn send(&mut self) {
        while let Some(client) = &mut self.client {
            let (first, second) = self.sending.as_slices();
            let next = if first.is_empty() { second } else { first };
            if next.is_empty() {
                return;
            }
            match client.write(next) {
                Ok(count) => drop(self.sending.drain(..count.min(next.len()))),
                Err(e) if nothing_now(&e) => return,
                Err(_) => self.leave(),
            }
        }
    }

    fn leave(&mut self) {
        self.client = None;
        self.sending.clear();
    }

    /// Gives the guest what it takes of what was typed.
    fn pass_on(&mut self) {
        if let (false, Some(device)) = (self.typed.is_empty(), self.input.get()) {
            let taken = device.type_in(&self.typed);
            self.typed.drain(..taken.min(self.typed.len()));
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let device = self.input.get();
        let unless = |idle: bool, fd: RawFd| if idle { -1 } else { fd };
        let mut wanted = 0;
        if self.typed.is_empty() && !self.silent {
            wanted |= libc::POLLIN;
        }
        if !self.sending.is_empty() {
            wanted |= libc::POLLOUT;
        }
        let room = device.as_ref().map_or(-1, |d| d.room().as_raw_fd());
        let client = self.client.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut fds = [
            watch(self.wake.as_raw_fd(), libc::POLLIN),
            watch(
                unless(
                    self.client.is_some() && !self.door.tells_of_ends(),
                    self.door.as_raw_fd(),
                ),
                libc::POLLIN,
            ),
            // A client is left alone until the guest takes what was typed.
            watch(
                unless(wanted == 0 && !self.typed.is_empty(), client),
                wanted,
            ),
            watch(unless(self.typed.is_empty(), room), libc::POLLIN),
        ];
        poll(&mut fds, None)?;
        let [wake, door, client, room] = fds.map(|fd| fd.revents);
        if wake != 0 {
            let _ = self.wake.read();
        }
        if let (true, Some(device)) = (room != 0, &device) {
            let _ = device.room().read();
        }
        if door != 0 {
            match self.door.look()? {
                Visit::Nothing => {}
                Visit::Left => self.leave(),
                Visit::Came(client) => {
                    self.client = Some(client);
                    self.silent = false;
                    self.sending = self.history.clone();
                }
            }
        }
        if client & !libc::POLLOUT != 0 {
            self.receive(client & (libc::POLLHUP | libc::POLLERR) != 0);
        }
        Ok(())
    }

    /// `gone` if the client has nothing open any more.
    fn receive(&mut self, gone: bool) {
        let Some(client) = &mut self.client else {
            return;
        };
        let mut bytes = [0; 4096];
        match client.read(&mut bytes) {
            Ok(0) if gone => self.leave(),
            Ok(0) => self.silent = true,
            Ok(count) => self
                .typed
                .extend_from_slice(bytes.get(..count).unwrap_or_default()),
            Err(e) if nothing_now(&e) && !gone => {}
            Err(_) => self.leave(),
        }
    }
}

#[cfg(test)]
mod tests;
