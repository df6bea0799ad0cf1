//! A guest of which a site only keeps the memory: nothing runs there, and nothing is restored.

use std::sync::{Arc, Mutex};

use super::Destination;
use super::xen::stream::state::{GuestState, StaticData};
use crate::error::{Error, Result};
use crate::image::Image;

/// Pages stay where the engine puts them, in the image. Whatever only a guest that is to run could
/// do is an error: the other end asks for what it did not offer.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shelf;

fn nothing_runs<T>() -> Result<T> {
    Err(Error::Refused("Only a shadow is kept here".into()))
}

impl Destination for Shelf {
    fn start(&mut self, _image: Arc<Mutex<Image>>, _static_data: StaticData) -> Result<()> {
        Ok(())
    }

    fn begin_round(&mut self, _frames: &[u64], _populated: u64) -> Result<bool> {
        Ok(false)
    }

    fn changed(&mut self, _pfns: &[u64]) -> Result<()> {
        Ok(())
    }

    fn end_round(&mut self, _vanished: bool) -> Result<bool> {
        Ok(false)
    }

    fn behind(&mut self) -> Result<u64> {
        Ok(0)
    }

    fn complete(&mut self, _state: GuestState) -> Result<()> {
        nothing_runs()
    }

    fn completed(&mut self) -> Result<Option<Vec<(String, f64)>>> {
        nothing_runs()
    }

    fn verify(&mut self) -> Result<()> {
        nothing_runs()
    }

    fn confirm(&mut self) -> Result<()> {
        nothing_runs()
    }

    fn take_over(&mut self) -> Result<()> {
        nothing_runs()
    }

    fn discard(&mut self) -> Result<()> {
        Ok(())
    }
}
