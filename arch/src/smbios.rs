//! SMBIOS 3.2 (DMTF DSP0134): the 64-bit entry point (§5.2.2) and the structures BIOS information (type 0, §7.1),
//! system information (type 1, §7.2), OEM strings (type 11, §7.12) and end of table (type 127, §7.46).
//!
//! ```
//! use arch::smbios::{SmbiosConfig, build};
//!
//! let config = SmbiosConfig { serial_number: Some("A-1".into()), ..SmbiosConfig::default() };
//! let bytes = build(&config)?;
//! assert_eq!(&bytes[..5], b"_SM3_");
//! # Ok::<(), arch::smbios::Error>(())
//! ```

use thiserror::Error;

/// Guest-physical address of the entry point; the structures follow it.
pub const SMBIOS_START: u64 = crate::layout::SMBIOS_START;
/// Bytes from [`SMBIOS_START`] to the end of the first MiB.
pub const SMBIOS_SIZE: usize = 0x1_0000;

const ENTRY_LEN: usize = 24;
/// Where the structures begin, from [`SMBIOS_START`].
const STRUCTURES: usize = 32;
const MANUFACTURER: &str = "Cloud Hypervisor";
const PRODUCT: &str = "cloud-hypervisor";

/// Why no table can be written.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// A string that the format cannot hold: strings end at the first NUL, and an empty one ends the list.
    #[error("SMBIOS {0} is empty or has a NUL character in it")]
    BadString(&'static str),
    /// A structure has one byte to count its strings.
    #[error("{0} SMBIOS OEM strings are more than 255")]
    TooManyStrings(usize),
    /// More bytes than there are below 1 MiB.
    #[error("the SMBIOS tables take {0:#x} bytes, more than {SMBIOS_SIZE:#x}")]
    TooBig(usize),
}

/// What the tables say about this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SmbiosConfig {
    /// Serial number of the system.
    pub serial_number: Option<String>,
    /// UUID of the system, its 16 bytes in the order in which RFC 9562 writes them.
    pub uuid: Option<[u8; 16]>,
    /// Free text for software in the guest, at most 255.
    pub oem_strings: Vec<String>,
}

/// Writes entry point and structures, to be placed at [`SMBIOS_START`].
///
/// # Errors
/// See [`enum@Error`].
pub fn build(config: &SmbiosConfig) -> Result<Vec<u8>, Error> {
    let mut table = Table::default();
    table.bios_information()?;
    table.system_information(config)?;
    if !config.oem_strings.is_empty() {
        table.oem_strings(&config.oem_strings)?;
    }
    table.structure(127, &[], &[]);

    let total = STRUCTURES + table.bytes.len();
    if total > SMBIOS_SIZE {
        return Err(Error::TooBig(total));
    }
    let mut bytes = entry_point(table.bytes.len());
    bytes.resize(STRUCTURES, 0);
    bytes.append(&mut table.bytes);
    Ok(bytes)
}

fn entry_point(structures: usize) -> Vec<u8> {
    let mut entry = Vec::with_capacity(ENTRY_LEN);
    entry.extend_from_slice(b"_SM3_");
    // Checksum (filled in below), length, version 3.2.0, entry point revision 1, reserved.
    entry.extend_from_slice(&[0, ENTRY_LEN as u8, 3, 2, 0, 1, 0]);
    // `build` keeps it below 64 KiB.
    entry.extend_from_slice(&(structures as u32).to_le_bytes());
    entry.extend_from_slice(&(SMBIOS_START + STRUCTURES as u64).to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry
}

/// The structures so far.
#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    handle: u16,
}

impl Table {
    /// Appends a structure: header, `formatted` area, strings (§6.1.3).
    fn structure(&mut self, kind: u8, formatted: &[u8], strings: &[&str]) {
        // The formatted areas here are all below 32 bytes.
        self.bytes
            .extend_from_slice(&[kind, 4 + formatted.len() as u8]);
        self.bytes.extend_from_slice(&self.handle.to_le_bytes());
        self.bytes.extend_from_slice(formatted);
        for string in strings {
            self.bytes.extend_from_slice(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.handle += 1;
    }

    fn bios_information(&mut self) -> Result<(), Error> {
        /// Characteristics: not supported. Extension: table describes a virtual machine.
        const CHARACTERISTICS: u64 = 1 << 3;
        const VIRTUAL_MACHINE: u8 = 1 << 4;
        const VERSION: &str = env!("CARGO_PKG_VERSION");
        // Vendor, version, start segment, release date (none), ROM size.
        let mut formatted = vec![1, 2, 0, 0, 0, 0];
        formatted.extend_from_slice(&CHARACTERISTICS.to_le_bytes());
        // Extension bytes; releases of BIOS and embedded controller: none; extended ROM size.
        formatted.extend_from_slice(&[0, VIRTUAL_MACHINE, 0xff, 0xff, 0xff, 0xff, 0, 0]);
        self.structure(
            0,
            &formatted,
            &[
                checked("vendor", MANUFACTURER)?,
                checked("version", VERSION)?,
            ],
        );
        Ok(())
    }

    fn system_information(&mut self, config: &SmbiosConfig) -> Result<(), Error> {
        const WAKE_UP_BY_POWER_SWITCH: u8 = 6;
        let mut strings = vec![MANUFACTURER, PRODUCT];
        let mut serial = 0;
        if let Some(number) = &config.serial_number {
            strings.push(checked("serial number", number)?);
            serial = 3;
        }
        // Manufacturer, product, version (none), serial number, UUID, wake-up type, SKU and family (none).
        let mut formatted = vec![1, 2, 0, serial];
        formatted.extend_from_slice(&encode_uuid(config.uuid));
        formatted.extend_from_slice(&[WAKE_UP_BY_POWER_SWITCH, 0, 0]);
        self.structure(1, &formatted, &strings);
        Ok(())
    }

    fn oem_strings(&mut self, strings: &[String]) -> Result<(), Error> {
        let count =
            u8::try_from(strings.len()).map_err(|_| Error::TooManyStrings(strings.len()))?;
        let strings: Vec<&str> = strings
            .iter()
            .map(|string| checked("OEM string", string))
            .collect::<Result<_, _>>()?;
        self.structure(11, &[count], &strings);
        Ok(())
    }
}

fn checked<'a>(what: &'static str, string: &'a str) -> Result<&'a str, Error> {
    if string.is_empty() || string.contains('\0') {
        return Err(Error::BadString(what));
    }
    Ok(string)
}

/// The first three fields of a UUID are little-endian here (§7.2.1). All zeroes: not present.
fn encode_uuid(uuid: Option<[u8; 16]>) -> [u8; 16] {
    let mut bytes = uuid.unwrap_or_default();
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure's type, formatted area (header included) and strings.
    type Structure = (u8, Vec<u8>, Vec<String>);

    /// Reads the structures as a guest does.
    fn parse(bytes: &[u8]) -> Vec<Structure> {
        let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let address = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        let start = usize::try_from(address - SMBIOS_START).unwrap();
        assert_eq!(start + length, bytes.len());
        let mut rest = &bytes[start..];
        let mut structures = Vec::new();
        while !rest.is_empty() {
            let (formatted, mut tail) = rest.split_at(rest[1].into());
            let mut strings = Vec::new();
            loop {
                let end = tail.iter().position(|byte| *byte == 0).unwrap();
                if end == 0 {
                    // Without strings there are two NULs, otherwise the one that is left.
                    tail = &tail[if strings.is_empty() { 2 } else { 1 }..];
                    break;
                }
                strings.push(String::from_utf8(tail[..end].to_vec()).unwrap());
                tail = &tail[end + 1..];
            }
            structures.push((formatted[0], formatted.to_vec(), strings));
            rest = tail;
        }
        structures
    }

    #[test]
    fn entry_point_and_structures_are_consistent() {
        let uuid: [u8; 16] = std::array::from_fn(|n| n as u8);
        let config = SmbiosConfig {
            serial_number: Some("serial".into()),
            uuid: Some(uuid),
            oem_strings: vec!["one".into(), "two words".into()],
        };
        let bytes = build(&config).unwrap();
        assert_eq!(&bytes[..5], b"_SM3_");
        assert_eq!(
            bytes[..24]
                .iter()
                .fold(0u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );

        let structures = parse(&bytes);
        let kinds: Vec<u8> = structures.iter().map(|structure| structure.0).collect();
        assert_eq!(kinds, [0, 1, 11, 127]);
        for (handle, structure) in structures.iter().enumerate() {
            assert_eq!(usize::from(structure.1[2]), handle);
        }
        // Lengths that the specification gives for these versions.
        assert_eq!(
            structures.iter().map(|s| s.1.len()).collect::<Vec<_>>(),
            [26, 27, 5, 4]
        );

        let (_, system, strings) = &structures[1];
        assert_eq!(strings[usize::from(system[7]) - 1], "serial");
        assert_eq!(
            system[8..24],
            [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]
        );
        assert_eq!(
            (structures[2].1[4], structures[2].2.clone()),
            (2, config.oem_strings)
        );
    }

    #[test]
    fn what_is_not_given_is_not_there() {
        let structures = parse(&build(&SmbiosConfig::default()).unwrap());
        let kinds: Vec<u8> = structures.iter().map(|structure| structure.0).collect();
        assert_eq!(kinds, [0, 1, 127]);
        let (_, system, strings) = &structures[1];
        assert_eq!((system[7], strings.len()), (0, 2));
        assert_eq!(system[8..24], [0; 16]);
    }

    #[test]
    fn strings_that_do_not_fit_are_refused() {
        let serial = |text: &str| {
            build(&SmbiosConfig {
                serial_number: Some(text.into()),
                ..SmbiosConfig::default()
            })
        };
        assert_eq!(serial("a\0b"), Err(Error::BadString("serial number")));
        assert_eq!(serial(""), Err(Error::BadString("serial number")));
        let oem = |oem_strings| {
            build(&SmbiosConfig {
                oem_strings,
                ..SmbiosConfig::default()
            })
        };
        assert_eq!(
            oem(vec![String::new()]),
            Err(Error::BadString("OEM string"))
        );
        assert_eq!(oem(vec!["x".into(); 256]), Err(Error::TooManyStrings(256)));
        assert!(oem(vec!["x".into(); 255]).is_ok());
        assert!(
            matches!(oem(vec!["x".repeat(SMBIOS_SIZE)]), Err(Error::TooBig(size)) if size > SMBIOS_SIZE)
        );
    }
}
