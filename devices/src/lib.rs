//! The small platform devices: serial, CMOS, i8042, IOAPIC, ACPI ports, debug ports.
