//! What a person types at a raw terminal: everything goes to the guest but Ctrl-A and what follows.

const CTRL_A: u8 = 0x01;

/// What a run of typed bytes means.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Typed {
    /// Bytes for the guest.
    pub to_guest: Vec<u8>,
    /// Ctrl-A x was typed: the person wants to leave.
    pub leave: bool,
}

/// Remembers whether the last byte was Ctrl-A.
///
/// Ctrl-A x leaves, Ctrl-A Ctrl-A sends one Ctrl-A, Ctrl-A and anything else sends both.
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Takes what was typed.
    pub fn feed(&mut self, typed: &[u8]) -> Typed {
        let mut out = Typed::default();
        for &byte in typed {
            match (std::mem::take(&mut self.pending), byte) {
                (true, b'x' | b'X') => {
                    out.leave = true;
                    return out;
                }
                (true, CTRL_A) => out.to_guest.push(CTRL_A),
                (true, _) => out.to_guest.extend([CTRL_A, byte]),
                (false, CTRL_A) => self.pending = true,
                (false, _) => out.to_guest.push(byte),
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut escape = Escape::default();
        let mut sent = Vec::new();
        for part in parts {
            let typed = escape.feed(part);
            sent.extend(typed.to_guest);
            if typed.leave {
                return (sent, true);
            }
        }
        (sent, false)
    }

    #[test]
    fn plain_text_passes() {
        assert_eq!(feed(&[b"ls -l\r\x03"]), (b"ls -l\r\x03".to_vec(), false));
    }

    #[test]
    fn ctrl_a_x_leaves_even_when_split() {
        assert_eq!(feed(&[b"a\x01", b"xb"]), (b"a".to_vec(), true));
    }

    #[test]
    fn ctrl_a_twice_is_one_ctrl_a() {
        assert_eq!(feed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
    }

    #[test]
    fn ctrl_a_and_another_key_sends_both() {
        assert_eq!(feed(&[b"\x01c"]), (b"\x01c".to_vec(), false));
    }
}
