// Cross-entropy of a chunk of rows of logits, its gradient in their place, and sums of losses.
//
//   cross_entropy  loss[m] = log sum over v < V of exp(z[m, v]) - z[m, y[m]]; with `gradient`, z becomes
//                  scale * (softmax(z) - onehot(y)), and 0 from V on
//   loss_sum       total (+)= scale * sum of losses
//
// Shapes: logits [rows, stride], stride >= V a multiple of 4; tokens y [rows]; losses [rows].
// Dtypes: f32.
// Grid: cross_entropy one workgroup per row; loss_sum one workgroup.
// Determinism: each thread's share of a row is fixed, shares meet in a tree.
// Caller: src/backend/wgpu/loss.rs.
{% include "common.wgsl" %}
struct Params {
    first: u32,
    end: u32,
    width: u32,
    rows: u32,
    vocab: u32,
    stride: u32,
    scale: f32,
    add: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
{%- if entry == "cross_entropy" %}
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;

var<workgroup> group_peaks: array<f32, {{ threads }}>;
var<workgroup> wanted: f32;

// The largest `value` of the workgroup, for every thread.
fn group_max(thread: u32, value: f32) -> f32 {
    group_peaks[thread] = value;
    workgroupBarrier();
    for (var count = {{ threads // 2 }}u; count > 0u; count = count / 2u) {
        if (thread < count) { group_peaks[thread] = max(group_peaks[thread], group_peaks[thread + count]); }
        workgroupBarrier();
    }
    return group_peaks[0];
}

// Four logits from v on, those that do not exist hidden.
fn logits_at(row_at: u32, v: u32) -> vec4<f32> {
    let columns = vec4<u32>(v) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(HIDDEN), logits[(row_at + v) / 4u], columns < vec4<u32>(p.vocab));
}

@compute @workgroup_size({{ threads }})
fn cross_entropy(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group_index(id);
    if (row >= p.end) { return; }
    let row_at = row * p.stride;
    let token = tokens[row];
    // Per lane the largest logit so far and the sum of exponentials against it, in one pass over the row.
    var largest = vec4<f32>(HIDDEN);
    var sums = vec4<f32>();
    for (var v = 4u * thread; v < p.vocab; v += {{ 4 * threads }}u) {
        let z = logits_at(row_at, v);
        if (token - v < 4u) { wanted = z[token - v]; }
        let raised = max(largest, z);
        sums = sums * exp(largest - raised) + exp(z - raised);
        largest = raised;
    }
    let peak = group_max(thread, max(max(largest.x, largest.y), max(largest.z, largest.w)));
    let shares = sums * exp(largest - vec4<f32>(peak));
    let sum = group_sum(thread, (shares.x + shares.y) + (shares.z + shares.w));
    if (thread == 0u) { losses[row] = log(sum) - (wanted - peak); }
{%- if gradient %}
    let factor = p.scale / sum;
    for (var v = 4u * thread; v < p.stride; v += {{ 4 * threads }}u) {
        let columns = vec4<u32>(v) + vec4<u32>(0u, 1u, 2u, 3u);
        let hit = select(vec4<f32>(), vec4<f32>(p.scale), columns == vec4<u32>(token));
        logits[(row_at + v) / 4u] = exp(logits_at(row_at, v) - vec4<f32>(peak)) * factor - hit;
    }
{%- endif %}
}
{%- else %}
@group(0) @binding(1) var<storage, read> losses: array<f32>;
@group(0) @binding(2) var<storage, read_write> sum_out: array<f32>;

@compute @workgroup_size({{ threads }})
fn loss_sum(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var row = thread; row < p.rows; row += {{ threads }}u) { sum += losses[row]; }
    let all = p.scale * group_sum(thread, sum);
    if (thread == 0u) {
        if (p.add != 0u) { sum_out[0] = sum_out[0] + all; } else { sum_out[0] = all; }
    }
}
{%- endif %}
