//! Kernel images built by hand.

/// An ELF-64 image: headers, then each segment's bytes at a page of the file.
#[derive(Clone)]
pub(super) struct Elf {
    pub(super) class: u8,
    pub(super) encoding: u8,
    pub(super) kind: u16,
    pub(super) machine: u16,
    pub(super) entry: u64,
    pub(super) header_size: u16,
    pub(super) headers_at: u64,
    pub(super) parts: Vec<Part>,
}

/// A program header and its bytes.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) kind: u32,
    pub(super) address: u64,
    pub(super) memory_size: u64,
    /// `p_filesz`, where it is not the number of bytes.
    pub(super) file_size: Option<u64>,
    pub(super) bytes: Vec<u8>,
}

pub(super) const PT_LOAD: u32 = 1;
pub(super) const PT_NOTE: u32 = 4;
const PAGE: usize = 0x1000;

impl Part {
    /// A segment to load, with 0x100 zero bytes past the ones from the file.
    pub(super) fn load(address: u64, bytes: &[u8]) -> Self {
        Self {
            kind: PT_LOAD,
            address,
            memory_size: bytes.len() as u64 + 0x100,
            file_size: None,
            bytes: bytes.to_vec(),
        }
    }

    /// A PVH note with this descriptor.
    pub(super) fn pvh(descriptor: &[u8]) -> Self {
        let mut bytes = Vec::new();
        for word in [4, descriptor.len() as u32, 18] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(b"Xen\0");
        bytes.extend(descriptor);
        Self {
            kind: PT_NOTE,
            address: 0,
            memory_size: 0,
            file_size: None,
            bytes,
        }
    }
}

impl Elf {
    /// A sound image for the Linux protocol with one segment, all 0x90, at 1 MiB, entered there.
    pub(super) fn linux() -> Self {
        Self {
            class: 2,
            encoding: 1,
            kind: 2,
            machine: 62,
            entry: 0x10_0000,
            header_size: 56,
            headers_at: 64,
            parts: vec![Part::load(0x10_0000, &[0x90; 0x1234])],
        }
    }

    /// The same with a PVH note for an entry at 0x10_0020.
    pub(super) fn pvh() -> Self {
        let mut image = Self::linux();
        image.parts.push(Part::pvh(&0x10_0020u32.to_le_bytes()));
        image
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut file = Vec::new();
        file.extend(b"\x7fELF");
        file.extend([self.class, self.encoding, 1]);
        file.resize(16, 0);
        file.extend(self.kind.to_le_bytes());
        file.extend(self.machine.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(self.entry.to_le_bytes());
        file.extend(self.headers_at.to_le_bytes());
        file.extend([0; 12]);
        for half in [64, self.header_size, self.parts.len() as u16, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        let mut offset = (64 + 56 * self.parts.len()).next_multiple_of(PAGE);
        let mut places = Vec::new();
        for part in &self.parts {
            let file_size = part.file_size.unwrap_or(part.bytes.len() as u64);
            file.extend(part.kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            let words = [
                offset as u64,
                part.address,
                part.address,
                file_size,
                part.memory_size,
                4,
            ];
            for word in words {
                file.extend(word.to_le_bytes());
            }
            places.push(offset);
            offset = (offset + part.bytes.len()).next_multiple_of(PAGE);
        }
        for (part, at) in self.parts.iter().zip(places) {
            file.resize(at, 0);
            file.extend(&part.bytes);
        }
        file
    }
}

/// A bzImage: setup sectors, then the protected-mode kernel.
#[derive(Clone)]
pub(super) struct BzImage {
    pub(super) setup_sectors: u8,
    pub(super) version: u16,
    pub(super) load_flags: u8,
    pub(super) xload_flags: u16,
    pub(super) initrd_addr_max: u32,
    pub(super) alignment: u32,
    pub(super) cmdline_size: u32,
    pub(super) address: u64,
    pub(super) init_size: u32,
    /// In paragraphs; `None`: as many as the kernel has.
    pub(super) system_size: Option<u32>,
    pub(super) kernel: Vec<u8>,
}

impl BzImage {
    /// A sound image: 0x3000 bytes that go to 16 MiB and need 2 MiB there.
    pub(super) fn sound() -> Self {
        Self {
            setup_sectors: 2,
            version: 0x20f,
            load_flags: 1,
            xload_flags: 1,
            initrd_addr_max: 0x7fff_ffff,
            alignment: 0x20_0000,
            cmdline_size: 2047,
            address: 0x100_0000,
            init_size: 0x20_0000,
            system_size: None,
            kernel: (0..0x3000u32).map(|n| (n % 251) as u8).collect(),
        }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let sectors = match self.setup_sectors {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let mut file = vec![0; (sectors + 1) * 512];
        let system_size = self.system_size.unwrap_or(self.kernel.len() as u32 / 16);
        let fields: [(usize, &[u8]); 14] = [
            (0x1f1, &[self.setup_sectors]),
            (0x1f4, &system_size.to_le_bytes()),
            (0x1fe, &[0x55, 0xaa]),
            // A jump over the header, whose length that is.
            (0x200, &[0xeb, 0x6a]),
            (0x202, b"HdrS"),
            (0x206, &self.version.to_le_bytes()),
            (0x211, &[self.load_flags]),
            (0x22c, &self.initrd_addr_max.to_le_bytes()),
            (0x230, &self.alignment.to_le_bytes()),
            (0x236, &self.xload_flags.to_le_bytes()),
            (0x238, &self.cmdline_size.to_le_bytes()),
            (0x258, &self.address.to_le_bytes()),
            (0x260, &self.init_size.to_le_bytes()),
            // Past the header's end: code, which must not get into the zero page.
            (0x26c, &[0xcc; 64]),
        ];
        for (at, bytes) in fields {
            file[at..at + bytes.len()].copy_from_slice(bytes);
        }
        file.extend(&self.kernel);
        file
    }
}
