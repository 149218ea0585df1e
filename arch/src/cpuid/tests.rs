//! CPUID leaves, register by register.

use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidEntry {
    let [eax, ebx, ecx, edx] = registers;
    CpuidEntry {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..CpuidEntry::default()
    }
}

/// `Genu`, `ineI`, `ntel` in EBX, EDX, ECX.
fn intel() -> Vec<CpuidEntry> {
    vec![
        leaf(0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x806f8, 0x1234_0800, 0xffff_ffff, 0xffff_ffff]),
        leaf(4, 0, [0xfc00_4121, 1, 2, 3]),
        leaf(4, 1, [0xfc00_4122, 1, 2, 3]),
        leaf(4, 2, [0xfc00_4143, 1, 2, 3]),
        leaf(4, 3, [0xfc03_c163, 1, 2, 3]),
        leaf(4, 4, [0; 4]),
        leaf(5, 0, [0x40, 0x40, 3, 0x20]),
        leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
        leaf(7, 1, [1, 2, u32::MAX, u32::MAX]),
        leaf(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
        leaf(0xb, 0, [9, 9, 9, 9]),
        leaf(0xd, 0, [7, 0x340, 0x340, 0]),
        leaf(0xd, 1, [0xf, 0x340, 0, 0]),
        leaf(0x12, 0, [1, 1, 1, 1]),
        leaf(0x15, 0, [0; 4]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, 0, [0x3034, 0, 0, 0]),
    ]
}

fn amd() -> Vec<CpuidEntry> {
    vec![
        leaf(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        leaf(1, 0, [0xa20f10, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
        leaf(0x8000_0008, 0, [0x3030, 0x1001, 0x0003_70ff, 0]),
        leaf(0x8000_000a, 0, [1, 8, 0, 0xff]),
        leaf(0x8000_001d, 0, [0x0000_4121, 1, 2, 3]),
        leaf(0x8000_001d, 1, [0x0000_4122, 1, 2, 3]),
        leaf(0x8000_001d, 2, [0x0000_4143, 1, 2, 3]),
        leaf(0x8000_001d, 3, [0x0001_c163, 1, 2, 3]),
        leaf(0x8000_001d, 4, [0; 4]),
        leaf(0x8000_001e, 0, [0xff; 4]),
        leaf(0x8000_0026, 0, [1; 4]),
    ]
}

fn identity(id: u32, threads: u32, cores: u32, dies: u32, packages: u32) -> CpuIdentity {
    CpuIdentity {
        id,
        count: threads * cores * dies * packages,
        topology: Some(Topology {
            threads,
            cores,
            dies,
            packages,
        }),
        tsc_khz: None,
        five_level: false,
    }
}

#[track_caller]
fn get(leaves: &[CpuidEntry], function: u32, index: u32) -> [u32; 4] {
    let mut found = leaves
        .iter()
        .filter(|leaf| (leaf.function, leaf.index) == (function, index));
    let leaf = found
        .next()
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
    assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

fn has(leaves: &[CpuidEntry], function: u32) -> bool {
    leaves.iter().any(|leaf| leaf.function == function)
}

#[test]
fn leaf_1_tells_who_the_cpu_is() {
    let leaves = build(&intel(), &identity(5, 1, 8, 1, 1));
    let [eax, ebx, ecx, edx] = get(&leaves, 1, 0);
    assert_eq!(eax, 0x806f8);
    // APIC id, logical processors, cache line, brand.
    assert_eq!(ebx, 0x0508_0800);
    assert_eq!(ecx, !(1 << 3 | 1 << 5 | 1 << 6 | 1 << 15));
    assert_eq!(edx, 0xffff_ffff);
    // What KVM leaves out of its list is there all the same.
    let leaves = build(&amd(), &identity(0, 1, 1, 1, 1));
    assert_eq!(
        get(&leaves, 1, 0),
        [0xa20f10, 1 << 16, 1 << 31 | 1 << 24 | 1 << 21, 0]
    );
}

#[test]
fn hyper_threading_bit_is_only_for_packages_of_many() {
    for (identity, wanted) in [
        (identity(3, 1, 1, 1, 4), 0),
        (identity(3, 2, 1, 1, 2), 1 << 28),
        (identity(0, 1, 1, 1, 1), 0),
    ] {
        let leaves = build(&intel(), &identity);
        assert_eq!(get(&leaves, 1, 0)[3] & 1 << 28, wanted);
    }
}

#[test]
fn features_that_are_not_offered() {
    let leaves = build(&intel(), &identity(0, 1, 1, 1, 1));
    let [eax, ebx, ecx, edx] = get(&leaves, 7, 0);
    assert_eq!(eax, 2);
    assert_eq!(!ebx, 1 << 2 | 1 << 25);
    assert_eq!(!ecx, 1 << 16 | 1 << 30);
    assert_eq!(!edx, 1 << 19);
    assert_eq!(get(&leaves, 7, 1), [1, 2, u32::MAX, u32::MAX]);
    for function in [5, 0xa, 0x12] {
        assert!(!has(&leaves, function), "{function:#x}");
    }
    let leaves = build(&amd(), &identity(0, 1, 2, 1, 1));
    let ecx = get(&leaves, 0x8000_0001, 0)[2];
    assert_eq!(!ecx, 1 << 2 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29);
    assert!(!has(&leaves, 0x8000_000a));
}

#[test]
fn five_level_paging_follows_host_and_choice() {
    let mut identity = identity(0, 1, 1, 1, 1);
    identity.five_level = true;
    assert_eq!(get(&build(&intel(), &identity), 7, 0)[2] & 1 << 16, 1 << 16);
    let mut without = intel();
    without[8].ecx = 0;
    assert_eq!(get(&build(&without, &identity), 7, 0)[2], 0);
}

#[test]
fn xsave_and_hypervisor_leaves_are_kept() {
    let leaves = build(&intel(), &identity(1, 2, 4, 1, 1));
    for (function, index) in [(0xd, 0), (0xd, 1), (0x4000_0000, 0), (0x4000_0001, 0)] {
        assert_eq!(
            get(&leaves, function, index),
            get(&intel(), function, index)
        );
    }
    assert!(!has(&leaves, 0x4000_0010));
}

#[test]
fn frequencies_are_told_when_known() {
    let mut who = identity(0, 1, 1, 1, 1);
    who.tsc_khz = Some(2_600_000);
    let leaves = build(&intel(), &who);
    assert_eq!(get(&leaves, 0x4000_0010, 0), [2_600_000, 1_000_000, 0, 0]);
    assert_eq!(get(&leaves, 0x4000_0000, 0)[0], 0x4000_0010);
    let [denominator, numerator, crystal, _] = get(&leaves, 0x15, 0).map(u64::from);
    assert_eq!(crystal * numerator / denominator, 2_600_000_000);
    assert_eq!(get(&leaves, 0, 0)[0], 0x16);
    let leaves = build(&amd(), &who);
    assert!(!has(&leaves, 0x15) && !has(&leaves, 0x4000_0010));
    assert_eq!(get(&leaves, 0, 0)[0], 0x10);
}

#[test]
fn default_is_one_package_of_cores() {
    let who = CpuIdentity {
        id: 3,
        count: 6,
        ..CpuIdentity::default()
    };
    assert_eq!(
        build(&intel(), &who),
        build(&intel(), &identity(3, 1, 6, 1, 1))
    );
    let leaves = build(&intel(), &who);
    assert_eq!(get(&leaves, 0xb, 0), [0, 1, 0x100, 3]);
    assert_eq!(get(&leaves, 0xb, 1), [3, 6, 0x201, 3]);
    assert_eq!(get(&leaves, 0xb, 2), [0, 0, 2, 3]);
}

#[test]
fn levels_with_threads_and_packages() {
    let leaves = build(&intel(), &identity(13, 2, 4, 1, 2));
    assert_eq!(get(&leaves, 0xb, 0), [1, 2, 0x100, 13]);
    assert_eq!(get(&leaves, 0xb, 1), [3, 8, 0x201, 13]);
    assert_eq!(get(&leaves, 0xb, 2), [0, 0, 2, 13]);
    assert!(
        leaves
            .iter()
            .filter(|l| l.function == 0xb)
            .all(|l| l.flags == 1)
    );
    assert!(!has(&leaves, 0x1f));
    assert_eq!(get(&leaves, 1, 0)[1] >> 16, 0x0d08);
}

#[test]
fn dies_have_a_leaf_of_their_own() {
    let leaves = build(&intel(), &identity(15, 2, 2, 2, 2));
    assert_eq!(get(&leaves, 0xb, 0), [1, 2, 0x100, 15]);
    assert_eq!(get(&leaves, 0xb, 1), [3, 8, 0x201, 15]);
    assert_eq!(get(&leaves, 0x1f, 0), [1, 2, 0x100, 15]);
    assert_eq!(get(&leaves, 0x1f, 1), [2, 4, 0x201, 15]);
    assert_eq!(get(&leaves, 0x1f, 2), [3, 8, 0x502, 15]);
    assert_eq!(get(&leaves, 0x1f, 3), [0, 0, 3, 15]);
    assert_eq!(get(&leaves, 0, 0)[0], 0x1f);
    // Where the host has it, the leaf stays true for one die too.
    let mut host = intel();
    host.push(leaf(0x1f, 0, [9; 4]));
    let leaves = build(&host, &identity(1, 1, 2, 1, 1));
    assert_eq!(get(&leaves, 0x1f, 1), [1, 2, 0x201, 1]);
    assert_eq!(get(&leaves, 0x1f, 2), [1, 2, 0x502, 1]);
    assert_eq!(get(&leaves, 0x1f, 3), [0, 0, 3, 1]);
}

#[test]
fn caches_are_shared_by_cores_and_dies() {
    let leaves = build(&intel(), &identity(0, 2, 4, 2, 1));
    let shared = |index| {
        let eax = get(&leaves, 4, index)[0];
        assert_eq!(eax & 0x3fff, get(&intel(), 4, index)[0] & 0x3fff);
        ((eax >> 14 & 0xfff) + 1, (eax >> 26) + 1)
    };
    assert_eq!(
        [shared(0), shared(1), shared(2), shared(3)],
        [(2, 8), (2, 8), (2, 8), (8, 8)]
    );
    assert_eq!(get(&leaves, 4, 4), [0; 4]);
    assert_eq!(get(&leaves, 4, 0)[1..], [1, 2, 3]);
}

#[test]
fn amd_leaves() {
    let leaves = build(&amd(), &identity(13, 2, 2, 2, 2));
    // 8 logical processors a package, 3 bits of id; the rest of ECX stays.
    assert_eq!(
        get(&leaves, 0x8000_0008, 0),
        [0x3030, 0x1001, 0x0003_3007, 0]
    );
    // 13 is package 1, die 1 in it, core 2 of that package, thread 1.
    assert_eq!(get(&leaves, 0x8000_001e, 0), [13, 0x102, 0x103, 0]);
    let shared = |index| (get(&leaves, 0x8000_001d, index)[0] >> 14) + 1;
    assert_eq!([shared(0), shared(1), shared(2), shared(3)], [2, 2, 2, 4]);
    assert_eq!(get(&leaves, 0x8000_001d, 4), [0; 4]);
    assert!(!has(&leaves, 0x8000_0026) && !has(&leaves, 0x1f));
    assert_eq!(get(&leaves, 0xb, 1), [3, 8, 0x201, 13]);
    let leaves = build(&amd(), &identity(0, 1, 1, 1, 1));
    assert_eq!(get(&leaves, 0x8000_0001, 0)[2] & 2, 0);
    assert_eq!(get(&leaves, 0x8000_001e, 0), [0; 4]);
}

#[test]
fn every_one_of_254_cpus_has_its_own_id() {
    let mut seen = Vec::new();
    for id in 0..254 {
        let who = CpuIdentity {
            id,
            count: 254,
            ..CpuIdentity::default()
        };
        let leaves = build(&intel(), &who);
        assert_eq!(get(&leaves, 0xb, 0)[3], id);
        assert_eq!(get(&leaves, 0xb, 1), [8, 254, 0x201, id]);
        assert_eq!(get(&leaves, 1, 0)[1] >> 16, id << 8 | 254);
        seen.push(get(&leaves, 1, 0)[1] >> 24);
    }
    seen.dedup();
    assert_eq!(seen.len(), 254);
}

#[test]
fn ids_split_into_the_levels_that_the_shifts_say() {
    for (threads, cores, dies, packages) in [(1, 1, 1, 4), (2, 8, 1, 1), (2, 2, 2, 2), (4, 2, 4, 2)]
    {
        let mut places = Vec::new();
        for id in 0..threads * cores * dies * packages {
            let leaves = build(&intel(), &identity(id, threads, cores, dies, packages));
            let core_shift = get(&leaves, 0xb, 0)[0];
            let package_shift = get(&leaves, 0xb, 1)[0];
            let package = id >> package_shift;
            let core = (id & ((1 << package_shift) - 1)) >> core_shift;
            let thread = id & ((1 << core_shift) - 1);
            assert!(package < packages && core < cores * dies && thread < threads);
            places.push((package, core, thread));
        }
        places.dedup();
        assert_eq!(places.len() as u32, threads * cores * dies * packages);
    }
}

#[test]
fn leaves_are_sorted_and_odd_topologies_do_no_harm() {
    for who in [
        identity(0, 1, 1, 1, 1),
        CpuIdentity::default(),
        CpuIdentity {
            id: u32::MAX,
            count: u32::MAX,
            topology: Some(Topology {
                threads: u32::MAX,
                cores: u32::MAX,
                dies: u32::MAX,
                packages: 0,
            }),
            tsc_khz: Some(u32::MAX),
            five_level: true,
        },
    ] {
        for supported in [intel(), amd(), vec![]] {
            let leaves = build(&supported, &who);
            assert!(leaves.is_sorted_by_key(|l| (l.function, l.index)));
            let mut keys: Vec<_> = leaves.iter().map(|l| (l.function, l.index)).collect();
            keys.dedup();
            assert_eq!(keys.len(), leaves.len());
        }
    }
}

#[test]
fn address_bits_are_told_by_the_processor_within_reason() {
    let leaf = |eax| CpuidEntry {
        function: 0x8000_0008,
        eax,
        ..CpuidEntry::default()
    };
    assert_eq!(address_bits(&[leaf(0x3030_3930)]), 48);
    assert_eq!(address_bits(&[leaf(0xff)]), 52);
    assert_eq!(address_bits(&[leaf(0)]), 36);
    assert_eq!(address_bits(&[]), 36);
}
