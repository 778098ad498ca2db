//! `lb top`: the balancer live in a terminal. Owns the terminal and the requests to the balancer;
//! what keys do is `screen`'s, how it looks is `draw`'s. The terminal is restored however the
//! program ends.

mod brief;
mod columns;
mod draw;
mod history;
mod press;
mod question;
mod rows;
mod screen;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::DefaultTerminal;
use tokio::sync::mpsc;

use super::door::door;
use super::{Failure, token, wait_for};
use crate::base::thread;
use crate::client::admin;
use crate::control::history::page::Field;
use crate::control::status::{SessionStatus, Status};
use history::{Answer, Ask};
use screen::{Of, Press, Screen, Task};

/// How often the balancer is asked.
const EVERY: Duration = Duration::from_secs(1);
/// Limit on the sessions read of one backend or service.
const SESSIONS_MAX: usize = 500;
/// How many events may wait to be shown.
const NEWS_MAX: usize = 64;

/// Watch a running balancer in the terminal: its services, their backends and sessions; drain backends
#[derive(Args)]
pub struct Arguments {
    /// The balancer's admin door, or the path of its admin.socket
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8084", value_parser = door)]
    admin: String,
    /// The balancer's [admin] token_file, which a drain needs; over its socket, root needs none
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// What can happen.
enum News {
    Press(Press),
    Resized,
    Status(Result<Box<Status>, String>),
    Sessions(Of, Result<(Vec<SessionStatus>, bool), String>),
    Changed(Task, Result<u64, String>),
    History(Ask, Result<Box<Answer>, String>),
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure("top needs a terminal; `lb status` prints the same once".to_owned()));
    }
    // A faulty file is reported while there is still a line to report it on.
    token(arguments.token_file.as_deref())?;
    // From here on a panic restores the terminal before it is reported.
    let mut terminal = ratatui::try_init().map_err(|error| {
        format!("the terminal cannot be drawn on: {error}; `lb status` prints the same once")
    })?;
    let outcome = wait_for(watch(&mut terminal, arguments.admin, arguments.token_file));
    ratatui::restore();
    outcome?.map_err(|error| Failure(format!("the terminal is gone: {error}")))
}

async fn watch(
    terminal: &mut DefaultTerminal,
    door: String,
    tokens: Option<PathBuf>,
) -> io::Result<()> {
    let (tell, mut news) = mpsc::channel(NEWS_MAX);
    thread::spawn("lb-keys", {
        let tell = tell.clone();
        move || hear_keys(&tell)
    })?;
    tokio::spawn(look(door.clone(), tell.clone()));
    let mut screen = Screen::default();
    let mut answered = Instant::now();
    loop {
        terminal.draw(|frame| draw::screen(&mut screen, frame))?;
        let Some(heard) = news.recv().await else { return Ok(()) };
        let task = match heard {
            News::Press(key) => screen.press(key),
            News::Resized => Task::Nothing,
            News::Status(answer) => {
                if answer.is_ok() {
                    answered = Instant::now();
                }
                screen.silent = answered.elapsed();
                screen.looked(answer.map(|status| *status))
            }
            News::Sessions(of, answer) => {
                screen.read(&of, answer);
                Task::Nothing
            }
            News::History(ask, answer) => {
                screen.past.read(ask, answer.map(|answer| *answer));
                Task::Nothing
            }
            News::Changed(task, answer) => {
                screen.changed(&task, answer);
                Task::Nothing
            }
        };
        match task {
            Task::Nothing => {}
            Task::Quit => return Ok(()),
            other => {
                tokio::spawn(carry_out(other, door.clone(), tokens.clone(), tell.clone()));
            }
        }
        if let Some(ask) = screen.due() {
            tokio::spawn(look_back(ask, door.clone(), tell.clone()));
        }
    }
}

/// Does what needs the balancer, and reports the result. Nobody listens any more once the program
/// ends.
async fn carry_out(task: Task, door: String, tokens: Option<PathBuf>, tell: mpsc::Sender<News>) {
    let news = match task {
        Task::Sessions(of) => {
            let (key, name) = match &of {
                Of::Backend(id) => ("backend", id),
                Of::Service(name) => ("service", name),
            };
            let answer = admin::sessions_of(&door, key, name, SESSIONS_MAX).await;
            News::Sessions(of, answer)
        }
        Task::Drain(..) | Task::Undrain(_) => {
            let answer = change(&task, &door, tokens.as_deref()).await;
            News::Changed(task, answer)
        }
        Task::Nothing | Task::Quit => return,
    };
    let _ = tell.send(news).await;
}

/// Reads the last 15 minutes.
async fn look_back(ask: Ask, door: String, tell: mpsc::Sender<News>) {
    let answer = match &ask {
        Ask::Detail { service } => admin::history(&door, service.as_deref(), None)
            .await
            .map(|page| Answer { page: Some(page), services: None }),
        Ask::Overview { field, services } => overview(&door, *field, services).await,
    };
    let _ = tell.send(News::History(ask, answer.map(Box::new))).await;
}

async fn overview(door: &str, field: Field, services: &[String]) -> Result<Answer, String> {
    let page = Some(admin::history(door, None, Some(field)).await?);
    let services = match services {
        [] => None,
        // A service may have gone meanwhile; the others are asked for again with the next look.
        names => admin::histories(door, names, field).await.ok(),
    };
    Ok(Answer { page, services })
}

/// Requests a change. Returns the number of sessions on the backend.
async fn change(task: &Task, door: &str, tokens: Option<&Path>) -> Result<u64, String> {
    let path = match task {
        Task::Drain(backend, Some(lasts)) => {
            format!("/backends/{backend}/drain?deadline_ms={}", lasts.as_millis())
        }
        Task::Drain(backend, None) => format!("/backends/{backend}/drain?deadline_ms=never"),
        Task::Undrain(backend) => format!("/backends/{backend}/undrain"),
        _ => return Ok(0),
    };
    // The balancer may have been given other tokens since the last change.
    let token = token(tokens).map_err(|Failure(said)| said)?;
    Ok(admin::change(door, &path, token.as_deref()).await?.sessions)
}

async fn look(door: String, tell: mpsc::Sender<News>) {
    loop {
        let answer = admin::status(&door).await.map(Box::new);
        if tell.send(News::Status(answer)).await.is_err() {
            return;
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Reads the keyboard until nobody listens or it is gone.
fn hear_keys(tell: &mpsc::Sender<News>) {
    while let Ok(event) = event::read() {
        let news = match event {
            Event::Key(pressed) => key(pressed).map(News::Press),
            Event::Resize(..) => Some(News::Resized),
            _ => None,
        };
        if news.is_some_and(|news| tell.blocking_send(news).is_err()) {
            return;
        }
    }
    // Without a keyboard nobody could quit.
    let _ = tell.blocking_send(News::Press(Press::Leave));
}

fn key(pressed: KeyEvent) -> Option<Press> {
    if pressed.kind == KeyEventKind::Release {
        return None;
    }
    Some(match pressed.code {
        KeyCode::Char('c') if pressed.modifiers.contains(KeyModifiers::CONTROL) => Press::Leave,
        KeyCode::Char(letter) => Press::Char(letter),
        KeyCode::Up => Press::Up,
        KeyCode::Down => Press::Down,
        KeyCode::PageUp => Press::PageUp,
        KeyCode::PageDown => Press::PageDown,
        KeyCode::Home => Press::Home,
        KeyCode::End => Press::End,
        KeyCode::Enter => Press::Enter,
        KeyCode::Esc => Press::Back,
        KeyCode::Backspace => Press::Erase,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_c_leaves_and_a_released_key_is_none() {
        let c = KeyCode::Char('c');
        assert_eq!(key(KeyEvent::new(c, KeyModifiers::CONTROL)), Some(Press::Leave));
        assert_eq!(key(KeyEvent::new(c, KeyModifiers::NONE)), Some(Press::Char('c')));
        let released = KeyEvent::new_with_kind(c, KeyModifiers::NONE, KeyEventKind::Release);
        assert_eq!(key(released), None);
    }
}
