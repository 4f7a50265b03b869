//! What every kernel takes, by the compiler's own words: registers, shared memory, spills, and how many of its blocks an sm_89
//! multiprocessor holds.

use super::compiler::{Target, Unit, compile};
use super::{adamw, attention, band, embed, gelu, layernorm, loss, product, reduce};
use crate::backend::Arithmetic;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// A multiprocessor of compute capability 8.9 (CUDA C++ Programming Guide, table of technical specifications).
const SM89_REGISTERS: usize = 65_536;
const SM89_SHARED_MEMORY: usize = 100 << 10;
const SM89_THREADS: usize = 1536;
const SM89_BLOCKS: usize = 24;
/// Registers are given to warps in pieces of this many, shared memory to blocks with this much for the system.
const REGISTER_PIECE: usize = 256;
const SYSTEM_SHARED_MEMORY: usize = 1 << 10;

/// What a kernel takes.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct KernelUse {
    /// The kernel file and its definitions.
    pub unit: String,
    /// The kernel.
    pub entry: String,
    /// The precision it is for.
    pub precision: &'static str,
    /// Threads of a block.
    pub threads: usize,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of shared memory of a block.
    pub shared_memory: usize,
    /// Bytes of a thread's stack, of spill stores and spill loads: all 0, or the kernel is slow.
    pub spills: [usize; 3],
    /// The compiler makes each of its products by warpgroups wait for the one before: the kernel is slow too.
    pub serialized: bool,
    /// Warps that an sm_89 multiprocessor holds at once, of its 48.
    pub sm89_warps: usize,
}

/// An instantiation: unit, entry, threads, dynamic shared memory.
type Instance = (Unit, &'static str, usize, usize);

fn instances(arithmetic: Arithmetic, target: Target) -> Vec<Instance> {
    let all = [
        adamw::units(arithmetic),
        attention::units(arithmetic, target.has_warpgroup_products()),
        band::units(arithmetic, target.has_warpgroup_products()),
        embed::units(arithmetic),
        gelu::units(arithmetic),
        layernorm::units(arithmetic),
        loss::units(arithmetic),
        product::units(arithmetic),
        reduce::units(arithmetic),
    ];
    all.concat()
}

/// Compiles every kernel, at every instantiation that the presets and sizes that fit nothing lead to, for an architecture (89
/// is sm_89); needs NVRTC but no card.
///
/// # Errors
/// NVRTC is missing or refuses a kernel.
pub fn kernel_uses(arithmetic: Arithmetic, architecture: u32) -> Result<Vec<KernelUse>> {
    let target = Target { architecture, native: true };
    let mut units: BTreeMap<Unit, Vec<Instance>> = BTreeMap::new();
    for instance in instances(arithmetic, target) {
        units.entry(instance.0.clone()).or_default().push(instance);
    }
    let units: Vec<_> = units.into_iter().collect();
    use rayon::prelude::*;
    let compiled: Vec<Result<Vec<KernelUse>>> =
        units.par_iter().map(|(unit, instances)| uses(unit, instances, arithmetic, target)).collect();
    compiled.into_iter().collect::<Result<Vec<_>>>().map(|uses| uses.concat())
}

fn uses(unit: &Unit, instances: &[Instance], arithmetic: Arithmetic, target: Target) -> Result<Vec<KernelUse>> {
    let (_, reports) = compile(unit, target)?;
    let of = |&(_, entry, threads, shared): &Instance| {
        let report = reports.iter().find(|report| report.entry == entry);
        let report = report.ok_or_else(|| Error::Internal(format!("{} has no kernel {entry}", unit.name())))?;
        let shared_memory = shared + report.shared_memory;
        Ok(KernelUse {
            unit: unit.name(),
            entry: entry.to_string(),
            precision: arithmetic.name(),
            threads,
            registers: report.registers,
            shared_memory,
            spills: report.spills,
            serialized: report.serialized,
            sm89_warps: sm89_blocks(threads, report.registers, shared_memory) * (threads / 32),
        })
    };
    instances.iter().map(of).collect()
}

/// Blocks that an sm_89 multiprocessor holds at once.
fn sm89_blocks(threads: usize, registers: usize, shared_memory: usize) -> usize {
    let warp_registers = (32 * registers).next_multiple_of(REGISTER_PIECE).max(1);
    let by_registers = SM89_REGISTERS / warp_registers / (threads / 32);
    let by_shared_memory = SM89_SHARED_MEMORY / (shared_memory + SYSTEM_SHARED_MEMORY);
    by_registers.min(by_shared_memory).min(SM89_THREADS / threads).min(SM89_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occupancy_is_what_runs_out_first() {
        assert_eq!(sm89_blocks(256, 40, 0), 6); // threads
        assert_eq!(sm89_blocks(256, 128, 0), 2); // registers
        assert_eq!(sm89_blocks(128, 64, 40 << 10), 2); // shared memory
        assert_eq!(sm89_blocks(32, 16, 0), 24); // blocks
    }
}
