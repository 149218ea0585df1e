//! The VMM as a process: started, typed at, listened to, ended; never left behind.

#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use vmm::api::client;

use super::files;

/// How long a guest may take before it counts as hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// Makes the network of [`Builder::confined`] and starts the VMM in it.
const CONFINED: &str = "ip link set lo up && ip address add $0 dev lo && \
                        exec setpriv --bounding-set -all --inh-caps -all -- \"$@\"";

/// Collects the arguments of a VMM.
pub struct Builder {
    program: std::path::PathBuf,
    args: Vec<OsString>,
    patience: Duration,
    directory: Option<std::path::PathBuf>,
    own_network: bool,
    confined: Option<&'static str>,
}

impl Builder {
    /// Adds one argument, or option and value.
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds an option with its value.
    pub fn option(self, name: &str, value: impl Into<OsString>) -> Self {
        self.args([name.into(), value.into()])
    }

    /// Another binary than the usual one.
    pub fn program(mut self, program: impl Into<std::path::PathBuf>) -> Self {
        self.program = program.into();
        self
    }

    /// How long it may take before it counts as hung.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The working directory.
    pub fn directory(mut self, path: &Path) -> Self {
        self.directory = Some(path.into());
        self
    }

    /// In a network namespace of its own, which needs root.
    pub fn own_network(mut self) -> Self {
        self.own_network = true;
        self
    }

    /// In a network namespace of its own in which `address` is the host's, as 127.0.0.1 is, and without any capability.
    pub fn confined(mut self, address: &'static str) -> Self {
        self.confined = Some(address);
        self
    }

    /// Starts it with pipes.
    pub fn start(self) -> Vmm {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut vmm = self.spawn(command);
        let stdin = vmm.child.stdin.take().expect("piped");
        let stdout = vmm.child.stdout.take().expect("piped");
        vmm.input = Some(File::from(OwnedFd::from(stdin)));
        vmm.listen(File::from(OwnedFd::from(stdout)), Stream::Out);
        vmm.sender = None;
        vmm
    }

    /// The command, without its standard input and output.
    pub fn command(&self) -> Command {
        let mut command = if let Some(address) = self.confined {
            let mut unshare = Command::new("unshare");
            unshare
                .args(["--net", "sh", "-c", CONFINED, address])
                .arg(&self.program);
            unshare
        } else if self.own_network {
            let mut unshare = Command::new("unshare");
            unshare.arg("--net").arg(&self.program);
            unshare
        } else {
            Command::new(&self.program)
        };
        command.args(&self.args).stderr(Stdio::piped());
        if let Some(directory) = &self.directory {
            command.current_dir(directory);
        }
        command
    }

    /// Starts `command`; the caller says where input and output go.
    pub fn spawn(&self, mut command: Command) -> Vmm {
        println!("$ {command:?}");
        let mut child = command.spawn().expect("starting the VMM");
        // SAFETY: pidfd_open makes a new descriptor for a child that nobody has waited for.
        let pidfd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, child.id(), 0);
            assert!(fd >= 0, "pidfd_open: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor"))
        };
        let stderr = child.stderr.take().expect("piped");
        let (sender, receiver) = channel();
        let mut vmm = Vmm {
            child,
            pidfd,
            input: None,
            sender: Some(sender),
            receiver,
            out: Vec::new(),
            err: Vec::new(),
            seen: 0,
            deadline: Instant::now() + self.patience,
            ended: false,
        };
        vmm.listen(File::from(OwnedFd::from(stderr)), Stream::Err);
        vmm
    }
}

#[derive(Clone, Copy)]
pub enum Stream {
    Out,
    Err,
}

/// A VMM that runs.
pub struct Vmm {
    child: Child,
    pidfd: OwnedFd,
    input: Option<File>,
    sender: Option<Sender<(Stream, Vec<u8>)>>,
    receiver: Receiver<(Stream, Vec<u8>)>,
    out: Vec<u8>,
    err: Vec<u8>,
    /// How much of `out` [`Vmm::wait_for`] has passed.
    seen: usize,
    deadline: Instant,
    ended: bool,
}

/// A VMM that has ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Vmm {
    pub fn builder() -> Builder {
        Builder {
            program: files::binary(),
            args: Vec::new(),
            patience: PATIENCE,
            directory: None,
            own_network: false,
            confined: None,
        }
    }

    /// Reads `from` in a thread of its own until it closes.
    pub fn listen(&mut self, mut from: File, stream: Stream) {
        let sender = self.sender.clone().expect("not all streams are known yet");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal whose other end is closed is an error to its reader: the end, all the same.
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if sender.send((stream, buffer[..n].to_vec())).is_err() {
                    break;
                }
            }
        });
    }

    /// Takes `input` as what [`Vmm::send`] writes to. No further streams will be listened to.
    pub fn attach(&mut self, input: File) {
        self.input = Some(input);
        self.sender = None;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of its memory that the host has pages for.
    pub fn resident(&self) -> u64 {
        let path = format!("/proc/{}/statm", self.pid());
        let statm = std::fs::read_to_string(path).expect("the VMM runs");
        let pages = statm.split(' ').nth(1).expect("a second number");
        pages.parse::<u64>().expect("a number") * 4096
    }

    /// Whether `text` has come after what was waited for before. What is on its way may be missed.
    pub fn said(&mut self, text: &str) -> bool {
        while let Ok((stream, bytes)) = self.receiver.try_recv() {
            match stream {
                Stream::Out => self.out.extend(bytes),
                Stream::Err => self.err.extend(bytes),
            }
        }
        let new = &self.out[self.seen..];
        new.windows(text.len())
            .any(|window| window == text.as_bytes())
    }

    /// Types at the guest's serial port.
    pub fn send(&mut self, text: &str) {
        let input = self.input.as_mut().expect("standard input is open");
        input.write_all(text.as_bytes()).expect("typing");
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits until `text` appears in the output after what was waited for before.
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let new = &self.out[self.seen..];
            if let Some(at) = new
                .windows(text.len())
                .position(|window| window == text.as_bytes())
            {
                self.seen += at + text.len();
                return;
            }
            if !self.receive() {
                self.give_up(&format!("the VMM ended before {text:?} came"));
            }
        }
    }

    /// Waits until `start` and, after it, `end` appear on standard error; what is between them.
    pub fn wait_for_error(&mut self, start: &str, end: &str) -> String {
        loop {
            let err = text(&self.err);
            let between = err
                .split_once(start)
                .and_then(|(_, rest)| rest.split_once(end));
            if let Some((between, _)) = between {
                return between.to_owned();
            }
            if !self.receive() {
                self.give_up(&format!("the VMM ended before {start:?} came"));
            }
        }
    }

    /// Takes what comes next; false when the output is closed. Fails at the deadline.
    fn receive(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.receiver.recv_timeout(left) {
            Ok((Stream::Out, bytes)) => self.out.extend(bytes),
            Ok((Stream::Err, bytes)) => self.err.extend(bytes),
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) => self.give_up("the guest seems to hang"),
        }
        true
    }

    fn give_up(&mut self, why: &str) -> ! {
        // What came until now, for the transcript.
        while let Ok((stream, bytes)) = self.receiver.try_recv() {
            match stream {
                Stream::Out => self.out.extend(bytes),
                Stream::Err => self.err.extend(bytes),
            }
        }
        panic!("{why}");
    }

    pub fn signal(&self, signal: libc::c_int) {
        let pid = i32::try_from(self.pid()).expect("a process id");
        // SAFETY: the process is our child and has not been waited for.
        let result = unsafe { libc::kill(pid, signal) };
        assert_eq!(result, 0, "kill: {}", io::Error::last_os_error());
    }

    /// Waits until the process has ended.
    pub fn wait_exit(&mut self) -> ExitStatus {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: self.pidfd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd of ours.
        if unsafe { libc::poll(&raw mut poll, 1, left) } != 1 {
            self.give_up("the guest seems to hang");
        }
        self.child.wait().expect("waiting for the VMM")
    }

    /// Waits for the end, and for the rest of the output.
    pub fn wait(mut self) -> Ended {
        let status = self.wait_exit();
        while self.receive() {}
        self.ended = true;
        Ended {
            status,
            out: text(&self.out),
            err: text(&self.err),
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // The test harness shows this when the test fails.
        println!("--- standard output\n{}", text(&self.out));
        println!("--- standard error\n{}---", text(&self.err));
    }
}

impl Ended {
    /// The guest powered off, or the VMM was told to end: exit code 0 and no complaint.
    pub fn expect_clean(self) -> Self {
        assert_eq!(
            self.status.code(),
            Some(0),
            "{:?}: {}",
            self.status,
            self.err
        );
        assert_eq!(self.err, "", "words on standard error");
        self
    }

    /// Exit code 1 and one line on standard error; gives the line without the program's name.
    pub fn expect_refusal(&self) -> &str {
        assert_eq!(self.status.signal(), None, "{}", self.err);
        assert_eq!(self.status.code(), Some(1), "{}", self.err);
        let line = self
            .err
            .strip_suffix('\n')
            .filter(|line| !line.contains('\n'))
            .unwrap_or_else(|| panic!("not one line: {:?}", self.err));
        line.strip_prefix("cloud-hypervisor: ")
            .unwrap_or_else(|| panic!("no program name: {line:?}"))
    }
}

/// Pauses and resumes the VM behind the socket `api` until its guest has powered off. How often.
pub fn pause_to_the_end(api: &Path) -> u32 {
    // A guest that was about to power off when it was paused cannot be resumed.
    let asked = |what| client::request(api, "PUT", what, None).is_ok();
    let mut pauses = 0;
    while asked("vm.pause") && asked("vm.resume") {
        pauses += 1;
    }
    pauses
}
