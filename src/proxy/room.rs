//! What is known about whether a socket takes more. While blocks are scarce nothing is received for a
//! reader who takes nothing: a block that is with the kernel for sending comes back when its bytes have
//! found room, and if they find none, not at all. So the room is seen first, and the block taken then.

/// Nobody but its one flow sends to a socket, so room that was seen stays until something is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Room {
    Unknown,
    /// The kernel has been asked.
    Asked,
    /// It has been asked, and something was sent since.
    Stale,
    Cancelled,
    Seen,
}

impl Room {
    /// True when the question is to be put to the kernel.
    pub(super) fn ask(&mut self) -> bool {
        let ask = *self == Room::Unknown;
        if ask {
            *self = Room::Asked;
        }
        ask
    }

    /// Something is sent.
    pub(super) fn used(&mut self) {
        *self = match *self {
            Room::Unknown | Room::Seen => Room::Unknown,
            Room::Asked | Room::Stale => Room::Stale,
            Room::Cancelled => Room::Cancelled,
        };
    }

    /// The kernel has answered.
    pub(super) fn answered(&mut self) {
        *self = if *self == Room::Asked { Room::Seen } else { Room::Unknown };
    }

    /// True when the question is to be taken back; its answer still comes.
    pub(super) fn cancel(&mut self) -> bool {
        let cancel = matches!(self, Room::Asked | Room::Stale);
        if cancel {
            *self = Room::Cancelled;
        }
        cancel
    }

    /// Whether an answer will come.
    pub(super) fn is_pending(self) -> bool {
        matches!(self, Room::Asked | Room::Stale | Room::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_asked_once_and_again_after_a_send() {
        let mut room = Room::Unknown;
        assert!(room.ask() && !room.ask());
        room.answered();
        assert!(room == Room::Seen && !room.ask());
        room.used();
        assert!(room.ask());
    }

    #[test]
    fn an_answer_that_something_was_sent_after_is_worth_nothing() {
        let mut room = Room::Asked;
        room.used();
        assert!(room.is_pending() && !room.ask());
        room.answered();
        assert_eq!(room, Room::Unknown);
    }

    #[test]
    fn a_question_is_taken_back_once_and_its_answer_believed_no_more() {
        for mut room in [Room::Asked, Room::Stale] {
            assert!(room.cancel() && !room.cancel());
            room.used();
            assert!(room.is_pending());
            room.answered();
            assert_eq!(room, Room::Unknown);
        }
        assert!(!Room::Seen.clone().cancel());
    }
}
