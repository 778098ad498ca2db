//! The history, step by step: what is told, what is not known, and what is let go.

use super::*;

fn at(ms: u64) -> Now {
    Now::from_nanos(7_000_000_000 + ms * 1_000_000)
}

fn totals(sessions: u64, new: u64) -> Totals {
    Totals { sessions, new, ..Totals::default() }
}

/// A service of TCP users.
fn seen(id: u16, name: &Arc<str>, totals: Totals) -> Seen<'_> {
    Seen { id: ServiceId(id), name, protocol: Protocol::Tcp, totals }
}

fn news(samples: Option<Vec<Option<&Sample>>>) -> Vec<Option<u32>> {
    samples.unwrap().into_iter().map(|it| it.map(|it| it.new)).collect()
}

fn whole(history: &History) -> Vec<Option<u32>> {
    news(Some(history.whole(STEPS)))
}

fn service(history: &History, name: &Arc<str>) -> Vec<Option<u32>> {
    news(history.service(name, Protocol::Tcp, STEPS))
}

fn spans(history: &History) -> Vec<Option<u32>> {
    history.spans(STEPS).collect()
}

#[test]
fn a_step_holds_what_was_added_in_it_and_the_sessions_at_its_end() {
    let mut history = History::new(at(0));
    assert!(!history.is_due(at(4_999)) && history.is_due(at(5_000)));
    assert!(whole(&history).is_empty(), "no step has ended");
    let web: Arc<str> = "web".into();
    for (ms, sessions, new) in [(5_000, 3, 10), (10_000, 1, 10), (15_000, 2, 14)] {
        let mut all = totals(sessions, new);
        (all.bytes_up, all.refused) = (new * 1000, new / 2);
        history.end_step(at(ms), &all, [seen(3, &web, totals(sessions, new))].into_iter());
    }
    assert_eq!(whole(&history), [Some(10), Some(0), Some(4)]);
    assert_eq!(service(&history, &web), [Some(10), Some(0), Some(4)]);
    let last = history.whole(1)[0].unwrap();
    assert_eq!((last.sessions, last.bytes_up, last.refused), (2, 4000, 2));
    let tcp = history.protocol(Protocol::Tcp, STEPS);
    assert_eq!(news(Some(tcp)), [Some(10), Some(0), Some(4)]);
    assert_eq!(spans(&history), [Some(5_000); 3]);
    let udp = history.protocol(Protocol::Udp, STEPS);
    assert_eq!(news(Some(udp)), [Some(0); 3]);
}

#[test]
fn a_tick_that_is_a_little_late_moves_no_later_step() {
    let mut history = History::new(at(0));
    for (ms, took, next) in [(5_090, 5_090, 10_000), (10_040, 4_950, 15_000)] {
        history.end_step(at(ms), &Totals::default(), [].into_iter());
        assert_eq!(spans(&history).last(), Some(&Some(took)));
        assert!(!history.is_due(at(next - 1)) && history.is_due(at(next)));
    }
}

#[test]
fn a_tick_that_comes_steps_late_leaves_a_gap_and_spreads_what_was_added_over_it() {
    let mut history = History::new(at(0));
    let web: Arc<str> = "web".into();
    for (ms, new) in [(5_000, 4), (21_000, 20), (25_000, 21)] {
        history.end_step(at(ms), &totals(0, new), [seen(3, &web, totals(0, new))].into_iter());
    }
    let expected = [Some(4), None, None, Some(16), Some(1)];
    assert_eq!(whole(&history), expected);
    assert_eq!(service(&history, &web), expected);
    assert_eq!(spans(&history), [Some(5_000), None, None, Some(16_000), Some(4_000)]);
}

#[test]
fn the_step_after_a_gap_is_no_shorter_than_half_a_step() {
    for (ms, gaps, next) in [(12_400, 0, 15_000), (12_600, 1, 20_000), (44_600, 7, 50_000)] {
        let mut history = History::new(at(0));
        for end in [5_000, ms] {
            history.end_step(at(end), &Totals::default(), [].into_iter());
        }
        assert_eq!(spans(&history).len(), gaps + 2, "at {ms}");
        assert!(!history.is_due(at(next - 1)) && history.is_due(at(next)), "at {ms}");
    }
}

#[test]
fn a_clock_that_jumps_costs_a_gap_and_no_more() {
    let mut history = History::new(at(0));
    let end = |history: &mut History, ms: u64, new: u64| {
        history.end_step(at(ms), &totals(0, new), [].into_iter());
    };
    end(&mut history, 5_000, 1);
    end(&mut history, 1 << 40, 3);
    assert_eq!(whole(&history).len(), STEPS);
    assert_eq!(whole(&history)[STEPS - 1], Some(2), "the rest is unknown");
    assert!(whole(&history)[..STEPS - 1].iter().all(Option::is_none));
    assert!(history.is_due(at(9_000)), "it has been turned back");
    end(&mut history, 9_000, 8);
    assert_eq!(whole(&history)[STEPS - 1], None, "nobody knows how long that took");
    assert_eq!(history.minute(Protocol::Api).sum, Totals::default());
    assert!(!history.is_due(at(13_999)) && history.is_due(at(14_000)));
    end(&mut history, 14_000, 9);
    assert_eq!(whole(&history)[STEPS - 1], Some(1));
}

#[test]
fn a_counter_that_begins_anew_counts_from_zero() {
    let mut history = History::new(at(0));
    for (step, new) in [(1, 100), (2, 7), (3, 9)] {
        history.end_step(at(step * 5_000), &totals(0, new), [].into_iter());
    }
    assert_eq!(whole(&history), [Some(100), Some(7), Some(2)]);
}

#[test]
fn services_come_and_go_and_come_back_and_what_is_not_known_is_no_zero() {
    let mut history = History::new(at(0));
    let (web, idle, late): (Arc<str>, Arc<str>, Arc<str>) =
        ("web".into(), "idle".into(), "late".into());
    // By step: the services there are, and the number of the one called web.
    let steps: [(Option<(u16, u64)>, bool); 6] = [
        (Some((3, 5)), false),
        (Some((3, 6)), false),
        (None, false),
        (None, true),
        // Added again, as another service with the name, and counters of its own.
        (Some((9, 2)), true),
        (Some((9, 9)), true),
    ];
    for (step, (of_web, has_late)) in (1..).zip(steps) {
        let of_web = of_web.map(|(id, new)| seen(id, &web, totals(0, new)));
        let of_late = has_late.then(|| seen(5, &late, totals(0, 0)));
        let of_idle = seen(4, &idle, Totals::default());
        let all = of_web.into_iter().chain(of_late).chain([of_idle]);
        history.end_step(at(step * 5_000), &Totals::default(), all);
    }
    assert_eq!(service(&history, &web), [Some(5), Some(1), None, None, Some(2), Some(7)]);
    assert_eq!(service(&history, &idle), [Some(0); 6]);
    assert_eq!(service(&history, &late), [None, None, None, Some(0), Some(0), Some(0)]);
    assert!(history.service(&"none".into(), Protocol::Tcp, 9).is_none());
    assert!(history.service(&web, Protocol::Udp, 9).is_none(), "another service");
    assert_eq!(history.kept(), 1, "services without traffic take no room");
    let tcp = history.protocol(Protocol::Tcp, STEPS);
    assert_eq!(news(Some(tcp))[2..5], [Some(0), Some(0), Some(2)]);
}

#[test]
fn the_oldest_step_goes_when_a_new_one_comes_and_a_quiet_series_with_it() {
    let mut history = History::new(at(0));
    let web: Arc<str> = "web".into();
    let end = |step: u64, new: u64, history: &mut History| {
        history.end_step(
            at(step * 5_000),
            &totals(0, new),
            [seen(3, &web, totals(0, new))].into_iter(),
        );
    };
    for step in 1..=STEPS as u64 {
        end(step, 5, &mut history);
    }
    assert_eq!((whole(&history).len(), whole(&history)[0]), (STEPS, Some(5)));
    assert_eq!(history.kept(), 1);
    end(STEPS as u64 + 1, 5, &mut history);
    assert_eq!((whole(&history).len(), whole(&history)[0]), (STEPS, Some(0)));
    assert_eq!(history.kept(), 0, "it has nothing to show");
    assert_eq!(service(&history, &"web".into()), vec![Some(0); STEPS]);
    end(STEPS as u64 + 2, 8, &mut history);
    assert_eq!(history.kept(), 1);
    let shown = service(&history, &"web".into());
    assert_eq!(shown[STEPS - 2..], [Some(0), Some(3)]);
}

#[test]
fn a_removed_service_is_forgotten_when_its_last_traffic_is_old() {
    let mut history = History::new(at(0));
    let web: Arc<str> = "web".into();
    history.end_step(at(5_000), &totals(0, 1), [seen(3, &web, totals(0, 1))].into_iter());
    for step in 2..=STEPS as u64 {
        history.end_step(at(step * 5_000), &totals(0, 1), [].into_iter());
    }
    assert_eq!(service(&history, &web)[..2], [Some(1), None]);
    history.end_step(at((STEPS as u64 + 1) * 5_000), &totals(0, 1), [].into_iter());
    assert!(history.service(&web, Protocol::Tcp, STEPS).is_none());
    assert!(history.services.is_empty() && history.before.is_empty());
}

#[test]
fn only_so_many_services_have_a_series_and_those_left_out_are_counted_and_show_no_zeros() {
    let mut history = History::new(at(0));
    let names: Vec<Arc<str>> = (0..SERIES_MAX + 2).map(|it| format!("s{it:04}").into()).collect();
    for step in 1..=2 {
        let all = (3..).zip(&names).map(|(id, name)| seen(id, name, totals(0, step)));
        history.end_step(at(step * 5_000), &totals(0, step), all);
    }
    assert_eq!((history.kept(), history.left_out()), (SERIES_MAX, 2));
    assert_eq!(service(&history, &names[0]), [Some(1), Some(1)]);
    assert_eq!(service(&history, &names[SERIES_MAX]), [None, None]);
    // One of them falls silent while another is removed long enough for its place to be free.
    for step in 3..=STEPS as u64 + 2 {
        let all = (4..).zip(&names[1..]).map(|(id, name)| {
            let new = if usize::from(id) < SERIES_MAX + 3 { step } else { 2 };
            seen(id, name, totals(0, new))
        });
        history.end_step(at(step * 5_000), &totals(0, step), all);
    }
    assert_eq!((history.kept(), history.left_out()), (SERIES_MAX - 1, 0));
    assert_eq!(service(&history, &names[SERIES_MAX]), vec![Some(0); STEPS]);
}

#[test]
fn percentiles_are_of_the_step_and_of_the_last_minute() {
    let mut history = History::new(at(0));
    let web: Arc<str> = "web".into();
    let mut sum = Totals::default();
    for (step, bucket, count) in [(1, 3, 50), (2, 5, 1), (14, 6, 2)] {
        sum.times[bucket] += count;
        let of_web = Seen { protocol: Protocol::Udp, ..seen(3, &web, sum) };
        history.end_step(at(step * 5_000), &sum, [of_web].into_iter());
    }
    let shown: Vec<Option<u64>> =
        history.whole(STEPS).iter().map(|it| it.and_then(Sample::p99_us)).collect();
    assert_eq!(shown[..2], [Some(BOUNDS_US[3]), Some(BOUNDS_US[5])]);
    assert_eq!(shown[13], Some(BOUNDS_US[6]));
    let minute = history.minute(Protocol::Udp);
    assert_eq!(minute.sum.times.iter().sum::<u64>(), 2, "the others are more than a minute old");
    assert_eq!(minute.took, Duration::from_secs(60));
    sum.times[BUCKETS - 1] += 1;
    history.end_step(at(75_000), &sum, [].into_iter());
    let last = history.whole(1)[0].unwrap();
    assert_eq!((last.p50_us(), last.p99_us()), (None, None), "longer than every bound");
}

#[test]
fn requests_that_no_service_has_claimed_are_requests_of_the_protocol() {
    let mut history = History::new(at(0));
    let api: Arc<str> = "api".into();
    let of_api = |requests| Seen {
        id: ServiceId::built_in(Protocol::Api),
        name: &api,
        protocol: Protocol::Api,
        totals: Totals { requests, ..Totals::default() },
    };
    let whole = Totals { requests: 9, errors: 2, ..Totals::default() };
    history.end_step(at(5_000), &whole, [of_api(7)].into_iter());
    let shown = history.protocol(Protocol::Api, 1)[0].unwrap();
    assert_eq!((shown.requests, shown.errors), (9, 2));
    let shown = history.service(&api, Protocol::Api, 1).unwrap()[0].unwrap();
    assert_eq!(shown.requests, 7);
}
