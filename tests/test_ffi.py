"""The raw custom call with wrong buffers or attributes: an error, never a crash."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmetal_linalg import _native, _tuning
from jaxmetal_linalg.primitives.svd import TARGET

M, N, K, BATCH = 6, 4, 4, 3


def problem(**changes: Any) -> dict[str, Any]:
    return {
        "batch": BATCH,
        "m": M,
        "n": N,
        "dtype": "float32",
        "compute_uv": True,
        "full_matrices": False,
        "method": "jacobi",
        "variant": "",
        **dict(_tuning.resolve("host", "svd", _native.isa())),
        **changes,
    }


def sim_problem(**changes: Any) -> dict[str, Any]:
    host = dict(_tuning.resolve("host", "svd", _native.isa()))
    common = {k: v for k, v in problem().items() if k not in host}
    sim = {"device": "sim", "caps": "apple-m1", "max_sweeps": 40}
    return {**common, **sim, **changes}


def results(**changes: tuple[tuple[int, ...], Any]) -> list[jax.ShapeDtypeStruct]:
    kinds: dict[str, tuple[tuple[int, ...], Any]] = {
        "u": ((BATCH, M, K), jnp.float32),
        "s": ((BATCH, K), jnp.float32),
        "vh": ((BATCH, K, N), jnp.float32),
        "status": ((BATCH,), jnp.int32),
        "sweeps": ((BATCH,), jnp.int32),
        "off_norm": ((BATCH,), jnp.float32),
        **changes,
    }
    return [jax.ShapeDtypeStruct(*k) for k in kinds.values()]


A = np.random.default_rng(0).standard_normal((BATCH, M, N)).astype(np.float32)


def call(*operands: Any, out: Any = None, config: Any = None, **attributes: Any) -> Any:
    if config is None:
        config = json.dumps(problem())
    if config != "":
        attributes["config"] = config
    out = results() if out is None else out
    f = jax.jit(lambda *xs: jax.ffi.ffi_call(TARGET, out)(*xs, **attributes))
    return jax.block_until_ready(f(*operands))


def test_the_right_call_works(host: None) -> None:
    u, s, vh, status, sweeps, _ = call(A)
    assert np.all(status == 0)
    assert np.all(sweeps > 0)
    np.testing.assert_allclose((u * s[:, None]) @ vh, A, atol=1e-5)


def test_a_batch_other_than_planned_works(host: None) -> None:
    """Partitioning over devices changes the batch after the plan was made."""
    u, s, vh, status, *_ = call(A, config=json.dumps(problem(batch=12)))
    np.testing.assert_allclose((u * s[:, None]) @ vh, A, atol=1e-5)
    assert np.all(status == 0)


def test_a_batch_other_than_planned_on_sim(sim: None) -> None:
    for planned in (1, 40):
        u, s, vh, status, *_ = call(A, config=json.dumps(sim_problem(batch=planned)))
        np.testing.assert_allclose((u * s[:, None]) @ vh, A, atol=1e-5)
        assert np.all(status == 0)


WRONG_BUFFERS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "rank 1": ((A[0, 0],), None),
    "rank 0": ((A[0, 0, 0],), None),
    "m": ((A[:, :5],), None),
    "n": ((A[:, :, :3],), None),
    "transposed": ((np.swapaxes(A, 1, 2),), None),
    "dtype of a": ((A.astype(np.int32),), None),
    "complex a": ((A.astype(np.complex64),), None),
    "half a": ((A.astype(np.float16),), None),
    "no operand": ((), None),
    "two operands": ((A, A), None),
    "batch of u": ((A,), results(u=((2, M, K), jnp.float32))),
    "columns of u": ((A,), results(u=((BATCH, M, M), jnp.float32))),
    "rank of u": ((A,), results(u=((BATCH, M), jnp.float32))),
    "dtype of u": ((A,), results(u=((BATCH, M, K), jnp.float16))),
    "length of s": ((A,), results(s=((BATCH, K - 1), jnp.float32))),
    "dtype of s": ((A,), results(s=((BATCH, K), jnp.complex64))),
    "rows of vh": ((A,), results(vh=((BATCH, K + 1, N), jnp.float32))),
    "rank of status": ((A,), results(status=((BATCH, 1), jnp.int32))),
    "dtype of status": ((A,), results(status=((BATCH,), jnp.float32))),
    "length of sweeps": ((A,), results(sweeps=((1,), jnp.int32))),
    "dtype of off_norm": ((A,), results(off_norm=((BATCH,), jnp.int32))),
    "too few results": ((A,), results()[:5]),
    "too many results": ((A,), [*results(), jax.ShapeDtypeStruct((1,), jnp.float32)]),
}


@pytest.mark.parametrize("name", WRONG_BUFFERS)
def test_wrong_buffers(host: None, name: str) -> None:
    operands, out = WRONG_BUFFERS[name]
    with pytest.raises(Exception, match=r"expected|[Ww]rong number") as caught:
        call(*operands, out=out)
    assert "INVALID_ARGUMENT" in str(caught.value)


WRONG_CONFIGS: dict[str, Any] = {
    "not JSON": "svd please",
    "unfinished": '{"batch": 3',
    "a list": "[1, 2]",
    "empty object": "{}",
    "method": json.dumps(problem(method="magic")),
    "variant": json.dumps(problem(variant="magic")),
    "a route that is not native": json.dumps(problem(method="lapack")),
    "negative m": json.dumps(problem(m=-6)),
    "zero n": json.dumps(problem(n=0)),
    "no matrix": json.dumps(problem(batch=0)),
    "no matrix for a kernel": json.dumps(sim_problem(batch=0)),
    "fractional n": json.dumps(problem(n=3.5)),
    "huge m": json.dumps(problem(m=2**62)),
    "dtype": json.dumps(problem(dtype="int8")),
    "dtype of another type": json.dumps(problem(dtype="float64")),
    "missing m": json.dumps({k: v for k, v in problem().items() if k != "m"}),
    "compute_uv of another type": json.dumps(problem(compute_uv="yes")),
    "an unknown key": json.dumps(problem(colour="red")),
    "values only, six results": json.dumps(problem(compute_uv=False)),
    "full, thin results": json.dumps(problem(full_matrices=True)),
    "device": json.dumps(problem(device="moon")),
    "device of another type": json.dumps(problem(device=3)),
    "no GPU of that name": json.dumps(sim_problem(caps="moon")),
    "seed of another type": json.dumps(sim_problem(sim_seed="x")),
    "a key of another device": json.dumps(sim_problem(threads=3)),
    "a device not in the library": json.dumps(sim_problem(device="moon")),
    "no kernel": json.dumps(sim_problem(dtype="float64")),
    "no kernel of that row": json.dumps(sim_problem(variant="column")),
    "deep nesting": "[" * 100_000,
    "a number as config": 3,
    "no config": "",
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_wrong_attributes(host: None, name: str) -> None:
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT|expected"):
        call(A, config=WRONG_CONFIGS[name])


def test_extra_attribute(host: None) -> None:
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        call(A, full_matrices=True)


# Fine problems, which only the handler or the buffers cannot serve.
PLANNED = (
    "a route that is not native",
    "dtype of another type",
    "values only, six results",
    "full, thin results",
    "a device not in the library",
    "no kernel",
    "no kernel of that row",
)
UNPLANNED = [n for n, c in WRONG_CONFIGS.items() if isinstance(c, str) and c and n not in PLANNED]


@pytest.mark.parametrize("name", UNPLANNED)
def test_plans_of_wrong_problems(host: None, name: str) -> None:
    """What the handler refuses for its attribute alone, the planner refuses in words."""
    answer = json.loads(_native._plan_text("svd", WRONG_CONFIGS[name]))
    assert answer["error"].startswith("svd"), answer


def test_unknown_op(host: None) -> None:
    with pytest.raises(ValueError, match="fourier"):
        _native.plan("fourier", problem())


def test_describe(host: None) -> None:
    about = _native.describe()
    assert about["abi"] == _native.ABI
    assert about["ffi_api"] == [0, 3]
    assert about["isa"]["active"] in about["isa"]["compiled"]
    targets = {t["platform"]: t for t in about["targets"] if t["name"] == TARGET}
    assert set(targets) == {"cpu", "CUDA"}
    for target in targets.values():
        assert target["stages"] == ["instantiate", "execute"]
