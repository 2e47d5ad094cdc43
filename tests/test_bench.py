"""The benchmark's own arithmetic: accuracy, recommendations and tables. Nothing here is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import common, report, reports, routes, svd
from jaxmetal_linalg import _measure, _report, _tuning

A = np.random.default_rng(0).standard_normal((5, 7, 4)).astype(np.float32)


def test_ratios_of_a_good_and_of_a_spoilt_decomposition() -> None:
    u, s, vh = np.linalg.svd(A.astype(np.float64), full_matrices=False)
    good = _measure.svd_ratios(A, *(x.astype(np.float32) for x in (u, s, vh)))
    assert max(good) < 1
    spoilt = u.copy()
    spoilt[3, :, 1] *= 1.001
    bad = _measure.svd_ratios(A, spoilt, s, vh)
    assert bad.orthogonality_u > 1000
    assert bad.residual > 100
    assert bad.orthogonality_v < 1


def test_nan_never_passes() -> None:
    u, s, vh = np.linalg.svd(A, full_matrices=False)
    u[0, 0, 0] = np.nan
    assert _measure.svd_ratios(A, u, s, vh).orthogonality_u == np.inf
    assert _measure.sigma_error_ulp(np.full(3, np.nan), np.ones(3)) == np.inf


def test_full_factors_and_empty_matrices_are_judged() -> None:
    assert max(_measure.svd_ratios(A, *np.linalg.svd(A.astype(np.float64)))) < 1
    empty = np.zeros((0, 3), np.float32)
    assert max(_measure.svd_ratios(empty, np.zeros((0, 0)), np.zeros(0), np.eye(3))) == 0


def test_sigma_error_is_in_ulp_of_the_largest() -> None:
    reference = np.array([4.0, 1.0])
    s = np.array([4.0, 1.0 + 8 * 2.0**-23], dtype=np.float32)
    assert _measure.sigma_error_ulp(s, reference) == pytest.approx(2.0)


def test_interleaved_calls_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(_measure, "BUSY_S", 0)
    timings = _measure.interleaved(
        [lambda: calls.append("a"), lambda: calls.append("b")], (), repeats=2
    )
    assert calls == ["a", "b"] * 3
    assert [len(t.warm_ms) for t in timings] == [2, 2]


def _row(n: int, batch: int, op: str, **ms: float) -> common.Json:
    return {"op": op, "shape": str(n), "n": n, "batch": batch, "dtype": "float32", "ms": ms}


def test_recommendation_stops_at_the_first_loss() -> None:
    rows = []
    for op in ("svd", "svdvals"):
        rows += [
            _row(8, 100, op, interleaved=1, column=2, lapack=5),
            _row(16, 100, op, interleaved=3, column=2, lapack=5),
            _row(32, 100, op, column=6, lapack=5),
            _row(64, 100, op, column=4, lapack=5),
            _row(8, 1, op, interleaved=1, column=1, lapack=0.5),
        ]
    found = routes.recommend(rows, "float32")
    assert found == {
        "jacobi_max_n": 16,
        "jacobi_max_n_single": 0,
        "jacobi_max_n_values": 16,
        "jacobi_max_n_single_values": 0,
        "interleaved_max_n": 8,
    }
    for dtype in ("float32", "float64"):
        recommended = routes.recommend(rows, dtype)
        assert set(recommended) <= set(_tuning.known_keys("host", "svd"))


def test_shapes_on_the_command_line() -> None:
    assert common.parse_shape("12x8") == (1, 12, 8)
    assert common.label((1, 12, 8)) == "12x8"
    assert common.label(common.parse_shape("3x12x8")) == "3x12x8"


def test_one_row_has_every_column_and_makes_the_tables(tmp_path: Path) -> None:
    row = svd.measure((4, 6, 5), "float32", True, 0.01)
    row = json.loads(json.dumps(row))
    for key in ("op", "shape", "dtype", "device", "route", "variant", "min_ms", "max_ms"):
        assert row[key]
    assert row["residual"] < 5
    assert row["peers"]["jnp"]["ratio"] > 0
    assert "4x6x5" in svd.table([row])
    machine = {**_measure.machine(), "isa": "avx2"}
    text = report.markdown({"date": "2026-01-01", "machine": machine, "rows": [row]}, tmp_path)
    assert "| 4x6x5 |" in text
    assert machine["cpu"] in text


def _mac_report(date: str, name: str = "Apple M9", **changes: Any) -> dict[str, Any]:
    machine = {"cpu": name, "cores": 8, "system": "Darwin arm64, macOS 14.5", "python": "3.12.1"}
    check = {"op": "svd", "name": "jit", "route": "kernel/xor", "ok": True, "detail": "fine"}
    checks = [{**check, "device": "host"}, {**check, "device": "metal", "ok": False}]
    ms = {"host": 2.0, "metal": 0.5, _report.PEER: 4.0}
    return {
        "format": _report.FORMAT,
        "date": date,
        "doctor": {"ok": False, "machine": {**machine, "jax": "0.12"}, "checks": checks},
        "metal": {"name": name, "problem": ""},
        "rows": [
            {"shape": [100, 8, 8], "median_ms": ms},
            {"shape": [1, 512, 512], "error": "RuntimeError: timed out"},
        ],
        **changes,
    }


def test_reports_become_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (
        ("new.json", _mac_report("2030-02-01T00:00:00", "Apple M9 Max")),
        ("old.json", _mac_report("2030-01-01T00:00:00")),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "README.md").write_text("a <!-- reports: begin -->x<!-- reports: end --> b")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    files = [str(tmp_path / name) for name in ("new.json", "old.json")]
    assert reports.main(files) == 0
    text = capsys.readouterr().out
    assert "x<!--" in (tmp_path / "README.md").read_text()
    assert text.index("**Apple M9** (`old.json`") < text.index("**Apple M9 Max** (`new.json`")
    assert "| shape | host | metal | jnp on cpu | jnp on cpu / metal |" in text
    assert "| 100x8x8 | 2 | 0.5 | 4 | 8.00x |" in text
    assert "Self-checks passed: 1 of 2, on the GPU 0 of 1." in text
    assert "- FAILED svd on metal, jit: fine" in text
    assert "- FAILED 1x512x512: RuntimeError: timed out" in text
    assert reports.main(["--publish", *files]) == 0
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("a <!-- reports: begin -->\n**Apple M9**")
    assert reports.main(["--publish"]) == 0
    assert reports.NONE in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "doctor --report"),
        ("not JSON", "doctor --report"),
        ("[]", "doctor --report"),
        (json.dumps(_mac_report("d", metal={"problem": "none here"})), "none here"),
        (
            json.dumps(_mac_report("d")).replace("Darwin arm64", "Linux x86_64"),
            "expected a report from a Mac",
        ),
    ],
)
def test_other_files_are_no_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert reports.main(["--publish", str(path)]) == 1
    assert says in capsys.readouterr().err


def test_readme_shows_no_time_of_apple_hardware_but_from_reports() -> None:
    text = (report.ROOT / "README.md").read_text()
    inside = text.split("<!-- reports: begin -->\n")[1].split("<!-- reports: end -->")[0]
    stored = sorted((report.RESULTS / "reports").glob("*.json"))
    assert inside == reports.markdown({p.name: reports.read(p) for p in stored})
