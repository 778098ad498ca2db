//! The unix socket of the admin door as a place in the file system: whether it can be opened there. Owns the
//! sentences about its path. A socket left behind by an earlier run is replaced; anything else stays.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::unistd::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};

/// Bytes of a path in `sockaddr_un`, without the zero behind it (unix(7)).
const PATH_BYTES_MAX: usize = 107;
/// The bit of a folder in which files are removed only by their owner or its own (S_ISVTX).
const STICKY: u32 = 0o1000;

/// What stands at the path of a socket that may be opened.
#[derive(PartialEq, Eq, Debug)]
enum Found {
    Nothing,
    /// A socket on which nobody listens any more.
    LeftBehind,
}

/// Opens the socket.
///
/// # Errors
/// A sentence for the operator that includes the cure.
pub fn open(path: &Path) -> Result<UnixListener, String> {
    if look(path)? == Found::LeftBehind {
        // If this fails, the error from binding says why.
        let _ = fs::remove_file(path);
    }
    UnixListener::bind(path).map_err(|error| cannot(path, &error))
}

/// Whether [`open`] would succeed. Leaves everything as it is.
///
/// # Errors
/// What `open` would say.
pub fn try_out(path: &Path) -> Result<(), String> {
    let found = look(path)?;
    // Nothing is opened at the path itself, where a balancer that starts at this moment would find it; and
    // what was left behind has to stay. Another socket beside it shows what the folder allows.
    let folder = path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = folder.join(format!(".lb-{}", std::process::id()));
    let taken = || cannot(path, &io::Error::from_raw_os_error(libc::EADDRINUSE));
    let own = geteuid().as_raw();
    let about = (fs::metadata(folder), path.symlink_metadata());
    if let (Ok(folder), Ok(socket)) = about
        && folder.mode() & STICKY != 0
        && ![0, folder.uid(), socket.uid()].contains(&own)
    {
        return Err(taken());
    }
    let fits = beside.as_os_str().len() <= PATH_BYTES_MAX;
    let trial = if fits || found == Found::LeftBehind { beside.as_path() } else { path };
    match UnixListener::bind(trial) {
        Ok(_) => fs::remove_file(trial).map_err(|_| taken()),
        Err(error) if found == Found::Nothing => Err(cannot(path, &error)),
        Err(_) if fits => Err(taken()),
        Err(_) => Ok(()),
    }
}

/// Finds out what stands at the path.
fn look(path: &Path) -> Result<Found, String> {
    let (shown, bytes) = (path.display(), path.as_os_str().len());
    if bytes > PATH_BYTES_MAX {
        return Err(format!(
            "admin.socket is a path of {bytes} bytes, and that of a unix socket has {PATH_BYTES_MAX} at \
             most: name a shorter one, such as \"/run/lb/admin.sock\""
        ));
    }
    let kind = match path.symlink_metadata() {
        Ok(about) => about.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(cannot(path, &error)),
    };
    if kind.is_dir() {
        return Err(format!(
            "admin.socket names the folder {shown}: name a file in it, such as \"{}\"",
            path.join("admin.sock").display()
        ));
    }
    if !kind.is_socket() {
        return Err(format!(
            "admin.socket names {shown}, which is there and is no socket: remove it or name another file"
        ));
    }
    match knock(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Found::LeftBehind),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(format!(
            "admin.socket names {shown}, which is the socket of another user: name another file"
        )),
        // Somebody listens: a queue that is full says so too.
        Ok(()) | Err(_) => Err(format!(
            "another balancer answers on {shown}: stop it or name another [admin] socket"
        )),
    }
}

/// Connects without waiting for a place in the queue.
fn knock(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(path)?)
}

fn cannot(path: &Path, error: &io::Error) -> String {
    format!(
        "cannot open the unix socket {}: {error}; name another [admin] socket, in a directory the \
         balancer's user may write to",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("lb-sock-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Folder(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap().flatten();
            entries.map(|it| it.file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_nothing_else_is() {
        let folder = Folder::new("replace");
        let at = |name: &str| folder.0.join(name);
        drop(UnixListener::bind(at("old")).unwrap());
        fs::write(at("file"), "kept").unwrap();
        fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink(at("old"), at("link")).unwrap();
        let live = UnixListener::bind(at("live")).unwrap();
        let long = at(&"x".repeat(PATH_BYTES_MAX));
        for (path, said) in [
            (at("file"), "which is there and is no socket"),
            (at("link"), "which is there and is no socket"),
            (at("folder"), "names the folder"),
            (at("live"), "another balancer answers on"),
            (at("none/admin.sock"), "cannot open the unix socket"),
            (at("file/admin.sock"), "cannot open the unix socket"),
            (long, "bytes, and that of a unix socket has 107 at most"),
        ] {
            let fault = open(&path).unwrap_err();
            assert!(fault.contains(said), "{path:?} {fault}");
            assert_eq!(try_out(&path), Err(fault), "trying says the same");
        }
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "kept");
        for free in ["old", "new"] {
            let before = folder.names();
            assert_eq!(try_out(&at(free)), Ok(()), "{free}");
            assert_eq!(folder.names(), before, "trying leaves no trace");
            drop(open(&at(free)).unwrap());
        }
        drop(live);
    }

    #[test]
    fn a_balancer_that_starts_meanwhile_finds_nothing_in_its_place() {
        let folder = Folder::new("meanwhile");
        let path = folder.0.join("admin.sock");
        let over = Arc::new(AtomicBool::new(false));
        let (tried, until) = (path.clone(), Arc::clone(&over));
        let trying = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                // It is free, or the balancer's.
                let _ = try_out(&tried);
            }
        });
        for round in 0..2000 {
            let opened = open(&path);
            assert!(opened.is_ok(), "round {round}: {opened:?}");
            assert!(path.exists(), "round {round}");
            fs::remove_file(&path).unwrap();
        }
        over.store(true, Ordering::Relaxed);
        trying.join().unwrap();
    }

    #[test]
    fn a_socket_whose_queue_is_full_is_somebodys() {
        let folder = Folder::new("full");
        let path = folder.0.join("admin.sock");
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        socket.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        socket.listen(0).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| {
            let one = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
            one.connect(&SockAddr::unix(&path).unwrap()).ok().map(|()| one)
        })
        .collect();
        assert!(!waiting.is_empty());
        assert!(open(&path).unwrap_err().starts_with("another balancer answers on"));
    }
}
