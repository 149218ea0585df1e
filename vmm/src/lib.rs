//! The virtual machine monitor: configuration, VM life, device manager, control thread.
