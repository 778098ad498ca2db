//! The last 15 minutes in `lb top`: what to ask the balancer for, and when; and values as bars in as many columns
//! as there are. Pure.

use crate::control::history::page::{Field, HistoryPage, ManyHistories, Series, Values};
use crate::control::history::{STEP, STEPS};
use crate::control::view::ms;

/// Most rows of services that are asked for at once.
const ROWS_MAX: usize = 100;
/// The fields that `v` goes through.
const FIELDS: [Field; 7] = [
    Field::New,
    Field::Sessions,
    Field::Requests,
    Field::Errors,
    Field::Refused,
    Field::BytesDown,
    Field::P99,
];

/// What is to be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ask {
    /// One field of the whole, and of these services.
    Overview { field: Field, services: Vec<String> },
    /// All fields of one service, or of the whole.
    Detail { service: Option<String> },
}

/// What was read.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Answer {
    pub page: Option<HistoryPage>,
    pub services: Option<ManyHistories>,
}

/// What is known, and what has been asked for.
#[derive(Debug)]
pub struct Past {
    /// What the lists show.
    pub field: Field,
    pub answer: Answer,
    /// Why nothing is known.
    pub trouble: Option<String>,
    /// The last question, the uptime of the balancer at that time, and whether the answer is on its way.
    asked: Option<(Ask, u64)>,
    is_waiting: bool,
    /// The question that [`Past::answer`] is for.
    answered: Option<Ask>,
}

impl Default for Past {
    fn default() -> Past {
        Past {
            field: Field::New,
            answer: Answer::default(),
            trouble: None,
            asked: None,
            is_waiting: false,
            answered: None,
        }
    }
}

impl Past {
    /// The question that is due at this uptime of the balancer. One at a time.
    pub fn due(&mut self, mut wanted: Ask, uptime_ms: u64) -> Option<Ask> {
        if let Ask::Overview { services, .. } = &mut wanted {
            services.truncate(ROWS_MAX);
        }
        let is_fresh = self
            .asked
            .as_ref()
            .is_some_and(|(ask, at)| *ask == wanted && (*at..*at + ms(STEP)).contains(&uptime_ms));
        if self.is_waiting || is_fresh {
            return None;
        }
        (self.asked, self.is_waiting) = (Some((wanted.clone(), uptime_ms)), true);
        Some(wanted)
    }

    /// A question has been answered.
    pub fn read(&mut self, ask: Ask, answer: Result<Answer, String>) {
        self.is_waiting = false;
        match answer {
            Ok(answer) => (self.answer, self.trouble) = (answer, None),
            Err(said) => (self.answer, self.trouble) = (Answer::default(), Some(said)),
        }
        self.answered = Some(ask);
    }

    /// Shows the next field in the lists.
    pub fn turn(&mut self) {
        let place = FIELDS.iter().position(|field| *field == self.field).map_or(0, |it| it + 1);
        self.field = FIELDS[place % FIELDS.len()];
    }

    /// The curves of the service that is shown, or of the whole.
    pub fn detail(&self, service: Option<&str>) -> Option<Vec<(Field, Curve)>> {
        let page = self.answer.page.as_ref()?;
        if page.service.as_deref() != service || matches!(self.answered, Some(Ask::Overview { .. }))
        {
            return None;
        }
        let curves = Field::ALL.into_iter().filter_map(|field| Some((field, curve(page, field)?)));
        Some(curves.collect())
    }

    /// The curve of the field of the lists, of the whole.
    pub fn whole(&self) -> Option<Curve> {
        let page = self.answer.page.as_ref().filter(|page| page.service.is_none())?;
        curve(page, self.field)
    }

    /// The same of one service. `None` if nothing is known of it.
    pub fn of(&self, service: &str) -> Option<Curve> {
        let all = self.answer.services.as_ref()?;
        let found = all.services.iter().find(|it| it.name == service)?;
        let values = values(&found.series, self.field)?;
        Some(Curve::new(values, &all.took_ms, self.field, all.ended_unix_ms))
    }

    /// Whether there is anything to show in the rows of services.
    pub fn has_rows(&self) -> bool {
        self.answer.services.is_some()
    }
}

fn curve(page: &HistoryPage, field: Field) -> Option<Curve> {
    let values = values(&page.whole, field)?;
    Some(Curve::new(values, &page.took_ms, field, page.ended_unix_ms))
}

fn values(series: &Series, field: Field) -> Option<&Values> {
    match field {
        Field::Sessions => series.sessions.as_ref(),
        Field::New => series.new.as_ref(),
        Field::Requests => series.requests.as_ref(),
        Field::Errors => series.errors.as_ref(),
        Field::Refused => series.refused.as_ref(),
        Field::BytesUp => series.bytes_up.as_ref(),
        Field::BytesDown => series.bytes_down.as_ref(),
        Field::P50 => series.p50_us.as_ref(),
        Field::P99 => series.p99_us.as_ref(),
    }
}

/// What a field is called on the screen.
pub const fn title(field: Field) -> &'static str {
    match field {
        Field::Sessions => "sessions",
        Field::New => "new/s",
        Field::Requests => "requests/s",
        Field::Errors => "errors/s",
        Field::Refused => "refused/s",
        Field::BytesUp => "up/s",
        Field::BytesDown => "down/s",
        Field::P50 => "p50",
        Field::P99 => "p99",
    }
}

/// Values over time, one for each step, the oldest first; counts are per second.
#[derive(Clone, PartialEq, Debug)]
pub struct Curve {
    values: Vec<Option<f64>>,
    /// The number of the newest step since 1970, so that steps are always gathered alike.
    newest: u64,
}

/// The columns of a curve where there is room for this many: each stands for equally many steps, and none is
/// left over.
pub const fn columns(room: usize) -> usize {
    match room {
        0 => 0,
        room => STEPS.div_ceil(STEPS.div_ceil(room)),
    }
}

/// From the lowest to the highest.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

impl Curve {
    fn new(values: &Values, took_ms: &[Option<u32>], field: Field, ended_unix_ms: u64) -> Curve {
        let is_gauge = matches!(field, Field::Sessions | Field::P50 | Field::P99);
        let value = |(value, took): (&Option<u64>, &Option<u32>)| match (value, took) {
            (Some(value), _) if is_gauge => Some(*value as f64),
            (Some(value), Some(took @ 1..)) => Some(*value as f64 * 1000.0 / f64::from(*took)),
            _ => None,
        };
        let values = values.iter().zip(took_ms).map(value).collect();
        Curve { values, newest: ended_unix_ms / ms(STEP) }
    }

    /// The newest value.
    pub fn now(&self) -> Option<f64> {
        self.values.last().copied().flatten()
    }

    /// The highest.
    pub fn most(&self) -> Option<f64> {
        self.values.iter().flatten().copied().reduce(f64::max)
    }

    /// One value for each of `columns`, the oldest first: the highest of the steps gathered in it, so that a short
    /// burst is seen.
    fn gathered(&self, columns: usize) -> Vec<Option<f64>> {
        let each = STEPS.div_ceil(columns.max(1)) as u64;
        let mut gathered = vec![None; columns];
        for (ago, value) in self.values.iter().rev().enumerate() {
            let step = self.newest.saturating_sub(ago as u64);
            let back = self.newest / each - step / each;
            let Some(place) = columns.checked_sub(1 + back as usize) else { break };
            gathered[place] = match (gathered[place], *value) {
                (Some(a), Some(b)) => Some(f64::max(a, b)),
                (a, b) => a.or(b),
            };
        }
        gathered
    }

    /// Bars in so many columns and lines, the upper line first. What is not known is blank; nothing is the lowest
    /// bar, and anything above it at least the next.
    pub fn bars(&self, columns: usize, lines: usize) -> Vec<String> {
        let most = self.most().unwrap_or(0.0);
        let steps = lines.max(1) * BARS.len() - 1;
        let height = |value: f64| match value > 0.0 && most > 0.0 {
            true => ((value / most * steps as f64).ceil() as usize).clamp(1, steps),
            false => 0,
        };
        let heights: Vec<Option<usize>> =
            self.gathered(columns).into_iter().map(|value| value.map(height)).collect();
        let bar = |height: &Option<usize>, line: usize| match height {
            Some(height) => match (height + 1).checked_sub(line * BARS.len()) {
                Some(0) | None => ' ',
                Some(filled) => BARS[filled.min(BARS.len()) - 1],
            },
            None => ' ',
        };
        let line = |line: usize| heights.iter().map(|height| bar(height, line)).collect();
        (0..lines.max(1)).rev().map(line).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::status::SCHEMA;

    fn curve_of(values: &[Option<f64>], newest: u64) -> Curve {
        Curve { values: values.to_vec(), newest }
    }

    /// A page whose `new` are these, in full steps.
    pub fn page(service: Option<&str>, new: &[u64]) -> HistoryPage {
        let values = |of: fn(u64) -> u64| Some(new.iter().map(|it| Some(of(*it))).collect());
        let whole = Series {
            sessions: values(|it| it),
            new: values(|it| it),
            p99_us: values(|it| 1000 * it),
            ..Series::default()
        };
        HistoryPage {
            schema: SCHEMA,
            step_ms: 5000,
            ended_unix_ms: 5000 * 1079,
            took_ms: vec![Some(5000); new.len()],
            service: service.map(str::to_owned),
            whole,
            protocols: Default::default(),
            marks: Vec::new(),
            services: Default::default(),
        }
    }

    #[test]
    fn bars_are_as_high_as_the_highest_in_them_and_blank_where_nothing_is_known() {
        let curve =
            curve_of(&[None, Some(0.0), Some(1.0), Some(50.0), Some(100.0), Some(7.0)], 1079);
        // Twelve steps in each column, which begin at a multiple of twelve.
        assert_eq!(curve.bars(15, 1), ["              █"]);
        assert_eq!(curve.bars(180, 1)[0].trim_start(), "▁▂▅█▂");
        assert_eq!(curve.bars(180, 1)[0].chars().count(), 180);
        let two = curve.bars(180, 2);
        assert_eq!([two[0].trim(), two[1].trim()], ["▁█", "▁▂██▃"]);
        assert_eq!(curve_of(&[], 5).bars(3, 1), ["   "]);
        assert_eq!(curve_of(&[Some(0.0); 180], 1079).bars(15, 1), ["▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁"]);
    }

    #[test]
    fn no_column_of_a_curve_is_left_over() {
        for (room, taken) in
            [(0, 0), (1, 1), (15, 15), (25, 23), (44, 36), (60, 60), (179, 90), (500, 180)]
        {
            assert_eq!(columns(room), taken);
            let first = curve_of(&[Some(1.0); STEPS], 1079).bars(taken, 1)[0].chars().next();
            assert_ne!(first, Some(' '));
        }
    }

    #[test]
    fn a_column_stays_what_it_was_while_time_goes_on() {
        let mut values = vec![Some(1.0); 180];
        values[170] = Some(9.0);
        let before = curve_of(&values, 1079).bars(15, 1)[0].clone();
        values.remove(0);
        values.push(Some(1.0));
        let after = curve_of(&values, 1080).bars(15, 1)[0].clone();
        assert_eq!(before.chars().skip(1).collect::<String>() + "▂", after);
        values.remove(0);
        values.push(Some(1.0));
        assert_eq!(curve_of(&values, 1081).bars(15, 1)[0], after);
    }

    #[test]
    fn counts_are_per_second_of_the_time_that_their_step_took() {
        let mut page = page(None, &[10, 10, 10]);
        page.took_ms = vec![Some(5000), None, Some(10_000)];
        let new = curve(&page, Field::New).unwrap();
        assert_eq!(new.values, [Some(2.0), None, Some(1.0)]);
        assert_eq!((new.now(), new.most()), (Some(1.0), Some(2.0)));
        assert_eq!(curve(&page, Field::Sessions).unwrap().values, [Some(10.0); 3]);
        assert_eq!(curve(&page, Field::Errors), None);
    }

    #[test]
    fn one_question_is_asked_at_a_time_and_again_after_a_step_or_when_it_is_another() {
        let mut past = Past::default();
        let of = |service: &str| Ask::Detail { service: Some(service.into()) };
        assert_eq!(past.due(of("a"), 1000), Some(of("a")));
        assert_eq!(past.due(of("a"), 9000), None, "the answer is on its way");
        past.read(of("a"), Err("no".into()));
        assert_eq!((past.due(of("a"), 5999), past.trouble.as_deref()), (None, Some("no")));
        assert_eq!(past.due(of("b"), 5999), Some(of("b")));
        past.read(of("b"), Ok(Answer { page: Some(page(Some("b"), &[1])), services: None }));
        assert_eq!(past.trouble, None);
        assert!(past.detail(Some("b")).is_some() && past.detail(Some("a")).is_none());
        assert_eq!(past.due(of("b"), 5), Some(of("b")), "another balancer counts its time anew");
    }
}
