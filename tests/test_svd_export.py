"""svd in jax.export artefacts, also in a process that has lowered nothing itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import check_svd, random_matrix
from jax import export

import jaxmetal_linalg as jml
from jaxmetal_linalg import _device

A = random_matrix((3, 9, 7), "float32")


def exported(f: Any, device: str, *args: Any) -> Any:
    """For the platform that the device serves: jax.export does not ask for the default device."""
    platform = _device.PLATFORMS.get(device, "cpu")
    return export.export(jax.jit(f), platforms=[platform])(*args)


def with_info(a: Any) -> Any:
    return jml.svd(a, return_info=True)


def test_round_trip(device: str) -> None:
    data = exported(with_info, device, A).serialize(vjp_order=0)
    result, info = export.deserialize(data).call(A)
    assert isinstance(result, jml.SVDResult)
    assert isinstance(info, jml.SVDInfo)
    check_svd(A, result, full_matrices=True)
    np.testing.assert_array_equal(info.status, 0)


def test_round_trip_of_a_gradient(device: str) -> None:
    def f(a: Any) -> Any:
        return jml.svd(a, False).U.sum()

    data = exported(f, device, A).serialize(vjp_order=1)
    got = jax.grad(export.deserialize(data).call)(A)
    np.testing.assert_allclose(got, jax.grad(f)(A), atol=1e-5)


@pytest.mark.parametrize("method", ["jacobi", "lapack"])
@pytest.mark.parametrize("spec", ["b, 9, 7", "b, c, 9, 7"])
def test_symbolic_batch(device: str, spec: str, method: str) -> None:
    method = "auto" if device != "host" and method == "lapack" else method
    shape = export.symbolic_shape(spec)
    aval = jax.ShapeDtypeStruct(shape, jnp.float32)
    data = exported(lambda a: jml.svd(a, method=method), device, aval).serialize()
    call = export.deserialize(data).call
    for batch in (1, 3):
        a = random_matrix((batch, 9, 7) if len(shape) == 3 else (batch, 2, 9, 7), "float32")
        check_svd(a, call(a), full_matrices=True)


def test_symbolic_matrix_is_a_clear_error(device: str) -> None:
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("m, 7"), jnp.float32)
    with pytest.raises(ValueError, match="svd: argument a: expected static m and n"):
        export.export(jax.jit(jml.svd))(shape)


def test_many_platforms_in_one_artefact() -> None:
    program = export.export(jax.jit(with_info), platforms=["cpu", "cuda", "tpu"])(A)
    assert program.platforms == ("cpu", "cuda", "tpu")
    check_svd(A, program.call(A)[0], full_matrices=True)


CHILD = """
import sys
import numpy as np
import jax
{before}
import jaxmetal_linalg
from jax import export
call = export.deserialize(open(sys.argv[1], "rb").read()).call
a = np.load(sys.argv[2])
(u, s, vh), info = call(a)
assert np.all(info.status == 0)
assert np.max(np.abs((u[..., :7] * s[:, None]) @ vh - a)) < 1e-5
print("artefact ran")
"""


@pytest.mark.parametrize("before", ["", "jax.devices()"])
def test_fresh_process(host: None, tmp_path: Path, before: str) -> None:
    """Handlers are registered on import, whether or not the cpu backend exists by then."""
    program = exported(with_info, "host", A)
    assert "jml_svd_v1" in program.mlir_module()
    artefact, data = tmp_path / "artefact", tmp_path / "a.npy"
    artefact.write_bytes(program.serialize())
    np.save(data, A)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD.format(before=before), artefact, data],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "artefact ran" in done.stdout
