//! A storage that writes down all that is done to it, and the states in which a kill could leave it.

use std::io;
use std::sync::Mutex;

use qcow::{MemStorage, Storage};

#[derive(Clone, Debug)]
pub enum Event {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Discard(u64, u64),
    Flush,
}

/// Memory with a log of what changed it.
#[derive(Debug, Default)]
pub struct Recording {
    now: MemStorage,
    log: Mutex<Vec<Event>>,
}

impl Recording {
    /// Starts with these bytes, which are durable.
    pub fn new(bytes: Vec<u8>) -> Self {
        Recording {
            now: MemStorage::new(bytes),
            log: Mutex::default(),
        }
    }

    pub fn take_log(&self) -> Vec<Event> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Number of events so far.
    pub fn position(&self) -> usize {
        self.log.lock().unwrap().len()
    }
}

/// Does to `bytes` what an event did.
pub fn apply(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(at, data) => {
            let end = *at as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*at as usize..end].copy_from_slice(data);
        }
        Event::SetLen(n) => bytes.resize(*n as usize, 0),
        Event::Discard(at, n) => {
            let len = bytes.len();
            let end = ((*at + *n) as usize).min(len);
            bytes[(*at as usize).min(len)..end].fill(0);
        }
        Event::Flush => {}
    }
}

impl Storage for Recording {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.now.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        log.push(Event::Write(offset, buf.to_vec()));
        self.now.write_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(Event::Flush);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.now.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        log.push(Event::SetLen(len));
        self.now.set_len(len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        log.push(Event::Discard(offset, len));
        let mut bytes = vec![0; len as usize];
        bytes.truncate(self.now.len()?.saturating_sub(offset).min(len) as usize);
        self.now.write_at(&bytes, offset)
    }
}
