//! Sizes and toggles.

/// Reads `512M`: a number, and K, M, G or T (in either case) for a power of 1024.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (text.get(..text.len() - 1)?, 10),
        b'M' => (text.get(..text.len() - 1)?, 20),
        b'G' => (text.get(..text.len() - 1)?, 30),
        b'T' => (text.get(..text.len() - 1)?, 40),
        _ => (text, 0),
    };
    // `parse` would take a sign.
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Reads `on`, `off`, `true` or `false`, in any case.
pub fn parse_toggle(text: &str) -> Option<bool> {
    if text.eq_ignore_ascii_case("on") || text.eq_ignore_ascii_case("true") {
        Some(true)
    } else if text.eq_ignore_ascii_case("off") || text.eq_ignore_ascii_case("false") {
        Some(false)
    } else {
        None
    }
}
