//! Which write each place may show after cuts.
//!
//! The last durable one, or one that was begun later; nothing else.

use super::witness::{Kind, Record, Step};

/// A place: a sector, a file, a LU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub durable: u64,
    /// Begun after that, in order.
    pub later: Vec<u64>,
}

impl Place {
    pub(super) fn may_show(&self, seq: u64) -> bool {
        seq == self.durable || self.later.contains(&seq)
    }

    /// Says what it may show.
    pub(super) fn says(&self) -> String {
        format!("{:x} or of {:x?}", self.durable, self.later)
    }
}

/// Takes in what one writer reported between its start and the cut, of places of one kind.
pub(super) fn replay(places: &mut [Place], kind: Kind, records: &[Record]) {
    let mut acknowledged: Vec<Record> = Vec::new();
    for record in records.iter().filter(|record| record.kind == kind) {
        match record.step {
            Step::Begun => {
                for place in of(places, record) {
                    place.later.push(record.seq);
                }
            }
            Step::Done => acknowledged.push(*record),
            Step::Durable => settle(places, record),
            Step::Flushed => {
                for record in acknowledged.drain(..) {
                    settle(places, &record);
                }
            }
        }
    }
}

fn of<'a>(places: &'a mut [Place], record: &Record) -> impl Iterator<Item = &'a mut Place> {
    let first = usize::try_from(record.first).expect("an index");
    places.iter_mut().skip(first).take(record.count as usize)
}

fn settle(places: &mut [Place], record: &Record) {
    for place in of(places, record) {
        place.durable = place.durable.max(record.seq);
        let durable = place.durable;
        place.later.retain(|seq| *seq > durable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: Step, first: u64, count: u32, seq: u64) -> Record {
        Record {
            step,
            kind: Kind::Sector,
            first,
            count,
            seq,
        }
    }

    #[test]
    fn durable_is_what_a_flush_or_fua_covers() {
        let mut places = vec![Place::default(); 3];
        let records = [
            record(Step::Begun, 0, 2, 1),
            record(Step::Done, 0, 2, 1),
            record(Step::Begun, 1, 2, 2),
            record(Step::Durable, 1, 2, 2),
            record(Step::Begun, 0, 1, 3),
        ];
        replay(&mut places, Kind::Sector, &records);
        assert_eq!((places[0].durable, &places[0].later[..]), (0, &[1, 3][..]));
        let settled = Place {
            durable: 2,
            later: Vec::new(),
        };
        assert_eq!(places[1..], [settled.clone(), settled]);
        assert!(!places[1].may_show(1) && places[0].may_show(3));
        // A flush covers what was acknowledged before it; the acknowledgement of another life does not count.
        replay(&mut places, Kind::Sector, &[record(Step::Flushed, 0, 0, 0)]);
        assert_eq!(places[0].durable, 0);
        let records = [
            record(Step::Begun, 0, 1, 4),
            record(Step::Done, 0, 1, 4),
            record(Step::Begun, 0, 1, 5),
            record(Step::Flushed, 0, 0, 0),
        ];
        replay(&mut places, Kind::Sector, &records);
        assert_eq!((places[0].durable, &places[0].later[..]), (4, &[5][..]));
    }

    #[test]
    fn other_kinds_are_left_alone() {
        let mut places = vec![Place::default(); 1];
        let mut begun = record(Step::Begun, 0, 1, 1);
        begun.kind = Kind::Lu;
        replay(&mut places, Kind::Sector, &[begun]);
        assert_eq!(places[0], Place::default());
    }
}
