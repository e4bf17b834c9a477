//! Fail points: the commit steps of the program, as the disks see them.
//!
//! No hook in the program: what a request is, its address on the member says (`ublk-target/FORMAT.md`), and the disk
//! server stops answering before or after it.

use std::collections::BTreeMap;

use lunar_api::target::MemberState;
use lunar_disks::{Event, Random, Server, Trap, Verb, Verdict};
use lunar_engine::superblock::{self, At, Copy, Superblock};

/// Where copy 0 is.
const COPY_0: u64 = 4096;

/// Where the kernel is frozen, to be cut there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Point {
    /// Copy 0 of a superblock is written, copy 1 is not.
    Copy0Written,
    /// Copy 1 is written; other members may have none yet.
    Copy1Written,
    /// A configuration is written, no superblock points to it.
    ConfigWritten,
    /// Data of a stripe is written, its parity is about to be.
    DataNotParity,
    /// Parity of a stripe is written.
    ParityWritten,
    /// One member's part of a stripe is written, the next one's is about to be.
    PartOfStripe,
    /// Data is written, and nothing says so yet.
    DataWritten,
    /// A member is about to flush.
    BeforeFlush,
    /// A member has flushed, the next is about to.
    SomeFlushed,
    /// The disk with the state directory is about to flush.
    BeforeStateFlush,
    /// It has flushed.
    StateFlushed,
    /// A member that is being filled was written.
    RebuildWritten,
    /// A page of the intent map is written, the data is not.
    IntentWritten,
    /// The same for the missed map.
    MissedWritten,
    /// A unit of the log is written, the data is not.
    LogWritten,
}

/// All of them, with their names.
pub(super) const POINTS: [(Point, &str); 15] = [
    (Point::Copy0Written, "superblock_copy_0_written"),
    (Point::Copy1Written, "superblock_copy_1_written"),
    (Point::ConfigWritten, "configuration_written"),
    (Point::DataNotParity, "data_written_parity_not"),
    (Point::ParityWritten, "parity_written"),
    (Point::PartOfStripe, "some_members_of_a_stripe_written"),
    (Point::DataWritten, "data_written"),
    (Point::BeforeFlush, "before_flush"),
    (Point::SomeFlushed, "some_members_flushed"),
    (Point::BeforeStateFlush, "before_flush_of_state"),
    (Point::StateFlushed, "state_flushed"),
    (Point::RebuildWritten, "rebuild_written"),
    (Point::IntentWritten, "intent_map_written"),
    (Point::MissedWritten, "missed_map_written"),
    (Point::LogWritten, "log_written"),
];

/// What an address of a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spot {
    Copy0,
    Copy1,
    Config,
    Intent,
    Missed,
    Log,
    Data { stripe: u64, is_parity: bool },
    Other,
}

/// The members as their superblocks on the disks describe them.
#[derive(Debug, Clone, Default)]
pub(super) struct Members(BTreeMap<usize, (Superblock, u64)>);

impl Members {
    /// Reads the superblocks of disks of so many bytes; one that cannot be read is left out.
    pub(super) fn read(server: &Server, disks: &[usize], bytes: u64) -> Self {
        let mut members = Self::default();
        for disk in disks {
            let mut page = [0; superblock::BYTES];
            if server.peek(*disk, COPY_0, &mut page).is_ok() {
                members.learn(*disk, bytes, &page);
            }
        }
        members
    }

    fn learn(&mut self, disk: usize, device_size: u64, page: &[u8]) {
        let at = At {
            offset: COPY_0,
            device_size,
        };
        if let Ok(block) = superblock::decode(page, at) {
            self.0.insert(disk, (block, device_size));
        }
    }

    /// True if the address is in the data area.
    pub(super) fn is_data(&self, disk: usize, at: u64) -> bool {
        matches!(self.spot(disk, at), Spot::Data { .. })
    }

    /// True if it is parity.
    pub(super) fn is_parity(&self, disk: usize, at: u64) -> bool {
        let spot = self.spot(disk, at);
        matches!(spot, Spot::Data { is_parity, .. } if is_parity)
    }

    fn spot(&self, disk: usize, at: u64) -> Spot {
        let Some((block, _)) = self.0.get(&disk) else {
            return Spot::Other;
        };
        if at == COPY_0 {
            return Spot::Copy0;
        }
        if at == block.copy_at(Copy::End) {
            return Spot::Copy1;
        }
        let Some(member) = &block.member else {
            return Spot::Other;
        };
        for (name, area) in member.layout.areas() {
            if (area.offset..area.end()).contains(&at) {
                return match name {
                    "config A" | "config B" => Spot::Config,
                    "intent map" => Spot::Intent,
                    "missed map" => Spot::Missed,
                    "log lanes" => Spot::Log,
                    _ => Spot::Other,
                };
            }
        }
        let (Some(inside), Ok(geometry)) = (
            at.checked_sub(member.layout.data_offset),
            member.group.geometry(),
        ) else {
            return Spot::Other;
        };
        let stripe = inside / geometry.stripe_on_member();
        let is_parity = geometry
            .parity_slots(stripe)
            .any(|slot| slot == member.slot);
        Spot::Data { stripe, is_parity }
    }

    fn is_rebuilding(&self, disk: usize) -> bool {
        let Some((block, _)) = self.0.get(&disk) else {
            return false;
        };
        block.member.as_ref().is_some_and(|member| {
            let entry = &member.group.members[usize::from(member.slot)];
            entry.state == MemberState::Rebuilding
        })
    }
}

/// What can be reached now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    pub parity: bool,
    pub log: bool,
    /// There is an intent map.
    pub map: bool,
    /// A member misses what is written.
    pub missed: bool,
    /// A member may be being filled.
    pub rebuild: bool,
}

/// A fail point, and how often it is passed before.
#[derive(Debug, Clone, Copy)]
pub(super) struct Aim {
    pub point: Point,
    pub nth: u64,
}

impl Aim {
    pub(super) fn name(self) -> &'static str {
        let found = POINTS.iter().find(|(point, _)| *point == self.point);
        found.map_or("", |(_, name)| *name)
    }

    /// The next one of those that can be reached; `turn` counts the aimed cuts, so that each has its turn.
    pub(super) fn draw(random: &mut Random, turn: u64, first_boot: bool, has: Reach) -> Self {
        let mut points = vec![
            Point::PartOfStripe,
            Point::BeforeFlush,
            Point::DataWritten,
            Point::SomeFlushed,
            Point::ConfigWritten,
        ];
        if !first_boot {
            // They come by while a group comes up, and seldom later.
            points.extend([
                Point::Copy0Written,
                Point::BeforeStateFlush,
                Point::Copy1Written,
                Point::StateFlushed,
            ]);
        }
        if has.parity {
            points.extend([Point::DataNotParity, Point::ParityWritten]);
        }
        if has.log {
            points.push(Point::LogWritten);
        }
        if has.map {
            points.push(Point::IntentWritten);
        }
        if has.missed {
            points.push(Point::MissedWritten);
        }
        let turn = turn % points.len() as u64;
        let mut point = points[usize::try_from(turn).expect("an index")];
        if has.rebuild && random.percent(40) {
            point = Point::RebuildWritten;
        }
        let most = match point {
            Point::Copy0Written | Point::Copy1Written => 4,
            Point::ConfigWritten => 8,
            Point::BeforeStateFlush | Point::StateFlushed => 6,
            Point::BeforeFlush | Point::SomeFlushed => 40,
            Point::IntentWritten => 30,
            Point::MissedWritten => 3,
            Point::RebuildWritten => 80,
            Point::DataNotParity
            | Point::ParityWritten
            | Point::PartOfStripe
            | Point::DataWritten
            | Point::LogWritten => 120,
        };
        Self {
            point,
            nth: 1 + random.below(most),
        }
    }

    /// True if it is passed while a group comes up, and seldom later.
    pub(super) fn is_of_start(self) -> bool {
        matches!(
            self.point,
            Point::Copy0Written
                | Point::Copy1Written
                | Point::BeforeStateFlush
                | Point::StateFlushed
        )
    }

    /// The trap of it.
    pub(super) fn trap(self, mut members: Members, bytes: u64) -> Trap {
        let mut left = self.nth;
        // The stripe and disk of the last write of data, and the disk of the last flush if nothing came since.
        let (mut last_data, mut last_flush) = (None, None);
        Box::new(move |event: &Event<'_>| {
            let disk = event.disk;
            let (spot, flushes) = match event.verb {
                Verb::Write { at, data } => {
                    if at == COPY_0 && data.len() >= superblock::BYTES {
                        members.learn(disk, bytes, &data[..superblock::BYTES]);
                    }
                    (members.spot(disk, at), false)
                }
                Verb::Zero { at, .. } => (members.spot(disk, at), false),
                Verb::Flush => (Spot::Other, true),
            };
            let of_data = match spot {
                Spot::Data { stripe, is_parity } => Some((stripe, is_parity)),
                _ => None,
            };
            let stripe = of_data.map(|(stripe, _)| stripe);
            let follows = last_data.is_some_and(|(was, on)| Some(was) == stripe && on != disk);
            let flush_follows = last_flush.is_some_and(|on| on != disk);
            let is_member = disk != 0;
            use Verdict::{FreezeAfter, FreezeBefore};
            let (hit, verdict) = match self.point {
                Point::Copy0Written => (spot == Spot::Copy0, FreezeAfter),
                Point::Copy1Written => (spot == Spot::Copy1, FreezeAfter),
                Point::ConfigWritten => (spot == Spot::Config, FreezeAfter),
                Point::DataNotParity => {
                    let parity = of_data.is_some_and(|(_, is_parity)| is_parity);
                    (parity && follows, FreezeBefore)
                }
                Point::ParityWritten => {
                    (of_data.is_some_and(|(_, is_parity)| is_parity), FreezeAfter)
                }
                Point::PartOfStripe => (follows, FreezeBefore),
                Point::DataWritten => (of_data.is_some(), FreezeAfter),
                Point::BeforeFlush => (flushes && is_member, FreezeBefore),
                Point::SomeFlushed => (flushes && is_member && flush_follows, FreezeBefore),
                Point::BeforeStateFlush => (flushes && !is_member, FreezeBefore),
                Point::StateFlushed => (flushes && !is_member, FreezeAfter),
                Point::RebuildWritten => (
                    of_data.is_some() && members.is_rebuilding(disk),
                    FreezeAfter,
                ),
                Point::IntentWritten => (spot == Spot::Intent, FreezeAfter),
                Point::MissedWritten => (spot == Spot::Missed, FreezeAfter),
                Point::LogWritten => (spot == Spot::Log, FreezeAfter),
            };
            if let Some((stripe, _)) = of_data {
                last_data = Some((stripe, disk));
            }
            if is_member {
                last_flush = flushes.then_some(disk);
            }
            if !hit {
                return Verdict::Go;
            }
            left = left.saturating_sub(1);
            if left == 0 { verdict } else { Verdict::Go }
        })
    }
}
