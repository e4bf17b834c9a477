//! The bytes of a disk, sparse: pages that were written, and one byte everywhere else.

const PAGE: u64 = 64 << 10;

/// What a page holds.
#[derive(Debug, Clone)]
enum Page {
    Fill(u8),
    Data(Box<[u8]>),
}

/// The bytes of a range.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// All the same.
    Fill(u8),
    Data(Box<[u8]>),
}

impl Bytes {
    /// Of these; all the same takes no room.
    pub fn of(bytes: &[u8]) -> Self {
        match is_uniform(bytes) {
            true => Self::Fill(bytes.first().copied().unwrap_or(0)),
            false => Self::Data(bytes.into()),
        }
    }

    /// Writes a part of them, from `at` on, to `to`.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) {
        match self {
            Self::Fill(byte) => to.fill(*byte),
            Self::Data(bytes) => to.copy_from_slice(&bytes[at..at + to.len()]),
        }
    }
}

fn is_uniform(bytes: &[u8]) -> bool {
    bytes
        .split_first()
        .is_none_or(|(first, rest)| rest == &bytes[..rest.len()] && *first == bytes[0])
}

/// The bytes of a disk.
#[derive(Debug, Clone)]
pub struct Pages {
    len: u64,
    pages: Vec<Page>,
}

/// The parts of a range that lie in one page: the page, where in it, how many bytes, and where in the range.
fn parts(at: u64, len: u64) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let from = (at + done) % PAGE;
        let n = (len - done).min(PAGE - from);
        let part = (
            ((at + done) / PAGE) as usize,
            from as usize,
            n as usize,
            done as usize,
        );
        done += n;
        (n > 0).then_some(part)
    })
}

impl Pages {
    pub fn new(len: u64, fill: u8) -> Self {
        let pages = vec![Page::Fill(fill); len.div_ceil(PAGE) as usize];
        Self { len, pages }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Says whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn read(&self, at: u64, to: &mut [u8]) {
        for (page, from, n, done) in parts(at, to.len() as u64) {
            let to = &mut to[done..done + n];
            match &self.pages[page] {
                Page::Fill(byte) => to.fill(*byte),
                Page::Data(bytes) => to.copy_from_slice(&bytes[from..from + n]),
            }
        }
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        for (page, from, n, done) in parts(at, bytes.len() as u64) {
            let bytes = &bytes[done..done + n];
            let place = &mut self.pages[page];
            if let Page::Fill(byte) = place {
                let byte = *byte;
                if bytes[0] == byte && is_uniform(bytes) {
                    continue;
                }
                *place = Page::Data(vec![byte; PAGE as usize].into());
            }
            if let Page::Data(page) = place {
                page[from..from + n].copy_from_slice(bytes);
            }
        }
    }

    pub fn fill(&mut self, at: u64, len: u64, byte: u8) {
        for (page, from, n, _) in parts(at, len) {
            let place = &mut self.pages[page];
            match place {
                _ if n as u64 == PAGE => *place = Page::Fill(byte),
                Page::Fill(is) if *is == byte => {}
                Page::Fill(is) => {
                    let mut data = vec![*is; PAGE as usize];
                    data[from..from + n].fill(byte);
                    *place = Page::Data(data.into());
                }
                Page::Data(data) => data[from..from + n].fill(byte),
            }
        }
    }

    /// What is in a range.
    pub fn get(&self, at: u64, len: u64) -> Bytes {
        let mut filled = None;
        for (page, ..) in parts(at, len) {
            match (&self.pages[page], filled) {
                (Page::Fill(byte), None) => filled = Some(*byte),
                (Page::Fill(byte), Some(before)) if *byte == before => {}
                _ => {
                    let mut bytes = vec![0; len as usize];
                    self.read(at, &mut bytes);
                    return Bytes::Data(bytes.into());
                }
            }
        }
        Bytes::Fill(filled.unwrap_or(0))
    }

    /// Puts into a range what is in `bytes` from `skip` on.
    pub fn put(&mut self, at: u64, len: u64, bytes: &Bytes, skip: u64) {
        match bytes {
            Bytes::Fill(byte) => self.fill(at, len, *byte),
            Bytes::Data(bytes) => {
                self.write(at, &bytes[skip as usize..(skip + len) as usize]);
            }
        }
    }
}
