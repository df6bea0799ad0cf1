//! Memory for the contents of many pages.
//!
//! ```text
//!   piece 0   [ ][ ][ ] ... [ ]     256 pages each, made when the others are full
//!   piece 1   [ ][ ][ ] ... [ ]
//!   free      places that were given back
//! ```
//!
//! A piece is asked of the kernel whole, with its memory: a page fault for each page costs more than
//! to fill it, most of all in a paravirtualised dom0. And it is given back whole, apart from all else
//! that is allocated and freed meanwhile.

use crate::pages::{PAGE_SIZE, Page};
use memmap2::{MmapMut, MmapOptions};

/// Pages in a piece.
const PIECE: usize = 256;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place(u32);

#[derive(Debug, Default)]
pub(super) struct PageStore {
    pieces: Vec<MmapMut>,
    /// Places that were given out, those that came back among them.
    used: usize,
    free: Vec<Place>,
}

impl PageStore {
    /// Stores a page. None where there is no memory for it.
    pub(super) fn put(&mut self, content: &Page) -> Option<Place> {
        let place = match self.free.pop() {
            Some(place) => place,
            None => self.grow()?,
        };
        self.set(place, content);
        Some(place)
    }

    fn grow(&mut self) -> Option<Place> {
        let place = Place(u32::try_from(self.used).ok()?);
        if self.used == self.pieces.len() * PIECE {
            let piece = MmapOptions::new()
                .len(PIECE * PAGE_SIZE)
                .populate()
                .map_anon();
            self.pieces.push(piece.ok()?);
        }
        self.used += 1;
        Some(place)
    }

    /// What is at a place that was given out.
    pub(super) fn get(&self, place: Place) -> Option<&Page> {
        let place = place.0 as usize;
        let piece = self.pieces.get(place / PIECE)?;
        piece.as_chunks::<PAGE_SIZE>().0.get(place % PIECE)
    }

    /// Puts another content there.
    pub(super) fn set(&mut self, place: Place, content: &Page) {
        let place = place.0 as usize;
        let piece = self.pieces.get_mut(place / PIECE);
        if let Some(page) = piece.and_then(|piece| {
            let (pages, _) = piece.as_chunks_mut::<PAGE_SIZE>();
            pages.get_mut(place % PIECE)
        }) {
            *page = *content;
        }
    }

    /// The place can be given out anew.
    pub(super) fn free(&mut self, place: Place) {
        self.free.push(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_where_they_are_and_places_are_used_again() {
        let mut store = PageStore::default();
        let page = |at: usize| [at as u8; PAGE_SIZE];
        let places: Vec<Place> = (0..PIECE + 2)
            .map(|at| store.put(&page(at)).unwrap())
            .collect();
        assert_eq!(store.pieces.len(), 2);
        for (at, place) in places.iter().enumerate() {
            assert_eq!(store.get(*place), Some(&page(at)));
        }
        store.free(places[3]);
        assert_eq!(store.put(&page(77)), Some(places[3]));
        assert_eq!(store.get(places[3]), Some(&page(77)));
        assert_eq!(store.get(places[4]), Some(&page(4)));
        assert_eq!(store.get(Place(PIECE as u32 * 2)), None);
    }
}
