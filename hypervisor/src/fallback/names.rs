//! Mnemonics in lower case, as static text: a step allocates nothing for its name.

use std::sync::OnceLock;

use iced_x86::Mnemonic;

static NAMES: OnceLock<Vec<String>> = OnceLock::new();

/// The mnemonic in lower case.
pub(super) fn name(mnemonic: Mnemonic) -> &'static str {
    NAMES
        .get_or_init(|| {
            Mnemonic::values()
                .map(|mnemonic| format!("{mnemonic:?}").to_lowercase())
                .collect()
        })
        .get(mnemonic as usize)
        .map_or("?", String::as_str)
}
