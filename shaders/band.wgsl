// The three products of a band, over its panels only.
//
//   band_expand    y[m, j] = sum over i in band(j) of x[m, i] P[j, i], then + bias[j] -> pre, gelu; or * gelu'(pre[m, j])
//   band_contract  y[m, i] = sum over j in band(i) of x[m, j] P[j, i] (+ bias[i])
//   band_outer     G[j, i] (+)= sum over m of wide[m, j] narrow[m, i] in the band, 0.0 in every other slot
//
// Shapes: narrow side [M, N], wide side [M, W], P and G packed by panels as the table says (see band.rs): a panel is 64
//   wide rows x a window of `cols` narrow columns. Windows start at and are as wide as multiples of 16, so P is always read
//   by vec4; the activations are where N and W are multiples of 4 (`vec`). Depths are not compared where N is a multiple of
//   16, or W or the shares of M are multiples of bk (`whole`).
// Dtypes: f32 products and sums; activations as stored, P and G f32.
// Grid: expand: (tile of bn wide rows: one panel or two, tile of bm rows); contract: (tile of bn narrow columns, tile of bm
//   rows); outer: (bm wide rows x bn columns of their windows, share of the rows). After the table comes a list of such
//   tiles: row, column, and the depth from start to end that the band joins to them. What the band does not touch has no
//   group, is not loaded, not multiplied.
// Determinism: each element is summed by one thread in a fixed order; shares of the rows are added up by reduce.wgsl.
// Caller: src/backend/wgpu/band.rs.
{% import "matrix.wgsl" as matrix %}
{%- include "common.wgsl" %}
{%- if entry == "band_expand" %}{% include "gelu.wgsl" %}{% endif %}

struct Params {
    first: u32,
    end: u32,
    width: u32,
    rows: u32,
    narrow: u32,
    wide: u32,
    panels: u32,
    // where the list of tiles starts in the table, and, of expand and contract, tiles of rows; of outer, tiles
    tiles_at: u32,
    tiles: u32,
    // outer: rows per share, elements from one share's result to the next
    share_depth: u32,
    share_stride: u32,
    add: u32,
}

struct Panel {
    row_start: u32,
    rows: u32,
    col_start: u32,
    cols: u32,
    offset: u32,
}

// A tile of the list.
struct Tile {
    row: u32,
    col: u32,
    start: u32,
    end: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> table: array<u32>;

fn panel_of(index: u32) -> Panel {
    let at = 8u + 5u * index;
    return Panel(table[at], table[at + 1u], table[at + 2u], table[at + 3u], table[at + 4u]);
}

fn tile_of(index: u32) -> Tile {
    let at = p.tiles_at + 4u * index;
    return Tile(table[at], table[at + 1u], table[at + 2u], table[at + 3u]);
}

// How many of the four elements from c lie before c_end, in a row that exists or not.
fn inside(exists: bool, c: u32, c_end: u32) -> u32 {
    return select(0u, c_end - c, exists && c < c_end);
}

{{ matrix.product_memory(tile) }}

{%- if entry == "band_outer" %}
@group(0) @binding(2) var<storage, read> wide: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(3) var<storage, read> narrow: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(4) var<storage, read_write> gradient: array<vec4<f32>>;
{#- Four elements of row m from column c. What is read for columns beyond the last makes sums that no one stores. -#}
{% macro activations(name, axis) %}
{{- matrix.loader(name, vec) }}
fn {{ name }}_of(m: u32, c: u32, m_end: u32) -> vec4<f32> {
{%- if not vec %}
    return load_{{ name }}(m * {{ axis }} + c, inside(m < m_end, c, {{ axis }}));
{%- else %}
{%- if not whole %}
    if (m >= m_end) { return vec4<f32>(); }
{%- endif %}
    return vec4<f32>({{ name }}[(m * {{ axis }} + min(c, {{ axis }} - 4u)) / 4u]);
{%- endif %}
}
{% endmacro %}
{{ activations("wide", "p.wide") }}
{{ activations("narrow", "p.narrow") }}
// Stores four sums of wide row j from narrow column i on; slots outside the exact band receive 0.0.
fn finish(j: u32, i: u32, share: u32, sums: vec4<f32>) {
    if (j >= p.wide) { return; }
    let panel = panel_of(j / 64u);
    // Wraps around, beyond every window, for a column before this one's.
    let col = i - panel.col_start;
    if (col >= panel.cols) { return; }
    let range_at = table[6] + 2u * j;
    let columns = vec4<u32>(i) + vec4<u32>(0u, 1u, 2u, 3u);
    let kept = (columns >= vec4<u32>(table[range_at])) & (columns < vec4<u32>(table[range_at + 1u]));
    let at = (share * p.share_stride + panel.offset + (j - panel.row_start) * panel.cols + col) / 4u;
    var value = sums;
    if (p.add != 0u) { value += gradient[at]; }
    gradient[at] = select(vec4<f32>(), value, kept);
}

@compute @workgroup_size({{ threads }})
fn band_outer(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
{{- matrix.place(bn // tn, bm // tm) }}
    let share = group / p.tiles;
    let area = tile_of(group % p.tiles);
    let m_start = share * p.share_depth;
    let m_end = min(p.rows, m_start + p.share_depth);
{{ matrix.accumulators("acc", tm, tn) }}
{%- set left = {"of": "wide_of", "by_depth": true, "first": "area.row", "context": ", m_end"} %}
{%- set right = {"of": "narrow_of", "by_depth": true, "first": "area.col", "context": ", m_end"} %}
{{- matrix.product("acc", tile, left, right, "m_start", "m_end") }}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(area.row + {{ matrix.row(i, bm, tm) }}, area.col + {{ matrix.col(j, bn, tn) }}, share, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
}

{%- else %}
{%- set x_axis, y_axis = ("p.narrow", "p.wide") if entry == "band_expand" else ("p.wide", "p.narrow") %}
@group(0) @binding(2) var<storage, read> x: array<{{ "vec4<Element>" if vec else "Element" }}>;
@group(0) @binding(3) var<storage, read> packed: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<{{ "vec4<Element>" if vec else "Element" }}>;
{%- if bias %}
@group(0) @binding(5) var<storage, read> bias: array<{{ "vec4<f32>" if vec else "f32" }}>;
{%- endif %}
{%- if gelu %}
@group(0) @binding(6) var<storage, read_write> pre: array<{{ "vec4<Element>" if vec else "Element" }}>;
{%- elif gelu_backward %}
@group(0) @binding(5) var<storage, read> pre: array<{{ "vec4<Element>" if vec else "Element" }}>;
{%- endif %}
{{ matrix.loader("x", vec) }}
{{- matrix.storer("y", vec, "Element") }}
{%- if bias %}{{ matrix.loader("bias", vec) }}{% endif %}
{%- if gelu %}{{ matrix.storer("pre", vec, "Element") }}{% endif %}
{%- if gelu_backward %}{{ matrix.loader("pre", vec) }}{% endif %}

// Four elements of row m of x from column c; what is read for rows beyond the last makes results that no one stores.
fn x_of(m: u32, c: u32) -> vec4<f32> {
{%- if vec and whole %}
    return vec4<f32>(x[(min(m, p.rows - 1u) * {{ x_axis }} + c) / 4u]);
{%- else %}
    return load_x(m * {{ x_axis }} + c, inside(m < p.rows, c, {{ x_axis }}));
{%- endif %}
}

{% if entry == "band_expand" -%}
// Four weights of the tile's row `row`, from narrow column k on.
fn weight_of(row: u32, k: u32, low: Panel{% if bn > 64 %}, high: Panel{% endif %}) -> vec4<f32> {
    var panel = low;
{%- if bn > 64 %}
    if (row >= 64u) { panel = high; }
    // Wraps around, beyond every window, for a column before this one's.
    if (k - panel.col_start >= panel.cols) { return vec4<f32>(); }
{%- endif %}
    let near = min(row % 64u, panel.rows - 1u);
    return packed[(panel.offset + near * panel.cols + k - panel.col_start) / 4u];
}
{%- else -%}
// Weights of wide row j, a row of `panel`, from narrow column i on.
fn weight_of(j: u32, i: u32, panel: Panel) -> vec4<f32> {
    let row = j - panel.row_start;
    // Wraps around, beyond every window, for a column before this one's.
    let col = i - panel.col_start;
    if (col >= panel.cols{% if not whole %} || row >= panel.rows{% endif %}) { return vec4<f32>(); }
    return packed[(panel.offset + row * panel.cols + col) / 4u];
}
{%- endif %}

// What happens to four sums of row m, column c, before they are stored.
fn finish(m: u32, c: u32, sums: vec4<f32>) {
    let valid = inside(m < p.rows, c, {{ y_axis }});
    let at = m * {{ y_axis }} + c;
    var value = sums;
{%- if bias %}
    value += load_bias(c, valid);
{%- endif %}
{%- if gelu %}
    store_pre(at, valid, value);
    value = gelu(value);
{%- elif gelu_backward %}
    value *= gelu_derivative(load_pre(at, valid));
{%- endif %}
    store_y(at, valid, value);
}

@compute @workgroup_size({{ threads }})
fn {{ entry }}(@builtin(workgroup_id) id: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let group = group_index(id);
    if (group >= p.end) { return; }
{{- matrix.place(bn // tn, bm // tm) }}
    let row0 = (group % p.tiles) * {{ bm }}u;
    let area = tile_of(group / p.tiles);
    let start = area.start;
    let end = area.end;
{{ matrix.accumulators("acc", tm, tn) }}
{%- set left = {"of": "x_of", "by_depth": false, "first": "row0", "context": ""} %}
{%- if entry == "band_expand" %}
    let low = panel_of(area.row / 64u);
{%- if bn > 64 %}
    let high = panel_of(min(area.row / 64u + 1u, p.panels - 1u));
{%- endif %}
{%- set panels = ", low, high" if bn > 64 else ", low" %}
{%- set right = {"of": "weight_of", "by_depth": false, "first": "0u", "context": panels} %}
{{- matrix.product("acc", tile, left, right, "start", "end") }}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(row0 + {{ matrix.row(i, bm, tm) }}, area.row + {{ matrix.col(j, bn, tn) }}, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
{%- else %}
{%- set right = {"of": "weight_of", "by_depth": true, "first": "area.col", "context": ", panel"} %}
{{- matrix.product("acc", tile, left, right, "start", "end", "let panel = panel_of(k / 64u);") }}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(row0 + {{ matrix.row(i, bm, tm) }}, area.col + {{ matrix.col(j, bn, tn) }}, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
{%- endif %}
}
{%- endif %}
