//! Saves a domain that is suspended already with the stock saver, as an oracle for our own:
//! `stock-save DOMID FILE`. The file holds the libxc image alone, as `verify-stream-v2 -f libxc`
//! reads it.

use std::env;
use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use xen_sys::DomId;
use xen_sys::ctl::Ctl;

fn main() -> Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let mut arguments = env::args().skip(1);
    let (Some(domain), Some(path), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        bail!("Usage: stock-save DOMID FILE");
    };
    let domain: DomId = domain.parse()?;
    let ctl = Ctl::open()?;
    let file = File::create(&path).with_context(|| format!("Can't create {path}"))?;
    xen_sys::stock::save(&ctl, domain, file.as_fd())?;
    file.sync_all()
        .with_context(|| format!("Can't write {path}"))?;
    Ok(())
}
