//! Options of devices that are in one file each (`virtio_devices::offer`): argh does not know them, since it wants all options in one place.

use anyhow::{Result, bail};
use argh_shared::{CommandInfo, write_description};
use vmm::config::{Offered, OfferedOption};

/// Takes the options of such devices out of `words`. A switch is followed by nothing that is its own; a list by its text, if there is one.
pub fn take(words: &[String]) -> Result<(Offered, Vec<String>)> {
    let mut offered = Offered::default();
    let mut others = Vec::with_capacity(words.len());
    let mut given = Vec::new();
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let Some(option) = Offered::OPTIONS.iter().find(|option| option.name == word) else {
            others.push(word.clone());
            continue;
        };
        let text = option
            .value
            .and_then(|_| words.next_if(|text| !text.starts_with('-')));
        if option.value.is_some() && given.contains(&option.name) {
            bail!("{word} is given twice; one device of its kind is possible");
        }
        given.push(option.name);
        offered.set(option.name, text.map_or("", String::as_str))?;
    }
    Ok((offered, others))
}

/// Adds the options to what argh says for `--help`, as argh would: to the line of usage, and before the list's last line.
pub fn complete_help(help: &str) -> String {
    let (mut usage, mut list) = (String::new(), String::new());
    for OfferedOption { name, value, help } in Offered::OPTIONS {
        usage += &match value {
            Some(value) => format!(" [{name} <{value}>]"),
            None => format!(" [{name}]"),
        };
        let info = CommandInfo {
            name,
            short: &'\0',
            description: help,
        };
        write_description(&mut list, &info);
    }
    let (first, rest) = help.split_once('\n').unwrap_or((help, ""));
    let last = "\n  --help";
    let rest = rest.replacen(last, &format!("{list}{last}"), 1);
    format!("{first}{usage}\n{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn they_are_taken_out_wherever_they_stand() {
        let line = "--watchdog --kernel k --rng src=/dev/zero -v --watchdog";
        let (offered, others) = take(&words(line)).unwrap();
        assert!(offered.watchdog.0);
        assert_eq!(offered.rng.src.to_str(), Some("/dev/zero"));
        assert_eq!(others, words("--kernel k -v"));
        // A switch has no value, and a list need not have one.
        let (_, others) = take(&words("--watchdog stray --rng")).unwrap();
        assert_eq!(others, ["stray"]);
    }

    #[test]
    fn mistakes_are_told() {
        for (line, wanted) in [
            ("--rng src=/a --rng src=/b", "--rng is given twice"),
            ("--rng sauce=/a", "--rng: unknown key"),
        ] {
            let error = take(&words(line)).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{error}");
        }
    }

    #[test]
    fn help_has_them_among_the_others() {
        let help =
            complete_help("Usage: x [-V]\n\nOptions:\n  -V  version\n  --help, help  this\n");
        let lines: Vec<&str> = help.lines().collect();
        assert!(
            lines[0].starts_with("Usage: x [-V] [--rng <list>]"),
            "{help}"
        );
        let at = |start| {
            lines
                .iter()
                .position(|line| line.starts_with(start))
                .unwrap()
        };
        assert!(at("  -V") < at("  --rng "), "{help}");
        assert!(at("  --watchdog ") < at("  --help"), "{help}");
        assert!(lines.iter().skip(1).all(|line| line.len() <= 80), "{help}");
    }
}
