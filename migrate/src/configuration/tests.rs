use super::*;
use crate::digest::DigestKey;
use crate::wire::{CpuPolicy, MoveId, TscOffer, XenVersion};
use proptest::prelude::*;

/// As libxl 4.17 writes it for a PV guest with two disks, an interface and a screen.
fn configuration() -> Value {
    json!({
        "c_info": {
            "type": "pv",
            "name": "g1",
            "domid": 7,
            "uuid": "6C1C2B54-62a4-4f3b-9d5a-0d8e7d1b6b0f",
            "run_hotplug_scripts": "True",
            "driver_domain": "False",
            "passthrough": "disabled"
        },
        "b_info": {
            "max_vcpus": 2,
            "avail_vcpus": [0, 1],
            "numa_placement": "True",
            "max_memkb": 262144,
            "target_memkb": 131072,
            "video_memkb": 0,
            "shadow_memkb": 3072,
            "localtime": "False",
            "disable_migrate": "False",
            "cpuid": { "cpuid": [], "msr": [] },
            "blkdev_start": "xvda",
            "max_grant_frames": 64,
            "max_maptrack_frames": 1024,
            "max_grant_version": 2,
            "device_model_version": "qemu_xen",
            "device_model_stubdomain": "False",
            "sched_params": { "sched": "credit2", "weight": 512, "cap": 50 },
            "claim_mode": "False",
            "event_channels": 1023,
            "kernel": "/boot/guests/vmlinuz",
            "cmdline": "console=hvc0 root=/dev/xvda1 ro",
            "ramdisk": "/boot/guests/initrd.img",
            "nested_hvm": "False",
            "apic": "True",
            "dm_restrict": "False",
            "type.pv": { "e820_host": "False" },
            "arch_arm": {},
            "arch_x86": { "msr_relaxed": "False" }
        },
        "disks": [
            {
                "backend_domid": 0,
                "pdev_path": "/srv/disks/g1.raw",
                "vdev": "xvda",
                "backend": "phy",
                "format": "raw",
                "removable": 1,
                "readwrite": 1,
                "discard_enable": "True",
                "specification": "xen",
                "trusted": "True",
                "colo_enable": "False",
                "colo_restore_enable": "False"
            },
            {
                "pdev_path": "/dev/vg0/g1-data",
                "vdev": "xvdb",
                "format": "raw",
                "readwrite": 1
            }
        ],
        "nics": [
            {
                "devid": 0,
                "model": "rtl8139",
                "mac": "00:16:3e:01:02:03",
                "bridge": "xenbr0",
                "ip": "10.0.0.7",
                "script": "/etc/xen/scripts/vif-bridge",
                "nictype": "vif",
                "rate_bytes_per_interval": 500_000,
                "rate_interval_usecs": 50_000,
                "trusted": "True"
            }
        ],
        "vfbs": [
            {
                "devid": 0,
                "vnc": { "enable": "True", "listen": "0.0.0.0", "passwd": "geheim", "display": 3 },
                "sdl": { "enable": "False" },
                "keymap": "de"
            }
        ],
        "vkbs": [{ "devid": 0, "backend_type": "qemu" }],
        "on_reboot": "restart",
        "on_crash": "coredump_restart",
        "on_soft_reset": "soft_reset"
    })
}

fn offer(configuration: Value) -> Offer {
    Offer {
        purpose: crate::wire::Purpose::Move,
        connections: 2,
        direct: None,
        move_id: MoveId::from_random([1; 16]),
        name: "g1".to_owned(),
        uuid: "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f".to_owned(),
        kind: GuestKind::Pv,
        pages: 65_536,
        populated_pages: 40_000,
        vcpus: 2,
        configuration,
        cpu_policy: CpuPolicy::default(),
        tsc: TscOffer { mode: 0, khz: 1 },
        xen: XenVersion {
            major: 4,
            minor: 17,
            extra: Text::default(),
        },
        digest_key: DigestKey::new([2; 32]),
        verify: false,
    }
}

fn policy() -> SitePolicy {
    SitePolicy {
        kernel_directories: vec!["/boot/guests".to_owned()],
        disk_directories: vec!["/srv/disks/".to_owned(), "/dev/vg0".to_owned()],
        bridges: [("xenbr0".to_owned(), "br-guests".to_owned())].into(),
        default_bridge: None,
        bootloader: None,
        vnc_listen: String::new(),
    }
}

fn try_accept(configuration: Value) -> Result<Accepted, ConfigurationError> {
    accept(&offer(configuration), &policy())
}

/// Puts a value at a place like `/disks/0/script`, on a path that is there.
fn with(place: &str, value: Value) -> Value {
    let mut document = configuration();
    let (parent, field) = place.rsplit_once('/').unwrap();
    match document.pointer_mut(parent).unwrap() {
        Value::Object(map) => drop(map.insert(field.to_owned(), value)),
        _ => panic!("{parent} is no object"),
    }
    document
}

#[test]
fn an_ordinary_guest_is_taken() {
    let accepted = try_accept(configuration()).unwrap();
    assert_eq!(accepted.left_out, []);
    assert_eq!(
        accepted.configuration,
        json!({
            "c_info": {
                "type": "pv",
                "name": "g1",
                "domid": 0,
                "uuid": "6c1c2b54-62a4-4f3b-9d5a-0d8e7d1b6b0f"
            },
            "b_info": {
                "max_vcpus": 2,
                "avail_vcpus": [0, 1],
                "max_memkb": 262_144,
                "target_memkb": 160_000,
                "shadow_memkb": 3072,
                "localtime": "False",
                "apic": "True",
                "blkdev_start": "xvda",
                "max_grant_frames": 64,
                "max_maptrack_frames": 1024,
                "max_grant_version": 2,
                "event_channels": 1023,
                "sched_params": { "weight": 512, "cap": 50 },
                "kernel": "/boot/guests/vmlinuz",
                "cmdline": "console=hvc0 root=/dev/xvda1 ro",
                "ramdisk": "/boot/guests/initrd.img",
                "type.pv": {},
                "arch_x86": { "msr_relaxed": "False" }
            },
            "disks": [
                {
                    "pdev_path": "/srv/disks/g1.raw",
                    "vdev": "xvda",
                    "backend": "phy",
                    "format": "raw",
                    "removable": 1,
                    "readwrite": 1,
                    "discard_enable": "True",
                    "trusted": "True"
                },
                {
                    "pdev_path": "/dev/vg0/g1-data",
                    "vdev": "xvdb",
                    "format": "raw",
                    "readwrite": 1
                }
            ],
            "nics": [
                {
                    "devid": 0,
                    "model": "rtl8139",
                    "mac": "00:16:3e:01:02:03",
                    "bridge": "br-guests",
                    "ip": "10.0.0.7",
                    "nictype": "vif",
                    "rate_bytes_per_interval": 500_000,
                    "rate_interval_usecs": 50_000,
                    "trusted": "True"
                }
            ],
            "vfbs": [
                {
                    "devid": 0,
                    "vnc": {
                        "enable": "True",
                        "findunused": "True",
                        "listen": "127.0.0.1",
                        "passwd": "geheim"
                    },
                    "sdl": { "enable": "False" },
                    "keymap": "de"
                }
            ],
            "vkbs": [{ "devid": 0 }],
            "on_poweroff": "destroy",
            "on_reboot": "restart",
            "on_watchdog": "destroy",
            "on_crash": "coredump_restart",
            "on_soft_reset": "soft_reset"
        })
    );
    assert!(!format!("{accepted:?}").contains("geheim"));
}

#[test]
fn programs_and_arguments_are_left_out_and_told() {
    for place in [
        "/c_info/xsdata",
        "/c_info/platformdata",
        "/c_info/ssid_label",
        "/b_info/bootloader",
        "/b_info/bootloader_args",
        "/b_info/device_model",
        "/b_info/device_model_user",
        "/b_info/stubdomain_kernel",
        "/b_info/extra",
        "/b_info/extra_pv",
        "/b_info/extra_hvm",
        "/b_info/vcpu_hard_affinity",
        "/b_info/type.pv/kernel",
        "/b_info/type.pv/bootloader",
        "/disks/0/colo_host",
        "/nics/0/ifname",
        "/nics/0/coloft_forwarddev",
        "/unheard_of",
    ] {
        for value in [json!("/tmp/evil-program"), json!({ "evil-program": "1" })] {
            let accepted = try_accept(with(place, value)).unwrap();
            let text = accepted.configuration.to_string();
            assert!(!text.contains("evil-program"), "{place}: {text}");
            let [told] = accepted.left_out.as_slice() else {
                panic!("{place}: {:?}", accepted.left_out);
            };
            let field = place.rsplit_once('/').unwrap().1;
            assert!(told.as_str().ends_with(field), "{place}: {told}");
        }
    }
    // Every interface has one of these, so it is not worth telling: unless it does something else.
    let scripts = [
        ("/etc/xen/scripts/vif-bridge", 0),
        ("/etc/xen/scripts/vif-route", 1),
        ("/tmp/evil-program", 1),
    ];
    for (script, told) in scripts {
        let accepted = try_accept(with("/nics/0/script", json!(script))).unwrap();
        assert!(!accepted.configuration.to_string().contains(script));
        assert_eq!(accepted.left_out.len(), told, "{script}");
    }
}

#[test]
fn what_cannot_move_is_refused_by_its_name() {
    for (place, value, name) in [
        ("/pcidevs", json!([{ "dev": 1 }]), "pcidevs"),
        ("/rdms", json!([{}]), "rdms"),
        ("/dtdevs", json!([{}]), "dtdevs"),
        ("/vtpms", json!([{}]), "vtpms"),
        ("/p9s", json!([{}]), "p9s"),
        ("/pvcallsifs", json!([{}]), "pvcallsifs"),
        ("/vdispls", json!([{}]), "vdispls"),
        ("/vsnds", json!([{}]), "vsnds"),
        ("/channels", json!([{}]), "channels"),
        ("/usbctrls", json!([{}]), "usbctrls"),
        ("/usbdevs", json!([{}]), "usbdevs"),
        ("/virtios", json!([{}]), "virtios"),
        (
            "/b_info/disable_migrate",
            json!("True"),
            "b_info.disable_migrate",
        ),
        ("/b_info/nested_hvm", json!("True"), "b_info.nested_hvm"),
        ("/b_info/vpmu", json!("True"), "b_info.vpmu"),
        (
            "/b_info/device_model_stubdomain",
            json!("True"),
            "b_info.device_model_stubdomain",
        ),
        (
            "/b_info/vnuma_nodes",
            json!([{ "memkb": 1 }]),
            "b_info.vnuma_nodes",
        ),
        ("/b_info/ioports", json!([{ "first": 1 }]), "b_info.ioports"),
        ("/b_info/irqs", json!([1]), "b_info.irqs"),
        ("/b_info/iomem", json!([{ "start": 1 }]), "b_info.iomem"),
        ("/b_info/device_tree", json!("/x"), "b_info.device_tree"),
        ("/b_info/altp2m", json!("mixed"), "b_info.altp2m"),
        ("/b_info/tee", json!("optee"), "b_info.tee"),
        (
            "/b_info/type.pv/e820_host",
            json!("True"),
            "b_info.type.pv.e820_host",
        ),
        (
            "/c_info/driver_domain",
            json!("True"),
            "c_info.driver_domain",
        ),
        (
            "/c_info/passthrough",
            json!("sync_pt"),
            "c_info.passthrough",
        ),
        ("/disks/0/script", json!("block-drbd"), "disks[0].script"),
        ("/disks/0/backend", json!("tap"), "disks[0].backend"),
        ("/disks/0/backend_domid", json!(3), "disks[0].backend_domid"),
        (
            "/disks/0/specification",
            json!("virtio"),
            "disks[0].specification",
        ),
        (
            "/disks/0/colo_enable",
            json!("True"),
            "disks[0].colo_enable",
        ),
        (
            "/nics/0/backend_domname",
            json!("driver"),
            "nics[0].backend_domname",
        ),
        ("/nics/0/gatewaydev", json!("eth0"), "nics[0].gatewaydev"),
        ("/nics/0/nictype", json!("vif_ioemu"), "nics[0].nictype"),
        ("/vfbs/0/sdl/enable", json!("True"), "vfbs[0].sdl.enable"),
        ("/vfbs/0/vnc/enable", json!("False"), "vfbs[0].vnc.enable"),
        (
            "/vkbs/0/backend_type",
            json!("linux"),
            "vkbs[0].backend_type",
        ),
    ] {
        assert_eq!(
            try_accept(with(place, value)).unwrap_err(),
            ConfigurationError::Unsupported(Text::new(name))
        );
    }
    // Lists with nothing in them say nothing.
    for place in ["/pcidevs", "/virtios", "/b_info/vnuma_nodes"] {
        assert!(try_accept(with(place, json!([]))).is_ok());
    }
}

#[test]
fn the_document_has_to_be_that_of_the_offer() {
    for (place, value) in [
        ("/c_info/name", json!("other")),
        (
            "/c_info/uuid",
            json!("00000000-62a4-4f3b-9d5a-0d8e7d1b6b0f"),
        ),
        ("/c_info/type", json!("pvh")),
        ("/b_info/max_vcpus", json!(3)),
        ("/b_info/type.hvm", json!({})),
        ("/b_info/type.pvh", json!({})),
    ] {
        assert!(
            matches!(
                try_accept(with(place, value)),
                Err(ConfigurationError::Contradiction(_))
            ),
            "{place}"
        );
    }
    let hvm = Offer {
        kind: GuestKind::Hvm,
        ..offer(configuration())
    };
    assert_eq!(
        accept(&hvm, &policy()).unwrap_err(),
        ConfigurationError::Unsupported(Text::new("c_info.type"))
    );
}

#[test]
fn paths_stay_below_the_sites_directories() {
    for path in [
        "/srv/disks",
        "/srv/disks/",
        "/srv/disksx/g1",
        "/srv/disks/../../etc/shadow",
        "/srv/disks/./g1",
        "/srv/disks//g1",
        "/srv/disks/g1/..",
        "srv/disks/g1",
        "nbd:host:1",
        "/etc/shadow",
        "/srv/disks/g\n1",
        "/SRV/disks/g1",
    ] {
        let result = try_accept(with("/disks/0/pdev_path", json!(path)));
        assert!(
            matches!(result, Err(ConfigurationError::NotAllowed { .. })),
            "{path}"
        );
        let error = result.unwrap_err().to_string();
        assert!(
            error.contains("disks[0].pdev_path") && !error.contains('\n'),
            "{error}"
        );
        assert!(
            try_accept(with("/b_info/kernel", json!(path))).is_err(),
            "{path}"
        );
    }
    assert!(try_accept(with("/b_info/ramdisk", json!("/srv/disks/initrd"))).is_err());
    assert!(try_accept(with("/b_info/kernel", json!("/boot/guests/a/b-1.2..3"))).is_ok());
    assert!(try_accept(with("/disks/0/pdev_path", Value::Null)).is_err());
    assert!(is_below_root());
}

fn is_below_root() -> bool {
    let root = ["/".to_owned()];
    build::is_below("/x", &root) && !build::is_below("/", &root) && !build::is_below("/../x", &root)
}

#[test]
fn a_directory_that_is_odd_itself_allows_nothing() {
    for directory in ["relative", "/srv/../disks", "/srv//disks"] {
        let directories = [directory.to_owned()];
        assert!(!build::is_below(&format!("{directory}/g1"), &directories));
    }
}

#[test]
fn bridges_are_this_sites() {
    let bridge = |peer: Value, policy: &SitePolicy| {
        accept(&offer(with("/nics/0/bridge", peer)), policy)
            .map(|accepted| accepted.configuration["nics"][0]["bridge"].clone())
    };
    assert_eq!(bridge(json!("xenbr0"), &policy()).unwrap(), "br-guests");
    assert!(matches!(
        bridge(json!("xenbr9"), &policy()),
        Err(ConfigurationError::NotAllowed { .. })
    ));
    // None is the one that libxl takes then.
    assert_eq!(bridge(Value::Null, &policy()).unwrap(), "br-guests");
    let none = SitePolicy {
        bridges: BTreeMap::new(),
        ..policy()
    };
    assert!(matches!(
        bridge(Value::Null, &none),
        Err(ConfigurationError::NotAllowed { .. })
    ));
    let policy = SitePolicy {
        default_bridge: Some("br1".to_owned()),
        ..policy()
    };
    assert_eq!(bridge(json!("xenbr9"), &policy).unwrap(), "br1");
    assert_eq!(bridge(Value::Null, &policy).unwrap(), "br-guests");
}

#[test]
fn a_boot_loader_is_this_sites_or_none() {
    let mut document = with("/b_info/bootloader", json!("/tmp/evil"));
    document["b_info"].as_object_mut().unwrap().remove("kernel");
    let accepted = try_accept(document.clone()).unwrap();
    assert_eq!(accepted.configuration["b_info"]["bootloader"], Value::Null);
    assert_eq!(accepted.left_out, [Text::new("b_info.bootloader")]);
    let policy = SitePolicy {
        bootloader: Some("pygrub".to_owned()),
        ..policy()
    };
    let accepted = accept(&offer(document), &policy).unwrap();
    assert_eq!(accepted.configuration["b_info"]["bootloader"], "pygrub");
    // A guest that has none gets none.
    let accepted = accept(&offer(configuration()), &policy).unwrap();
    assert_eq!(accepted.configuration["b_info"]["bootloader"], Value::Null);
}

#[test]
fn memory_is_what_the_guest_has() {
    let memory = |max: Value, target: Value| {
        let mut document = with("/b_info/max_memkb", max);
        document["b_info"]["target_memkb"] = target;
        try_accept(document).map(|accepted| {
            let info = &accepted.configuration["b_info"];
            (
                info["max_memkb"].as_u64().unwrap(),
                info["target_memkb"].as_u64().unwrap(),
            )
        })
    };
    assert_eq!(memory(json!(1000), json!(1000)), Ok((160_000, 160_000)));
    assert_eq!(memory(json!(500_000), json!("x")), Ok((500_000, 160_000)));
    assert_eq!(memory(Value::Null, Value::Null), Ok((160_000, 160_000)));
    assert!(memory(json!(u64::MAX), json!(1)).is_err());
    assert!(memory(json!(-1), json!(1)).is_err());
}

#[test]
fn values_that_cannot_be_are_refused() {
    for (place, value) in [
        ("/c_info", json!(1)),
        ("/b_info", json!([])),
        ("/disks", json!({})),
        ("/disks", json!([1])),
        ("/disks/0/vdev", json!("../x")),
        ("/disks/0/vdev", Value::Null),
        ("/disks/0/format", json!("exe")),
        ("/disks/0/readwrite", json!(2)),
        ("/disks/0/direct_io_safe", json!("True")),
        ("/disks/0/discard_enable", json!(true)),
        ("/nics/0/mac", json!("00:16:3e:01:02")),
        ("/nics/0/mac", json!("00:16:3e:01:02:0g")),
        ("/nics/0/mac", Value::Null),
        ("/nics/0/ip", json!("10.0.0.1; reboot")),
        ("/nics/0/ip", json!("$(reboot)")),
        ("/nics/0/model", json!("a b")),
        ("/nics/0/devid", json!(-1)),
        ("/b_info/avail_vcpus", json!([0, 2])),
        ("/b_info/avail_vcpus", json!([1, 0])),
        ("/b_info/avail_vcpus", json!([0, 0])),
        ("/b_info/avail_vcpus", json!([-1])),
        ("/b_info/avail_vcpus", json!([0, 1, 1])),
        ("/b_info/cmdline", json!("a\nb")),
        ("/b_info/cmdline", json!("x".repeat(5000))),
        ("/b_info/tsc_mode", json!("fast")),
        ("/b_info/shadow_memkb", json!(1u64 << 40)),
        ("/b_info/blkdev_start", json!("a/b")),
        (
            "/b_info/cpuid",
            json!([{ "leaf": 1, "eax": "2".repeat(32) }]),
        ),
        ("/b_info/cpuid", json!([{ "leaf": 1, "eax": "x" }])),
        ("/b_info/cpuid", json!([{ "eax": "x".repeat(32) }])),
        (
            "/b_info/cpuid",
            json!({ "cpuid": [], "msr": [{ "index": 1 }] }),
        ),
        ("/vfbs/0/vnc/passwd", json!("a,b")),
        ("/vfbs/0/keymap", json!("../de")),
        ("/vkbs/0/width", json!(1 << 20)),
        ("/on_reboot", json!("run")),
    ] {
        let error = try_accept(with(place, value.clone())).unwrap_err();
        assert!(
            matches!(
                error,
                ConfigurationError::Malformed(_) | ConfigurationError::Missing(_)
            ),
            "{place} {value}: {error}"
        );
    }
    assert!(accept(&offer(json!(null)), &policy()).is_err());
    assert!(accept(&offer(json!({})), &policy()).is_err());
}

#[test]
fn cpuid_filters_cross_in_both_forms() {
    let leaf = json!({ "leaf": 7, "subleaf": 0, "ebx": "x".repeat(32) });
    let msr = json!({ "index": 266, "policy": "0".repeat(64) });
    for cpuid in [
        json!([leaf]),
        json!({ "cpuid": [leaf], "msr": [msr] }),
        json!({ "cpuid": [], "msr": [msr] }),
    ] {
        let accepted = try_accept(with("/b_info/cpuid", cpuid.clone())).unwrap();
        assert_eq!(accepted.configuration["b_info"]["cpuid"], cpuid);
    }
}

#[test]
fn pvh_guests_are_taken_too() {
    let mut document = configuration();
    document["c_info"]["type"] = "pvh".into();
    let info = document["b_info"].as_object_mut().unwrap();
    info.remove("type.pv");
    info.insert("type.pvh".into(), json!({ "pvshim": "False" }));
    let pvh = Offer {
        kind: GuestKind::Pvh,
        ..offer(document.clone())
    };
    let accepted = accept(&pvh, &policy()).unwrap();
    assert_eq!(accepted.configuration["b_info"]["type.pvh"], json!({}));
    document["b_info"]["type.pvh"]["pvshim"] = "True".into();
    let pvh = Offer {
        kind: GuestKind::Pvh,
        ..offer(document)
    };
    assert!(matches!(
        accept(&pvh, &policy()),
        Err(ConfigurationError::Unsupported(_))
    ));
}

/// The special pages of a PVH guest are no reason for its balloon to grow.
#[test]
fn a_pvh_guest_that_has_come_to_its_target_keeps_it() {
    let mib = 256;
    let target = |kind, told, pages| balloon_target(kind, told, pages);
    let (told, pages) = (Some(128 << 10), 128 * mib + 16);
    assert_eq!(target(GuestKind::Pvh, told, pages), 128 << 10);
    assert_eq!(target(GuestKind::Pvh, told, 128 * mib - 16), 128 << 10);
    assert_eq!(target(GuestKind::Pv, told, pages), (128 << 10) + 64);
    // One that is on its way gets what it has.
    assert_eq!(target(GuestKind::Pvh, told, 120 * mib), 120 << 10);
    assert_eq!(target(GuestKind::Pvh, told, 140 * mib), 140 << 10);
    assert_eq!(target(GuestKind::Pvh, None, pages), (128 << 10) + 64);

    let mut document = configuration();
    document["c_info"]["type"] = "pvh".into();
    let info = document["b_info"].as_object_mut().unwrap();
    info.remove("type.pv");
    info.insert("type.pvh".into(), json!({}));
    info.insert("max_memkb".into(), (128 << 10).into());
    info.insert("target_memkb".into(), (128 << 10).into());
    let pvh = Offer {
        kind: GuestKind::Pvh,
        populated_pages: pages,
        pages: 0xff000,
        ..offer(document)
    };
    let accepted = accept(&pvh, &policy()).unwrap();
    assert_eq!(accepted.configuration["b_info"]["target_memkb"], 128 << 10);
    assert_eq!(accepted.most_pages(), 128 * mib);
}

#[test]
fn what_is_told_is_bounded_and_safe() {
    let mut document = configuration();
    for at in 0..10_000 {
        document[format!("\x1b[31m{at}")] = 1.into();
    }
    let left_out = try_accept(document).unwrap().left_out;
    assert!(left_out.len() <= 64);
    assert!(left_out.iter().all(|name| !name.as_str().contains('\x1b')));
}

/// Names of all places in a document.
fn places(value: &Value, path: &str, into: &mut Vec<String>) {
    let mut go = |key: &str, value: &Value| {
        let place = format!("{path}/{key}");
        into.push(place.clone());
        places(value, &place, into);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| go(key, value)),
        Value::Array(values) => {
            values
                .iter()
                .enumerate()
                .for_each(|(at, value)| go(&at.to_string(), value));
        }
        _ => {}
    }
}

fn values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(json!("True")),
        Just(json!("/srv/disks/../x")),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(".{0,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

#[test]
fn an_image_with_tables_of_its_own_is_not_written_at_two_hosts() {
    let disk = |format: &str, written: bool| {
        let mut document = with("/disks/0/format", json!(format));
        document["disks"][0]["readwrite"] = json!(u8::from(written));
        try_accept(document)
    };
    for format in ["qcow2", "qcow", "vhd", "qed"] {
        assert!(matches!(
            disk(format, true),
            Err(ConfigurationError::Unsupported { .. })
        ));
        assert!(disk(format, false).is_ok());
    }
    assert!(disk("raw", true).is_ok());
}

#[test]
fn what_qemu_serves_is_told() {
    let disk = |fields: Value| json!({ "disks": [{ "format": "raw" }, fields] });
    for plain in [
        json!({}),
        json!({ "vfbs": [], "disks": [], "nics": [{}] }),
        disk(json!({})),
        disk(json!({ "format": "raw", "backend": "phy" })),
    ] {
        assert!(!need_qemu(&plain), "{plain}");
    }
    for served in [
        json!({ "vfbs": [{}] }),
        disk(json!({ "format": "qcow2" })),
        disk(json!({ "format": "empty", "is_cdrom": 1 })),
        disk(json!({ "format": "raw", "backend": "qdisk" })),
    ] {
        assert!(need_qemu(&served), "{served}");
    }
}

proptest! {
    #[test]
    fn whatever_stands_somewhere_nothing_unlisted_passes(
        at in any::<prop::sample::Index>(),
        value in values(),
    ) {
        let mut document = configuration();
        let mut all = Vec::new();
        places(&document, "", &mut all);
        *document.pointer_mut(&all[at.index(all.len())]).unwrap() = value;
        if let Ok(accepted) = try_accept(document) {
            let mut ordinary = Vec::new();
            places(&try_accept(configuration()).unwrap().configuration, "", &mut ordinary);
            let mut taken = Vec::new();
            places(&accepted.configuration, "", &mut taken);
            for place in taken {
                prop_assert!(
                    ordinary.contains(&place) || place.starts_with("/b_info/cpuid"),
                    "{place}"
                );
            }
            prop_assert_eq!(&accepted.configuration["c_info"]["domid"], 0);
            prop_assert_eq!(&accepted.configuration["b_info"]["target_memkb"], 160_000);
        }
    }
}
