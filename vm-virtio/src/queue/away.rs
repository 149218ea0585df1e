//! A queue that somebody else serves for a while: a back end in another process (vhost-user).

use std::sync::atomic::Ordering;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use super::fault::{Fault, QueueError};
use super::{DeviceQueue, in_used};
use virtio_queue::QueueT;

impl DeviceQueue {
    /// Chains that were given back so far, modulo 2^16, as the used ring in `memory` says: who serves the queue counts there. 0 for a
    /// queue that is not served.
    ///
    /// # Errors
    /// The ring is no longer in memory.
    pub fn used_index<M: GuestMemory>(&self, memory: &M) -> Result<u16, QueueError> {
        if !self.is_served() {
            return Ok(0);
        }
        let place = GuestAddress(self.ring.used_ring()).unchecked_add(2);
        let index = memory.load(place, Ordering::Acquire).map(u16::from_le);
        index.map_err(|source| self.error(in_used(source)))
    }

    /// Chains that the driver made available so far, modulo 2^16, as the available ring in `memory` says. 0 for a queue that is not served.
    ///
    /// # Errors
    /// The ring is no longer in memory.
    pub fn available_index<M: GuestMemory>(&self, memory: &M) -> Result<u16, QueueError> {
        if !self.is_served() {
            return Ok(0);
        }
        super::available_index(&self.available_head(memory)).map_err(|fault| self.error(fault))
    }

    /// The queue is the device's again, after another has served it who popped chains up to `next_available`. Where nobody knows how
    /// far that was, chains that were not given back count as not popped. A queue that is not served stays as it is.
    ///
    /// # Errors
    /// The ring is no longer in memory, or what was popped and what was given back cannot be.
    pub fn take_back<M: GuestMemory>(
        &mut self,
        memory: &M,
        next_available: Option<u16>,
    ) -> Result<(), QueueError> {
        if !self.is_served() {
            return Ok(());
        }
        let used = self.used_index(memory)?;
        let available = next_available.unwrap_or(used);
        let in_flight = available.wrapping_sub(used);
        if in_flight > self.ring.size() {
            return Err(self.error(Fault::Offered {
                count: in_flight,
                size: self.ring.size(),
            }));
        }
        self.ring.set_next_avail(available);
        self.ring.set_next_used(used);
        self.seen = available;
        self.signalled = used;
        self.unsignalled = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::feature::RING_FEATURES;
    use crate::testing::{Descriptor, DriverQueue, memory};
    use crate::{Chain, QueueV1};

    #[test]
    fn another_serves_it_meanwhile() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8, true);
        let queue = |state: &QueueV1| {
            let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            DeviceQueue::new(0, 8, state, RING_FEATURES, &*memory, kick).unwrap()
        };
        let mut ours = queue(&driver.state());
        let mut theirs = queue(&driver.state());
        let mut chain = Chain::new();
        for _ in 0..3 {
            driver.add(&[Descriptor::writable(0x1000, 16)]).unwrap();
            assert!(theirs.pop(&*memory, &mut chain).unwrap());
            theirs.add_used(&*memory, chain.head(), 0).unwrap();
        }
        driver.add(&[Descriptor::writable(0x1000, 16)]).unwrap();
        assert!(theirs.pop(&*memory, &mut chain).unwrap());

        assert_eq!(ours.used_index(&*memory).unwrap(), 3);
        assert_eq!(ours.available_index(&*memory).unwrap(), 4);
        ours.take_back(&*memory, Some(4)).unwrap();
        assert_eq!((ours.state().next_available, ours.in_flight()), (4, 1));
        // Nobody knows of the fourth: it is popped again.
        ours.take_back(&*memory, None).unwrap();
        assert_eq!((ours.state().next_available, ours.in_flight()), (3, 0));
        let head = chain.head();
        assert!(ours.pop(&*memory, &mut chain).unwrap());
        assert_eq!(chain.head(), head);
        for wrong in [2, 12] {
            let error = ours.take_back(&*memory, Some(wrong)).unwrap_err();
            assert!(matches!(error.fault, Fault::Offered { .. }), "{error}");
        }
    }

    #[test]
    fn a_queue_that_is_not_ready_stays_so() {
        let memory = memory();
        let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let state = QueueV1::default();
        let mut queue = DeviceQueue::new(0, 8, &state, RING_FEATURES, &*memory, kick).unwrap();
        queue.take_back(&*memory, Some(7)).unwrap();
        assert_eq!(queue.used_index(&*memory).unwrap(), 0);
        assert_eq!(queue.state().next_available, 0);
    }
}
