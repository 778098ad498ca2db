//! `lb cluster status`: the balancers of the cluster, its store, and what differs between them.

use std::fmt::Write;

use clap::{Args, Subcommand};

use super::door::door;
use super::{Failure, print, wait_for};
use crate::client::admin;
use crate::control::cluster_status::{ClusterStatus, NodeStatus};

/// Show the cluster of this balancer: who is in it, its store, and what differs.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Status(Status),
}

/// Show the balancers of the cluster, the state of its store, and what differs between them.
#[derive(Args)]
struct Status {
    /// Print the object `cluster` of /status
    #[arg(long)]
    json: bool,
    /// The balancer's admin door, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let What::Status(Status { json, admin }) = arguments.what;
    let Some(cluster) = wait_for(admin::status(&admin))??.cluster else {
        return Err(Failure(format!(
            "the balancer at {admin} is in no cluster: give it a [cluster] with a name and endpoints"
        )));
    };
    match json {
        true => print(&(serde_json::to_string_pretty(&cluster)? + "\n")),
        false => print(&told(&cluster)),
    }
}

fn told(cluster: &ClusterStatus) -> String {
    let mut out = String::new();
    let ClusterStatus { name, node, store, revision, .. } = cluster;
    // Writing to a string cannot fail.
    let _ = writeln!(out, "cluster {name}, this is {node}");
    let _ = write!(out, "store {store}, revision {revision}");
    if let Some(trouble) = &cluster.trouble {
        let _ = write!(out, " ({trouble})");
    }
    out.push('\n');
    let known = cluster.nodes.iter().map(|node| node.id.len()).max().unwrap_or(0);
    let width = known.max(node.len()).max(4);
    let _ = writeln!(out, "{:width$}  state     backends  sessions  version  choice", "node");
    for NodeStatus { id, state, backends, sessions, version, chooses_alike, .. } in &cluster.nodes {
        let choice = if *chooses_alike { "alike" } else { "differs" };
        let _ = writeln!(
            out,
            "{id:width$}  {state:8}  {backends:8}  {sessions:8}  {version:7}  {choice}"
        );
    }
    let count = |out: &mut String, number: usize, what: &str| {
        if number > 0 {
            let _ = writeln!(out, "{number} {what}");
        }
    };
    count(
        &mut out,
        cluster.unwritten,
        "backends of this balancer that the others have yet to hear of",
    );
    count(&mut out, cluster.orphans, "backends whose balancer is not heard of");
    count(
        &mut out,
        cluster.rejected as usize,
        "values in the store that no balancer of the cluster can have written",
    );
    for left_out in &cluster.left_out {
        let _ = writeln!(out, "left out: {}: {}", left_out.backend, left_out.why);
    }
    if cluster.nodes.iter().any(|node| !node.chooses_alike) {
        out.push_str(
            "nodes choose differently: they know different backends, weights or secrets\n",
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::cluster_status::LeftOut;

    #[test]
    fn what_differs_is_said() {
        let node = |id: &str, chooses_alike| NodeStatus {
            id: id.to_owned(),
            state: "serving".to_owned(),
            backends: 3,
            sessions: 7,
            version: "0.1.0".to_owned(),
            chooses_alike,
            ..NodeStatus::default()
        };
        let mut cluster = ClusterStatus {
            name: "shop".to_owned(),
            node: "lb-a~00000001".to_owned(),
            store: "live".to_owned(),
            revision: 42,
            nodes: vec![node("lb-a~00000001", true), node("lb-b~0000002f", true)],
            ..ClusterStatus::default()
        };
        let quiet = told(&cluster);
        assert!(
            quiet.starts_with("cluster shop, this is lb-a~00000001\nstore live, revision 42\n")
        );
        assert!(
            quiet.contains("lb-b~0000002f  serving          3         7  0.1.0    alike\n"),
            "{quiet}"
        );
        assert_eq!(quiet.lines().count(), 5);
        cluster.nodes[1].chooses_alike = false;
        (cluster.unwritten, cluster.orphans, cluster.rejected) = (1, 2, 3);
        let backend = "redis/tcp/192.0.2.1:80".to_owned();
        cluster.left_out =
            vec![LeftOut { backend, why: "there is no such service here".to_owned() }];
        cluster.trouble = Some("no member answers".to_owned());
        let told = told(&cluster);
        for words in [
            "(no member answers)",
            "differs",
            "1 backends of",
            "2 backends whose",
            "3 values",
            "left out: redis",
            "choose differently",
        ] {
            assert!(told.contains(words), "{words}: {told}");
        }
    }
}
