//! The qcow2 disk image format as a library.
