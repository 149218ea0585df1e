//! The devices of a hardware-reduced ACPI machine (ACPI 6.5 §4.1): power port, timer, generic event device. The
//! tables in `arch` tell the guest where they are.

mod ged;
mod pm_timer;
mod power;

pub use ged::Ged;
pub use pm_timer::PmTimer;
pub use power::PowerPort;
