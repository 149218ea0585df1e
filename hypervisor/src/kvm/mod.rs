//! The KVM back end (Linux kernel documentation, "The Definitive KVM API Documentation").
//!
//! [`Kvm`] is the way in; VMs and vCPUs are reached by the crate's traits only. A vCPU's run loop
//! serves some exits by itself:
//!
//! * an instruction that KVM's emulator lacks goes through [`fallback`](crate::fallback);
//! * on a KVM whose SYSCALL enters the kernel with ring 3 segments, each such entry is mended.
//!
//! Hardware with virtualisation extensions needs neither, and pays for neither.

mod capabilities;
mod emulation;
#[allow(unsafe_code)]
mod exit;
#[allow(unsafe_code)]
mod kick;
#[allow(unsafe_code)]
mod syscall_probe;
mod syscall_remedy;
mod vcpu;
mod vm;
#[allow(unsafe_code)]
mod xsave;

use std::io;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};

use crate::memory::GuestRam;
use crate::vm::{Hypervisor, HypervisorError, Vm};
use crate::x86::CpuidEntry;

const DEVICE: &str = "/dev/kvm";

/// The host's KVM.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    missing_optional: Vec<(&'static str, &'static str)>,
    msr_indices: OnceLock<Vec<u32>>,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks that it has what every VM needs.
    ///
    /// # Errors
    /// [`HypervisorError::Open`] with advice where the node is missing or may not be opened,
    /// [`HypervisorError::ApiVersion`] and [`HypervisorError::Missing`].
    pub fn new() -> Result<Self, HypervisorError> {
        let fd = kvm_ioctls::Kvm::new().map_err(|e| open_error(e.into()))?;
        let version = fd.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(HypervisorError::ApiVersion(version));
        }
        let missing_optional =
            capabilities::probe(|number| fd.check_extension_raw(number.into()) > 0)?;
        Ok(Self {
            fd,
            missing_optional,
            msr_indices: OnceLock::new(),
        })
    }

    /// Takes KVM's list of MSRs and drops those that a fresh vCPU refuses to read or to take back.
    fn probe_msrs(&self) -> Result<Vec<u32>, HypervisorError> {
        let listed = self
            .fd
            .get_msr_index_list()
            .map_err(ioctl("listing MSRs"))?;
        let cpuid = self
            .fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("getting the supported CPUID"))?;
        let vm = self
            .fd
            .create_vm()
            .map_err(ioctl("creating a VM to try MSRs on"))?;
        let vcpu = vm
            .create_vcpu(0)
            .map_err(ioctl("creating a vCPU to try MSRs on"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(ioctl("setting the supported CPUID"))?;
        let (accepted, refused) =
            vcpu::accepted_msrs(&vcpu, listed.as_slice()).map_err(|source| {
                HypervisorError::Ioctl {
                    what: "trying MSRs",
                    source,
                }
            })?;
        if !refused.is_empty() {
            log::debug!("KVM lists these MSRs and refuses them: {refused:x?}");
        }
        Ok(accepted)
    }
}

/// Takes the features out of KVM's leaf 0x40000001 that a guest uses by VMCALL: KVM_FEATURE_PV_UNHALT (bit 7), PV_SEND_IPI (11) and
/// PV_SCHED_YIELD (13).
fn without_hypercalls(cpuid: &mut [CpuidEntry]) {
    for entry in cpuid.iter_mut().filter(|e| e.function == 0x4000_0001) {
        entry.eax &= !(1 << 7 | 1 << 11 | 1 << 13);
    }
}

impl Hypervisor for Kvm {
    fn create_vm(&self, ram: Arc<dyn GuestRam>) -> Result<Arc<dyn Vm>, HypervisorError> {
        let fd = self.fd.create_vm().map_err(ioctl("creating a VM"))?;
        let mend_syscall = syscall_remedy::needed(&self.fd);
        Ok(Arc::new(vm::KvmVm::new(fd, ram, mend_syscall)?))
    }

    /// KVM's list. Where it emulates kernel code, without what makes a guest call it: there a VMCALL can repeat without end, as Linux
    /// sees with four vCPUs that send each other interrupts.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, HypervisorError> {
        let cpuid = self
            .fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("getting the supported CPUID"))?;
        let mut cpuid = cpuid.as_slice().to_vec();
        if syscall_remedy::needed(&self.fd) {
            without_hypercalls(&mut cpuid);
        }
        Ok(cpuid)
    }

    /// KVM's list without those MSRs that it then refuses to read or to set, which are named in
    /// the debug log. The first call tries them on a vCPU of its own.
    fn msr_indices(&self) -> Result<Vec<u32>, HypervisorError> {
        if let Some(known) = self.msr_indices.get() {
            return Ok(known.clone());
        }
        let found = self.probe_msrs()?;
        Ok(self.msr_indices.get_or_init(|| found).clone())
    }

    fn max_vcpus(&self) -> u32 {
        u32::try_from(self.fd.get_max_vcpus()).unwrap_or(u32::MAX)
    }

    fn max_memory_slots(&self) -> u32 {
        u32::try_from(self.fd.get_nr_memslots()).unwrap_or(u32::MAX)
    }

    fn missing_optional(&self) -> Vec<(&'static str, &'static str)> {
        self.missing_optional.clone()
    }
}

/// Says what to do about the two usual reasons.
fn open_error(source: io::Error) -> HypervisorError {
    let advice = match source.kind() {
        io::ErrorKind::NotFound => {
            Some("there is no such device; load the kernel module kvm_intel or kvm_amd")
        }
        io::ErrorKind::PermissionDenied => {
            Some("permission denied; add the user to the group that owns the device, usually kvm")
        }
        _ => None,
    };
    HypervisorError::Open {
        path: DEVICE.into(),
        source: match advice {
            Some(text) => io::Error::new(source.kind(), text),
            None => source,
        },
    }
}

fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> HypervisorError {
    move |source| HypervisorError::Ioctl {
        what,
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_take_hypercalls_go_and_others_stay() {
        let entry = |function| CpuidEntry {
            function,
            eax: u32::MAX,
            ..CpuidEntry::default()
        };
        let mut cpuid = [entry(0x4000_0000), entry(0x4000_0001), entry(1)];
        without_hypercalls(&mut cpuid);
        assert_eq!(cpuid.map(|e| !e.eax), [0, 0x2880, 0]);
    }

    fn text(errno: i32) -> String {
        let error = open_error(io::Error::from_raw_os_error(errno));
        let source = std::error::Error::source(&error).unwrap();
        format!("{error}: {source}")
    }

    #[test]
    fn opening_says_what_to_do() {
        assert_eq!(
            text(libc::ENOENT),
            "opening /dev/kvm: there is no such device; load the kernel module kvm_intel or kvm_amd"
        );
        assert!(text(libc::EACCES).contains("group"));
        assert!(text(libc::EBUSY).starts_with("opening /dev/kvm: Device or resource busy"));
    }
}
