"""Independent reference for banded GPT-2 training, float64, JAX autodiff.
Usage: golden.py OUTDIR NAME C L NH T V B STEPS FC1BW FC2BW SEED LR WD
Writes NAME.model.bin (llm.c v3 fp32), NAME.train.bin (llm.c data), NAME.json (losses, grad norms), NAME.golden.safetensors.
"""

import sys, json, os, numpy as np
import jax, jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
from safetensors.numpy import save_file

out, name = sys.argv[1:3]
C, L, NH, T, V, B, STEPS, BW1, BW2, SEED = [int(x) for x in sys.argv[3:13]]
LR = float(sys.argv[13])
WD = float(sys.argv[14])
Vp = (V + 63) // 64 * 64
OC = 4 * C
rng = np.random.default_rng(SEED)


def n(*s):
    return (rng.standard_normal(s) * 0.02).astype(np.float32)


wte = n(Vp, C)
wte[V:] = 0
shapes = [
    "wte",
    "wpe",
    "ln1w",
    "ln1b",
    "qkvw",
    "qkvb",
    "attprojw",
    "attprojb",
    "ln2w",
    "ln2b",
    "fcw",
    "fcb",
    "fcprojw",
    "fcprojb",
    "lnfw",
    "lnfb",
]
P = dict(
    zip(
        shapes,
        [
            wte,
            n(T, C),
            1 + n(L, C),
            n(L, C),
            n(L, 3 * C, C),
            n(L, 3 * C),
            n(L, C, C),
            n(L, C),
            1 + n(L, C),
            n(L, C),
            n(L, 4 * C, C),
            n(L, 4 * C),
            n(L, C, 4 * C),
            n(L, C),
            1 + n(C),
            n(C),
        ],
    )
)
toks = rng.integers(0, V, size=B * T * STEPS + 1).astype(np.uint16)
os.makedirs(out, exist_ok=True)
with open(f"{out}/{name}.model.bin", "wb") as f:
    h = np.zeros(256, np.int32)
    h[:8] = [20240326, 3, T, V, L, NH, C, Vp]
    f.write(h.tobytes())
    for k in shapes:
        f.write(P[k].tobytes())
with open(f"{out}/{name}.train.bin", "wb") as f:
    h = np.zeros(256, np.int32)
    h[:3] = [20240520, 1, len(toks)]
    f.write(h.tobytes())
    f.write(toks.tobytes())
# FC1 mask (OC,C): input i -> outputs |j - i*OC/C| <= bw/2 ; FC2 mask (C,OC): output j, input i: |i - j*OC/C| <= bw/2
i = np.arange(C)
j = np.arange(OC)
m1 = np.ones((OC, C)) if BW1 == 0 else (np.abs(j[:, None] - i[None, :] * (OC / C)) <= BW1 / 2).astype(np.float64)
m2 = np.ones((C, OC)) if BW2 == 0 else (np.abs(j[None, :] - i[:, None] * (OC / C)) <= BW2 / 2).astype(np.float64)
p = {k: jnp.asarray(v, jnp.float64) for k, v in P.items()}
p["fcw"] = p["fcw"] * m1
p["fcprojw"] = p["fcprojw"] * m2


def ln(x, w, b):
    mu = x.mean(-1, keepdims=True)
    v = ((x - mu) ** 2).mean(-1, keepdims=True)
    return (x - mu) / jnp.sqrt(v + 1e-5) * w + b


def fwd(p, x, y):
    h = p["wte"][x] + p["wpe"][: x.shape[1]]
    tril = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
    for l in range(L):
        a = ln(h, p["ln1w"][l], p["ln1b"][l]) @ p["qkvw"][l].T + p["qkvb"][l]
        q, k, v = jnp.split(a, 3, -1)
        sh = lambda t: t.reshape(B, -1, NH, C // NH).transpose(0, 2, 1, 3)
        q, k, v = sh(q), sh(k), sh(v)
        s = jnp.where(tril, q @ k.transpose(0, 1, 3, 2) / np.sqrt(C // NH), -jnp.inf)
        o = (jax.nn.softmax(s, -1) @ v).transpose(0, 2, 1, 3).reshape(B, -1, C)
        h = h + o @ p["attprojw"][l].T + p["attprojb"][l]
        f = ln(h, p["ln2w"][l], p["ln2b"][l]) @ (p["fcw"][l] * m1).T + p["fcb"][l]
        f = 0.5 * f * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (f + 0.044715 * f**3)))
        h = h + f @ (p["fcprojw"][l] * m2).T + p["fcprojb"][l]
    lg = (ln(h, p["lnfw"], p["lnfb"]) @ p["wte"].T)[..., :V]
    lp = jax.nn.log_softmax(lg, -1)
    return -jnp.take_along_axis(lp, y[..., None], -1).mean(), lg


g = jax.jit(jax.value_and_grad(fwd, has_aux=True))
M = {k: jnp.zeros_like(v) for k, v in p.items()}
S = {k: jnp.zeros_like(v) for k, v in p.items()}
b1, b2, eps = 0.9, 0.999, 1e-8
nodecay = {k for k in shapes if k.startswith("ln") or k.endswith("b")}
losses = []
gn = []
save = {}
for t in range(STEPS):
    c = toks[t * B * T : (t + 1) * B * T + 1].astype(np.int32)
    x = jnp.asarray(c[:-1].reshape(B, T))
    y = jnp.asarray(c[1:].reshape(B, T))
    (l, lg), gr = g(p, x, y)
    losses.append(float(l))
    gn.append(float(jnp.sqrt(sum((v**2).sum() for v in gr.values()))))
    if t == 0:
        save["logits"] = np.asarray(lg, np.float32)
        for k in shapes:
            save["grad." + k] = np.asarray(gr[k], np.float32)
    for k in shapes:
        M[k] = b1 * M[k] + (1 - b1) * gr[k]
        S[k] = b2 * S[k] + (1 - b2) * gr[k] ** 2
        mh = M[k] / (1 - b1 ** (t + 1))
        vh = S[k] / (1 - b2 ** (t + 1))
        p[k] = p[k] - LR * (mh / (jnp.sqrt(vh) + eps) + (0 if k in nodecay else WD) * p[k])
    if t == 0 or t == STEPS - 1:
        for k in shapes:
            save[f"step{t+1}." + k] = np.asarray(p[k], np.float32)
save_file({k: np.ascontiguousarray(v) for k, v in save.items()}, f"{out}/{name}.golden.safetensors")
json.dump(
    dict(
        C=C,
        L=L,
        NH=NH,
        T=T,
        V=V,
        B=B,
        steps=STEPS,
        fc1_bandwidth=BW1,
        fc2_bandwidth=BW2,
        lr=LR,
        weight_decay=WD,
        beta1=b1,
        beta2=b2,
        eps=eps,
        losses=losses,
        grad_norms=gn,
        fc1_density=float(m1.mean()),
        fc2_density=float(m2.mean()),
    ),
    open(f"{out}/{name}.json", "w"),
    indent=1,
)
print(name, "density", m1.mean(), m2.mean(), "losses", losses[0], losses[-1], "gradnorm", gn[0])
