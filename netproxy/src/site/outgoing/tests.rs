//! Detours as they are asked for, without a kernel that carries them out.

use super::*;

fn detour(side: Side) -> Detour {
    Detour {
        guest: "desktop".into(),
        guest_address: "10.7.0.5".parse().unwrap(),
        number: 3,
        side,
        tunnel: Tunnel::Vxlan {
            local: "198.51.100.7".parse().unwrap(),
            remote: "203.0.113.9".parse().unwrap(),
            port: 4789,
        },
        limit: Duration::from_secs(3600),
        flows: vec![Flow {
            protocol: Protocol::Tcp,
            guest_port: 40000,
            remote: "192.0.2.1".parse().unwrap(),
            remote_port: 443,
        }],
    }
}

#[test]
fn each_side_marks_its_direction() {
    let new = detour(Side::New).rules();
    assert!(new.contains("tcp . 40000 . 192.0.2.1 . 443 timeout 3600s"));
    assert!(new.contains(
        "ip saddr 10.7.0.5 meta l4proto . th sport . ip daddr . th dport @old \
         meta mark set 0x766d0003 notrack"
    ));
    let old = detour(Side::Old).rules();
    assert!(old.contains(
        "ip daddr 10.7.0.5 meta l4proto . th dport . ip saddr . th sport @old \
         meta mark set 0x766d0003\n"
    ));
    assert!(!old.contains("notrack"), "The old site goes on translating");
    let guard = format!(
        "udp dport 4789 @th,96,24 {} ip saddr != 203.0.113.9 drop",
        NETWORK + 3
    );
    assert!(old.contains(&guard));
    assert!(old.contains("table ip vmshadow_guard_desktop {"));
    let mut six = detour(Side::Old);
    six.tunnel = Tunnel::Vxlan {
        local: "2001:db8::7".parse().unwrap(),
        remote: "2001:db8::9".parse().unwrap(),
        port: 4789,
    };
    let six = six.rules();
    assert!(six.contains("table ip vmshadow_outgoing_desktop {"));
    assert!(six.contains("table ip6 vmshadow_guard_desktop {"));
    assert!(six.contains("ip6 saddr != 2001:db8::9 drop"));
    let mut none = detour(Side::New);
    none.flows.clear();
    assert!(!none.rules().contains("elements"));
}

#[test]
fn nonsense_is_refused() {
    for spoil in [
        (|d| d.guest.clear()) as fn(&mut Detour),
        |d| d.limit = Duration::from_millis(10),
        |d| d.flows[0].remote = "2001:db8::1".parse().unwrap(),
        |d| d.flows = vec![d.flows[0]; MAX_FLOWS + 1],
        |d| {
            d.tunnel = Tunnel::Device {
                name: "wg0 table main".into(),
                gateway: None,
            }
        },
        |d| {
            d.tunnel = Tunnel::Vxlan {
                local: "10.0.0.1".parse().unwrap(),
                remote: "2001:db8::1".parse().unwrap(),
                port: 1,
            }
        },
    ] {
        let mut bad = detour(Side::New);
        spoil(&mut bad);
        assert!(matches!(bad.apply(), Err(Error::Config(_))));
    }
}

#[test]
fn a_number_is_of_the_last_two_bytes_of_the_address() {
    assert_eq!(Detour::number_of("10.7.1.2".parse().unwrap()), 0x102);
    assert_eq!(Detour::number_of("fd00::7".parse().unwrap()), 7);
}
