//! A start, the load and the deeds of a boot, and what is done between two boots.

use std::rc::Rc;

use lunar_api::ApiError;
use lunar_api::target::{LuSize, MemberState, ScrubOrder};
use lunar_engine::raid_group::{Fill, RaidGroup, StartSpec};
use lunar_engine::superblock::{At, decode};
use lunar_engine::traits::SECOND;

use super::disk::{GoOn, SECTOR};
use super::host::Sent;
use super::pages::Pages;
use super::plan::{Between, Boot, Deed};
use super::run::{ANSWER_LIMIT, GROUP, Law, Run, Violation, Way};

/// Starts that are tried at once: each is refused for another reason, or finds more disks.
const TRIES: usize = 6;

/// What follows from a start that was refused.
enum Next {
    /// All disks that were lost are there again.
    WithAll,
    Forced,
    /// The side that was served last.
    Keeping,
    /// It is right that it does not start.
    GiveUp,
}

impl Run {
    /// Starts the group from the disks that are there.
    pub fn start(&mut self) -> Result<Way, Violation> {
        let (mut force, mut keep) = (false, None);
        let mut without = Vec::new();
        for _ in 0..TRIES {
            let mut numbers: Vec<u8> = (0..self.disks.len() as u8)
                .filter(|n| !self.disk(*n).faults.is_gone.get())
                .filter(|n| !self.retired.contains(n) && !without.contains(n))
                .collect();
            for i in (1..numbers.len()).rev() {
                numbers.swap(i, self.random.index(i + 1));
            }
            let spec = StartSpec {
                group: GROUP,
                force,
                witness: self.witness,
                without: Vec::new(),
                keep,
                undelete: false,
            };
            let twin = self.twin.take().filter(|n| numbers.contains(n));
            let mut members: Vec<_> = numbers.iter().map(|n| self.given(*n)).collect();
            if let Some(number) = twin {
                let copy = self.copy_of(number);
                members.push(self.given(copy));
            }
            self.world
                .tell(|| format!("start from {numbers:?}, force {force}"));
            // Only a process died, and a loss now is as one while it ran.
            let has_log = self.memory.has_log();
            self.eye.is_start.set(true);
            let parts = self.parts(members);
            let started = self
                .world
                .block_on(ANSWER_LIMIT, RaidGroup::start(parts, spec));
            self.eye.is_start.set(false);
            let Some(started) = started else {
                if self.world.is_down.get() {
                    self.is_apart = true;
                    return Ok(Way::Down);
                }
                return Err(Violation::new(Law::Ends, "a start does not end"));
            };
            let is_refused = |error: &ApiError| {
                let mut causes = error.causes.iter();
                causes.any(|cause| cause.contains("both say that they are disk"))
            };
            if twin.is_some() {
                match started {
                    Err(error) if is_refused(&error) => continue,
                    other => {
                        let text = format!("a disk and its copy: {:?}", other.err());
                        return Err(Violation::new(Law::Starts, text));
                    }
                }
            }
            match started {
                Ok(group) => {
                    self.is_exhausted = false;
                    self.is_apart = false;
                    self.was_degraded = false;
                    self.tally.forced += u64::from(force);
                    let before = self.not_in_sync();
                    self.look(&group.status());
                    // A start without force says that parity is right for who is not there.
                    let missing = self.not_in_sync();
                    let models = self.host.models.iter_mut();
                    models.for_each(|model| model.started(missing));
                    self.proven = if force || has_log { 0 } else { missing };
                    if missing & !(before & self.proven) != 0 {
                        self.lose(missing & !self.proven);
                    }
                    self.serve(group);
                    self.set_rate();
                    self.observe();
                    return self.after_start();
                }
                Err(error) => match self.refused(&error)? {
                    Next::GiveUp => return Ok(Way::Over),
                    Next::WithAll => self.return_all(),
                    Next::Forced => force = true,
                    Next::Keeping => {
                        let in_sync = self.seats.iter().filter(|s| s.1 == MemberState::InSync);
                        let kept = in_sync.map(|s| s.0).find(|n| numbers.contains(n));
                        let Some(kept) = kept else {
                            return Ok(Way::Over);
                        };
                        keep = Some(self.disk(kept).uuid);
                        without.clear();
                    }
                },
            }
        }
        match self.plan.config.is_reckless {
            true => Ok(Way::Over),
            false => Err(Violation::new(Law::Starts, "refused again and again")),
        }
    }

    /// Background work takes its time, it may be.
    pub fn set_rate(&self) {
        // Faults are counted against a budget of redundancy: a disk that is failed for repaired ones would be one more.
        if let Some(group) = &self.group {
            group.set_read_errors_max(0);
        }
        if let (Some(group), Some(rate)) = (&self.group, self.plan.config.rate) {
            group.set_rebuild_rate(None, Some(rate));
        }
    }

    fn has_lost_disks(&self) -> bool {
        let is_lost = |n: u8| {
            let faults = &self.disk(n).faults;
            faults.is_gone.get() && !faults.is_unseen.get() && !self.retired.contains(&n)
        };
        (0..self.disks.len() as u8).any(is_lost)
    }

    fn return_all(&mut self) {
        for disk in &self.disks {
            if !self.retired.contains(&disk.number) && !disk.faults.is_unseen.get() {
                disk.faults.is_gone.set(false);
            }
        }
    }

    /// Says whether a refusal is one that has to be, and what is done about it.
    fn refused(&mut self, error: &ApiError) -> Result<Next, Violation> {
        self.tally.refusals += 1;
        let text = format!("{} {}", error.message, error.causes.join("; "));
        self.world.tell(|| format!("refused: {text}"));
        let wrong = || Err(Violation::new(Law::Starts, format!("refused: {text}")));
        let is_lost = self.has_lost_disks();
        let missing = self.troubled();
        if text.contains("not stopped cleanly and is degraded") {
            let is_degraded = missing != 0 || self.is_apart || self.was_degraded;
            let has_log = self.plan.config.consistency.has_log();
            let is_right = self.is_torn && !has_log && self.geometry.parities() > 0 && is_degraded;
            return match is_right {
                false => wrong(),
                true if is_lost && self.random.percent(50) => Ok(Next::WithAll),
                true => Ok(Next::Forced),
            };
        }
        if text.contains("older than what was seen last") {
            return match is_lost {
                true => Ok(Next::WithAll),
                false => wrong(),
            };
        }
        if text.contains("not there or not in sync")
            || text.contains("none of its members is there")
        {
            return match (is_lost, self.geometry.survives(missing)) {
                (true, false) => Ok(Next::WithAll),
                (false, false) => Ok(Next::GiveUp),
                (_, true) if self.is_apart && is_lost => Ok(Next::WithAll),
                (_, true) => wrong(),
            };
        }
        if text.contains("were written apart from each other") || text.contains("but they differ") {
            return match self.is_apart {
                true => Ok(Next::Keeping),
                false => wrong(),
            };
        }
        // Disks that fail while it starts.
        if !self.geometry.survives(missing) {
            return Ok(if is_lost { Next::WithAll } else { Next::GiveUp });
        }
        wrong()
    }

    /// What was written is looked at before anything is sent again, it may be.
    fn after_start(&mut self) -> Result<Way, Violation> {
        if self.random.percent(60) && self.see_all()? == Way::Down {
            return Ok(Way::Down);
        }
        self.send_again();
        Ok(Way::On)
    }

    /// Reads all LUs, and compares.
    pub fn see_all(&mut self) -> Result<Way, Violation> {
        for lu in 0..self.host.models.len() {
            let (all, step) = (self.host.models[lu].sectors(), (256 << 10) / SECTOR);
            for at in (0..all).step_by(step as usize) {
                let sent = self.host.look(lu, at..(at + step).min(all));
                if self.look_at(&sent)? == Way::Down {
                    return Ok(Way::Down);
                }
            }
        }
        Ok(Way::On)
    }

    /// Sends a read, and compares what it shows.
    fn look_at(&mut self, sent: &Sent) -> Result<Way, Violation> {
        let bytes = (sent.sectors.end - sent.sectors.start) * SECTOR;
        self.world.pages.borrow_mut()[sent.tag] = vec![0; bytes as usize];
        self.send(sent);
        let answer = Rc::clone(&sent.answer);
        let is_over = self
            .world
            .run_until(ANSWER_LIMIT, move || answer.get().is_some());
        if self.world.is_down.get() && sent.answer.get().is_none() {
            return Ok(Way::Down);
        }
        let Some(answer) = sent.answer.get().filter(|_| is_over) else {
            return Err(Violation::new(Law::Ends, "a read is not answered"));
        };
        self.observe();
        let told = self.host.take(&self.world, sent, answer, false);
        self.judge(told)?;
        Ok(Way::On)
    }

    /// The load of a boot, and its deeds.
    pub fn load(&mut self, boot: &Boot) -> Result<Way, Violation> {
        let mut deeds = boot.deeds.iter().peekable();
        let mut asked = 0;
        loop {
            if self.world.is_down.get() {
                return Ok(Way::Down);
            }
            self.harvest()?;
            while let Some((_, deed)) = deeds.next_if(|(at, _)| *at <= asked) {
                self.observe();
                if self.deed(*deed)? == Way::Down {
                    return Ok(Way::Down);
                }
                self.observe();
            }
            if asked < boot.requests && self.host.sent.len() < self.plan.config.depth {
                asked += 1;
                let drawn = self.host.draw(&self.world, &self.random, &self.plan.config);
                if let Some(sent) = drawn {
                    self.send(&sent);
                    continue;
                }
            }
            if asked >= boot.requests && self.host.sent.is_empty() && self.orders.get() == 0 {
                return Ok(Way::On);
            }
            self.wait_for_answer()?;
        }
    }

    /// Runs until something is answered, or nothing is outstanding.
    fn wait_for_answer(&mut self) -> Result<(), Violation> {
        let sent: Vec<_> = self
            .host
            .sent
            .iter()
            .map(|s| Rc::clone(&s.answer))
            .collect();
        let orders = Rc::clone(&self.orders);
        let ordered = orders.get();
        let mut outstanding = 0;
        let mut samples = 0;
        let count = sent.len() as u64;
        let is_over = self.world.run_until(ANSWER_LIMIT, || {
            outstanding += count;
            samples += 1;
            sent.iter().any(|answer| answer.get().is_some()) || orders.get() != ordered
        });
        self.tally.outstanding += outstanding;
        self.tally.samples += samples;
        match is_over {
            true => Ok(()),
            false => {
                let open: Vec<_> = self
                    .host
                    .sent
                    .iter()
                    .map(|s| (s.kind, &s.sectors))
                    .collect();
                Err(Violation::new(Law::Ends, format!("not answered: {open:?}")))
            }
        }
    }

    /// Says whether a member may be lost.
    fn may_lose(&self, slot: u16) -> bool {
        self.plan.config.is_reckless || self.geometry.survives(self.troubled() | 1 << slot)
    }

    /// The disk in a slot, if it works.
    fn working(&self, slot: u16) -> Option<u8> {
        let (number, state) = *self.seats.get(usize::from(slot))?;
        (state == MemberState::InSync && self.troubled() & 1 << slot == 0).then_some(number)
    }

    /// Has an order be carried out beside the load.
    fn order(&self, future: impl Future<Output = Result<(), ApiError>> + 'static) {
        let orders = Rc::clone(&self.orders);
        orders.set(orders.get() + 1);
        self.world.spawn(async move {
            // Whatever comes of it: what counts is that the laws hold.
            let _ = future.await;
            orders.set(orders.get() - 1);
        });
    }

    fn deed(&mut self, deed: Deed) -> Result<Way, Violation> {
        let Some(group) = self.group.clone() else {
            return Ok(Way::On);
        };
        self.world.tell(|| format!("{deed:?}, {:?}", self.seats));
        let hit = |run: &Self, slot: u16| run.working(slot).filter(|_| run.may_lose(slot));
        match deed {
            Deed::Vanish { slot, is_cut } => {
                if let Some(number) = hit(self, slot) {
                    let disk = Rc::clone(self.disk(number));
                    if is_cut {
                        disk.cut_alone(&self.random);
                    }
                    disk.faults.is_gone.set(true);
                    self.tally.lost();
                }
            }
            Deed::Hang { slot } => {
                if let Some(number) = hit(self, slot) {
                    let disk = Rc::clone(self.disk(number));
                    disk.faults.hangs.set(true);
                    let seconds = *self.random.of(&[10, 45, 120]);
                    self.world.after(seconds * SECOND, Rc::new(GoOn(disk)), 0);
                    self.tally.lost();
                }
            }
            Deed::WriteError { slot } => {
                if let Some(number) = hit(self, slot) {
                    let faults = &self.disk(number).faults;
                    faults.write_errors.set(1);
                    faults.is_failing.set(true);
                    self.tally.lost();
                }
            }
            Deed::Slow { slot } => {
                if let Some(number) = self.working(slot) {
                    self.disk(number).faults.slow.set(100);
                }
            }
            Deed::Media { slot, sectors } => {
                if let Some(number) = hit(self, slot) {
                    let sectors = (0..sectors).map(|_| self.sector_of(slot));
                    let sectors: Vec<u64> = sectors.collect();
                    self.disk(number).faults.bad.borrow_mut().extend(sectors);
                }
            }
            Deed::Rot { slot } => {
                if let Some(number) = self.working(slot) {
                    self.rot(slot, number);
                }
            }
            Deed::FailByHand { slot } => {
                if let Some(number) = hit(self, slot) {
                    let uuid = self.disk(number).uuid;
                    self.order(async move { group.member_fail(uuid, "by hand").await });
                    self.tally.lost();
                }
            }
            Deed::Return => self.put_back(),
            Deed::Replace => {
                let lost = self.not_in_sync();
                if lost != 0 && self.orders.get() == 0 {
                    self.replace(lost.trailing_zeros() as u16);
                }
            }
            Deed::ReplaceHealthy { slot } => {
                if self.working(slot).is_some() && self.orders.get() == 0 {
                    self.replace(slot);
                }
            }
            Deed::Scrub { repair } => {
                let rate = None;
                let order = ScrubOrder::Start {
                    repair,
                    from: 0,
                    rate,
                };
                self.order(async move { group.scrub(order).await });
            }
            Deed::Pause { seconds } => return self.pause(seconds),
            Deed::Trickle { seconds } => return self.trickle(seconds),
            Deed::Resize => {
                let lu = self.random.index(self.host.models.len());
                return self.resize(lu);
            }
        }
        Ok(Way::On)
    }

    /// A sector of a member's data, near where the LUs are.
    fn sector_of(&self, slot: u16) -> u64 {
        let group = self.group.as_ref().expect("it runs");
        let data = group.status().members[usize::from(slot)].data_offset;
        let near = self.random.below(3 << 20);
        (data + near) / SECTOR
    }

    fn rot(&mut self, slot: u16, number: u8) {
        let sector = self.sector_of(slot);
        let group = self.group.as_ref().expect("it runs");
        let data = group.status().members[usize::from(slot)].data_offset;
        let at = sector * SECTOR - data;
        let stripe = at / self.geometry.stripe_on_member();
        let in_chunk = (at % self.geometry.chunk()) as u32;
        let byte = self.random.below(SECTOR);
        self.disk(number)
            .rot(sector * SECTOR + byte, self.random.below(8) as u32);
        self.has_rotted = true;
        for model in &mut self.host.models {
            model.rotted(stripe, in_chunk);
        }
    }

    /// The disk of a slot that has none is there again, and is put into it.
    pub fn put_back(&mut self) {
        let Some(group) = self.group.clone() else {
            return;
        };
        let lost = |(_, (_, state)): &(u16, (u8, MemberState))| {
            matches!(state, MemberState::Faulty | MemberState::Missing)
        };
        let Some((slot, (number, _))) = (0..).zip(self.seats.iter().copied()).find(lost) else {
            return;
        };
        if self.retired.contains(&number) || self.disk(number).has_flights() {
            return;
        }
        let disk = self.disk(number);
        disk.faults.is_gone.set(false);
        if disk.faults.hangs.get() {
            return;
        }
        let given = self.given(number);
        self.order(async move { group.member_replace(slot, given, Fill::Missed).await });
    }

    /// A fresh disk is put into a slot.
    pub fn replace(&mut self, slot: u16) {
        let Some(group) = self.group.clone() else {
            return;
        };
        let number = self.add_disk(0x77);
        let given = self.given(number);
        self.order(async move { group.member_replace(slot, given, Fill::Missed).await });
    }

    /// The host waits for its answers, and then asks for nothing.
    fn pause(&mut self, seconds: u64) -> Result<Way, Violation> {
        while !self.host.sent.is_empty() {
            self.wait_for_answer()?;
            if self.world.is_down.get() {
                return Ok(Way::Down);
            }
            self.harvest()?;
        }
        self.world.run_until(seconds * SECOND, || false);
        Ok(match self.world.is_down.get() {
            true => Way::Down,
            false => Way::On,
        })
    }

    /// The host reads now and then.
    fn trickle(&mut self, seconds: u64) -> Result<Way, Violation> {
        for _ in 0..seconds / 2 {
            let sent = self.host.look(0, 0..8);
            if self.look_at(&sent)? == Way::Down || self.pause(2)? == Way::Down {
                return Ok(Way::Down);
            }
        }
        Ok(Way::On)
    }

    fn resize(&mut self, lu: usize) -> Result<Way, Violation> {
        let group = self.group.clone().expect("it runs");
        let lus = group.lus();
        let (handle, status) = &lus[lu];
        let (handle, uuid) = (*handle, status.lu);
        let bytes = status.capacity + (1 << 20);
        let resized = group.clone();
        let done = self.world.block_on(ANSWER_LIMIT, async move {
            resized.lu_resize(uuid, LuSize::Bytes(bytes)).await
        });
        match done {
            None if self.world.is_down.get() => return Ok(Way::Down),
            None => return Err(Violation::new(Law::Ends, "a resize does not end")),
            Some(Err(_)) => {}
            Some(Ok(_)) => {
                let extents = group.lu_extents(handle).expect("it is there");
                self.host.models[lu].grow(extents);
            }
        }
        Ok(Way::On)
    }

    /// A disk with what another has; nobody knows it afterwards.
    fn copy_of(&mut self, number: u8) -> u8 {
        let pages = self.disk(number).snapshot();
        let copy = self.add_disk(0);
        self.disk(copy).restore(pages);
        self.retired.push(copy);
        copy
    }

    /// A member is as it was earlier: the group has to see that it is.
    fn put_older(&mut self, slot: u16) {
        let Some(number) = self.working(slot).filter(|_| self.may_lose(slot)) else {
            return;
        };
        let others = self.seats.iter().filter(|seat| seat.0 != number);
        let in_sync = others.filter(|seat| seat.1 == MemberState::InSync);
        let floors = in_sync.filter_map(|seat| self.said(&self.disk(seat.0).snapshot()));
        let floor = floors.map(|said| said.1).min();
        let Some(copy) = self.copies.remove(&number) else {
            return;
        };
        let said = self.said(&copy).zip(floor);
        if said.is_some_and(|((generation, _), floor)| generation < floor) {
            self.disk(number).restore(copy);
            self.tally.lost();
        }
    }

    /// Generation and floor of a disk's superblock.
    fn said(&self, pages: &Pages) -> Option<(u64, u64)> {
        let mut bytes = [0; 4096];
        pages.read(4096, &mut bytes);
        let at = At {
            offset: 4096,
            device_size: pages.len(),
        };
        let superblock = decode(&bytes, at).ok()?;
        let floor = superblock.member.map(|member| member.group.floor)?;
        Some((superblock.generation, floor))
    }

    /// What is done between two boots.
    pub fn between(&mut self, between: Between) {
        match between {
            Between::Lose { slot } => {
                if let Some(number) = self.working(slot).filter(|_| self.may_lose(slot)) {
                    self.disk(number).faults.is_gone.set(true);
                    self.tally.lost();
                }
            }
            Between::Return => self.return_all(),
            Between::Older { slot } => self.put_older(slot),
            Between::Twin { slot } => {
                self.twin = self.working(slot);
            }
        }
    }
}
