//! Threads, cores, dies and packages (Intel SDM volume 3, section 8.9; AMD APM volume 3, appendix E.4): how an x2APIC
//! id splits into levels, and which leaves say so.
//!
//! Ids are given out in order, and a level takes a whole number of bits. Where a count is not a power of two, the
//! guest therefore finds its CPUs packed into the next power of two: 6 CPUs as 2 packages of 3 cores are packages of
//! 4 and 2.

use super::CpuIdentity;
use super::leaves::Leaves;

/// How many there are of each in the next larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Threads a core.
    pub threads: u32,
    /// Cores a die.
    pub cores: u32,
    /// Dies a package.
    pub dies: u32,
    /// Packages.
    pub packages: u32,
}

/// Level types of leaves 0xb and 0x1f.
const SMT: u32 = 1;
const CORE: u32 = 2;
const DIE: u32 = 5;

/// A topology as bits of the x2APIC id.
pub(super) struct Levels {
    threads: u32,
    dies: u32,
    per_die: u32,
    /// Logical processors a package.
    pub(super) per_package: u32,
    /// Bits below the core's number.
    core_shift: u32,
    /// Bits below the die's number.
    die_shift: u32,
    /// Bits below the package's number.
    package_shift: u32,
}

impl Levels {
    pub(super) fn of(identity: &CpuIdentity) -> Self {
        let topology = identity.topology.unwrap_or(Topology {
            threads: 1,
            cores: identity.count,
            dies: 1,
            packages: 1,
        });
        let (threads, cores, dies) = (
            topology.threads.clamp(1, 0xffff),
            topology.cores.clamp(1, 0xffff),
            topology.dies.clamp(1, 0xffff),
        );
        let per_die = threads.saturating_mul(cores);
        let core_shift = bits(threads);
        let die_shift = core_shift + bits(cores);
        Self {
            threads,
            dies,
            per_die,
            per_package: per_die.saturating_mul(dies),
            core_shift,
            die_shift,
            package_shift: die_shift + bits(dies),
        }
    }
}

/// Bits that number `count` things.
fn bits(count: u32) -> u32 {
    count
        .saturating_sub(1)
        .checked_ilog2()
        .map_or(0, |log| log + 1)
}

/// One less than the ids that `bits` bits can tell apart, at most `most`.
fn last(bits: u32, most: u32) -> u32 {
    1u32.checked_shl(bits)
        .map_or(most, |ids| (ids - 1).min(most))
}

/// Writes all leaves that tell of topology for the vCPU `id`.
pub(super) fn apply(leaves: &mut Leaves, id: u32, levels: &Levels, amd: bool) {
    caches(leaves, levels);
    x2apic_levels(leaves, id, levels, amd);
    if amd {
        amd_leaves(leaves, id, levels);
    }
}

/// Leaf 4, and 0x8000_001d on AMD: which CPUs share a cache. The caches of levels 1 and 2 are a core's, those above
/// a die's.
fn caches(leaves: &mut Leaves, levels: &Levels) {
    let sharing = |eax: u32| {
        let shift = match eax >> 5 & 7 {
            1 | 2 => levels.core_shift,
            _ => levels.die_shift,
        };
        last(shift, 0xfff) << 14
    };
    let cores = last(levels.package_shift - levels.core_shift, 0x3f) << 26;
    leaves.change(4, |leaf| {
        // Type 0 ends the list.
        if leaf.eax & 0x1f != 0 {
            leaf.eax = (leaf.eax & 0x3fff) | sharing(leaf.eax) | cores;
        }
    });
    leaves.change(0x8000_001d, |leaf| {
        if leaf.eax & 0x1f != 0 {
            leaf.eax = (leaf.eax & 0x3fff) | sharing(leaf.eax);
        }
    });
}

/// Leaf 0xb, and on Intel 0x1f, which also knows dies. AMD's own list of levels goes: 0xb says it all.
fn x2apic_levels(leaves: &mut Leaves, id: u32, levels: &Levels, amd: bool) {
    let dies = !amd && (levels.dies > 1 || leaves.has(0x1f));
    for function in [0xb, 0x1f, 0x8000_0026] {
        leaves.remove(function);
    }
    let smt = (SMT, levels.core_shift, levels.threads);
    let package = (levels.package_shift, levels.per_package);
    set_levels(leaves, 0xb, id, &[smt, (CORE, package.0, package.1)]);
    leaves.raise(0, 0xb);
    if dies {
        let core = (CORE, levels.die_shift, levels.per_die);
        set_levels(leaves, 0x1f, id, &[smt, core, (DIE, package.0, package.1)]);
        leaves.raise(0, 0x1f);
    }
}

/// Levels as type, bits below the next level's number, and logical processors; a level of type 0 ends the list.
fn set_levels(leaves: &mut Leaves, function: u32, id: u32, levels: &[(u32, u32, u32)]) {
    let end = (0, 0, 0);
    for (index, (kind, shift, logical)) in (0..).zip(levels.iter().copied().chain([end])) {
        let values = [shift, logical & 0xffff, kind << 8 | index, id];
        leaves.set(function, Some(index), values);
    }
}

/// Leaves 0x8000_0008 (how many logical processors a package) and 0x8000_001e (core and node).
fn amd_leaves(leaves: &mut Leaves, id: u32, levels: &Levels) {
    leaves.change(0x8000_0008, |leaf| {
        leaf.ecx &= !0xf0ff;
        leaf.ecx |= (levels.per_package - 1).min(0xff) | levels.package_shift.min(0xf) << 12;
    });
    let in_package = id & last(levels.package_shift, u32::MAX);
    let core = in_package >> levels.core_shift;
    let node = id.checked_shr(levels.die_shift).unwrap_or(0);
    leaves.change(0x8000_001e, |leaf| {
        leaf.eax = id;
        leaf.ebx = (core & 0xff) | (levels.threads - 1).min(0xff) << 8;
        leaf.ecx = (node & 0xff) | (levels.dies - 1).min(7) << 8;
        leaf.edx = 0;
    });
}
