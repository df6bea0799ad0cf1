//! Shows what the safe layer reads of a domain: `probe-domain [--log-dirty] DOMID`.
//!
//! Changes nothing, but that `--log-dirty` turns log-dirty on for a moment, which a move that is
//! under way would not survive.

use std::env;
use std::fmt::{Debug, Display};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use xen_sys::ctl::{Ctl, DirtyBitmap, DirtyStats, DomainInfo};
use xen_sys::memory::{Access, ForeignMemory, M2p, P2mDescription};
use xen_sys::raw::{XEN_DOMCTL_PFINFO_LTAB_SHIFT, XEN_DOMCTL_PFINFO_XTAB};
use xen_sys::store::Store;
use xen_sys::toolstack::Toolstack;
use xen_sys::{DomId, PAGE_SIZE};

/// So many pages are looked at.
const PAGES: u64 = 16;

fn main() -> Result<()> {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let mut log_dirty = false;
    let mut domain = None;
    for argument in env::args().skip(1) {
        match argument.as_str() {
            "--log-dirty" => log_dirty = true,
            _ if domain.is_none() => domain = Some(argument.parse::<DomId>()?),
            _ => bail!("Usage: probe-domain [--log-dirty] DOMID"),
        }
    }

    let host = xen_sys::host::probe();
    println!("libraries {}", xen_sys::host::LIBRARIES_VERSION);
    if let Some(version) = &host.version {
        println!("hypervisor {version} ({})", version.capabilities);
    }
    println!("{:#?}", host.physical);
    if let Some(missing) = host.missing {
        return Err(missing.into());
    }
    let Some(domain) = domain else {
        bail!("Usage: probe-domain [--log-dirty] DOMID")
    };

    let ctl = Ctl::open()?;
    let info = ctl
        .domain_info(domain)?
        .with_context(|| format!("No domain {domain}"))?;
    println!("{info:#?}");
    println!("{} domains", ctl.domains()?.len());
    show("guest width", ctl.guest_width(domain));
    show("highest gpfn", ctl.max_gpfn(domain));
    show("tsc", ctl.tsc_info(domain));

    vcpus(&ctl, &info);
    policy(&ctl, &info);
    if let Err(error) = pages(&ctl, &info) {
        println!("pages: {:#}", anyhow::Error::from(error));
    }
    if info.hvm {
        show(
            "hvm context bytes",
            ctl.hvm_context(domain).map(|context| context.len()),
        );
        for index in xen_sys::ctl::MIGRATED_HVM_PARAMS {
            show(&format!("hvm param {index}"), ctl.hvm_param(domain, index));
        }
    }
    if log_dirty {
        dirty(&ctl, domain);
    }
    toolstack(domain)?;
    store(domain)
}

fn vcpus(ctl: &Ctl, info: &DomainInfo) {
    let Some(last) = info.max_vcpu_id else { return };
    for vcpu in 0..=last {
        let state = ctl.vcpu_info(info.domain, vcpu);
        let online = state.as_ref().is_ok_and(|state| state.online);
        show(&format!("vcpu {vcpu}"), state);
        if !online {
            continue;
        }
        match ctl.vcpu_context(info.domain, vcpu) {
            Ok(context) => println!(
                "vcpu {vcpu} context: {} bytes, cr3 {:#x}, cr1 {:#x}, {} gdt entries",
                context.as_bytes().len(),
                context.control_register(3).unwrap_or_default(),
                context.control_register(1).unwrap_or_default(),
                context.gdt_entries(),
            ),
            Err(error) => show::<()>(&format!("vcpu {vcpu} context"), Err(error)),
        }
        let bytes = |state: xen_sys::Result<Vec<u8>>| state.map(|state| state.len());
        show(
            "  extended bytes",
            bytes(ctl.vcpu_extended(info.domain, vcpu)),
        );
        show("  xsave bytes", bytes(ctl.vcpu_xsave(info.domain, vcpu)));
        show("  msr bytes", bytes(ctl.vcpu_msrs(info.domain, vcpu)));
    }
}

fn policy(ctl: &Ctl, info: &DomainInfo) {
    use xen_sys::ctl::GuestKind;

    let kind = if info.hvm {
        GuestKind::Hvm
    } else {
        GuestKind::Pv
    };
    match ctl.cpu_policy(info.domain) {
        Ok(policy) => {
            println!("cpu policy: {policy:?}");
            show(
                "compatible with this host",
                ctl.cpu_policy_compatible(&policy, kind),
            );
        }
        Err(error) => show::<()>("cpu policy", Err(error)),
    }
}

/// Of a PV guest: the machine frames that have the lowest pfns, found by the table of the
/// machine; of others: the lowest frames.
fn pages(ctl: &Ctl, info: &DomainInfo) -> xen_sys::Result<()> {
    let memory = ForeignMemory::open()?;
    let mut frames: Vec<u64> = (0..PAGES).collect();
    if !info.hvm {
        let shared = memory.map_page(info.domain, Access::Read, info.shared_info_frame)?;
        let mut page = [0; PAGE_SIZE];
        if shared.copy_page(0, &mut page) {
            println!("{:#x?}", P2mDescription::parse(&page));
        }
        let m2p = M2p::map(ctl)?;
        println!("machine-to-physical table: {} frames", m2p.frames());
        // Frames of others have such pfns too: the type of what is none of its pages tells them.
        frames = (0..m2p.frames())
            .filter(|&mfn| m2p.pfn_of(mfn).is_some_and(|pfn| pfn < PAGES))
            .collect();
        let mut types = frames.clone();
        ctl.page_types(info.domain, &mut types)?;
        frames = frames
            .into_iter()
            .zip(types)
            .filter(|&(_, entry)| page_type(entry) != page_type(u64::from(XEN_DOMCTL_PFINFO_XTAB)))
            .map(|(mfn, _)| mfn)
            .collect();
        frames.sort_by_key(|&mfn| m2p.pfn_of(mfn));
    }
    if frames.is_empty() {
        println!("no frames found");
        return Ok(());
    }
    let mut types = frames.clone();
    ctl.page_types(info.domain, &mut types)?;
    let mapping = memory.map(info.domain, Access::Read, &frames)?;
    for (index, (frame, entry)) in frames.iter().zip(types).enumerate() {
        let sum = mapping.with_page(index, |page| {
            page.iter().map(|&byte| u64::from(byte)).sum::<u64>()
        });
        println!(
            "frame {frame:#x}: type {:#x}, sum of bytes {sum:?}",
            page_type(entry)
        );
    }
    for (index, error) in mapping.errors() {
        println!("frame {:#x} is not mapped: {error}", frames[index]);
    }
    Ok(())
}

/// The four bits of XEN_DOMCTL_PFINFO_* in an answer of `page_types`.
fn page_type(entry: u64) -> u64 {
    (entry >> XEN_DOMCTL_PFINFO_LTAB_SHIFT) & 0xf
}

fn dirty(ctl: &Ctl, domain: DomId) {
    let result = (|| {
        let mut bitmap = ctl.dirty_bitmap(ctl.nr_gpfns(domain)?)?;
        ctl.log_dirty_enable(domain)?;
        let fetched = fetch(ctl, domain, &mut bitmap);
        // Off in any case.
        ctl.log_dirty_off(domain)?;
        fetched
    })();
    match result {
        Err(error) if error.is_not_supported() => {
            println!("log-dirty: not supported ({error})");
        }
        result => show("log-dirty (count, peek, bits, clean, count after)", result),
    }
}

type Fetched = (DirtyStats, DirtyStats, u32, DirtyStats, DirtyStats);

fn fetch(ctl: &Ctl, domain: DomId, bitmap: &mut DirtyBitmap) -> xen_sys::Result<Fetched> {
    thread::sleep(Duration::from_secs(1));
    let counted = ctl.log_dirty_stats(domain)?;
    let peeked = ctl.log_dirty_peek(domain, bitmap)?;
    let bits = bitmap.words().iter().map(|word| word.count_ones()).sum();
    let cleaned = ctl.log_dirty_clean(domain, bitmap, false)?;
    let after = ctl.log_dirty_stats(domain)?;
    Ok((counted, peeked, bits, cleaned, after))
}

fn toolstack(domain: DomId) -> Result<()> {
    let toolstack = Toolstack::open()?;
    show("summary", toolstack.summary(domain));
    let name = toolstack.name(domain).unwrap_or_default();
    show("domain of that name", toolstack.domain_by_name(&name));
    show(
        "domain of a name that is none's",
        toolstack.domain_by_name("no such/domain"),
    );
    show("list", toolstack.list());
    println!("disks: {:#?}", toolstack.disks(domain));
    println!("nics: {:#?}", toolstack.nics(domain));
    println!("pci devices: {:?}", toolstack.pci_devices(domain));
    show("free memory", toolstack.free_memory());
    show(
        "bytes of xl's configuration",
        toolstack
            .user_data(domain, "xl")
            .map(|data| data.map(|data| data.len())),
    );
    match toolstack.configuration(domain) {
        Ok(config) => {
            let json = toolstack.config_to_json(&config)?;
            println!("{json}");
            let mut again = toolstack.config_from_json(&json)?;
            println!("kind {:?}, the same again: {}", again.kind(), {
                toolstack.config_to_json(&again)? == json
            });
            show("needed memory", toolstack.needed_memory(&mut again));
        }
        Err(error) => show::<()>("configuration", Err(error)),
    }
    Ok(())
}

fn store(domain: DomId) -> Result<()> {
    let store = Store::open()?;
    let path = format!("/local/domain/{domain}");
    println!("{path}: {:?}", store.list(&path)?);
    println!(
        "{path}/name: {:?}",
        store.read_text(&format!("{path}/name"))?
    );
    println!("nothing there: {:?}", store.read("/local/no-such-node")?);
    let name = store.transaction(|transaction| transaction.read(&format!("{path}/name")))?;
    println!(
        "in a transaction: {:?}",
        name.map(|name| String::from_utf8_lossy(&name).into_owned())
    );
    let watch = store.watch(&path, "probe")?;
    println!(
        "first event: {:?}",
        watch.wait(Some(Duration::from_secs(5)))?
    );
    Ok(())
}

fn show<T: Debug>(what: &str, result: Result<T, impl std::error::Error + Send + Sync + 'static>) {
    match result {
        Ok(value) => println!("{what}: {value:?}"),
        Err(error) => println!("{what}: FAILED: {}", chain(&error)),
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> impl Display {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
