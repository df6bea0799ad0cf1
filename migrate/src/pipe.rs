//! Pipes that hold more than they do at first.

use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, fcntl};

/// What a pipe may hold, in bytes: the most that a kernel allows everybody by default.
const ROOM: i32 = 1 << 20;

/// Gives a pipe room for 1 MiB where the kernel lets us; what is no pipe stays as it is.
///
/// It saves changes between the processes at its ends. Where sshd writes into it, much more: what
/// the pipe doesn't take sshd keeps in a buffer that it copies whole for every packet that comes.
pub(crate) fn widen(pipe: impl AsFd) {
    if let Err(error) = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(ROOM)) {
        log::debug!("Can't enlarge a pipe: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_holds_more_and_anything_else_is_left_alone() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let before = fcntl(&writer, FcntlArg::F_GETPIPE_SZ).unwrap();
        widen(&writer);
        assert!(before < ROOM);
        assert_eq!(fcntl(&writer, FcntlArg::F_GETPIPE_SZ), Ok(ROOM));
        widen(std::fs::File::open("/dev/null").unwrap());
    }
}
