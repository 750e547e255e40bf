"""What `build` makes, exported with unknown batch and length, in every runtime."""

import numpy as np
import pytest
from support.exports import FORMATS, LONG, MARKS, SHORT, assert_same, dynamic, export

import keras_ssattn

pytestmark = MARKS

SIZE = 8
NORMALIZERS = ("ssmax", "softpick", "rectified_softpick", "sink_softmax")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_build(normalizer, form, tmp_path, rng):
    mode = {"softpick": "mean_pool", "sink_softmax": "all"}.get(normalizer, "last_timestep")
    model = keras_ssattn.build(
        SIZE, SIZE, num_heads=2, num_layers=1, window_size=None, normalizer=normalizer,
        output_mode=mode,
    )  # fmt: skip
    inputs = [rng.normal(size=(*sizes, SIZE)).astype("float32") for sizes in (SHORT, LONG)]
    model(inputs[0])
    options = dynamic(form, [("batch", "time")])
    run = export(model, tmp_path, form, ["state_sequence"], **options)
    for x in inputs:
        assert_same(model, run, x)


def test_rectified_softpick_is_exact_near_zero_in_export(rng):
    x = np.concatenate([rng.normal(size=200) * 10.0**-e for e in range(7)]).astype("float32")
    with keras_ssattn.ops.exporting():
        found = np.array(keras_ssattn.ops.kernels.expm1(keras_ssattn.ops.kernels.ops.array(x)))
    np.testing.assert_allclose(found, np.expm1(x.astype("float64")), rtol=5e-7)
