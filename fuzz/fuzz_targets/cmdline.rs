//! The text of every command-line option, and the API's JSON of a whole VM.
//!
//! Holds to: no panic; an error names the option; what is accepted says the same after a way through JSON, and validation of it neither
//! panics nor touches the host.
//!
//! The input is a byte that picks an option, and its text.

#![no_main]

use libfuzzer_sys::fuzz_target;
use option_parser::{OptionText, parse_size, parse_toggle};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm::config::{
    BalloonConfig, ConfigError, ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig,
    PmemConfig, RateLimitGroupConfig, VmConfig, VsockConfig,
};

/// Goes through JSON and must come back the same.
fn kept<T: Serialize + DeserializeOwned + PartialEq>(value: &T) {
    let text = serde_json::to_string(value).expect("a configuration can be told as JSON");
    let again: T = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert!(&again == value, "other after a way through JSON: {text}");
}

/// A parsed option, for the whole.
fn read<T>(option: &str, parsed: Result<T, ConfigError>) -> Option<T>
where
    T: Serialize + DeserializeOwned + PartialEq,
{
    match parsed {
        Ok(value) => {
            kept(&value);
            Some(value)
        }
        Err(error) => {
            let line = error.to_string();
            assert!(line.starts_with(option), "no option named: {line}");
            None
        }
    }
}

/// Everything that the parser of texts can be asked for.
fn values(text: &str) {
    let Ok(parsed) = OptionText::parse("--it", &["a", "b", "size", "list"], text) else {
        return;
    };
    for key in ["a", "b", "size", "list", "unknown"] {
        assert!(parsed.text(key) != Some(""), "an empty value is none");
        if let Ok(Some(number)) = parsed.number(key, 3, 1000) {
            assert!((3..=1000).contains(&number));
        }
        if let Ok(Some(list)) = parsed.list(key) {
            assert!(list.len() <= text.len() + 1);
        }
        let _ = (parsed.size(key), parsed.toggle(key));
    }
    let _ = parsed.required("a");
    let _ = (parse_size(text), parse_toggle(text));
}

fuzz_target!(|data: &[u8]| {
    let Some((pick, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let mut config = VmConfig::default();
    match pick % 16 {
        0 => values(text),
        1 => config.cpus = read("--cpus", CpusConfig::parse(text)).unwrap_or_default(),
        2 => config.memory = read("--memory", MemoryConfig::parse(text)).unwrap_or_default(),
        3 => config.disks.extend(read("--disk", DiskConfig::parse(text))),
        4 => {
            let known = config.offered.set("--rng", text).map_err(Into::into);
            assert!(read("--rng", known).unwrap_or(true));
        }
        5 => config.net.extend(read("--net", NetConfig::parse(text))),
        6 => {
            let serial = ConsoleConfig::parse("--serial", text);
            config.serial = read("--serial", serial).unwrap_or_default();
        }
        8 => config.balloon = read("--balloon", BalloonConfig::parse(text)),
        9 => config.pmem.extend(read("--pmem", PmemConfig::parse(text))),
        10 => config.vsock = read("--vsock", VsockConfig::parse(text)),
        11 => {
            let group = RateLimitGroupConfig::parse(text);
            let group = read("--rate-limit-group", group);
            config.rate_limit_groups.extend(group);
        }
        _ => {
            if let Ok(whole) = serde_json::from_str::<VmConfig>(text) {
                config = whole;
            }
        }
    }
    kept(&config);
    let _ = config.validate();
});
