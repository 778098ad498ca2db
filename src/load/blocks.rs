//! Writes bytes into blocks: those that the generator and the echo backends compose themselves
//! before sending. Owns no memory; knows the pool.

use super::message::Content;
use crate::ring::pool::{Buf, Chain, Class, LARGE_BYTES, Pool, SMALL_BYTES};

/// The pool had too few blocks; nothing was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Exhausted;

/// Appends `bytes` to a chain, in new blocks.
pub fn write(pool: &mut Pool, chain: &mut Chain, bytes: &[u8]) -> Result<(), Exhausted> {
    let mut rest = bytes;
    if pool.free(class_for(rest.len())) < blocks_for(rest.len()) {
        return Err(Exhausted);
    }
    while !rest.is_empty() {
        let mut buf = take(pool, rest.len(), bytes.len()).ok_or(Exhausted)?;
        let written = pool.append(&mut buf, rest);
        pool.push(chain, buf);
        rest = &rest[written..];
    }
    Ok(())
}

/// Appends `head` and then `count` bytes of content, starting at `position`, sharing blocks between
/// them.
pub fn write_with_content(
    pool: &mut Pool,
    chain: &mut Chain,
    head: &[u8],
    content: &Content,
    position: u64,
    count: usize,
) -> Result<(), Exhausted> {
    let total = head.len() + count;
    if pool.free(class_for(total)) < blocks_for(total) + 1 {
        return Err(Exhausted);
    }
    let mut buf = pool.take(class_for(total)).ok_or(Exhausted)?;
    let written = pool.append(&mut buf, head);
    assert_eq!(written, head.len(), "a head fits a block");
    let mut at = 0;
    while at < count {
        let part = content.from(position + at as u64, count - at);
        let written = pool.append(&mut buf, part);
        at += written;
        if written == 0 {
            pool.push(chain, buf);
            buf = take(pool, count - at, total).ok_or(Exhausted)?;
        }
    }
    pool.push(chain, buf);
    Ok(())
}

/// A block for what is `left` of `total` bytes. The short end of a long write takes a large one if
/// there is no small one, so checking beforehand suffices.
fn take(pool: &mut Pool, left: usize, total: usize) -> Option<Buf> {
    pool.take(class_for(left)).or_else(|| pool.take(class_for(total)))
}

/// A chain of the first `count` bytes of content, to be sent again and again.
pub fn content_chain(pool: &mut Pool, content: &Content, count: usize) -> Result<Chain, Exhausted> {
    let mut chain = Chain::EMPTY;
    write_with_content(pool, &mut chain, &[], content, 0, count)?;
    Ok(chain)
}

/// How many blocks of [`class_for`] a write of `bytes` takes.
pub fn blocks_for(bytes: usize) -> usize {
    // The end of a long write may go into a small block, but counts as a large one: rather too many
    // than too few.
    bytes.div_ceil(class_for(bytes).bytes())
}

/// The class of block for the bytes left to write.
pub fn class_for(bytes: usize) -> Class {
    if bytes > SMALL_BYTES { Class::Large } else { Class::Small }
}

/// The class to receive into next, judged by how much came last: a block that was filled completely
/// was too small.
pub fn class_after(last: usize) -> Class {
    if last >= SMALL_BYTES { Class::Large } else { Class::Small }
}

const _: () = assert!(LARGE_BYTES > SMALL_BYTES);

/// Appends a received buffer to a chain, or gives it back if it is empty.
pub fn push_or_return(pool: &mut Pool, chain: &mut Chain, buf: Buf) {
    if buf.is_empty() {
        pool.give_back(buf);
    } else {
        pool.push(chain, buf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pool: &Pool, chain: &Chain) -> Vec<u8> {
        pool.pieces(chain.outgoing()).flatten().copied().collect()
    }

    #[test]
    fn what_is_written_stands_in_the_chain() {
        let content = Content::new();
        for count in [0, 1, SMALL_BYTES, SMALL_BYTES + 1, LARGE_BYTES, 3 * LARGE_BYTES + 77] {
            let mut pool = Pool::new(4, 8);
            let mut chain = Chain::EMPTY;
            write_with_content(&mut pool, &mut chain, b"head", &content, 9, count).unwrap();
            let bytes = text(&pool, &chain);
            assert_eq!(&bytes[..4], b"head");
            assert_eq!(bytes.len(), 4 + count);
            assert!(content.matches(9, &bytes[4..]), "{count} bytes");
            pool.give_back_chain(chain);
            let mut chain = Chain::EMPTY;
            write(&mut pool, &mut chain, &bytes).unwrap();
            assert_eq!(text(&pool, &chain), bytes);
            pool.give_back_chain(chain);
            assert_eq!((pool.free(Class::Small), pool.free(Class::Large)), (4, 8));
        }
    }

    #[test]
    fn a_pool_without_blocks_is_a_value() {
        let mut pool = Pool::new(1, 1);
        let mut chain = Chain::EMPTY;
        assert_eq!(write(&mut pool, &mut chain, &[0; 2 * LARGE_BYTES]), Err(Exhausted));
        assert!(chain.is_empty());
        assert_eq!((pool.free(Class::Small), pool.free(Class::Large)), (1, 1));
        pool.give_back_chain(chain);
    }

    #[test]
    fn the_short_end_of_a_long_write_finds_a_block_when_the_small_ones_are_used_up() {
        let content = Content::new();
        let mut pool = Pool::new(1, 6);
        let small = pool.take(Class::Small).unwrap();
        let mut chain = Chain::EMPTY;
        let long = LARGE_BYTES + 5;
        assert_eq!(write(&mut pool, &mut chain, &vec![7; long]), Ok(()));
        assert_eq!(write_with_content(&mut pool, &mut chain, b"head", &content, 0, long), Ok(()));
        assert_eq!(chain.bytes(), 2 * long + 4);
        pool.give_back_chain(chain);
        pool.give_back(small);
        assert_eq!((pool.free(Class::Small), pool.free(Class::Large)), (1, 6));
    }
}
