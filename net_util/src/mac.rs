//! Ethernet addresses (IEEE 802, "EUI-48").
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// Of the first byte: set for a group of stations.
const GROUP: u8 = 1;
/// Of the first byte: set when the address is given out by whoever runs the network, not by a maker of cards.
const LOCAL: u8 = 2;

/// The address of a network interface. Written as six hexadecimal bytes with colons, in text and in serde's formats.
///
/// ```
/// use net_util::MacAddr;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mac: MacAddr = "2E:5c:45:00:00:01".parse()?;
/// assert_eq!(mac.to_string(), "2e:5c:45:00:00:01");
/// assert!(mac.is_local() && !mac.is_group());
/// assert!(MacAddr::random()?.is_local());
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// From its bytes, in the order of the wire.
    pub const fn new(bytes: [u8; 6]) -> MacAddr {
        MacAddr(bytes)
    }

    /// A locally administered address of one station, at random.
    ///
    /// # Errors
    ///
    /// When the kernel has no random numbers yet.
    pub fn random() -> io::Result<MacAddr> {
        let mut bytes = [0u8; 6];
        // SAFETY: the kernel writes at most six bytes to six bytes.
        let count =
            unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
        if count != 6 {
            return Err(io::Error::last_os_error());
        }
        bytes[0] = bytes[0] & !GROUP | LOCAL;
        Ok(MacAddr(bytes))
    }

    /// The bytes, in the order of the wire.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether it is for a group of stations (multicast, broadcast). An interface cannot have such an address.
    pub const fn is_group(self) -> bool {
        self.0[0] & GROUP != 0
    }

    /// Whether it is locally administered.
    pub const fn is_local(self) -> bool {
        self.0[0] & LOCAL != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Text that is no address.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error(
    "{0:?} is no MAC address: it is six hexadecimal bytes with colons, as in 2e:5c:45:00:00:01"
)]
pub struct MacError(String);

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut words = text.split(':');
        for byte in &mut bytes {
            let word = words.next().ok_or_else(error)?;
            // Two digits and no sign, of which the parser of numbers takes one.
            if word.len() != 2 || !word.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(word, 16).map_err(|_| error())?;
        }
        match words.next() {
            None => Ok(MacAddr(bytes)),
            Some(_) => Err(error()),
        }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes in any::<[u8; 6]>()) {
            let mac = MacAddr::new(bytes);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
            prop_assert_eq!(mac.to_string().to_uppercase().parse(), Ok(mac));
            let json = serde_json::to_string(&mac).unwrap();
            prop_assert_eq!(&json, &format!("\"{mac}\""));
            prop_assert_eq!(serde_json::from_str::<MacAddr>(&json).unwrap(), mac);
        }

        #[test]
        fn no_text_does_harm(text in ".{0,24}") {
            if let Ok(mac) = text.parse::<MacAddr>() {
                prop_assert_eq!(mac.to_string(), text.to_lowercase());
            }
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for bad in [
            "",
            "12:34:56:78:9a",
            "12:34:56:78:9a:bc:de",
            "12:34:56:78:9a:",
            "12:34:56:78:9a:+1",
            "12:34:56:78:9a:1",
            "12:34:56:78:9a:0bc",
            "12-34-56-78-9a-bc",
            "12:34:56:78:9a:ß",
        ] {
            let error = bad.parse::<MacAddr>().unwrap_err();
            assert!(error.to_string().contains(bad));
            assert!(serde_json::from_str::<MacAddr>(&format!("\"{bad}\"")).is_err());
        }
    }

    #[test]
    fn random_addresses_are_local_stations_and_differ() {
        let some: std::collections::HashSet<MacAddr> =
            (0..64).map(|_| MacAddr::random().unwrap()).collect();
        assert!(some.len() > 60);
        assert!(some.iter().all(|m| m.is_local() && !m.is_group()));
        // Neither bit is set by the others' chance.
        assert!(some.iter().any(|m| m.bytes()[0] & 0xfc != 0));
    }
}
