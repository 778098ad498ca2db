//! Calls of gRPC: how long they may be silent.

use super::*;
use crate::cluster::RequestLimits;
use crate::proxy::outlook::Outlook;

/// What the users get once the time has come.
fn later(stage: &mut Stage, by: Duration) -> usize {
    stage.now = stage.now.plus(by);
    stage.act(|sessions, cx| sessions.expire(cx));
    for _ in 0..4 {
        let looks: Vec<Conn> = stage
            .out
            .iter()
            .filter_map(|it| match it {
                Cmd::Look { conn } => Some(*conn),
                _ => None,
            })
            .collect();
        stage.settle();
        for conn in looks {
            stage.act(|sessions, cx| sessions.told(conn, Outlook::default(), cx));
        }
    }
    stage.log.0.borrow().len()
}

#[test]
fn a_call_that_both_sides_have_begun_may_be_silent_for_as_long_as_a_tunnel() {
    for (kind, is_call) in [("application/grpc", true), ("application/json", false)] {
        let mut stage = Stage::new();
        let user = stage.user();
        let ask = format!(
            "POST /api/x HTTP/1.1\r\nHost: shop.example\r\nContent-Type: {kind}\r\n\
             Transfer-Encoding: chunked"
        );
        let (_, attempt) = stage.ask(user, &ask);
        let (link, _) = attempt.unwrap();
        stage.act(|sessions, cx| sessions.connected(link, Ok(()), cx));
        stage.settle();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n";
        stage.receives(Conn::Link(link), Side::Backend, head);
        stage.settle();
        let RequestLimits { body, tunnel_idle, .. } = RequestLimits::DEFAULT;
        let ended = later(&mut stage, body + Duration::from_secs(1));
        assert_eq!(ended, usize::from(!is_call), "{kind}");
        if is_call {
            assert_eq!(later(&mut stage, tunnel_idle), 1, "not for ever");
        }
    }
}
