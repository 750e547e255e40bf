"""Slow and obvious NumPy float64 versions of every formula, to test against.

Nothing here is shared with the package. Loops are over rows; masked entries are dropped from
the row before anything is computed, so a mask cannot be half honored.
"""

import numpy as np


def softmax_row(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def ssmax_row(x, s=1.0, n=None, b=0.0):
    n = len(x) if n is None else n
    return softmax_row((s * np.log(n) + b) * x)


def softpick_row(x):
    return x / (1.0 + np.abs(x).sum())


def rectified_softpick_row(x, epsilon=1e-6):
    # Numerator and denominator times e^-m, m = max(0, max x): the definition, without overflow.
    m = max(0.0, x.max())
    near = np.abs(x) < 1.0
    f = np.where(near, np.expm1(np.where(near, x, 0.0)) * np.exp(-m), np.exp(x - m) - np.exp(-m))
    return np.maximum(f, 0.0) / (np.abs(f).sum() + epsilon * np.exp(-m))


def sink_softmax_row(x, sink=0.0):
    m = max(x.max(), sink)
    e = np.exp(x - m)
    return e / (np.exp(sink - m) + e.sum())


ROWS = {
    "softmax": softmax_row,
    "ssmax": ssmax_row,
    "softpick": softpick_row,
    "rectified_softpick": rectified_softpick_row,
    "sink_softmax": sink_softmax_row,
}


def normalize(name, logits, mask=None, **options):
    """Weights over the last axis; options may be arrays with one value per row `[..., 1]`."""
    logits = np.asarray(logits, "float64")
    mask = np.ones(logits.shape, bool) if mask is None else np.broadcast_to(mask, logits.shape)
    options = {k: np.broadcast_to(v, (*logits.shape[:-1], 1)) for k, v in options.items()}
    weights = np.zeros_like(logits)
    for row in np.ndindex(*logits.shape[:-1]):
        seen = mask[row]
        if seen.any():
            row_options = {k: v[row][0] for k, v in options.items()}
            weights[row][seen] = ROWS[name](logits[row][seen], **row_options)
    return weights


def visible(
    query_length, key_length, batch=1, heads=1, mask=None, key_mask=None, causal=False,
    window=None, query_offset=0, segment_ids=None,
):  # fmt: skip
    """Which keys each query sees, `[B, H, T, S]`, one pair at a time."""
    out = np.ones((batch, heads, query_length, key_length), bool)
    offset = np.broadcast_to(query_offset, (batch,))
    if mask is not None:
        out &= np.broadcast_to(mask, out.shape)
    for b, h, i, j in np.ndindex(*out.shape):
        position = i + offset[b]
        if causal and j > position:
            out[b, h, i, j] = False
        if window is not None and abs(position - j) >= window:
            out[b, h, i, j] = False
        if key_mask is not None and not key_mask[b][j]:
            out[b, h, i, j] = False
        if segment_ids is not None and segment_ids[0][b][i] != segment_ids[1][b][j]:
            out[b, h, i, j] = False
    return out


def attention(query, key, value, name="softmax", scale=None, s=1.0, b=0.0, length_scaled=None,
              epsilon=1e-6, sink=0.0, return_weights=False, **visibility):  # fmt: skip
    """Attention on `[B, T, H, D]`, `[B, S, K, D]`, `[B, S, K, Dv]`, one head at a time.

    `length_scaled` multiplies the logits by `s log n + b`; it is on for ssmax. s, b and sink may
    have one value per head.
    """
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    batch, length, heads, size = query.shape
    groups = heads // key.shape[2]
    scale = size**-0.5 if scale is None else scale
    seen = visible(length, key.shape[1], batch, heads, **visibility)
    s, b, sink = (np.broadcast_to(x, (heads,)) for x in (s, b, sink))
    if name == "ssmax":
        name, length_scaled = "softmax", True
    options = {"epsilon": epsilon} if name == "rectified_softpick" else {}
    weights = np.zeros((batch, heads, length, key.shape[1]))
    out = np.zeros((batch, length, heads, value.shape[3]))
    for i, h in np.ndindex(batch, heads):
        logits = query[i, :, h] @ key[i, :, h // groups].T * scale
        if length_scaled:
            n = np.maximum(seen[i, h].sum(-1, keepdims=True), 1)
            logits = logits * (s[h] * np.log(n) + b[h])
        if name == "sink_softmax":
            options = {"sink": sink[h]}
        weights[i, h] = normalize(name, logits, seen[i, h], **options)
        out[i, :, h] = weights[i, h] @ value[i, :, h // groups]
    return (out, weights) if return_weights else out


def logit_gradient(name, x, weights, upstream, epsilon=1e-6):
    """Gradient of sum(weights * upstream) over one row of moderate logits."""
    if name in ("softmax", "sink_softmax"):
        return weights * (upstream - weights @ upstream)
    if name == "softpick":
        slope, magnitude_slope, constant = np.ones_like(x), np.sign(x), 1.0
        magnitude = np.abs(x)
    else:
        slope, magnitude_slope, constant = np.exp(x) * (x > 0), np.exp(x) * np.sign(x), epsilon
        magnitude = np.abs(np.expm1(x))
    total = constant + magnitude.sum()
    return (slope * upstream - magnitude_slope * (weights @ upstream)) / total


def attention_gradients(query, key, value, cotangent, name="softmax", scale=None, **visibility):
    """Gradients of sum(attention * cotangent) with respect to query, key and value."""
    query, key, value = (np.asarray(x, "float64") for x in (query, key, value))
    batch, length, heads, size = query.shape
    groups = heads // key.shape[2]
    scale = size**-0.5 if scale is None else scale
    seen = visible(length, key.shape[1], batch, heads, **visibility)
    _, weights = attention(query, key, value, name, scale, return_weights=True, **visibility)
    dq, dk, dv = (np.zeros_like(x) for x in (query, key, value))
    for b, h, i in np.ndindex(batch, heads, length):
        kept, g = seen[b, h, i], h // groups
        factor = scale * (np.log(max(kept.sum(), 1)) if name == "ssmax" else 1.0)
        q, k, v, w = query[b, i, h], key[b, kept, g], value[b, kept, g], weights[b, h, i, kept]
        row = "softmax" if name == "ssmax" else name
        dx = factor * logit_gradient(row, k @ q * factor, w, v @ cotangent[b, i, h])
        dq[b, i, h] = dx @ k
        dk[b, kept, g] += np.outer(dx, q)
        dv[b, kept, g] += np.outer(w, cotangent[b, i, h])
    return dq, dk, dv


def finite_difference(function, arrays, cotangent, step=1e-6):
    """Gradients of sum(function(*arrays) * cotangent) by central differences, in float64."""
    arrays = [np.array(a, "float64") for a in arrays]
    gradients = []
    for k, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for index in np.ndindex(*array.shape):
            values = []
            for sign in (1, -1):
                moved = array.copy()
                moved[index] += sign * step
                values.append((function(*arrays[:k], moved, *arrays[k + 1 :]) * cotangent).sum())
            gradient[index] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients
