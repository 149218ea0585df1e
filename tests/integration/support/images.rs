//! Kernel images made by hand: the bare-metal guest in other wrappings, and ELF files with mistakes.

use std::fs;
use std::path::Path;

/// Where the bare-metal guest is linked to run.
const GUEST_START: u64 = 0x10_0000;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header of an ELF-64 file (System V ABI, "Program Header").
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub kind: u32,
    pub offset: u64,
    pub address: u64,
    pub file_size: u64,
    pub memory_size: u64,
}

impl Segment {
    fn load(offset: u64, address: u64, size: u64) -> Self {
        Self {
            kind: PT_LOAD,
            offset,
            address,
            file_size: size,
            memory_size: size,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.kind.to_le_bytes());
        out.extend(7u32.to_le_bytes());
        for value in [
            self.offset,
            self.address,
            self.address,
            self.file_size,
            self.memory_size,
            4096,
        ] {
            out.extend(value.to_le_bytes());
        }
        out
    }
}

/// An ELF-64 file for x86-64 with these program headers, filled with HLT up to `size` bytes.
pub fn elf(entry: u64, segments: &[Segment], size: usize) -> Vec<u8> {
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend(2u16.to_le_bytes()); // ET_EXEC
    out.extend(62u16.to_le_bytes()); // EM_X86_64
    out.extend(1u32.to_le_bytes());
    for value in [entry, 64, 0] {
        out.extend(value.to_le_bytes());
    }
    out.extend(0u32.to_le_bytes());
    let count = u16::try_from(segments.len()).expect("few segments");
    for value in [64, 56, count, 64, 0, 0] {
        out.extend(value.to_le_bytes());
    }
    for segment in segments {
        out.extend(segment.bytes());
    }
    out.resize(size.max(out.len()), 0xf4);
    out
}

/// An ELF file that could be a kernel: one segment of a page at 1 MiB, entered at its start.
pub fn small_elf() -> Vec<u8> {
    elf(GUEST_START, &[Segment::load(4096, GUEST_START, 4096)], 8192)
}

/// One segment at `address` of `memory_size` bytes.
pub fn elf_at(address: u64, memory_size: u64) -> Vec<u8> {
    let segment = Segment {
        memory_size,
        ..Segment::load(4096, address, 4096)
    };
    elf(address, &[segment], 8192)
}

/// Two segments that share a page of memory.
pub fn overlapping_elf() -> Vec<u8> {
    let segments = [
        Segment::load(4096, GUEST_START, 8192),
        Segment::load(12288, GUEST_START + 4096, 8192),
    ];
    elf(GUEST_START, &segments, 20480)
}

fn number(image: &[u8], at: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&image[at..at + size]);
    u64::from_le_bytes(bytes)
}

/// Offsets of the program headers in an ELF-64 file.
fn headers(image: &[u8]) -> Vec<usize> {
    let table = usize::try_from(number(image, 32, 8)).expect("an offset");
    let count = usize::try_from(number(image, 56, 2)).expect("a count");
    (0..count).map(|i| table + i * 56).collect()
}

/// The image without the PVH note: loaders then enter it by the 64-bit Linux protocol.
pub fn without_note(path: &Path) -> Vec<u8> {
    let mut image = fs::read(path).expect("the guest's image");
    let notes: Vec<usize> = headers(&image)
        .into_iter()
        .filter(|&h| number(&image, h, 4) == u64::from(PT_NOTE))
        .collect();
    assert_eq!(notes.len(), 1, "one program header for notes");
    for header in notes {
        image[header..header + 4].fill(0);
    }
    image
}

/// The image as a bzImage (Linux "The Linux/x86 Boot Protocol", 2.12): a boot sector, one sector of setup code that
/// nobody runs, and the memory image of the ELF file, whose 64-bit entry is 0x200 bytes in.
pub fn bzimage(path: &Path) -> Vec<u8> {
    let image = fs::read(path).expect("the guest's image");
    let loads: Vec<usize> = headers(&image)
        .into_iter()
        .filter(|&h| number(&image, h, 4) == u64::from(PT_LOAD))
        .collect();
    let [load] = loads[..] else {
        panic!("{} segments to load", loads.len());
    };
    let field = |at| number(&image, load + at, 8);
    assert_eq!(field(24), GUEST_START, "where the image is loaded");
    let start = usize::try_from(field(8)).expect("an offset");
    let size = usize::try_from(field(32)).expect("a size");
    let memory_size = u32::try_from(field(40)).expect("a size");

    let mut out = vec![0; 1024];
    out[0x1f1] = 1; // setup sectors
    let paragraphs = u32::try_from(size.div_ceil(16)).expect("a size");
    out[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
    out[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    out[0x200..0x202].copy_from_slice(&[0xeb, 0x66]); // jmp over the header
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x020c_u16.to_le_bytes());
    out[0x211] = 1; // loaded high
    out[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes()); // code32_start
    out[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    out[0x230..0x234].copy_from_slice(&0x10_0000_u32.to_le_bytes()); // kernel_alignment
    out[0x236] = 1; // xloadflags: 64-bit entry
    out[0x238..0x23c].copy_from_slice(&0xffff_u32.to_le_bytes()); // cmdline_size
    out[0x258..0x260].copy_from_slice(&GUEST_START.to_le_bytes()); // pref_address
    out[0x260..0x264].copy_from_slice(&memory_size.to_le_bytes()); // init_size
    out.extend(&image[start..start + size]);
    // syssize counts whole paragraphs.
    out.resize(1024 + size.next_multiple_of(16), 0);
    out
}
