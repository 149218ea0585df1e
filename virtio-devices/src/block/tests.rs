//! The device with disks that do what a test wants.
