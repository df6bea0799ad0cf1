//! The file that keeps where each guest is, so that a restart goes on from there.
//!
//! ```json
//! {"version":1,"sites":{"desktop":"dublin"}}
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    sites: BTreeMap<String, String>,
}

/// Reads the file: guest to site. No file is no entry.
pub(crate) fn load(path: &Path) -> Result<BTreeMap<String, String>> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(failed(error)),
    };
    let state: State = serde_json::from_str(&text).map_err(|error| failed(error.into()))?;
    if state.version != VERSION {
        return Err(Error::Config(format!(
            "{}: version {} is not known",
            path.display(),
            state.version
        )));
    }
    Ok(state.sites)
}

/// Writes down where these guests are. Of others, which the configuration may leave out for a
/// while, it stays as it was.
pub(crate) fn note(path: &Path, sites: BTreeMap<String, String>) -> Result<()> {
    // One that can't be read is of no use to anybody.
    let mut all = load(path).unwrap_or_default();
    all.extend(sites);
    store(path, all)
}

/// Replaces the file as a whole, and on the disk.
fn store(path: &Path, sites: BTreeMap<String, String>) -> Result<()> {
    let write = || -> io::Result<()> {
        let temporary = path.with_extension("new");
        let mut file = File::create(&temporary)?;
        serde_json::to_writer(
            &mut file,
            &State {
                version: VERSION,
                sites,
            },
        )?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded() {
        let path = std::env::temp_dir().join(format!("netproxy-state-{}.json", std::process::id()));
        let _ = std::fs::remove_file(&path);
        assert!(load(&path).unwrap().is_empty());
        let sites: BTreeMap<_, _> = [("desktop".to_owned(), "b".to_owned())].into();
        note(&path, sites.clone()).unwrap();
        assert_eq!(load(&path).unwrap(), sites);
        note(&path, [("server".to_owned(), "a".to_owned())].into()).unwrap();
        let all = load(&path).unwrap();
        assert_eq!((all.len(), all["desktop"].as_str()), (2, "b"));
        std::fs::write(&path, r#"{"version":9,"sites":{}}"#).unwrap();
        assert!(matches!(load(&path), Err(Error::Config(_))));
        std::fs::write(&path, "nonsense").unwrap();
        assert!(matches!(load(&path), Err(Error::File { .. })));
        std::fs::remove_file(&path).unwrap();
    }
}
