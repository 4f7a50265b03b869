// The three products of a band, over its panels only.
//
//   band_expand    y[m, j] = sum over i in band(j) of x[m, i] P[j, i], then + bias[j] -> pre, gelu; or * gelu'(pre[m, j])
//   band_contract  y[m, i] = sum over j in band(i) of x[m, j] P[j, i] (+ bias[i])
//   band_outer     G[j, i] (+)= sum over m of wide[m, j] narrow[m, i] in the band, 0.0 in every other slot
//
// Shapes: narrow side [M, N], wide side [M, W], P and G packed by panels as the table says (see band.rs): a panel is 64
//   wide rows x a window of `cols` narrow columns. Windows start at and are as wide as multiples of 16, so P is always read
//   by vec4; the activations are where N and W are multiples of 4 (`vec`). Where M is too, and the depth's side a multiple
//   of 16 (of bk for outer), operands are walked through instead of being looked up (`whole`).
// Dtypes: f32 products and sums; activations as stored, P and G f32.
// Grid: expand: (tile of bn wide rows: one panel or two, tile of bm rows); contract: (tile of bn narrow columns, tile of bm
//   rows); outer: groups among which the rows of all tiles (bm wide rows x bn columns of their windows) are dealt out.
//   After the table comes a list of such tiles: row, column, and the depth from start to end that the band joins to them
//   and to each `slice` of their columns. What the band does not touch has no group and is not loaded, and threads whose
//   slice it does not touch do not multiply. Of outer a tile's start and end are the columns of the narrow side that it sums
//   up for a bias gradient (`sum_narrow`), so that each column is one tile's; of its wide rows (`sum_wide`) the first tile does.
//   Where blocks stand in the band's place (`blocks`: 128 wide rows x 64 columns, two panels each), several panels have the same
//   rows: of expand start and end are the blocks of the tile's rows, of contract where in the table the blocks of its columns are
//   listed, and each of them is a depth of its own; outer's tiles have the first panel of their rows behind start and end.
// Determinism: each element is summed by one thread in a fixed order; parts of tiles are added up by reduce.wgsl.
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
    // where the list of tiles starts in the table
    tiles_at: u32,
    // of rows; of outer, all
    tiles: u32,
    // outer: steps of bk in a tile and for a group, parts of a tile at most, elements from one to the next
    tile_steps: u32,
    group_steps: u32,
    shares: u32,
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
    // and where its slices follow
    slices: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> table: array<u32>;

fn panel_of(index: u32) -> Panel {
    let at = 8u + 5u * index;
    return Panel(table[at], table[at + 1u], table[at + 2u], table[at + 3u], table[at + 4u]);
}

{%- set words = 5 if entry == "band_outer" and blocks else 4 %}
fn tile_at(index: u32) -> u32 {
    return p.tiles_at + {{ words + 2 * (bn // slice) }}u * index;
}

fn tile_of(index: u32) -> Tile {
    let at = tile_at(index);
    return Tile(table[at], table[at + 1u], table[at + 2u], table[at + 3u], at + {{ words }}u);
}

// From where to where the band joins a depth to slice `index` of a tile.
fn slice_of(area: Tile, index: u32) -> vec2<u32> {
    let at = area.slices + 2u * index;
    return vec2<u32>(table[at], table[at + 1u]);
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
{%- set summed = "wide" if sum_wide else "narrow" if sum_narrow else "" %}
{%- if summed %}
// Per part of the rows, as many as `gradient` has: the sums of an operand's columns, whose number is rounded up to fours.
@group(0) @binding(5) var<storage, read_write> column_sums: array<vec4<f32>>;
{%- endif %}
{#- Four elements of row m from column c. What is read for columns beyond the last makes sums that no one stores. -#}
{% macro activations(name, axis) %}
{%- if whole %}
// The vec4 at row m, column c.
fn {{ name }}_start(m: u32, c: u32) -> u32 {
    return (m * {{ axis }} + min(c, {{ axis }} - 4u)) / 4u;
}
{%- else %}
{{- matrix.loader(name, vec) }}
fn {{ name }}_of(m: u32, c: u32, m_end: u32) -> vec4<f32> {
    return load_{{ name }}(m * {{ axis }} + c, inside(m < m_end, c, {{ axis }}));
}
{%- endif %}
{% endmacro %}
{{ activations("wide", "p.wide") }}
{{ activations("narrow", "p.narrow") }}
// Stores four sums of wide row j, a row of panel `index`, from narrow column i on; slots outside the exact band receive 0.0.
fn finish(j: u32, i: u32, index: u32, share: u32, sums: vec4<f32>) {
    if (j >= p.wide) { return; }
    let panel = panel_of(index);
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

{%- if summed %}
// Stores the sums of four columns, those numbered `four` from `first` on, if they lie between `start` and `end`.
fn keep_total(first: u32, start: u32, end: u32, four: u32, share: u32, total: vec4<f32>) {
    let c = first + four * 4u;
    if (c < start || c >= end) { return; }
    column_sums[share * ((p.{{ summed }} + 3u) / 4u) + c / 4u] = total;
}
{%- endif %}

{%- set left = {"by_depth": true, "of": "wide_of", "first": "area.row", "context": ", end"} %}
{%- set right = {"by_depth": true, "of": "narrow_of", "first": "area.col", "context": ", end"} %}
{%- if whole %}
{%- set left = {"by_depth": true, "walk": {"name": "wide", "start": "wide_start(k + kb * 4u, area.row + rb * 4u)", "stride": "(p.wide / 4u)"}} %}
{%- set right = {"by_depth": true, "walk": {"name": "narrow", "start": "narrow_start(k + kb * 4u, area.col + rb * 4u)", "stride": "(p.narrow / 4u)"}} %}
{%- endif %}
{%- if sum_wide %}
{%- set left = dict(left, total="summing") %}
{%- elif sum_narrow %}
{%- set right = dict(right, total="summing") %}
{%- endif %}
@compute @workgroup_size({{ threads }})
fn band_outer(@builtin(workgroup_id) id: vec3<u32>, {{ matrix.invocation(subgroup) }}) {
    let group = group_index(id);
    if (group >= p.end) { return; }
{{- matrix.place(bn, bm // tm, tn, slice, subgroup) }}
{%- call matrix.dealt(even, bk, "p.rows") %}
    let area = tile_of(tile);
{%- if slice < bn %}
    let own = slice_of(area, slice);
{%- endif %}
{%- if sum_wide %}
    // The first of its rows' tiles sums them up.
    let summing = tile == 0u || tile_of(max(tile, 1u) - 1u).row != area.row;
{%- elif sum_narrow %}
    let summing = area.start < area.end;
{%- endif %}
{%- if summed %}
{{- matrix.totals(tile) }}
{%- endif %}
{{ matrix.accumulators("acc", tm, tn) }}
{{- matrix.product("acc", tile, left, right, "start", "end", when="own.x < own.y" if slice < bn else "") }}
    for (var part = share; part < shares; part += 1u) {
{%- if blocks %}
    let panel = table[tile_at(tile) + 4u];
{%- else %}
    // (Without a word of its own: one more value kept during the product makes outer 1.6 times as slow on large cards.)
    let panel = area.row / 64u;
{%- endif %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    finish(area.row + {{ matrix.row(i, bm, tm) }}, area.col + {{ matrix.col(j, slice, tn) }}, panel + ({{ matrix.row(i, bm, tm) }}) / 64u, part, acc{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
{{- matrix.clear("acc", tm, tn) }}
{%- if summed %}
        if (summing) {
{%- call matrix.add_totals(tile, bm if sum_wide else bn, 0 if sum_wide else bm * bk // 16) %}
            keep_total({% if sum_wide %}area.row, 0u, p.wide{% else %}area.col, area.start, min(area.end, p.narrow){% endif %}, four, part, total);
{%- endcall %}
        }
{%- endif %}
    }
{%- endcall %}
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
{%- if bias and not vec %}{{ matrix.loader("bias", vec) }}{% endif %}
{%- if gelu %}{{ matrix.storer("pre", vec, "Element") }}{% endif %}
{%- if gelu_backward and not vec %}{{ matrix.loader("pre", vec) }}{% endif %}

{% if whole -%}
// The vec4 of x at row m, column c; what is read for rows beyond the last makes results that no one stores.
fn x_start(m: u32, c: u32) -> u32 {
    return (min(m, p.rows - 4u) * {{ x_axis }} + c) / 4u;
}
{%- else -%}
// Four elements of row m of x from column c.
fn x_of(m: u32, c: u32) -> vec4<f32> {
    return load_x(m * {{ x_axis }} + c, inside(m < p.rows, c, {{ x_axis }}));
}
{%- endif %}

// The vec4 at row `row` of a panel, column i; wraps around for a column before its window.
fn packed_start(panel: Panel, row: u32, i: u32) -> u32 {
    return panel.offset / 4u + row * (panel.cols / 4u) + i / 4u - panel.col_start / 4u;
}

{% if entry == "band_expand" -%}
{%- if bn > 64 %}
// The tile's panel that its row `row` is in, unless that one is empty.
fn panel_at(row: u32, low: Panel, high: Panel) -> Panel {
    if (row < 64u || high.{{ "rows" if blocks else "cols" }} == 0u) { return low; }
    return high;
}
{%- endif %}
{%- if not whole or slice != 64 %}
// Four weights of the tile's row `row`, from narrow column k on.
fn weight_of(row: u32, k: u32, panel: Panel) -> vec4<f32> {
    if (k - panel.col_start >= panel.cols) { return vec4<f32>(); }
    return packed[packed_start(panel, min(row % 64u, panel.rows - 1u), k)];
}
{%- endif %}
{%- elif not whole -%}
// Weights of wide row j, a row of `panel`, from narrow column i on.
fn weight_of(j: u32, i: u32, panel: Panel) -> vec4<f32> {
    let row = j - panel.row_start;
    if (i - panel.col_start >= panel.cols || row >= panel.rows) { return vec4<f32>(); }
    return packed[packed_start(panel, row, i)];
}
{%- endif %}

{% if bias -%}
// The bias of four columns from c on. By vec4s it is read, like what x GELU' is of, whether it will be used or not, from the
// nearest place there is: loads that hang on no condition are on their way together.
fn bias_of(c: u32) -> vec4<f32> {
{%- if vec %}
    return bias[min(c, {{ y_axis }} - 4u) / 4u];
{%- else %}
    return load_bias(c, inside(true, c, {{ y_axis }}));
{%- endif %}
}
{%- endif %}
{%- if gelu_backward -%}
// Four values before the GELU, of row m from column c on.
fn pre_of(m: u32, c: u32) -> vec4<f32> {
{%- if vec %}
    return vec4<f32>(pre[(min(m, p.rows - 1u) * {{ y_axis }} + min(c, {{ y_axis }} - 4u)) / 4u]);
{%- else %}
    return load_pre(m * {{ y_axis }} + c, inside(m < p.rows, c, {{ y_axis }}));
{%- endif %}
}
{%- endif %}

// What happens to four sums of row m, column c, before they are stored; `more` is their bias, or what x GELU' is of.
fn finish(m: u32, c: u32, sums: vec4<f32>{% if bias or gelu_backward %}, more: vec4<f32>{% endif %}) {
    let valid = inside(m < p.rows, c, {{ y_axis }});
    let at = m * {{ y_axis }} + c;
    var value = sums;
{%- if bias %}
    value += more;
{%- endif %}
{%- if gelu %}
    store_pre(at, valid, value);
    value = gelu(value);
{%- elif gelu_backward %}
    value *= gelu_derivative(more);
{%- endif %}
    store_y(at, valid, value);
}

{%- set left = {"by_depth": false, "of": "x_of", "first": "row0", "context": ""} %}
{%- if whole %}
{%- set left = {"by_depth": false, "walk": {"name": "x", "start": "x_start(row0 + rb * 4u, k + kb * 4u)", "stride": "(" ~ x_axis ~ " / 4u)"}} %}
{%- endif %}
{#- A block's panel is its own to know: of expand that of its rows, of contract that of the depth. Beside its window lies
another row or panel, which a slice of expand that is one panel does not multiply: others do not walk. -#}
{%- set sliced = slice < bn %}
{%- if entry == "band_expand" %}
{%- set panel = "panel_at(rb * 4u, low, high)" if bn > 64 else "low" %}
{%- set right = {"by_depth": false, "of": "weight_of", "first": "0u", "context": ", " ~ panel} %}
{%- if whole and slice == 64 %}
{%- set right = {"by_depth": false, "walk": {"name": "packed", "panel": panel,
    "start": "packed_start(panel, min(rb * 4u % 64u, panel.rows - 4u), k + kb * 4u)"}} %}
{%- endif %}
{%- else %}
{%- set panel = "panel_of(2u * block + k % 128u / 64u)" if blocks else "panel_of(k / 64u)" %}
{%- set right = {"by_depth": true, "of": "weight_of", "first": "area.col", "context": ", " ~ panel} %}
{%- if whole %}
{%- set right = {"by_depth": true, "walk": {"name": "packed", "panel": panel, "again": "k % 64u == 0u",
    "start": "packed_start(panel, k + kb * 4u - panel.row_start, area.col + rb * 4u)",
    "exists": "area.col + rb * 4u - panel.col_start < panel.cols"}} %}
{%- endif %}
{%- endif %}
@compute @workgroup_size({{ threads }})
fn {{ entry }}(@builtin(workgroup_id) id: vec3<u32>, {{ matrix.invocation(subgroup) }}) {
    let group = group_index(id);
    if (group >= p.end) { return; }
{{- matrix.place(bn, bm // tm, tn, slice, subgroup) }}
    let row0 = (group % p.tiles) * {{ bm }}u;
    let area = tile_of(group / p.tiles);
{%- if sliced %}
    let own = slice_of(area, slice);
{%- endif %}
{%- if not blocks %}
    let start = area.start;
    let end = area.end;
{%- if entry == "band_expand" %}
    let low = panel_of(group / p.tiles * {{ bn // 64 }}u);
{%- if bn > 64 %}
    let high = panel_of(min(group / p.tiles * 2u + 1u, p.panels - 1u));
{%- endif %}
{%- endif %}
{%- endif %}
{{ matrix.accumulators("acc", tm, tn) }}
{%- if blocks %}
    for (var at = area.start; at < area.end; at += 1u) {
{%- if entry == "band_expand" %}
    let low = panel_of(2u * at{{ " + area.row % 128u / 64u" if bn == 64 }});
{%- if bn > 64 %}
    let high = panel_of(2u * at + 1u);
{%- endif %}
    let start = low.col_start;
    let end = start + low.cols;
{%- else %}
    let block = table[at];
    let start = panel_of(2u * block).row_start;
    let end = min(start + 128u, p.wide);
{%- endif %}
{%- endif %}
{{- matrix.product("acc", tile, left, right, "start", "end", when="own.x < k && k < own.y + " ~ bk ~ "u" if sliced else "") }}
{%- if blocks %}
{%- if not subgroup %}
    workgroupBarrier();
{%- endif %}
    }
{%- endif %}
{%- set first = "area.row" if entry == "band_expand" else "area.col" %}
{%- if bias %}{% for j in range(tn // 4) %}
    let bias{{ j }} = bias_of({{ first }} + {{ matrix.col(j, slice, tn) }});
{%- endfor %}{% endif %}
{%- for four in range(0, tm, 4) %}
    {
{%- if gelu_backward %}
{%- for i in range(four, four + 4) %}{% for j in range(tn // 4) %}
        let pre{{ i }}_{{ j }} = pre_of(row0 + {{ matrix.row(i, bm, tm) }}, {{ first }} + {{ matrix.col(j, slice, tn) }});
{%- endfor %}{% endfor %}
{%- endif %}
{%- for i in range(four, four + 4) %}{% for j in range(tn // 4) %}
        finish(row0 + {{ matrix.row(i, bm, tm) }}, {{ first }} + {{ matrix.col(j, slice, tn) }}, acc{{ i }}_{{ j }}
            {%- if bias %}, bias{{ j }}{% elif gelu_backward %}, pre{{ i }}_{{ j }}{% endif %});
{%- endfor %}{% endfor %}
    }
{%- endfor %}
}
{%- endif %}
