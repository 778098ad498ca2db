//! Whether a data port takes connections, found out by connecting to it. Owns the sentence that says
//! why not. Connects with the runtime's own sockets: one of them that is given up at a deadline gives
//! its descriptor back, which a connect on the ring would hold until the kernel's own timeout.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;

/// Connects and hangs up.
///
/// # Errors
/// A sentence for the backend.
pub async fn connects(address: SocketAddr, timeout: Duration) -> Result<(), String> {
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            Err(format!("cannot connect to {address}: {error}; does the service listen there?"))
        }
        Err(_) => Err(format!(
            "cannot connect to {address}: no answer within {} ms; is a firewall in between?",
            timeout.as_millis()
        )),
    }
}
