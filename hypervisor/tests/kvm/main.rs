//! The KVM back end with guests of a few bytes, on the real `/dev/kvm`.

#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::panic)]

mod events;
mod exits;
mod fallback;
mod guest;
mod state;
mod syscall;
