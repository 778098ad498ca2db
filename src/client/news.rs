//! What a balancer tells a backend unasked, in a person's words. Owns the wording; what follows from it for
//! the registration is up to `backend`.

use super::wire::Said;

/// One line about an event that a person wants to know of; `None` for any other message.
pub fn told(said: &Said) -> Option<String> {
    let by_operator = said.by.is_some();
    Some(match said.event.as_deref()? {
        "draining" if by_operator => {
            let left = counted(said.left.unwrap_or(0));
            let time = match said.deadline_ms {
                Some(0) => "to be ended now".to_owned(),
                Some(ms) => format!("to be ended in {} s", ms.div_ceil(1000)),
                None if said.left == Some(1) => "which may end by itself".to_owned(),
                None => "which may end by themselves".to_owned(),
            };
            let left = if said.left == Some(0) { left } else { format!("{left}, {time}") };
            format!("an operator drains this backend: no new users, {left}")
        }
        "undrained" => "an operator has undrained this backend: it gets users again".to_owned(),
        "weight" => format!("an operator has given this backend weight {}", said.weight?),
        "ended" => {
            format!("an operator has ended {} of this backend", counted(said.sessions?))
        }
        "drained" => match said.cut {
            None | Some(0) => "drained: no session is left".to_owned(),
            Some(cut) => format!("drained: no session is left, {} had to be ended", counted(cut)),
        },
        _ => return None,
    })
}

fn counted(sessions: u64) -> String {
    match sessions {
        0 => "no sessions left".to_owned(),
        1 => "1 session".to_owned(),
        more => format!("{more} sessions"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_does_to_a_backend_is_one_line() {
        for (message, line) in [
            (
                r#"{"event":"draining","by":"operator","left":2,"deadline_ms":29001}"#,
                "an operator drains this backend: no new users, 2 sessions, to be ended in 30 s",
            ),
            (
                r#"{"event":"draining","by":"operator","left":1,"deadline_ms":null}"#,
                "an operator drains this backend: no new users, 1 session, which may end by itself",
            ),
            (
                r#"{"event":"draining","by":"operator","left":0,"deadline_ms":30000}"#,
                "an operator drains this backend: no new users, no sessions left",
            ),
            (
                r#"{"event":"undrained","by":"operator"}"#,
                "an operator has undrained this backend: it gets users again",
            ),
            (
                r#"{"event":"weight","by":"operator","weight":5}"#,
                "an operator has given this backend weight 5",
            ),
            (
                r#"{"event":"ended","by":"operator","sessions":3}"#,
                "an operator has ended 3 sessions of this backend",
            ),
            (r#"{"event":"drained"}"#, "drained: no session is left"),
            (
                r#"{"event":"drained","cut":1}"#,
                "drained: no session is left, 1 session had to be ended",
            ),
        ] {
            let said = serde_json::from_str(message).unwrap();
            assert_eq!(told(&said).as_deref(), Some(line));
        }
        for message in [
            r#"{"event":"draining","left":2}"#,
            r#"{"event":"removed"}"#,
            r#"{"event":"mood","by":"operator"}"#,
            r#"{"cmd":"hello"}"#,
        ] {
            assert_eq!(told(&serde_json::from_str(message).unwrap()), None, "{message}");
        }
    }
}
