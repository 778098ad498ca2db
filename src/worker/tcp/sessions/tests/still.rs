//! Sessions of a worker that stands still, goes on, or leaves them to another process.

use super::*;

impl Stage {
    fn still(&mut self) -> Vec<Cmd> {
        self.act(|sessions, cx| sessions.freeze(|_| false, cx));
        self.said()
    }

    fn noted(&mut self, key: Key, event: Event) -> Vec<Cmd> {
        self.act(|sessions, cx| sessions.note(key, event, cx));
        self.said()
    }

    fn noted_data(&mut self, key: Key, side: Side, bytes: usize) -> Vec<Cmd> {
        let mut buf = self.pool.take(Class::Small).unwrap();
        self.pool.append(&mut buf, &vec![7; bytes]);
        let what = Received::Data(buf);
        self.noted(key, Event::Received { side, what, more: true, nonempty: false })
    }

    pub(super) fn thaw(&mut self) -> Vec<Cmd> {
        self.act(Sessions::thaw);
        self.said()
    }

    fn is_still(&self) -> bool {
        self.sessions.is_still(|_| false)
    }

    fn active(&self) -> u64 {
        self.control.metrics.counters.sessions_active.get()
    }
}

#[test]
fn what_comes_while_it_stands_still_goes_out_when_it_goes_on() {
    let mut stage = Stage::new();
    let key = stage.session();
    stage.data(key, Client, 10);
    assert_eq!(stage.still(), []);
    assert_eq!(stage.noted_data(key, Client, 5), []);
    assert!(!stage.is_still(), "a send is under way");
    stage.act(|sessions, cx| sessions.take_back(|_| false, cx));
    let what = proxy::StreamCmd::CancelSend { side: Backend };
    assert_eq!(stage.said(), [Cmd::Relay { key, what }]);
    for errno in [Errno::ECANCELED, Errno::EINTR, Errno::EAGAIN] {
        assert_eq!(stage.noted(key, Event::Sent { side: Backend, result: Err(errno) }), []);
        assert!(stage.is_still());
        let said = stage.thaw();
        let [Cmd::Relay { what: proxy::StreamCmd::Send { side: Backend, what }, .. }] = said[..]
        else {
            panic!("{errno}: {said:?}");
        };
        let bytes: usize = stage.pool.pieces(what).map(<[u8]>::len).sum();
        assert_eq!((bytes, what.blocks()), (15, 2), "nothing was lost");
        stage.still();
    }
}

#[test]
fn a_connection_that_is_taken_back_is_made_again_to_the_same_backend_and_has_its_whole_time() {
    let mut stage = Stage::with(2);
    let client: SocketAddr = "192.0.2.1:1000".parse().unwrap();
    let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    let said = stage.said();
    assert_eq!(stage.still(), [Cmd::CancelConnect { key }]);
    assert!(!stage.is_still());
    stage.act(|sessions, cx| sessions.recalled(key, Err(Errno::ECONNREFUSED), cx));
    assert!(stage.is_still() && stage.control.reports.pop().is_err(), "nobody is blamed");
    let late = stage.act(|sessions, cx| sessions.seat(SERVICE, client.into(), cx)).unwrap();
    assert_eq!(stage.said(), []);
    let time = Timeouts::default().connect;
    stage.now = stage.now.plus(time * 2 / 3);
    let again = stage.thaw();
    assert_eq!((again.len(), again[0]), (2, said[0]));
    assert!(matches!(again[1], Cmd::Connect { key, .. } if key == late));
    assert_eq!(stage.wait(time * 2 / 3), []);
    let cancelled = stage.wait(time / 2);
    assert!(cancelled.contains(&Cmd::CancelConnect { key }), "{cancelled:?}");
}

#[test]
fn a_connection_that_comes_about_in_time_is_received_from_when_it_goes_on() {
    let mut stage = Stage::new();
    let client: SocketAddr = "192.0.2.1:1000".parse().unwrap();
    let key = stage.act(|sessions, cx| sessions.accepted(SERVICE, client, cx)).unwrap();
    stage.still();
    stage.act(|sessions, cx| sessions.recalled(key, Ok(()), cx));
    assert!(stage.is_still());
    assert_eq!(stage.said(), [], "not yet");
    let receives = stage.thaw();
    assert_eq!(receives.len(), 2, "{receives:?}");
}

#[test]
fn who_goes_on_elsewhere_is_forgotten_without_an_end() {
    let mut stage = Stage::new();
    let (key, stays) = (stage.session(), stage.session());
    let client: SocketAddr = "192.0.2.1:1000".parse().unwrap();
    stage.still();
    let waits = stage.act(|sessions, cx| sessions.seat(SERVICE, client.into(), cx)).unwrap();
    stage.noted_data(key, Backend, 30);
    stage.act(|sessions, cx| sessions.leave(&[key, waits], cx));
    let cancels = [Client, Backend].map(|side| {
        let what = proxy::StreamCmd::CancelReceive { side };
        Cmd::Relay { key, what }
    });
    let closed = |key| Cmd::Close { key, reset: false };
    assert_eq!(stage.said(), [cancels[0], cancels[1], closed(waits)]);
    assert!(!stage.is_still(), "the kernel holds its sockets");
    let stopped =
        |side| Event::Received { side, what: Received::Stopped, more: false, nonempty: false };
    assert_eq!(stage.noted(key, stopped(Client)), []);
    assert_eq!(stage.noted(key, stopped(Backend)), [closed(key)]);
    assert!(stage.is_still());
    assert_eq!((stage.active(), stage.sessions.live()), (1, 1));
    assert_eq!(stage.control.metrics.counters.sessions_ended.get(), 0);
    assert_eq!(stage.ended(), None, "it has not ended");
    assert_eq!(stage.pool.free(Class::Small), 256);
    assert_eq!(stage.thaw(), [], "its receives are armed");
    let said = stage.data(stays, Client, 4);
    assert!(matches!(said[..], [Cmd::Relay { .. }]), "the others are served: {said:?}");
}
