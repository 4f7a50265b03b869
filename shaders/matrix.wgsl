{#- Macros for products of matrices in registers, imported by linear, band and attention.

A workgroup computes a tile of `bm` x `bn` results, `bk` of the depth at a time; each thread `tm` x `tn` of them, in
accumulators named by the caller. A thread's rows come in fours, `ty` being its place among the groups of four, and its
columns likewise (`tx`), so that neighbours read neighbouring vec4s from workgroup memory. Both operands lie there by depth:
tile[k][4 rows or columns]. They come there in blocks of 4 x 4, so that an operand that lies in memory along the depth is
transposed in registers on its way.

Where `subgroup` is not 0, as many invocations make one, and run as one processor's vector: a load takes each lane in
turn, and what one lane has loaded all have at once. There the lanes of a subgroup share their rows, of which each loads a
part, and nothing goes through workgroup memory that needs not. -#}
{%- set xyzw = ["x", "y", "z", "w"] %}

{#- The parameter of an entry point that `place` finds its thread by. -#}
{%- macro invocation(subgroup) -%}
{%- if subgroup -%}
@builtin(subgroup_id) vector: u32, @builtin(subgroup_invocation_id) lane: u32
{%- else -%}
@builtin(local_invocation_index) thread: u32
{%- endif %}
{%- endmacro -%}

{#- A function `load_NAME(at, valid)`: four elements of `buffer` from `at`, of which the first `valid` exist. -#}
{%- macro loader(name, vec) %}
fn load_{{ name }}(at: u32, valid: u32) -> vec4<f32> {
    var value = vec4<f32>();
{%- if vec %}
    if (valid > 0u) { value = vec4<f32>({{ name }}[at / 4u]); }
{%- else %}
    if (valid > 0u) { value.x = f32({{ name }}[at]); }
    if (valid > 1u) { value.y = f32({{ name }}[at + 1u]); }
    if (valid > 2u) { value.z = f32({{ name }}[at + 2u]); }
    if (valid > 3u) { value.w = f32({{ name }}[at + 3u]); }
{%- endif %}
    return value;
}
{% endmacro -%}

{#- A function `store_NAME(at, valid, value)`, the counterpart of `loader`. -#}
{%- macro storer(name, vec, type) %}
fn store_{{ name }}(at: u32, valid: u32, value: vec4<f32>) {
{%- if vec %}
    if (valid > 0u) { {{ name }}[at / 4u] = vec4<{{ type }}>(value); }
{%- else %}
    if (valid > 0u) { {{ name }}[at] = {{ type }}(value.x); }
    if (valid > 1u) { {{ name }}[at + 1u] = {{ type }}(value.y); }
    if (valid > 2u) { {{ name }}[at + 2u] = {{ type }}(value.z); }
    if (valid > 3u) { {{ name }}[at + 3u] = {{ type }}(value.w); }
{%- endif %}
}
{% endmacro -%}

{#- Accumulators, at zero. -#}
{%- macro accumulators(acc, tm, tn) %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    var {{ acc }}{{ i }}_{{ j }} = vec4<f32>();
{%- endfor %}{% endfor %}
{% endmacro -%}

{#- `tx` and `ty` of `thread`, of which there are `down` for each of `cols // tn`. The threads of a slice of the columns
follow each other; the lanes of a subgroup have one `ty`. -#}
{%- macro place(cols, down, tn, slice=0, subgroup=0) %}
{%- set slice = slice or cols %}
{%- set across = slice // tn %}
{%- if subgroup %}
    let thread = vector * {{ subgroup }}u + lane;
{%- endif %}
    let slice = thread / {{ across * down }}u;
    let member = thread % {{ across * down }}u;
{%- if across % 8 == 0 and down % 4 == 0 and not subgroup %}
    // 32 threads take 8 x 4 or 4 x 8 places. Of each four of them two share a row and two a column: hardware that serves a
    // vec4 of workgroup memory to a few threads at a time serves those that want the same one together.
    let tx = slice * {{ slice // 4 }}u + (member / 32u % {{ across // 8 }}u) * 8u + (member & 1u) + ((member >> 1u) & 6u);
    let ty = (member / {{ 4 * across }}u) * 4u + ((member >> 1u) & 1u) + ((member >> 3u) & 2u);
{%- elif across == 4 and down % 8 == 0 and not subgroup %}
    let tx = slice * {{ slice // 4 }}u + (member & 1u) + ((member >> 1u) & 2u);
    let ty = (member / 32u) * 8u + ((member >> 1u) & 1u) + ((member >> 2u) & 6u);
{%- else %}
    let tx = slice * {{ slice // 4 }}u + member % {{ across }}u;
    let ty = member / {{ across }}u;
{%- endif %}
{% endmacro -%}

{#- Block `index` of an operand of `extent` rows or columns: its place down the depth and across, in fours. Eight threads
that follow each other write neighbouring vec4s, and read whole 32 bytes at least. -#}
{%- macro block(index, by_depth, extent, depth) %}
{%- if by_depth %}
        let kb = ({{ index }}) / {{ extent // 4 }}u;
        let rb = ({{ index }}) % {{ extent // 4 }}u;
{%- else %}
        let kb = ({{ index }}) / 8u % {{ depth // 4 }}u;
        let rb = ({{ index }}) / {{ 2 * depth }}u * 8u + ({{ index }}) % 8u;
{%- endif %}
{%- endmacro -%}

{#- The r-th vec4 of the block (kb, rb) in memory: `of(row, k)`, or `of(k, column)` of an operand that lies across the
depth. -#}
{%- macro element(of, by_depth, r, first, k, context) %}
{%- if by_depth -%}
{{ of }}({{ k }} + kb * 4u + {{ r }}u, {{ first }} + rb * 4u{{ context }})
{%- else -%}
{{ of }}({{ first }} + rb * 4u + {{ r }}u, {{ k }} + kb * 4u{{ context }})
{%- endif %}
{%- endmacro -%}

{#- The block's r-th vec4 in workgroup memory, from its four in memory. -#}
{%- macro turned(part, by_depth, r) %}
{%- if by_depth -%}
{{ part }}{{ r }}
{%- else -%}
{%- set lane = xyzw[r] -%}
vec4<f32>({{ part }}0.{{ lane }}, {{ part }}1.{{ lane }}, {{ part }}2.{{ lane }}, {{ part }}3.{{ lane }})
{%- endif %}
{%- endmacro -%}

{#- Fills `tile`, from `at` on, with `depth` x `extent` elements of an operand, at once. -#}
{%- macro stage(tile, at, by_depth, extent, depth, threads, of, first, k, context) %}
    for (var index = thread; index < {{ extent * depth // 16 }}u; index += {{ threads }}u) {
{{- block("index", by_depth, extent, depth) }}
{%- for r in range(4) %}
        let part{{ r }} = {{ element(of, by_depth, r, first, k, context) }};
{%- endfor %}
{%- for r in range(4) %}
        {{ tile }}[{{ at }} + kb * {{ extent }}u + rb + {{ r * extent // 4 }}u] = {{ turned("part", by_depth, r) }};
{%- endfor %}
    }
{% endmacro -%}

{#- The number of the four rows that a lane loads for its subgroup; those beyond the last load that one. -#}
{%- macro shared_four(tm, subgroup) -%}
{%- if tm // 4 < subgroup -%}
min(lane, {{ tm // 4 - 1 }}u)
{%- else -%}
lane
{%- endif %}
{%- endmacro -%}

{#- acc += left^T right for one step, of which left{i} are fours of rows and right{j} fours of columns. -#}
{%- macro step(acc, tm, tn) %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
        {{ acc }}{{ i }}_{{ j }} = fma(vec4<f32>(left{{ i // 4 }}.{{ xyzw[i % 4] }}), right{{ j }}, {{ acc }}{{ i }}_{{ j }});
{%- endfor %}{% endfor %}
{%- endmacro -%}

{#- left{i}, all fours of rows, from `own`, the lane's. -#}
{%- macro spread_rows(tm) %}
{%- for i in range(tm // 4) %}
        let left{{ i }} = subgroupBroadcast(own, {{ i }}u);
{%- endfor %}
{%- endmacro -%}

{#- acc += left^T right over `depth` staged steps, `unroll` of them at a time; `left_at` and `right_at` are where the tiles
start, in vec4s. -#}
{%- macro multiply(acc, left, left_at, right, right_at, bm, bn, depth, tm, tn, unroll, slice=0, subgroup=0) %}
{%- set slice = slice or bn %}
    {
        let left_place = {{ left_at }} + ty{% if subgroup %} + {{ shared_four(tm, subgroup) }} * {{ bm // tm }}u{% endif %};
        let right_place = {{ right_at }} + tx;
{%- if unroll < depth %}
    for (var s = 0u; s < {{ depth }}u; s += {{ unroll }}u) {
{%- endif %}
{%- for u in range([unroll, depth] | min) %}
        {
{%- set left_step = "s * " ~ (bm // 4) ~ "u + " if unroll < depth else "" %}
{%- set right_step = "s * " ~ (bn // 4) ~ "u + " if unroll < depth else "" %}
{%- if subgroup %}
        let own = {{ left }}[left_place + {{ left_step }}{{ u * (bm // 4) }}u];
{{- spread_rows(tm) }}
{%- else %}
{%- for i in range(tm // 4) %}
        let left{{ i }} = {{ left }}[left_place + {{ left_step }}{{ u * (bm // 4) + i * (bm // tm) }}u];
{%- endfor %}
{%- endif %}
{%- for j in range(tn // 4) %}
        let right{{ j }} = {{ right }}[right_place + {{ right_step }}{{ u * (bn // 4) + j * (slice // tn) }}u];
{%- endfor %}
{{- step(acc, tm, tn) }}
        }
{%- endfor %}
{%- if unroll < depth %}
    }
{%- endif %}
    }
{% endmacro -%}

{#- Workgroup memory of `product`: as many buffers of both operands' tiles as there is room for. -#}
{%- macro product_memory(tile) %}
{%- if not tile.subgroup %}
var<workgroup> tiles: array<vec4<f32>, {{ tile.buffers * (tile.bm + tile.bn) * tile.bk // 4 }}>;
{%- endif %}
{% endmacro -%}

{#- Goes through a thread's blocks of both operands: finds their places (`begin`), brings them from memory to registers
(`fetch`), or from these to the tiles (`put`), those that start at `into`. The blocks of both are dealt out as one list, so
that all threads have as many. -#}
{%- macro blocks(what, tile, left, right, into="0u") %}
{%- set lefts = tile.bm * tile.bk // 16 %}
{%- set all = lefts + tile.bn * tile.bk // 16 %}
{%- for first in range(0, all, tile.threads) %}
{%- set n = loop.index0 %}
{%- set end = [first + tile.threads, all] | min %}
{%- if first < lefts and end > lefts %}
    if (thread < {{ lefts - first }}u) {
{%- elif end - first < tile.threads %}
    if (thread < {{ end - first }}u) {
{%- else %}
    {
{%- endif %}
{%- if first < lefts %}
{{- block_of(what, n, "thread + " ~ first ~ "u", left, tile.bm, tile.bk, 0, into) }}
{%- else %}
{{- block_of(what, n, "thread + " ~ (first - lefts) ~ "u", right, tile.bn, tile.bk, tile.bm * tile.bk // 4, into) }}
{%- endif %}
{%- if first < lefts and end > lefts %}
    } else {% if end - first < tile.threads %}if (thread < {{ end - first }}u) {% endif %}{
{{- block_of(what, n, "thread - " ~ (lefts - first) ~ "u", right, tile.bn, tile.bk, tile.bm * tile.bk // 4, into) }}
{%- endif %}
    }
{%- endfor %}
{% endmacro -%}

{%- macro block_of(what, n, index, operand, extent, depth, tile_at, into) %}
{%- if what == "begin" %}
{{- block(index, operand.by_depth, extent, depth) }}
        place{{ n }} = {{ tile_at }}u + kb * {{ extent }}u + rb;
{%- if operand.walk %}
{{- start_of(operand.walk, n) }}
{%- endif %}
{%- elif what == "put" %}
{%- for r in range(4) %}
        tiles[{{ into }} + place{{ n }} + {{ r * extent // 4 }}u] = {{ turned("part" ~ n ~ "_", operand.by_depth, r) }};
{%- endfor %}
{%- else %}
{{- block(index, operand.by_depth, extent, depth) }}
{{- fetch(n, operand, depth) }}
{%- if operand.total %}
        if ({{ operand.total }}) {
            total{{ n }} += (part{{ n }}_0 + part{{ n }}_1) + (part{{ n }}_2 + part{{ n }}_3);
        }
{%- endif %}
{%- endif %}
{%- endmacro -%}

{#- Brings block (kb, rb) from memory to its registers part{n}, and goes on by `depth`. -#}
{%- macro fetch(n, operand, depth) %}
{%- set part = "part" ~ n ~ "_" %}
{%- set at = "at" ~ n %}
{%- if operand.walk %}
{%- set walk = operand.walk %}
{%- set stride = "stride" ~ n if walk.panel else walk.stride %}
{%- if walk.again %}
        if ({{ walk.again }}) {
{{- start_of(walk, n) }}
        }
{%- endif %}
{%- if walk.exists %}
        if (exists{{ n }}) {
{%- endif %}
{%- for r in range(4) %}
        {{ part }}{{ r }} = vec4<f32>({{ walk.name }}[{{ at }} + {{ r }}u * {{ stride }}]);
{%- endfor %}
{%- if walk.exists %}
        } else {
{%- for r in range(4) %}
        {{ part }}{{ r }} = vec4<f32>();
{%- endfor %}
        }
{%- endif %}
        {{ at }} += {{ depth ~ "u * " ~ stride if operand.by_depth else depth // 4 ~ "u" }};
{%- else %}
{%- for r in range(4) %}
        {{ part }}{{ r }} = {{ element(operand.of, operand.by_depth, r, operand.first, "k", operand.context) }};
{%- endfor %}
{%- endif %}
{%- endmacro -%}

{%- macro start_of(walk, n) %}
{%- if walk.panel %}
        let panel = {{ walk.panel }};
        stride{{ n }} = panel.cols / 4u;
{%- endif %}
{%- if walk.exists %}
        exists{{ n }} = {{ walk.exists }};
{%- endif %}
        at{{ n }} = {{ walk.start }};
{%- endmacro -%}

{#- The registers of block n: its vec4s, where in memory it is, how far apart its vec4s are, whether it exists. -#}
{%- macro registers(n) %}
{%- for r in range(4) %}
    var part{{ n }}_{{ r }} = vec4<f32>();
{%- endfor %}
    var at{{ n }} = 0u;
    var stride{{ n }} = 0u;
    var exists{{ n }} = true;
{%- endmacro -%}

{#- acc += left^T right over the depth from `start` to `end`, in steps of tile.bk. An operand is {by_depth, of, first,
context}: a function of (row, k), or of (k, column) where it lies across the depth, its first row or column, and further
arguments. Or it has {walk: {name, start, stride, ...}}, which takes fewer instructions: a buffer of vec4s, where in it the
block (kb, rb) at depth k starts, and how far apart a block's vec4s are; or the `panel` that it is in, whose `cols` say
that; whether it `exists` or is 0; and when to ask for all that `again`.

A step is multiplied `when` that holds, the depth k being the next step's. The next step's blocks are on their way from
memory while one is multiplied; with two buffers a step has one barrier. -#}
{%- macro product(acc, tile, left, right, start, end, when="") %}
{%- if tile.subgroup %}
{{- product_of_lanes(acc, tile, left, right, start, end) }}
{%- else %}
{{- product_of_groups(acc, tile, left, right, start, end, when) }}
{%- endif %}
{% endmacro -%}

{#- An operand that lies across the depth may say in `total` when its rows or columns are to be summed up on their way to the
tiles: `totals` are a thread's sums, four rows or columns of each of its blocks over some steps of the depth. -#}
{%- macro totals(tile) %}
{%- for n in range(((tile.bm + tile.bn) * tile.bk // 16 + tile.threads - 1) // tile.threads) %}
    var total{{ n }} = vec4<f32>();
{%- endfor %}
{%- endmacro -%}

{#- Adds up, in workgroup memory, the totals of an operand of `extent` rows or columns, whose blocks start at `first` of the
list of all, and runs the body for each four of them: `four` is their number, `total` their sums. The totals are at zero
again. -#}
{%- macro add_totals(tile, extent, first) %}
{%- set count = extent * tile.bk // 16 %}
    workgroupBarrier();
{%- for n in range(((tile.bm + tile.bn) * tile.bk // 16 + tile.threads - 1) // tile.threads) %}
{%- set from = n * tile.threads %}
{%- if from < first + count and from + tile.threads > first %}
    if (thread + {{ from }}u - {{ first }}u < {{ count }}u) { tiles[thread + {{ from }}u - {{ first }}u] = total{{ n }}; }
{%- endif %}
    total{{ n }} = vec4<f32>();
{%- endfor %}
    workgroupBarrier();
    for (var four = thread; four < {{ extent // 4 }}u; four += {{ tile.threads }}u) {
        var total = tiles[four];
{%- for kb in range(1, tile.bk // 4) %}
        total += tiles[four + {{ kb * extent // 4 }}u];
{%- endfor %}
{{ caller() }}
    }
{%- endmacro -%}

{#- By lanes that share their rows, straight from memory. -#}
{%- macro product_of_lanes(acc, tile, left, right, start, end) %}
    {
    let kb = 0u;
    var k = {{ start }};
{%- for n in range(1 + tile.tn // 4) %}
    let rb{{ n }} = {% if n == 0 %}ty + {{ shared_four(tile.tm, tile.subgroup) }} * {{ tile.bm // tile.tm }}u
        {%- else %}tx + {{ (n - 1) * (tile.bn // tile.tn) }}u{% endif %};
{{- registers(n) }}
{%- set operand = right if n else left %}
{%- if operand.walk %}
    {
        let rb = rb{{ n }};
{{- start_of(operand.walk, n) }}
    }
{%- endif %}
{%- endfor %}
    for (; k < {{ end }}; k += 4u) {
{%- for n in range(1 + tile.tn // 4) %}
        {
        let rb = rb{{ n }};
{{- fetch(n, right if n else left, 4) }}
        }
{%- endfor %}
{%- for r in range(4) %}
        {
        let own = {{ turned("part0_", left.by_depth, r) }};
{{- spread_rows(tile.tm) }}
{%- for j in range(tile.tn // 4) %}
        let right{{ j }} = {{ turned("part" ~ (j + 1) ~ "_", right.by_depth, r) }};
{%- endfor %}
{{- step(acc, tile.tm, tile.tn) }}
        }
{%- endfor %}
    }
    }
{% endmacro -%}

{#- By groups, through workgroup memory. -#}
{%- macro product_of_groups(acc, tile, left, right, start, end, when) %}
{%- set size = (tile.bm + tile.bn) * tile.bk // 4 %}
    if ({{ start }} < {{ end }}) {
    var k = {{ start }};
{%- for n in range((size // 4 + tile.threads - 1) // tile.threads) %}
    var place{{ n }} = 0u;
{{- registers(n) }}
{%- endfor %}
{{- blocks("begin", tile, left, right) }}
{{- blocks("fetch", tile, left, right) }}
{{- blocks("put", tile, left, right) }}
    workgroupBarrier();
{%- if tile.buffers == 2 %}
    var buffer = 0u;
{%- endif %}
{%- set at = "buffer" if tile.buffers == 2 else "0u" %}
    loop {
        k += {{ tile.bk }}u;
        if (k < {{ end }}) {
{{- blocks("fetch", tile, left, right) }}
        }
{%- if when %}
        if ({{ when }}) {
{%- endif %}
{{- multiply(acc, "tiles", at, "tiles", at ~ " + " ~ (tile.bm * tile.bk // 4) ~ "u", tile.bm, tile.bn, tile.bk, tile.tm, tile.tn, tile.unroll, tile.slice) }}
{%- if when %}
        }
{%- endif %}
        if (k >= {{ end }}) { break; }
{%- if tile.buffers == 2 %}
        buffer = {{ size }}u - buffer;
{%- else %}
        workgroupBarrier();
{%- endif %}
{{- blocks("put", tile, left, right, at) }}
        workgroupBarrier();
    }
    }
{% endmacro -%}

{#- Runs the body for the parts of tiles that fall to this group: `tile`, from where to where its depth goes (`start`, `end`),
and the part's number in the tile, `share`. Either all tiles are in as many parts (`even`); or all tiles' steps of `bk` are
dealt out as one list, p.group_steps to a group: a tile's end and the next one's start, perhaps. -#}
{%- macro dealt(even, bk, depth) %}
{%- if even %}
    let tile = group / p.shares;
    let share = group % p.shares;
    let start = share * p.group_steps * {{ bk }}u;
    let end = min(start + p.group_steps * {{ bk }}u, {{ depth }});
    let shares = share + 1u;
{{ caller() }}
{%- else %}
    let last_step = min((group + 1u) * p.group_steps, p.tile_steps * p.tiles);
    var step = group * p.group_steps;
    loop {
        if (step >= last_step) { break; }
        let tile = step / p.tile_steps;
        let tile_step = tile * p.tile_steps;
        let share = group - tile_step / p.group_steps;
        let start = (step - tile_step) * {{ bk }}u;
        step = min(last_step, tile_step + p.tile_steps);
        let end = min((step - tile_step) * {{ bk }}u, {{ depth }});
        // Parts of which a tile has fewer than others are 0.
        let shares = select(share + 1u, p.shares, step == tile_step + p.tile_steps);
{{ caller() }}
        workgroupBarrier();
    }
{%- endif %}
{% endmacro -%}

{#- Accumulators back at zero. -#}
{%- macro clear(acc, tm, tn) %}
{%- for i in range(tm) %}{% for j in range(tn // 4) %}
    {{ acc }}{{ i }}_{{ j }} = vec4<f32>();
{%- endfor %}{% endfor %}
{% endmacro -%}

{#- The row, and the first of four columns, in the tile that accumulator (i, j) stands for. -#}
{%- macro row(i, bm, tm) %}(ty + {{ (i // 4) * (bm // tm) }}u) * 4u + {{ i % 4 }}u{% endmacro -%}
{%- macro col(j, slice, tn) %}(tx + {{ j * (slice // tn) }}u) * 4u{% endmacro -%}
