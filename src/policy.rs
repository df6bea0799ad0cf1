//! What this site takes of other sites' guests: `/etc/vmshadow/vmshadow.toml`.

use std::path::Path;

use anyhow::Context;
use migrate::configuration::SitePolicy;

/// The configuration file.
pub const PATH: &str = "/etc/vmshadow/vmshadow.toml";

/// The site's policy; the defaults where there is no file.
pub fn read() -> anyhow::Result<SitePolicy> {
    read_from(Path::new(PATH))
}

fn read_from(path: &Path) -> anyhow::Result<SitePolicy> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(SitePolicy::default());
        }
        other => other.with_context(|| format!("Can't read {}", path.display()))?,
    };
    // toml's message names line and column.
    let file: File = toml::from_str(&text).with_context(|| format!("Bad {}", path.display()))?;
    Ok(file.site)
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    site: SitePolicy,
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
        assert!(read_from(&root.path().join("none")).is_ok());
    }
}
