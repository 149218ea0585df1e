//! Reads `struct kvm_run` after an exit (KVM API, section 5).

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_WRMSR, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};

use crate::vcpu::{SystemEvent, VcpuError, VmExit};

/// The exit that `run` tells of, of vCPU `cpu`.
///
/// `run` is the head of a whole mapping of the vCPU, filled by a KVM_RUN that succeeded.
pub(super) fn decode(run: &mut kvm_run, cpu: u32) -> Result<VmExit<'_>, VcpuError> {
    match run.exit_reason {
        KVM_EXIT_IO => io(run),
        KVM_EXIT_MMIO => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let address = mmio.phys_addr;
            let length = (mmio.len as usize).min(mmio.data.len());
            let data = &mut mmio.data[..length];
            Ok(if mmio.is_write == 0 {
                VmExit::MmioRead { address, data }
            } else {
                VmExit::MmioWrite { address, data }
            })
        }
        KVM_EXIT_IOAPIC_EOI => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let eoi = unsafe { run.__bindgen_anon_1.eoi };
            Ok(VmExit::IoapicEoi(eoi.vector))
        }
        KVM_EXIT_HLT => Ok(VmExit::Hlt),
        KVM_EXIT_INTR => Ok(VmExit::Interrupted),
        KVM_EXIT_SHUTDOWN => Ok(VmExit::TripleFault),
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let kind = unsafe { run.__bindgen_anon_1.system_event.type_ };
            Ok(VmExit::SystemEvent(system_event(kind)))
        }
        KVM_EXIT_DEBUG => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let debug = unsafe { run.__bindgen_anon_1.debug.arch };
            Ok(VmExit::Debug {
                exception: debug.exception,
                pc: debug.pc,
                dr6: debug.dr6,
            })
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            Err(VcpuError::FailEntry {
                cpu,
                reason: entry.hardware_entry_failure_reason,
            })
        }
        other => Err(VcpuError::UnexpectedExit {
            cpu,
            exit: other.to_string(),
        }),
    }
}

/// An exit that the back end may serve itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Own {
    /// KVM_EXIT_INTERNAL_ERROR with this suberror.
    InternalError(u32),
    /// KVM_EXIT_DEBUG at this address.
    Debug(u64),
    /// KVM_EXIT_X86_WRMSR.
    MsrWrite { index: u32, data: u64 },
}

/// The exit that `run` tells of, if the back end may serve it.
pub(super) fn own(run: &kvm_run) -> Option<Own> {
    match run.exit_reason {
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
            Some(Own::InternalError(suberror))
        }
        KVM_EXIT_DEBUG => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let pc = unsafe { run.__bindgen_anon_1.debug.arch.pc };
            Some(Own::Debug(pc))
        }
        KVM_EXIT_X86_WRMSR => {
            // SAFETY: the exit reason says that this variant is the one in use.
            let msr = unsafe { run.__bindgen_anon_1.msr };
            Some(Own::MsrWrite {
                index: msr.index,
                data: msr.data,
            })
        }
        _ => None,
    }
}

/// Answers KVM_EXIT_X86_WRMSR: done, or refused, which the guest sees as #GP.
pub(super) fn answer_msr_write(run: &mut kvm_run, done: bool) {
    if run.exit_reason == KVM_EXIT_X86_WRMSR {
        run.__bindgen_anon_1.msr.error = (!done).into();
    }
}

fn io(run: &mut kvm_run) -> Result<VmExit<'_>, VcpuError> {
    // SAFETY: the exit reason says that this variant is the one in use.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (port, size) = (io.port, usize::from(io.size));
    let length = size * io.count as usize;
    let base = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM says where in the vCPU's mapping, whose head `run` is, it put `count` elements
    // of `size` bytes; the mapping lives as long as `run` is borrowed, and nothing else is lent.
    let data = unsafe { std::slice::from_raw_parts_mut(base.add(io.data_offset as usize), length) };
    Ok(if u32::from(io.direction) == KVM_EXIT_IO_IN {
        VmExit::IoIn { port, size, data }
    } else {
        VmExit::IoOut { port, size, data }
    })
}

fn system_event(kind: u32) -> SystemEvent {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown,
        KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
        KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
        other => SystemEvent::Other(other),
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_EXIT_HYPERV;

    use super::*;

    #[test]
    fn a_strange_exit_is_named() {
        let mut run = kvm_run {
            exit_reason: KVM_EXIT_HYPERV,
            ..Default::default()
        };
        let error = decode(&mut run, 3).unwrap_err();
        assert_eq!(error.to_string(), "vCPU 3: unexpected exit 27");
    }

    #[test]
    fn a_failed_entry_has_its_reason() {
        let mut run = kvm_run {
            exit_reason: KVM_EXIT_FAIL_ENTRY,
            ..Default::default()
        };
        run.__bindgen_anon_1
            .fail_entry
            .hardware_entry_failure_reason = 0x8000_0021;
        let error = decode(&mut run, 0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "vCPU 0: hardware refused to enter the guest, reason 0x80000021"
        );
    }

    #[test]
    fn system_events_by_kind() {
        let kinds = [1, 2, 3, 4].map(system_event);
        let expected = [
            SystemEvent::Shutdown,
            SystemEvent::Reset,
            SystemEvent::Crash,
            SystemEvent::Other(4),
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn mmio_is_cut_to_what_there_is() {
        let mut run = kvm_run {
            exit_reason: KVM_EXIT_MMIO,
            ..Default::default()
        };
        run.__bindgen_anon_1.mmio.len = 2;
        // SAFETY: the variant was written just now.
        unsafe { run.__bindgen_anon_1.mmio.data[0] = 7 };
        run.__bindgen_anon_1.mmio.phys_addr = 0xfee0;
        match decode(&mut run, 0).unwrap() {
            VmExit::MmioRead { address, data } => {
                assert_eq!((address, &*data), (0xfee0, &[7, 0][..]));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn own_exits_are_told_from_others() {
        let mut run = kvm_run {
            exit_reason: KVM_EXIT_INTERNAL_ERROR,
            ..Default::default()
        };
        run.__bindgen_anon_1.internal.suberror = 1;
        assert_eq!(own(&run), Some(Own::InternalError(1)));
        run.exit_reason = KVM_EXIT_HLT;
        assert_eq!(own(&run), None);
        run.exit_reason = KVM_EXIT_X86_WRMSR;
        run.__bindgen_anon_1.msr.index = 9;
        run.__bindgen_anon_1.msr.data = 10;
        assert_eq!(own(&run), Some(Own::MsrWrite { index: 9, data: 10 }));
    }

    #[test]
    fn a_refused_msr_write_is_marked() {
        let mut run = kvm_run {
            exit_reason: KVM_EXIT_X86_WRMSR,
            ..Default::default()
        };
        for done in [false, true] {
            answer_msr_write(&mut run, done);
            // SAFETY: the variant was written just now.
            assert_eq!(unsafe { run.__bindgen_anon_1.msr.error } == 0, done);
        }
    }
}
