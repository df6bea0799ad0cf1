//! A peer that lies: rubbish, half a conversation, and a real one with bytes changed. An error,
//! bounded memory, nothing left; the guest runs where it was.

use testbed::SiteName;

use crate::scene::{migrate, move_guest, said, settled, sites_with_small_guest};

/// Changes some bytes of a file, or cuts it: the same way for the same number.
const SPOIL: &str = r#"
import random, sys
source, target, seed, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
data = bytearray(open(source, "rb").read()[:limit])
random.seed(seed)
if seed % 3 == 0:
    del data[random.randrange(len(data)):]
else:
    # The beginning, where the lengths and the documents are, more often than the rest.
    reach = 4096 if seed % 3 == 1 else len(data)
    for _ in range(random.randrange(1, 5)):
        data[random.randrange(min(reach, len(data)))] = random.randrange(256)
open(target, "wb").write(data)
"#;

/// Runs a command and prints the most memory that it held, in KiB.
const MEASURE: &str = r#"
import resource, subprocess, sys
status = subprocess.run(sys.argv[1], shell=True, stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"#;

/// What a receiver may hold: the memory file of the guest, mapped, and 64 MiB for itself.
const MOST_KIB: u64 = (96 + 64) << 10;

/// A conversation is spoiled each way with each of some numbers. The engine's own tests do the same
/// to many more conversations, with guests that are replayed.
#[test]
#[ignore = "minutes: make test-full"]
fn lying_peers() {
    let seeds = 0..9u32;
    let (testbed, guest) = sites_with_small_guest();
    let (here, there) = (testbed.site(SiteName::A), testbed.site(SiteName::B));
    for site in [here, there] {
        site.write("/tmp/spoil.py", SPOIL.as_bytes()).unwrap();
        site.write("/tmp/measure.py", MEASURE.as_bytes()).unwrap();
    }

    // A real conversation, both ways, is written down at b; it ends before the commit.
    let record =
        "--remote-command 'r() { tee /tmp/question | vmshadow \"$@\" | tee /tmp/answer; }; r'";
    here.run(&format!(
        "env VMSHADOW_HOLD=ready:/tmp/held {} > /tmp/out 2>&1 & \
         for i in $(seq 1500); do [ -e /tmp/held ] && break; sleep 0.2; done; kill -9 $(cat /tmp/held); rm /tmp/held",
        migrate(SiteName::A, record)
    ))
    .unwrap();
    there.run("ls -l /tmp/question /tmp/answer").unwrap();
    assert_eq!(settled(&testbed, &guest, "the recorded move"), SiteName::A);

    // A lying source.
    let rubbish = "head -c 3000000 /dev/urandom | vmshadow receive 2> /dev/null";
    let half = "head -c $(($(stat -c %s /tmp/question) / 2)) /tmp/question | \
                vmshadow receive 2> /dev/null";
    let mut commands = vec![rubbish.to_owned(), half.to_owned()];
    for seed in seeds.clone() {
        commands.push(format!(
            "python3 /tmp/spoil.py /tmp/question /tmp/spoiled {seed} 9000000; \
             vmshadow receive < /tmp/spoiled 2> /dev/null"
        ));
    }
    for command in &commands {
        there.write("/tmp/command", command.as_bytes()).unwrap();
        let measured = there
            .run("python3 /tmp/measure.py 'sh /tmp/command'")
            .unwrap();
        let mut words = measured.split_whitespace();
        assert_eq!(words.next(), Some("1"), "{command}: {measured}");
        let held: u64 = words.next().unwrap().parse().unwrap();
        assert!(held < MOST_KIB, "{command}: {held} KiB");
        assert_eq!(settled(&testbed, &guest, command), SiteName::A);
    }

    // A lying destination.
    let mut commands = vec!["head -c 3000000 /dev/urandom; cat > /dev/null".to_owned()];
    for seed in seeds {
        commands.push(format!(
            "python3 /tmp/spoil.py /tmp/answer /tmp/spoiled {seed} 9000000; \
             cat /tmp/spoiled; cat > /dev/null"
        ));
    }
    for command in &commands {
        there.write("/tmp/command", command.as_bytes()).unwrap();
        let moved = here
            .output(&migrate(
                SiteName::A,
                "--retry 0 --remote-command 'sh /tmp/command'",
            ))
            .unwrap();
        assert_eq!(moved.status.code(), Some(1), "{command}: {}", said(&moved));
        assert_eq!(settled(&testbed, &guest, command), SiteName::A);
    }
    move_guest(&testbed, SiteName::A, "");
    assert_eq!(settled(&testbed, &guest, "an honest move"), SiteName::B);
}
