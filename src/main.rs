//! The `cloud-hypervisor` binary.
fn main() {}
