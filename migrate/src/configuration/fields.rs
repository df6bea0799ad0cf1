//! Typed access to a peer's document, which remembers what nobody asked for.

use super::ConfigurationError;
use crate::wire::Text;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

/// The most names that are told of what was left out.
const MAX_LEFT_OUT: usize = 64;

/// One object of the document.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// The object's own name, with a dot behind it; empty for the document itself.
    path: String,
    asked: RefCell<BTreeSet<&'a str>>,
    left_out: Rc<RefCell<Vec<Text>>>,
}

impl<'a> Fields<'a> {
    pub(super) fn root(document: &'a Value) -> Result<Self, ConfigurationError> {
        let map = document
            .as_object()
            .ok_or_else(|| ConfigurationError::Malformed(Text::new("the document")))?;
        Ok(Self::new(map, String::new(), Rc::default()))
    }

    fn new(map: &'a Map<String, Value>, path: String, left_out: Rc<RefCell<Vec<Text>>>) -> Self {
        Self {
            map,
            path,
            asked: RefCell::default(),
            left_out,
        }
    }

    /// A field's full name.
    pub(super) fn name(&self, field: &str) -> Text {
        Text::new(&format!("{}{field}", self.path))
    }

    pub(super) fn missing(&self, field: &str) -> ConfigurationError {
        ConfigurationError::Missing(self.name(field))
    }

    pub(super) fn malformed(&self, field: &str) -> ConfigurationError {
        ConfigurationError::Malformed(self.name(field))
    }

    pub(super) fn unsupported(&self, field: &str) -> ConfigurationError {
        ConfigurationError::Unsupported(self.name(field))
    }

    pub(super) fn contradiction(&self, field: &str) -> ConfigurationError {
        ConfigurationError::Contradiction(self.name(field))
    }

    pub(super) fn not_allowed(&self, field: &str, value: &str) -> ConfigurationError {
        ConfigurationError::NotAllowed {
            field: self.name(field),
            value: Text::new(value),
        }
    }

    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&'a Value> {
        let (key, value) = self.map.get_key_value(field)?;
        self.asked.borrow_mut().insert(key);
        Some(value).filter(|value| !value.is_null())
    }

    /// Leaves a field out without telling.
    pub(super) fn ignore(&self, field: &str) {
        self.get(field);
    }

    /// Leaves a field out, without telling where it is a text that is `usual`.
    pub(super) fn ignore_where(&self, field: &str, usual: impl Fn(&str) -> bool) {
        let value = self.map.get(field).and_then(Value::as_str);
        if value.is_none_or(|text| text.is_empty() || usual(text)) {
            self.ignore(field);
        }
    }

    pub(super) fn string(&self, field: &str) -> Result<Option<&'a str>, ConfigurationError> {
        self.get(field)
            .map(|value| value.as_str().ok_or_else(|| self.malformed(field)))
            .transpose()
            // libxl writes some absent strings as empty ones.
            .map(|text| text.filter(|text| !text.is_empty()))
    }

    /// A string that has no more than so many bytes, each of which is allowed.
    pub(super) fn string_of(
        &self,
        field: &str,
        most: usize,
        allowed: impl Fn(u8) -> bool,
    ) -> Result<Option<&'a str>, ConfigurationError> {
        match self.string(field)? {
            Some(text) if text.len() > most || !text.bytes().all(allowed) => {
                Err(self.malformed(field))
            }
            text => Ok(text),
        }
    }

    pub(super) fn unsigned(
        &self,
        field: &str,
        most: u64,
    ) -> Result<Option<u64>, ConfigurationError> {
        match self
            .get(field)
            .map(|value| value.as_u64().filter(|value| *value <= most))
        {
            None => Ok(None),
            Some(None) => Err(self.malformed(field)),
            Some(value) => Ok(value),
        }
    }

    /// One of the texts that libxl has for an enumeration.
    pub(super) fn choice(
        &self,
        field: &str,
        choices: &[&'static str],
    ) -> Result<Option<&'static str>, ConfigurationError> {
        match self.string(field)? {
            None => Ok(None),
            Some(text) => match choices.iter().find(|choice| **choice == text) {
                Some(choice) => Ok(Some(choice)),
                None => Err(self.malformed(field)),
            },
        }
    }

    /// A truth value that may be left to libxl.
    pub(super) fn defbool(&self, field: &str) -> Result<Option<bool>, ConfigurationError> {
        Ok(match self.choice(field, &["<default>", "True", "False"])? {
            Some("True") => Some(true),
            Some("False") => Some(false),
            _ => None,
        })
    }

    pub(super) fn boolean(&self, field: &str) -> Result<Option<bool>, ConfigurationError> {
        self.get(field)
            .map(|value| value.as_bool().ok_or_else(|| self.malformed(field)))
            .transpose()
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<Self>, ConfigurationError> {
        self.get(field)
            .map(|value| {
                let map = value.as_object().ok_or_else(|| self.malformed(field))?;
                Ok(Self::new(
                    map,
                    format!("{}{field}.", self.path),
                    self.left_out.clone(),
                ))
            })
            .transpose()
    }

    pub(super) fn array(
        &self,
        field: &str,
        most: usize,
    ) -> Result<&'a [Value], ConfigurationError> {
        match self.get(field) {
            None => Ok(&[]),
            Some(Value::Array(values)) if values.len() <= most => Ok(values),
            Some(_) => Err(self.malformed(field)),
        }
    }

    pub(super) fn objects(
        &self,
        field: &str,
        most: usize,
    ) -> Result<Vec<Self>, ConfigurationError> {
        self.array(field, most)?
            .iter()
            .enumerate()
            .map(|(at, value)| {
                let name = format!("{field}[{at}]");
                let map = value.as_object().ok_or_else(|| self.malformed(&name))?;
                Ok(Self::new(
                    map,
                    format!("{}{name}.", self.path),
                    self.left_out.clone(),
                ))
            })
            .collect()
    }

    pub(super) fn take_defbools(
        &self,
        fields: &[&str],
        taken: &mut Map<String, Value>,
    ) -> Result<(), ConfigurationError> {
        for field in fields {
            if let Some(value) = self.defbool(field)? {
                taken.insert((*field).into(), if value { "True" } else { "False" }.into());
            }
        }
        Ok(())
    }

    pub(super) fn take_unsigned(
        &self,
        fields: &[(&str, u64)],
        taken: &mut Map<String, Value>,
    ) -> Result<(), ConfigurationError> {
        for (field, most) in fields {
            if let Some(value) = self.unsigned(field, *most)? {
                taken.insert((*field).into(), value.into());
            }
        }
        Ok(())
    }

    /// Refuses a field that is switched on.
    pub(super) fn refuse_true(&self, field: &str) -> Result<(), ConfigurationError> {
        if self.defbool(field)? == Some(true) {
            Err(self.unsupported(field))
        } else {
            Ok(())
        }
    }

    /// Refuses a field that says anything.
    pub(super) fn refuse_set(&self, field: &str) -> Result<(), ConfigurationError> {
        match self.get(field) {
            Some(value) if says_something(value) => Err(self.unsupported(field)),
            _ => Ok(()),
        }
    }

    /// Refuses lists with something in them that nobody has asked for.
    pub(super) fn refuse_other_lists(&self) -> Result<(), ConfigurationError> {
        let asked = self.asked.borrow();
        let other = self.map.iter().find(|(field, value)| {
            !asked.contains(field.as_str()) && value.is_array() && says_something(value)
        });
        match other {
            Some((field, _)) => Err(self.unsupported(field)),
            None => Ok(()),
        }
    }

    /// What has been left out in the whole document. It is complete once all objects that were
    /// taken from this one are gone.
    pub(super) fn left_out(self) -> Vec<Text> {
        let left_out = self.left_out.clone();
        drop(self);
        left_out.take()
    }
}

impl Drop for Fields<'_> {
    fn drop(&mut self) {
        let asked = self.asked.borrow();
        let mut left_out = self.left_out.borrow_mut();
        for (field, value) in self.map {
            if !asked.contains(field.as_str())
                && says_something(value)
                && left_out.len() < MAX_LEFT_OUT
            {
                left_out.push(self.name(field));
            }
        }
    }
}

/// Whether a value is other than libxl's default as it is usually written.
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_u64() != Some(0),
        Value::String(text) => !matches!(
            text.as_str(),
            "" | "<default>" | "False" | "unknown" | "default"
        ),
        Value::Array(values) => !values.is_empty(),
        Value::Object(map) => map.values().any(says_something),
    }
}
