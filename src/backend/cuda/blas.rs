//! Dense products by cuBLASLt: descriptions of products, the algorithm chosen for each, and the calls.
//!
//! The algorithm for a large product is searched: the library's first proposals run a few times each, and the fastest is
//! kept on disk for this card and library. Only algorithms that sum in a fixed order are considered. Where nothing can be kept,
//! the library's first proposal is taken: a search may end differently each time, and two runs should give the same bits.

use super::buffer::Element;
use super::driver::{Driver, Event};
use super::libraries::{self, Library};
use crate::backend::Arithmetic;
use crate::cache::{self, Cache};
use crate::error::{Error, Result};
use cudarc::cublaslt::{result, sys};
use std::collections::HashMap;
use std::ffi::c_void;
use sys::cublasLtEpilogue_t as LtEpilogue;
use sys::cublasLtMatmulDescAttributes_t as Attribute;

/// Memory that algorithms may use beside their operands: what NVIDIA recommends for its newest cards.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
/// Proposals that a search tries, and runs of each that count.
const PROPOSALS: usize = 12;
const RUNS: usize = 5;
/// Smaller products take the library's first proposal.
const SEARCHED_FLOPS: f64 = 1e8;

/// What the library does besides the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Epilogue {
    /// Nothing.
    None,
    /// Adds a bias.
    Bias,
    /// Adds a bias, stores the sum, and returns its GELU.
    BiasGelu,
    /// Multiplies with the GELU's derivative at a stored value.
    GeluBackward,
    /// Sums the rows of B over the depth, too: the gradient of a bias.
    BiasGradient,
}

impl Epilogue {
    fn code(self) -> LtEpilogue {
        match self {
            Epilogue::None => LtEpilogue::CUBLASLT_EPILOGUE_DEFAULT,
            Epilogue::Bias => LtEpilogue::CUBLASLT_EPILOGUE_BIAS,
            Epilogue::BiasGelu => LtEpilogue::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
            Epilogue::GeluBackward => LtEpilogue::CUBLASLT_EPILOGUE_DGELU,
            Epilogue::BiasGradient => LtEpilogue::CUBLASLT_EPILOGUE_BGRADB,
        }
    }
}

/// A product of column-major matrices: D [m, n] = op(A) [m, k] op(B) [k, n] (+ D), then the epilogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) transpose: [bool; 2],
    /// Elements from one column to the next of A, B and D.
    pub(super) strides: [usize; 3],
    /// The type of D; that of A and B is the activations'.
    pub(super) out: Element,
    pub(super) epilogue: Epilogue,
    pub(super) add: bool,
}

/// A product with its operands' places; 0 where the epilogue needs none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Call {
    pub(super) shape: Shape,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) d: u64,
    pub(super) bias: u64,
    pub(super) aux: u64,
}

/// A shape as the library knows it.
struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library, and the products it has been asked for.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    arithmetic: Arithmetic,
    operand: Element,
    workspace: u64,
    /// `None` where the library has no algorithm.
    plans: HashMap<Shape, Option<Plan>>,
    /// What kept algorithms are good for: the card and the library.
    identity: String,
}

fn fault(doing: &str) -> impl FnOnce(result::CublasError) -> Error + '_ {
    move |error| Error::Device(format!("cuBLASLt failed while {doing}: {:?}; install another version of it", error.0))
}

fn data_type(element: Element) -> sys::cudaDataType_t {
    match element {
        Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
    }
}

#[allow(unsafe_code)]
impl Blas {
    /// Opens the library; `workspace` is device memory of [`WORKSPACE_BYTES`].
    ///
    /// # Errors
    /// It is not found, or fails.
    pub(super) fn new(driver: &Driver, arithmetic: Arithmetic, workspace: u64) -> Result<Self> {
        libraries::ensure(Library::CublasLt)?;
        let handle = result::create_handle().map_err(fault("starting"))?;
        // SAFETY: the library is loaded.
        let version = unsafe { sys::cublasLtGetVersion() };
        let identity = format!("{} cuBLASLt {version} {}", driver.card.name, arithmetic.name());
        Ok(Self { handle, arithmetic, operand: Element::of(arithmetic), workspace, plans: HashMap::new(), identity })
    }

    /// Chooses the algorithm for a shape if it is new.
    ///
    /// # Errors
    /// The library has none, or fails.
    pub(super) fn prepare(&mut self, shape: Shape, driver: &Driver) -> Result<()> {
        match self.can(shape, driver)? {
            true => Ok(()),
            false => Err(fault("choosing an algorithm")(result::CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            ))),
        }
    }

    /// The same; whether the library has an algorithm.
    ///
    /// # Errors
    /// The library fails.
    pub(super) fn can(&mut self, shape: Shape, driver: &Driver) -> Result<bool> {
        if !self.plans.contains_key(&shape) {
            let plan = self.plan(shape, driver)?;
            self.plans.insert(shape, plan);
        }
        Ok(self.plans[&shape].is_some())
    }

    /// The product in words.
    pub(super) fn describe(&self, call: &Call) -> String {
        let Shape { m, n, k, transpose, epilogue, .. } = call.shape;
        let orientation: String = transpose.map(|transposed| if transposed { 'T' } else { 'N' }).iter().collect();
        let epilogue = if epilogue == Epilogue::None { String::new() } else { format!(" {epilogue:?}") };
        format!("cuBLASLt {orientation} {m}x{n}x{k}{epilogue}")
    }

    /// Gives a prepared product to the stream.
    pub(super) fn run(&self, call: &Call, driver: &Driver) -> Result<()> {
        let plan = self.plans.get(&call.shape).and_then(Option::as_ref);
        let plan = plan.ok_or_else(|| Error::Internal("a product was not prepared".to_string()))?;
        self.start(plan, &plan.algorithm, call, driver)
    }

    fn start(&self, plan: &Plan, algorithm: &sys::cublasLtMatmulAlgo_t, call: &Call, driver: &Driver) -> Result<()> {
        if call.bias != 0 {
            set(plan.desc, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &call.bias)?;
        }
        if call.aux != 0 {
            set(plan.desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &call.aux)?;
        }
        let (one, beta) = (1.0f32, if call.shape.add { 1.0f32 } else { 0.0 });
        let (scale, beta) = (std::ptr::from_ref(&one).cast(), std::ptr::from_ref(&beta).cast());
        let [a, b, d] = plan.layouts;
        let pointer = |at: u64| at as *const c_void;
        // SAFETY: the descriptions live in the plan, the operands in buffers whose sizes were checked when the call was
        // recorded; work that shares the workspace runs in the stream's order.
        let started = unsafe {
            result::matmul(
                self.handle,
                plan.desc,
                scale,
                beta,
                pointer(call.a),
                a,
                pointer(call.b),
                b,
                pointer(call.d),
                d,
                pointer(call.d).cast_mut(),
                d,
                algorithm,
                pointer(self.workspace).cast_mut(),
                WORKSPACE_BYTES,
                driver.stream().cast(),
            )
        };
        started.map_err(fault("multiplying"))
    }

    fn plan(&self, shape: Shape, driver: &Driver) -> Result<Option<Plan>> {
        use sys::cublasComputeType_t as Compute;
        let compute = match self.arithmetic {
            Arithmetic::Fp32 | Arithmetic::Bf16 => Compute::CUBLAS_COMPUTE_32F,
            Arithmetic::Tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
        };
        let doing = "describing a product";
        let desc = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F).map_err(fault(doing))?;
        for (attribute, transposed) in [Attribute::CUBLASLT_MATMUL_DESC_TRANSA, Attribute::CUBLASLT_MATMUL_DESC_TRANSB]
            .into_iter()
            .zip(shape.transpose)
        {
            set(desc, attribute, &i32::from(transposed))?;
        }
        set(desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &shape.epilogue.code())?;
        if matches!(shape.epilogue, Epilogue::BiasGelu | Epilogue::GeluBackward) {
            set(desc, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &(shape.m as i64))?;
        }
        let Shape { m, n, k, transpose, strides, out, .. } = shape;
        let layout = |element, rows: usize, cols: usize, stride: usize| {
            result::create_matrix_layout(data_type(element), rows as u64, cols as u64, stride as i64)
                .map_err(fault(doing))
        };
        let (a, b) = (if transpose[0] { (k, m) } else { (m, k) }, if transpose[1] { (n, k) } else { (k, n) });
        let layouts = [
            layout(self.operand, a.0, a.1, strides[0])?,
            layout(self.operand, b.0, b.1, strides[1])?,
            layout(out, m, n, strides[2])?,
        ];
        let proposals = self.proposals(desc, layouts)?;
        let Some(&first) = proposals.first() else {
            forget(desc, layouts);
            return Ok(None);
        };
        let mut plan = Plan { desc, layouts, algorithm: first };
        if 2.0 * m as f64 * n as f64 * k as f64 >= SEARCHED_FLOPS && proposals.len() > 1 {
            plan.algorithm = self.searched(&plan, &shape, &proposals, driver)?;
        }
        Ok(Some(plan))
    }

    /// The library's proposals, the best by its own estimate first; none where it cannot.
    fn proposals(
        &self,
        desc: sys::cublasLtMatmulDesc_t,
        [a, b, d]: [sys::cublasLtMatrixLayout_t; 3],
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        use sys::cublasLtReductionScheme_t as Reduction;
        let doing = "choosing an algorithm";
        let preference = result::create_matmul_pref().map_err(fault(doing))?;
        // Sums that are shared out meet in the workspace, in order; in place they would meet as they come.
        let schemes = Reduction::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32
            | Reduction::CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE as u32;
        // SAFETY: an all-zero result is a valid value of a plain C structure.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; PROPOSALS] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: descriptions and preference live; the attributes have the sizes that the library documents; there is room
        // for as many results as are asked for.
        let asked = unsafe {
            let most = std::ptr::from_ref(&WORKSPACE_BYTES).cast();
            result::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                most,
                8,
            )
            .map_err(fault(doing))?;
            let mask = std::ptr::from_ref(&schemes).cast();
            result::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                mask,
                4,
            )
            .map_err(fault(doing))?;
            let asked = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                desc,
                a,
                b,
                d,
                d,
                preference,
                PROPOSALS as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            result::destroy_matmul_pref(preference).map_err(fault(doing))?;
            asked
        };
        match asked {
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => return Ok(Vec::new()),
            other => other.result().map_err(fault(doing))?,
        }
        let usable = found[..count as usize].iter().filter(|proposal| proposal.state.result().is_ok());
        Ok(usable.map(|proposal| proposal.algo).collect())
    }

    /// The proposal that was found the fastest, now or earlier.
    fn searched(
        &self,
        plan: &Plan,
        shape: &Shape,
        proposals: &[sys::cublasLtMatmulAlgo_t],
        driver: &Driver,
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        let words = |algorithm: &sys::cublasLtMatmulAlgo_t| bytemuck::cast_slice::<u64, u8>(&algorithm.data).to_vec();
        let known = format!("{} {shape:?}", self.identity);
        let name = format!("product-{}.algorithm", cache::key(&[known.as_bytes()]));
        let cache = Cache::of_user();
        let kept = || cache.read(&name).and_then(|kept| proposals.iter().copied().find(|p| words(p) == kept));
        if let Some(algorithm) = kept() {
            return Ok(algorithm);
        }
        let fastest = self.fastest(plan, shape, proposals, driver)?;
        cache.write(&name, &words(&proposals[fastest]));
        Ok(kept().unwrap_or(proposals[0]))
    }

    /// Which of the proposals is the fastest on operands that are not zero.
    fn fastest(
        &self,
        plan: &Plan,
        shape: &Shape,
        proposals: &[sys::cublasLtMatmulAlgo_t],
        driver: &Driver,
    ) -> Result<usize> {
        let Shape { m, n, k, out, .. } = *shape;
        let (operand, out) = (self.operand.bytes(), out.bytes());
        let mut memory = Trial { driver, taken: Vec::new() };
        let call = Call {
            shape: *shape,
            a: memory.take(operand * m * k)?,
            b: memory.take(operand * k * n)?,
            d: memory.take(out * m * n)?,
            bias: match shape.epilogue {
                Epilogue::Bias | Epilogue::BiasGelu => memory.take(4 * m)?,
                Epilogue::BiasGradient => memory.take(4 * n)?,
                _ => 0,
            },
            aux: match shape.epilogue {
                Epilogue::BiasGelu | Epilogue::GeluBackward => memory.take(operand * m * n)?,
                _ => 0,
            },
        };
        let mut best = (0, f64::INFINITY);
        for (index, algorithm) in proposals.iter().enumerate() {
            if self.start(plan, algorithm, &call, driver).is_err() {
                continue;
            }
            let (start, end) = (Event::new(true)?, Event::new(true)?);
            start.record(driver)?;
            for _ in 0..RUNS {
                self.start(plan, algorithm, &call, driver)?;
            }
            end.record(driver)?;
            end.wait()?;
            let seconds = start.seconds_until(&end)?;
            if seconds < best.1 {
                best = (index, seconds);
            }
        }
        Ok(best.0)
    }
}

#[allow(unsafe_code)]
impl Drop for Blas {
    fn drop(&mut self) {
        for plan in self.plans.values().flatten() {
            forget(plan.desc, plan.layouts);
        }
        // SAFETY: nothing is multiplied any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Gives up the descriptions of a product, which is not used any more.
#[allow(unsafe_code)]
fn forget(desc: sys::cublasLtMatmulDesc_t, layouts: [sys::cublasLtMatrixLayout_t; 3]) {
    // SAFETY: the library made them, and they are given up once.
    unsafe {
        let _ = result::destroy_matmul_desc(desc);
        for layout in layouts {
            let _ = result::destroy_matrix_layout(layout);
        }
    }
}

/// Memory for a search.
struct Trial<'a> {
    driver: &'a Driver,
    taken: Vec<u64>,
}

impl Trial<'_> {
    /// Memory full of small numbers of either sign: zeros would be multiplied faster than real ones.
    fn take(&mut self, bytes: usize) -> Result<u64> {
        let at = self.driver.alloc("the search for an algorithm", bytes)?;
        self.taken.push(at);
        // As two bf16 or one f32, magnitudes around 2^-8.
        let words: Vec<u32> = (0..bytes.div_ceil(4).min(1 << 18) as u32)
            .map(|index| {
                let random = index.wrapping_mul(0x9e37_79b9) ^ (index >> 7).wrapping_mul(0x85eb_ca6b);
                let half = |bits: u32| (bits & 0x8000) | 0x3b80 | (bits & 0x03ff);
                half(random) | half(random >> 16) << 16
            })
            .collect();
        let fill = |offset: usize| {
            let count = words.len().min((bytes - offset) / 4);
            self.driver.copy_in(at + offset as u64, &words[..count])
        };
        (0..bytes).step_by(4 * words.len()).try_for_each(fill)?;
        Ok(at)
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        self.taken.iter().for_each(|&memory| self.driver.free(memory));
    }
}

/// Sets an attribute of a product's description.
#[allow(unsafe_code)]
fn set<T>(desc: sys::cublasLtMatmulDesc_t, attribute: Attribute, value: &T) -> Result<()> {
    // SAFETY: the description lives, and each attribute is given as the type that the library documents.
    unsafe { result::set_matmul_desc_attribute(desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
        .map_err(fault("describing a product"))
}
