//! A VMM with the bare-metal guest: started, listened to, ended.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::clock::{self, Agreement};
use crate::counters::{ProcessorTime, Traced, Tracing};

/// How long a guest may say nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// Guest RAM in MiB.
pub const MEMORY_MIB: u64 = 128;
/// How long the guest rests before and after a measurement, while the host looks at its counters.
const SETTLE: Duration = Duration::from_millis(20);

/// A line of the guest, and when it came.
struct Line(Instant, String);

/// A VMM that runs.
pub struct Vmm {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<Line>,
    started: Instant,
    first_byte: Receiver<Instant>,
    tracing: Option<Tracing>,
}

/// What a guest's measurement came to.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Operations that were done.
    pub operations: u64,
    /// In so many seconds.
    pub seconds: f64,
    /// Notifications that they took.
    pub kicks: u64,
    /// Nanoseconds of processor time beside the vCPU.
    pub cpu: u64,
    /// How long it took by both clocks, rests included.
    pub clocks: Agreement,
    /// What was traced, where that was asked for.
    pub traced: Traced,
}

impl Measured {
    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.seconds
    }
}

impl Vmm {
    /// Starts `binary` with `guest`, whose tests and words `cmdline` names, and further options. With `tracing`, its system
    /// calls and exits are counted, which makes it slower.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        binary: &Path,
        guest: &Path,
        cmdline: &str,
        options: &[OsString],
        tracing: bool,
    ) -> Result<Self> {
        let mut command = Command::new(binary);
        command
            .arg("--kernel")
            .arg(guest)
            .args(["--cmdline", cmdline])
            .args(["--cpus", "boot=1"])
            .args(["--memory", &format!("size={MEMORY_MIB}M")])
            .args(["--serial", "tty", "--console", "off"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let tracing = tracing.then(Tracing::new);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", binary.display()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (sender, lines) = channel();
        let (first_sender, first_byte) = channel();
        std::thread::spawn(move || {
            let Some(stdout) = stdout else { return };
            let mut reader = BufReader::new(stdout);
            let mut line = Vec::new();
            if reader.fill_buf().is_ok_and(|bytes| !bytes.is_empty()) {
                let _ = first_sender.send(Instant::now());
            }
            while let Ok(1..) = reader.read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(Line(Instant::now(), text)).is_err() {
                    break;
                }
                line.clear();
            }
        });
        Ok(Self {
            child,
            stdin,
            lines,
            started,
            first_byte,
            tracing,
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types a line at the guest's serial port.
    ///
    /// # Errors
    /// When it doesn't listen.
    pub fn type_line(&mut self) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(b"\n").context("typing at the guest")?;
        stdin.flush().context("typing at the guest")
    }

    /// From the start of the process to the first byte that the guest said.
    ///
    /// # Errors
    /// When it says nothing.
    pub fn first_byte(&mut self) -> Result<Duration> {
        match self.first_byte.recv_timeout(PATIENCE) {
            Ok(at) => Ok(at - self.started),
            Err(_) => Err(self.complaint("the guest says nothing")),
        }
    }

    /// The value of the next `VALUE key` line, and when it came.
    ///
    /// # Errors
    /// When the guest fails, or the VMM ends before.
    pub fn value(&mut self, key: &str) -> Result<(Instant, String)> {
        loop {
            let Line(at, line) = self.next_line()?;
            let value = line
                .strip_prefix("VALUE ")
                .and_then(|l| l.strip_prefix(key));
            if let Some(value) = value.and_then(|value| value.strip_prefix(' ')) {
                return Ok((at, value.to_owned()));
            }
        }
    }

    fn next_line(&mut self) -> Result<Line> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(Line(_, line)) if line.starts_with("FAIL ") => bail!("in the guest: {line}"),
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => Err(self.complaint("the guest hangs")),
            Err(RecvTimeoutError::Disconnected) => Err(self.complaint("the VMM ended early")),
        }
    }

    /// Why it went wrong: what the VMM says itself, if it does.
    fn complaint(&mut self, else_say: &str) -> anyhow::Error {
        let _ = self.child.kill();
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        match text.lines().next() {
            Some(line) => anyhow::anyhow!("{line}"),
            None => anyhow::anyhow!("{else_say}"),
        }
    }

    /// The measurement between the guest's lines.
    ///
    /// # Errors
    /// When the guest fails.
    pub fn measured(&mut self) -> Result<Measured> {
        self.measured_while(|_| Ok(()))
    }

    /// The same, while the host does something.
    ///
    /// # Errors
    /// As [`Vmm::measured`], and those of `meanwhile`.
    pub fn measured_while(
        &mut self,
        meanwhile: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Measured> {
        let (begin, first) = self.value("bench_begin")?;
        let before = self.look();
        meanwhile(self)?;
        let (end, last) = self.value("bench_end")?;
        let after = self.look();
        let (_, counts) = self.value("bench")?;
        let number = |text: &str| text.parse::<u64>().with_context(|| format!("{text:?}"));
        let count = |key: &str| {
            let found = counts
                .split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
            number(found.with_context(|| format!("no {key} in {counts:?}"))?)
        };
        let passed = number(&last)?.wrapping_sub(number(&first)?);
        Ok(Measured {
            operations: count("operations")?,
            seconds: count("ticks")? as f64 / clock::frequency(),
            kicks: count("kicks")?,
            clocks: Agreement::new(passed, end - begin),
            cpu: after.0.beside_vcpu_since(&before.0),
            traced: after.1.since(&before.1),
        })
    }

    fn look(&self) -> (ProcessorTime, Traced) {
        let traced = self.tracing.as_ref().map(Tracing::read);
        (ProcessorTime::of(self.pid()), traced.unwrap_or_default())
    }

    /// Waits until the guest has said all.
    ///
    /// # Errors
    /// When it fails or hangs.
    pub fn done(&mut self) -> Result<()> {
        while !self.next_line()?.1.starts_with("DONE ") {}
        Ok(())
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// When it doesn't end well.
    pub fn finish(mut self) -> Result<()> {
        self.done()?;
        // Its output closes when it ends.
        match self.lines.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Disconnected) => {}
            _ => return Err(self.complaint("the VMM doesn't end when the guest powers off")),
        }
        let status = self.child.wait().context("waiting for the VMM")?;
        if !status.success() {
            return Err(self.complaint(&format!("the VMM ends with {status}")));
        }
        Ok(())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The words that limit a measurement.
pub fn limits(time: Duration) -> String {
    format!(
        "ticks={} settle={} memory={}",
        clock::ticks(time),
        clock::ticks(SETTLE),
        MEMORY_MIB << 20
    )
}
