//! The network as a guest sees it, with real sockets of the host on the other side. No root, no /dev/kvm.

// Helpers are no tests to clippy.
#![allow(clippy::unwrap_used, clippy::panic)]

mod address;
mod bounds;
mod forward;
mod guest;
mod tcp;
mod udp;
