//! What a seed draws: the group, the load, what goes wrong and when, and how each boot ends.
//!
//! All of it is drawn before the run begins, so that a part can be left out (`shrink`) and the rest stays as it is.

use lunar_api::target::{Consistency, Level};

use super::disk::Speed;
use super::random::Random;
use super::states::State;

/// Boots of a run at most: five restarts.
pub const BOOTS_MAX: usize = 6;

/// The group and its load.
#[derive(Debug, Clone)]
pub struct Config {
    pub level: Level,
    pub members: u8,
    pub chunk: u64,
    pub consistency: Consistency,
    /// The disks are zeroed and said to be so; else they hold anything, and are synced.
    pub is_clean: bool,
    /// Bytes of each LU.
    pub lus: Vec<u64>,
    /// Requests in flight at most.
    pub depth: usize,
    pub has_cache: bool,
    /// They zero ranges.
    pub has_zeroes: bool,
    pub speed: Speed,
    /// Sectors of the part of a LU that most requests go to.
    pub hot: u64,
    /// In a hundred requests: reads, flushes, discards, zeroing; the others write.
    pub mix: [u64; 4],
    /// In a hundred writes: FUA.
    pub fua: u64,
    /// Longest request, in sectors.
    pub longest: u64,
    /// Most bytes a second of background work.
    pub rate: Option<u64>,
    /// Bits rot, and what they take is exempt.
    pub is_rotting: bool,
    /// More may fail than redundancy has: then errors are right, and wrong bytes are not.
    pub is_reckless: bool,
}

/// Something that is done while the host works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// A member is gone; its own power is lost too, it may be.
    Vanish {
        slot: u16,
        is_cut: bool,
    },
    /// A member does not answer any more.
    Hang {
        slot: u16,
    },
    /// A write to a member fails.
    WriteError {
        slot: u16,
    },
    /// A member takes a hundred times as long for everything.
    Slow {
        slot: u16,
    },
    /// Some sectors of a member cannot be read.
    Media {
        slot: u16,
        sectors: u64,
    },
    /// A bit of a member's data rots.
    Rot {
        slot: u16,
    },
    /// A person fails a member.
    FailByHand {
        slot: u16,
    },
    /// The disk that was lost is put into its slot again.
    Return,
    /// A fresh disk is put into a slot that has none.
    Replace,
    /// A fresh disk replaces a member that still reads.
    ReplaceHealthy {
        slot: u16,
    },
    Scrub {
        repair: bool,
    },
    /// The host asks for nothing for so many seconds.
    Pause {
        seconds: u64,
    },
    /// For so many seconds the host reads the same few sectors now and then: too busy for the group to be clean, and its other
    /// regions are quiet.
    Trickle {
        seconds: u64,
    },
    /// A LU gets more space.
    Resize,
}

/// How a boot ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The process is killed.
    Kill,
    /// The power goes.
    Power,
    /// The group is stopped.
    Stop,
}

/// When it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// After so many events; or after the load.
    Events(u64),
    /// When a state arises for the nth time; or after the load.
    Arises(State, u64),
    /// After the load.
    Quiet,
}

/// What is done between two boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Between {
    /// A member is not there at the next.
    Lose { slot: u16 },
    /// All that is lost is there again.
    Return,
    /// A member comes back as it was at an earlier time.
    Older { slot: u16 },
    /// A member and a copy of it are there.
    Twin { slot: u16 },
}

/// One boot.
#[derive(Debug, Clone)]
pub struct Boot {
    pub requests: u64,
    /// After so many requests.
    pub deeds: Vec<(u64, Deed)>,
    pub end: End,
    pub when: When,
    pub between: Vec<Between>,
}

/// A run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub config: Config,
    pub boots: Vec<Boot>,
    /// The write hole counts as closed: nothing of it is exempt (`model`).
    pub has_no_hole: bool,
    /// What is done is told on standard error.
    pub is_loud: bool,
}

fn draw_config(random: &Random) -> Config {
    let level = match random.below(20) {
        0 => Level::Raid0,
        1 => Level::Linear,
        2..=5 => Level::Raid1,
        6..=9 => Level::Raid10,
        10..=15 => Level::Raid5,
        _ => Level::Raid6,
    };
    let members = match level {
        Level::Linear | Level::Raid0 => 1 + random.below(3),
        Level::Raid1 => 2 + random.below(2),
        Level::Raid10 => 2 + random.below(4),
        Level::Raid5 => 3 + random.below(4),
        Level::Raid6 => 4 + random.below(3),
    };
    let chunk = *random.of(&[4 << 10, 16 << 10, 64 << 10, 64 << 10, 128 << 10, 1 << 20]);
    let consistency = match (level, random.below(10)) {
        (Level::Raid1 | Level::Raid10, 0..6) => Consistency::Bitmap,
        (Level::Raid5 | Level::Raid6, 0..4) => Consistency::Bitmap,
        (Level::Raid5, 4..8) => Consistency::Ppl,
        (Level::Raid6, 4..8) => Consistency::Journal,
        _ => Consistency::None,
    };
    let speed = Speed {
        least: *random.of(&[5_000, 20_000, 80_000]),
        spread: *random.of(&[10_000, 100_000, 400_000]),
        stalls: *random.of(&[0, 1, 5]),
    };
    Config {
        level,
        members: members as u8,
        chunk,
        consistency,
        is_clean: random.percent(75),
        lus: (0..1 + random.below(2))
            .map(|_| (1 + random.below(3)) << 20)
            .collect(),
        depth: 14 + random.index(19),
        has_cache: random.percent(90),
        has_zeroes: random.percent(80),
        speed,
        hot: *random.of(&[64, 256, 768]),
        mix: *random.of(&[
            [25, 4, 3, 5],
            [10, 2, 1, 2],
            [40, 8, 5, 8],
            [5, 0, 2, 3],
            [15, 1, 0, 0],
        ]),
        fua: *random.of(&[0, 5, 20]),
        longest: *random.of(&[16, 64, 256, 1024]),
        rate: *random.of(&[None, None, Some(3 << 20), Some(20 << 20)]),
        is_rotting: random.percent(6),
        is_reckless: random.percent(12),
    }
}

fn draw_deed(random: &Random, config: &Config) -> Deed {
    let slot = random.below(config.members.into()) as u16;
    let redundant = config.level.is_redundant();
    match random.below(30) {
        0..=4 => Deed::Vanish {
            slot,
            is_cut: random.percent(50),
        },
        5 => Deed::Hang { slot },
        6..=7 => Deed::WriteError { slot },
        8 => Deed::Slow { slot },
        9..=10 => Deed::Media {
            slot,
            sectors: 1 + random.below(60),
        },
        11 if config.is_rotting => Deed::Rot { slot },
        11..=12 => Deed::FailByHand { slot },
        13..=16 if redundant => Deed::Return,
        17..=18 if redundant => Deed::Replace,
        19..=20 => Deed::ReplaceHealthy { slot },
        21..=22 if redundant => Deed::Scrub {
            repair: random.percent(50),
        },
        23 => Deed::Resize,
        24..=25 => Deed::Trickle { seconds: 17 },
        _ => Deed::Pause {
            seconds: *random.of(&[1, 6, 12, 17]),
        },
    }
}

/// States that few crashes hit.
const RARE: [State; 6] = [
    State::InSyncMark,
    State::MissedCleared,
    State::CursorSaved,
    State::StartReplays,
    State::CleanMark,
    State::IntentCleared,
];

/// States that a crash is aimed at, for what the group can be in.
fn draw_aim(random: &Random, config: &Config) -> State {
    let bitmap = config.consistency == Consistency::Bitmap;
    // What a log is for.
    if config.consistency.has_log() && random.percent(30) {
        return *random.of(&[State::LaneWritten, State::DataWrite]);
    }
    loop {
        let state = match random.percent(30) {
            true => *random.of(&RARE),
            false => *random.of(State::ALL),
        };
        let parity = config.level.has_parity();
        let fits = match state {
            State::BetweenDataAndParity => parity,
            State::BetweenCopies => !parity && config.level.is_redundant(),
            State::IntentSet | State::IntentCleared => bitmap,
            State::MissedSet | State::MissedCleared | State::DegradeMark | State::InSyncMark => {
                config.level.is_redundant()
            }
            State::DataWrite
            | State::DirtyMark
            | State::CleanMark
            | State::HistoryRenewed
            | State::CursorSaved
            | State::GenerationBump
            | State::FirstCopy
            | State::SecondCopy
            | State::Configuration
            | State::Flush
            | State::Erase
            | State::StartReads
            | State::StartReplays
            | State::StartPublishes => true,
            State::Resync | State::Rebuild | State::CatchUp | State::Scrub => {
                config.level.is_redundant()
            }
            State::Copying => true,
            State::LaneWritten => config.consistency.has_log(),
            State::LogLive => false,
        };
        if fits {
            return state;
        }
    }
}

/// What has to be done so that a state arises.
fn ways_to(state: State, slot: u16) -> Vec<Deed> {
    let vanish = Deed::Vanish {
        slot,
        is_cut: slot.is_multiple_of(2),
    };
    match state {
        State::IntentCleared => vec![Deed::Trickle { seconds: 17 }],
        State::CleanMark => vec![Deed::Pause { seconds: 17 }],
        State::DirtyMark => vec![Deed::Pause { seconds: 12 }],
        State::MissedSet | State::DegradeMark | State::HistoryRenewed => vec![vanish],
        State::MissedCleared | State::InSyncMark | State::CatchUp => vec![vanish, Deed::Return],
        State::Rebuild => vec![vanish, Deed::Replace],
        State::CursorSaved => vec![vanish, Deed::Replace, Deed::Pause { seconds: 12 }],
        State::Configuration => vec![Deed::Resize],
        State::Copying => vec![Deed::ReplaceHealthy { slot }],
        State::Scrub => vec![Deed::Scrub { repair: true }],
        State::DataWrite
        | State::BetweenDataAndParity
        | State::BetweenCopies
        | State::LogLive
        | State::IntentSet
        | State::GenerationBump
        | State::FirstCopy
        | State::SecondCopy
        | State::Flush
        | State::Erase
        | State::Resync
        | State::StartReads
        | State::StartReplays
        | State::StartPublishes
        | State::LaneWritten => Vec::new(),
    }
}

fn draw_boot(random: &Random, config: &Config, is_last: bool) -> Boot {
    let requests = 30 + random.below(140);
    let mut deeds: Vec<(u64, Deed)> = (0..random.below(5))
        .map(|_| (random.below(requests), draw_deed(random, config)))
        .collect();
    let mut end = match random.below(20) {
        0..=8 => End::Kill,
        9..=18 => End::Power,
        _ => End::Stop,
    };
    let when = match random.below(10) {
        _ if is_last => When::Quiet,
        0..=3 => When::Events(1 + random.below(*random.of(&[60, 600, 3000]))),
        4..=8 => {
            let state = draw_aim(random, config);
            if state == State::LaneWritten {
                end = End::Power;
            }
            let slot = random.below(config.members.into()) as u16;
            let mut at = 0;
            for deed in ways_to(state, slot) {
                at += random.below((requests - at) / 2 + 1);
                deeds.push((at, deed));
            }
            let most = match RARE.contains(&state) {
                true => 3,
                false => *random.of(&[1, 2, 6, 30]),
            };
            When::Arises(state, 1 + random.below(most))
        }
        _ => When::Quiet,
    };
    deeds.sort_by_key(|deed| deed.0);
    let mut between = Vec::new();
    // The first has what others lack, where anything does.
    let slot = match random.percent(30) {
        true => 0,
        false => random.below(config.members.into()) as u16,
    };
    // What a log is for: power goes in the midst of a write, and a member with it.
    let is_written = matches!(
        when,
        When::Arises(
            State::DataWrite | State::BetweenDataAndParity | State::LaneWritten,
            _
        )
    );
    let loses = config.consistency.has_log() && is_written && random.percent(60);
    if loses {
        end = End::Power;
    }
    match random.below(20) {
        _ if loses => between.push(Between::Lose { slot }),
        0..=5 => between.push(Between::Lose { slot }),
        6..=11 => between.push(Between::Return),
        12..=13 => between.extend([Between::Return, Between::Lose { slot }]),
        14..=15 => between.push(Between::Older { slot }),
        16 => between.push(Between::Twin { slot }),
        _ => {}
    }
    Boot {
        requests,
        deeds,
        end: if is_last { End::Stop } else { end },
        when,
        between,
    }
}

/// In the end power goes while data is written, and a member with it, which comes back before much else was written: what its
/// log says is all that tells where it is behind.
fn return_from_a_write(random: &Random, config: &Config, boots: &mut [Boot]) {
    let [.., cut, last] = boots else { return };
    cut.deeds.clear();
    cut.when = When::Arises(State::DataWrite, 1 + random.below(150));
    cut.end = End::Power;
    let slot = random.below(config.members.into()) as u16;
    cut.between = vec![Between::Return, Between::Lose { slot }];
    last.requests = 2 + random.below(6);
    last.deeds = vec![(1, Deed::Return)];
}

/// A boot in which a member is rebuilt while another cannot read everything: nobody has all of it.
fn lose_blocks(random: &Random, config: &Config, boot: &mut Boot) {
    let members = u64::from(config.members);
    let slot = random.below(members);
    let other = (slot + 1 + random.below(members - 1)) % members;
    let third = boot.requests / 3;
    boot.deeds = vec![
        (third, Deed::FailByHand { slot: slot as u16 }),
        (
            third + 1,
            Deed::Media {
                slot: other as u16,
                sectors: 40,
            },
        ),
        (third + 2, Deed::Replace),
        (2 * third, Deed::Pause { seconds: 6 }),
    ];
    boot.when = When::Quiet;
}

impl Plan {
    /// What a seed draws.
    pub fn draw(seed: u64) -> Self {
        let random = Random::new(seed, 2);
        let config = draw_config(&random);
        let boots = 2 + random.index(BOOTS_MAX - 1);
        let mut boots: Vec<Boot> = (1..=boots)
            .map(|i| draw_boot(&random, &config, i == boots))
            .collect();
        for i in 1..boots.len() {
            // A start has something to write again if a process was killed while it wrote.
            if matches!(boots[i].when, When::Arises(State::StartReplays, _)) {
                boots[i - 1].end = End::Kill;
                boots[i - 1].when = When::Arises(State::DataWrite, 1 + random.below(200));
            }
        }
        if config.consistency.has_log() && random.percent(50) {
            return_from_a_write(&random, &config, &mut boots);
        }
        if config.is_reckless && config.level.is_redundant() && random.percent(70) {
            lose_blocks(&random, &config, &mut boots[0]);
        }
        Self {
            seed,
            config,
            boots,
            has_no_hole: false,
            is_loud: false,
        }
    }

    /// Parts that can be left out.
    pub fn parts(&self) -> usize {
        self.boots
            .iter()
            .map(|boot| 1 + boot.deeds.len() + boot.between.len())
            .sum()
    }

    /// The plan without those parts; a boot that is left out is one without a load and without an end of its own.
    #[must_use]
    pub fn without(&self, left_out: &[usize]) -> Self {
        let mut plan = self.clone();
        let mut number = 0;
        let mut is_kept = || {
            number += 1;
            !left_out.contains(&(number - 1))
        };
        let mut boots = Vec::new();
        let last = plan.boots.len() - 1;
        for (i, mut boot) in plan.boots.into_iter().enumerate() {
            let keeps = is_kept();
            boot.deeds.retain(|_| is_kept());
            boot.between.retain(|_| is_kept());
            if keeps || i == last {
                boots.push(boot);
            }
        }
        plan.boots = boots;
        plan
    }
}
