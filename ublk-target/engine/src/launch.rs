//! A group put together in memory, from what was made or found.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use lunar_api::SystemUuid;
use lunar_api::target::MemberState;

use crate::background::RATE_MIN;
use crate::bad_blocks::List;
use crate::config::GroupConfig;
use crate::geometry::Geometry;
use crate::growing::Shape;
use crate::inflight::InflightLog;
use crate::lanes::{Lane, Lanes};
use crate::limits::READ_ERRORS_MAX;
use crate::member::{META_BYTES, Member};
use crate::pool::{Pool, Quota};
use crate::raid_group::{Given, MemberPlace, Parts, RaidGroup, Rebuild};
use crate::regions::{Maps, MapsFound};
use crate::stripe_table::StripeTable;
use crate::superblock::{GroupRecord, Replacement};
use crate::sync::Waiters;
use crate::traits::Env;
use crate::view::Views;

/// What is left of the parts when the members are taken out.
pub(crate) struct Rest<E: Env> {
    pub system: SystemUuid,
    pub pool: Rc<Pool>,
    clock: E::Clock,
    front: E::Front,
    pub random: Box<dyn FnMut() -> [u8; 16]>,
}

/// Takes the members out of the parts.
pub(crate) fn split<E: Env>(parts: Parts<E>) -> (Vec<Given<E::Disk>>, Rest<E>) {
    let rest = Rest {
        system: parts.system,
        pool: parts.pool,
        clock: parts.clock,
        front: parts.front,
        random: parts.random,
    };
    (parts.members, rest)
}

/// A member that is there, and where its metadata lies.
pub(crate) type Slot<D> = Option<(Given<D>, MemberPlace)>;

/// Who is there.
pub(crate) struct Seated<D> {
    /// One a slot.
    pub slots: Vec<Slot<D>>,
    /// The disk that is filled to replace one of them.
    pub new: Option<(Slot<D>, Replacement)>,
}

/// What is known of the logs on the members.
#[derive(Debug, Default)]
pub(crate) struct LogsFound {
    /// Of the newest unit of the group.
    pub number: u64,
    /// The slot of each member's next unit.
    pub next: Vec<u64>,
}

/// What the members' metadata says of a group.
pub(crate) struct Said {
    pub geometry: Geometry,
    pub record: GroupRecord,
    pub config: GroupConfig,
    pub generation: u64,
    /// The bad-block lists, one a slot.
    pub bad: Vec<Option<List>>,
    /// Where it has them.
    pub maps: Option<MapsFound>,
    pub logs: LogsFound,
    /// A process of the group died here, and its in-flight log goes on.
    pub died: bool,
}

impl<E: Env> RaidGroup<E> {
    /// Puts a group together in memory. States are those of the record, but who is not there is not believed.
    pub(crate) async fn launch(rest: Rest<E>, said: Said, seated: Seated<E::Disk>) -> Rc<Self> {
        let Said {
            geometry,
            record,
            config,
            generation,
            maps,
            bad,
            logs,
            died,
        } = said;
        let has_bad = bad.iter().any(Option::is_some);
        let mut bad = bad.into_iter();
        let has_log = record.consistency.has_log();
        rest.pool.set_aside();
        let unit = geometry.stripe_on_member();
        let (mut in_sync, mut rebuild) = (0, None);
        let mut members = Vec::new();
        for (i, (slot, entry)) in (0u16..).zip(seated.slots.into_iter().zip(&record.members)) {
            let mut state = entry.state;
            let list = bad.next().flatten();
            match slot {
                Some((given, place)) => {
                    match state {
                        MemberState::InSync => in_sync |= 1 << i,
                        MemberState::Rebuilding => {
                            let done = entry.rebuilt_to / unit;
                            rebuild = Some(match entry.left_at {
                                0 => Rebuild::new(i, done),
                                _ => Rebuild::catching_up(i),
                            });
                        }
                        MemberState::Faulty | MemberState::Missing => {}
                    }
                    let meta = rest.pool.lease(Quota::Work, META_BYTES).await;
                    let member = Member::present(i, state, (given, place), meta);
                    if has_log {
                        let next = logs.next.get(usize::from(i)).copied().unwrap_or(0);
                        let pages = rest.pool.lease(Quota::Work, Lane::PAGES).await;
                        member.lane.replace(Some(Lane::new(pages, next)));
                    }
                    member.left_at.set(entry.left_at);
                    if let Some(list) = list {
                        member.bad.load(list);
                    }
                    members.push(Rc::new(member));
                }
                None => {
                    if state != MemberState::Faulty {
                        state = MemberState::Missing;
                    }
                    let path = format!("(was disk {})", entry.disk);
                    let member = Member::new(i, entry.disk, path, state);
                    member.left_at.set(entry.left_at);
                    member.bad.is_listed.set(entry.has_bad_blocks);
                    members.push(Rc::new(member));
                }
            }
        }
        let mut copied = None;
        if let Some((Some(seat), new)) = seated.new {
            let meta = rest.pool.lease(Quota::Work, META_BYTES).await;
            let member = Member::present(new.slot, MemberState::Rebuilding, seat, meta);
            copied = Some((Rc::new(member), new));
        }
        let synced = record.synced_to / unit;
        let log = InflightLog::start(&rest.pool, record.uuid, generation, died);
        let maps = maps.map(|found| Maps::new(&record, found));
        let lanes = Lanes::new(&record, &rest.pool, logs.number);
        let lus = config.lus.clone();
        let group = Rc::new(Self {
            id: record.uuid,
            system: rest.system,
            geometry: Shape::new(geometry),
            pool: rest.pool,
            clock: rest.clock,
            front: rest.front,
            random: RefCell::new(rest.random),
            members: RefCell::new(members),
            in_sync: Cell::new(in_sync),
            rebuild: Cell::new(rebuild),
            synced: Cell::new(synced),
            durable_synced: Cell::new(synced),
            durable_rebuild: Cell::new(rebuild.map_or(0, |rebuild| rebuild.done)),
            failed: Cell::new(false),
            has_bad: Cell::new(has_bad),
            is_listing: Cell::new(false),
            dirty: Cell::new(record.flags.dirty),
            dirty_durable: Cell::new(record.flags.dirty),
            durable_history: Cell::new(record.history),
            record: RefCell::new(record),
            rate_min: Cell::new(config.options.rebuild_min_bytes.unwrap_or(RATE_MIN)),
            rate_max: Cell::new(config.options.rebuild_max_bytes),
            read_errors_max: Cell::new(READ_ERRORS_MAX),
            scrub: RefCell::new(config.scrub.clone()),
            scrub_orders: Cell::new(0),
            scrub_found: RefCell::default(),
            scrub_rate: Cell::new(0),
            sync_retry: Cell::default(),
            config: RefCell::new(config),
            generation: Cell::new(generation),
            durable: Cell::new(generation),
            floor: Cell::new(0),
            publishing: Cell::new(false),
            configuring: Cell::new(false),
            changed: Waiters::default(),
            happened: Waiters::default(),
            lus: RefCell::default(),
            stripes: StripeTable::new(),
            maps,
            log,
            lanes,
            hung: RefCell::default(),
            kept: RefCell::default(),
            requests: Cell::new(0),
            active_writes: Cell::new(0),
            erasing: Cell::new(0),
            zeroing: RefCell::default(),
            plain_writes: Cell::new(0),
            copy_retry: Cell::default(),
            copying: RefCell::default(),
            copied_to: Cell::new(0),
            is_handed_over: Cell::new(false),
            turn: Cell::new(0),
            stopping: Cell::new(false),
            background_ended: Cell::new(false),
            sync_wanted: Cell::new(0),
            holes: RefCell::default(),
            sync_status: RefCell::default(),
            events: RefCell::default(),
            views: Views::new(),
        });
        for lu in &lus {
            group.add_lu(lu);
        }
        if let Some((member, new)) = copied {
            let first = group.geometry.stripes_of(new.slot).start;
            group.begin_copy(new.slot, member, first + new.copied_to / unit);
        }
        group
    }
}
