//! Guest memory as a device sees it: all of it, or what the IOMMU lets it see. Devices know no difference.
//!
//! A device takes a [`View`] of a [`EndpointMemory`] for a while, a request or some. What the driver unmaps meanwhile stays reachable through that view: a
//! driver unmaps only what no request uses any more, and one that does not keep to this only harms itself.
//!
//! `vm_memory::IommuMemory` is not used: it takes a lock a lookup, and notes written pages by the device's addresses instead of physical ones.

use std::iter::FusedIterator;
use std::ops::Deref;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemoryBackendSliceIterator, GuestMemorySliceIterator};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, GuestMemoryResult, Permissions, VolatileSlice,
};

use super::endpoint::{Endpoint, Reason, Table};
use super::mappings::{Mappings, Unmapped};

/// Guest memory for one device: physical, or through the IOMMU.
#[derive(Clone, Debug)]
pub struct EndpointMemory<S> {
    physical: S,
    endpoint: Option<Arc<Endpoint>>,
}

impl<S> EndpointMemory<S> {
    /// All of guest memory.
    pub fn physical(physical: S) -> Self {
        Self {
            physical,
            endpoint: None,
        }
    }

    /// What the IOMMU shows to `endpoint`.
    pub fn translated(physical: S, endpoint: Arc<Endpoint>) -> Self {
        Self {
            physical,
            endpoint: Some(endpoint),
        }
    }
}

impl<S: GuestAddressSpace<M: GuestMemoryBackend>> GuestAddressSpace for EndpointMemory<S> {
    type M = View<S>;
    type T = Held<S>;

    fn memory(&self) -> Held<S> {
        let translation = self.endpoint.as_ref().and_then(|endpoint| {
            let table = endpoint.table();
            // Then it is as if there were none.
            let translates = !matches!(*table, Table::Physical);
            translates.then(|| (endpoint.clone(), table))
        });
        Held(View {
            physical: self.physical.memory(),
            translation,
        })
    }
}

/// A [`View`] that is held.
pub struct Held<S: GuestAddressSpace>(View<S>);

impl<S: GuestAddressSpace> Clone for Held<S> {
    fn clone(&self) -> Self {
        Self(View {
            physical: self.0.physical.clone(),
            translation: self.0.translation.clone(),
        })
    }
}

impl<S: GuestAddressSpace> Deref for Held<S> {
    type Target = View<S>;

    fn deref(&self) -> &View<S> {
        &self.0
    }
}

/// What a device sees of memory at a time.
pub struct View<S: GuestAddressSpace> {
    physical: S::T,
    translation: Option<(Arc<Endpoint>, Arc<Table>)>,
}

impl<S: GuestAddressSpace<M: GuestMemoryBackend>> View<S> {
    /// The mappings for an access to `count` bytes at `address`, all of which are there.
    fn mappings<'a>(
        &'a self,
        (endpoint, table): &'a (Arc<Endpoint>, Arc<Table>),
        address: GuestAddress,
        count: usize,
        access: Permissions,
        each: impl FnMut(super::mappings::Piece) -> bool,
    ) -> Option<(&'a Mappings, bool)> {
        let Table::Mapped(mappings) = &**table else {
            endpoint.fault(Reason::Domain, address.0, access);
            return None;
        };
        match mappings.check(address.0, count as u64, access, each) {
            Ok(all) => Some((mappings, all)),
            Err(Unmapped(address)) => {
                endpoint.fault(Reason::Mapping, address, access);
                None
            }
        }
    }
}

type Bitmap<M> = <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B;

impl<S: GuestAddressSpace<M: GuestMemoryBackend>> GuestMemory for View<S> {
    type PhysicalMemory = S::M;
    type Bitmap = Bitmap<S::M>;

    #[inline]
    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        let physical = &*self.physical;
        let is_memory = |address, count| {
            GuestMemoryBackend::check_range(physical, GuestAddress(address), count)
        };
        let Some(translation) = &self.translation else {
            return is_memory(address.0, count);
        };
        let checked = self.mappings(translation, address, count, access, |piece| {
            usize::try_from(piece.len).is_ok_and(|len| is_memory(piece.physical, len))
        });
        checked.is_some_and(|(_, all)| all)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let physical = &*self.physical;
        let Some(translation) = &self.translation else {
            return Ok(Slices {
                physical,
                now: GuestMemoryBackend::get_slices(physical, address, count),
                later: None,
            });
        };
        let (mappings, _) = self
            .mappings(translation, address, count, access, |_| true)
            .ok_or(GuestMemoryError::InvalidGuestAddress(address))?;
        Ok(Slices {
            physical,
            now: GuestMemoryBackend::get_slices(physical, GuestAddress(0), 0),
            later: Some(Later {
                mappings,
                address: address.0,
                left: count as u64,
                access,
            }),
        })
    }

    fn physical_memory(&self) -> Option<&S::M> {
        self.translation.is_none().then_some(&*self.physical)
    }
}

/// What of a range is not translated yet.
struct Later<'a> {
    mappings: &'a Mappings,
    address: u64,
    left: u64,
    access: Permissions,
}

/// The slices of a range, mapping by mapping.
struct Slices<'a, M: GuestMemoryBackend> {
    physical: &'a M,
    now: GuestMemoryBackendSliceIterator<'a, M>,
    later: Option<Later<'a>>,
}

impl<'a, M: GuestMemoryBackend> Iterator for Slices<'a, M> {
    type Item = GuestMemoryResult<VolatileSlice<'a, BS<'a, Bitmap<M>>>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.now.next() {
                None => {}
                Some(Ok(slice)) => return Some(Ok(slice)),
                Some(Err(error)) => {
                    // Nothing comes after an error.
                    self.later = None;
                    return Some(Err(error));
                }
            }
            let later = self.later.as_mut()?;
            if later.left == 0 {
                return None;
            }
            // All of it is there, as `get_slices` has seen.
            let piece = later
                .mappings
                .translate(later.address, later.left, later.access)
                .ok()?;
            later.left -= piece.len;
            later.address = later.address.wrapping_add(piece.len);
            let len = usize::try_from(piece.len).ok()?;
            let address = GuestAddress(piece.physical);
            self.now = GuestMemoryBackend::get_slices(self.physical, address, len);
        }
    }
}

impl<M: GuestMemoryBackend> FusedIterator for Slices<'_, M> {}

impl<'a, M: GuestMemoryBackend> GuestMemorySliceIterator<'a, BS<'a, Bitmap<M>>> for Slices<'a, M> {}
