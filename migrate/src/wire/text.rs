//! Text from a peer that is safe to show.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A line of text that a person may read: at most [`Text::MAX`] bytes, and without characters
/// that could move a terminal's cursor, change its colours or fake lines of a log.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct Text(String);

impl Text {
    /// The most bytes in a text.
    pub const MAX: usize = 1024;

    /// Makes text safe: what is no printable character becomes U+FFFD, what is too long is cut.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let mut safe = String::with_capacity(text.len().min(Self::MAX));
        for character in text.chars().map(printable) {
            if safe.len() + character.len_utf8() > Self::MAX {
                break;
            }
            safe.push(character);
        }
        Self(safe)
    }

    /// Makes bytes safe. What is no UTF-8 becomes U+FFFD.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        // A character has four bytes at most.
        let shown = &bytes[..bytes.len().min(Self::MAX * 4)];
        Self::new(&String::from_utf8_lossy(shown))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What is shown for a character of a peer's.
pub(crate) fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        // Marks that change the direction of text, and others nobody can see.
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' => {
            char::REPLACEMENT_CHARACTER
        }
        character if character.is_control() => char::REPLACEMENT_CHARACTER,
        character => character,
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::new(&text)
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

impl From<Text> for String {
    fn from(text: Text) -> Self {
        text.0
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_cannot_be_moved() {
        let text = Text::new("fine\n\x1b[2J\u{202e}\t\u{9b}ü");
        assert_eq!(text.as_str(), "fine\u{fffd}\u{fffd}[2J\u{fffd} \u{fffd}ü");
        assert_eq!(Text::from_bytes(b"a\xffb").as_str(), "a\u{fffd}b");
    }

    #[test]
    fn it_is_cut_at_a_character() {
        let text = Text::new(&"ü".repeat(Text::MAX));
        assert_eq!(text.as_str().len(), Text::MAX);
        assert!(Text::new(&"\0".repeat(Text::MAX)).as_str().len() <= Text::MAX);
        assert_eq!(Text::from_bytes(&[b'x'; 100_000]).as_str().len(), Text::MAX);
    }
}
