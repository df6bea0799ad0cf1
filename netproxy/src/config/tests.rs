//! Whole files, right and wrong.

use super::*;
use crate::site::Forward;
use proptest::prelude::*;
use std::net::IpAddr;

const GOOD: &str = r#"
version = 1
[limits]
buffer = "64KiB"
idle = "5m"
connect = 3
[[guest]]
name = "desktop"
address = "10.7.0.5"
source = "192.0.2.1"
site = "a"
[guest.sites.a]
address = "198.51.100.7"
probe_port = 22
[guest.sites.b]
routed = true
[[guest.service]]
name = "vnc"
listen = ["0.0.0.0:5900", "[::]:5900"]
port = 5900
site_port = 15900
allow = ["203.0.113.0/24"]
"#;

fn error(text: &str) -> String {
    Config::parse(text, "proxy.toml").unwrap_err().to_string()
}

#[test]
fn a_whole_file() {
    let config = Config::parse(GOOD, "proxy.toml").unwrap();
    assert_eq!(config.limits.buffer, ByteSize(65536));
    assert_eq!(config.limits.idle, Period(Duration::from_secs(300)));
    assert_eq!(config.limits.connect, Period(Duration::from_secs(3)));
    let guest = &config.guests[0];
    let service = &guest.services[0];
    assert_eq!(
        guest.upstream("a", service),
        "198.51.100.7:15900".parse().ok()
    );
    assert_eq!(guest.upstream("b", service), "10.7.0.5:5900".parse().ok());
    assert_eq!(guest.upstream("c", service), None);
    assert_eq!(guest.probe("a"), "198.51.100.7:22".parse().ok());
    assert_eq!(guest.probe("b"), None);
}

#[test]
fn a_site_is_told_what_to_translate() {
    let config = Config::parse(GOOD, "proxy.toml").unwrap();
    let mut guest = config.guests[0].clone();
    let translation = guest.translation("a").unwrap().unwrap();
    assert_eq!(translation.edges, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(
        translation.forwards,
        [Forward {
            site_port: 15900,
            guest_port: 5900
        }]
    );
    assert_eq!(guest.translation("b").unwrap(), None);
    assert!(matches!(
        guest.translation("c"),
        Err(Error::UnknownSite { .. })
    ));
    guest.source = None;
    assert!(matches!(guest.translation("a"), Err(Error::Config(_))));
}

#[test]
fn errors_name_the_line() {
    let swap = |from: &str, to: &str| error(&GOOD.replace(from, to));
    assert_eq!(
        swap("version = 1", "version = 2"),
        "proxy.toml:2: Version 2 is not known; this is version 1"
    );
    assert!(swap("64KiB", "64 KB").starts_with("proxy.toml:4: a size is"));
    assert!(swap("\"5m\"", "\"5 days\"").starts_with("proxy.toml:5: a time is"));
    assert_eq!(
        swap("site = \"a\"", "site = \"z\""),
        "proxy.toml:11: There is no [guest.sites.z]"
    );
    assert!(swap("routed = true", "routed = false").starts_with("proxy.toml:15: A site has"));
    assert!(swap("[::]:5900", "0.0.0.0:5900").starts_with("proxy.toml:19: Another"));
    assert!(swap("port = 5900", "port = 0").starts_with("proxy.toml:20: A port"));
    assert!(swap("203.0.113.0/24", "here").starts_with("proxy.toml:22: "));
    assert!(swap("idle =", "idel =").starts_with("proxy.toml:5: unknown field"));
    assert!(swap("192.0.2.1", "2001:db8::1").starts_with("proxy.toml:12: The source"));
    assert!(swap("name = \"vnc\"", "name = \"\"").starts_with("proxy.toml:18: A service"));
    let mss = error(&GOOD.replace("site = \"a\"", "site = \"a\"\nmss = 80"));
    assert!(mss.starts_with("proxy.toml:8: An mss"), "{mss}");
    let bracket = swap("[limits]", "[limits");
    assert!(bracket.starts_with("proxy.toml:3: "), "{bracket}");
    assert!(!bracket.contains('\n'), "{bracket}");
}

#[test]
fn what_is_reached_by_one_port_of_a_site_is_one_service() {
    let guest = &GOOD[GOOD.find("[[guest]]").unwrap()..];
    let second = guest
        .replace("\"desktop\"", "\"other\"")
        .replace("10.7.0.5", "10.7.0.6")
        .replace(":5900", ":5901");
    let both = |second: &str| Config::parse(&format!("{GOOD}{second}"), "proxy.toml");
    both(&second.replace("15900", "15901")).unwrap();
    let refused = both(&second).unwrap_err().to_string();
    assert!(
        refused.contains("reached by 198.51.100.7:15900"),
        "{refused}"
    );

    let service = "[[guest.service]]\nname = \"too\"\nlisten = []\nport = 5900\n";
    both(&format!("{service}site_port = 15900\n")).unwrap();
    let refused = both(service).unwrap_err().to_string();
    assert!(refused.contains("another site_port"), "{refused}");
    let refused =
        both(&format!("{service}site_port = 15900\n").replace("port = 5900", "port = 22"));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("reached by"), "{refused}");
}

#[test]
fn the_example_in_the_documentation_is_valid() {
    let source = include_str!("mod.rs");
    let example: String = source
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .skip_while(|line| !line.contains("```toml"))
        .skip(1)
        .take_while(|line| !line.contains("```"))
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(example.contains("[[guest.service]]"));
    Config::parse(&example, "example").unwrap();
    let guide = include_str!("../../../docs/guide/proxy.md");
    let mut parts = guide.split("```toml\n").skip(1);
    let example = parts.next().unwrap().split("```").next().unwrap();
    Config::parse(example, "guide").unwrap();
    let example = include_str!("../../../packaging/netproxy/netproxy.toml");
    Config::parse(example, "example").unwrap();
    let limits = example.replace("\n#[", "\n[").replace("\n#c", "\nc");
    let limits = Config::parse(&limits, "example").unwrap().limits;
    assert_eq!(limits, Limits::default());
}

proptest! {
    #[test]
    fn any_text_gives_an_answer(text in ".{0,200}", cut in 0_usize..500) {
        let _ = Config::parse(&text, "x");
        let _ = Config::parse(GOOD.get(..cut).unwrap_or(GOOD), "x");
    }
}
