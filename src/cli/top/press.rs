//! The keys of `lb top`.

/// A key as the screen understands it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Press {
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
    Enter,
    /// Escape.
    Back,
    Erase,
    Char(char),
    /// Control-C.
    Leave,
}
