//! Domains, and which endpoint belongs to which: what requests do (virtio 1.2 §5.13.6).

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::endpoint::{Endpoint, Faults, Table};
use super::mappings::{Mapping, Mappings};
use super::request::Status;
use super::state::{DomainV1, IommuV1, MappingV1};

/// Bytes of a page: mappings begin and end at multiples of it.
pub const PAGE: u64 = 4096;
/// Addresses that a device may be given.
pub const INPUT: RangeInclusive<u64> = 0..=(1 << 48) - 1;
/// Numbers of domains.
pub const DOMAINS: RangeInclusive<u32> = 0..=0xffff;
/// Where devices write their message-signalled interrupts: never translated, never mapped.
pub const MSI: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// Most mappings of all domains together.
pub const MAX_MAPPINGS: usize = 1 << 16;

/// What a domain translates.
#[derive(Debug)]
enum Domain {
    /// Nothing: its endpoints see physical memory.
    Bypass,
    Mapped(Mappings),
}

impl Domain {
    fn table(&self) -> Table {
        match self {
            Self::Bypass => Table::Physical,
            Self::Mapped(mappings) => Table::Mapped(mappings.clone()),
        }
    }
}

/// An endpoint and its domain.
#[derive(Debug)]
struct Seat {
    endpoint: Arc<Endpoint>,
    domain: Option<u32>,
}

/// Everything that the driver told the IOMMU.
#[derive(Debug)]
pub struct Domains {
    /// Endpoints without a domain see physical memory.
    bypass: bool,
    endpoints: BTreeMap<u32, Seat>,
    /// Each has an endpoint at least.
    domains: BTreeMap<u32, Domain>,
}

impl Default for Domains {
    /// No endpoints. A guest without a driver for the IOMMU can use devices behind it: firmware, for one.
    fn default() -> Self {
        Self {
            bypass: true,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
        }
    }
}

impl Domains {
    /// The endpoint `id`, which is made if it is not there.
    pub fn endpoint(&mut self, id: u32, faults: &Arc<Faults>) -> Arc<Endpoint> {
        let table = self.unattached();
        let seat = self.endpoints.entry(id).or_insert_with(|| Seat {
            endpoint: Arc::new(Endpoint::new(id, table, faults.clone())),
            domain: None,
        });
        seat.endpoint.clone()
    }

    /// The device `id` is gone.
    pub fn remove_endpoint(&mut self, id: u32) {
        if let Some(seat) = self.endpoints.remove(&id) {
            seat.endpoint.set(Table::Nothing);
            self.leave(seat.domain);
        }
    }

    /// Whether endpoints without a domain see physical memory.
    pub fn bypass(&self) -> bool {
        self.bypass
    }

    /// Changes that.
    pub fn set_bypass(&mut self, bypass: bool) {
        self.bypass = bypass;
        let table = self.unattached();
        let seats = self.endpoints.values();
        for seat in seats.filter(|seat| seat.domain.is_none()) {
            seat.endpoint.set(table.clone());
        }
    }

    fn unattached(&self) -> Table {
        if self.bypass {
            Table::Physical
        } else {
            Table::Nothing
        }
    }

    /// Forgets all domains. The bypass stays as it is, until the machine is reset.
    pub fn reset(&mut self) {
        self.domains.clear();
        for seat in self.endpoints.values_mut() {
            seat.domain = None;
        }
        self.set_bypass(self.bypass);
    }

    /// Is there an endpoint `id`?
    pub fn has_endpoint(&self, id: u32) -> bool {
        self.endpoints.contains_key(&id)
    }

    /// ATTACH (§5.13.6.3): `endpoint` leaves its domain and belongs to `domain`, which is made if it is not there.
    pub fn attach(&mut self, domain: u32, endpoint: u32, bypass: bool) -> Status {
        if !DOMAINS.contains(&domain) {
            return Status::Range;
        }
        let Some(seat) = self.endpoints.get_mut(&endpoint) else {
            return Status::NoEntry;
        };
        let is_other = match self.domains.get(&domain) {
            Some(Domain::Bypass) => !bypass,
            Some(Domain::Mapped(_)) => bypass,
            None => false,
        };
        if is_other {
            return Status::Invalid;
        }
        if seat.domain == Some(domain) {
            return Status::Ok;
        }
        let before = seat.domain.replace(domain);
        let joined = self.domains.entry(domain).or_insert_with(|| match bypass {
            true => Domain::Bypass,
            false => Domain::Mapped(Mappings::default()),
        });
        seat.endpoint.set(joined.table());
        self.leave(before);
        Status::Ok
    }

    /// DETACH (§5.13.6.4).
    pub fn detach(&mut self, domain: u32, endpoint: u32) -> Status {
        let table = self.unattached();
        let Some(seat) = self.endpoints.get_mut(&endpoint) else {
            return Status::NoEntry;
        };
        if seat.domain != Some(domain) {
            return Status::Invalid;
        }
        seat.domain = None;
        seat.endpoint.set(table);
        self.leave(Some(domain));
        Status::Ok
    }

    /// A domain without endpoints is no more, nor are its mappings.
    fn leave(&mut self, domain: Option<u32>) {
        if let Some(domain) = domain
            && self
                .endpoints
                .values()
                .all(|seat| seat.domain != Some(domain))
        {
            self.domains.remove(&domain);
        }
    }

    fn mapped(&self) -> usize {
        let len = |domain: &Domain| match domain {
            Domain::Bypass => 0,
            Domain::Mapped(mappings) => mappings.len(),
        };
        self.domains.values().map(len).sum()
    }

    /// MAP (§5.13.6.5).
    pub fn map(&mut self, domain: u32, mapping: Mapping) -> Status {
        let full = self.mapped() >= MAX_MAPPINGS;
        let mappings = match self.domains.get_mut(&domain) {
            None => return Status::NoEntry,
            Some(Domain::Bypass) => return Status::Invalid,
            Some(Domain::Mapped(mappings)) => mappings,
        };
        let Mapping {
            first,
            last,
            physical,
            ..
        } = mapping;
        if first > last {
            return Status::Invalid;
        }
        let aligned = |address: u64| address.is_multiple_of(PAGE);
        let fits = aligned(first)
            && aligned(physical)
            && aligned(last.wrapping_add(1))
            && INPUT.contains(&last)
            && physical.checked_add(last - first).is_some();
        if !fits {
            return Status::Range;
        }
        if first <= *MSI.end() && last >= *MSI.start() {
            return Status::Invalid;
        }
        if full {
            return Status::NoMemory;
        }
        if !mappings.insert(mapping) {
            return Status::Invalid;
        }
        self.publish(domain);
        Status::Ok
    }

    /// UNMAP (§5.13.6.6).
    pub fn unmap(&mut self, domain: u32, first: u64, last: u64) -> Status {
        let mappings = match self.domains.get_mut(&domain) {
            None => return Status::NoEntry,
            Some(Domain::Bypass) => return Status::Invalid,
            Some(Domain::Mapped(mappings)) => mappings,
        };
        if first > last {
            return Status::Invalid;
        }
        match mappings.remove(first, last) {
            Err(_) => Status::Range,
            Ok(0) => Status::Ok,
            Ok(_) => {
                self.publish(domain);
                Status::Ok
            }
        }
    }

    /// Shows a domain's mappings to its endpoints.
    fn publish(&self, domain: u32) {
        let Some(changed) = self.domains.get(&domain) else {
            return;
        };
        let seats = self.endpoints.values();
        for seat in seats.filter(|seat| seat.domain == Some(domain)) {
            seat.endpoint.set(changed.table());
        }
    }

    /// What to save.
    pub fn save(&self) -> IommuV1 {
        let domains = self.domains.iter().map(|(id, domain)| DomainV1 {
            id: *id,
            mappings: match domain {
                Domain::Bypass => None,
                Domain::Mapped(mappings) => Some(mappings.iter().map(MappingV1::from).collect()),
            },
        });
        let attached = self.endpoints.iter();
        IommuV1 {
            bypass: self.bypass,
            domains: domains.collect(),
            attached: attached
                .filter_map(|(id, seat)| Some((*id, seat.domain?)))
                .collect(),
        }
    }

    /// Becomes what was saved.
    ///
    /// # Errors
    /// What requests could not have led to: nothing is attached then.
    pub fn restore(&mut self, state: &IommuV1) -> Result<(), &'static str> {
        self.reset();
        self.set_bypass(state.bypass);
        let restored = self.replay(state);
        if restored.is_err() {
            self.reset();
        }
        restored
    }

    /// Does what a driver did to come there.
    fn replay(&mut self, state: &IommuV1) -> Result<(), &'static str> {
        for (endpoint, domain) in &state.attached {
            let saved = state.domains.iter().find(|saved| saved.id == *domain);
            let bypass = saved
                .ok_or("an endpoint in a domain that is not there")?
                .mappings
                .is_none();
            if self.attach(*domain, *endpoint, bypass) != Status::Ok {
                return Err("an endpoint that is not there, or is in two domains");
            }
        }
        if self.domains.len() != state.domains.len() {
            return Err("a domain without endpoints");
        }
        for domain in &state.domains {
            for mapping in domain.mappings.iter().flatten() {
                if self.map(domain.id, mapping.into()) != Status::Ok {
                    return Err("a mapping that cannot be");
                }
            }
        }
        Ok(())
    }
}
