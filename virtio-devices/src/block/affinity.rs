//! CPUs of the host that a queue's thread may run on.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::sync::Arc;
use std::thread;

use log::debug;
use vm_virtio::{Job, Spawn};

/// Binds the calling thread to `cpus`.
fn pin(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: all zeroes is a set of no CPUs.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for &cpu in cpus {
        if cpu >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // SAFETY: the set has room for this one, as was just looked at.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: the kernel reads a set of the size that is told; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a thread can be bound to each of `cpus`, found out by a thread that tries.
pub(super) fn check(cpus: &[usize]) -> io::Result<()> {
    let tried = thread::scope(|scope| {
        scope
            .spawn(|| cpus.iter().try_for_each(|cpu| pin(&[*cpu])))
            .join()
    });
    tried.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
}

/// As `spawn`, for threads that are bound to `cpus`, if there are any.
pub(super) fn bound(spawn: &Spawn, cpus: &[usize]) -> Spawn {
    if cpus.is_empty() {
        return spawn.clone();
    }
    let (spawn, cpus) = (spawn.clone(), cpus.to_vec());
    Arc::new(move |name: String, job: Job| {
        let cpus = cpus.clone();
        let body = move || {
            // It could when the device was made; where it cannot any more, the queue is served all the same.
            if let Err(error) = pin(&cpus) {
                debug!("binding a queue's thread to CPUs {cpus:?}: {error}");
            }
            job();
        };
        spawn(name, Box::new(body))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn present() -> Vec<usize> {
        // SAFETY: all zeroes is a set of no CPUs.
        let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes a set of the size that is told.
        let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
        assert!(result >= 0);
        (0..libc::CPU_SETSIZE as usize)
            // SAFETY: the set has room for these.
            .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
            .collect()
    }

    #[test]
    fn a_bound_thread_has_its_cpus_alone() {
        let last = *present().last().unwrap();
        let (sender, seen) = channel();
        let job = Box::new(move || sender.send(present()).unwrap());
        bound(&vm_virtio::testing::spawn(), &[last])("t".into(), job).unwrap();
        assert_eq!(seen.recv().unwrap(), [last]);
    }

    #[test]
    fn cpus_that_are_not_there_are_found_out() {
        let first = present()[0];
        check(&[first]).unwrap();
        for wrong in [1023, 1024, usize::MAX] {
            assert!(check(&[first, wrong]).is_err(), "{wrong}");
        }
        assert!(present().contains(&first), "this thread is as it was");
    }
}
