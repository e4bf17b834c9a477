//! At the end: all that is lost comes back, all that is to be synced is, and then everything has to fit.

use std::rc::Rc;

use lunar_api::target::{GroupState, GroupStatus, MemberState, ScrubOrder, ScrubState};
use lunar_engine::traits::{MILLISECOND, SECOND};

use super::disk::SECTOR;
use super::run::{Law, Run, Violation, WORK_LIMIT};

impl Run {
    /// Heals the group, and checks all that can be checked.
    pub fn last_checks(&mut self) -> Result<(), Violation> {
        self.wait_for_all()?;
        if !self.heal()? {
            return Ok(());
        }
        self.expect_all("after all was healed")?;
        if self.is_exhausted && self.listed != 0 {
            return Ok(()); // What nobody has is on lists, and an error to who reads it.
        }
        if self.geometry.redundancy() > 0 && !self.has_rotted {
            self.scrub()?;
            self.compare_members()?;
        }
        self.without_one()?;
        Ok(())
    }

    fn wait_for_all(&mut self) -> Result<(), Violation> {
        let limit = WORK_LIMIT;
        let answers: Vec<_> = self
            .host
            .sent
            .iter()
            .map(|s| Rc::clone(&s.answer))
            .collect();
        let is_over = self.world.run_until(limit, || {
            answers.iter().all(|answer| answer.get().is_some())
        });
        self.harvest()?;
        match is_over {
            true => Ok(()),
            false => Err(Violation::new(Law::Ends, "requests are not answered")),
        }
    }

    fn expect_all(&mut self, when: &str) -> Result<(), Violation> {
        self.see_all().map(|_| ()).map_err(|violation| {
            Violation::new(violation.law, format!("{when}: {}", violation.text))
        })
    }

    /// Puts a disk into every slot that has none, and waits. False: more was lost than can be healed.
    fn heal(&mut self) -> Result<bool, Violation> {
        self.observe();
        let group = self.group.clone().expect("it runs");
        let status = group.status();
        let is_whole = status.state == GroupState::Optimal && status.sync.is_none();
        let is_synced = !self.is_torn && is_whole;
        for disk in &self.disks {
            disk.faults.write_errors.set(0);
            disk.faults.is_failing.set(false);
            disk.faults.slow.set(0);
            if !is_synced {
                // Parity is not believed before the resync, and that needs all data.
                disk.faults.bad.borrow_mut().clear();
            }
            disk.go_on(&self.world);
        }
        for _ in 0..12 {
            self.observe();
            let group = self.group.clone().expect("it runs");
            let status = group.status();
            if status.state == GroupState::Failed {
                return match self.is_exhausted {
                    true => Ok(false),
                    false => Err(Violation::new(
                        Law::Errors,
                        format!("failed: {}", status.reason),
                    )),
                };
            }
            let is_busy = status
                .members
                .iter()
                .any(|m| m.state == MemberState::Rebuilding)
                || status.replacement.is_some();
            let lost = status
                .members
                .iter()
                .find(|m| matches!(m.state, MemberState::Faulty | MemberState::Missing));
            if let Some(lost) = lost.filter(|_| !is_busy && self.orders.get() == 0) {
                if self.geometry.redundancy() == 0 {
                    return Ok(false);
                }
                let number = self.seats[usize::from(lost.slot)].0;
                match self.random.percent(50) && !self.disk(number).has_flights() {
                    true => self.put_back(),
                    false => self.replace(lost.slot),
                }
            }
            let is_over = self.wait_until(|run, status| {
                let is_filled = status
                    .members
                    .iter()
                    .all(|m| m.state != MemberState::Rebuilding);
                let is_quiet = status.sync.is_none() && status.replacement.is_none();
                run.orders.get() == 0 && is_filled && is_quiet || status.state == GroupState::Failed
            });
            self.observe();
            let group = self.group.clone().expect("it runs");
            let status = group.status();
            if !is_over {
                // What nobody can read is what redundancy does not give back any more.
                return match self.is_exhausted {
                    true => Ok(false),
                    false => {
                        let text = format!("no end of {:?}: {}", status.sync, status.reason);
                        Err(Violation::new(Law::Ends, text))
                    }
                };
            }
            if status.state == GroupState::Optimal && status.sync.is_none() {
                return Ok(true);
            }
        }
        match self.is_exhausted {
            true => Ok(false),
            false => Err(Violation::new(Law::Ends, "it cannot be healed")),
        }
    }

    /// Lets time pass until something is so of the group; false if background work had time enough.
    fn wait_until(&self, is_so: impl Fn(&Self, &GroupStatus) -> bool) -> bool {
        let group = self.group.as_ref().expect("it runs");
        let end = self.world.now() + WORK_LIMIT;
        // To ask after every event costs more than all else.
        let mut step = 20 * MILLISECOND;
        while self.world.now() < end {
            if is_so(self, &group.status()) {
                return true;
            }
            self.world.run_until(step, || false);
            step = (step * 5 / 4).min(10 * SECOND);
        }
        false
    }

    /// A scrub finds nothing.
    fn scrub(&mut self) -> Result<(), Violation> {
        let group = self.group.clone().expect("it runs");
        // One that was ordered before goes first.
        for order in [
            ScrubOrder::Cancel,
            ScrubOrder::Start {
                repair: false,
                from: 0,
                rate: None,
            },
        ] {
            let group = Rc::clone(&group);
            let done = self.must("an order", async move { group.scrub(order).await })?;
            if let (Err(error), ScrubOrder::Start { .. }) = (done, order) {
                return Err(Violation::new(Law::Ends, format!("no scrub: {error:?}")));
            }
        }
        let is_done = |status: &GroupStatus| {
            let scrub = status.scrub.as_ref();
            scrub.is_some_and(|scrub| scrub.state == ScrubState::Done)
        };
        let is_over = self.wait_until(|_, status| is_done(status));
        let scrub = group.status().scrub;
        let Some(scrub) = scrub.filter(|_| is_over) else {
            return Err(Violation::new(Law::Ends, "a scrub does not end"));
        };
        match (scrub.bad, scrub.unreadable) {
            (0, 0) => Ok(()),
            _ => Err(Violation::new(
                Law::Fits,
                format!(
                    "{} bad stripes, {} unreadable, first {:?}",
                    scrub.bad,
                    scrub.unreadable,
                    scrub.stripes.first()
                ),
            )),
        }
    }

    /// What the members have, computed here once more: parities fit the data, copies are alike.
    fn compare_members(&mut self) -> Result<(), Violation> {
        let group = self.group.clone().expect("it runs");
        let status = group.status();
        let starts: Vec<u64> = status.members.iter().map(|m| m.data_offset).collect();
        let disks: Vec<_> = self
            .seats
            .iter()
            .map(|seat| Rc::clone(self.disk(seat.0)))
            .collect();
        let chunk = self.geometry.chunk() as usize;
        let read = |slot: u16, at: u64| {
            let mut bytes = vec![0; chunk];
            let slot = usize::from(slot);
            disks[slot].read(starts[slot] + at, &mut bytes);
            bytes
        };
        for model in &self.host.models {
            let step = self.geometry.stripe_bytes() / SECTOR;
            for sector in (0..model.sectors()).step_by(step as usize) {
                let stripe = model.place(sector).0;
                let fits = match self.geometry.is_mirrored() {
                    true => (0..self.geometry.data_slots()).all(|d| {
                        let copies = self.geometry.copies(stripe, d);
                        let mut copies = copies.map(|spot| read(spot.slot, spot.member_at));
                        let first = copies.next();
                        copies.all(|copy| Some(&copy) == first.as_ref())
                    }),
                    false => self.parity_fits(stripe, &read),
                };
                if !fits {
                    let text = format!("stripe {stripe}, compared from outside");
                    return Err(Violation::new(Law::Fits, text));
                }
            }
        }
        Ok(())
    }

    fn parity_fits(&self, stripe: u64, read: &impl Fn(u16, u64) -> Vec<u8>) -> bool {
        let at = stripe * self.geometry.chunk();
        let mut p = vec![0; self.geometry.chunk() as usize];
        let mut q = p.clone();
        for d in (0..self.geometry.data_slots()).rev() {
            let data = read(self.geometry.slot_of(stripe, d), at);
            for ((p, q), byte) in p.iter_mut().zip(&mut q).zip(&data) {
                *p ^= byte;
                // Horner's rule over GF(256) with the polynomial 0x11D.
                *q = (*q << 1) ^ (if *q & 0x80 != 0 { 0x1D } else { 0 }) ^ byte;
            }
        }
        let parities = self.geometry.parity_slots(stripe);
        parities
            .zip([p, q])
            .all(|(slot, right)| read(slot, at) == right)
    }

    /// Everything reads as before without one of the members.
    fn without_one(&mut self) -> Result<(), Violation> {
        if self.geometry.redundancy() == 0 {
            return Ok(());
        }
        let slot = self.random.index(self.seats.len());
        let number = self.seats[slot].0;
        self.disk(number).faults.is_gone.set(true);
        if self.has_rotted {
            return Ok(());
        }
        self.expect_all(&format!("without slot {slot}"))?;
        self.world.run_until(3 * SECOND, || false);
        self.expect_all(&format!("degraded, without slot {slot}"))
    }
}
