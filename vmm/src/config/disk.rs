//! `--disk`: a virtio block device on an image or a block device of the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimitConfig, number, rate_limit, read_keys};

const OPTION: &str = "--disk";
const KNOWN: &[&str] = &[
    "iommu",
    "path",
    "readonly",
    "direct",
    "num_queues",
    "queue_size",
    "image_type",
    "backing_files",
    "serial",
    "id",
    "poll_queue",
    "sparse",
    "queue_affinity",
    "rate_limit_group",
    "vhost_user",
    "socket",
    "lock_granularity",
];
/// Most queues of a disk.
const MAX_QUEUES: u16 = 256;
/// Bytes of the answer to GET_ID (virtio 1.2 §5.2.6).
const SERIAL_LENGTH: usize = 20;
/// CPUs that a thread can be bound to, as the kernel's set of them has it.
const MAX_CPUS: usize = 1024;

/// What the image is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageType {
    /// The guest's bytes and no more.
    Raw,
    /// qcow2.
    Qcow2,
}

/// What of the image's file is locked.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockGranularity {
    /// The bytes that it has.
    #[default]
    #[serde(alias = "ByteRange")]
    ByteRange,
    /// All of it, wherever its end comes to be.
    #[serde(alias = "Full")]
    Full,
}

impl LockGranularity {
    /// As the library of disks has it.
    pub fn of_lock(self) -> block_util::LockGranularity {
        match self {
            Self::ByteRange => block_util::LockGranularity::ByteRange,
            Self::Full => block_util::LockGranularity::Full,
        }
    }
}

/// CPUs of the host for a queue's thread.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct QueueAffinity {
    /// Number of the queue, from 0.
    pub queue_index: u16,
    /// CPUs that it may run on.
    pub host_cpus: Vec<usize>,
}

/// One `--disk`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiskConfig {
    /// Image or block device; empty where another process serves the disk.
    pub path: PathBuf,
    /// The guest cannot write.
    pub readonly: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
    /// Request queues, each with a thread.
    pub num_queues: u16,
    /// Entries a queue: a power of two.
    pub queue_size: u16,
    /// What the image is; found out where not told.
    pub image_type: Option<ImageType>,
    /// Files that a qcow2 image names, such as its backing file, are opened too.
    pub backing_files: bool,
    /// What the guest's GET_ID gives.
    pub serial: Option<String>,
    /// The device's name in the API.
    pub id: Option<String>,
    /// Behind the virtual IOMMU.
    pub iommu: bool,
    /// Discarded space is given back to the host's file system.
    pub sparse: bool,
    /// A queue's thread looks for more requests for some microseconds before it sleeps.
    pub poll_queue: bool,
    /// Queues whose thread is bound to CPUs of the host.
    pub queue_affinity: Option<Vec<QueueAffinity>>,
    /// Limits of this disk alone.
    pub rate_limiter_config: Option<RateLimitConfig>,
    /// Limits that it shares with other disks: an id of `--rate-limit-group`.
    pub rate_limit_group: Option<String>,
    /// Another process serves the disk, by vhost-user.
    pub vhost_user: bool,
    /// Where that process listens.
    pub vhost_socket: Option<PathBuf>,
    /// What of the image's file is locked.
    pub lock_granularity: LockGranularity,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::new(),
            readonly: false,
            direct: false,
            num_queues: 1,
            queue_size: 128,
            image_type: None,
            backing_files: false,
            serial: None,
            id: None,
            iommu: false,
            sparse: true,
            poll_queue: true,
            queue_affinity: None,
            rate_limiter_config: None,
            rate_limit_group: None,
            vhost_user: false,
            vhost_socket: None,
            lock_granularity: LockGranularity::default(),
        }
    }
}

impl DiskConfig {
    /// Reads `path=disk.raw,readonly=on`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let default = Self::default();
        let text = read_keys(OPTION, &[KNOWN, &rate_limit::KEYS].concat(), &[], text)?;
        let vhost_user = text.toggle("vhost_user")?.unwrap_or(default.vhost_user);
        Ok(Self {
            path: if vhost_user || text.text("socket").is_some() {
                text.text("path").unwrap_or_default().into()
            } else {
                text.required("path")?.into()
            },
            readonly: text.toggle("readonly")?.unwrap_or(default.readonly),
            direct: text.toggle("direct")?.unwrap_or(default.direct),
            num_queues: number(&text, "num_queues", 1, MAX_QUEUES)?.unwrap_or(default.num_queues),
            queue_size: number(&text, "queue_size", 1, 32768)?.unwrap_or(default.queue_size),
            image_type: text.convert("image_type", "raw or qcow2 is allowed", |v| match v {
                "raw" => Some(ImageType::Raw),
                "qcow2" => Some(ImageType::Qcow2),
                _ => None,
            })?,
            backing_files: text
                .toggle("backing_files")?
                .unwrap_or(default.backing_files),
            serial: text.text("serial").map(str::to_owned),
            id: text.text("id").map(str::to_owned),
            iommu: text.toggle("iommu")?.unwrap_or(default.iommu),
            sparse: text.toggle("sparse")?.unwrap_or(default.sparse),
            poll_queue: text.toggle("poll_queue")?.unwrap_or(default.poll_queue),
            queue_affinity: text
                .list("queue_affinity")?
                .map(|list| list.iter().map(|one| affinity(one)).collect())
                .transpose()?,
            rate_limiter_config: RateLimitConfig::parse(OPTION, &text)?,
            rate_limit_group: text.text("rate_limit_group").map(str::to_owned),
            vhost_user,
            vhost_socket: text.text("socket").map(PathBuf::from),
            lock_granularity: text
                .convert(
                    "lock_granularity",
                    "byte-range or full is allowed",
                    |v| match v {
                        "byte-range" => Some(LockGranularity::ByteRange),
                        "full" => Some(LockGranularity::Full),
                        _ => None,
                    },
                )?
                .unwrap_or_default(),
        })
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |what: String| Err(ConfigError::value(OPTION, what));
        if self.vhost_user || self.vhost_socket.is_some() {
            self.validate_vhost_user()?;
        } else if self.path.as_os_str().is_empty() {
            return wrong("path is missing".into());
        }
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return wrong(format!(
                "num_queues={} is wrong; 1 to {MAX_QUEUES} are allowed",
                self.num_queues
            ));
        }
        // A request takes two entries besides its data.
        if !self.queue_size.is_power_of_two() || !(4..=32768).contains(&self.queue_size) {
            return wrong(format!(
                "queue_size={} is wrong; a power of two from 4 to 32768 is allowed",
                self.queue_size
            ));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_LENGTH || !serial.is_ascii())
        {
            return wrong(format!(
                "serial={serial} is wrong; up to {SERIAL_LENGTH} ASCII characters are allowed"
            ));
        }
        if let Some(limits) = &self.rate_limiter_config {
            limits.validate(OPTION)?;
            if let Some(group) = &self.rate_limit_group {
                return wrong(format!(
                    "rate_limit_group={group} and limits of its own exclude each other"
                ));
            }
        }
        let mut bound: Vec<u16> = Vec::new();
        for affinity in self.queue_affinity.iter().flatten() {
            let queue = affinity.queue_index;
            if queue >= self.num_queues {
                return wrong(format!(
                    "queue_affinity: there is no queue {queue}; num_queues={}",
                    self.num_queues
                ));
            }
            if affinity.host_cpus.is_empty() || bound.contains(&queue) {
                return wrong(format!(
                    "queue_affinity: queue {queue} needs CPUs, told once"
                ));
            }
            bound.push(queue);
        }
        Ok(())
    }

    /// What is asked of a disk that another process serves. All else is that process's affair.
    fn validate_vhost_user(&self) -> Result<(), ConfigError> {
        let wrong = |what: &str| Err(ConfigError::value(OPTION, what));
        let empty = |path: &PathBuf| path.as_os_str().is_empty();
        if !empty(&self.path) {
            return wrong("path and socket exclude each other");
        }
        if !self.vhost_user {
            return wrong("socket needs vhost_user=on");
        }
        if self.vhost_socket.as_ref().is_none_or(empty) {
            return wrong("socket is missing; vhost_user=on needs the socket of the back end");
        }
        let default = Self::default();
        let others = [
            ("direct", self.direct),
            ("image_type", self.image_type.is_some()),
            ("backing_files", self.backing_files),
            ("serial", self.serial.is_some()),
            ("iommu", self.iommu),
            ("sparse", self.sparse != default.sparse),
            (
                "lock_granularity",
                self.lock_granularity != default.lock_granularity,
            ),
            ("queue_affinity", self.queue_affinity.is_some()),
            ("limits", self.rate_limiter_config.is_some()),
            ("rate_limit_group", self.rate_limit_group.is_some()),
        ];
        match others.iter().find(|(_, asked)| *asked) {
            Some((key, _)) => Err(ConfigError::value(
                OPTION,
                format!("{key} and vhost_user=on exclude each other; the back end has the disk"),
            )),
            None => Ok(()),
        }
    }

    /// CPUs of each queue; none where it may run anywhere.
    pub fn cpus_of_queues(&self) -> Vec<Vec<usize>> {
        let mut cpus = vec![Vec::new(); usize::from(self.num_queues)];
        for affinity in self.queue_affinity.iter().flatten() {
            if let Some(place) = cpus.get_mut(usize::from(affinity.queue_index)) {
                place.clone_from(&affinity.host_cpus);
            }
        }
        cpus
    }
}

/// Reads `0@[1,2,4-7]`.
fn affinity(text: &str) -> Result<QueueAffinity, ConfigError> {
    let read = || {
        let (queue, cpus) = text.split_once('@')?;
        let cpus = match cpus.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']')?,
            None => cpus,
        };
        let mut host_cpus = Vec::new();
        for part in cpus.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.parse::<usize>().ok()?, last.parse().ok()?);
            if first > last || last >= MAX_CPUS {
                return None;
            }
            host_cpus.extend(first..=last);
        }
        Some(QueueAffinity {
            queue_index: queue.parse().ok()?,
            host_cpus,
        })
    };
    read().ok_or_else(|| {
        let what = format!(
            "queue_affinity={text} is wrong; a queue and CPUs below {MAX_CPUS} such as [0@[1,2],1@[4-7]] are allowed"
        );
        ConfigError::value(OPTION, what)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<DiskConfig, String> {
        let config = DiskConfig::parse(text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        Ok(config)
    }

    #[test]
    fn defaults_and_keys() {
        let disk = checked("path=/a").unwrap();
        let expected = DiskConfig {
            path: "/a".into(),
            ..DiskConfig::default()
        };
        assert_eq!(disk, expected);
        let disk = checked("path=/a,readonly=on,direct=true,num_queues=4,queue_size=256,image_type=raw,serial=s1,id=d,iommu=off,vhost_user=false")
            .unwrap();
        assert!(disk.readonly && disk.direct);
        assert_eq!((disk.num_queues, disk.queue_size), (4, 256));
        assert_eq!(disk.image_type, Some(ImageType::Raw));
        assert_eq!(disk.lock_granularity, LockGranularity::ByteRange);
        let disk = checked("path=/a,lock_granularity=full").unwrap();
        assert_eq!(disk.lock_granularity, LockGranularity::Full);
    }

    #[test]
    fn limits_and_cpus_are_read() {
        let text = "path=/a,num_queues=3,sparse=off,queue_affinity=[0@[1,2],2@[4-6,9]],bw_size=1M,bw_refill_time=100";
        let disk = checked(text).unwrap();
        assert!(!disk.sparse);
        assert_eq!(
            disk.cpus_of_queues(),
            [vec![1, 2], vec![], vec![4, 5, 6, 9]]
        );
        let limits = disk.rate_limiter_config.unwrap();
        assert_eq!(limits.bandwidth.unwrap().size, 1 << 20);
        assert_eq!(
            checked("path=/a").unwrap().cpus_of_queues(),
            [Vec::<usize>::new()]
        );
        let disk = checked("path=/a,rate_limit_group=g").unwrap();
        assert_eq!(disk.rate_limit_group.unwrap(), "g");
    }

    #[test]
    fn another_process_can_serve_it() {
        let disk = checked("vhost_user=on,socket=/s,num_queues=2,queue_size=64,readonly=on,id=v,poll_queue=off,direct=off")
            .unwrap();
        assert!(disk.vhost_user && disk.readonly);
        assert_eq!(disk.vhost_socket, Some("/s".into()));
        assert!(disk.path.as_os_str().is_empty());
        for (text, what) in [
            ("vhost_user=on,socket=/s,path=/a", "path and socket exclude"),
            ("socket=/s,path=/a", "path and socket exclude"),
            ("socket=/s", "socket needs vhost_user=on"),
            ("vhost_user=on", "socket is missing"),
            (
                "vhost_user=on,socket=/s,iommu=on",
                "iommu and vhost_user=on",
            ),
            ("vhost_user=on,socket=/s,direct=on", "direct and vhost_user"),
            ("vhost_user=on,socket=/s,serial=a", "serial and vhost_user"),
            (
                "vhost_user=on,socket=/s,sparse=off",
                "sparse and vhost_user",
            ),
            ("vhost_user=on,socket=/s,image_type=raw", "image_type and"),
            ("vhost_user=on,socket=/s,num_queues=0", "num_queues=0"),
            ("vhost_user=on,socket=/s,queue_size=5", "queue_size=5"),
            ("vhost_user=maybe,socket=/s", "vhost_user=maybe"),
        ] {
            let error = checked(text).unwrap_err();
            assert!(
                error.starts_with("--disk: ") && error.contains(what),
                "{error}"
            );
        }
    }

    #[test]
    fn mistakes_say_what_would_do() {
        for wrong in [
            "",
            "readonly=on",
            "path=/a,num_queues=0",
            "path=/a,queue_size=100",
            "path=/a,queue_size=2",
            "path=/a,image_type=vmdk",
            "path=/a,serial=123456789012345678901",
            "path=/a,iommu=2",
            "path=/a,socket=/s",
            "path=/a,colour=red",
            "path=/a,sparse=maybe",
            "path=/a,lock_granularity=file",
            "path=/a,bw_size=1M",
            "path=/a,ops_size=0,ops_refill_time=10",
            "path=/a,rate_limit_group=g,ops_size=1,ops_refill_time=10",
            "path=/a,queue_affinity=[0]",
            "path=/a,queue_affinity=[0@[]]",
            "path=/a,queue_affinity=[0@[2-1]]",
            "path=/a,queue_affinity=[0@[1024]]",
            "path=/a,queue_affinity=[1@[0]]",
            "path=/a,queue_affinity=[0@[0],0@[1]]",
        ] {
            let error = checked(wrong).unwrap_err();
            assert!(error.starts_with("--disk: "), "{error}");
        }
    }
}
