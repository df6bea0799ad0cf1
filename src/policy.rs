//! What this site takes of other sites' guests: `/etc/vmshadow/vmshadow.toml`.

use std::path::Path;

use anyhow::Context;
use migrate::configuration::SitePolicy;
use migrate::group::GroupPolicy;
use migrate::link::direct::DirectPolicy;
use migrate::shadow::ShadowPolicy;

use crate::edge::Edge;

/// The configuration file.
pub const PATH: &str = "/etc/vmshadow/vmshadow.toml";

/// The site's policy, and its edge; the defaults where there is no file.
pub fn read() -> anyhow::Result<Policy> {
    read_from(Path::new(PATH))
}

fn read_from(path: &Path) -> anyhow::Result<Policy> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Policy::default());
        }
        other => other.with_context(|| format!("Can't read {}", path.display()))?,
    };
    toml::from_str(&text).map_err(|error| mistake(path, &text, &error))
}

/// What is wrong in the file, in one line: it may have to cross to another site.
fn mistake(path: &Path, text: &str, error: &toml::de::Error) -> anyhow::Error {
    let (line, message) = netproxy::config::explain(text, error);
    let line = line.map_or_else(String::new, |line| format!(", line {line}"));
    anyhow::anyhow!("Bad {}{line}: {message}", path.display())
}

/// The whole file.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// What is taken of guests.
    #[serde(default)]
    pub site: SitePolicy,
    /// What is kept of guests that run elsewhere.
    #[serde(default)]
    pub shadows: ShadowPolicy,
    /// Guests that may be built from what others left at a site.
    #[serde(default, rename = "group")]
    pub groups: Vec<GroupPolicy>,
    /// Whether pages of guests that come may do so by connections that don't go through ssh.
    #[serde(default)]
    pub direct: DirectPolicy,
    /// What keeps their connections, if anything does.
    pub edge: Option<Edge>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_names_its_line() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("vmshadow.toml");
        std::fs::write(&path, "[site]\nkernel_directoriez = []\n").unwrap();
        let message = format!("{:#}", read_from(&path).unwrap_err());
        assert!(message.contains("line 2"), "{message}");
        std::fs::write(&path, "[edge]\nsite = \"x\"\nhosst = \"y\"\n").unwrap();
        let message = format!("{:#}", read_from(&path).unwrap_err());
        assert!(message.contains("line 3"), "{message}");
        assert!(!message.contains('\n'), "{message}");
        // The mistake of whoever forgot a bracket.
        std::fs::write(&path, "[site]\n\n[edge\n").unwrap();
        let message = format!("{:#}", read_from(&path).unwrap_err());
        assert!(message.contains("line 3: "), "{message}");
        assert!(read_from(&root.path().join("none")).unwrap().edge.is_none());
    }

    #[test]
    fn there_may_be_several_groups_and_each_needs_all_of_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("vmshadow.toml");
        let group = "[[group]]\nname = \"x\"\nkey_file = \"/x\"\nguests = [\"a*\"]\n";
        std::fs::write(&path, group.repeat(2)).unwrap();
        assert_eq!(read_from(&path).unwrap().groups.len(), 2);
        std::fs::write(&path, group.replace("/x", "x")).unwrap();
        let message = format!("{:#}", read_from(&path).unwrap_err());
        assert!(
            message.contains("line 3: \"x\" is no absolute"),
            "{message}"
        );
        std::fs::write(&path, group.replace("guests = [\"a*\"]\n", "")).unwrap();
        let message = format!("{:#}", read_from(&path).unwrap_err());
        assert!(message.contains("guests"), "{message}");
    }

    #[test]
    fn an_edge_needs_only_the_name_of_the_site() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("vmshadow.toml");
        std::fs::write(&path, "[edge]\nsite = \"dublin\"\n").unwrap();
        let edge = read_from(&path).unwrap().edge.unwrap();
        assert_eq!(edge.host, None);
        assert_eq!(edge.ssh, ["ssh"]);
        assert!(edge.control.is_absolute());
        for (relative, word) in [
            ("control = \"sock\"", "no absolute path"),
            ("ssh = [\"./ssh\"]", "nor an absolute"),
            ("ssh = []", "empty"),
        ] {
            std::fs::write(&path, format!("[edge]\nsite = \"a\"\n{relative}\n")).unwrap();
            let message = format!("{:#}", read_from(&path).unwrap_err());
            assert!(message.contains("line 3"), "{message}");
            assert!(message.contains(word), "{message}");
        }
    }
}
