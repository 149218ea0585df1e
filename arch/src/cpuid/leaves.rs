//! A set of CPUID leaves, with the operations that building one needs.

use hypervisor::x86::CpuidEntry;

/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf has subleaves.
const HAS_INDEX: u32 = 1;
/// `Auth` and `Hygo`, the first four characters of the vendors that follow AMD's manual.
const AMD_LIKE: [u32; 2] = [0x6874_7541, 0x6f67_7948];

pub(super) struct Leaves(Vec<CpuidEntry>);

impl Leaves {
    pub(super) fn new(entries: &[CpuidEntry]) -> Self {
        Self(entries.to_vec())
    }

    pub(super) fn is_amd(&self) -> bool {
        self.get(0).is_some_and(|leaf| AMD_LIKE.contains(&leaf.ebx))
    }

    pub(super) fn has(&self, function: u32) -> bool {
        self.get(function).is_some()
    }

    /// The first subleaf of a function.
    pub(super) fn get(&self, function: u32) -> Option<&CpuidEntry> {
        self.0.iter().find(|leaf| leaf.function == function)
    }

    /// Changes all subleaves of a function, if it is there.
    pub(super) fn change(&mut self, function: u32, change: impl FnMut(&mut CpuidEntry)) {
        self.0
            .iter_mut()
            .filter(|leaf| leaf.function == function)
            .for_each(change);
    }

    /// Takes a function out; the guest reads zeros.
    pub(super) fn remove(&mut self, function: u32) {
        self.0.retain(|leaf| leaf.function != function);
    }

    /// Puts EAX, EBX, ECX and EDX of a function without subleaves (`index` is `None`), or of a subleaf.
    pub(super) fn set(
        &mut self,
        function: u32,
        index: Option<u32>,
        [eax, ebx, ecx, edx]: [u32; 4],
    ) {
        let entry = CpuidEntry {
            function,
            index: index.unwrap_or(0),
            flags: if index.is_some() { HAS_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            ..CpuidEntry::default()
        };
        self.0
            .retain(|leaf| leaf.function != function || leaf.index != entry.index);
        self.0.push(entry);
    }

    /// Makes `last` the highest function of the range that starts at `base`, unless it reaches further.
    pub(super) fn raise(&mut self, base: u32, last: u32) {
        self.change(base, |leaf| leaf.eax = leaf.eax.max(last));
    }

    /// All leaves, sorted by function and index.
    pub(super) fn into_entries(mut self) -> Vec<CpuidEntry> {
        self.0.sort_by_key(|leaf| (leaf.function, leaf.index));
        self.0
    }
}
