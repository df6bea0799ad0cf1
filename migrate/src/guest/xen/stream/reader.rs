//! Reading a stream.

use super::record::RecordType;
use super::state::{DomainKind, GuestState, GuestStateBuilder, StaticData};
use super::{
    Framing, LIBXC_IDENT, LIBXC_MARKER, LIBXC_VERSION, LIBXL_EMULATOR_CONTEXT,
    LIBXL_EMULATOR_XENSTORE_DATA, LIBXL_END, LIBXL_IDENT, LIBXL_LIBXC_CONTEXT, LIBXL_VERSION,
    MAX_RECORD, OPTIONAL, PAGE_SHIFT, StreamError, TYPE_HVM, TYPE_PV, padding,
};
use crate::bytes::Bytes;
use crate::pages::{Page, PageType, Pfn};
use std::fmt;
use std::io::{self, Read};

/// How much is read ahead of what has arrived of a record.
const READ_STEP: usize = 1 << 20;

/// The first bytes of a file of `xl save`.
const XL_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
const XL_BYTE_ORDER: u32 = 0x0102_0304;
/// `XL_MANDATORY_FLAG_STREAMv2`.
const XL_STREAM_V2: u32 = 1 << 1;
/// The most bytes of the configuration in such a file.
const MAX_XL_DATA: u32 = 16 << 20;

/// Reads a stream of a plain save (no checkpoints, no verify pass), and checks the order of its
/// records as the stock restorer does, and more: nothing unknown passes.
///
/// ```no_run
/// # use migrate::guest::xen::stream::{Framing, MemoryRecord, StreamError, StreamReader};
/// # fn main() -> Result<(), StreamError> {
/// let file = std::fs::File::open("image")?;
/// let mut reader = StreamReader::open(file, Framing::Libxl, 1 << 20)?;
/// while let Some(record) = reader.read()? {
///     match record {
///         MemoryRecord::P2mFrames { .. } => {}
///         MemoryRecord::Pages(pages) => drop(pages.iter().count()),
///     }
/// }
/// let state = reader.finish()?;
/// # let _ = state;
/// # Ok(())
/// # }
/// ```
pub struct StreamReader<R> {
    from: R,
    framing: Framing,
    data: StaticData,
    limit: u64,
    /// One more than the highest pfn that may come.
    pages: u64,
    state: GuestStateBuilder,
    body: Vec<u8>,
    entries: Vec<(Pfn, PageType)>,
    has_state: bool,
    ended: bool,
}

/// What a stream says about memory.
#[derive(Debug)]
pub enum MemoryRecord<'a> {
    /// Where the p2m is.
    P2mFrames {
        /// The first pfn that is described.
        start: Pfn,
        /// The last pfn that is described.
        end: Pfn,
        /// The pfns of the frames from that of `start` to that of `end`.
        frames: Vec<Pfn>,
    },
    /// Pages.
    Pages(PageEntries<'a>),
}

/// The pages of a record.
#[derive(Clone, Copy)]
pub struct PageEntries<'a> {
    entries: &'a [(Pfn, PageType)],
    contents: &'a [Page],
}

impl<'a> PageEntries<'a> {
    /// How many pages there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none. A record always has some.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The pages as they come, each with its content if its type has one.
    pub fn iter(&self) -> impl Iterator<Item = (Pfn, PageType, Option<&'a Page>)> + use<'a> {
        let mut contents = self.contents.iter();
        self.entries.iter().map(move |(pfn, page_type)| {
            let content = if page_type.has_data() {
                contents.next()
            } else {
                None
            };
            (*pfn, *page_type, content)
        })
    }
}

impl fmt::Debug for PageEntries<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageEntries({})", self.entries.len())
    }
}

impl<R: Read> StreamReader<R> {
    /// Reads the headers and the static data of a stream for a guest of at most `limit` pages.
    ///
    /// # Errors
    /// Fails when reading does, and when what comes is not the beginning of such a stream.
    pub fn open(mut from: R, framing: Framing, limit: u64) -> Result<Self, StreamError> {
        if framing == Framing::XlSave {
            skip_xl_header(&mut from)?;
        }
        if framing != Framing::Libxc {
            read_libxl_header(&mut from)?;
        }
        let (is_hvm, xen_version) = read_libxc_headers(&mut from)?;
        let data = StaticData {
            kind: if is_hvm {
                DomainKind::Hvm
            } else {
                DomainKind::Pv64
            },
            xen_version,
            cpuid_policy: Vec::new(),
            msr_policy: Vec::new(),
        };
        let mut reader = Self {
            from,
            framing,
            data,
            limit,
            pages: if is_hvm { limit } else { 0 },
            state: GuestStateBuilder::new(),
            body: Vec::new(),
            entries: Vec::new(),
            has_state: false,
            ended: false,
        };
        reader.read_static_data(is_hvm)?;
        Ok(reader)
    }

    /// What never changes.
    pub const fn static_data(&self) -> &StaticData {
        &self.data
    }

    /// The next record about memory, or nothing once all of the stream has been read.
    ///
    /// # Errors
    /// Fails when reading does, and on a record that is unknown, malformed or out of order.
    pub fn read(&mut self) -> Result<Option<MemoryRecord<'_>>, StreamError> {
        while !self.ended {
            let record = self.read_record()?;
            match record {
                RecordType::End => {
                    self.ended = true;
                    if self.framing != Framing::Libxc {
                        self.read_libxl_end()?;
                    }
                }
                RecordType::PageData | RecordType::X86PvP2mFrames if self.has_state => {
                    return Err(StreamError::OutOfOrder(record));
                }
                RecordType::PageData => {
                    let contents = self.check_pages()?;
                    let (contents, _) = self.body[contents..].as_chunks();
                    let pages = PageEntries {
                        entries: &self.entries,
                        contents,
                    };
                    return Ok(Some(MemoryRecord::Pages(pages)));
                }
                RecordType::X86PvP2mFrames => return self.p2m_frames().map(Some),
                RecordType::X86PvInfo
                | RecordType::X86CpuidPolicy
                | RecordType::X86MsrPolicy
                | RecordType::StaticDataEnd => return Err(StreamError::OutOfOrder(record)),
                RecordType::Toolstack
                | RecordType::Verify
                | RecordType::Checkpoint
                | RecordType::CheckpointDirtyPfnList => {
                    return Err(StreamError::Unsupported(record.number()));
                }
                _ => {
                    self.state.add(record, &self.body)?;
                    // The stock saver writes these when all memory is written.
                    self.has_state = true;
                }
            }
        }
        Ok(None)
    }

    /// What the guest is besides its memory. Records that have not been read are skipped.
    ///
    /// # Errors
    /// Fails as [`read`](Self::read), and when the state does not hold together.
    pub fn finish(mut self) -> Result<GuestState, StreamError> {
        while self.read()?.is_some() {}
        Ok(self.state.finish(self.data.kind)?)
    }

    fn read_static_data(&mut self, is_hvm: bool) -> Result<(), StreamError> {
        let mut has_info = is_hvm;
        loop {
            let record = self.read_record()?;
            match record {
                RecordType::X86PvInfo if !has_info => {
                    self.data.kind = match self.body.as_slice() {
                        [8, 4, _, _, _, _, _, _] => DomainKind::Pv64,
                        [4, 3, _, _, _, _, _, _] => DomainKind::Pv32,
                        _ => return Err(StreamError::Malformed(record)),
                    };
                    has_info = true;
                }
                RecordType::X86CpuidPolicy if self.data.cpuid_policy.is_empty() => {
                    self.data.cpuid_policy.clone_from(&self.body);
                }
                RecordType::X86MsrPolicy if self.data.msr_policy.is_empty() => {
                    self.data.msr_policy.clone_from(&self.body);
                }
                RecordType::StaticDataEnd if has_info => {
                    self.expect_empty(record)?;
                    self.data.check()?;
                    return Ok(());
                }
                _ => return Err(StreamError::OutOfOrder(record)),
            }
        }
    }

    fn p2m_frames(&mut self) -> Result<MemoryRecord<'_>, StreamError> {
        let record = RecordType::X86PvP2mFrames;
        let per_frame = self
            .data
            .kind
            .pfns_per_frame()
            .ok_or(StreamError::OutOfOrder(record))?;
        let malformed = StreamError::malformed(record);
        let mut from = Bytes::new(&self.body);
        let start: Pfn = from.u32().map_err(&malformed)?.into();
        let end: Pfn = from.u32().map_err(&malformed)?.into();
        let (frames, left) = from.rest().as_chunks::<8>();
        let expected = (end / per_frame + 1).checked_sub(start / per_frame);
        if start > end || !left.is_empty() || expected != Some(frames.len() as u64) {
            return Err(StreamError::Malformed(record));
        }
        if end >= self.limit {
            return Err(StreamError::OutsideMemory(end));
        }
        self.pages = self.pages.max(end + 1);
        let frames = frames.iter().copied().map(Pfn::from_le_bytes).collect();
        Ok(MemoryRecord::P2mFrames { start, end, frames })
    }

    /// Fills `entries`, and returns where in the body the contents begin.
    fn check_pages(&mut self) -> Result<usize, StreamError> {
        let record = RecordType::PageData;
        let malformed = StreamError::malformed(record);
        let mut from = Bytes::new(&self.body);
        let count = from.u32().map_err(&malformed)? as usize;
        from.u32().map_err(&malformed)?;
        if count == 0 {
            return Err(StreamError::PageCount(0));
        }
        let size = count.checked_mul(8).ok_or(StreamError::PageCount(count))?;
        let (entries, _) = from.take(size).map_err(&malformed)?.as_chunks();
        self.entries.clear();
        let mut with_data = 0;
        for entry in entries {
            let entry = u64::from_le_bytes(*entry);
            let page_type = PageType::from_stream_entry(entry)?;
            let pfn = entry & ((1 << 52) - 1);
            if pfn >= self.pages {
                return Err(StreamError::OutsideMemory(pfn));
            }
            with_data += usize::from(page_type.has_data());
            self.entries.push((pfn, page_type));
        }
        if from.rest().len() != with_data * size_of::<Page>() {
            return Err(StreamError::Malformed(record));
        }
        Ok(self.body.len() - from.rest().len())
    }

    /// Reads a record's body into `body`. Optional records that are unknown are skipped.
    fn read_record(&mut self) -> Result<RecordType, StreamError> {
        loop {
            let (number, length) = read_record_header(&mut self.from)?;
            if length > MAX_RECORD {
                return Err(StreamError::TooLong(number, length));
            }
            self.read_body(length as usize)?;
            if let Some(record) = RecordType::from_number(number) {
                if record == RecordType::End {
                    self.expect_empty(record)?;
                }
                return Ok(record);
            }
            if number & OPTIONAL == 0 {
                return Err(StreamError::Unsupported(number));
            }
        }
    }

    fn read_body(&mut self, length: usize) -> Result<(), StreamError> {
        self.body.clear();
        while self.body.len() < length {
            let start = self.body.len();
            self.body.resize(length.min(start + READ_STEP), 0);
            read_exact(&mut self.from, &mut self.body[start..])?;
        }
        read_exact(&mut self.from, &mut [0; 8][..padding(length)])
    }

    fn expect_empty(&self, record: RecordType) -> Result<(), StreamError> {
        if self.body.is_empty() {
            Ok(())
        } else {
            Err(StreamError::Malformed(record))
        }
    }

    fn read_libxl_end(&mut self) -> Result<(), StreamError> {
        loop {
            let (number, length) = read_record_header(&mut self.from)?;
            match number {
                LIBXL_END if length == 0 => return Ok(()),
                LIBXL_EMULATOR_XENSTORE_DATA | LIBXL_EMULATOR_CONTEXT
                    if self.data.kind == DomainKind::Hvm =>
                {
                    let length = u64::from(length) + padding(length as usize) as u64;
                    let skipped = io::copy(&mut (&mut self.from).take(length), &mut io::sink())?;
                    if skipped != length {
                        return Err(StreamError::Truncated);
                    }
                }
                _ => return Err(StreamError::Unsupported(number)),
            }
        }
    }
}

impl<R> fmt::Debug for StreamReader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamReader")
            .field("data", &self.data)
            .finish_non_exhaustive()
    }
}

fn read_exact(from: &mut impl Read, to: &mut [u8]) -> Result<(), StreamError> {
    from.read_exact(to).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => StreamError::Truncated,
        _ => StreamError::Io(error),
    })
}

fn read_array<const N: usize>(from: &mut impl Read) -> Result<[u8; N], StreamError> {
    let mut bytes = [0; N];
    read_exact(from, &mut bytes)?;
    Ok(bytes)
}

fn read_le32(from: &mut impl Read) -> Result<u32, StreamError> {
    read_array(from).map(u32::from_le_bytes)
}

fn read_be32(from: &mut impl Read) -> Result<u32, StreamError> {
    read_array(from).map(u32::from_be_bytes)
}

fn read_be64(from: &mut impl Read) -> Result<u64, StreamError> {
    read_array(from).map(u64::from_be_bytes)
}

fn read_record_header(from: &mut impl Read) -> Result<(u32, u32), StreamError> {
    Ok((read_le32(from)?, read_le32(from)?))
}

fn skip_xl_header(from: &mut impl Read) -> Result<(), StreamError> {
    if &read_array(from)? != XL_MAGIC {
        return Err(StreamError::Foreign("no file of xl save"));
    }
    if read_le32(from)? != XL_BYTE_ORDER {
        return Err(StreamError::Foreign("a file of another byte order"));
    }
    if read_le32(from)? & XL_STREAM_V2 == 0 {
        return Err(StreamError::Foreign("a file of an old format"));
    }
    read_le32(from)?;
    let length = read_le32(from)?;
    if length > MAX_XL_DATA {
        return Err(StreamError::Foreign("a configuration that is too long"));
    }
    let skipped = io::copy(&mut from.take(length.into()), &mut io::sink())?;
    if skipped == u64::from(length) {
        Ok(())
    } else {
        Err(StreamError::Truncated)
    }
}

fn read_libxl_header(from: &mut impl Read) -> Result<(), StreamError> {
    if read_be64(from)? != LIBXL_IDENT {
        return Err(StreamError::Foreign("no libxl stream"));
    }
    if read_be32(from)? != LIBXL_VERSION {
        return Err(StreamError::Foreign("another version of libxl's stream"));
    }
    if read_be32(from)? != 0 {
        return Err(StreamError::Foreign("a big-endian or legacy libxl stream"));
    }
    if read_record_header(from)? != (LIBXL_LIBXC_CONTEXT, 0) {
        return Err(StreamError::Foreign("a libxl stream without a libxc image"));
    }
    Ok(())
}

/// Whether the guest is an HVM guest, and the version of its Xen.
fn read_libxc_headers(from: &mut impl Read) -> Result<(bool, (u32, u32)), StreamError> {
    if read_be64(from)? != LIBXC_MARKER || read_be32(from)? != LIBXC_IDENT {
        return Err(StreamError::Foreign("no libxc image"));
    }
    if read_be32(from)? != LIBXC_VERSION {
        return Err(StreamError::Foreign("another version of libxc's image"));
    }
    let [high, low, ..] = read_array::<8>(from)?;
    if u16::from_be_bytes([high, low]) & 1 != 0 {
        return Err(StreamError::Foreign("a big-endian libxc image"));
    }
    let is_hvm = match read_le32(from)? {
        TYPE_PV => false,
        TYPE_HVM => true,
        _ => return Err(StreamError::Foreign("a guest of unknown type")),
    };
    let [low, high, ..] = read_array::<4>(from)?;
    if u16::from_le_bytes([low, high]) != PAGE_SHIFT {
        return Err(StreamError::Foreign("a guest with pages of another size"));
    }
    Ok((is_hvm, (read_le32(from)?, read_le32(from)?)))
}
