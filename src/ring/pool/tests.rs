//! Blocks are taken, filled, cut and given back.

use super::*;

fn filled(pool: &mut Pool, text: &[u8]) -> Buf {
    let mut buf = pool.take(Class::Small).unwrap();
    assert_eq!(pool.append(&mut buf, text), text.len());
    buf
}

fn text(pool: &Pool, chain: &Chain) -> Vec<u8> {
    pool.pieces(chain.outgoing()).flatten().copied().collect()
}

#[test]
fn a_chain_keeps_the_order_of_its_bytes() {
    let mut pool = Pool::new(4, 0);
    let mut chain = Chain::EMPTY;
    for part in [&b"one "[..], b"two ", b"three"] {
        let buf = filled(&mut pool, part);
        pool.push(&mut chain, buf);
    }
    assert_eq!(text(&pool, &chain), b"one two three");
    pool.advance(&mut chain, 6);
    assert_eq!((text(&pool, &chain), chain.bytes()), (b"o three".to_vec(), 7));
    let front = pool.split(&mut chain, 1);
    assert_eq!(text(&pool, &front), b"o ");
    assert_eq!(text(&pool, &chain), b"three");
    pool.give_back_chain(front);
    pool.give_back_chain(chain);
    assert_eq!(pool.free(Class::Small), 4);
}

#[test]
fn a_buffer_is_changed_in_place_and_nowhere_else() {
    let mut pool = Pool::new(2, 0);
    let other = filled(&mut pool, b"other");
    let mut buf = filled(&mut pool, b"one two");
    pool.skip(&mut buf, 4);
    pool.bytes_mut(&mut buf).make_ascii_uppercase();
    assert_eq!((pool.bytes(&buf), pool.bytes(&other)), (&b"TWO"[..], &b"other"[..]));
    pool.give_back(buf);
    pool.give_back(other);
}

#[test]
fn a_class_runs_out_and_recovers() {
    let mut pool = Pool::new(1, 1);
    let small = pool.take(Class::Small).unwrap();
    assert!(pool.take(Class::Small).is_none());
    let large = pool.take(Class::Large).unwrap();
    assert_eq!((pool.free(Class::Small), pool.free(Class::Large)), (0, 0));
    pool.give_back(small);
    pool.give_back(large);
    assert_eq!((pool.free(Class::Small), pool.free(Class::Large)), (1, 1));
}

#[test]
fn a_buffer_takes_no_more_than_its_block() {
    let mut pool = Pool::new(1, 0);
    let mut buf = pool.take(Class::Small).unwrap();
    assert_eq!(pool.append(&mut buf, &[7; SMALL_BYTES + 1]), SMALL_BYTES);
    assert_eq!(pool.append(&mut buf, b"x"), 0);
    pool.skip(&mut buf, SMALL_BYTES - 1);
    assert_eq!(pool.bytes(&buf), [7]);
    pool.give_back(buf);
}

#[test]
fn the_block_used_last_is_used_next() {
    let mut pool = Pool::new(8, 0);
    let first = pool.take(Class::Small).unwrap();
    let second = pool.take(Class::Small).unwrap();
    let hot = second.block;
    pool.give_back(first);
    pool.give_back(second);
    let third = pool.take(Class::Small).unwrap();
    assert_eq!(third.block, hot);
    pool.give_back(third);
}

#[test]
fn every_class_has_blocks_of_its_own() {
    let mut pool = Pool::with_datagrams(2, 2, 2);
    let mut held = Vec::new();
    for class in Class::ALL {
        assert_eq!((pool.blocks(class), pool.free(class)), (2, 2), "{class:?}");
        while let Some(mut buf) = pool.take(class) {
            let whole = vec![held.len() as u8; class.bytes() + 1];
            assert_eq!(pool.append(&mut buf, &whole), class.bytes(), "{class:?}");
            assert_eq!(pool.class(&buf), class);
            held.push(buf);
        }
    }
    assert_eq!(held.len(), 6);
    for (number, buf) in held.into_iter().enumerate() {
        assert!(pool.bytes(&buf).iter().all(|byte| usize::from(*byte) == number));
        pool.give_back(buf);
    }
}

#[test]
fn the_common_stock_leaves_the_reserve_alone() {
    for (blocks, reserve) in [(1, 1), (2, 1), (3, 1), (8, 2), (100, 25)] {
        let mut pool = Pool::new(blocks, 0);
        assert_eq!(pool.reserve(), reserve, "of {blocks}");
        let mut common = Vec::new();
        while let Some(buf) = pool.set_aside(Class::Small, Stock::Common) {
            common.push(buf);
        }
        assert_eq!(common.len(), blocks - reserve, "of {blocks}");
        assert_eq!(pool.unused(Class::Small), blocks, "posted blocks are nobody's");
        for _ in &common {
            pool.took(Class::Small, Stock::Common);
        }
        assert_eq!((pool.unused(Class::Small), pool.is_scarce()), (reserve, true));
        let last: Vec<Buf> =
            (0..reserve).map(|_| pool.set_aside(Class::Small, Stock::Reserve).unwrap()).collect();
        assert!(pool.has_reserve() && pool.free(Class::Small) == 0);
        // What comes back refills the reserve before anyone else gets it.
        for buf in last {
            pool.took(Class::Small, Stock::Reserve);
            pool.give_back(buf);
            assert!(pool.set_aside(Class::Small, Stock::Common).is_none());
        }
        common.into_iter().for_each(|buf| pool.give_back(buf));
    }
}

#[test]
fn blocks_are_scarce_before_the_reserve_is_all_there_is() {
    let mut pool = Pool::new(100, 0);
    let mut held = Vec::new();
    for surplus in (0..50).rev() {
        held.extend(pool.take(Class::Small));
        assert_eq!((pool.surplus(), pool.is_scarce()), (surplus, surplus == 0));
    }
    assert!(pool.unused(Class::Small) > pool.reserve());
    held.into_iter().for_each(|buf| pool.give_back(buf));
}

#[test]
#[should_panic(expected = "a block it did not hold")]
fn a_block_that_was_not_posted_cannot_be_filled() {
    let mut pool = Pool::new(1, 0);
    let _ = pool.filled(0, 1);
}

#[test]
fn a_posted_block_comes_back_with_its_length() {
    let mut pool = Pool::new(0, 1);
    let (block, _, bytes) = pool.post(Class::Large, Stock::Common).unwrap();
    assert_eq!(bytes, LARGE_BYTES);
    assert!(pool.post(Class::Large, Stock::Common).is_none());
    let (buf, stock) = pool.filled(block, 9);
    assert_eq!((buf.len(), stock), (9, Stock::Common));
    pool.give_back(buf);
    assert_eq!(pool.free(Class::Large), 1);
}
