//! What a change of a door means for the users who came by it. Owns that they are found; the sockets of
//! doors are the driver's.

use super::{Cx, Sessions, User};
use crate::cluster::{DoorId, ServiceId};
use crate::tls::clients::Shown;
use crate::worker::slots::Key;

impl Sessions {
    /// A user who has just connected was asked for a certificate.
    pub fn identify(&mut self, key: Key, shown: Shown) {
        if let Some(user) = self.users.get(key) {
            user.gateway.identify(shown);
        }
    }

    /// Users who came by this door are another service's from now on, which must share its seats. The
    /// request under way stays where it is.
    pub fn assign(&mut self, id: DoorId, service: ServiceId, cx: &mut Cx<'_>) {
        for user in self.users.iter_mut().filter(|user| user.gateway.door.door == id) {
            user.gateway.door.service = service;
            if let Some(entry) = &mut user.entry {
                cx.books.move_home(entry, service);
            }
        }
    }

    /// A door has closed. Its users are served to the end of what they have asked for.
    pub fn close_door(&mut self, id: DoorId, cx: &mut Cx<'_>) {
        let is_of_it = |user: &User| user.gateway.door.door == id && user.stream_of.is_none();
        for key in self.users.keys(is_of_it) {
            self.drain_user(key, cx);
        }
    }

    /// A user is served to the end of what it has asked for, or if that is nothing yet, of its first request.
    pub fn drain_user(&mut self, key: Key, cx: &mut Cx<'_>) {
        self.act(key, cx, |gateway, context| gateway.drain(context));
    }
}
