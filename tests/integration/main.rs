//! The real binary with real guests on `/dev/kvm`. `docs/testing.md` says how to run and extend these tests.

#![allow(clippy::panic, clippy::expect_used, clippy::unwrap_used)]

mod api;
mod bad_input;
mod balloon;
mod bare_metal;
mod cli;
mod consoles;
mod devices;
mod disks;
mod endings;
mod iommu;
mod linux;
mod mem;
mod mmio;
mod net;
mod pmem;
mod pvpanic;
mod root_disk;
mod support;
mod terminal;
mod traffic;
mod user_net;
mod vhost_user;
mod vsock;
mod watchdog;
