//! How every thread of the VMM starts: named, all signals but the kick blocked, panics reported.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{Builder, JoinHandle};

use crate::event::{Event, EventSender};

/// The signal that makes a vCPU leave guest mode. Its handler does nothing.
pub fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {}

/// Installs the handler of [`kick_signal`], without SA_RESTART, so that KVM_RUN returns.
#[allow(unsafe_code)]
pub fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe, it does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
        libc::sigemptyset(&raw mut action.sa_mask);
        if libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Starts a thread named `name`. Should it panic (in builds that unwind), the control thread hears
/// of it and ends the VM; in builds that abort, the panic hook restores the terminal.
pub fn spawn<T: Send + 'static>(
    name: String,
    events: EventSender,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<Option<T>>> {
    Builder::new()
        .name(name.clone())
        .spawn(move || match catch_unwind(AssertUnwindSafe(body)) {
            Ok(result) => Some(result),
            Err(_) => {
                events.send(Event::Failed(format!("thread {name} panicked")));
                None
            }
        })
}
