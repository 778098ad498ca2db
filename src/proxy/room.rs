//! Whether a socket is known to take more. While blocks are scarce, nothing is received for a
//! reader that takes nothing: a block in a send comes back only when its bytes have found room,
//! which they may never do. So first the room is seen, then the block is taken.

/// Nobody but its one flow sends to a socket, so room that was seen stays until something is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Room {
    answer: Answer,
    asked_before: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Answer {
    Unknown,
    /// The kernel has been asked.
    Asked,
    /// The kernel has been asked, and something has been sent since.
    Stale,
    Cancelled,
    Seen,
}

/// A question to put to the kernel.
pub(super) struct Question {
    /// This is the first question about the socket.
    pub(super) first: bool,
}

impl Room {
    pub(super) const UNKNOWN: Room = Room { answer: Answer::Unknown, asked_before: false };

    /// The question to put to the kernel now, if any.
    pub(super) fn ask(&mut self) -> Option<Question> {
        if self.answer != Answer::Unknown {
            return None;
        }
        self.answer = Answer::Asked;
        Some(Question { first: !std::mem::replace(&mut self.asked_before, true) })
    }

    /// Something is sent to the socket.
    pub(super) fn used(&mut self) {
        self.answer = match self.answer {
            Answer::Unknown | Answer::Seen => Answer::Unknown,
            Answer::Asked | Answer::Stale => Answer::Stale,
            Answer::Cancelled => Answer::Cancelled,
        };
    }

    /// The kernel has answered.
    pub(super) fn answered(&mut self) {
        let right = self.answer == Answer::Asked;
        self.answer = if right { Answer::Seen } else { Answer::Unknown };
    }

    /// Returns true if the question must be withdrawn; its answer still comes.
    pub(super) fn cancel(&mut self) -> bool {
        let cancel = matches!(self.answer, Answer::Asked | Answer::Stale);
        if cancel {
            self.answer = Answer::Cancelled;
        }
        cancel
    }

    pub(super) fn is_seen(self) -> bool {
        self.answer == Answer::Seen
    }

    /// Whether the kernel was asked and has not found room yet, whatever was sent in between.
    pub(super) fn is_asked(self) -> bool {
        matches!(self.answer, Answer::Asked | Answer::Stale)
    }

    /// Whether an answer will come.
    pub(super) fn is_pending(self) -> bool {
        matches!(self.answer, Answer::Asked | Answer::Stale | Answer::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_asked_once_and_again_after_a_send() {
        let mut room = Room::UNKNOWN;
        assert!(room.ask().is_some_and(|question| question.first) && room.ask().is_none());
        room.answered();
        assert!(room.is_seen() && room.ask().is_none());
        room.used();
        assert!(room.ask().is_some_and(|question| !question.first));
    }

    #[test]
    fn an_answer_that_something_was_sent_after_is_worth_nothing() {
        let mut room = Room::UNKNOWN;
        room.ask();
        room.used();
        assert!(room.is_pending() && room.is_asked() && room.ask().is_none());
        room.answered();
        assert!(!room.is_seen() && !room.is_pending() && !room.is_asked());
    }

    #[test]
    fn a_question_is_taken_back_once_and_its_answer_believed_no_more() {
        for sent in [false, true] {
            let mut room = Room::UNKNOWN;
            assert!(!room.cancel());
            room.ask();
            if sent {
                room.used();
            }
            assert!(room.cancel() && !room.cancel() && room.is_pending());
            room.used();
            room.answered();
            assert!(!room.is_seen() && !room.is_pending());
        }
    }
}
