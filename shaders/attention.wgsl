// Causal multi-head attention without a matrix of T x T: softmax on the way, its log-sum-exp kept for the way back
// (Dao et al. 2022, "FlashAttention").
//
//   attention_forward          S = scale Q K^T where key <= query; out = softmax(S) V; lse = log sum exp S
//   attention_append           copies new keys and values into a cache
//   attention_delta            delta[query] = sum over the head of dout * out
//   attention_backward_query   P = exp(S - lse); dS = P * (dout V^T - delta) * scale; dQ = dS K
//   attention_backward_key     the same P and dS, transposed: dV = P^T dout; dK = dS^T Q
//
// Shapes: qkv and dqkv [B, T, 3C], out and dout [B, T, C], lse and delta [B, NH, T]; with `cached`, keys and values
//   [B, capacity, C] of which `past` tokens precede the queries. Any T; HS = `head_size` up to 128, padded to `dim`, a
//   multiple of 32, with zeros. All head sizes and strides multiples of 4: loads by vec4 (`vec`).
// Dtypes: f32 arithmetic; activations as stored; lse and delta f32.
// Grid: one workgroup per (sequence, head, block of 64 queries; or of 64 keys for the key gradients). It walks over tiles
//   of `span` of the other axis, skipping those that causality hides. Each of its 64/tm * span/tn threads holds tm x tn
//   scores and tm x (dim tn / span) results; rows come in fours, `quad` being a four's number. Where there is workgroup
//   memory for the block's rows as a whole they are `held` there, else they come again for every tile, 16 elements of the
//   head at a time, within 16 KiB.
// Determinism: one thread sums each element in order; dQ is computed apart from dK and dV, so nothing is added atomically.
// Caller: src/backend/wgpu/attention.rs.
{% import "matrix.wgsl" as matrix %}
{%- include "common.wgsl" %}

struct Params {
    first: u32,
    end: u32,
    width: u32,
    batch: u32,
    tokens: u32,
    channels: u32,
    heads: u32,
    past: u32,
    // keys per sequence, and elements from one key to the next and from one sequence's keys to the next
    keys: u32,
    key_stride: u32,
    key_batch_stride: u32,
    // where the first sequence starts in each binding
    qkv_at: u32,
    out_at: u32,
    lse_at: u32,
    dqkv_at: u32,
    dout_at: u32,
    cache_at: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
{%- set stored = "vec4<Element>" if vec else "Element" %}
{%- set across = span // tn %}
{%- set quads = tm // 4 %}
{%- set lanes4 = ["x", "y", "z", "w"] %}
{%- if entry == "attention_append" %}
@group(0) @binding(1) var<storage, read> qkv: array<{{ stored }}>;
@group(0) @binding(2) var<storage, read_write> keys: array<{{ stored }}>;
@group(0) @binding(3) var<storage, read_write> values: array<{{ stored }}>;

// One thread per element (or vec4) of [B, T, C].
@compute @workgroup_size({{ threads }})
fn attention_append(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let c = p.channels / {{ 4 if vec else 1 }}u;
    let index = group_index(id) * {{ threads }}u + thread;
    if (index >= p.batch * p.tokens * c) { return; }
    let row = index / c;
    let source = p.qkv_at / {{ 4 if vec else 1 }}u + row * 3u * c + index % c;
    let token = p.past + row % p.tokens;
    let into = (p.cache_at + (row / p.tokens) * p.key_batch_stride + token * p.key_stride) / {{ 4 if vec else 1 }}u + index % c;
    keys[into] = qkv[source + c];
    values[into] = qkv[source + 2u * c];
}
{%- elif entry == "attention_delta" %}
@group(0) @binding(1) var<storage, read> out: array<{{ stored }}>;
@group(0) @binding(2) var<storage, read> dout: array<{{ stored }}>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;
{{ matrix.loader("out", vec) }}
{{- matrix.loader("dout", vec) }}
// One thread per (row, head).
@compute @workgroup_size({{ threads }})
fn attention_delta(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let index = group_index(id) * {{ threads }}u + thread;
    if (index >= p.batch * p.tokens * p.heads) { return; }
    let row = index / p.heads;
    let head = index % p.heads;
    let at = row * p.channels + head * {{ head_size }}u;
    var sums = vec4<f32>();
    for (var d = 0u; d < {{ head_size }}u; d += 4u) {
        let valid = min(4u, {{ head_size }}u - d);
        sums = fma(load_out(p.out_at + at + d, valid), load_dout(p.dout_at + at + d, valid), sums);
    }
    delta[p.lse_at + ((row / p.tokens) * p.heads + head) * p.tokens + row % p.tokens] = (sums.x + sums.y) + (sums.z + sums.w);
}
{%- else %}
@group(0) @binding(1) var<storage, read> qkv: array<{{ stored }}>;
{%- if cached %}
@group(0) @binding(2) var<storage, read> keys: array<{{ stored }}>;
@group(0) @binding(3) var<storage, read> values: array<{{ stored }}>;
@group(0) @binding(4) var<storage, read_write> out: array<{{ stored }}>;
{%- elif entry == "attention_forward" %}
@group(0) @binding(2) var<storage, read_write> out: array<{{ stored }}>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;
{%- else %}
@group(0) @binding(2) var<storage, read> dout: array<{{ stored }}>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read_write> dqkv: array<{{ stored }}>;
{%- endif %}

const BLOCK: u32 = 64u;
const TILE: u32 = {{ span }}u;

{%- set depth = dim if held else 16 %}
// Operands of a product by depth: the block's, and the tile's (or the tile's rows of `dim` elements).
var<workgroup> block_part: array<vec4<f32>, {{ [1, held] | max * 16 * depth }}>;
var<workgroup> tile_part: array<vec4<f32>, {{ [span * depth, spread * dim] | max // 4 }}>;
// P or dS: [`span` of the tile][64 of the block].
var<workgroup> weights: array<vec4<f32>, {{ 16 * span }}>;
{{ matrix.loader("qkv", vec) }}
{%- if cached %}{{ matrix.loader("keys", vec) }}{{ matrix.loader("values", vec) }}{% endif %}
{%- if entry == "attention_forward" %}{{ matrix.storer("out", vec, "Element") }}
{%- else %}{{ matrix.loader("dout", vec) }}{{ matrix.storer("dqkv", vec, "Element") }}{% endif %}

// A sequence and a head.
struct Pair {
    batch: u32,
    head: u32,
}

// How many of four elements from d of row `index` exist.
fn inside(index: u32, count: u32, d: u32) -> u32 {
    return select(0u, min(4u, {{ head_size }}u - d), index < count && d < {{ head_size }}u);
}

// Where element d of a token's queries (part 0), keys (1) or values (2) stands in qkv.
fn qkv_at(pair: Pair, part: u32, token: u32, d: u32) -> u32 {
    let row = pair.batch * p.tokens + token;
    return row * 3u * p.channels + part * p.channels + pair.head * {{ head_size }}u + d;
}

fn out_at(pair: Pair, token: u32, d: u32) -> u32 {
    return (pair.batch * p.tokens + token) * p.channels + pair.head * {{ head_size }}u + d;
}

fn query_of(token: u32, d: u32, pair: Pair) -> vec4<f32> {
    return load_qkv(p.qkv_at + qkv_at(pair, 0u, token, d), inside(token, p.tokens, d));
}
{% if cached %}
fn cache_at(pair: Pair, token: u32, d: u32) -> u32 {
    return p.cache_at + pair.batch * p.key_batch_stride + token * p.key_stride + pair.head * {{ head_size }}u + d;
}

fn key_of(token: u32, d: u32, pair: Pair) -> vec4<f32> {
    return load_keys(cache_at(pair, token, d), inside(token, p.keys, d));
}

fn value_of(token: u32, d: u32, pair: Pair) -> vec4<f32> {
    return load_values(cache_at(pair, token, d), inside(token, p.keys, d));
}
{%- else %}
fn key_of(token: u32, d: u32, pair: Pair) -> vec4<f32> {
    return load_qkv(p.qkv_at + qkv_at(pair, 1u, token, d), inside(token, p.keys, d));
}

fn value_of(token: u32, d: u32, pair: Pair) -> vec4<f32> {
    return load_qkv(p.qkv_at + qkv_at(pair, 2u, token, d), inside(token, p.keys, d));
}
{%- endif %}
{%- if entry != "attention_forward" %}

fn dout_of(token: u32, d: u32, pair: Pair) -> vec4<f32> {
    return load_dout(p.dout_at + out_at(pair, token, d), inside(token, p.tokens, d));
}

// lse or delta of four tokens from `token`; those that do not exist get the last one's.
fn statistics_at(pair: Pair, token: u32) -> vec4<u32> {
    let at = p.lse_at + (pair.batch * p.heads + pair.head) * p.tokens;
    return vec4<u32>(at) + min(vec4<u32>(token) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.tokens - 1u));
}
{%- endif %}

{#- the number of a thread's q-th four of block rows, and the first row or column of a four -#}
{% macro quad(q) %}(ty + {{ q * (64 // tm) }}u){% endmacro %}
{%- set fours = "vec4<u32>(0u, 1u, 2u, 3u)" %}
{#- the block's operands, each at its place -#}
{% macro hold(first, second) %}
{%- if held %}
{%- for of in [first, second][:held] %}
{{- matrix.stage("block_part", loop.index0 * 16 * dim ~ "u", false, 64, dim, threads, of, "block0", "0u", ", pair") }}
{%- endfor %}
{%- endif %}
{% endmacro %}
{#- acc[block row, tile column] += the product of two operands over the head's elements; the block's is the `which`-th -#}
{% macro scores(acc, which, block_of, tile_of) %}
    for (var d0 = 0u; d0 < {{ dim }}u; d0 += {{ depth }}u) {
{%- if not held %}
{{- matrix.stage("block_part", "0u", false, 64, depth, threads, block_of, "block0", "d0", ", pair") }}
{%- endif %}
{{- matrix.stage("tile_part", "0u", false, span, depth, threads, tile_of, "tile0", "d0", ", pair") }}
    workgroupBarrier();
{%- set at = which * 16 * dim if held else 0 %}
{{- matrix.multiply(acc, "block_part", at ~ "u", "tile_part", "0u", 64, span, depth, tm, tn, unroll, span, subgroup) }}
    workgroupBarrier();
    }
{% endmacro %}
{#- acc[block row, d] += the weights' product with the tile's rows, `spread` rows at a time -#}
{% macro spread_over(acc, tile_of) %}
    for (var t0 = 0u; t0 < TILE; t0 += {{ spread }}u) {
{{- matrix.stage("tile_part", "0u", true, dim, spread, threads, tile_of, "0u", "tile0 + t0", ", pair") }}
    workgroupBarrier();
{{- matrix.multiply(acc, "weights", "t0 * 16u", "tile_part", "0u", 64, dim, spread, tm, dim // across, unroll, dim, subgroup) }}
    workgroupBarrier();
    }
{% endmacro %}
{#- the thread's scores go to `weights`, transposed -#}
{% macro keep(acc) %}
{%- for q in range(quads) %}{% for j in range(tn // 4) %}{% for lane in lanes4 %}
    weights[({{ matrix.col(j, span, tn) }} + {{ loop.index0 }}u) * 16u + {{ quad(q) }}] = vec4<f32>(
{%- for i in range(4 * q, 4 * q + 4) %}{{ acc }}{{ i }}_{{ j }}.{{ lane }}, {% endfor %});
{%- endfor %}{% endfor %}{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ threads }})
fn {{ entry }}(@builtin(workgroup_id) id: vec3<u32>, {{ matrix.invocation(subgroup) }}) {
    let group = group_index(id);
    if (group >= p.end) { return; }
{{- matrix.place(span, 64 // tm, tn, span, subgroup) }}
    let pairs = p.batch * p.heads;
    let pair = Pair((group % pairs) / p.heads, group % p.heads);
    let blocks = (p.tokens + BLOCK - 1u) / BLOCK;
{%- if entry == "attention_backward_key" %}
    // The first keys are seen by all queries: the longest work starts first.
    let block0 = (group / pairs) * BLOCK;
{{- hold("key_of", "value_of") }}
{{- matrix.accumulators("dk", tm, dim // across) }}
{{- matrix.accumulators("dv", tm, dim // across) }}
    for (var tile0 = block0 / TILE * TILE; tile0 < p.tokens; tile0 += TILE) {
{{- matrix.accumulators("s", tm, tn) }}
{{- matrix.accumulators("g", tm, tn) }}
{{- scores("s", 0, "key_of", "query_of") }}
{{- scores("g", 1, "value_of", "dout_of") }}
{%- for j in range(tn // 4) %}
        {
            let first_query = tile0 + {{ matrix.col(j, span, tn) }};
            let queries = vec4<u32>(first_query) + {{ fours }};
            let at = statistics_at(pair, first_query);
            let sums = vec4<f32>(lse[at.x], lse[at.y], lse[at.z], lse[at.w]);
            let deltas = vec4<f32>(delta[at.x], delta[at.y], delta[at.z], delta[at.w]);
{%- for i in range(tm) %}
            let seen{{ i }} = (vec4<u32>(block0 + {{ matrix.row(i, 64, tm) }}) <= queries) & (queries < vec4<u32>(p.tokens));
            s{{ i }}_{{ j }} = select(vec4<f32>(), exp(s{{ i }}_{{ j }} * p.scale - sums), seen{{ i }});
            g{{ i }}_{{ j }} = s{{ i }}_{{ j }} * (g{{ i }}_{{ j }} - deltas) * p.scale;
{%- endfor %}
        }
{%- endfor %}
{{- keep("s") }}
        workgroupBarrier();
{{- spread_over("dv", "dout_of") }}
{{- keep("g") }}
        workgroupBarrier();
{{- spread_over("dk", "query_of") }}
    }
{%- for i in range(tm) %}{% for j in range(dim // across // 4) %}
    {
        let key = block0 + {{ matrix.row(i, 64, tm) }};
        let d = {{ matrix.col(j, dim, dim // across) }};
        let valid = inside(key, p.tokens, d);
        store_dqkv(p.dqkv_at + qkv_at(pair, 1u, key, d), valid, dk{{ i }}_{{ j }});
        store_dqkv(p.dqkv_at + qkv_at(pair, 2u, key, d), valid, dv{{ i }}_{{ j }});
    }
{%- endfor %}{% endfor %}
{%- else %}
    // The last queries see all keys: the longest work starts first.
    let block0 = (blocks - 1u - group / pairs) * BLOCK;
    let key_end = min(p.keys, p.past + block0 + BLOCK);
{{- hold("query_of", "dout_of") }}
{{- matrix.accumulators("o", tm, dim // across) }}
{%- for q in range(quads) %}
{%- if entry == "attention_forward" %}
    // Of four queries: the largest score so far, and this thread's share of the sum of exponentials.
    var largest{{ q }} = vec4<f32>(HIDDEN);
    var sums{{ q }} = vec4<f32>();
{%- else %}
    let at{{ q }} = statistics_at(pair, block0 + {{ quad(q) }} * 4u);
    let sums{{ q }} = vec4<f32>(lse[at{{ q }}.x], lse[at{{ q }}.y], lse[at{{ q }}.z], lse[at{{ q }}.w]);
    let deltas{{ q }} = vec4<f32>(delta[at{{ q }}.x], delta[at{{ q }}.y], delta[at{{ q }}.z], delta[at{{ q }}.w]);
{%- endif %}
{%- endfor %}
    for (var tile0 = 0u; tile0 < key_end; tile0 += TILE) {
{{- matrix.accumulators("s", tm, tn) }}
{{- scores("s", 0, "query_of", "key_of") }}
{%- for j in range(tn // 4) %}
        let keys{{ j }} = vec4<u32>(tile0 + {{ matrix.col(j, span, tn) }}) + {{ fours }};
{%- endfor %}
{%- if entry == "attention_forward" %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
        s{{ i }}_{{ j }} = select(
            vec4<f32>(HIDDEN),
            s{{ i }}_{{ j }} * p.scale,
            keys{{ j }} <= vec4<u32>(p.past + block0 + {{ matrix.row(i, 64, tm) }}),
        );
{%- endfor %}
        var peak{{ i }} = s{{ i }}_0;
{%- for j in range(1, tn // 4) %}
        peak{{ i }} = max(peak{{ i }}, s{{ i }}_{{ j }});
{%- endfor %}
{%- endfor %}
{%- for q in range(quads) %}
        var peaks{{ q }} = vec4<f32>(
{%- for i in range(4 * q, 4 * q + 4) %}
            max(max(peak{{ i }}.x, peak{{ i }}.y), max(peak{{ i }}.z, peak{{ i }}.w)),
{%- endfor %}
        );
        tile_part[tx * 16u + {{ quad(q) }}] = peaks{{ q }};
{%- endfor %}
        workgroupBarrier();
{%- for q in range(quads) %}
        for (var t = 0u; t < {{ across }}u; t += 1u) { peaks{{ q }} = max(peaks{{ q }}, tile_part[t * 16u + {{ quad(q) }}]); }
        let raised{{ q }} = max(largest{{ q }}, peaks{{ q }});
        let fade{{ q }} = exp(largest{{ q }} - raised{{ q }});
        largest{{ q }} = raised{{ q }};
        sums{{ q }} *= fade{{ q }};
{%- for lane in lanes4 %}{% set i = 4 * q + loop.index0 %}
{%- for j in range(tn // 4) %}
        s{{ i }}_{{ j }} = exp(s{{ i }}_{{ j }} - raised{{ q }}.{{ lane }});
        sums{{ q }}.{{ lane }} += (s{{ i }}_{{ j }}.x + s{{ i }}_{{ j }}.y) + (s{{ i }}_{{ j }}.z + s{{ i }}_{{ j }}.w);
{%- endfor %}
{%- for j in range(dim // across // 4) %}
        o{{ i }}_{{ j }} *= fade{{ q }}.{{ lane }};
{%- endfor %}
{%- endfor %}
{%- endfor %}
{{- keep("s") }}
        workgroupBarrier();
{{- spread_over("o", "value_of") }}
{%- else %}
{{- matrix.accumulators("g", tm, tn) }}
{{- scores("g", 1, "dout_of", "value_of") }}
{%- for i in range(tm) %}{% set q = i // 4 %}{% set lane = lanes4[i % 4] %}{% for j in range(tn // 4) %}
        s{{ i }}_{{ j }} = select(
            vec4<f32>(),
            exp(s{{ i }}_{{ j }} * p.scale - sums{{ q }}.{{ lane }}),
            keys{{ j }} <= vec4<u32>(p.past + block0 + {{ matrix.row(i, 64, tm) }}),
        );
        g{{ i }}_{{ j }} = s{{ i }}_{{ j }} * (g{{ i }}_{{ j }} - deltas{{ q }}.{{ lane }}) * p.scale;
{%- endfor %}{% endfor %}
{{- keep("g") }}
        workgroupBarrier();
{{- spread_over("o", "key_of") }}
{%- endif %}
    }
{%- if entry == "attention_forward" %}
{%- for q in range(quads) %}
    tile_part[tx * 16u + {{ quad(q) }}] = sums{{ q }};
{%- endfor %}
    workgroupBarrier();
{%- for q in range(quads) %}
    var sum{{ q }} = vec4<f32>();
    for (var t = 0u; t < {{ across }}u; t += 1u) { sum{{ q }} += tile_part[t * 16u + {{ quad(q) }}]; }
{%- endfor %}
{%- endif %}
{%- for i in range(tm) %}{% for j in range(dim // across // 4) %}
    {
        let query = block0 + {{ matrix.row(i, 64, tm) }};
        let d = {{ matrix.col(j, dim, dim // across) }};
        let valid = inside(query, p.tokens, d);
{%- if entry == "attention_forward" %}
        store_out(p.out_at + out_at(pair, query, d), valid, o{{ i }}_{{ j }} / sum{{ i // 4 }}.{{ lanes4[i % 4] }});
{%- else %}
        store_dqkv(p.dqkv_at + qkv_at(pair, 0u, query, d), valid, o{{ i }}_{{ j }});
{%- endif %}
    }
{%- endfor %}{% endfor %}
{%- if entry == "attention_forward" and not cached %}
    if (tx == 0u) {
        let at = p.lse_at + (pair.batch * p.heads + pair.head) * p.tokens;
{%- for q in range(quads) %}
        let kept{{ q }} = largest{{ q }} + log(sum{{ q }});
{%- endfor %}
{%- for i in range(tm) %}
        if (block0 + {{ matrix.row(i, 64, tm) }} < p.tokens) {
            lse[at + block0 + {{ matrix.row(i, 64, tm) }}] = kept{{ i // 4 }}.{{ lanes4[i % 4] }};
        }
{%- endfor %}
    }
{%- endif %}
{%- endif %}
}
{%- endif %}
