//! How much is read from each side of a user's connection: as much as there is room for in the queue to the other, and
//! nothing of a request before the last one is answered. Owns that choice; the bytes are the gateway's.

use super::{Gateway, Phase};
use crate::proxy::Side;
use crate::proxy::http::exchange::{Answer, Upload};
use crate::proxy::http::{Context, GatewayCmd};
use crate::proxy::line::Line;

impl Gateway {
    /// Asks each side for as much as there is room for.
    pub(super) fn ask(&mut self, cx: &mut Context<'_>) {
        let out = &mut |what| cx.out.push(GatewayCmd::Wire(what));
        let to_backend = self.backend.as_ref().map_or(0, |line| line.sending().blocks());
        let up = self.upward.blocks() + to_backend;
        let down = self.downward.blocks() + self.client.sending().blocks();
        let sparing = self.client.is_sparing(cx.pool);
        let wanted = match (&self.phase, &self.exchange.upload) {
            (Phase::Head, _) if self.is_packing() => return self.client.stop(Side::Client, out),
            // What arrives is a request, and will be answered.
            (Phase::Head, _) if sparing => self.client.sees_room(Side::Client, out),
            (Phase::Head | Phase::Lingering { .. }, _) => true,
            (Phase::Exchange, Upload::Flowing(_)) => {
                let sees_room = |line: &mut Line| line.sees_room(Side::Backend, out);
                self.client.has_room(up, cx.pool)
                    && (!sparing || self.backend.as_mut().is_some_and(sees_room))
            }
            (Phase::Exchange, Upload::Done) => self.stash.is_empty(),
            // A user that writes everything before it reads would wait for us, and we for it.
            (Phase::Exchange, Upload::Last | Upload::Abandoned) => true,
            _ => false,
        };
        if !matches!(self.phase, Phase::Over(_) | Phase::Tunnel(_)) {
            self.client.ask(Side::Client, wanted, cx.kit.share(), cx.pool, cx.features, out);
        }
        if let Some(line) = &mut self.backend {
            let room = match self.exchange.answer {
                Answer::Done => line.is_watched(),
                _ if !line.has_room(down, cx.pool) => false,
                _ => !line.is_sparing(cx.pool) || self.client.sees_room(Side::Client, out),
            };
            line.ask(Side::Backend, room, cx.kit.share(), cx.pool, cx.features, out);
        }
    }
}
