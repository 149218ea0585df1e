//! Images of chance: whatever a file holds, the answer is a boot or one line.

use std::sync::LazyLock;

use proptest::collection::vec;
use proptest::prelude::*;

use super::images::{BzImage, Elf};
use super::*;

/// One memory for all cases: to map it each time would cost more than the cases do.
static MEMORY: LazyLock<Memory> = LazyLock::new(|| memory(8 << 20));

#[track_caller]
fn boots_or_says_why(kernel: &[u8], cmdline: &str) {
    match boot(&MEMORY, kernel, Some(b"initramfs"), cmdline) {
        Ok(loaded) => {
            let (start, size) = loaded.initramfs.unwrap();
            assert!(start >= 1 << 20 && start + size <= 8 << 20);
            assert!(loaded.entry < 8 << 20);
            loaded.write_boot_data(&*MEMORY, Some(1)).unwrap();
        }
        Err(error) => {
            let line = line(&error);
            assert!(line.contains("/images/"), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}

/// An image with some of the bytes of its headers replaced, and cut or not.
fn mutate(
    mut image: Vec<u8>,
    changes: &[(usize, u8)],
    cut: Option<usize>,
    window: usize,
) -> Vec<u8> {
    let len = image.len().min(window);
    for (at, value) in changes {
        image[at % len] = *value;
    }
    if let Some(cut) = cut {
        image.truncate(cut % image.len());
    }
    image
}

/// Values that reach corners more often than chance does.
fn value() -> impl Strategy<Value = u8> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(0x7f),
        Just(0x80),
        Just(0xff),
        any::<u8>()
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn random_bytes(body in vec(any::<u8>(), 0..2048), magic in any::<bool>()) {
        let mut image = body;
        if magic && image.len() >= 8 {
            image[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
        }
        boots_or_says_why(&image, "");
    }

    #[test]
    fn mutated_elf(
        changes in vec((any::<usize>(), value()), 1..6),
        cut in proptest::option::weighted(0.2, any::<usize>()),
    ) {
        boots_or_says_why(&mutate(Elf::pvh().bytes(), &changes, cut, 176), "");
    }

    #[test]
    fn mutated_notes(changes in vec((any::<usize>(), value()), 1..6)) {
        let mut image = Elf::pvh();
        let note = &mut image.parts[1].bytes;
        *note = mutate(note.clone(), &changes, None, usize::MAX);
        boots_or_says_why(&image.bytes(), "");
    }

    #[test]
    fn mutated_bzimage(
        changes in vec((0x1f1..0x26cusize, value()), 1..6),
        cut in proptest::option::weighted(0.2, any::<usize>()),
    ) {
        let mut image = BzImage::sound();
        image.address = 0x20_0000;
        boots_or_says_why(&mutate(image.bytes(), &changes, cut, usize::MAX), "");
    }

    #[test]
    fn any_command_line(cmdline in "\\PC{0,40}") {
        boots_or_says_why(&Elf::pvh().bytes(), &cmdline);
    }
}
