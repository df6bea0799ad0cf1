//! A desktop behind an edge: a VNC viewer and an ssh session, as people have them, through moves.

use testbed::{Edge, Guest, Hypervisor, Site, SiteName};

use crate::scene::{move_guest, new_sites, settled, wait_until, with};

/// Prints the colour of a place of display 1, away from the pointer: blue, green, red, each two
/// digits.
const PIXEL: &str = r"
from Xlib import X, display
root = display.Display(':1').screen().root
print(root.get_image(100, 100, 1, 1, X.ZPixmap, 0xffffffff).data[:3].hex())
";

/// A viewer with a screen of its own, and an ssh session, both at site b: across the WAN from the
/// edge. The session paints the guest's screen in each colour that it is told.
const CLIENTS: &str = r#"
cd /tmp
start() { # name, command ...
    name=$1; shift
    setsid "$@" > $name.log 2>&1 < /dev/null &
    echo $! > $name.pid
}
start screen Xtightvnc :1 -geometry 640x480 -depth 24 -fp /usr/share/fonts/testbed -ac
until [ -e /tmp/.X11-unix/X1 ]; do sleep 0.2; done
DISPLAY=:1 start viewer xtightvncviewer -nojpeg ADDRESS::5900
mkfifo told
setsid sleep 1000000 > told 2> /dev/null < /dev/null &
setsid ssh -T -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@ADDRESS \
    'while read colour; do DISPLAY=:0 xsetroot -solid "$colour" && echo "$colour"; done' \
    < told > heard 2> session.log &
echo $! > session.pid
"#;

/// Paints the guest's screen by the session, until the viewer shows it.
fn paint(client: &Site, red: u8, green: u8, blue: u8) {
    let colour = format!("#{red:02x}{green:02x}{blue:02x}");
    client.run(&format!("echo '{colour}' > /tmp/told")).unwrap();
    let shown = format!("{blue:02x}{green:02x}{red:02x}");
    wait_until(&format!("{colour} is heard and shown"), || {
        let heard = client.run("tail -n 1 /tmp/heard").unwrap();
        let seen = client.output("python3 /tmp/pixel.py").unwrap();
        heard.trim() == colour && String::from_utf8_lossy(&seen.stdout).trim() == shown
    });
}

/// Neither has ended: they do not begin anew by themselves.
fn sessions_live(client: &Site) {
    for name in ["viewer", "session"] {
        let alive = client
            .output(&format!("kill -0 $(cat /tmp/{name}.pid)"))
            .unwrap();
        let log = client.run(&format!("cat /tmp/{name}.log")).unwrap();
        assert!(alive.status.success(), "The {name} ended: {log}");
    }
}

#[test]
#[ignore = "minutes: make test-full"]
fn viewer_and_shell_stay_through_moves() {
    let testbed = new_sites(with(Hypervisor::Release));
    let guest = Guest {
        memory_mib: 160,
        behind_edge: true,
        desktop: true,
        ..Guest::new("g1", 101)
    };
    Edge::set_up(&testbed, &[&guest]).unwrap();
    testbed.start_guest(SiteName::A, &guest).unwrap();
    let client = testbed.site(SiteName::B);
    client.write("/tmp/pixel.py", PIXEL.as_bytes()).unwrap();
    let clients = CLIENTS.replace("ADDRESS", &guest.address().to_string());
    client.run(&clients).unwrap();
    paint(client, 0xff, 0xff, 0xff);
    for (from, (red, green, blue)) in [
        (SiteName::A, (0xcc, 0, 0)),
        (SiteName::B, (0, 0xcc, 0)),
        (SiteName::A, (0, 0, 0xcc)),
    ] {
        move_guest(&testbed, from, "");
        let at = settled(&testbed, &guest, &format!("moved from {from:?}"));
        assert_eq!(at, from.other());
        paint(client, red, green, blue);
        sessions_live(client);
    }
}
