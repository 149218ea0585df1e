//! The bare-metal guest: how to start it, and its lines (`test-guest/src/main.rs`) as a report.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::{Ended, Kvm, Vmm, test_guest};

/// What the guest said about its tests.
#[derive(Debug, Default)]
pub struct Report {
    passed: Vec<String>,
    failed: Vec<String>,
    values: Vec<(String, String)>,
}

impl Report {
    /// Reads the lines of one start of the guest, from `HELLO` to `DONE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut report = Self::default();
        let mut lines = text.lines();
        match lines.next() {
            Some("HELLO test-guest") => {}
            other => return Err(format!("begins with {other:?}")),
        }
        let mut running = None;
        for line in lines {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "BEGIN" if running.is_none() => running = Some(rest),
                "OK" if running == Some(rest) => {
                    running = None;
                    report.passed.push(rest.to_owned());
                }
                "FAIL" => {
                    running = None;
                    report.failed.push(rest.to_owned());
                }
                "VALUE" => {
                    let (key, value) = rest.split_once(' ').unwrap_or((rest, ""));
                    report.values.push((key.to_owned(), value.to_owned()));
                }
                "READY" | "ECHO" => {}
                "DONE" => {
                    return if line == format!("DONE failed={}", report.failed.len()) {
                        Ok(report)
                    } else {
                        Err(format!("{line:?} after {:?}", report.failed))
                    };
                }
                _ => return Err(format!("unexpected {line:?} in test {running:?}")),
            }
        }
        Err(format!("ends within test {running:?}"))
    }

    /// The value of the only `VALUE key` line.
    pub fn value(&self, key: &str) -> &str {
        match self.values(key).as_slice() {
            [value] => value,
            other => panic!("{} values of {key}: {other:?}", other.len()),
        }
    }

    /// All values of `VALUE key` lines.
    pub fn values(&self, key: &str) -> Vec<&str> {
        self.values
            .iter()
            .filter(|v| v.0 == key)
            .map(|v| v.1.as_str())
            .collect()
    }

    /// The only value, as a number.
    pub fn number(&self, key: &str) -> u64 {
        let value = self.value(key);
        value
            .parse()
            .unwrap_or_else(|e| panic!("{key} {value:?}: {e}"))
    }

    /// Fails unless just these tests ran, and passed.
    pub fn expect(self, tests: &[&str]) -> Self {
        assert_eq!(
            self.failed,
            Vec::<String>::new(),
            "tests failed in the guest"
        );
        assert_eq!(self.passed, tests);
        self
    }
}

/// A bare-metal guest to be.
pub struct BareMetal {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cpus: u32,
    memory: u64,
    /// The value of `--memory`, where it says more than the size.
    memory_option: Option<String>,
    serial: String,
    words: String,
}

impl BareMetal {
    /// One vCPU, 128 MiB, the PVH protocol.
    pub fn new(_: Kvm) -> Self {
        Self {
            kernel: test_guest().into(),
            initramfs: None,
            cpus: 1,
            memory: 128 << 20,
            memory_option: None,
            serial: "tty".into(),
            words: String::new(),
        }
    }

    /// Another image of the guest.
    pub fn kernel(mut self, path: &Path) -> Self {
        self.kernel = path.into();
        self
    }

    pub fn initramfs(mut self, path: &Path) -> Self {
        self.initramfs = Some(path.into());
        self
    }

    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Bytes of RAM.
    pub fn memory(mut self, memory: u64) -> Self {
        self.memory = memory;
        self
    }

    /// The value of `--memory`, with a size that the guest is not told of.
    pub fn memory_option(mut self, value: impl Into<String>) -> Self {
        self.memory_option = Some(value.into());
        self
    }

    /// The value of `--serial`.
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = serial.into();
        self
    }

    /// A further word of the command line.
    pub fn word(mut self, word: &str) -> Self {
        write!(self.words, " {word}").expect("a String");
        self
    }

    /// The arguments that start it with these tests.
    pub fn builder(&self, tests: &[&str]) -> super::process::Builder {
        let Self { cpus, memory, .. } = self;
        let words = format!(
            "test={} cpus={cpus} memory={memory}{}",
            tests.join(","),
            self.words
        );
        let option = match &self.memory_option {
            Some(option) => option.clone(),
            None => format!("size={memory}"),
        };
        let builder = Vmm::builder()
            .option("--kernel", &self.kernel)
            .option("--cmdline", words)
            .option("--cpus", format!("boot={cpus}"))
            .option("--memory", option)
            .option("--serial", &self.serial);
        match &self.initramfs {
            Some(path) => builder.option("--initramfs", path),
            None => builder,
        }
    }

    /// Starts it with these tests.
    pub fn start(&self, tests: &[&str]) -> Vmm {
        self.builder(tests).start()
    }

    /// Runs it to its end: every test passes, and it powers off.
    pub fn run(&self, tests: &[&str]) -> Report {
        finish(self.start(tests).wait(), tests)
    }
}

/// The report of a guest that ended well.
pub fn finish(ended: Ended, tests: &[&str]) -> Report {
    let ended = ended.expect_clean();
    Report::parse(&ended.out)
        .unwrap_or_else(|e| panic!("{e}"))
        .expect(tests)
}

#[test]
fn report_reads_the_guests_lines() {
    let report = Report::parse(
        "HELLO test-guest\nBEGIN a\nVALUE n 7\nVALUE t x y\nOK a\nBEGIN b\nFAIL b too late: got 0x1, wanted 0x0\nDONE failed=1\n",
    )
    .unwrap();
    assert_eq!(report.passed, ["a"]);
    assert_eq!(report.failed, ["b too late: got 0x1, wanted 0x0"]);
    assert_eq!(report.number("n"), 7);
    assert_eq!(report.value("t"), "x y");
}

#[test]
fn report_refuses_what_does_not_add_up() {
    for text in [
        "",
        "HELLO test-guest\n",
        "HELLO test-guest\nBEGIN a\nOK b\nDONE failed=0\n",
        "HELLO test-guest\nBEGIN a\nBEGIN b\nDONE failed=0\n",
        "HELLO test-guest\nBEGIN a\nFAIL a x\nDONE failed=0\n",
        "HELLO test-guest\nnoise\nDONE failed=0\n",
    ] {
        assert!(Report::parse(text).is_err(), "{text:?}");
    }
}
