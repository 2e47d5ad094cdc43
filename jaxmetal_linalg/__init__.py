"""JAX primitives for the singular value decomposition and its relatives.

Every function works on ``[..., m, n]``, under ``jit``, ``vmap``, ``grad`` to any order,
``jax.export`` and with sharded inputs. ``explain`` says what a call would run, ``doctor`` what is
present.
"""

from __future__ import annotations

from typing import Any

from jaxmetal_linalg import _cuda, _native
from jaxmetal_linalg._accuracy import ACC_GEMV_OUT_EPS as ACC_GEMV_OUT_EPS
from jaxmetal_linalg._accuracy import ACC_GEMV_SUM_EPS as ACC_GEMV_SUM_EPS
from jaxmetal_linalg._accuracy import ACC_LANCZOS_ULP as ACC_LANCZOS_ULP
from jaxmetal_linalg._accuracy import ACC_RATIO as ACC_RATIO
from jaxmetal_linalg._accuracy import ACC_RELATIVE_SIGMA_ULP as ACC_RELATIVE_SIGMA_ULP
from jaxmetal_linalg._accuracy import ACC_RSVD_OPTIMAL as ACC_RSVD_OPTIMAL
from jaxmetal_linalg._accuracy import ACC_RSVD_SIGMA as ACC_RSVD_SIGMA
from jaxmetal_linalg._accuracy import ACC_SIGMA_ULP as ACC_SIGMA_ULP
from jaxmetal_linalg._accuracy import CERTIFICATE_FAILURE as CERTIFICATE_FAILURE
from jaxmetal_linalg._accuracy import CERTIFICATE_ULP as CERTIFICATE_ULP
from jaxmetal_linalg._accuracy import GRAD_GAP_EPS as GRAD_GAP_EPS
from jaxmetal_linalg._device import devices as devices
from jaxmetal_linalg._device import use_device as use_device
from jaxmetal_linalg._errors import DeviceUnavailableError as DeviceUnavailableError
from jaxmetal_linalg._explain import explain as explain
from jaxmetal_linalg.lanczos import LanczosInfo as LanczosInfo
from jaxmetal_linalg.lanczos import LinearOperator as LinearOperator
from jaxmetal_linalg.lanczos import lanczos_svd as lanczos_svd
from jaxmetal_linalg.orthonormal import complete_basis as complete_basis
from jaxmetal_linalg.orthonormal import orthonormal_columns as orthonormal_columns
from jaxmetal_linalg.orthonormal import orthonormal_rows as orthonormal_rows
from jaxmetal_linalg.primitives.gemv import gemv as gemv
from jaxmetal_linalg.primitives.qr import QRResult as QRResult
from jaxmetal_linalg.primitives.qr import qr as qr
from jaxmetal_linalg.primitives.rsvd import rsvd as rsvd
from jaxmetal_linalg.primitives.svd import SVDInfo as SVDInfo
from jaxmetal_linalg.primitives.svd import SVDResult as SVDResult
from jaxmetal_linalg.primitives.svd import svd as svd
from jaxmetal_linalg.primitives.svd import svdvals as svdvals

__version__ = "0.1.0"


def doctor(*args: Any, **kwargs: Any) -> Any:
    """Runs the self-check: what is present, what is missing, one check per op and device.

    Returns: a report with ``.ok``; ``str`` is its text.
    """
    from jaxmetal_linalg import _doctor

    return _doctor.doctor(*args, **kwargs)


_native.register()
_cuda.use_libraries()
