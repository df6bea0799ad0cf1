//! Writing a stream.

use super::record::RecordType;
use super::state::{DomainKind, GuestState, StaticData};
use super::{
    Framing, LIBXC_IDENT, LIBXC_MARKER, LIBXC_VERSION, LIBXL_END, LIBXL_IDENT, LIBXL_LIBXC_CONTEXT,
    LIBXL_VERSION, MAX_RECORD_PAGES, PAGE_SHIFT, StreamError, TYPE_HVM, TYPE_PV, padding,
};
use crate::bytes::write_all_vectored;
use crate::pages::{MAX_PAGES, PAGE_SIZE, Page, PageType, Pfn};
use std::fmt;
use std::io::{IoSlice, Write};

/// Writes a stream in the order that restoring asks for: what never changes comes by
/// [`begin`](Self::begin), memory by [`p2m_frames`](Self::p2m_frames) and [`pages`](Self::pages)
/// as often as it takes, and the rest by [`finish`](Self::finish), which ends the stream. A stream
/// that is dropped before has no end, and its restore fails.
pub struct StreamWriter<W> {
    to: W,
    framing: Framing,
    kind: DomainKind,
    /// One more than the highest pfn that may come.
    pages: u64,
    written: u64,
}

/// A page for [`StreamWriter::pages`].
#[derive(Clone, Copy)]
pub struct StreamPage<'a> {
    /// Its number.
    pub pfn: Pfn,
    /// Its type.
    pub page_type: PageType,
    /// Its normalised content; there must be one exactly if the type has data.
    pub content: Option<&'a Page>,
}

/// Does not show the content: it is a guest's memory.
impl fmt::Debug for StreamPage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamPage({:#x} {})", self.pfn, self.page_type)
    }
}

impl<W: Write> StreamWriter<W> {
    /// Writes the headers and the static data.
    ///
    /// # Errors
    /// Fails when writing does, when the static data are malformed, and for a framing that can
    /// only be read.
    pub fn begin(to: W, framing: Framing, data: &StaticData) -> Result<Self, StreamError> {
        data.check()?;
        let mut start = Vec::new();
        match framing {
            Framing::Libxc => {}
            Framing::Libxl => {
                start.extend(LIBXL_IDENT.to_be_bytes());
                start.extend(LIBXL_VERSION.to_be_bytes());
                start.extend([0; 4]);
                start.extend(LIBXL_LIBXC_CONTEXT.to_le_bytes());
                start.extend([0; 4]);
            }
            Framing::XlSave => return Err(StreamError::Foreign("xl's files are not written")),
        }
        start.extend(LIBXC_MARKER.to_be_bytes());
        start.extend(LIBXC_IDENT.to_be_bytes());
        start.extend(LIBXC_VERSION.to_be_bytes());
        start.extend([0; 8]);
        let domain_type = if data.kind == DomainKind::Hvm {
            TYPE_HVM
        } else {
            TYPE_PV
        };
        start.extend(domain_type.to_le_bytes());
        start.extend(PAGE_SHIFT.to_le_bytes());
        start.extend([0; 2]);
        start.extend(data.xen_version.0.to_le_bytes());
        start.extend(data.xen_version.1.to_le_bytes());

        let pages = if data.kind == DomainKind::Hvm {
            MAX_PAGES
        } else {
            0
        };
        let mut writer = Self {
            to,
            framing,
            kind: data.kind,
            pages,
            written: 0,
        };
        writer.write(&mut [IoSlice::new(&start)])?;
        if let Some((width, levels)) = data.kind.width_and_levels() {
            writer.record(
                RecordType::X86PvInfo,
                &[width, levels, 0, 0, 0, 0, 0, 0],
                &[],
            )?;
        }
        for (record, policy) in [
            (RecordType::X86CpuidPolicy, &data.cpuid_policy),
            (RecordType::X86MsrPolicy, &data.msr_policy),
        ] {
            if !policy.is_empty() {
                writer.record(record, policy, &[])?;
            }
        }
        writer.record(RecordType::StaticDataEnd, &[], &[])?;
        Ok(writer)
    }

    /// Bytes that have been written so far.
    pub const fn written(&self) -> u64 {
        self.written
    }

    /// The writer beneath.
    pub const fn get_ref(&self) -> &W {
        &self.to
    }

    /// Writes where a PV guest's p2m is: the pfns of the frames that hold the entries 0 to
    /// `max_pfn`. It may come again.
    ///
    /// # Errors
    /// Fails when writing does, for a guest that has no p2m, and when the number of frames is not
    /// what `max_pfn` asks for.
    pub fn p2m_frames(&mut self, max_pfn: Pfn, frames: &[Pfn]) -> Result<(), StreamError> {
        let record = RecordType::X86PvP2mFrames;
        let per_frame = self
            .kind
            .pfns_per_frame()
            .ok_or(StreamError::OutOfOrder(record))?;
        let end = u32::try_from(max_pfn).map_err(|_| StreamError::OutsideMemory(max_pfn))?;
        if max_pfn >= MAX_PAGES {
            return Err(StreamError::OutsideMemory(max_pfn));
        }
        if frames.len() as u64 != max_pfn / per_frame + 1 {
            return Err(StreamError::Malformed(record));
        }
        let mut body = Vec::with_capacity(8 + frames.len() * 8);
        body.extend(0u32.to_le_bytes());
        body.extend(end.to_le_bytes());
        frames.iter().for_each(|pfn| body.extend(pfn.to_le_bytes()));
        // The restorer's memory only ever grows.
        self.pages = self.pages.max(max_pfn + 1);
        self.record(record, &body, &[])
    }

    /// Writes up to 1,024 pages as one record, without copying their content. Writes nothing for
    /// no pages.
    ///
    /// # Errors
    /// Fails when writing does, for too many pages, for a page that no p2m frames before made
    /// room for, and for one whose content does not fit its type.
    pub fn pages(&mut self, pages: &[StreamPage<'_>]) -> Result<(), StreamError> {
        if pages.is_empty() {
            return Ok(());
        }
        if pages.len() > MAX_RECORD_PAGES {
            return Err(StreamError::PageCount(pages.len()));
        }
        let mut head = Vec::with_capacity(16 + pages.len() * 8);
        head.extend(RecordType::PageData.number().to_le_bytes());
        head.extend([0; 4]);
        // 1,024 at most.
        head.extend((pages.len() as u64).to_le_bytes());
        for page in pages {
            if page.pfn >= self.pages {
                return Err(StreamError::OutsideMemory(page.pfn));
            }
            if page.page_type.has_data() != page.content.is_some() {
                return Err(StreamError::Content(page.pfn, page.page_type));
            }
            head.extend(page.page_type.stream_entry(page.pfn).to_le_bytes());
        }
        let contents = pages.iter().filter_map(|page| page.content);
        let length = head.len() - 8 + contents.clone().count() * PAGE_SIZE;
        // Some 4 MiB at most. Every part of it is a multiple of 8 bytes, so nothing pads it.
        head[4..8].copy_from_slice(&(length as u32).to_le_bytes());

        let mut slices = Vec::with_capacity(1 + pages.len());
        slices.push(IoSlice::new(&head));
        slices.extend(contents.map(|content| IoSlice::new(content)));
        self.write(&mut slices)
    }

    /// Writes what the guest is besides its memory, ends the stream, and flushes.
    ///
    /// # Errors
    /// Fails when writing does, and when the state is malformed or another kind of guest's; then
    /// the stream has no end.
    pub fn finish(mut self, state: &GuestState) -> Result<W, StreamError> {
        let is_hvm = matches!(state, GuestState::Hvm(_));
        if is_hvm != (self.kind == DomainKind::Hvm) {
            let stranger = if is_hvm {
                RecordType::HvmContext
            } else {
                RecordType::SharedInfo
            };
            return Err(StreamError::OutOfOrder(stranger));
        }
        if self.pages == 0 {
            return Err(StreamError::OutOfOrder(RecordType::End));
        }
        state.write_records(|record, head, body| self.record(record, head, body))?;
        self.record(RecordType::End, &[], &[])?;
        if self.framing == Framing::Libxl {
            let mut end = [0; 8];
            end[..4].copy_from_slice(&LIBXL_END.to_le_bytes());
            self.write(&mut [IoSlice::new(&end)])?;
        }
        self.to.flush()?;
        Ok(self.to)
    }

    fn record(&mut self, record: RecordType, head: &[u8], body: &[u8]) -> Result<(), StreamError> {
        let length = head.len() + body.len();
        let mut header = [0; 8];
        header[..4].copy_from_slice(&record.number().to_le_bytes());
        // What is written here was checked: 16 MiB at most.
        header[4..].copy_from_slice(&(length as u32).to_le_bytes());
        self.write(&mut [
            IoSlice::new(&header),
            IoSlice::new(head),
            IoSlice::new(body),
            IoSlice::new(&[0; 8][..padding(length)]),
        ])
    }

    fn write(&mut self, slices: &mut [IoSlice<'_>]) -> Result<(), StreamError> {
        let length: usize = slices.iter().map(|slice| slice.len()).sum();
        write_all_vectored(&mut self.to, slices)?;
        self.written += length as u64;
        Ok(())
    }
}

impl<W> fmt::Debug for StreamWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamWriter")
            .field("kind", &self.kind)
            .field("written", &self.written)
            .finish_non_exhaustive()
    }
}
