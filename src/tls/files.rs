//! Files that settings of TLS name. Owns how much of one is read, and what is said if it cannot be.

use std::path::Path;

/// The most bytes of a file with certificates or a key.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A file of usual size.
///
/// # Errors
/// One sentence that names it.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, String> {
    read_up_to(path, FILE_BYTES_MAX)
}

/// A file of so many bytes at most.
///
/// # Errors
/// As [`read`].
pub(super) fn read_up_to(path: &Path, bytes_max: u64) -> Result<Vec<u8>, String> {
    let told = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let length = std::fs::metadata(path).map_err(told)?.len();
    if length > bytes_max {
        return Err(format!("{} has {length} bytes, more than {bytes_max}", path.display()));
    }
    std::fs::read(path).map_err(told)
}
