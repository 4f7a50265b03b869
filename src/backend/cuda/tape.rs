//! Recorded work: kernels and library calls in order, submitted together, and as one CUDA graph when they come again.
//!
//! A training step records the same work with the same arguments each time: what changes lives in device memory. So a
//! recording that has been seen before is captured as a graph and from then on replayed: one call instead of hundreds.

use super::blas::{Blas, Call};
use super::compiler::{KernelId, Kernels};
use super::driver::{Driver, Event, TensorMap, fault};
use crate::backend::{OpTime, Part};
use crate::error::{Error, Result};
use cudarc::driver::{result, sys};
use std::collections::{HashMap, VecDeque};
use std::ffi::c_void;

/// Recordings that are remembered; generation makes new ones with every token.
const REMEMBERED: usize = 64;
/// Shorter recordings are not worth a graph.
const SHORTEST_GRAPH: usize = 4;

/// One piece of work.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Work {
    /// A kernel, `grid` blocks of `block` threads with `shared` bytes of dynamic shared memory.
    /// Its arguments are `maps`, then `args`.
    Launch {
        kernel: KernelId,
        op: &'static str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        maps: Vec<TensorMap>,
        args: Vec<u64>,
    },
    /// A product by cuBLASLt.
    Product { call: Call, op: &'static str },
}

/// What is known of a recording.
enum Known {
    Seen,
    Graph(Graph),
}

/// The work recorded since the last submission, and the recordings known.
pub(super) struct Tape {
    works: Vec<Work>,
    /// The part of the model that each of them belongs to, and the one that the next ones will.
    parts: Vec<Part>,
    part: Part,
    known: HashMap<Vec<Work>, Known>,
    /// The known ones, the oldest first.
    order: VecDeque<Vec<Work>>,
    profile: Option<Vec<(Work, Part, Event, Event)>>,
    /// Wait for each piece of work, so that a fault is known by its kernel.
    stepwise: bool,
}

/// Set to anything, makes each kernel be waited for: slow, but a fault of the card names the kernel it came in.
const STEPWISE_VARIABLE: &str = "BANDTRAIN_CUDA_STEPWISE";

impl Tape {
    pub(super) fn new() -> Self {
        let stepwise = std::env::var_os(STEPWISE_VARIABLE).is_some();
        Self {
            works: Vec::new(),
            parts: Vec::new(),
            part: Part::default(),
            known: HashMap::new(),
            order: VecDeque::new(),
            profile: None,
            stepwise,
        }
    }

    pub(super) fn push(&mut self, work: Work) {
        self.works.push(work);
        self.parts.push(self.part);
    }

    /// The part of the model that what is pushed from now on belongs to.
    pub(super) fn set_part(&mut self, part: Part) {
        self.part = part;
    }

    /// Submits what is recorded.
    ///
    /// # Errors
    /// A kernel does not compile, or the driver fails.
    pub(super) fn submit(&mut self, driver: &Driver, kernels: &mut Kernels, blas: &mut Blas) -> Result<()> {
        if self.works.is_empty() {
            return Ok(());
        }
        let (works, parts) = (std::mem::take(&mut self.works), std::mem::take(&mut self.parts));
        if let Some(profile) = &mut self.profile {
            for (work, part) in works.into_iter().zip(parts) {
                let (start, end) = (Event::new(true)?, Event::new(true)?);
                start.record(driver)?;
                run(&work, driver, kernels, blas)?;
                end.record(driver)?;
                profile.push((work, part, start, end));
            }
            return Ok(());
        }
        if self.stepwise {
            return works.iter().try_for_each(|work| {
                run(work, driver, kernels, blas)?;
                let name = match work {
                    Work::Launch { kernel, .. } => kernels.name(*kernel).to_string(),
                    Work::Product { call, .. } => blas.describe(call),
                };
                driver.sync().map_err(|error| Error::Device(format!("{name}: {error}")))
            });
        }
        match self.known.get_mut(&works) {
            Some(Known::Graph(graph)) => graph.launch(driver),
            Some(seen) => {
                let graph =
                    Graph::capture(driver, || works.iter().try_for_each(|work| run(work, driver, kernels, blas)))?;
                graph.launch(driver)?;
                *seen = Known::Graph(graph);
                Ok(())
            }
            None => {
                works.iter().try_for_each(|work| run(work, driver, kernels, blas))?;
                if works.len() >= SHORTEST_GRAPH {
                    self.remember(works);
                }
                Ok(())
            }
        }
    }

    fn remember(&mut self, works: Vec<Work>) {
        if self.order.len() == REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(works.clone());
        self.known.insert(works, Known::Seen);
    }

    /// From now on runs each piece of work by itself, between two events.
    pub(super) fn start_profile(&mut self) {
        self.profile = Some(Vec::new());
    }

    /// The times of what ran since, by operation and kernel in the order they first ran; all submitted work is done.
    pub(super) fn finish_profile(&mut self, kernels: &Kernels, blas: &Blas) -> Result<Vec<OpTime>> {
        let mut times: Vec<OpTime> = Vec::new();
        for (work, part, start, end) in self.profile.take().unwrap_or_default() {
            let (op, kernel) = match &work {
                Work::Launch { kernel, op, .. } => (*op, kernels.name(*kernel).to_string()),
                Work::Product { call, op } => (*op, blas.describe(call)),
            };
            let seconds = start.seconds_until(&end)?;
            match times.iter_mut().find(|time| (time.op, time.part, &time.kernel) == (op, part, &kernel)) {
                Some(time) => {
                    time.count += 1;
                    time.seconds += seconds;
                }
                None => times.push(OpTime { op, part, kernel, count: 1, seconds }),
            }
        }
        Ok(times)
    }
}

/// Gives one piece of work to the stream.
#[allow(unsafe_code)]
fn run(work: &Work, driver: &Driver, kernels: &mut Kernels, blas: &mut Blas) -> Result<()> {
    match work {
        Work::Launch { kernel, grid: [x, y, z], block, shared, maps, args, .. } => {
            let function = kernels.function(*kernel)?;
            let maps = maps.iter().map(|map| std::ptr::from_ref(map).cast_mut().cast());
            let args = args.iter().map(|arg| std::ptr::from_ref(arg).cast_mut().cast());
            let mut params: Vec<*mut c_void> = maps.chain(args).collect();
            // SAFETY: the arguments are those of the kernel: maps, then what is 8 bytes wide or narrower (the driver reads the
            // lower bytes); they point into buffers whose sizes the operation has checked.
            let launched = unsafe {
                result::launch_kernel(function, (*x, *y, *z), (*block, 1, 1), *shared, driver.stream(), &mut params)
            };
            launched.map_err(|error| fault(&format!("starting {}", kernels.name(*kernel)))(error))
        }
        Work::Product { call, .. } => blas.run(call, driver),
    }
}

/// Captured work that the driver replays.
struct Graph(sys::CUgraphExec);

#[allow(unsafe_code)]
impl Graph {
    /// Captures what `record` gives to the stream.
    fn capture(driver: &Driver, record: impl FnOnce() -> Result<()>) -> Result<Self> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let doing = "capturing a step";
        // SAFETY: the stream is ours, and only this thread gives it work.
        unsafe { result::stream::begin_capture(driver.stream(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) }
            .map_err(fault(doing))?;
        let recorded = record();
        // SAFETY: as above; the capture ends whatever came of it.
        let graph = unsafe { result::stream::end_capture(driver.stream()) }.map_err(fault(doing));
        recorded?;
        let graph = graph?;
        // SAFETY: the graph was just captured, and is not needed once it is instantiated.
        unsafe {
            let replay = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).map_err(fault(doing));
            result::graph::destroy(graph).map_err(fault(doing))?;
            replay.map(Self)
        }
    }

    fn launch(&self, driver: &Driver) -> Result<()> {
        // SAFETY: graph and stream live; the recording it was captured from is equal to the present one, so that its
        // pointers are those of buffers that live.
        unsafe { result::graph::launch(self.0, driver.stream()) }.map_err(fault("replaying a step"))
    }
}

#[allow(unsafe_code)]
impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it is not launched again; the driver keeps what is still running.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}
