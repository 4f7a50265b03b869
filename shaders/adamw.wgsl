// The global gradient norm, and AdamW (Loshchilov & Hutter 2019) on the flat buffers with clipping by that norm.
//
//   norm_parts  per group: sum of squares of its share of the gradients
//   grad_norm   norm = sqrt(sum of the parts); one that is not finite stays
//   adamw_step  g' = g min(1, clip/norm); m = b1 m + (1-b1) g'; v = b2 v + (1-b2) g'^2;
//               p -= lr (m unbias1 / (sqrt(v unbias2) + eps) + decay p); nothing when the norm is not finite
//
// Shapes: params, m, v, grads: a part of the flat buffers, a multiple of 64 elements; parts [groups].
// Dtypes: f32.
// Grid: norm_parts one workgroup per 16 * 4 * threads elements; grad_norm one; adamw_step one thread per 4 elements.
// Determinism: trees of fixed shape; the update is element by element. Where p, m, v and g are 0, p stays exactly 0.
// Caller: src/backend/wgpu/adamw.rs.
{% include "common.wgsl" %}
struct Params {
    first: u32,
    end: u32,
    width: u32,
    // vec4s of this part, or parts to add up
    count: u32,
    part_at: u32,
    learning_rate: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    unbias1: f32,
    unbias2: f32,
    eps: f32,
    decay: f32,
    grad_clip: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
{%- if entry != "norm_parts" %}

// By its bits: a compiler of shaders may take it that no number is infinite.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}
{% endif %}
{%- if entry == "norm_parts" %}
@group(0) @binding(1) var<storage, read> grads: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> parts: array<f32>;

@compute @workgroup_size({{ threads }})
fn norm_parts(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
    var squares = vec4<f32>();
    for (var s = 0u; s < 16u; s += 1u) {
        let at = (group * 16u + s) * {{ threads }}u + thread;
        if (at < p.count) { squares = fma(grads[at], grads[at], squares); }
    }
    let sum = group_sum(thread, (squares.x + squares.y) + (squares.z + squares.w));
    if (thread == 0u) { parts[p.part_at + group] = sum; }
}
{%- elif entry == "grad_norm" %}
@group(0) @binding(1) var<storage, read> parts: array<f32>;
@group(0) @binding(2) var<storage, read_write> norm: array<f32>;

@compute @workgroup_size({{ threads }})
fn grad_norm(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    var sum = 0.0;
    for (var part = thread; part < p.count; part += {{ threads }}u) { sum += parts[part]; }
    let all = group_sum(thread, sum);
    if (thread == 0u && is_finite(norm[0])) { norm[0] = sqrt(all); }
}
{%- else %}
@group(0) @binding(1) var<storage, read_write> params: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> first_moments: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> second_moments: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> grads: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> norm: array<f32>;

@compute @workgroup_size({{ threads }})
fn adamw_step(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let at = group_index(id) * {{ threads }}u + thread;
    if (at >= p.count || !is_finite(norm[0])) { return; }
    var clip = 1.0;
    if (p.grad_clip > 0.0 && norm[0] > p.grad_clip) { clip = p.grad_clip / norm[0]; }
    let g = grads[at] * clip;
    let m = p.beta1 * first_moments[at] + p.one_minus_beta1 * g;
    let v = p.beta2 * second_moments[at] + p.one_minus_beta2 * g * g;
    first_moments[at] = m;
    second_moments[at] = v;
    let direction = m * p.unbias1 / (sqrt(v * p.unbias2) + vec4<f32>(p.eps));
    params[at] = params[at] - p.learning_rate * (direction + p.decay * params[at]);
}
{%- endif %}
