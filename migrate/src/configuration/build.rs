//! `b_info`: how the guest is built.

use super::fields::Fields;
use super::{ConfigurationError, PAGE_KIB, SitePolicy, balloon_target};
use crate::pages::MAX_PAGES;
use crate::wire::{GuestKind, Offer};
use serde_json::{Map, Value, json};

const MAX_CMDLINE: usize = 4096;
const MAX_PATH: usize = 1024;
const MAX_CPUID_LEAVES: usize = 256;

pub(super) fn build_info(
    root: &Fields<'_>,
    offer: &Offer,
    policy: &SitePolicy,
) -> Result<Value, ConfigurationError> {
    let info = root
        .object("b_info")?
        .ok_or_else(|| root.missing("b_info"))?;
    refuse(&info)?;
    // What libxl writes for every guest, and what belongs to the old host.
    for field in [
        "arch_arm",
        "claim_mode",
        "cpumap",
        "device_model_version",
        "exec_ssidref",
        "nodemap",
        "numa_placement",
        "stubdomain_memkb",
        "video_memkb",
    ] {
        info.ignore(field);
    }

    let mut taken = Map::new();
    take_vcpus(&info, offer, &mut taken)?;
    take_memory(&info, offer, &mut taken)?;
    take_boot(&info, policy, &mut taken)?;
    info.take_defbools(&["localtime", "acpi", "apic"], &mut taken)?;
    let most = u64::from(u32::MAX);
    info.take_unsigned(
        &[
            ("rtc_timeoffset", most),
            ("max_grant_frames", most),
            ("max_maptrack_frames", most),
            ("max_grant_version", 2),
            ("event_channels", most),
        ],
        &mut taken,
    )?;
    if let Some(mode) = info.choice(
        "tsc_mode",
        &["default", "always_emulate", "native", "native_paravirt"],
    )? {
        taken.insert("tsc_mode".into(), mode.into());
    }
    if let Some(mode) = info.choice(
        "timer_mode",
        &[
            "unknown",
            "delay_for_missed_ticks",
            "no_delay_for_missed_ticks",
            "no_missed_ticks_pending",
            "one_missed_tick_pending",
        ],
    )? {
        taken.insert("timer_mode".into(), mode.into());
    }
    if let Some(start) = info.string_of("blkdev_start", 16, |byte| byte.is_ascii_alphanumeric())? {
        taken.insert("blkdev_start".into(), start.into());
    }
    if let Some(cpuid) = cpuid(&info)? {
        taken.insert("cpuid".into(), cpuid);
    }
    if let Some(scheduling) = info.object("sched_params")? {
        // This site has a scheduler of its own.
        scheduling.ignore("sched");
        let mut params = Map::new();
        scheduling.take_unsigned(&[("weight", 65_535), ("cap", 1_000_000)], &mut params)?;
        taken.insert("sched_params".into(), params.into());
    }
    if let Some(x86) = info.object("arch_x86")? {
        let mut params = Map::new();
        x86.take_defbools(&["msr_relaxed"], &mut params)?;
        taken.insert("arch_x86".into(), params.into());
    }

    // Written once only: libxl aborts the process on a second kind.
    let (own, others) = match offer.kind {
        GuestKind::Pv => ("type.pv", ["type.pvh", "type.hvm"]),
        GuestKind::Pvh => ("type.pvh", ["type.pv", "type.hvm"]),
        GuestKind::Hvm => ("type.hvm", ["type.pv", "type.pvh"]),
    };
    for other in others {
        if info.object(other)?.is_some() {
            return Err(info.contradiction(other));
        }
    }
    let mut params = Map::new();
    if let Some(kind) = info.object(own)? {
        kind.refuse_true("e820_host")?;
        kind.refuse_true("pvshim")?;
        kind.take_unsigned(&[("slack_memkb", MAX_PAGES * PAGE_KIB)], &mut params)?;
    }
    taken.insert(own.into(), params.into());
    Ok(taken.into())
}

/// What cannot move, or would make another guest of it if it were left out.
fn refuse(info: &Fields<'_>) -> Result<(), ConfigurationError> {
    for field in [
        "disable_migrate",
        "nested_hvm",
        "device_model_stubdomain",
        "vpmu",
    ] {
        info.refuse_true(field)?;
    }
    for field in [
        "vnuma_nodes",
        "ioports",
        "irqs",
        "iomem",
        "device_tree",
        "vmtrace_buf_kb",
    ] {
        info.refuse_set(field)?;
    }
    for (field, choices) in [
        ("altp2m", &["disabled", "mixed", "external", "limited"][..]),
        ("tee", &["none", "optee"][..]),
    ] {
        if info
            .choice(field, choices)?
            .is_some_and(|choice| choice != choices[0])
        {
            return Err(info.unsupported(field));
        }
    }
    Ok(())
}

fn take_vcpus(
    info: &Fields<'_>,
    offer: &Offer,
    taken: &mut Map<String, Value>,
) -> Result<(), ConfigurationError> {
    let most = u64::from(offer.vcpus);
    // What is left out is libxl's default.
    if info
        .unsigned("max_vcpus", u64::from(u32::MAX))?
        .unwrap_or(1)
        != most
    {
        return Err(info.contradiction("max_vcpus"));
    }
    taken.insert("max_vcpus".into(), most.into());
    // libxl takes the last number for the highest.
    let available = info.array("avail_vcpus", offer.vcpus as usize)?;
    let mut last = None;
    for vcpu in available {
        let vcpu = vcpu.as_u64().filter(|vcpu| *vcpu < most);
        if vcpu.is_none() || vcpu <= last {
            return Err(info.malformed("avail_vcpus"));
        }
        last = vcpu;
    }
    if !available.is_empty() {
        taken.insert("avail_vcpus".into(), available.into());
    }
    Ok(())
}

fn take_memory(
    info: &Fields<'_>,
    offer: &Offer,
    taken: &mut Map<String, Value>,
) -> Result<(), ConfigurationError> {
    let most = MAX_PAGES * PAGE_KIB;
    info.ignore("target_memkb");
    let told = match offer.kind {
        GuestKind::Pv => None,
        GuestKind::Pvh | GuestKind::Hvm => info.unsigned("target_memkb", most)?,
    };
    let target = balloon_target(offer.kind, told, offer.populated_pages);
    let max = info
        .unsigned("max_memkb", most)?
        .unwrap_or(target)
        .max(target);
    taken.insert("max_memkb".into(), max.into());
    taken.insert("target_memkb".into(), target.into());
    info.take_unsigned(&[("shadow_memkb", max), ("iommu_memkb", max)], taken)
}

fn take_boot(
    info: &Fields<'_>,
    policy: &SitePolicy,
    taken: &mut Map<String, Value>,
) -> Result<(), ConfigurationError> {
    for field in ["kernel", "ramdisk"] {
        if let Some(path) = info.string(field)? {
            if !is_below(path, &policy.kernel_directories) {
                return Err(info.not_allowed(field, path));
            }
            taken.insert(field.into(), path.into());
        }
    }
    let printable = |byte: u8| byte >= b' ' && byte != 0x7f;
    if let Some(cmdline) = info.string_of("cmdline", MAX_CMDLINE, printable)? {
        taken.insert("cmdline".into(), cmdline.into());
    }
    // A boot loader runs here as root, so it is this site's or none.
    if let Some(own) = &policy.bootloader
        && info.string("bootloader")?.is_some()
    {
        taken.insert("bootloader".into(), own.as_str().into());
    }
    Ok(())
}

/// The user's changes to the CPU policy: filters of 0, 1, x, k and s for each bit, which cannot
/// give a guest anything that the host has not.
fn cpuid(info: &Fields<'_>) -> Result<Option<Value>, ConfigurationError> {
    // Older versions of libxl have a list where newer ones have two in an object.
    let malformed = || info.malformed("cpuid");
    if let Ok(list) = info.array("cpuid", MAX_CPUID_LEAVES) {
        return match list {
            [] => Ok(None),
            list => cpuid_leaves(list).ok_or_else(malformed).map(Some),
        };
    }
    let Some(both) = info.object("cpuid")? else {
        return Ok(None);
    };
    let leaves = both.array("cpuid", MAX_CPUID_LEAVES)?;
    let msrs = both.array("msr", MAX_CPUID_LEAVES)?;
    if leaves.is_empty() && msrs.is_empty() {
        return Ok(None);
    }
    let leaves = cpuid_leaves(leaves).ok_or_else(malformed)?;
    let msrs = msr_filters(msrs).ok_or_else(malformed)?;
    Ok(Some(json!({ "cpuid": leaves, "msr": msrs })))
}

fn cpuid_leaves(leaves: &[Value]) -> Option<Value> {
    leaves
        .iter()
        .map(|leaf| {
            let leaf = leaf.as_object()?;
            let mut taken = Map::new();
            taken.insert("leaf".into(), small(leaf.get("leaf")?)?);
            if let Some(subleaf) = leaf.get("subleaf") {
                taken.insert("subleaf".into(), small(subleaf)?);
            }
            for register in ["eax", "ebx", "ecx", "edx"] {
                if let Some(filter) = leaf.get(register) {
                    taken.insert(register.into(), bits(filter, 32)?);
                }
            }
            Some(Value::from(taken))
        })
        .collect()
}

fn msr_filters(msrs: &[Value]) -> Option<Value> {
    msrs.iter()
        .map(|msr| {
            let msr = msr.as_object()?;
            let (index, policy) = (small(msr.get("index")?)?, bits(msr.get("policy")?, 64)?);
            Some(json!({ "index": index, "policy": policy }))
        })
        .collect()
}

/// A number of 32 bits. libxl keeps the highest for "none".
fn small(value: &Value) -> Option<Value> {
    value
        .as_u64()
        .filter(|number| *number < u64::from(u32::MAX))
        .map(Value::from)
}

fn bits(value: &Value, count: usize) -> Option<Value> {
    let text = value.as_str()?;
    let allowed = text.bytes().all(|byte| b"01xks".contains(&byte));
    (text.len() == count && allowed).then(|| text.into())
}

/// Whether a path is one of a file in or below one of some directories, judged by its text: it
/// begins at the root and has no empty part, no `.` and no `..`.
pub(super) fn is_below(path: &str, directories: &[String]) -> bool {
    let plain = |path: &str| {
        path.strip_prefix('/').is_some_and(|parts| {
            parts
                .split('/')
                .all(|part| !matches!(part, "" | "." | ".."))
        }) && path.len() <= MAX_PATH
            && !path.chars().any(char::is_control)
    };
    plain(path)
        && directories.iter().any(|directory| {
            let directory = directory.trim_end_matches('/');
            path.strip_prefix(directory)
                .is_some_and(|rest| rest.starts_with('/'))
                && (plain(directory) || directory.is_empty())
        })
}
