//! API users for whom there is no room. Each is still answered, with 503 to its first request: closing a
//! connection with a request unread sends a reset, which explains nothing. Owns how many of them there are
//! at once; they have no place in the books and are not sessions.

use std::net::SocketAddr;

use super::{Cx, Sessions, User};
use crate::cluster::Doorway;
use crate::proxy::http::Gateway;
use crate::session::EndReason;
use crate::worker::link::Refusal;
use crate::worker::slots::Key;

/// At most this many at once; for one more, the oldest is closed, which has most likely been answered. They
/// use descriptors that no session has been promised: `boot::capacity` leaves 256 of them free.
const TURNED_AWAY_MAX: usize = 32;

impl Sessions {
    pub(super) fn turn_away(
        &mut self,
        door: Doorway,
        client: SocketAddr,
        why: Refusal,
        cx: &mut Cx<'_>,
    ) -> Key {
        let detail = match why {
            Refusal::Full => "as many users are served as may be",
            _ => "there is no room for another user",
        };
        let name = cx.books.no_session();
        let gateway = Gateway::refusing(name, door, client, detail, cx.now);
        let key = self.users.put(User::new(gateway, door.service, None));
        self.make_room();
        self.turned_away.push_back(key);
        self.act(key, cx, |gateway, context| gateway.start(context));
        // Only now: a place must not be reused while commands about it wait.
        if self.turned_away.len() > TURNED_AWAY_MAX
            && let Some(first) = self.turned_away.pop_front()
            && self.users.get(first).is_some()
        {
            self.act(first, cx, |gateway, context| {
                gateway.end(EndReason::Finished, false, context);
            });
        }
        key
    }
}
