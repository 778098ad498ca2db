//! `lb health`: whether this balancer should have users, as an exit code for VRRP and routing daemons. Owns the
//! question; the answer is the admin door's.

use clap::Args;

use super::door::door;
use super::{Failure, print, wait_for};
use crate::client::admin;

/// Exit with 0 if the balancer should be sent users, for keepalived and routing daemons.
///
/// It should while its workers turn and it is not stopping. Backends, or the store of a cluster, are not asked for:
/// where they are lacking, they are for every balancer, and no address should be taken away for that.
#[derive(Args)]
pub struct Arguments {
    /// The balancer's admin door on this host, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    wait_for(admin::health(&arguments.admin))??;
    print("ok\n")
}
