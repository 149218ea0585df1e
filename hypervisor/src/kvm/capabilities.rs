//! Which capabilities of KVM the back end uses, and what each is for (Linux KVM API, section 4.4).

use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_EXT_CPUID,
    KVM_CAP_GET_TSC_KHZ, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH,
    KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQFD, KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_MP_STATE,
    KVM_CAP_READONLY_MEM, KVM_CAP_SET_TSS_ADDR, KVM_CAP_SIGNAL_MSI, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_USER_MEMORY, KVM_CAP_USER_NMI, KVM_CAP_VCPU_EVENTS,
    KVM_CAP_X2APIC_API, KVM_CAP_XCRS, KVM_CAP_XSAVE, KVM_CAP_XSAVE2,
};

use crate::HypervisorError;

/// One capability.
struct Capability {
    number: u32,
    name: &'static str,
    /// Read after "needed for" when it is required, and after "without it no" when optional.
    purpose: &'static str,
    required: bool,
}

macro_rules! capability {
    ($kind:ident $name:ident: $purpose:literal) => {
        Capability {
            number: $name,
            name: stringify!($name),
            purpose: $purpose,
            required: capability!(@$kind),
        }
    };
    (@required) => { true };
    (@optional) => { false };
}

/// Everything that the back end uses. What it lacks among the optional ones is told to the user
/// and fails by its own ioctl when it is asked for.
const USED: &[Capability] = &[
    capability!(required KVM_CAP_USER_MEMORY: "guest memory"),
    capability!(required KVM_CAP_SET_TSS_ADDR: "guests in real mode"),
    capability!(required KVM_CAP_EXT_CPUID: "CPUID of the guest"),
    capability!(required KVM_CAP_MP_STATE: "starting and saving vCPUs"),
    capability!(required KVM_CAP_IRQ_ROUTING: "interrupts of devices"),
    capability!(required KVM_CAP_IRQFD: "interrupts of devices"),
    capability!(required KVM_CAP_IOEVENTFD: "notifications of virtio devices"),
    capability!(required KVM_CAP_IOEVENTFD_ANY_LENGTH: "notifications of virtio devices"),
    capability!(required KVM_CAP_SIGNAL_MSI: "message-signalled interrupts"),
    capability!(required KVM_CAP_SPLIT_IRQCHIP: "local APICs beside an IOAPIC in user space"),
    capability!(required KVM_CAP_IMMEDIATE_EXIT: "stopping vCPUs"),
    capability!(required KVM_CAP_VCPU_EVENTS: "saving vCPUs"),
    capability!(required KVM_CAP_DEBUGREGS: "saving vCPUs"),
    capability!(required KVM_CAP_XSAVE: "saving vCPUs"),
    capability!(required KVM_CAP_XCRS: "saving vCPUs"),
    capability!(required KVM_CAP_ADJUST_CLOCK: "saving the VM's clock"),
    capability!(optional KVM_CAP_XSAVE2: "XSAVE areas over 4096 bytes"),
    capability!(optional KVM_CAP_READONLY_MEM: "read-only memory"),
    capability!(optional KVM_CAP_X2APIC_API: "interrupts to APIC ids over 254"),
    capability!(optional KVM_CAP_GET_TSC_KHZ: "known frequency of the guest's TSC"),
    capability!(optional KVM_CAP_TSC_DEADLINE_TIMER: "TSC-deadline timer in the guest"),
    capability!(optional KVM_CAP_KVMCLOCK_CTRL: "telling the guest's watchdogs that it was paused"),
    capability!(optional KVM_CAP_USER_NMI: "injecting NMIs"),
    capability!(optional KVM_CAP_EXIT_ON_EMULATION_FAILURE: "instruction fallback for user code of the guest"),
];

/// Compares what `present` finds with what the back end uses: the names and purposes of missing
/// optional capabilities, or the first required one that is missing.
pub(super) fn probe(
    present: impl Fn(u32) -> bool,
) -> Result<Vec<(&'static str, &'static str)>, HypervisorError> {
    let mut missing = Vec::new();
    for capability in USED {
        if present(capability.number) {
            continue;
        }
        if capability.required {
            return Err(HypervisorError::Missing {
                name: capability.name,
                purpose: capability.purpose,
            });
        }
        missing.push((capability.name, capability.purpose));
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_present_is_nothing_missing() {
        assert_eq!(probe(|_| true).unwrap(), []);
    }

    #[test]
    fn optional_ones_are_listed_by_name() {
        let missing = probe(|number| number != KVM_CAP_READONLY_MEM).unwrap();
        assert_eq!(missing, [("KVM_CAP_READONLY_MEM", "read-only memory")]);
    }

    #[test]
    fn a_required_one_is_an_error_that_names_it() {
        let error = probe(|number| number != KVM_CAP_IRQFD).unwrap_err();
        assert_eq!(
            error.to_string(),
            "KVM here lacks KVM_CAP_IRQFD, which is needed for interrupts of devices"
        );
    }

    #[test]
    fn no_capability_is_listed_twice() {
        let mut numbers: Vec<u32> = USED.iter().map(|c| c.number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), USED.len());
    }
}
