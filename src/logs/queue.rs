//! The bounded queue of the log, and the thread that writes what is in it. Whoever puts a line in never
//! waits: a full queue loses the line and counts it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{
    Receiver, Sender, SyncSender, TryRecvError, TrySendError, channel, sync_channel,
};
use std::time::{Duration, Instant};

use crate::base::thread;

/// How long the end waits for lines that are still queued.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often the end tries a full queue.
const AGAIN: Duration = Duration::from_millis(1);

enum Item {
    Line(Box<[u8]>),
    End,
}

/// The end of the queue that takes lines.
#[derive(Clone)]
pub struct Queue {
    items: SyncSender<Item>,
    lost: Arc<AtomicU64>,
}

impl Queue {
    /// Puts a line in, or counts it as lost.
    pub fn put(&self, line: &[u8]) {
        if self.items.try_send(Item::Line(line.into())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lines lost because the queue was full.
    pub fn found_no_room(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// The running thread. Dropping this has it write what is queued, and waits for it a second at most.
pub struct Writing {
    items: SyncSender<Item>,
    done: Receiver<()>,
}

/// Starts a queue for `lines` lines that are written to `out`. Without a thread every line is lost.
pub fn start(lines: usize, out: impl Write + Send + 'static) -> (Queue, Writing) {
    let (items, queued) = sync_channel(lines);
    let (ended, done) = channel();
    // Its end is told by `ended`, which goes with the closure.
    drop(thread::spawn("log", move || write(&queued, out, &ended)));
    let queue = Queue { items: items.clone(), lost: Arc::default() };
    (queue, Writing { items, done })
}

/// Writes until the end is asked for. What cannot be written is gone: there is nobody to tell.
fn write(queued: &Receiver<Item>, mut out: impl Write, _ended: &Sender<()>) {
    loop {
        let item = match queued.try_recv() {
            Ok(item) => item,
            Err(TryRecvError::Empty) => {
                let _ = out.flush();
                queued.recv().unwrap_or(Item::End)
            }
            Err(TryRecvError::Disconnected) => Item::End,
        };
        match item {
            Item::Line(line) => drop(out.write_all(&line)),
            Item::End => break,
        }
    }
    let _ = out.flush();
}

impl Drop for Writing {
    fn drop(&mut self) {
        let until = Instant::now() + PATIENCE;
        while let Err(TrySendError::Full(_)) = self.items.try_send(Item::End) {
            if Instant::now() >= until {
                return;
            }
            std::thread::sleep(AGAIN);
        }
        let _ = self.done.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_end_waits_until_everything_is_written_and_what_comes_later_is_lost() {
        let page = Page::default();
        let (queue, writing) = start(1_000, page.clone());
        for number in 0..1_000 {
            queue.put(format!("{number}\n").as_bytes());
        }
        drop(writing);
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        let expected: String = (0..1_000).map(|number| format!("{number}\n")).collect();
        assert_eq!(text, expected);
        queue.put(b"too late\n");
        assert_eq!(queue.found_no_room(), 1);
    }

    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }

    #[test]
    fn an_output_that_has_gone_away_ends_nothing() {
        let (queue, writing) = start(4, Broken);
        for _ in 0..100 {
            queue.put(b"a line\n");
        }
        drop(writing);
    }
}
