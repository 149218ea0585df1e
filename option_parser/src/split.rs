//! Commas that part, and those inside of brackets and quotes that do not.

use crate::OptionError;

/// The parts of `text` between commas that stand outside of `[...]` and `"..."`.
pub(crate) fn at_commas<'a>(
    option: &'static str,
    text: &'a str,
) -> Result<Vec<&'a str>, OptionError> {
    let unbalanced = |what| OptionError::Unbalanced {
        option,
        what,
        text: text.to_owned(),
    };
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let mut parts = Vec::new();
    let mut start = 0;
    let mut depth = 0usize;
    let mut quoted = false;
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            _ if quoted => {}
            '[' => depth += 1,
            ']' => {
                depth = depth
                    .checked_sub(1)
                    .ok_or_else(|| unbalanced("a ] without its ["))?;
            }
            ',' if depth == 0 => {
                parts.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(unbalanced("a quotation mark without its pair"));
    }
    if depth != 0 {
        return Err(unbalanced("a [ without its ]"));
    }
    parts.extend(text.get(start..));
    Ok(parts)
}

/// Takes one pair of quotes off.
pub(crate) fn unquote(text: &str) -> String {
    text.strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .unwrap_or(text)
        .to_owned()
}
