//! Each bad payload gives one line that names the file, and leaves guest memory alone.

use super::images::{BzImage, Elf, Part};
use super::*;

const MIB: u64 = 1 << 20;

/// Asserts the line that the payload gives in a guest of 32 MiB.
#[track_caller]
fn refused(kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str, wanted: &str) {
    let memory = memory(32 * MIB);
    let error = boot(&memory, kernel, initramfs, cmdline).unwrap_err();
    assert_eq!(line(&error), wanted);
    assert!(is_zero(&memory), "written to before the check");
}

#[track_caller]
fn kernel_refused(kernel: &[u8], wanted: &str) {
    let wanted = format!(r#"kernel "/images/kernel": {wanted}"#);
    refused(kernel, None, "", &wanted);
}

#[track_caller]
fn elf_refused(change: impl Fn(&mut Elf), wanted: &str) {
    let mut image = Elf::linux();
    change(&mut image);
    kernel_refused(&image.bytes(), wanted);
}

#[track_caller]
fn bzimage_refused(change: impl Fn(&mut BzImage), wanted: &str) {
    let mut image = BzImage::sound();
    change(&mut image);
    kernel_refused(&image.bytes(), wanted);
}

#[test]
fn not_a_kernel() {
    let wanted = "it is neither an ELF image nor a bzImage";
    kernel_refused(b"", wanted);
    kernel_refused(b"\x7fEL", wanted);
    kernel_refused(&[0x1f; 0x400], wanted);
}

#[test]
fn for_another_machine() {
    elf_refused(
        |image| image.class = 1,
        "it is not a 64-bit ELF image (class 1)",
    );
    elf_refused(
        |image| image.encoding = 2,
        "it is not a little-endian ELF image (data encoding 2)",
    );
    elf_refused(
        |image| image.machine = 183,
        "it is for another machine (ELF machine 183), not for x86-64",
    );
    elf_refused(
        |image| image.kind = 1,
        "it is not an executable (ELF type 1)",
    );
}

#[test]
fn truncated() {
    let whole = Elf::pvh().bytes();
    kernel_refused(
        &whole[..63],
        "it is truncated: its ELF header ends at byte 64, the file at 63",
    );
    kernel_refused(
        &whole[..100],
        "it is truncated: its table of program headers ends at byte 176, the file at 100",
    );
    kernel_refused(
        &whole[..0x2233],
        "it is truncated: its segment ends at byte 8756, the file at 8755",
    );
    kernel_refused(
        &whole[..whole.len() - 1],
        "it is truncated: its note segment ends at byte 12308, the file at 12307",
    );
    let whole = BzImage::sound().bytes();
    kernel_refused(
        &whole[..0x210],
        "it is truncated: its setup header ends at byte 620, the file at 528",
    );
    kernel_refused(
        &whole[..0x700],
        "it is truncated: its protected-mode kernel ends at byte 13824, the file at 1792",
    );
    elf_refused(
        |image| image.headers_at = u64::MAX - 3,
        "it is truncated: its table of program headers ends at byte 18446744073709551615, the file at 8756",
    );
}

#[test]
fn segments_that_cannot_be() {
    elf_refused(|image| image.parts.clear(), "it has no segment to load");
    elf_refused(|image| image.parts[0].kind = 2, "it has no segment to load");
    elf_refused(
        |image| image.header_size = 32,
        "its program headers have 32 bytes each instead of 56",
    );
    elf_refused(
        |image| image.parts[0].memory_size = 0x1000,
        "its segment 0 has more bytes in the file (0x1234) than in memory (0x1000)",
    );
    elf_refused(
        |image| image.parts[0].address = u64::MAX - 5,
        "its segment 0 at 0xfffffffffffffffa with 0x1334 bytes runs past the end of the address space",
    );
}

#[test]
fn segments_in_the_wrong_place() {
    elf_refused(
        |image| image.parts.push(Part::load(0x10_1333, b"x")),
        "its segments at 0x100000 and 0x101333 overlap",
    );
    // The zeros past a segment's bytes count, neighbours don't.
    elf_refused(
        |image| {
            image.parts.push(Part::load(0x10_1334, b"x"));
            image.parts.push(Part::load(0xf_0000, b"tables"));
        },
        "its segment from 0xf0000 to 0xf0106 lies on boot structures and firmware tables below 1 MiB",
    );
    elf_refused(
        |image| image.parts.push(Part::load(0x6f00, b"x")),
        "its segment from 0x6f00 to 0x7001 lies on boot structures and firmware tables below 1 MiB",
    );
    elf_refused(
        |image| image.parts.push(Part::load(0x2_fff0, b"x")),
        "its segment from 0x2fff0 to 0x300f1 lies on boot structures and firmware tables below 1 MiB",
    );
    elf_refused(
        |image| image.parts.push(Part::load(32 * MIB - 0x80, b"x")),
        "it needs guest memory from 0x1ffff80 to 0x2000081, which is not all RAM: give the guest more memory",
    );
    elf_refused(
        |image| image.parts.push(Part::load(1 << 60, b"x")),
        "it needs guest memory from 0x1000000000000000 to 0x1000000000000101, which is not all RAM: give the guest more memory",
    );
}

#[test]
fn entry_points_that_lead_nowhere() {
    elf_refused(|image| image.entry = 0, "it has no entry point");
    elf_refused(
        |image| image.entry = 0xffff_ffff_8100_0000,
        "its entry point 0xffffffff81000000 lies outside of what its segments load",
    );
    // Zeros are no code.
    elf_refused(
        |image| image.entry = 0x10_1234,
        "its entry point 0x101234 lies outside of what its segments load",
    );
    elf_refused(
        |image| image.parts.push(Part::pvh(&[0xff, 0xff, 0xf, 0])),
        "its entry point 0xfffff lies outside of what its segments load",
    );
    elf_refused(
        |image| image.parts.push(Part::pvh(&[0, 0, 0x10, 0, 0])),
        "its PVH note has 5 bytes instead of 4 or 8",
    );
    elf_refused(
        |image| {
            let mut note = Part::pvh(&[]);
            note.bytes.resize((1 << 20) + 1, 0);
            image.parts.push(note);
        },
        "its notes take 1048577 bytes, which is too much",
    );
}

#[test]
fn linux_kernel_past_the_page_tables() {
    let memory = memory(2 << 30);
    let mut image = Elf::linux();
    image.parts.push(Part::load(1 << 30, b"x"));
    let error = boot(&memory, &image.bytes(), None, "").unwrap_err();
    assert_eq!(
        line(&error),
        r#"kernel "/images/kernel": it reaches up to 0x40000101, past the first GiB, which is all that a 64-bit entry can have mapped"#
    );
    // PVH starts without paging.
    image.parts.push(Part::pvh(&0x10_0000u32.to_le_bytes()));
    boot(&memory, &image.bytes(), None, "").unwrap();
}

#[test]
fn bzimages_that_cannot_be() {
    bzimage_refused(
        |image| image.version = 0x20b,
        "its boot protocol 2.11 is older than 2.12, the first with a 64-bit entry",
    );
    bzimage_refused(
        |image| image.load_flags = 0x80,
        "it is a zImage, to be loaded below 1 MiB, not a bzImage",
    );
    bzimage_refused(
        |image| image.xload_flags = 0xfe,
        "it has no 64-bit entry point: it is a 32-bit kernel",
    );
    bzimage_refused(
        |image| image.alignment = 3,
        "its preferred address 0x1000000 and its alignment 0x3 do not go together",
    );
    bzimage_refused(
        |image| image.address = 0x110_0000,
        "its preferred address 0x1100000 and its alignment 0x200000 do not go together",
    );
    bzimage_refused(
        |image| image.init_size = 0x100_0001,
        "it needs guest memory from 0x1000000 to 0x2000001, which is not all RAM: give the guest more memory",
    );
    bzimage_refused(
        |image| image.address = 0,
        "its segment from 0x0 to 0x200000 lies on boot structures and firmware tables below 1 MiB",
    );
    bzimage_refused(
        |image| image.address = 0xffff_ffff_ffe0_0000,
        "its segment 0 at 0xffffffffffe00000 with 0x200000 bytes runs past the end of the address space",
    );
    bzimage_refused(
        |image| image.kernel.truncate(0x200),
        "it is truncated: its protected-mode kernel ends at byte 2049, the file at 2048",
    );
}

#[test]
fn initramfs() {
    let kernel = Elf::pvh().bytes();
    refused(
        &kernel,
        Some(b""),
        "",
        r#"initramfs "/images/initrd" is empty"#,
    );
    refused(
        &kernel,
        Some(&vec![1; 31 << 20]),
        "",
        r#"initramfs "/images/initrd" of 32505856 bytes does not fit into guest memory beside the kernel: give the guest more memory"#,
    );
}

#[test]
fn command_line() {
    let kernel = Elf::pvh().bytes();
    refused(
        &kernel,
        None,
        &"x".repeat(0x1_0000),
        r#"the command line has 65536 bytes, more than the 65535 that kernel "/images/kernel" takes"#,
    );
    refused(
        &BzImage::sound().bytes(),
        None,
        &"x".repeat(2048),
        r#"the command line has 2048 bytes, more than the 2047 that kernel "/images/kernel" takes"#,
    );
    refused(
        &kernel,
        None,
        "a\0b",
        r#"the command line for kernel "/images/kernel" has '\0' at byte 1: only ASCII characters other than NUL are allowed"#,
    );
    refused(
        &kernel,
        None,
        "abc=é",
        r#"the command line for kernel "/images/kernel" has 'é' at byte 4: only ASCII characters other than NUL are allowed"#,
    );
}

#[test]
fn a_guest_too_small_for_anything() {
    let memory = memory(MIB - 0x1000);
    let error = boot(&memory, &Elf::pvh().bytes(), None, "").unwrap_err();
    assert_eq!(
        line(&error),
        "guest memory has no first MiB of RAM at 0x0: give the guest more memory"
    );
}

#[test]
fn files_that_cannot_be_read() {
    let memory = memory(32 * MIB);
    let load = |kernel: &mut File, initramfs: Option<&mut File>| {
        let name = Path::new("/tmp/two\nlines");
        let payload = Payload {
            kernel,
            kernel_name: name,
            initramfs: initramfs.map(|file| (file, name)),
            cmdline: "",
        };
        line(&load(&memory, payload).unwrap_err())
    };
    let (pipe, _writer) = std::io::pipe().unwrap();
    let mut pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    assert_eq!(
        load(&mut pipe, None),
        r#"kernel "/tmp/two\nlines": reading it: Illegal seek (os error 29)"#
    );
    let mut kernel = file(&Elf::pvh().bytes());
    assert_eq!(
        load(&mut kernel, Some(&mut pipe)),
        r#"reading initramfs "/tmp/two\nlines": Illegal seek (os error 29)"#
    );
    let directory = tempfile::tempdir().unwrap();
    let text = load(&mut File::open(directory.path()).unwrap(), None);
    assert!(
        text.starts_with(r#"kernel "/tmp/two\nlines": "#) && !text.contains('\n'),
        "{text}"
    );
}
