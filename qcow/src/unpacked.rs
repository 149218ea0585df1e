//! Compressed clusters as they are unpacked, kept within a bound that all images of a chain share.
//!
//! What is here is known by where its compressed bytes are in the file, so it has to go before those bytes become others. Why no
//! look-up finds what has gone stale:
//!
//! * Compressed bytes are never changed in place: where they lie, nothing is written until all of their host cluster was free and is
//!   claimed anew. (Bytes behind them may be written: those of the next compressed cluster. Unpacking ends before those count.)
//! * All host clusters that come into use are claimed in `alloc.rs`, under the image's lock and before anything is written there.
//!   [`Unpacked::forget`] is called there, rather than in the places that make clusters free. Only a repair places tables past the end of
//!   the file without that, and ends with [`Unpacked::clear`], as snapshots do.
//! * A reader looks up where the bytes are under the image's lock, and holds a ticket from then until after it has put the
//!   unpacked cluster in here. The host cluster is not freed, so not claimed, as long as that ticket lasts; and a reader that comes
//!   after the claim does not find the old place in the tables. Snapshots and repairs are alone: no ticket lasts at all.
//!
//! An image in which two things claim the same host cluster may read either; it is corrupt. Backing files are never written.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Result;

/// Where compressed bytes are. Ordered by place, so that those in a range are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// Which file of the chain.
    image: usize,
    offset: u64,
    length: u64,
}

#[derive(Debug)]
struct Slot {
    key: Key,
    bytes: Arc<Vec<u8>>,
    /// Since the hand was here.
    used: bool,
}

/// A clock: the hand passes what was used since its last turn, and drops the rest.
#[derive(Debug, Default)]
struct Clock {
    index: BTreeMap<Key, usize>,
    slots: Vec<Option<Slot>>,
    /// Slots without a cluster.
    empty: Vec<usize>,
    hand: usize,
    /// Bytes of all clusters.
    size: usize,
    /// What someone unpacks just now.
    under_way: Vec<Key>,
}

impl Clock {
    fn find(&mut self, key: &Key) -> Option<Arc<Vec<u8>>> {
        let index = *self.index.get(key)?;
        let slot = self.slots.get_mut(index)?.as_mut()?;
        slot.used = true;
        Some(Arc::clone(&slot.bytes))
    }

    fn insert(&mut self, key: Key, bytes: Arc<Vec<u8>>) {
        self.remove(&key);
        self.size += bytes.len();
        let slot = Some(Slot {
            key,
            bytes,
            used: false,
        });
        let index = match self.empty.pop() {
            Some(index) => index,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        if let Some(place) = self.slots.get_mut(index) {
            *place = slot;
            self.index.insert(key, index);
        }
    }

    fn remove(&mut self, key: &Key) -> Option<Arc<Vec<u8>>> {
        let index = self.index.remove(key)?;
        let slot = self.slots.get_mut(index)?.take()?;
        self.empty.push(index);
        self.size -= slot.bytes.len();
        Some(slot.bytes)
    }

    /// Makes room for `length` bytes, as far as there is any; the last cluster that had to go.
    fn make_room(&mut self, length: usize, limit: usize) -> Option<Arc<Vec<u8>>> {
        let mut gone = None;
        while self.size > 0 && self.size + length > limit {
            gone = self.evict();
        }
        gone
    }

    fn evict(&mut self) -> Option<Arc<Vec<u8>>> {
        // In the second turn none is used.
        for _ in 0..2 * self.slots.len() {
            self.hand = (self.hand + 1) % self.slots.len();
            let Some(Some(slot)) = self.slots.get_mut(self.hand) else {
                continue;
            };
            if !std::mem::take(&mut slot.used) {
                let key = slot.key;
                return self.remove(&key);
            }
        }
        None
    }

    /// Drops what lies in `from..to`, ordered by key.
    fn drop_keys(&mut self, mut from: Key, to: Key, goes: impl Fn(&Key) -> bool) {
        while let Some(key) = self
            .index
            .range(from..to)
            .map(|(key, _)| *key)
            .find(|key| goes(key))
        {
            self.remove(&key);
            from = key;
        }
    }
}

/// What the images of a chain share.
#[derive(Debug)]
struct Shared {
    /// Held for moments: never while something is read, unpacked or copied.
    clock: Mutex<Clock>,
    /// Signalled when something is not under way any more.
    done: Condvar,
    limit: usize,
}

impl Shared {
    // Nothing in here panics half way through a change.
    fn lock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A cluster that this thread unpacks, while others wait for it.
struct UnderWay<'a> {
    shared: &'a Shared,
    key: Key,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.shared.lock().under_way.retain(|k| *k != self.key);
        self.shared.done.notify_all();
    }
}

/// The unpacked clusters of one image, among those of its chain.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    shared: Arc<Shared>,
    image: usize,
}

impl Unpacked {
    /// A cache of `limit` bytes, though never less than one cluster; zero turns it off. Memory is taken as it fills.
    pub fn new(limit: usize) -> Self {
        Unpacked {
            shared: Arc::new(Shared {
                clock: Mutex::default(),
                done: Condvar::new(),
                limit,
            }),
            image: 0,
        }
    }

    /// The same cache, for file number `image` of the chain.
    pub fn of_image(&self, image: usize) -> Self {
        Unpacked {
            shared: Arc::clone(&self.shared),
            image,
        }
    }

    /// Fills `out` with what follows the first `skip` bytes of a cluster of `size` bytes, whose compressed bytes are at `offset`.
    /// `unpack` makes the cluster if it is not here. The caller holds a ticket since it looked up where those are.
    pub fn read(
        &self,
        (offset, length): (u64, u64),
        size: usize,
        skip: usize,
        out: &mut [u8],
        unpack: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let key = Key {
            image: self.image,
            offset,
            length,
        };
        let whole = out.len() == size;
        let cluster = match self.find_or_begin(key, size, whole) {
            Found::Here(cluster) => cluster,
            // Who reads whole clusters gains nothing from a copy.
            Found::Absent(..) if whole => return unpack(out),
            Found::Absent(under_way, room) => {
                let mut cluster = room.unwrap_or_else(|| Arc::new(vec![0; size]));
                // It was made sure that nobody else has it.
                let bytes: &mut Vec<u8> = Arc::make_mut(&mut cluster);
                unpack(bytes)?;
                if under_way.is_some() {
                    let mut clock = self.shared.lock();
                    clock.make_room(size, self.shared.limit);
                    clock.insert(key, Arc::clone(&cluster));
                }
                cluster
            }
        };
        out.copy_from_slice(&cluster[skip..skip + out.len()]);
        Ok(())
    }

    /// Waits if another thread unpacks it.
    fn find_or_begin(&self, key: Key, size: usize, whole: bool) -> Found<'_> {
        let shared = &*self.shared;
        if shared.limit == 0 {
            return Found::Absent(None, None);
        }
        let mut clock = shared.lock();
        loop {
            if let Some(cluster) = clock.find(&key) {
                return Found::Here(cluster);
            }
            if whole {
                return Found::Absent(None, None);
            }
            if !clock.under_way.contains(&key) {
                break;
            }
            clock = shared
                .done
                .wait(clock)
                .unwrap_or_else(PoisonError::into_inner);
        }
        clock.under_way.push(key);
        let room = clock.make_room(size, shared.limit);
        drop(clock);
        let own = room.filter(|r| r.len() == size && Arc::strong_count(r) == 1);
        Found::Absent(Some(UnderWay { shared, key }), own)
    }

    /// Drops what was unpacked from any of the bytes `start..end`, which become others. No compressed cluster is longer than `longest`.
    pub fn forget(&self, start: u64, end: u64, longest: u64) {
        let key = |offset| Key {
            image: self.image,
            offset,
            length: 0,
        };
        let from = key(start.saturating_sub(longest));
        self.shared
            .lock()
            .drop_keys(from, key(end), |k| k.offset + k.length > start);
    }

    /// Drops all of this image.
    pub fn clear(&self) {
        self.forget(0, u64::MAX, 0);
    }

    #[cfg(test)]
    fn size(&self) -> usize {
        self.shared.lock().size
    }
}

enum Found<'a> {
    Here(Arc<Vec<u8>>),
    /// To be unpacked by the caller, and who waits for that; and a buffer for it, which nobody else has.
    Absent(Option<UnderWay<'a>>, Option<Arc<Vec<u8>>>),
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;

    const SIZE: usize = 512;

    /// Reads 16 bytes of the cluster at `offset`, all bytes of which are `byte`. Whether it was here.
    fn hit(cache: &Unpacked, offset: u64, byte: u8) -> bool {
        let unpacked = Cell::new(false);
        let mut out = [0; 16];
        let unpack = |cluster: &mut [u8]| {
            unpacked.set(true);
            cluster.fill(byte);
            Ok(())
        };
        cache
            .read((offset, 100), SIZE, 3, &mut out, unpack)
            .unwrap();
        assert_eq!(out, [byte; 16]);
        !unpacked.get()
    }

    #[test]
    fn the_part_that_is_wanted() {
        let cache = Unpacked::new(SIZE);
        let unpack = |cluster: &mut [u8]| {
            (0..)
                .zip(cluster)
                .for_each(|(i, b): (usize, _)| *b = i as u8);
            Ok(())
        };
        for _ in 0..2 {
            let mut out = [0; 3];
            cache.read((0, 9), SIZE, 200, &mut out, unpack).unwrap();
            assert_eq!(out, [200, 201, 202]);
        }
    }

    #[test]
    fn the_bound_is_kept_and_what_is_used_stays() {
        let cache = Unpacked::new(4 * SIZE + 1);
        for i in 1..100u64 {
            assert!(!hit(&cache, i * 1000, i as u8));
            assert!(hit(&cache, 1000, 1), "{i}");
            assert!(cache.size() <= 4 * SIZE);
        }
        assert_eq!(cache.size(), 4 * SIZE);
        assert!(!hit(&cache, 2000, 2));
    }

    #[test]
    fn one_cluster_at_least_or_none() {
        let small = Unpacked::new(1);
        assert!(!hit(&small, 0, 1) && hit(&small, 0, 1));
        assert!(!hit(&small, 500, 2) && hit(&small, 500, 2));
        assert!(!hit(&small, 0, 1));
        assert_eq!(small.size(), SIZE);
        let off = Unpacked::new(0);
        assert!(!hit(&off, 0, 1) && !hit(&off, 0, 1));
        assert_eq!(off.size(), 0);
    }

    #[test]
    fn images_of_a_chain_share_the_bound_and_nothing_else() {
        let cache = Unpacked::new(2 * SIZE);
        for image in 0..64 {
            let own = cache.of_image(image);
            assert!(!hit(&own, 0, image as u8) && hit(&own, 0, image as u8));
            assert!(cache.size() <= 2 * SIZE);
        }
        cache.of_image(62).clear();
        assert!(hit(&cache.of_image(63), 0, 63) && !hit(&cache.of_image(62), 0, 9));
    }

    #[test]
    fn what_overlaps_is_forgotten() {
        let cache = Unpacked::new(1 << 20);
        let (before, touching, inside, last, behind) = (900, 901, 1000, 1511, 1512);
        let all = [before, touching, inside, last, behind];
        for at in all {
            hit(&cache, at, 1);
        }
        cache.forget(1000, 1512, 1024);
        assert_eq!(cache.size(), 2 * SIZE);
        assert_eq!(
            all.map(|at| hit(&cache, at, 2 - u8::from(at == before || at == behind))),
            [true, false, false, false, true]
        );
    }

    #[test]
    fn who_reads_all_of_a_cluster_fills_nothing_but_finds_it() {
        let cache = Unpacked::new(4 * SIZE);
        let mut out = [0; SIZE];
        cache
            .read((0, 100), SIZE, 0, &mut out, |c| {
                c.fill(1);
                Ok(())
            })
            .unwrap();
        assert_eq!((out, cache.size()), ([1; SIZE], 0));
        assert!(!hit(&cache, 0, 1));
        let never = |_: &mut [u8]| Err(Error::Stopped);
        cache.read((0, 100), SIZE, 0, &mut out, never).unwrap();
    }

    #[test]
    fn a_failure_is_told_and_not_kept() {
        let cache = Unpacked::new(4 * SIZE);
        let fail = |_: &mut [u8]| Err(Error::Stopped);
        assert!(cache.read((0, 100), SIZE, 0, &mut [0; 8], fail).is_err());
        assert_eq!(cache.size(), 0);
        assert!(!hit(&cache, 0, 5), "and nobody waits for it");
    }

    #[test]
    fn many_threads_unpack_a_cluster_once() {
        let cache = Unpacked::new(4 * SIZE);
        let times = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let mut out = [0; 8];
                    let unpack = |cluster: &mut [u8]| {
                        times.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        cluster.fill(7);
                        Ok(())
                    };
                    cache.read((0, 100), SIZE, 8, &mut out, unpack).unwrap();
                    assert_eq!(out, [7; 8]);
                });
            }
        });
        assert_eq!(times.into_inner(), 1);
    }
}
