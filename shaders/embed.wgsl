// Token and position embeddings.
//
//   embed_forward    out[row] = wte[tokens[row]] + wpe[past + row % T], for the rows whose token lies in wte's bound part
//   embed_tokens     dwte[token] += sum of dout[row] over the rows that hold the token, one group per different token
//   embed_positions  dwpe[t] (+)= sum over b of dout[b, t]; 0 from T on when set
//
// Shapes: tokens [B*T]; out, dout [B*T, C]; wte part [tokens from `token_first`, C]; wpe [maxT, C]. `order` lists the rows
//   sorted by token (rows of one token in their order) and `runs` gives (token, first place in order) of each different
//   token, with an end mark: the host sorts when it uploads the tokens.
// Dtypes: f32 arithmetic, parameters and gradients; activations as stored.
// Grid: one workgroup per row, different token, or position; threads along the channels.
// Determinism: every sum is one thread's, over rows in order.
// Caller: src/backend/wgpu/embed.rs.
{% include "common.wgsl" %}
struct Params {
    first: u32,
    end: u32,
    width: u32,
    lanes: u32,
    tokens: u32,
    past: u32,
    batch: u32,
    token_first: u32,
    token_end: u32,
    run_first: u32,
    // the rows that are bound: the first, and how many
    row_first: u32,
    rows: u32,
    // where dout starts in its binding, in lanes
    dout_at: u32,
    add: u32,
}
{%- set parameter = "vec4<f32>" if vec else "f32" %}

@group(0) @binding(0) var<uniform> p: Params;
{%- if entry == "embed_forward" %}
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> wte: array<{{ parameter }}>;
@group(0) @binding(3) var<storage, read> wpe: array<{{ parameter }}>;
@group(0) @binding(4) var<storage, read_write> out: array<Stored>;

@compute @workgroup_size({{ threads }})
fn embed_forward(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let row = group_index(id);
    if (row >= p.end) { return; }
    let token = tokens[p.row_first + row];
    if (token < p.token_first || token >= p.token_end) { return; }
    let position = p.past + (p.row_first + row) % p.tokens;
    for (var c = thread; c < p.lanes; c += {{ threads }}u) {
        out[row * p.lanes + c] = Stored(wte[(token - p.token_first) * p.lanes + c] + wpe[position * p.lanes + c]);
    }
}
{%- elif entry == "embed_tokens" %}
@group(0) @binding(1) var<storage, read> order: array<u32>;
@group(0) @binding(2) var<storage, read> runs: array<u32>;
@group(0) @binding(3) var<storage, read> dout: array<Stored>;
@group(0) @binding(4) var<storage, read_write> dwte: array<Lane>;

@compute @workgroup_size({{ threads }})
fn embed_tokens(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
    let run = 2u * (p.run_first + group);
    let row_at = (runs[run] - p.token_first) * p.lanes;
    let place_end = runs[run + 3u];
    for (var c = thread; c < p.lanes; c += {{ threads }}u) {
        var sum = dwte[row_at + c];
        for (var place = runs[run + 1u]; place < place_end; place += 1u) {
            // Wraps around, beyond all rows, for a row before the bound ones.
            let row = order[place] - p.row_first;
            if (row < p.rows) { sum += Lane(dout[row * p.lanes + c]); }
        }
        dwte[row_at + c] = sum;
    }
}
{%- else %}
@group(0) @binding(1) var<storage, read> dout: array<Stored>;
@group(0) @binding(2) var<storage, read_write> dwpe: array<Lane>;

@compute @workgroup_size({{ threads }})
fn embed_positions(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let position = group_index(id);
    if (position >= p.end) { return; }
    for (var c = thread; c < p.lanes; c += {{ threads }}u) {
        var sum = Lane();
        if (p.add != 0u) { sum = dwpe[position * p.lanes + c]; }
        if (position < p.tokens) {
            for (var b = 0u; b < p.batch; b += 1u) {
                sum += Lane(dout[p.dout_at + (b * p.tokens + position) * p.lanes + c]);
            }
        }
        dwpe[position * p.lanes + c] = sum;
    }
}
{%- endif %}
