//! A fake kernel with teeth: it models what iommufd and VT-d's driver have on record *and* what
//! the hardware would do, with the traps of Linux 7.2 (`linux.md`, A3 to A6, A8, A9), fails any call
//! on demand, and tells whether the back end's record is true.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use iommufd_bindings as sys;

use super::AttachDevice;
use super::hwinfo::{HwInfo, HwModel, VtdHardware};
use super::kernel::{HwptKind, Kernel, Partial};
use crate::Pasid;
use crate::backend::Access;

/// What one object of the fake is.
#[derive(Debug)]
pub(super) enum Object {
    Ioas(BTreeMap<u64, FakeArea>),
    Paging {
        ioas: u32,
        nest_parent: bool,
        pasid: bool,
        dirty: bool,
        iommu: usize,
    },
    Nested {
        parent: u32,
        table: sys::iommu_hwpt_vtd_s1,
        pasid: bool,
        queue: Option<u32>,
    },
    Queue(UnixStream),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FakeArea {
    pub last: u64,
    /// Guest-physical address of the first byte: areas of the RAM IOAS map to themselves.
    pub gpa: u64,
    pub access: Access,
}

/// A host IOMMU.
#[derive(Clone, Debug)]
pub(super) struct FakeIommu {
    pub unit: VtdHardware,
    /// Domain ids left.
    pub domains: usize,
    /// Tables made for another kind do not fit.
    pub kind: u32,
}

#[derive(Clone, Debug)]
pub(super) struct FakeDevice {
    pub iommu: usize,
    pub pasid_bits: u8,
    pub reserved: Vec<(u64, u64)>,
    pub pri: bool,
    pub group: Option<u32>,
    /// How many attaches still find it in reset.
    pub in_reset: usize,
    /// What iommufd has on record.
    pub record: BTreeMap<Option<Pasid>, u32>,
    /// What the hardware walks; absent: blocked.
    pub hardware: BTreeMap<Option<Pasid>, u32>,
    /// Its DMA was stopped.
    pub stopped: bool,
    /// References to page-request handling that will never be dropped (`linux.md`, A4).
    pub leaked: usize,
}

#[derive(Debug, Default)]
pub(super) struct World {
    next: u32,
    pub objects: BTreeMap<u32, Object>,
    pub iommus: Vec<FakeIommu>,
    pub devices: BTreeMap<u32, FakeDevice>,
    pub calls: BTreeMap<&'static str, usize>,
    /// Calls so far, for `fail_at`.
    pub count: usize,
    /// Which call (from 0) fails with which error.
    pub fail_at: Option<(usize, i32)>,
    /// Every call of this name fails.
    pub fail_all: Option<(&'static str, i32)>,
    /// How many entries the next invalidation takes.
    pub take: Option<usize>,
    /// What was invalidated, per table.
    pub invalidated: Vec<(u32, Vec<sys::iommu_hwpt_vtd_s1_invalidate>)>,
    /// Page request groups not answered: cookie, device, PASID.
    pub groups: BTreeMap<u32, (u32, Option<Pasid>)>,
    /// Cookies that were answered by the fake itself, as the kernel does on detach.
    pub auto_answered: BTreeSet<u32>,
}

/// The fake kernel.
#[derive(Debug, Default)]
pub(super) struct Fake(Mutex<World>);

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl World {
    /// Counts a call, and fails it if it is its turn.
    fn call(&mut self, name: &'static str) -> io::Result<()> {
        *self.calls.entry(name).or_default() += 1;
        let now = self.count;
        self.count += 1;
        match (self.fail_at, self.fail_all) {
            (Some((at, number)), _) if at == now => Err(error(number)),
            (_, Some((which, number))) if which == name => Err(error(number)),
            _ => Ok(()),
        }
    }

    fn insert(&mut self, object: Object) -> u32 {
        self.next += 1;
        self.objects.insert(self.next, object);
        self.next
    }

    fn areas(&mut self, ioas: u32) -> io::Result<&mut BTreeMap<u64, FakeArea>> {
        match self.objects.get_mut(&ioas) {
            Some(Object::Ioas(areas)) => Ok(areas),
            _ => Err(error(libc::ENOENT)),
        }
    }

    /// The IOAS under a hardware table.
    pub(super) fn ioas_of(&self, hwpt: u32) -> Option<u32> {
        match self.objects.get(&hwpt)? {
            Object::Paging { ioas, .. } => Some(*ioas),
            Object::Nested { parent, .. } => self.ioas_of(*parent),
            _ => None,
        }
    }

    fn iommu_of(&self, hwpt: u32) -> Option<usize> {
        match self.objects.get(&hwpt)? {
            Object::Paging { iommu, .. } => Some(*iommu),
            Object::Nested { parent, .. } => self.iommu_of(*parent),
            _ => None,
        }
    }

    /// Reserved regions in force for an IOAS: of devices whose requests without PASID are attached.
    fn reserved(&self, ioas: u32) -> Vec<(u64, u64)> {
        let mut reserved = Vec::new();
        for device in self.devices.values() {
            let attached = device
                .record
                .get(&None)
                .and_then(|&hwpt| self.ioas_of(hwpt));
            if attached == Some(ioas) {
                let unit = &self.iommus[device.iommu].unit;
                reserved.extend(&device.reserved);
                reserved.push((1 << unit.mgaw(), u64::MAX));
            }
        }
        reserved
    }

    fn add_area(&mut self, ioas: u32, iova: u64, area: FakeArea) -> io::Result<()> {
        if (iova | (area.last + 1)) & 0xfff != 0 || area.last < iova {
            return Err(error(libc::EINVAL));
        }
        let hits = |&(first, last): &(u64, u64)| first <= area.last && last >= iova;
        if self.reserved(ioas).iter().any(hits) {
            return Err(error(libc::EINVAL));
        }
        let on_nest_parent = self.objects.values().any(
            |object| matches!(object, Object::Paging { ioas: on, nest_parent: true, .. } if *on == ioas),
        );
        if on_nest_parent && !area.access.write {
            // Erratum 772415.
            return Err(error(libc::EINVAL));
        }
        let areas = self.areas(ioas)?;
        let before = areas.range(..=area.last).next_back();
        if before.is_some_and(|(_, other)| other.last >= iova) {
            return Err(error(libc::EEXIST));
        }
        areas.insert(iova, area);
        Ok(())
    }

    fn used(&self, id: u32) -> bool {
        let by_object = self.objects.values().any(|object| match object {
            Object::Paging { ioas, .. } => *ioas == id,
            Object::Nested { parent, queue, .. } => *parent == id || *queue == Some(id),
            _ => false,
        });
        let by_device = self
            .devices
            .values()
            .any(|device| device.record.values().any(|&hwpt| hwpt == id));
        by_object || by_device
    }

    /// Takes away the page requests of a target, as the kernel does with those of an old table.
    fn auto_answer(&mut self, id: u32, pasid: Option<Pasid>) {
        let gone = self
            .groups
            .iter()
            .filter(|(_, of)| **of == (id, pasid))
            .map(|(&cookie, _)| cookie)
            .collect::<Vec<_>>();
        for cookie in gone {
            self.groups.remove(&cookie);
            self.auto_answered.insert(cookie);
        }
    }

    /// The driver's part of an attach, after the old table was removed from the hardware.
    fn late_checks(&mut self, id: u32, hwpt: u32) -> io::Result<()> {
        let iommu = self.devices[&id].iommu;
        let made_for = self.iommu_of(hwpt).ok_or(error(libc::ENOENT))?;
        let unit = self.iommus[iommu].unit;
        if self.iommus[made_for].kind != self.iommus[iommu].kind {
            return Err(error(libc::EINVAL));
        }
        if let Some(Object::Nested { table, queue, .. }) = self.objects.get(&hwpt) {
            let flag = |bit: u32| table.flags & u64::from(bit) != 0;
            let fits = match table.addr_width {
                48 => true,
                57 => unit.fl5lp(),
                _ => false,
            };
            if !fits
                || flag(sys::iommu_hwpt_vtd_s1_flags_IOMMU_VTD_S1_SRE)
                    && !unit.supervisor_requests()
                || flag(sys::iommu_hwpt_vtd_s1_flags_IOMMU_VTD_S1_EAFE) && !unit.extended_accessed()
            {
                return Err(error(libc::EINVAL));
            }
            // What the kernel does not check and the hardware would take for flags.
            assert_eq!(
                table.pgtbl_addr & 0xfff,
                0,
                "root bits land in the PASID entry"
            );
            if queue.is_some() && !self.devices[&id].pri {
                return Err(error(libc::ENODEV));
            }
        }
        let in_use = self
            .devices
            .values()
            .filter(|device| device.iommu == iommu)
            .flat_map(|device| device.hardware.values())
            .collect::<BTreeSet<_>>();
        if !in_use.contains(&hwpt) && in_use.len() >= self.iommus[iommu].domains {
            return Err(error(libc::ENOSPC));
        }
        Ok(())
    }

    fn attach(&mut self, id: u32, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        // VFIO would take it for requests without PASID.
        assert_ne!(pasid, Some(Pasid(0)), "PASID 0 passed to VFIO");
        let injected = self.call("attach");
        let (is_pasid, queue) = match self.objects.get(&hwpt) {
            Some(Object::Paging { pasid, .. }) => (*pasid, None),
            Some(Object::Nested { pasid, queue, .. }) => (*pasid, *queue),
            _ => return Err(error(libc::ENOENT)),
        };
        let device = self.devices.get_mut(&id).ok_or(error(libc::ENOENT))?;
        if device.in_reset > 0 {
            device.in_reset -= 1;
            return Err(error(libc::EBUSY));
        }
        let rid_pasid = device
            .record
            .get(&None)
            .map(|rid| match self.objects.get(rid) {
                Some(Object::Paging { pasid, .. } | Object::Nested { pasid, .. }) => *pasid,
                _ => false,
            });
        let device = &self.devices[&id];
        if pasid.is_some() && (!is_pasid || rid_pasid == Some(false))
            || pasid.is_none() && !is_pasid && device.record.keys().any(Option::is_some)
        {
            return Err(error(libc::EINVAL));
        }
        if let Some(Pasid(number)) = pasid {
            if device.pasid_bits == 0 {
                // Silent success, and nothing was done.
                let device = self.devices.get_mut(&id).ok_or(error(libc::ENOENT))?;
                device.record.insert(pasid, hwpt);
                return Ok(());
            }
            if number >> device.pasid_bits != 0 {
                return Err(error(libc::EINVAL));
            }
        }
        if pasid.is_none() {
            let ioas = self.ioas_of(hwpt).ok_or(error(libc::ENOENT))?;
            let reserved = device.reserved.clone();
            let mgaw = self.iommus[device.iommu].unit.mgaw();
            let areas = self.areas(ioas)?;
            let hit = areas.iter().any(|(&iova, area)| {
                area.last >> mgaw != 0
                    || reserved
                        .iter()
                        .any(|&(first, last)| first <= area.last && last >= iova)
            });
            if hit {
                return Err(error(libc::EADDRINUSE));
            }
        }
        let device = self.devices.get_mut(&id).ok_or(error(libc::ENOENT))?;
        let old = device.record.get(&pasid).copied();
        if old == Some(hwpt) {
            // iommufd believes its record: nothing is done, even if the hardware has nothing.
            return Ok(());
        }
        // Not transactional: first the old one goes.
        device.hardware.remove(&pasid);
        injected?;
        self.late_checks(id, hwpt)?;
        let old_queue = old.and_then(|old| match self.objects.get(&old) {
            Some(Object::Nested { queue, .. }) => *queue,
            _ => None,
        });
        let device = self.devices.get_mut(&id).ok_or(error(libc::ENOENT))?;
        if pasid.is_none() && queue.is_some() && old_queue.is_some() {
            device.leaked += 1;
        }
        device.record.insert(pasid, hwpt);
        device.hardware.insert(pasid, hwpt);
        if old.is_some() {
            self.auto_answer(id, pasid);
        }
        Ok(())
    }

    fn detach(&mut self, id: u32, pasid: Option<Pasid>) -> io::Result<()> {
        self.call("detach")?;
        let device = self.devices.get_mut(&id).ok_or(error(libc::ENOENT))?;
        device.record.remove(&pasid);
        device.hardware.remove(&pasid);
        self.auto_answer(id, pasid);
        Ok(())
    }
}

impl Fake {
    pub(super) fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often `name` was called since the last [`reset_calls`](Self::reset_calls).
    pub(super) fn calls(&self) -> BTreeMap<&'static str, usize> {
        self.world().calls.clone()
    }

    pub(super) fn reset_calls(&self) {
        self.world().calls.clear();
    }

    /// A page request as a device makes it; returns its cookie.
    pub(super) fn page_request(
        &self,
        device: u32,
        pasid: Option<Pasid>,
        group: u32,
        addr: u64,
    ) -> u32 {
        let mut world = self.world();
        let cookie = (0..)
            .find(|cookie| !world.groups.contains_key(cookie))
            .unwrap();
        world.groups.insert(cookie, (device, pasid));
        let mut bytes = Vec::new();
        // Bit 2 leaks from the kernel.
        let flags = 2 | 4 | u32::from(pasid.is_some());
        for word in [flags, device, pasid.map_or(0, |p| p.0), group, 3, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(addr.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(cookie.to_ne_bytes());
        for object in world.objects.values_mut() {
            if let Object::Queue(stream) = object {
                stream.write_all(&bytes).unwrap();
                return cookie;
            }
        }
        panic!("no fault queue");
    }

    /// The same, once there are `count` of them.
    ///
    /// # Panics
    /// There are not, for 200 seconds.
    pub(super) fn wait_for_responses(&self, count: usize) -> Vec<(u32, u32)> {
        let end = Instant::now() + Duration::from_secs(200);
        let mut all = self.responses();
        while all.len() < count {
            assert!(Instant::now() < end, "{all:?} are not {count} responses");
            std::thread::sleep(Duration::from_millis(1));
            all.extend(self.responses());
        }
        all
    }

    /// The responses written so far: (cookie, code). A response to a group that the kernel has
    /// answered itself, or to none at all, is refused by the kernel and not returned.
    pub(super) fn responses(&self) -> Vec<(u32, u32)> {
        let mut world = self.world();
        let mut all = Vec::new();
        for object in world.objects.values_mut() {
            if let Object::Queue(stream) = object {
                let mut bytes = [0; 8];
                while let Ok(8) = stream.read(&mut bytes) {
                    let word =
                        |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
                    all.push((word(0), word(4)));
                }
            }
        }
        all.retain(|(cookie, _)| world.groups.remove(cookie).is_some());
        all
    }
}

impl Kernel for Fake {
    fn destroy(&self, id: u32) -> io::Result<()> {
        let mut world = self.world();
        *world.calls.entry("destroy").or_default() += 1;
        if world.used(id) {
            return Err(error(libc::EBUSY));
        }
        if let Some(Object::Queue(stream)) = world.objects.get_mut(&id) {
            // The descriptor must have been closed: reading finds the end.
            let open = loop {
                match stream.read(&mut [0; 64]) {
                    Ok(0) => break false,
                    Ok(_) => {}
                    Err(_) => break true,
                }
            };
            if open {
                return Err(error(libc::EBUSY));
            }
        }
        world
            .objects
            .remove(&id)
            .map(drop)
            .ok_or(error(libc::ENOENT))
    }

    fn ioas_alloc(&self) -> io::Result<u32> {
        let mut world = self.world();
        world.call("ioas_alloc")?;
        Ok(world.insert(Object::Ioas(BTreeMap::new())))
    }

    fn allow_iovas(&self, ioas: u32, _ranges: &[(u64, u64)]) -> io::Result<()> {
        let mut world = self.world();
        world.call("allow_iovas")?;
        world.areas(ioas).map(drop)
    }

    fn iova_ranges(&self, ioas: u32) -> io::Result<Vec<(u64, u64)>> {
        let mut world = self.world();
        world.call("iova_ranges")?;
        let mut reserved = world.reserved(ioas);
        reserved.sort_unstable();
        let mut usable = Vec::new();
        let mut next = 0u64;
        for (first, last) in reserved {
            if first > next {
                usable.push((next, first - 1));
            }
            next = next.max(last.saturating_add(1));
        }
        if next != u64::MAX {
            usable.push((next, u64::MAX));
        }
        Ok(usable)
    }

    fn map_file(
        &self,
        ioas: u32,
        _file: BorrowedFd<'_>,
        _offset: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()> {
        let mut world = self.world();
        world.call("map_file")?;
        let area = FakeArea {
            last: iova + (length - 1),
            gpa: iova,
            access,
        };
        world.add_area(ioas, iova, area)
    }

    fn map(
        &self,
        ioas: u32,
        _address: u64,
        length: u64,
        iova: u64,
        access: Access,
    ) -> io::Result<()> {
        let mut world = self.world();
        world.call("map")?;
        let area = FakeArea {
            last: iova + (length - 1),
            gpa: iova,
            access,
        };
        world.add_area(ioas, iova, area)
    }

    fn copy(
        &self,
        to: u32,
        to_iova: u64,
        from: u32,
        from_iova: u64,
        length: u64,
        access: Access,
    ) -> io::Result<()> {
        let mut world = self.world();
        world.call("copy")?;
        let last = from_iova + (length - 1);
        let mut next = from_iova;
        for (&iova, area) in world.areas(from)?.iter() {
            if iova <= next && area.last >= next {
                next = area.last.saturating_add(1);
            }
        }
        if next <= last {
            return Err(error(libc::ENOENT));
        }
        let area = FakeArea {
            last: to_iova + (length - 1),
            gpa: from_iova,
            access,
        };
        world.add_area(to, to_iova, area)
    }

    fn unmap(&self, ioas: u32, iova: u64, length: u64) -> io::Result<u64> {
        let mut world = self.world();
        world.call("unmap")?;
        let last = iova + (length - 1);
        let areas = world.areas(ioas)?;
        let touching = areas
            .range(..=last)
            .filter(|(_, area)| area.last >= iova)
            .map(|(&first, area)| (first, area.last))
            .collect::<Vec<_>>();
        let cuts = |&(first, end): &(u64, u64)| first < iova || end > last;
        if touching.is_empty() || touching.iter().any(cuts) {
            return Err(error(libc::ENOENT));
        }
        for (first, _) in &touching {
            areas.remove(first);
        }
        Ok(touching.iter().map(|(first, end)| end - first + 1).sum())
    }

    fn hwpt_alloc(&self, device: u32, under: u32, kind: HwptKind<'_>) -> io::Result<u32> {
        let mut world = self.world();
        world.call("hwpt_alloc")?;
        let iommu = world.devices.get(&device).ok_or(error(libc::ENOENT))?.iommu;
        let unit = world.iommus[iommu].unit;
        let object = match kind {
            HwptKind::Paging {
                nest_parent,
                dirty,
                pasid,
            } => {
                let read_only = world.areas(under)?.values().any(|area| !area.access.write);
                if nest_parent && !(unit.scalable_mode() && unit.nest())
                    || dirty && !unit.second_stage_dirty()
                    || pasid && unit.pasid_bits() == 0
                {
                    return Err(error(libc::EOPNOTSUPP));
                }
                if nest_parent && read_only {
                    return Err(error(libc::EINVAL));
                }
                Object::Paging {
                    ioas: under,
                    nest_parent,
                    pasid,
                    dirty,
                    iommu,
                }
            }
            HwptKind::Nested {
                table,
                pasid,
                fault_queue,
            } => {
                match world.objects.get(&under) {
                    Some(Object::Paging {
                        nest_parent: true, ..
                    }) => {}
                    _ => return Err(error(libc::EINVAL)),
                }
                if fault_queue
                    .is_some_and(|id| !matches!(world.objects.get(&id), Some(Object::Queue(_))))
                {
                    return Err(error(libc::ENOENT));
                }
                Object::Nested {
                    parent: under,
                    table: *table,
                    pasid,
                    queue: fault_queue,
                }
            }
        };
        Ok(world.insert(object))
    }

    fn hw_info(&self, device: u32) -> io::Result<HwInfo> {
        let mut world = self.world();
        world.call("hw_info")?;
        let device = world.devices.get(&device).ok_or(error(libc::ENOENT))?;
        let unit = world.iommus[device.iommu].unit;
        let dirty = unit.scalable_mode() && unit.second_stage_dirty();
        Ok(HwInfo {
            model: HwModel::Vtd(unit),
            pasid_bits: device.pasid_bits,
            capabilities: if dirty { HwInfo::DIRTY_TRACKING } else { 0 },
        })
    }

    fn invalidate(
        &self,
        hwpt: u32,
        entries: &[sys::iommu_hwpt_vtd_s1_invalidate],
    ) -> Result<(), Partial> {
        let mut world = self.world();
        let failed = |handled, number| {
            Err(Partial {
                handled,
                source: error(number),
            })
        };
        if let Err(source) = world.call("invalidate") {
            return Err(Partial { handled: 0, source });
        }
        if !matches!(world.objects.get(&hwpt), Some(Object::Nested { .. }))
            || entries.len() > 1 << 19
        {
            return failed(0, libc::EINVAL);
        }
        let take = world.take.take().unwrap_or(entries.len());
        for (handled, entry) in entries.iter().enumerate() {
            if entry.addr & 0xfff != 0 || entry.npages == u64::MAX && entry.addr != 0 {
                return failed(handled, libc::EINVAL);
            }
            if entry.flags & !1 != 0 || entry.__reserved != 0 {
                return failed(handled, libc::EOPNOTSUPP);
            }
            if handled == take {
                world.invalidated.push((hwpt, entries[..take].to_vec()));
                return failed(take, libc::EIO);
            }
        }
        world.invalidated.push((hwpt, entries.to_vec()));
        Ok(())
    }

    fn fault_queue_alloc(&self) -> io::Result<(u32, OwnedFd)> {
        let mut world = self.world();
        world.call("fault_queue_alloc")?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        Ok((world.insert(Object::Queue(ours)), theirs.into()))
    }

    fn pause(&self) {}
}

/// One device of the fake, as VFIO would attach it.
#[derive(Debug)]
pub(super) struct FakeAttach {
    pub fake: Arc<Fake>,
    pub id: u32,
}

impl AttachDevice for FakeAttach {
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        self.fake.world().attach(self.id, pasid, hwpt)
    }

    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()> {
        self.fake.world().detach(self.id, pasid)
    }

    fn stop(&self) {
        if let Some(device) = self.fake.world().devices.get_mut(&self.id) {
            device.stopped = true;
        }
    }

    fn resume(&self) {
        if let Some(device) = self.fake.world().devices.get_mut(&self.id) {
            device.stopped = false;
        }
    }
}
