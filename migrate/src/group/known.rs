//! What the destination holds of other guests of the group, as the source knows it.

use std::collections::HashMap;
use std::fmt;

use super::{ContentName, Group, MAX_LIBRARY, NAME_SIZE, Names, Witness};
use crate::pages::Page;

/// Finds contents among those that the destination shares.
pub struct Known {
    names: Names,
    /// Made of random bits, as the key makes them; but it is the peer who says what they are.
    places: HashMap<ContentName, u32>,
    total: u64,
    received: u64,
}

/// Names that are not those that were announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Names of shared contents are not those that were announced")]
pub struct BadNames;

impl Known {
    /// Nothing yet, of `group`.
    #[must_use]
    pub fn nothing(group: &Group) -> Known {
        Known {
            names: group.names().clone(),
            places: HashMap::new(),
            total: 0,
            received: 0,
        }
    }

    /// Takes the next names, of `total` in all. Whether that were all.
    ///
    /// # Errors
    /// [`BadNames`] where they are too many, none, or not whole.
    pub fn take(&mut self, total: u64, names: &[u8]) -> Result<bool, BadNames> {
        let (names, left) = names.as_chunks::<NAME_SIZE>();
        let first = self.received == 0;
        let right = total <= MAX_LIBRARY as u64
            && (first || total == self.total)
            && left.is_empty()
            && names.len() as u64 <= total - self.received
            && names.is_empty() == (total == 0);
        if !right {
            return Err(BadNames);
        }
        self.total = total;
        for name in names {
            // At most `MAX_LIBRARY`.
            let place = self.received as u32;
            self.places.entry(ContentName(*name)).or_insert(place);
            self.received += 1;
        }
        Ok(self.received == total)
    }

    /// How many contents are shared.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// The place of a content, if it is shared, and what shows that this side may have it.
    #[must_use]
    pub fn place(&self, content: &Page) -> Option<(u64, Witness)> {
        let (name, witness) = self.names.witnessed(content);
        let place = self.places.get(&name)?;
        Some((u64::from(*place), witness))
    }
}

impl fmt::Debug for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Known({} contents)", self.places.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::PAGE_SIZE;

    #[test]
    fn contents_are_found_at_the_place_of_their_name() {
        let group = Group::new("acme", &[], &[1; 32]);
        let pages: Vec<Page> = (0..5).map(|fill| [fill; PAGE_SIZE]).collect();
        let names: Vec<u8> = pages
            .iter()
            .flat_map(|page| group.names().of(page).0)
            .collect();
        let mut known = Known::nothing(&group);
        assert_eq!(known.take(5, &names[..2 * NAME_SIZE]), Ok(false));
        assert_eq!(known.take(5, &names[2 * NAME_SIZE..]), Ok(true));
        for (place, page) in (0..).zip(&pages) {
            let witness = group.names().witnessed(page).1;
            assert_eq!(known.place(page), Some((place, witness)));
        }
        assert_eq!(known.place(&[9; PAGE_SIZE]), None);
        // By another key nothing is found.
        let mut other = Known::nothing(&Group::new("acme", &[], &[2; 32]));
        assert_eq!(other.take(5, &names), Ok(true));
        assert!(pages.iter().all(|page| other.place(page).is_none()));
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        let group = Group::new("acme", &[], &[1; 32]);
        let name = [0; NAME_SIZE];
        let fresh = || Known::nothing(&group);
        assert_eq!(fresh().take(0, &[]), Ok(true));
        assert_eq!(fresh().take(0, &name), Err(BadNames));
        assert_eq!(fresh().take(2, &[]), Err(BadNames));
        assert_eq!(fresh().take(2, &name[1..]), Err(BadNames));
        assert_eq!(fresh().take(1, &[name, name].concat()), Err(BadNames));
        assert_eq!(fresh().take(MAX_LIBRARY as u64 + 1, &name), Err(BadNames));
        let mut known = fresh();
        assert_eq!(known.take(2, &name), Ok(false));
        assert_eq!(known.take(3, &name), Err(BadNames));
    }
}
