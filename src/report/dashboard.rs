//! A training on the whole terminal: loss curve, numbers, throughput, memory, load of the device, last sample, messages.
//!
//! A thread of its own draws what the training reports, so that the picture stays alive during a long step, and listens to
//! the keyboard, because a terminal in this state sends no signal for Ctrl-C.

use super::load::{Load, Meter};
use super::{SampleRecord, StepRecord, ValRecord};
use crate::error::{Error, Result};
use crate::output::{bytes, grouped, loss};
use crate::{interrupt, say};
use indicatif::FormattedDuration;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph, Sparkline, Wrap};
use ratatui::{DefaultTerminal, Frame};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, TryLockError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Messages that are kept, to be printed when the dashboard closes.
const MOST_NOTES: usize = 200;
/// Between two pictures.
const PAUSE: Duration = Duration::from_millis(200);
/// Values of the throughput's curve.
const MOST_RATES: usize = 512;

/// Whether the terminal is ours, and whoever draws on it.
static ACTIVE: AtomicBool = AtomicBool::new(false);
static DRAWING: Mutex<()> = Mutex::new(());

/// Gives the terminal back, if a dashboard has it. May be called at any time, from any thread and twice.
pub fn restore() {
    if !ACTIVE.swap(false, Ordering::SeqCst) {
        return;
    }
    // A picture under way is waited for, but not for ever: a panic may have come from within it.
    let started = Instant::now();
    let mut drawing = DRAWING.try_lock();
    while matches!(drawing, Err(TryLockError::WouldBlock)) && started.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(1));
        drawing = DRAWING.try_lock();
    }
    // Nothing can be done about a terminal that is gone.
    let _ = ratatui::try_restore();
}

/// A training on the terminal; dropping it gives the terminal back.
pub struct Dashboard {
    view: Arc<Mutex<View>>,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Dashboard {
    /// Takes the terminal over for a training of `steps` steps on the device that is described.
    ///
    /// # Errors
    /// [`Error::Usage`] when standard output is no terminal that can be drawn on.
    pub fn start(steps: u64, device: &str) -> Result<Self> {
        let refused = |error: std::io::Error| {
            restore();
            Error::usage(format!("--dashboard cannot draw on this terminal ({error}); leave it out"))
        };
        restore_before_panics();
        ACTIVE.store(true, Ordering::SeqCst);
        let terminal = ratatui::try_init().map_err(refused)?;
        let view = Arc::new(Mutex::new(View::new(steps, device)));
        let (stop, stopped) = mpsc::channel();
        let shared = view.clone();
        let thread =
            std::thread::Builder::new().name("dashboard".into()).spawn(move || live(terminal, &shared, &stopped));
        Ok(Self { view, stop, thread: Some(thread.map_err(refused)?) })
    }

    /// A step is done.
    pub fn step(&self, record: &StepRecord) {
        lock(&self.view).step(record);
    }

    /// A validation is done.
    pub fn validation(&self, record: &ValRecord) {
        lock(&self.view).val.push(record.step, f64::from(record.val_loss));
    }

    /// A sample is made.
    pub fn sample(&self, record: &SampleRecord) {
        lock(&self.view).sample = Some(record.clone());
    }

    /// A message for the user.
    pub fn note(&self, text: &str) {
        lock(&self.view).note(text);
    }

    /// Gives the terminal back and prints the messages that came meanwhile.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn close(mut self) -> Result<()> {
        self.stop();
        let notes = std::mem::take(&mut lock(&self.view).notes);
        notes.iter().try_for_each(|note| say!("{note}"))
    }

    fn stop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            // Its panic, if there was one, has been printed.
            let _ = thread.join();
        }
        restore();
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A panic's words belong on the ordinary screen.
fn restore_before_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            before(panic);
        }));
    });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Draws and listens until it is stopped or the terminal is gone.
fn live(mut terminal: DefaultTerminal, view: &Mutex<View>, stopped: &mpsc::Receiver<()>) {
    let mut meter = Meter::new(&lock(view).device);
    while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
        let load = meter.measure();
        {
            let _drawing = lock(&DRAWING);
            let mut view = lock(view);
            view.load = load;
            if !ACTIVE.load(Ordering::SeqCst) || terminal.draw(|frame| view.draw(frame)).is_err() {
                return;
            }
        }
        listen();
    }
}

/// Waits a little for a key; Ctrl-C does what it does everywhere.
fn listen() {
    let started = Instant::now();
    match event::poll(PAUSE).and_then(|ready| ready.then(event::read).transpose()) {
        Ok(Some(Event::Key(key))) => {
            if key.is_press() && key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
                interrupt::interrupt();
            }
        }
        Ok(_) => {}
        // Without a keyboard: only the pause.
        Err(_) => std::thread::sleep(PAUSE.saturating_sub(started.elapsed())),
    }
}

/// Everything there is to see.
struct View {
    device: String,
    steps: u64,
    started: Instant,
    first: Option<u64>,
    last: Option<StepRecord>,
    train: Curve,
    val: Curve,
    rates: VecDeque<u64>,
    sample: Option<SampleRecord>,
    notes: VecDeque<String>,
    load: Load,
}

impl View {
    fn new(steps: u64, device: &str) -> Self {
        Self {
            device: device.to_string(),
            steps,
            started: Instant::now(),
            first: None,
            last: None,
            train: Curve::default(),
            val: Curve::default(),
            rates: VecDeque::new(),
            sample: None,
            notes: VecDeque::new(),
            load: Load::default(),
        }
    }

    fn step(&mut self, record: &StepRecord) {
        self.first.get_or_insert(record.step);
        self.train.push(record.step, f64::from(record.train_loss));
        self.rates.push_back(record.tok_per_s as u64);
        if self.rates.len() > MOST_RATES {
            self.rates.pop_front();
        }
        self.last = Some(record.clone());
    }

    fn note(&mut self, text: &str) {
        self.notes.push_back(text.to_string());
        if self.notes.len() > MOST_NOTES {
            self.notes.pop_front();
        }
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let rows = [Constraint::Length(3), Constraint::Min(8), Constraint::Length(6), Constraint::Length(5)];
        let [progress, middle, sample, messages] = Layout::vertical(rows).areas(frame.area());
        let [curve, side] = Layout::horizontal([Constraint::Fill(1), Constraint::Length(38)]).areas(middle);
        let [numbers, rates] = Layout::vertical([Constraint::Length(11), Constraint::Min(0)]).areas(side);
        self.draw_progress(frame, progress);
        self.draw_losses(frame, curve);
        frame.render_widget(Paragraph::new(self.numbers()).block(Block::bordered().title(" now ")), numbers);
        self.draw_rates(frame, rates);
        self.draw_sample(frame, sample);
        self.draw_notes(frame, messages);
    }

    fn draw_progress(&self, frame: &mut Frame<'_>, area: Rect) {
        let done = self.last.as_ref().map_or(0, |last| last.step);
        let eta = self.first.filter(|&first| done > first).map_or("unknown".to_string(), |first| {
            let per_step = self.started.elapsed().as_secs_f64() / (done - first + 1) as f64;
            let rest = (per_step * self.steps.saturating_sub(done) as f64).min(1e9);
            FormattedDuration(Duration::from_secs(rest as u64)).to_string()
        });
        let gauge = Gauge::default()
            .block(Block::bordered().title(format!(" bandtrain on {} ", printable(&self.device))))
            .gauge_style(Style::new().fg(Color::Blue))
            .ratio((done as f64 / self.steps.max(1) as f64).clamp(0.0, 1.0))
            .label(format!("step {done}/{}, {eta} to go, Ctrl-C saves and stops", self.steps));
        frame.render_widget(gauge, area);
    }

    fn draw_losses(&self, frame: &mut Frame<'_>, area: Rect) {
        let curves = [("training", &self.train, Color::Cyan), ("validation", &self.val, Color::Yellow)];
        let points: Vec<(f64, f64)> = curves.iter().flat_map(|(_, curve, _)| curve.points()).collect();
        let [steps, losses] = [|point: &(f64, f64)| point.0, |point: &(f64, f64)| point.1].map(|axis| {
            let values = || points.iter().map(axis).filter(|value| value.is_finite());
            let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
            if low < high { [low, high] } else { [low.min(1e30) - 0.5, low.min(1e30) + 0.5] }
        });
        let curves = curves.map(|(name, curve, colour)| (name, curve.points().collect::<Vec<_>>(), colour));
        let sets = curves.iter().filter(|(_, points, _)| !points.is_empty()).map(|(_, points, colour)| {
            let set = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line);
            set.style(Style::new().fg(*colour)).data(points)
        });
        let legend = curves.iter().map(|(name, _, colour)| Span::styled(format!("{name} "), *colour));
        let block = Block::bordered().title(Line::from_iter([Span::raw(" loss: ")].into_iter().chain(legend)));
        if points.is_empty() {
            return frame.render_widget(Paragraph::new("no step is done yet").block(block), area);
        }
        let middle = (losses[0] + losses[1]) / 2.0;
        let chart = Chart::new(sets.collect())
            .block(block)
            .x_axis(Axis::default().bounds(steps).labels(steps.map(|step| format!("{step:.0}"))))
            .y_axis(
                Axis::default().bounds(losses).labels([losses[0], middle, losses[1]].map(|loss| format!("{loss:.3}"))),
            );
        frame.render_widget(chart, area);
    }

    fn numbers(&self) -> Vec<Line<'static>> {
        let number = |value: Option<String>| value.unwrap_or_else(|| "none yet".to_string());
        let last = |show: fn(&StepRecord) -> String| number(self.last.as_ref().map(show));
        let unknown = |value: Option<String>| value.unwrap_or_else(|| "unknown".to_string());
        let percent = |share: Option<f32>| unknown(share.map(|share| format!("{share:.0} %")));
        let size = |count: Option<u64>| unknown(count.map(|count| bytes(usize::try_from(count).unwrap_or(usize::MAX))));
        let mut lines = vec![
            ("train loss", last(|step| loss(step.train_loss))),
            ("val loss", number(self.val.last.map(|value| loss(value as f32)))),
            ("grad norm", last(|step| format!("{:.4}", step.grad_norm))),
            ("learn rate", last(|step| format!("{:.3e}", step.lr))),
            ("tokens", last(|step| grouped(step.tokens as usize))),
            ("memory", size(self.load.memory)),
            ("CPU load", percent(self.load.cpu)),
        ];
        if self.load.on_gpu {
            lines.push(("GPU load", percent(self.load.gpu)));
            lines.push(("GPU memory", size(self.load.gpu_memory)));
        }
        lines.into_iter().map(|(name, value)| Line::from(format!("{name:<11}{value}"))).collect()
    }

    fn draw_rates(&self, frame: &mut Frame<'_>, area: Rect) {
        let room = usize::from(area.width.saturating_sub(2));
        let newest: Vec<u64> = self.rates.iter().skip(self.rates.len().saturating_sub(room)).copied().collect();
        let rate = self.last.as_ref().map_or("none yet".to_string(), |last| grouped(last.tok_per_s as usize));
        let block = Block::bordered().title(format!(" {rate} tok/s "));
        frame.render_widget(Sparkline::default().block(block).data(newest).style(Style::new().fg(Color::Green)), area);
    }

    fn draw_sample(&self, frame: &mut Frame<'_>, area: Rect) {
        let (title, text) = match &self.sample {
            Some(SampleRecord { step, sample }) => (format!(" sample after step {step} "), printable(sample)),
            None => (" sample ".to_string(), "none yet".to_string()),
        };
        let text = Paragraph::new(text).wrap(Wrap { trim: false });
        frame.render_widget(text.block(Block::bordered().title(title)), area);
    }

    fn draw_notes(&self, frame: &mut Frame<'_>, area: Rect) {
        let room = usize::from(area.height.saturating_sub(2));
        let newest = self.notes.iter().skip(self.notes.len().saturating_sub(room));
        let lines: Vec<Line<'_>> = newest.map(|note| Line::from(printable(note))).collect();
        frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" messages ")), area);
    }
}

/// Text without characters that would move the cursor.
fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_control() && c != '\n', " ")
}

/// A quantity over the steps, in a bounded number of points: means of ever more steps.
#[derive(Default)]
struct Curve {
    points: Vec<(f64, f64)>,
    /// Values of a point, as a power of two.
    doublings: u32,
    sum: f64,
    count: u64,
    last: Option<f64>,
}

impl Curve {
    const MOST_POINTS: usize = 1024;

    /// Takes a value in; one that is not finite leaves the curve as it is.
    fn push(&mut self, step: u64, value: f64) {
        self.last = Some(value);
        if !value.is_finite() {
            return;
        }
        self.sum += value;
        self.count += 1;
        if self.count < 1 << self.doublings {
            return;
        }
        self.points.push((step as f64, self.sum / self.count as f64));
        (self.sum, self.count) = (0.0, 0);
        if self.points.len() == Self::MOST_POINTS {
            self.points = self.points.chunks(2).map(|pair| (pair[1].0, (pair[0].1 + pair[1].1) / 2.0)).collect();
            self.doublings += 1;
        }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.points.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn drawn(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    fn record(step: u64, train_loss: f32) -> StepRecord {
        let tokens = 512 * step;
        StepRecord {
            step,
            train_loss,
            lr: 3e-4,
            grad_norm: 1.25,
            tokens,
            tok_per_s: 12345.0,
            step_ms: 41.0,
            skipped: None,
        }
    }

    #[test]
    fn everything_there_is_to_see_is_drawn() {
        let mut view = View::new(200, "A card, bf16");
        let empty = drawn(&view, 100, 32);
        assert!(
            empty.contains("no step is done yet") && empty.contains("step 0/200, unknown to go, Ctrl-C saves"),
            "{empty}"
        );
        for step in 1..=100 {
            view.step(&record(step, 5.0 - step as f32 / 50.0));
        }
        view.val.push(100, 3.125);
        view.sample = Some(SampleRecord { step: 100, sample: "Once upon\u{1b}[2J a time".into() });
        view.note("step 100/200 | checkpoint written to m.safetensors");
        view.load = Load { memory: Some(3 << 30), cpu: Some(87.4), on_gpu: true, gpu: Some(55.0), gpu_memory: None };
        let text = drawn(&view, 100, 32);
        for part in [
            "step 100/200, ",
            "train loss 3.000000",
            "val loss   3.125000",
            "grad norm  1.2500",
            "learn rate 3.000e-4",
            "tokens     51,200",
            "memory     3.00 GiB",
            "CPU load   87 %",
            "GPU load   55 %",
            "GPU memory unknown",
            " bandtrain on A card, bf16 ",
            " 12,345 tok/s ",
            " sample after step 100 ",
            "Once upon [2J a time",
            "checkpoint written to m.safetensors",
            " loss: training validation ",
            "4.980",
        ] {
            assert!(text.contains(part), "'{part}' is missing:\n{text}");
        }
        assert!(text.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "no curve:\n{text}");
        view.load = Load::default();
        let text = drawn(&view, 100, 32);
        assert!(text.contains("CPU load   unknown") && !text.contains("GPU"), "{text}");
    }

    #[test]
    fn a_small_terminal_and_strange_values_do_no_harm() {
        let mut view = View::new(2, "CPU");
        for (step, value) in [(1, f32::NAN), (2, f32::INFINITY), (3, 1e38), (4, -1e38), (5, 2.0)] {
            view.step(&record(step, value));
            for (width, height) in [(1, 1), (10, 5), (40, 12), (300, 100)] {
                drawn(&view, width, height);
            }
        }
    }

    #[test]
    fn a_long_curve_stays_short() {
        let mut curve = Curve::default();
        for step in 1..=100_000 {
            curve.push(step, step as f64);
        }
        assert!(curve.points.len() < Curve::MOST_POINTS && curve.points.len() >= Curve::MOST_POINTS / 2 - 1);
        let (step, mean) = curve.points[100];
        assert!((step - mean - (f64::from(1u32 << curve.doublings) - 1.0) / 2.0).abs() < 1e-6, "{step} {mean}");
        assert_eq!(curve.last, Some(1e5));
    }

    #[test]
    fn giving_back_what_was_not_taken_does_nothing() {
        restore();
        restore();
    }
}
