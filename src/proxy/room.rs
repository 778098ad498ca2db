//! What is known about whether a socket takes more. While blocks are scarce nothing is received for a
//! reader who takes nothing: a block that is with the kernel for sending comes back when its bytes have
//! found room, and if they find none, not at all. So the room is seen first, and the block taken then.

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
    /// It has been asked, and something was sent since.
    Stale,
    Cancelled,
    Seen,
}

/// A question for the kernel.
pub(super) struct Question {
    /// The first about this socket.
    pub(super) first: bool,
}

impl Room {
    pub(super) const UNKNOWN: Room = Room { answer: Answer::Unknown, asked_before: false };

    /// The question that is to be put to the kernel, if there is one.
    pub(super) fn ask(&mut self) -> Option<Question> {
        if self.answer != Answer::Unknown {
            return None;
        }
        self.answer = Answer::Asked;
        Some(Question { first: !std::mem::replace(&mut self.asked_before, true) })
    }

    /// Something is sent.
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

    /// True when the question is to be taken back; its answer still comes.
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

    /// Whether the kernel was asked and has not found room yet, whatever was sent meanwhile.
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
