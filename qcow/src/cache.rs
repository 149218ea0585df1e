//! A bounded cache of table clusters: L2 tables, or refcount blocks, as bytes.
//!
//! It writes nothing on its own: who owns it knows in which order tables may reach the disk.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::layout::OffsetMap;
use crate::storage::Storage;

/// A table, and which of its bytes differ from the disk's.
#[derive(Debug)]
pub(crate) struct Table {
    bytes: Vec<u8>,
    dirty: Option<Range<usize>>,
    used: u64,
    /// Its owner has checked it since it was read.
    verified: bool,
}

impl Table {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The 8-byte word number `index`.
    pub fn word(&self, index: usize) -> u64 {
        crate::header::be64(&self.bytes, index * 8)
    }

    pub fn set_word(&mut self, index: usize, value: u64) {
        self.edit(index * 8..index * 8 + 8)
            .copy_from_slice(&value.to_be_bytes());
    }

    /// Bytes to be changed; they are written with the next write-back.
    pub fn edit(&mut self, range: Range<usize>) -> &mut [u8] {
        self.dirty = Some(match self.dirty.take() {
            Some(d) => d.start.min(range.start)..d.end.max(range.end),
            None => range.clone(),
        });
        &mut self.bytes[range]
    }

    /// Changes a word in memory alone, where the disk's value was found wrong but harmless.
    pub fn mask_word(&mut self, index: usize, value: u64) {
        self.bytes[index * 8..index * 8 + 8].copy_from_slice(&value.to_be_bytes());
    }
}

/// Tables by their offset in the image file.
#[derive(Debug)]
pub(crate) struct Cache {
    tables: OffsetMap<Table>,
    clock: u64,
    limit: usize,
    table_size: usize,
    dirty: usize,
    /// Tables that ever came in.
    arrivals: u64,
}

impl Cache {
    /// A cache of about `bytes` bytes, though never fewer than four tables.
    pub fn new(bytes: usize, table_size: usize) -> Self {
        let limit = (bytes / table_size).max(4);
        Cache {
            tables: OffsetMap::default(),
            clock: 0,
            limit,
            table_size,
            dirty: 0,
            arrivals: 0,
        }
    }

    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Number of tables that differ from the disk.
    pub fn dirty(&self) -> usize {
        self.dirty
    }

    /// Whether the table at `offset` is here and was found right, or made here.
    pub fn is_verified(&self, offset: u64) -> bool {
        self.tables.get(&offset).is_some_and(|t| t.verified)
    }

    /// Notes that the table at `offset` was found right.
    pub fn set_verified(&mut self, offset: u64) {
        if let Some(t) = self.tables.get_mut(&offset) {
            t.verified = true;
        }
    }

    pub fn contains(&self, offset: u64) -> bool {
        self.tables.contains_key(&offset)
    }

    /// The table at `offset`, read if it is not here.
    pub fn get(&mut self, storage: &dyn Storage, offset: u64) -> Result<&Table> {
        self.load(storage, offset)?;
        self.peek(offset)
            .ok_or_else(|| Error::Corrupt("a table left the cache while in use".into()))
    }

    /// The table at `offset`, if it is here.
    pub fn peek(&mut self, offset: u64) -> Option<&Table> {
        let table = self.tables.get_mut(&offset)?;
        self.clock += 1;
        table.used = self.clock;
        Some(table)
    }

    /// Lets `change` work on the table at `offset`.
    pub fn change<R>(
        &mut self,
        storage: &dyn Storage,
        offset: u64,
        change: impl FnOnce(&mut Table) -> R,
    ) -> Result<R> {
        self.load(storage, offset)?;
        self.clock += 1;
        match self.tables.get_mut(&offset) {
            Some(t) => {
                t.used = self.clock;
                let was = t.dirty.is_some();
                let result = change(t);
                self.dirty += usize::from(!was && t.dirty.is_some());
                Ok(result)
            }
            None => Err(Error::Corrupt("a table left the cache while in use".into())),
        }
    }

    fn load(&mut self, storage: &dyn Storage, offset: u64) -> Result<()> {
        if !self.tables.contains_key(&offset) {
            let mut bytes = vec![0; self.table_size];
            storage.read_at(&mut bytes, offset).map_err(Error::io(
                "reading",
                "image file",
                offset,
            ))?;
            self.put(offset, bytes);
        }
        Ok(())
    }

    /// Puts a table in that is as on the disk.
    pub fn put(&mut self, offset: u64, bytes: Vec<u8>) {
        self.make_room();
        self.arrivals += 1;
        self.tables.insert(
            offset,
            Table {
                bytes,
                dirty: None,
                used: self.clock,
                verified: false,
            },
        );
    }

    /// Changes with every table that comes in.
    pub fn arrivals(&self) -> u64 {
        self.arrivals
    }

    /// Puts a new table in, all of it dirty.
    pub fn insert(&mut self, offset: u64, bytes: Vec<u8>) {
        self.remove(offset);
        self.make_room();
        self.clock += 1;
        self.arrivals += 1;
        let dirty = Some(0..bytes.len());
        self.tables.insert(
            offset,
            Table {
                bytes,
                dirty,
                used: self.clock,
                verified: true,
            },
        );
        self.dirty += 1;
    }

    /// Forgets the table at `offset`, whatever its state.
    pub fn remove(&mut self, offset: u64) {
        if let Some(t) = self.tables.remove(&offset) {
            self.dirty -= usize::from(t.dirty.is_some());
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.tables.clear();
        self.dirty = 0;
    }

    /// Evicts the older half of the clean tables when full. Dirty ones stay: their owner bounds their number.
    fn make_room(&mut self) {
        if self.tables.len() < self.limit {
            return;
        }
        let mut ages: Vec<u64> = self
            .tables
            .values()
            .filter(|t| t.dirty.is_none())
            .map(|t| t.used)
            .collect();
        if ages.is_empty() {
            return;
        }
        let middle = ages.len() / 2;
        let (_, median, _) = ages.select_nth_unstable(middle);
        let median = *median;
        self.tables
            .retain(|_, t| t.dirty.is_some() || t.used > median);
    }

    /// Writes what differs from the disk, in order of offsets. What fails stays dirty.
    pub fn write_back(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.dirty == 0 {
            return Ok(());
        }
        let mut offsets: Vec<u64> = self
            .tables
            .iter()
            .filter(|(_, t)| t.dirty.is_some())
            .map(|(o, _)| *o)
            .collect();
        offsets.sort_unstable();
        for offset in offsets {
            let Some(t) = self.tables.get_mut(&offset) else {
                continue;
            };
            let Some(range) = t.dirty.clone() else {
                continue;
            };
            // Whole sectors, or blocks, so that nothing has to be read first: the rest of them is as on the disk.
            let unit = storage.block().max(512) as usize;
            let start = range.start / unit * unit;
            let range = start..range.end.next_multiple_of(unit).min(t.bytes.len());
            let at = offset + range.start as u64;
            storage.write_at(&t.bytes[range], at).map_err(Error::io(
                "writing",
                "image file",
                at,
            ))?;
            t.dirty = None;
            self.dirty -= 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemStorage;

    #[test]
    fn stays_within_its_bounds_and_keeps_dirty_tables() {
        let s = MemStorage::new(vec![7; 512 * 100]);
        let mut c = Cache::new(512 * 8, 512);
        c.change(&s, 512, |t| t.set_word(3, 99)).unwrap();
        for i in 0..100 {
            assert!(c.get(&s, i * 512).unwrap().bytes().len() == 512);
            assert!(c.tables.len() <= 8);
        }
        assert_eq!(c.get(&s, 512).unwrap().word(3), 99);
        assert_eq!(c.dirty(), 1);
        c.write_back(&s).unwrap();
        assert_eq!(c.dirty(), 0);
        assert_eq!(s.to_vec()[512 + 24..512 + 32], 99u64.to_be_bytes());
        assert_eq!(s.to_vec()[512 + 32], 7);
    }

    #[test]
    fn a_masked_word_is_not_written() {
        let s = MemStorage::new(vec![0; 1024]);
        let mut c = Cache::new(0, 512);
        c.change(&s, 0, |t| t.mask_word(0, 5)).unwrap();
        c.write_back(&s).unwrap();
        assert_eq!(s.to_vec()[7], 0);
        assert!(c.limit() == 4 && c.contains(0));
    }
}
