//! The real binary with real guests on `/dev/kvm`. `docs/testing.md` says how to run and extend these tests.

#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used)]

mod bad_input;
mod balloon;
mod bare_metal;
mod cli;
mod disks;
mod endings;
mod linux;
mod mmio;
mod mem;
mod net;
mod pmem;
mod pvpanic;
mod root_disk;
mod support;
mod terminal;
mod vsock;
mod watchdog;
