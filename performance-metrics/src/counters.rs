//! What a VMM costs the host: system calls and exits, by tracepoints that the kernel counts (perf_event_open(2)), and processor time
//! (proc(5)).
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::FromRawFd;

/// `perf_event_attr` as of its first version, 64 bytes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
}

/// Of the call.
const FLAG_CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;

const TYPE_TRACEPOINT: u32 = 2;
/// disabled, inherit, enable_on_exec.
const FLAGS: u64 = 1 | 1 << 1 | 1 << 12;

/// A tracepoint, counted in the processes that this thread starts, all their threads included.
struct Tracepoint(File);

impl Tracepoint {
    /// None where the kernel has no such tracepoint, or lets us not count it.
    fn open(name: &str) -> Option<Self> {
        let id = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
            .iter()
            .find_map(|root| fs::read_to_string(format!("{root}/events/{name}/id")).ok())?;
        let attributes = Attributes {
            kind: TYPE_TRACEPOINT,
            size: size_of::<Attributes>() as u32,
            config: id.trim().parse().ok()?,
            flags: FLAGS,
            ..Attributes::default()
        };
        // SAFETY: the structure is of the size that it says; the call makes a new descriptor or fails.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                0,
                -1,
                -1,
                FLAG_CLOSE_ON_EXEC,
            )
        };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the descriptor is new and nobody else's.
        Some(Self(unsafe { File::from_raw_fd(fd) }))
    }

    fn read(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        (&self.0).read_exact(&mut bytes).ok()?;
        Some(u64::from_ne_bytes(bytes))
    }
}

/// Counts of the processes that this thread starts while it exists. Some where the host allows it.
pub struct Tracing {
    syscalls: Option<Tracepoint>,
    exits: Option<Tracepoint>,
}

impl Tracing {
    /// Starts with what is started next.
    pub fn new() -> Self {
        Self {
            syscalls: Tracepoint::open("raw_syscalls/sys_enter"),
            exits: Tracepoint::open("kvm/kvm_userspace_exit"),
        }
    }

    /// Counts so far.
    pub fn read(&self) -> Traced {
        Traced {
            syscalls: self.syscalls.as_ref().and_then(Tracepoint::read),
            exits: self.exits.as_ref().and_then(Tracepoint::read),
        }
    }
}

/// What the tracepoints counted: system calls, and exits from the guest to the VMM.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traced {
    pub syscalls: Option<u64>,
    pub exits: Option<u64>,
}

impl Traced {
    /// What came after `before`.
    pub fn since(&self, before: &Self) -> Self {
        // Nothing at all means that nothing was counted: a VMM makes system calls.
        let difference = |now: Option<u64>, then: Option<u64>| {
            Some(now?.saturating_sub(then?)).filter(|_| now != Some(0))
        };
        Self {
            syscalls: difference(self.syscalls, before.syscalls),
            exits: difference(self.exits, before.exits),
        }
    }
}

/// Nanoseconds that each thread of a process has run.
pub struct ProcessorTime(BTreeMap<String, u64>);

impl ProcessorTime {
    /// So far; threads that end meanwhile are left out.
    pub fn of(pid: u32) -> Self {
        let threads = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten();
        let time = |thread: std::io::Result<fs::DirEntry>| {
            let thread = thread.ok()?;
            let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            let nanoseconds = text.split(' ').next()?.parse().ok()?;
            Some((
                thread.file_name().to_string_lossy().into_owned(),
                nanoseconds,
            ))
        };
        Self(threads.filter_map(time).collect())
    }

    /// Nanoseconds that all threads but the busiest one ran since `before`. The busiest is the vCPU, which polls.
    pub fn beside_vcpu_since(&self, before: &Self) -> u64 {
        let mut times: Vec<u64> = self
            .0
            .iter()
            .map(|(thread, now)| now.saturating_sub(*before.0.get(thread).unwrap_or(&0)))
            .collect();
        times.sort_unstable();
        times.pop();
        times.iter().sum()
    }
}

/// Nanoseconds that this process has run, all its threads together.
pub fn own_time() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it fills the structure, which is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// What a host program came to.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// The figure.
    pub value: f64,
    /// Microseconds of processor time an operation.
    pub cpu_us: f64,
}

impl Plain {
    /// `operations` in `seconds`, since [`own_time`] was `before`.
    pub fn rate(operations: u32, seconds: f64, before: u64) -> Self {
        let operations = f64::from(operations);
        Self {
            value: operations / seconds,
            cpu_us: own_time().saturating_sub(before) as f64 / 1e3 / operations,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_thread_is_left_out() {
        let times = |list: &[(&str, u64)]| {
            ProcessorTime(list.iter().map(|(t, n)| ((*t).to_owned(), *n)).collect())
        };
        let before = times(&[("1", 5), ("2", 100)]);
        let after = times(&[("1", 9), ("2", 1100), ("3", 7)]);
        assert_eq!(after.beside_vcpu_since(&before), 11);
    }

    #[test]
    fn threads_of_ours_have_run() {
        let time = ProcessorTime::of(std::process::id());
        assert!(time.0.values().any(|ns| *ns > 0), "{:?}", time.0);
    }

    #[test]
    fn nothing_counted_is_not_a_count_of_nothing() {
        let traced = |syscalls| Traced {
            syscalls,
            exits: None,
        };
        let none = traced(Some(0));
        assert_eq!(none.since(&none).syscalls, None);
        assert_eq!(traced(Some(9)).since(&traced(Some(4))).syscalls, Some(5));
        assert_eq!(traced(None).since(&none).syscalls, None);
    }
}
