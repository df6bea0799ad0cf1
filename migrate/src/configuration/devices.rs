//! The devices that move: disks, network interfaces, and a graphical console.

use super::build::is_below;
use super::fields::Fields;
use super::{ConfigurationError, SitePolicy};
use serde_json::{Map, Value, json};

/// The most devices of a kind.
pub(super) const MAX: usize = 256;

/// Where libxl puts an interface that names no bridge (`libxl__device_nic_setdefault`).
const LIBXL_BRIDGE: &str = "xenbr0";

type Accept = fn(&Fields<'_>, &SitePolicy) -> Result<Value, ConfigurationError>;

/// The lists of devices that are taken.
pub(super) const ACCEPTED: &[(&str, Accept)] =
    &[("disks", disk), ("nics", nic), ("vfbs", vfb), ("vkbs", vkb)];

/// Whether some of the devices of libxl's `configuration` are served by QEMU: screens, and disks that
/// are no plain image or block device.
pub fn need_qemu(configuration: &Value) -> bool {
    let devices = |key: &str| {
        let list = configuration.get(key).and_then(Value::as_array);
        list.into_iter().flatten()
    };
    let by_qemu = |disk: &Value| {
        let says = |field: &str| disk.get(field).and_then(Value::as_str);
        // libxl has QEMU serve an empty drive too: there is no block device to serve it from.
        says("backend") == Some("qdisk") || !matches!(says("format"), None | Some("raw"))
    };
    devices("vfbs").next().is_some() || devices("disks").any(by_qemu)
}

/// Whether QEMU keeps parts of a written image of this format in its memory: the tables of where its
/// blocks are. Another host's QEMU would read old ones, and the one that is left behind would write
/// its own into an image that is in use elsewhere.
pub fn keeps_parts_in_memory(format: &str) -> bool {
    !matches!(format, "unknown" | "raw" | "empty")
}

/// Devices are served by domain 0: other domains there are none here.
fn refuse_backend(device: &Fields<'_>) -> Result<(), ConfigurationError> {
    device.refuse_set("backend_domid")?;
    if device
        .string("backend_domname")?
        .is_some_and(|name| name != "Domain-0" && name != "0")
    {
        return Err(device.unsupported("backend_domname"));
    }
    Ok(())
}

fn disk(disk: &Fields<'_>, policy: &SitePolicy) -> Result<Value, ConfigurationError> {
    refuse_backend(disk)?;
    // With a script, the path means what the script makes of it.
    disk.refuse_set("script")?;
    disk.refuse_true("colo_enable")?;
    disk.refuse_true("colo_restore_enable")?;
    if disk.choice("specification", &["unknown", "xen", "virtio"])? == Some("virtio") {
        return Err(disk.unsupported("specification"));
    }

    let mut taken = Map::new();
    let name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b':';
    let vdev = disk
        .string_of("vdev", 16, name)?
        .ok_or_else(|| disk.missing("vdev"))?;
    taken.insert("vdev".into(), vdev.into());
    let formats = ["unknown", "qcow", "qcow2", "vhd", "raw", "empty", "qed"];
    let format = disk.choice("format", &formats)?.unwrap_or("raw");
    if keeps_parts_in_memory(format) && disk.unsigned("readwrite", 1)? == Some(1) {
        return Err(disk.unsupported("format"));
    }
    match disk.string("pdev_path")? {
        Some(path) if is_below(path, &policy.disk_directories) => {
            taken.insert("pdev_path".into(), path.into());
        }
        Some(path) => return Err(disk.not_allowed("pdev_path", path)),
        None if format == "empty" => {}
        None => return Err(disk.missing("pdev_path")),
    }
    taken.insert("format".into(), format.into());
    match disk.choice("backend", &["unknown", "phy", "tap", "qdisk", "standalone"])? {
        Some(backend @ ("phy" | "qdisk")) => {
            taken.insert("backend".into(), backend.into());
        }
        None | Some("unknown") => {}
        Some(_) => return Err(disk.unsupported("backend")),
    }
    disk.take_unsigned(
        &[("removable", 1), ("readwrite", 1), ("is_cdrom", 1)],
        &mut taken,
    )?;
    if let Some(safe) = disk.boolean("direct_io_safe")? {
        taken.insert("direct_io_safe".into(), safe.into());
    }
    disk.take_defbools(&["discard_enable", "trusted"], &mut taken)?;
    Ok(taken.into())
}

fn nic(nic: &Fields<'_>, policy: &SitePolicy) -> Result<Value, ConfigurationError> {
    refuse_backend(nic)?;
    // A routed or otherwise special interface; the bridge is what this site knows.
    nic.refuse_set("gatewaydev")?;
    // libxl writes its own default path here, for every interface.
    nic.ignore_where("script", |path| path.ends_with("/vif-bridge"));

    let mut taken = Map::new();
    let mac = nic.string("mac")?.ok_or_else(|| nic.missing("mac"))?;
    if !is_mac(mac) {
        return Err(nic.malformed("mac"));
    }
    taken.insert("mac".into(), mac.into());
    let address = |byte: u8| byte.is_ascii_hexdigit() || b".:/ ,".contains(&byte);
    if let Some(ip) = nic.string_of("ip", 512, address)? {
        taken.insert("ip".into(), ip.into());
    }
    let model = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if let Some(model) = nic.string_of("model", 32, model)? {
        taken.insert("model".into(), model.into());
    }
    match nic.choice("nictype", &["unknown", "vif_ioemu", "vif"])? {
        Some(kind @ "vif") => {
            taken.insert("nictype".into(), kind.into());
        }
        None | Some("unknown") => {}
        Some(_) => return Err(nic.unsupported("nictype")),
    }
    let bridge = nic.string("bridge")?.unwrap_or(LIBXL_BRIDGE);
    let own = policy.bridges.get(bridge);
    match own.or(policy.default_bridge.as_ref()) {
        Some(own) => taken.insert("bridge".into(), own.as_str().into()),
        None => return Err(nic.not_allowed("bridge", bridge)),
    };
    nic.take_unsigned(
        &[
            ("devid", 65_535),
            ("mtu", 65_535),
            ("rate_bytes_per_interval", i64::MAX.cast_unsigned()),
            ("rate_interval_usecs", u64::from(u32::MAX)),
        ],
        &mut taken,
    )?;
    nic.take_defbools(&["trusted"], &mut taken)?;
    Ok(taken.into())
}

fn is_mac(text: &str) -> bool {
    text.len() == 17
        && text.bytes().enumerate().all(|(at, byte)| match at % 3 {
            2 => byte == b':',
            _ => byte.is_ascii_hexdigit(),
        })
}

/// A PV guest's screen. It is served here by QEMU, on an address of this site's.
fn vfb(vfb: &Fields<'_>, policy: &SitePolicy) -> Result<Value, ConfigurationError> {
    refuse_backend(vfb)?;
    if let Some(sdl) = vfb.object("sdl")? {
        sdl.refuse_true("enable")?;
    }
    let vnc = vfb.object("vnc")?.ok_or_else(|| vfb.missing("vnc"))?;
    if vnc.defbool("enable")? == Some(false) {
        return Err(vnc.unsupported("enable"));
    }
    vnc.ignore("listen");
    vnc.ignore("display");
    vnc.ignore("findunused");
    // Any free number: the old one may be taken here.
    let mut screen = Map::new();
    screen.insert("enable".into(), "True".into());
    screen.insert("findunused".into(), "True".into());
    let listen = match policy.vnc_listen.as_str() {
        "" => "127.0.0.1",
        listen => listen,
    };
    screen.insert("listen".into(), listen.into());
    // It ends up in xenstore and in QEMU's own commands.
    let printable = |byte: u8| byte.is_ascii_graphic() && !b",\"'\\".contains(&byte);
    if let Some(password) = vnc.string_of("passwd", 64, printable)? {
        screen.insert("passwd".into(), password.into());
    }

    let mut taken = Map::new();
    taken.insert("vnc".into(), screen.into());
    taken.insert("sdl".into(), json!({ "enable": "False" }));
    let name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if let Some(keymap) = vfb.string_of("keymap", 16, name)? {
        taken.insert("keymap".into(), keymap.into());
    }
    vfb.take_unsigned(&[("devid", 65_535)], &mut taken)?;
    Ok(taken.into())
}

/// A PV guest's keyboard and pointer.
fn vkb(vkb: &Fields<'_>, _: &SitePolicy) -> Result<Value, ConfigurationError> {
    refuse_backend(vkb)?;
    if vkb.choice("backend_type", &["unknown", "qemu", "linux"])? == Some("linux") {
        return Err(vkb.unsupported("backend_type"));
    }
    let mut taken = Map::new();
    vkb.take_unsigned(
        &[
            ("devid", 65_535),
            ("width", 65_535),
            ("height", 65_535),
            ("multi_touch_width", 65_535),
            ("multi_touch_height", 65_535),
            ("multi_touch_num_contacts", 255),
        ],
        &mut taken,
    )?;
    for feature in [
        "feature_disable_keyboard",
        "feature_disable_pointer",
        "feature_abs_pointer",
        "feature_raw_pointer",
        "feature_multi_touch",
    ] {
        if let Some(on) = vkb.boolean(feature)? {
            taken.insert(feature.into(), on.into());
        }
    }
    Ok(taken.into())
}
