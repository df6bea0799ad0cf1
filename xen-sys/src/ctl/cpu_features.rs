//! The features of two CPUs, compared bit by bit.
//!
//! ```text
//!   guest's policy ──► feature words ──┐
//!                                      ├─► what the guest uses and the host lacks
//!   host's maximum ──► feature words ──┘
//! ```
//! Up to 4.17, libxc compares little more than how many leaves there are, and the hypervisor takes
//! silently away what it can't give: a guest would wake up with less than it found at its boot, and
//! die of its next instruction. So the words that hold features are compared here.

use crate::raw::xen_cpuid_leaf_t as Leaf;
use std::fmt;

/// The subleaf of a leaf that has none, as the hypervisor writes it.
const NO_SUBLEAF: u32 = u32::MAX;

/// A register that CPUID fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, leaf: &Leaf) -> u32 {
        match self {
            Self::Eax => leaf.a,
            Self::Ebx => leaf.b,
            Self::Ecx => leaf.c,
            Self::Edx => leaf.d,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// 32 features: a leaf, its subleaf, a register; and the names of its bits from 0 on, as
/// `cpuid=` of xl.cfg(5) spells them (empty where it has none).
struct Word(u32, u32, Register, &'static [&'static str]);

/// The words that hold features, as `xen/arch-x86/cpufeatureset.h` lists them.
const WORDS: [Word; 16] = [
    Word(1, 0, Register::Edx, &LEAF_1_EDX),
    Word(1, 0, Register::Ecx, &LEAF_1_ECX),
    Word(0x8000_0001, 0, Register::Edx, &EXTENDED_1_EDX),
    Word(0x8000_0001, 0, Register::Ecx, &EXTENDED_1_ECX),
    Word(
        0xd,
        1,
        Register::Eax,
        &["xsaveopt", "xsavec", "xgetbv1", "xsaves"],
    ),
    Word(7, 0, Register::Ebx, &LEAF_7_EBX),
    Word(7, 0, Register::Ecx, &LEAF_7_ECX),
    Word(7, 0, Register::Edx, &[]),
    Word(0x8000_0007, 0, Register::Edx, &[]),
    Word(0x8000_0008, 0, Register::Ebx, &[]),
    Word(7, 1, Register::Eax, &[]),
    Word(7, 1, Register::Ebx, &[]),
    Word(7, 1, Register::Ecx, &[]),
    Word(7, 1, Register::Edx, &[]),
    Word(7, 2, Register::Edx, &[]),
    Word(0x8000_0021, 0, Register::Eax, &[]),
];

#[rustfmt::skip]
const LEAF_1_EDX: [&str; 32] = [
    "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cmpxchg8", "apic", "", "sysenter",
    "mtrr", "pge", "mca", "cmov", "pat", "pse36", "psn", "clfsh", "", "ds", "acpi", "mmx", "fxsr",
    "sse", "sse2", "ss", "htt", "tm", "ia64", "pbe",
];
#[rustfmt::skip]
const LEAF_1_ECX: [&str; 32] = [
    "sse3", "pclmulqdq", "dtes64", "monitor", "dscpl", "vmx", "smx", "est", "tm2", "ssse3",
    "cntxid", "", "fma", "cmpxchg16", "xtpr", "pdcm", "", "pcid", "dca", "sse4_1", "sse4_2",
    "x2apic", "movbe", "popcnt", "tsc-deadline", "aes", "xsave", "osxsave", "avx", "f16c",
    "rdrand", "hypervisor",
];
#[rustfmt::skip]
const EXTENDED_1_EDX: [&str; 32] = [
    "", "", "", "", "", "", "", "", "", "", "", "syscall", "", "", "", "", "", "", "", "", "nx",
    "", "mmxext", "", "", "ffxsr", "page1gb", "rdtscp", "", "lm", "3dnowext", "3dnow",
];
#[rustfmt::skip]
const EXTENDED_1_ECX: [&str; 30] = [
    "lahfsahf", "cmplegacy", "svm", "extapic", "altmovcr8", "abm", "sse4a", "misalignsse",
    "3dnowprefetch", "osvw", "ibs", "xop", "skinit", "wdt", "", "lwp", "fma4", "", "", "nodeid",
    "", "tbm", "topoext", "perfctr_core", "perfctr_nb", "", "", "", "", "monitorx",
];
#[rustfmt::skip]
const LEAF_7_EBX: [&str; 32] = [
    "fsgsbase", "tsc_adjust", "", "bmi1", "hle", "avx2", "", "smep", "bmi2", "erms", "invpcid",
    "rtm", "cmt", "", "mpx", "cat", "avx512f", "avx512dq", "rdseed", "adx", "smap", "avx512ifma",
    "", "clflushopt", "clwb", "proc_trace", "avx512pf", "avx512er", "avx512cd", "sha", "avx512bw",
    "avx512vl",
];
#[rustfmt::skip]
const LEAF_7_ECX: [&str; 15] = [
    "prefetchwt1", "avx512vbmi", "umip", "pku", "ospke", "", "avx512vbmi2", "cet-ss", "gfni",
    "vaes", "vpclmulqdq", "avx512vnni", "avx512bitalg", "", "avx512vpopcntdq",
];

/// What AMD repeats in leaf 0x80000001 of leaf 1's edx. It comes and goes with the vendor that a
/// guest is shown, and the hypervisor's maximum is without it.
const REPEATED: u32 = 0x0183_f3ff;

/// What a guest uses of its CPU and another CPU lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// The CPUs are not of one vendor: they differ in what no feature says.
    Vendor {
        /// The guest's.
        guest: String,
        /// The other.
        host: String,
    },
    /// Features, by their names.
    Features(Vec<String>),
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { guest, host } => write!(f, "a CPU of {guest}, not of {host}"),
            Self::Features(names) => f.write_str(&names.join(", ")),
        }
    }
}

/// What the guest's leaves promise and the host's don't; nothing when the host offers it all.
pub(super) fn lacks(guest: &[Leaf], host: &[Leaf]) -> Option<Lack> {
    let (guest_vendor, host_vendor) = (vendor(guest), vendor(host));
    if guest_vendor != host_vendor {
        return Some(Lack::Vendor {
            guest: guest_vendor,
            host: host_vendor,
        });
    }
    let mut names = Vec::new();
    for word in &WORDS {
        let missing = word.of(guest) & !word.of(host);
        names.extend(
            (0..32)
                .filter(|bit| missing >> bit & 1 == 1)
                .map(|bit| word.name(bit)),
        );
    }
    (!names.is_empty()).then_some(Lack::Features(names))
}

impl Word {
    /// The word in these leaves; none of its features where the leaf is missing.
    fn of(&self, leaves: &[Leaf]) -> u32 {
        let &Self(leaf, subleaf, register, _) = self;
        let bits = find(leaves, leaf, subleaf).map_or(0, |found| register.of(found));
        match (leaf, register) {
            (0x8000_0001, Register::Edx) => bits & !REPEATED,
            _ => bits,
        }
    }

    fn name(&self, bit: u32) -> String {
        let &Self(leaf, subleaf, register, names) = self;
        match names.get(bit as usize) {
            Some(name) if !name.is_empty() => (*name).to_owned(),
            _ => format!("bit {bit} of leaf {leaf:#x}:{subleaf} {}", register.name()),
        }
    }
}

fn find(leaves: &[Leaf], leaf: u32, subleaf: u32) -> Option<&Leaf> {
    leaves.iter().find(|entry| {
        entry.leaf == leaf
            && (entry.subleaf == subleaf || (subleaf == 0 && entry.subleaf == NO_SUBLEAF))
    })
}

/// The vendor's twelve letters, which may come from outside: shown as plain text only.
fn vendor(leaves: &[Leaf]) -> String {
    let Some(leaf) = find(leaves, 0, 0) else {
        return "an unknown vendor".to_owned();
    };
    [leaf.b, leaf.d, leaf.c]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .map(|byte| {
            if byte.is_ascii_graphic() {
                byte as char
            } else {
                '?'
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: u32, [a, b, c, d]: [u32; 4]) -> Leaf {
        Leaf {
            leaf,
            subleaf,
            a,
            b,
            c,
            d,
        }
    }

    /// A CPU with these features in 1 ecx and 7.0 ebx.
    fn cpu(ecx: u32, ebx: u32) -> Vec<Leaf> {
        vec![
            leaf(0, NO_SUBLEAF, [7, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
            leaf(1, NO_SUBLEAF, [0x663, 0, ecx, 0x0789_cbfd]),
            leaf(7, 0, [1, ebx, 0, 0]),
            leaf(7, 1, [1 << 4, 0, 0, 0]),
        ]
    }

    #[test]
    fn the_same_or_more_suits() {
        assert_eq!(lacks(&cpu(1, 1), &cpu(1, 1)), None);
        assert_eq!(lacks(&cpu(1, 0), &cpu(1 | 1 << 25, 1)), None);
    }

    #[test]
    fn what_is_missing_has_a_name() {
        let lack = lacks(&cpu(1 | 1 << 25, 1 << 5), &cpu(1, 0)).unwrap();
        assert_eq!(lack.to_string(), "aes, avx2");
        // A whole leaf is missing, and its bit has no name.
        let host = &cpu(1, 0)[..3];
        let lack = lacks(&cpu(1, 0), host).unwrap();
        assert_eq!(lack.to_string(), "bit 4 of leaf 0x7:1 eax");
    }

    #[test]
    fn repeated_features_count_once() {
        let mut guest = cpu(1, 1);
        guest.push(leaf(0x8000_0001, NO_SUBLEAF, [0, 0, 0, REPEATED]));
        assert_eq!(lacks(&guest, &cpu(1, 1)), None);
        guest[4].d |= 1 << 27;
        assert_eq!(lacks(&guest, &cpu(1, 1)).unwrap().to_string(), "rdtscp");
    }

    #[test]
    fn vendors_differ() {
        let mut host = cpu(1, 1);
        host[0].b = u32::from_le_bytes(*b"Genu");
        let lack = lacks(&cpu(1, 1), &host).unwrap();
        assert_eq!(
            lack.to_string(),
            "a CPU of AuthenticAMD, not of GenuenticAMD"
        );
        host[0].b = 0x0a1b_5b31;
        let lack = lacks(&cpu(1, 1), &host).unwrap();
        assert!(lack.to_string().ends_with("1[??enticAMD"), "{lack}");
        assert!(lacks(&cpu(0, 0), &[]).is_some());
        assert_eq!(lacks(&[], &[]), None);
    }
}
